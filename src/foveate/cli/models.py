"""The verbs that look at models: `foveate doctor`, `foveate convert` and `foveate export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from foveate import api
from foveate.cli.options import finite
from foveate.log import print_result

Layout = Literal["chat", "hf", "hf-old"]
NewModel = Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")]


def doctor_command(
    model: Annotated[str | None, typer.Argument(help="Model folder to look at, or demo.")] = None,
) -> None:
    """Show the versions and hardware of this installation, or the facts that are recognised in a model folder."""
    print_result(api.doctor(model))


def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder, of any layout.")],
    target: NewModel,
    to: Annotated[
        Layout,
        typer.Option(help="GitHub format, Hugging Face, or Hugging Face with the names of the released -HF folders."),
    ],
    max_shard_gb: Annotated[
        float, typer.Option(min=0.001, max=1000, callback=finite, help="Largest weight file, in 10^9 bytes.")
    ] = 5.0,
) -> None:
    """Turn a checkpoint of one layout into another, bit for bit, without holding the model in memory."""
    print_result(f"{target}: {api.convert(source, target, to, shard_bytes=int(max_shard_gb * 1e9))}")


def flash_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of an InternVL, of any layout.")],
    target: NewModel,
    seed: Annotated[int, typer.Option(help="Of the weights of the new router.")] = 0,
) -> None:
    """Write an InternVL as a Flash model: with a second projector, for compressed tiles, and a router, both new."""
    api.write_flash(source, target, seed=seed)
    print_result(f"{target}: a Flash model; foveate vico trains its second projector")


def export_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="RUN/checkpoints/step_..., latest or best.")],
    target: NewModel,
    to: Annotated[Layout | None, typer.Option(help="As of `foveate convert`; else as the model came in.")] = None,
) -> None:
    """Write the model of a run's checkpoint as a model folder, without a GPU; adapters are merged."""
    print_result(f"{target}: the model after step {api.export(checkpoint, target, to)}")
