L=(${E:-data.a=1 data.b=2} "${E:-one two}" ${E:-"in quotes" out of 'them'} ${E:-a${F:- b c }d} pre${E:-x y}post ${L:+no} ${E-$(echo p q)})
IFS=,
L+=(${E:-k,l m})
python3 -m verl.trainer.main_ppo data.first=1 "${L[@]}" ${E:-data.y=1,data.z=2}
