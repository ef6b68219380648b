read -r -d "" T <<EOF || true
line $((1 + 1))
EOF
x=$(cat <<"EOF"
$raw
EOF
)
python3 -m verl.trainer.main_ppo "data.t=$T" "data.x=$x"
