"""Whatever a command is given, what is wrong is one line and no traceback."""

from __future__ import annotations

import json
import logging
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import make_data, settings_of
from typer.core import TyperArgument, TyperGroup, TyperOption
from typer.main import get_command

from foveate.cli import app as cli

NUMBERS = [
    "nan",
    "inf",
    "-1",
    "0",
    "1e400",
    "9" * 5000,
    "99999999",
    "1.5",
    "",
    "ten",
    "0x10",
    "٣",
    "--",
    "-0",
    "1e-320",
]
TEXTS = [
    "",
    " ",
    ".",
    "..",
    "/",
    "~",
    "a" * 5000,
    "a/" * 3000,
    "\x1b[2J",
    "\ud83d",
    "é\u202e",
    "{{x}}",
    "[[[[",
    "*",
    "-",
    "--x",
    "con:aux",
    "a=b",
    "=",
    "a.b.c=1",
    "file:///etc/passwd",
    "/dev/null",
    "/proc/self/mem",
    "/etc/shadow/x",
    "$(id)",
    "'\"",
]
OVERRIDES = [
    "seed=" + "9" * 5000,
    "seed=-1",
    "seed=[1,2",
    "seed={a: {b: " + "{c: " * 200,
    "optim.lr=nan",
    "optim.lr=.inf",
    "optim.lr=",
    "optim=3",
    "train.steps=1e9",
    "run=",
    "run=" + "x" * 5000,
    "model.path=/dev/null",
    "model.path=" + "y" * 5000,
    "data.train=[]",
    "data.train=[[]]",
    "data.train=[/dev/null]",
    "data.train=[" + "z" * 5000 + "]",
    "algorithm=x:y",
    "reward=no.such:thing",
    "reward=/etc/passwd.py:x",
    "reward.name=a b:c",
    "=1",
    "a",
    "a=&x 1",
    "a=!!python/object:os.x 1",
    "rollout.temperature=1e-320",
    "rollout.top_p=nan",
    "rollout.max_tokens=99999999",
    "model.max_tiles=1e9",
    "cluster.nodes=-3",
    "data.columns={a: [b]}",
    "data.system=" + "s" * 100_000,
    "eval.every=0x",
    "log.to=[x]",
    "train.threads=0",
    "\ud800=1",
]


def files(folder: Path) -> list[str]:
    """Files of any content under names that commands read."""
    made = {
        "empty.yaml": b"",
        "list.yaml": b"- 1\n",
        "deep.yaml": b"{a: " * 20_000,
        "alias.yaml": b"a: &a [*a, *a]\n",
        "nul.yaml": b"run: \x00\n",
        "binary.yaml": bytes(range(256)),
        "digits.yaml": b"seed: " + b"9" * 5000,
        "long.yaml": b"a: " + b"x" * 2_000_000,
        "tag.yaml": b"run: !!python/object/apply:os.system [id]\n",
        "base.yaml": b"base: base.yaml\n",
        "keys.yaml": b"? [a]\n: 1\n",
        "nulpath.yaml": b'run: "a\\0b"\nmodel: {path: "a\\0"}\n',
        "empty.jsonl": b"",
        "deep.jsonl": b"[" * 100_000,
        "digits.jsonl": b'{"prompt": ' + b"9" * 5000 + b"}\n",
        "half.jsonl": b'{"prompt": "\\ud800"',
        "surrogate.jsonl": b'{"prompt": "\\ud800", "images": ["\\ud83d"]}\n',
        "text.parquet": b"PAR1 no PAR1",
        "empty.parquet": b"",
        "nul.jsonl": b'{"prompt":"a","images":["a\\u0000"]}\n',
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    models = {
        "deep": {"config.json": "[" * 100_000},
        "none": {},
        "digits": {"config.json": '{"model_type": "internvl", "x": ' + "9" * 5000 + "}"},
        "auto": {"config.json": json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})},
        "list": {"config.json": "[]", "model.safetensors": "x"},
        "half": {
            "config.json": json.dumps({"model_type": "internvl"}),
            "model.safetensors": "\x08" + "\0" * 7 + "{" * 8,
        },
    }
    for name, content in models.items():
        (folder / name).mkdir()
        for file, text in content.items():
            (folder / name / file).write_text(text)
    (folder / "loop").symlink_to("loop")
    (folder / "folder.yaml").mkdir()
    return [str(folder / name) for name in (*made, *models, "loop", "folder.yaml", "gone")]


VERBS = {
    "rl": 1,
    "sft": 1,
    "mpo": 1,
    "cascade": 1,
    "convert": 2,
    "export": 2,
    "doctor": 1,
    "report": 1,
    "plan": 1,
    "import-verl": 1,
    "data check": 1,
    "data show": 1,
    "generate": 0,
    "eval": 0,
    "prepare grounding": 1,
    "prepare shapes": 1,
    "submit": 1,
    "vlmevalkit tsv": 1,
    "nothing": 1,
}
OPTIONS = [
    "--to",
    "--out",
    "--data",
    "--model",
    "--samples",
    "--temperature",
    "--top-p",
    "--top-k",
    "--max-tokens",
    "--side",
    "--train",
    "--test",
    "--max-shard-gb",
    "--rows",
    "--column",
    "--image-root",
    "--workers",
    "--on-bad-row",
    "--gpus",
    "--seed",
    "--min-side",
    "--accuracy",
    "--head",
    "--env",
    "--stage",
    "--timeout",
    "--max-prompt-tokens",
    "--html",
    "--first",
]


def odd_command(choice: random.Random, paths: list[str], recipe: str) -> list[str]:
    verb, arguments = choice.choice(list(VERBS.items()))
    line = verb.split()
    for _ in range(max(0, arguments + choice.choice([0, 0, 0, 0, 1, -1]))):
        line.append(choice.choice([*paths, *TEXTS, recipe, recipe, recipe]))
    for _ in range(choice.choice([0, 0, 1, 2])):
        line += [choice.choice(OPTIONS), choice.choice([*NUMBERS, *TEXTS, *paths])]
    if verb in ("rl", "sft", "mpo", "cascade", "plan", "submit"):
        line += [choice.choice(OVERRIDES) for _ in range(choice.choice([1, 1, 2]))]
    if verb in ("generate", "eval"):
        line += [
            "--data",
            choice.choice(paths),
            "--model",
            choice.choice(paths),
            "--out",
            choice.choice([*TEXTS[-8:], *paths]),
        ]
    return line


def odd_commands(count: int, seed: int, paths: list[str], recipe: str) -> list[list[str]]:
    choice = random.Random(seed)
    return [odd_command(choice, paths, recipe) for _ in range(count)]


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    logger = logging.getLogger("foveate")
    before = list(logger.handlers)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(line: list[str]) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["foveate", *line])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr().err

    yield call
    logger.handlers[:] = before


def test_odd_command_lines_are_refused_in_one_line(run, tmp_path, tiny_folder):
    check(run, tmp_path, tiny_folder, lambda paths, recipe: odd_commands(30, 0, paths, recipe))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_odd_command_lines_are_refused_in_one_line(run, tmp_path, tiny_folder, seed):
    check(run, tmp_path, tiny_folder, lambda paths, recipe: odd_commands(100, seed, paths, recipe))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan shapes_gspo --gpus 9999999999999x8", "--gpus 9999999999999x8: must be GPU, 8xGPU or 2x8xGPU"),
        ("plan shapes_gspo --gpus 99999999x9xH100-80", "at most 99,999"),
        ("plan shapes_gspo --gpus 0x8xH100-80", "must be GPU"),
        ("generate --data a --out b --endpoint http://[::1", "--endpoint http://[::1: must begin with http"),
        ("generate --data a --out b --endpoint http://a:99999/v1", "must begin with http"),
        ("generate --data a --out b --endpoint http:///v1", "must begin with http"),
        ("vlmevalkit config --out b --endpoint http://[ --served-model m --dataset d", "must begin with http"),
    ],
)
def test_values_that_mislead_libraries_are_refused_by_their_option(run, line, said):
    code, printed = run(line.split())
    assert (code, printed.count("\n")) == (1, 1), printed
    assert said in printed


BLOCKING = ("serve", "view", "demo", "cluster", "submit")
"""Verbs that would go on until they are stopped."""


def every_option(paths: list[str], recipe: str) -> list[list[str]]:
    """Each option of each verb with odd values, behind arguments that may be right."""

    def leaves(command: Any, path: list[str]) -> list[tuple[list[str], Any]]:
        if isinstance(command, TyperGroup):
            return [leaf for name, one in command.commands.items() for leaf in leaves(one, [*path, name])]
        return [(path, command)]

    lines = []
    for path, command in leaves(get_command(cli.app), []):
        if path[0] in BLOCKING:
            continue
        arguments = [recipe if one.name == "recipe" else paths[0] for one in command.params if one.required]
        arguments = arguments[: sum(isinstance(one, TyperArgument) and one.required for one in command.params)]
        flags = [one.opts[0] for one in command.params if isinstance(one, TyperOption)]
        required = [[one.opts[0], paths[-1]] for one in command.params if one.required and one.opts[0].startswith("-")]
        for flag in flags:
            for value in [*NUMBERS, *TEXTS[:8], *paths[:4], paths[-1]]:
                given = [words for words in required if words[0] != flag]
                lines.append([*path, *arguments, *(word for words in given for word in words), flag, value])
    return lines


@pytest.mark.slow
def test_every_option_refuses_odd_values_in_one_line(run, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check(run, tmp_path, tiny_folder, lambda paths, recipe: random.Random(5).sample(every_option(paths, recipe), 200))


def check(run, tmp_path, tiny_folder, make_lines):
    paths = files(tmp_path)
    values = settings_of(tmp_path / "run", tiny_folder, make_data(tmp_path / "made"))
    values["model"]["path"] = str(tmp_path / "none")  # nothing is trained, whatever gets through
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    found = []
    for line in make_lines(paths, str(recipe)):
        code, said = run(line)
        last = said.strip().splitlines()[-1] if said.strip() else ""
        is_usage = code == 2 and "Usage" in said
        is_line = code == 1 and bool(re.fullmatch(r"error: [^\x00-\x08\x0b-\x1f]+", last)) and len(last) < 2_000
        if "Traceback" in said or "FOVEATE_TRACEBACK" in said or not (is_usage or is_line or code == 0):
            found.append(([word[:80] for word in line], code, last[:300]))
    assert not found, "\n".join(map(str, found))
