L=()
show() { L+=("$#:" "$@"); }
B=(1 2); h=x; E=()
show "${h:+${B[@]}}"; show "a${h:+${B[@]}}b"; show "${h:+${E[@]}}"; show "${h:+}"; show "${n:-${B[@]}}"; show "${n:-}"
show "${n:-${E[@]}}z"; show "${n:-"q r" s}"; show "${h:+${B[*]}}"; x="${h:+${B[@]}}"; show "$x"; show "${B[@]:+${B[@]}}"
show "${E[@]:-${B[@]}}"; show ${E[@]:-${B[@]}}; show ${B[@]:+"${B[@]}"}; show "${E[@]:-}"; show "${E[@]:+x}"; show "${E[@]}"
set -e
y=$(false; echo kept); show "$y"
python3 -m verl.trainer.main_ppo data.first=1 "${L[@]}"
