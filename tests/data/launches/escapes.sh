python3 -m verl.trainer.main_ppo data.a=$'x\x41\u0042\101\0051' data.b=$'\q\'\"\?' data.c=$'\u7a\E[0'
