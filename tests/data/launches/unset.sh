x=1; y=2; unset x
python3 -m verl.trainer.main_ppo data.x=${x-none} data.y=$y
