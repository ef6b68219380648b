c="python3 -m verl.trainer.main_ppo data.a=1"
eval "$c data.b='x y'"
