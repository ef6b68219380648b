x=$((1/0)); L+=(lost)
L+=("status $?")
f() { y=$((1/0)); L+=(in); }
f; L+=(lost)
if true; then z=$((1/0)); L+=(in); fi
L+=("sub $(echo a; q=$((1/0)); echo b)" "$?")
eval 'w=$((1/0)); L+=(in)
L+=(second)'; L+=("behind eval")
v=ab; L+=("${v:0:-9}"); L+=(lost)
C[-1]=3; L+=(lost)
((1/0)); L+=("expression $?")
[[ 1/0 -eq 3 ]]; L+=("test $?")
let 1/0; L+=("let $?")
for ((i=0; i<1/0; i++)); do L+=(in); done; L+=(behind)
A=(a b); L+=("${A[@]:0:-1}"); L+=(lost)
declare -r R=1; R=2; L+=(lost)
R=2 true; L+=("before a command")
for R in 1 2; do L+=(in); done; L+=(behind)
read R <<< 3; L+=("read $?")
g() { local h=$((1/0)); L+=(in); }
g; L+=(lost)
declare -i N=1/0; L+=(lost)
(t=$((1/0)); L+=(in)); L+=("subshell $?")
set -e
L+=("$((1/0))")
python3 -m verl.trainer.main_ppo data.first=1 "${L[@]}"
