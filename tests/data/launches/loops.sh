s= t=
for i in 1 2 {5..7}; do s=$s$i; done
for ((j = 0; j < 3; j++)); do t=$t$j; [ $j = 1 ] && break; done
python3 -m verl.trainer.main_ppo data.s=$s data.t=$t
