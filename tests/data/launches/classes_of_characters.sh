x=ab12CD; L=()
case $x in [[:lower:]]*) L+=(low);; esac
[[ $x == *[[:digit:]][[:upper:]]* ]] && L+=(mid)
[[ $x =~ ^[[:alpha:]]+[[:digit:]]+ ]] && L+=("${BASH_REMATCH[0]}")
L+=("${x//[[:digit:]]/_}" "${x//[![:digit:]]/}" "${x##[[:alnum:]]}" "$(echo $x | tr '[:lower:]' '[:upper:]')" "$(echo $x | tr -d '[:digit:]')" "${x//[]a]/Q}" "${x//[a\]]/Q}")
case '*' in \*) L+=(star);; esac
case 'q' in \*) L+=(no);; *) L+=(yes);; esac
python3 -m verl.trainer.main_ppo data.first=1 "${L[@]}"
