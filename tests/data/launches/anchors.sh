file=train; keys=(lr n); none=; hash=a#b#c
python3 -m verl.trainer.main_ppo data.a=${file/%/.parquet} data.b=${file/#/my_} data.c=${file//} "${keys[@]/#/data.}" "${keys[@]/%/=1}" \
    data.d="${none/#/x}" data.e="${file/$none/y}" data.f="${file/%$none/y}" data.g=${hash//#/-} data.h=${hash/%c/d}
