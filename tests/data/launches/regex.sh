m=Qwen-32B-x
if [[ "$m" =~ ([0-9]+)B ]]; then s=${BASH_REMATCH[1]}; fi
python3 -m verl.trainer.main_ppo data.s=$s
