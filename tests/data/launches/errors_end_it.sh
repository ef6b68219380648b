set -e
if false; then x=1; fi
false || x=2
! true
python3 -m verl.trainer.main_ppo data.x=$x
false
python3 -m verl.trainer.main_ppo data.x=3
