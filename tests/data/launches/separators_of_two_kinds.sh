IFS=', '; mixed=' data.h=8 , data.i=9,,  data.j=10'
python3 -m verl.trainer.main_ppo $mixed data.a="$*" x$mixed,
