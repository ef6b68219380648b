A=(data.x=1 "data.y=a b")
A+=(data.z=$((1+1)))
L=(python3 -u)
"${L[@]}" -m verl.trainer.main_ppo "${A[@]}" data.n=${#A[@]}
