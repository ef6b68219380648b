e= v=ab; L=("[${e//*/x}]" "[${e/*/x}]" "[${e/#*/x}]" "[${e/%*/x}]" "[${v//*/x}]" "[${v/*/x}]" "[${v/#*/x}]" "[${v/%*/x}]" "${v//\*/x}" "${v//?/x}")
python3 -m verl.trainer.main_ppo data.first=1 "${L[@]}"
