IFS=: read -r a b <<< 'p:q:'; IFS=: read -r c d <<< 'p:q::'; IFS=: read -r e <<< 'p:'; IFS=: read -ra f <<< ':p::'
IFS=,; g=(x y); h=${g[*]}
python3 -m verl.trainer.main_ppo data.a="$a" data.b="$b" data.c="$c" data.d="$d" data.e="$e" data.f=${#f[@]} data.h="$h"
