f() { local x=$1; y=$((x * 2)); echo "got $x"; return 3; }
x=5
r=$(f 4)
f 7 > /dev/null || z=$?
python3 -m verl.trainer.main_ppo data.r="$r" data.x=$x data.y=$y data.z=$z
