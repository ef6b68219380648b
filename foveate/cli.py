"""The command line: one verb per thing that a user does. Errors of the user are one line and exit code 1."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from foveate.cli_cluster import cluster, submit
from foveate.cli_data import data
from foveate.cli_eval import evaluate, generate, report, view
from foveate.cli_options import OnBadRow, Overrides, with_bad_rows
from foveate.cli_plan import import_verl_command, plan_command
from foveate.cli_prepare import prepare
from foveate.cli_serve import serve
from foveate.cli_train import cascade as cascade_command
from foveate.cli_train import mpo
from foveate.cli_vlmevalkit import vlmevalkit
from foveate.errors import ConfigError, UserError

app = typer.Typer(
    help="Reinforcement learning for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(prepare, name="prepare")
app.add_typer(data, name="data")
app.add_typer(vlmevalkit, name="vlmevalkit")
app.add_typer(cluster, name="cluster")
app.command()(submit)
app.command()(mpo)
app.command("cascade")(cascade_command)
app.command("plan")(plan_command)
app.command("import-verl")(import_verl_command)
app.command()(serve)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(report)
app.command()(view)

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the number of SIGINT."""
CONTINUED = ("cascade", "demo", "generate", "mpo", "rl", "sft")
"""Verbs that go on where they were when they are started again."""

Out = Annotated[Path, typer.Argument(help="Folder to write to.")]


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of the training run; the scenes stay the same.")] = 0,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/demo or runs/cascade.")] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="Learn from pairs of answers before GSPO.")] = False,
    overrides: Overrides = None,
) -> None:
    """Teach a small InternVL to ground by GSPO on this machine, in minutes, and write a report with pictures."""
    from foveate.demo import run_demo, run_demo_cascade

    teach = run_demo_cascade if cascade else run_demo
    teach(run or Path("runs/cascade" if cascade else "runs/demo"), seed, overrides or [])


@app.command()
def rl(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (shapes_gspo).")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Online reinforcement learning. The same run folder again continues an interrupted run."""
    from foveate.config import RLSettings
    from foveate.recipe import load_recipe
    from foveate.train.finish import finish
    from foveate.train.rl import run_rl

    finish(run_rl(load_recipe(recipe, with_bad_rows(overrides, on_bad_row), RLSettings)))


@app.command()
def sft(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (shapes_coldstart).")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Supervised fine-tuning on rows with extra_info.response. The same run folder again continues it."""
    from foveate.config import SFTSettings
    from foveate.recipe import load_recipe
    from foveate.train.finish import finish
    from foveate.train.sft import run_sft

    finish(run_sft(load_recipe(recipe, with_bad_rows(overrides, on_bad_row), SFTSettings)))


@app.command()
def doctor(model: Annotated[str | None, typer.Argument(help="Model folder to look at, or demo.")] = None) -> None:
    """Say what this installation is, and what is recognised in a model folder."""
    from foveate.doctor import examine
    from foveate.log import say

    say(examine(model))


@prepare.command("shapes")
def prepare_shapes_command(
    out: Out,
    train: Annotated[int, typer.Option(min=0, help="Training rows.")] = 4000,
    test: Annotated[int, typer.Option(min=0, help="Held-out rows; they share no scene with the training rows.")] = 512,
    kinds: Annotated[str, typer.Option(help="Kinds of expression, with commas: pair, attribute, relation.")] = "pair",
    side: Annotated[int, typer.Option(min=48, help="Side of the square pictures, in pixels.")] = 100,
    shortcut: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of right demonstrations for pairs; the rest name the larger object."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
) -> None:
    """Scenes of coloured shapes with referring expressions."""
    from foveate.data.shapes import KINDS, prepare_shapes
    from foveate.log import progress, say

    chosen = tuple(kinds.split(","))
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--kinds: unknown kind {unknown[0]!r}; allowed: {', '.join(KINDS)}")
    rows = {split: count for split, count in (("train", train), ("test", test)) if count}
    if not rows:
        raise ConfigError("--train and --test are both 0; ask for at least one row")
    with progress("drawing scenes", sum(rows.values())) as advance:
        prepare_shapes(out, rows, seed=seed, kinds=chosen, side=side, shortcut=shortcut, advance=advance)
    say(f"{out}: " + ", ".join(f"{count} {split} rows" for split, count in rows.items()))


@prepare.command("tiny")
def prepare_tiny_command(
    out: Out,
    tile: Annotated[int, typer.Option(min=28, help="Side of an image tile, in pixels (InternVL3.5: 448).")] = 112,
    max_tiles: Annotated[int, typer.Option(min=1, help="Most tiles per image.")] = 12,
    start: Annotated[
        str | None, typer.Option("--from", help="Take the weights of this tiny model (demo: the shipped one).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights.")] = 0,
) -> None:
    """A small InternVL with random weights, or with those of another one: the real architecture."""
    from foveate.log import say
    from foveate.model.recognise import resolve_folder
    from foveate.model.tiny import TinySize, build_tiny, retile

    if tile % 28:
        raise ConfigError(f"--tile {tile}: must be a multiple of 28 (patches of 14 pixels, joined two by two)")
    if start is None:
        build_tiny(out, TinySize(tile=tile, max_tiles=max_tiles), seed=seed)
    else:
        retile(resolve_folder(start), out, tile, max_tiles)
    say(f"{out}: a tiny InternVL with {tile}-pixel tiles")


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder, of any layout.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    to: Annotated[
        Literal["chat", "hf", "hf-old"],
        typer.Option(help="GitHub format, Hugging Face, or Hugging Face with the names of the released -HF folders."),
    ],
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest weight file, in 10^9 bytes.")] = 5.0,
) -> None:
    """Turn a checkpoint of one layout into another, bit for bit, without holding the model in memory."""
    from foveate.log import say
    from foveate.model.convert import convert
    from foveate.model.names import LAYOUTS

    made = convert(source, target, to, shard_bytes=int(max_shard_gb * 1e9))
    say(
        f"{target}: {LAYOUTS[made.source]} -> {LAYOUTS[made.target]}, {made.tensors:,} tensors, "
        f"{made.bytes / 1e9:.2f} GB in {made.files} file{'s' if made.files > 1 else ''}"
    )


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
