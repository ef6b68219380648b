python3 -m verl.trainer.main_ppo data.a={1,2} +data.b={a:1} data.c={3..1} 'data.d={1,2}'
