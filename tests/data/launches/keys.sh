declare -A M=([small]=1e-6 [big]=2e-6)
k=big
python3 -m verl.trainer.main_ppo data.lr=${M[$k]} data.n=${#M[@]}
