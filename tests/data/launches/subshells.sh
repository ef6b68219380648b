x=1
(x=2; y=3)
{ z=4; }
echo hi | x=5
python3 -m verl.trainer.main_ppo data.x=$x data.y=${y:-none} data.z=$z
