python3 -m verl.trainer.main_ppo data.a=~/x a=~/y data.b=~ ~/data.c=1 data.d=1
