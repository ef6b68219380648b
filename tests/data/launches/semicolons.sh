if true; then x=1; else x=2; fi; y=3; python3 -m verl.trainer.main_ppo data.x=$x data.y=$y; z=4
