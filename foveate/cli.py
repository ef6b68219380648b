"""The command line: one verb per thing that a user does. Errors of the user are one line and exit code 1."""

from __future__ import annotations

import os
import sys

import typer

from foveate import cli_eval, cli_models, cli_plan, cli_serve, cli_train
from foveate.cli_bench import bench
from foveate.cli_cluster import cluster, submit
from foveate.cli_data import data
from foveate.cli_prepare import prepare
from foveate.cli_vlmevalkit import vlmevalkit
from foveate.errors import UserError

app = typer.Typer(
    help="Reinforcement learning for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

VERBS = {
    "Train": {
        "demo": cli_train.demo,
        "sft": cli_train.sft,
        "mpo": cli_train.mpo,
        "rl": cli_train.rl,
        "cascade": cli_train.cascade,
    },
    "Data and models": {
        "prepare": prepare,
        "data": data,
        "doctor": cli_models.doctor,
        "convert": cli_models.convert,
        "export": cli_models.export,
    },
    "Answer and evaluate": {
        "serve": cli_serve.serve,
        "generate": cli_eval.generate,
        "eval": cli_eval.evaluate,
        "report": cli_eval.report,
        "view": cli_eval.view,
        "vlmevalkit": vlmevalkit,
    },
    "Large runs": {
        "plan": cli_plan.plan_command,
        "import-verl": cli_plan.import_verl_command,
        "cluster": cluster,
        "submit": submit,
        "bench": bench,
    },
}
"""What the help shows, panel by panel."""

for panel, verbs in VERBS.items():
    for name, verb in verbs.items():
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(verb)

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the number of SIGINT."""
CONTINUED = ("cascade", "demo", "generate", "mpo", "rl", "sft")
"""Verbs that go on where they were when they are started again."""


def main() -> None:
    """Entry point of the `foveate` command. What a user can mend is one line and exit code 1; Ctrl-C is code 130."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve their neighbours
    from foveate.log import setup_logging

    setup_logging()
    try:
        app(prog_name="foveate")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    except SystemExit as end:  # typer turns Ctrl-C into one
        if end.code == INTERRUPTED:
            continues = "the same command goes on where it was"
            sys.stderr.write(f"interrupted; {continues if sys.argv[1] in CONTINUED else 'nothing is half-written'}\n")
        raise
