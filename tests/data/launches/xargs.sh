printf '%s\n' data.b=2 data.c=3 | xargs python3 -m verl.trainer.main_ppo data.a=1
