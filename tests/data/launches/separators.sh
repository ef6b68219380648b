IFS=,
list=data.a=1,data.b=2,,data.c=3,; A=(p '' q)
IFS='-]^'; other='data.d=4-data.e=5]data.f=6^data.g=7'
IFS=', '; mixed=' data.h=8 , data.i=9,,  data.j=10'
IFS=:; read -r one two three <<< 'x::y:z'
python3 -m verl.trainer.main_ppo $one "$two" $three $(IFS=,; printf '%s ' $list) "${A[@]}" data.k="${A[*]}" $(IFS='-]^'; printf '%s:' $other)
