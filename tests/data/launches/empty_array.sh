E=()
python3 -m verl.trainer.main_ppo data.a=1 "${E[@]}" ${E[@]} "$@" data.b=2
