python3 -m verl.trainer.main_ppo data.a=1 2>&1 | tee /dev/null

