p=QwenVL
python3 -m verl.trainer.main_ppo data.a=${p,,} data.b=${p^^} data.c=${p,} data.d=${p//Q/q}
