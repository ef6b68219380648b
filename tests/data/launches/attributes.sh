declare -i bs=32 n=3*7; bs+=32; n+=bs/2
declare -ia sizes=(2+2 8); sizes+=(20-4); sizes[0]+=1
declare -u name=qwen; name+=vl
declare -l kind=GRPO; kind=GsPo
typeset -c title=gEO
total=7; halve() { local -i total=10; total+=-4/2; half=$total; }; halve; total+=1
declare -i off=4; declare +i off; off+=4; declare -i gone=1; unset gone; gone+=1
readonly fixed=5; readonly fixed=6 2> /dev/null
limit() { readonly most=9; }; limit
python3 -m verl.trainer.main_ppo data.bs=$bs data.n=$n "data.sizes=${sizes[*]}" data.name=$name data.kind=$kind data.title=$title \
    data.total=$total data.half=$half data.off=$off data.gone=$gone data.fixed=$fixed data.most=$most
