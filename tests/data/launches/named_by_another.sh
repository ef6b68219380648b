name=lr; lr=1e-6; run_a=1; run_b=2; set -- one two
python3 -m verl.trainer.main_ppo data.lr=${!name:-none} data.b=${!name/e/f} data.c=${!name:0:1} "data.d=${!run_*}" ${!run_@} data.e=${!#}
