"""A launch script is read as bash reads it: the arguments of its launch are those that bash itself passes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from foveate.errors import DataError
from foveate.tools.import_verl.hydra import HydraFault, parse_value
from foveate.tools.import_verl.launch import read_launch
from foveate.tools.import_verl.recorded import record_launch

RUN = "python3 -m verl.trainer.main_ppo"
SCRIPTS = sorted((Path(__file__).parent.parent / "data" / "launches").glob("*.sh"))
BRANCHES = SCRIPTS[0].with_name("branches.sh")


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """The arguments of a script's launch as they are read, and as bash passes them."""
    monkeypatch.chdir(tmp_path)
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/me", "PWD": str(tmp_path), "GIVEN": "given"}

    def both(text, *arguments):
        path = tmp_path / "launch.sh"
        path.write_text(text + "\n")
        read = read_launch(path, environment, arguments)
        recorded = record_launch(path, environment, arguments, 1)
        assert read.program == recorded.program
        return read.arguments, recorded.arguments

    return both


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_arguments_are_those_that_bash_passes(launches, script):
    read, passed = launches(script.read_text())
    assert [argument.text for argument in read] == [argument.text for argument in passed]
    assert not any(argument.unread for argument in read)


ARRAYS = "C=(4 5 6)\ndeclare -A M=([x]=2 [y]=3 [a b]=7)\nk=x\nx=y\n"


@pytest.mark.parametrize(
    "body",
    [
        "v=$((M[x] * 10 + M[$k])) w=$((M['y'] + M[a b] + M[no] + M[1+1]))",
        "((M[x]++)); ((M[new] += M[y] ** 2)); let M[y]-=5; v=${M[x]}-${M[new]} w=${M[y]}",
        "for key in x y; do ((sum += M[$key])); done; v=$sum w=$((M))",
        "v=${C[-9]} w=$((C[-9] + 1))",
        "((C[-9] = 3)); v=$? w=${C[*]}",
        "unset 'C[-9]'; v=$? w=${C[*]}",
        "((++3)); v=$? w=$((5--3 + --$((C[0]))))",
        "v=1; C[-9]=2; v=3\nw=${C[*]}",
        "v=${C[@]:M[x]:1} w=${C[2 - 1]:-none}",
    ],
)
def test_keys_and_indices_are_those_of_bash(launches, body):
    read, passed = launches(f'{ARRAYS}{body}\n{RUN} data.a=1 "data.v=$v" "data.w=$w"')
    assert [(argument.text, argument.unread) for argument in read] == [(argument.text, "") for argument in passed]


@pytest.mark.parametrize("body", ["v=${C[-9]}", "v=$((C[-9]))", "((C[-9] = 1)) || true", "unset 'C[-9]'"])
def test_an_index_before_an_array_ends_a_script_that_ends_at_errors(launches, body):
    with pytest.raises(DataError):
        launches(f"set -e\n{ARRAYS}{body}\n{RUN} data.a=1")


def test_arguments_of_the_script_are_its_positional_parameters(launches):
    read, passed = launches(BRANCHES.read_text(), "small")
    assert [argument.text for argument in read] == [argument.text for argument in passed] == ["data.n=16"]


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (f"x=$(date +%s)\n{RUN} data.a=1 data.b=$x", "data.b", "line 1: the output of date"),
        (f"{RUN} data.a=1 data.b=$RANDOM", "data.b", "line 1: $RANDOM of a running shell"),
        (f"{RUN} data.a=1 data.b=$NOWHERE", "data.b", "needs $NOWHERE"),
        (f"N=1\nif nvidia-smi; then N=2; fi\n{RUN} data.a=1 data.b=$N", "data.b", "line 2: a branch whose test"),
        (f"A=(data.a=1)\nif ask; then A+=(data.b=2); fi\n{RUN} ${{A[@]}}", "data.b", "line 2: a branch whose test"),
        (f"E=\nask && E='data.b=3'\n{RUN} data.a=1 $E", "data.b", "line 2: a branch whose test"),
        (f"n=0\nwhile ask; do n=$((n + 1)); done\n{RUN} data.a=1 data.b=$n", "data.b", "line 2: a branch whose test"),
        (f"N=$(nproc)\n{RUN} data.a=1 data.b=$((N / 2))", "data.b", "line 1: the output of nproc"),
        (f"{RUN} data.a=1 data.b=$((HERE + 2))", "data.b", "needs $HERE"),
        (f"ask && declare -i N\nN=2\n{RUN} data.a=1 data.b=$N", "data.b", "line 2: what the attributes of N make"),
        (f"ask && IFS=,\nx=p,q\n{RUN} data.a=1 data.b=$x", "data.b", "line 3: a value split at an $IFS"),
        (f"x=pq\n{RUN} data.a=1 data.b=${{x/q/<&>}}", "data.b", "line 2: a replacement with &"),
        (f"echo 5 | xargs -I{{}} {RUN} data.a=1 data.b={{}}", "data.b", "line 1: what xargs takes"),
        (f"A=(4 5)\nunset A[$RANDOM]\n{RUN} data.a=1 data.b=$A", "data.b", "line 2: the element of A"),
        (f"A=($(hosts) last)\n{RUN} data.a=1 data.b=${{#A[@]}}", "data.b", "line 1: the output of hosts"),
        (f"A=($(hosts) last)\n{RUN} data.a=1 data.b=${{A[1]}}", "data.b", "line 1: the output of hosts"),
        (f"A=($(hosts) last)\n{RUN} data.a=1 data.b=${{A[@]:1}}", "data.b", "line 1: the output of hosts"),
        (f"f() {{ {RUN} data.a=1 data.b=$#; }}\nf 1 $(hosts)", "data.b", "line 2: the output of hosts"),
        (f"set -- $(hosts) 2\nshift\n{RUN} data.a=1 data.b=$1", "data.b", "line 1: the output of hosts"),
        (f"n=1\n((n = $(nproc) / 2)) || :\n{RUN} data.a=1 data.b=$n", "data.b", "line 2: the output of nproc"),
        (f"n=1\nx=$((NOWHERE + ++n))\n{RUN} data.a=1 data.b=$n", "data.b", "needs $NOWHERE"),
        (f"A=(1)\nask && A+=(2)\n{RUN} data.a=1 data.b=${{#A[@]}}", "data.b", "line 2: a branch whose test"),
    ],
)
def test_what_is_not_certain_is_named_and_not_guessed(launches, text, key, reason):
    read, _ = launches(text)
    unread = {argument.text: argument.unread for argument in read if argument.unread}
    assert list(unread) == [key]
    assert unread[key].startswith(reason)
    assert read[0].text == "data.a=1"


@pytest.mark.parametrize("pipe", ["cat settings | xargs", "echo data.b=2 | xargs -n 1", "echo \"data.b='2'\" | xargs"])
def test_arguments_that_come_from_a_pipe_are_named_where_they_were_not_read(tmp_path, pipe):
    path = tmp_path / "launch.sh"
    path.write_text(f"{pipe} {RUN} data.a=1\n")
    read = read_launch(path, {}, []).arguments
    assert read[0].text == "data.a=1"
    assert [argument.unread.startswith("line 1: ") for argument in read[1:]] == [True]


def test_a_readonly_variable_keeps_its_value_and_is_named(tmp_path):
    path = tmp_path / "launch.sh"
    path.write_text(f"declare -r N=5\nN=6\n{RUN} data.n=$N\n")
    launch = read_launch(path, {}, [])
    assert [argument.text for argument in launch.arguments] == ["data.n=5"]
    assert "line 2: N is readonly, and keeps its value" in launch.notes


def test_an_option_of_the_shell_that_is_not_followed_is_named(tmp_path):
    path = tmp_path / "launch.sh"
    path.write_text(f"shopt -s extglob nocasematch\n{RUN} data.n=1\n")
    assert "line 1: shopt -s nocasematch, which is not followed here" in read_launch(path, {}, []).notes


def test_an_unforeseen_error_ends_as_a_message_with_the_line(tmp_path, monkeypatch):
    def fails(*_):
        raise KeyError("lost")

    monkeypatch.setattr("foveate.tools.import_verl.bash.interpreter.evaluate_test", fails)
    path = tmp_path / "launch.sh"
    path.write_text(f"n=1\n[[ $n ]]\n{RUN} data.n=$n\n")
    with pytest.raises(DataError, match=r"launch\.sh, line 2: cannot be read here \(KeyError: 'lost'\)"):
        read_launch(path, {}, [])


def test_an_error_in_one_of_two_branches_leaves_both_states(launches):
    text = f"N=1\nif ask; then x=$((1/0)); fi; N=2\n{RUN} data.a=1 data.b=$N"
    read, _ = launches(text)
    assert "line 2: left early in a branch" in {argument.text: argument.unread for argument in read}["data.b"]


def test_a_test_that_was_not_read_is_taken_not_to_end_the_script_and_named(tmp_path):
    path = tmp_path / "launch.sh"
    path.write_text(f"if ask; then exit 1; fi\n{RUN} data.n=1\n")
    assert "line 1: a test that was not read is taken not to end the script" in read_launch(path, {}, []).notes


def test_a_branch_that_sets_the_same_is_no_doubt(launches):
    read, _ = launches(f"if ask; then N=2; else N=2; fi\n{RUN} data.n=$N")
    assert [argument.text for argument in read] == ["data.n=2"]


def test_a_device_of_another_maker_is_not_there(launches):
    probe = "$(python3 -c 'import torch_npu' 2>/dev/null && echo npu || echo gpu)"
    read, passed = launches(f"D=${{D:-{probe}}}\n{RUN} data.device=$D")
    assert [argument.text for argument in read] == [argument.text for argument in passed] == ["data.device=gpu"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"x=1\n<<<<<<< HEAD\nx=2\n{RUN} data.a=1", "line 2: bash cannot read on"),
        (f"if true; then\n{RUN} data.a=1", "bash cannot read on: the script ends before elif or else or fi"),
        (f"set -u\nx=$NOT_GIVEN\n{RUN} data.a=1", r"line 2: \$NOT_GIVEN is set nowhere, and `set -u` ends the script"),
        (f"M=${{MODEL:?must be set}}\n{RUN} data.a=1", r"line 1: the script ends without \$MODEL: must be set"),
        (f"exit 0\n{RUN} data.a=1", "no line launches verl"),
        (f"echo 'no\n{RUN} data.a=1", "bash cannot read on: no closing '"),
        (f"if false; then {RUN} data.a=1; fi", "no line launches verl"),
    ],
)
def test_a_script_that_bash_does_not_launch_is_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "launch.sh"
    path.write_text(text + "\n")
    with pytest.raises(DataError, match=message):
        read_launch(path, {}, [])


def test_one_of_several_launches_is_chosen_and_named(tmp_path):
    path = tmp_path / "launch.sh"
    path.write_text(f"for n in 1 2 3; do {RUN} data.n=$n; done\n")
    launch = read_launch(path, {}, [], 2)
    assert [argument.text for argument in launch.arguments] == ["data.n=2"]
    assert "the script launches 3 times (lines 1, 1, 1); the recipe is of number 2" in launch.notes
    with pytest.raises(DataError, match="has 3 launches of verl, so that there is none of number 4"):
        read_launch(path, {}, [], 4)


def test_a_script_that_another_one_sources_is_read(tmp_path):
    (tmp_path / "env.sh").write_text("N=7\n")
    path = tmp_path / "launch.sh"
    path.write_text(f'source "$(dirname "$0")/env.sh"\nsource missing.sh\n{RUN} data.n=$N\n')
    launch = read_launch(path, {"PWD": str(tmp_path)}, [])
    assert [argument.text for argument in launch.arguments] == ["data.n=7"]
    assert "line 2: missing.sh is sourced, and was not read" in launch.notes


HOSTILE = {
    "binary": bytes(range(256)) * 40,
    "no text": b"\xff\xfe\x00launch",
    "huge": b"x=1\n" * 500_000,
    "brackets": b"(" * 20_000,
    "substitutions": b"x=" + b"$(echo " * 3_000 + b")" * 3_000,
    "sums": b"x=$((" + b"(" * 5_000 + b"1" + b")" * 5_000 + b"))",
    "parameters": b"x=" + b"${a:-" * 3_000 + b"}" * 3_000,
    "ifs": b"if true; then " * 2_000,
    "endless": b"while true; do x=$x$x; done",
    "growing": b"x=aaaaaaaa\n" + b"x=$x$x\n" * 60,
    "recursive": b"f() { f; f; }\nf",
    "doubtful": b"f() { if ask; then f; fi; if ask; then f; fi; }\nf",
    "powers": b"x=$((9 ** 9 ** 9 ** 9))\ny=$((1 << 99999999999))\nz=$((x[x[x[1]]]))",
    "braces": b"echo {1..999999999} {a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}",
    "regex": b"[[ aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! =~ (a+)+$ ]]",
    "pattern": b"x=" + b"a" * 1_500 + b"; y=${x##*a*a*a*a*a*a*a*b}",
    "names itself": b"a=b; b=a; x=$((a)); x=${!x}; source $0; . launch.sh",
    "marks": "x=\ue0009\ue001; y=$x\n".encode(),
    "ends in a word": b"python3 -m verl.trainer.main_ppo data.a=\\",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_script_is_refused_in_time(tmp_path, name):
    path = tmp_path / "launch.sh"
    path.write_bytes(HOSTILE[name])
    if name == "ends in a word":
        assert [argument.text for argument in read_launch(path, {}, []).arguments] == ["data.a="]
        return
    with pytest.raises(DataError):
        read_launch(path, {"PWD": str(tmp_path)}, [])


def test_a_script_cut_anywhere_is_read_or_refused(tmp_path):
    whole = "\n".join(path.read_text() for path in SCRIPTS)
    path = tmp_path / "launch.sh"
    for end in range(1, len(whole), 41):
        path.write_text(whole[:end])
        with suppress(DataError):
            assert read_launch(path, {"PWD": str(tmp_path)}, []).program


def test_the_run_takes_what_its_launchers_are_given(tmp_path):
    path = tmp_path / "launch.sh"
    beside = "for n in {1..20}; do sleep 1 & done\n"
    path.write_text(f"{beside}N=$(expr 40 + 2)\nray job submit -- {RUN} data.n=$N 'data.x=a\nb'\n")
    launch = record_launch(path, {"PATH": os.environ["PATH"]}, [], 1)
    assert [argument.text for argument in launch.arguments] == ["data.n=42", "data.x=a\nb"]
    path.write_text("exit 3\n")
    with pytest.raises(DataError, match="ended with status 3 and 0 launches of verl"):
        record_launch(path, {"PATH": os.environ["PATH"]}, [], 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1_000", 1000), ("007", "007"), ("-.5", -0.5), ("1.", 1.0),
        ("TRUE", True), ("null", None), ("", ""),
        ("[a, 'b c',1]", ["a", "b c", 1]), ("{a:1,b:[x]}", {"a": 1, "b": ["x"]}), ("'8'", "8"), ("a b ", "a b"),
        ("hdfs://h:80/x", "hdfs://h:80/x"), (r"a\,b", "a,b"), ("${data.x}/y", "${data.x}/y"),
        ("low_var_kl", "low_var_kl"),
        ("[]", []), ("k3+", "k3+"), ("inf", float("inf")), ("yes", "yes"),
    ],
)  # fmt: skip
def test_a_value_is_read_by_the_grammar_of_hydra(text, value):
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["a,b", "[a", "{a}", "'a", "range(1,3)", "a=b", "#", "[" * 200])
def test_a_value_that_hydra_refuses_is_refused(text):
    with pytest.raises(HydraFault):
        parse_value(text)
