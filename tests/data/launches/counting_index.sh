i=0; A=(a b c)
L=("${A[i++]:-x}" $i ${A[i++]:-x} $i ${B[i++]:-x y} $i "${A[i-9]:-none}")
python3 -m verl.trainer.main_ppo data.first=1 "${L[@]}"
