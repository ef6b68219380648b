python3 -m verl.trainer.main_ppo data.a=1 data.b=x#y  # data.c=3
