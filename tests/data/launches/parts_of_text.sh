v=abcdef; L=("${v[@]:2}" "${v[*]: -2}" "${v[@]:0:1}" "${#v[@]}" "${v[@]/b/X}" "${v[@]#a}" "${!v[@]}" "${w[@]:1}" "x${v[@]:1:2}y" ${v[@]^^})
if (( k )); then :; else L+=("$?"); fi
if false; then :; elif [ a = b ]; then :; else L+=("$?"); fi
if false; then :; elif [ a = b ]; then :; fi; L+=("$?")
python3 -m verl.trainer.main_ppo data.first=1 "${L[@]}"
