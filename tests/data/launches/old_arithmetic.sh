n=4; A=(2 3)
python3 -m verl.trainer.main_ppo data.a=$[3*3] data.b="$[n + A[1]]" data.c=x$[ (2+3)*n ]y data.d='$[1]'
