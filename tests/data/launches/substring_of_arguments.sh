set -- a b c
python3 -m verl.trainer.main_ppo data.a="${@:2}" data.b="${*:1:2}"
