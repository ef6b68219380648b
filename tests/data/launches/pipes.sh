x=$(echo "A B" | tr A-Z a-z | cut -d" " -f2)
y=$(printf "%03d-%s" 7 z)
python3 -m verl.trainer.main_ppo data.x=$x data.y=$y data.z=$(seq -s, 1 3)
