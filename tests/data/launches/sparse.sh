A=([9]=z [1]=y [5]=x); B=(p q r s); unset 'B[-1]' "B[0 + 1]"; C=(1 2); unset 'C[@]'; word=x; unset 'word[0]'
set -- one two three
python3 -m verl.trainer.main_ppo data.a="${A[*]:2:1}" data.b="${A[*]: -5}" data.c="${!A[*]}" data.d="${B[*]}" data.e=${!B[@]} data.f=${C-none} \
    data.g=${word-none} data.h="${A[*]: -50}" data.i="${*: -2:1}" data.j="${*:2}" "data.k=${A[*]:9:4}"
