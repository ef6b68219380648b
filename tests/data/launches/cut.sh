p=/models/Qwen2.5-VL-7B.tar.gz
python3 -m verl.trainer.main_ppo data.a=${p##*/} data.b=${p%.*} data.c="${p%%.*}" data.d=${p#/*/} data.e=${p//[.-]/_}
