A=1
export B=2
bash -c 'python3 -m verl.trainer.main_ppo data.a=${A:-none} data.b=$B'
