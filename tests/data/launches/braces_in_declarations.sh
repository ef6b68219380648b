export d=x{1,2}
declare e=y{1,2}
f() { local g=z{1,2}; G=$g; }
f
h=k{1,2}
declare -a L=(a{1,2})
python3 -m verl.trainer.main_ppo data.d=$d data.e=$e data.g=$G "data.h=$h" "${L[@]}"
