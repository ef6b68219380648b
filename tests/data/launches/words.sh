E="data.a=1   data.b=2"
IFS_=x
python3 -m verl.trainer.main_ppo $E "$E" data.c=$E
