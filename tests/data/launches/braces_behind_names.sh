g=1 gx=2 gy=3
L=($g{x,y} ${g}{x,y} "$g"{x,y} $g{-a,-b} $g-{x,y} pre$g{x,y}-post)
python3 -m verl.trainer.main_ppo data.first=1 "${L[@]}"
