N=8
if [ "$1" = big ]; then N=512; elif [[ $1 == sm* && -n $1 ]]; then N=16; else N=32; fi
python3 -m verl.trainer.main_ppo data.n=$N
