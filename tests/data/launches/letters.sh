s=aBc; A=(pQ Rs)
python3 -m verl.trainer.main_ppo data.a=${s~~} data.b=${s~} data.c=${s^^} data.d=${s,,} data.e=${s^} data.f=${s~~[a]} "data.g=${A[*]~~}"
