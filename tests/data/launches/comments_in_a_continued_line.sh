python3 -m verl.trainer.main_ppo data.a=1 \
  data.b=2 \
  # data.c=3 \
  data.d=4 || true
