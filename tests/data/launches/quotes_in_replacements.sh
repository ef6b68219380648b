x=abc; new='<&>'
python3 -m verl.trainer.main_ppo "data.a=${x/b/\n}" "data.b=${x/b/"q r"}" "data.c=${x/b/'q  r'}" "data.d=${x/b/"$new"}" "data.e=${x//[ab]/\&}"
