python3 -m verl.trainer.main_ppo data.a=${A:-${B:-"x y"}/z} data.b="${A:-${B:-q}}"
