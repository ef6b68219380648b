add() { local -a more=(data.b=2 "data.c=$1"); ALL+=("${more[@]}"); }
ALL=(data.a=1)
add "x y"
python3 -m verl.trainer.main_ppo "${ALL[@]}"
