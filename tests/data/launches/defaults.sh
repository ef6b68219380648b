B=
python3 -m verl.trainer.main_ppo data.a=${A:-8} data.b=${B:-9} data.c=${B-10} data.d=${C:=11} data.e=$C data.f=${C:+on}
