n=-7
python3 -m verl.trainer.main_ppo data.a=$((n / 2)) data.b=$((n % 3)) data.c=$((n >> 1)) data.d=$((~n & 0xff))
