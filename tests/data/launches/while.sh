n=1
while [ $n -lt 100 ]; do n=$((n * 3)); done
until (( n % 5 == 0 )); do ((n++)); done
python3 -m verl.trainer.main_ppo data.n=$n
