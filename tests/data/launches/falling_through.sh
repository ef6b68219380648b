case a in a) one=1 ;& b) two=2;;& [a-c]) three=3;; a) four=4 ;; esac
case z in z) five=5;& y) six=6; esac
python3 -m verl.trainer.main_ppo data.a=$one$two$three${four-} data.b=$five$six
