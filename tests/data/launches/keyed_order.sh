declare -A over=([lr]=1 [n]=2 [batch]=3); over[seed]=4; unset 'over[n]'; over[n]=7; flags=()
for key in "${!over[@]}"; do flags+=("data.$key=${over[$key]}"); done
python3 -m verl.trainer.main_ppo "${flags[@]}" data.all="${over[*]}"
