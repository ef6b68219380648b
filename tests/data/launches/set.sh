set -- one 'two three' four
shift
python3 -m verl.trainer.main_ppo data.n=$# "data.a=$1" data.b=$2 data.all="$*"
