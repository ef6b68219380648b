python3 -m verl.trainer.main_ppo data.a=${GIVEN} data.b=${GIVEN:+yes}
