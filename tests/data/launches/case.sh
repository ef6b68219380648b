M=gb200
case "$M" in a|b) x=1 ;; gb*) x=2 ;;& *200) y=3 ;; *) y=4 ;; esac
python3 -m verl.trainer.main_ppo data.x=$x data.y=$y
