a=$((1024 * 2 + 0x10))
((a += 2, b = a % 7 ? 3 : 4))
python3 -m verl.trainer.main_ppo data.a=$a data.b=$b data.c=$(((a - b) / 2 ** 3))
