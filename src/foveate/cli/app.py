"""The command line: one verb per thing that a user does. Errors of the user are one line and exit code 1."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

import foveate
from foveate.cli import evaluate, lists, models, plan, serve, train
from foveate.cli.cluster import cluster, submit
from foveate.cli.data import data
from foveate.cli.prepare_reasoner import prepare
from foveate.cli.vlmevalkit import vlmevalkit
from foveate.errors import ConfigError, UserError, printable
from foveate.log import print_result

app = typer.Typer(
    help="Reinforcement learning for vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

VERBS = {
    "Train": {
        "demo": train.demo_command,
        "sft": train.sft_command,
        "mpo": train.mpo_command,
        "rl": train.rl_command,
        "cascade": train.cascade_command,
        "vico": train.vico_command,
        "vir": train.vir_command,
    },
    "Data and models": {
        "prepare": prepare,
        "data": data,
        "doctor": models.doctor_command,
        "convert": models.convert_command,
        "flash": models.flash_command,
        "export": models.export_command,
    },
    "Answer and evaluate": {
        "serve": serve.serve_command,
        "generate": evaluate.generate_command,
        "eval": evaluate.evaluate_command,
        "report": evaluate.report_command,
        "view": evaluate.view_command,
        "vlmevalkit": vlmevalkit,
    },
    "Look up": {
        "settings": lists.settings_command,
        "recipes": lists.recipes_command,
        "rewards": lists.rewards_command,
        "environments": lists.environments_command,
        "algorithms": lists.algorithms_command,
    },
    "Large runs": {
        "plan": plan.plan_command,
        "import-verl": plan.import_verl_command,
        "cluster": cluster,
        "submit": submit,
    },
}
"""What the help shows, panel by panel."""


def _version(asked: bool) -> None:
    if asked:
        print_result(f"foveate {foveate.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


for panel, verbs in VERBS.items():
    for name, verb in verbs.items():
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(verb)

_LEAST_COLUMNS = 20
INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the number of SIGINT."""
CONTINUED = ("cascade", "demo", "generate", "mpo", "rl", "sft", "vico", "vir")
"""Verbs that resume where they were when they are started again."""


def main() -> None:
    """Entry point of the `foveate` command. What a user can fix is one line and exit code 1; Ctrl-C is code 130."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve their neighbours
    columns = os.environ.pop("COLUMNS", "")
    if columns.isdecimal() and int(columns[:6]) >= _LEAST_COLUMNS:  # in fewer nothing would be shown
        os.environ["COLUMNS"] = columns
    from foveate.log import setup_logging

    setup_logging()
    try:
        _require_folder()
        app(prog_name="foveate")
    except UserError as error:
        sys.stderr.write(f"error: {_one_line(error)}\n")
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get("FOVEATE_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {_unexpected(error)}\n")
        raise SystemExit(1) from None
    except SystemExit as end:  # typer turns Ctrl-C into one
        if end.code == INTERRUPTED:
            signal.signal(signal.SIGINT, _leave)
            continues = "the same command continues from what is saved"
            sys.stderr.write(f"interrupted; {continues if sys.argv[1] in CONTINUED else 'nothing is half-written'}\n")
        raise


def _require_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise ConfigError("the working directory was deleted, or cannot be read; change to another one") from None


def _leave(*_: object) -> None:
    """Ctrl-C once more, while the process cleans up after the first: no traceback, and nothing more is waited for."""
    os._exit(INTERRUPTED)


def _one_line(error: Exception) -> str:
    """The message of an error as a line of bounded length, without secrets, that a terminal shows and does not obey."""
    from foveate.log import masked

    text = printable(masked(" ".join(str(error).split())))
    return text if len(text) <= 1900 else f"{text[:1500]} ... {text[-300:]}"


def _unexpected(error: Exception) -> str:
    """One line about an error that nobody foresaw: of the system, about a path, or a fault of foveate."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{printable(os.fsdecode(error.filename))[:300]}: {error.strerror}"
    return f"{type(error).__name__}: {_one_line(error)}; FOVEATE_TRACEBACK=1 shows where it was raised"
