d=$(cd "$(dirname "$0")" && pwd)
python3 -m verl.trainer.main_ppo data.a=$d data.b=$(basename "$0" .sh) data.c=`basename /a/b.c .c`
