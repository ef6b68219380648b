python3 -m verl.trainer.main_ppo trainer.logger=['console','wandb'] data.a='["a","b"]' data.b="it's" data.c=a\ b data.d=$'x\ty' "data.e=\$HOME" 
