A=(p q r s)
x=abcdef
python3 -m verl.trainer.main_ppo data.a="${A[*]:1:2}" data.b=${x:2:3} data.c=${x: -2} data.d=${A[-1]}
