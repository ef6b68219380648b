A_x=3
n=A_x
python3 -m verl.trainer.main_ppo data.a=${!n}
