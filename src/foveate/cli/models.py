"""The verbs that look at models: `foveate doctor`, `foveate convert` and `foveate export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def doctor(model: Annotated[str | None, typer.Argument(help="Model folder to look at, or demo.")] = None) -> None:
    """Say what this installation is, and what is recognised in a model folder."""
    from foveate.log import print_result
    from foveate.tools.doctor import examine

    print_result(examine(model))


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder, of any layout.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    to: Annotated[
        Literal["chat", "hf", "hf-old"],
        typer.Option(help="GitHub format, Hugging Face, or Hugging Face with the names of the released -HF folders."),
    ],
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest weight file, in 10^9 bytes.")] = 5.0,
) -> None:
    """Turn a checkpoint of one layout into another, bit for bit, without holding the model in memory."""
    from foveate.log import print_result
    from foveate.models.checkpoint.convert import convert as convert_checkpoint
    from foveate.models.checkpoint.names import CHECKPOINT_FORMATS

    made = convert_checkpoint(source, target, to, shard_bytes=int(max_shard_gb * 1e9))
    print_result(
        f"{target}: {CHECKPOINT_FORMATS[made.source]} -> {CHECKPOINT_FORMATS[made.target]}, {made.tensors:,} tensors, "
        f"{made.bytes / 1e9:.2f} GB in {made.files} file{'s' if made.files > 1 else ''}"
    )


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="RUN/checkpoints/step_..., latest or best.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    to: Annotated[
        Literal["chat", "hf", "hf-old"] | None, typer.Option(help="As of `foveate convert`; else as the model came in.")
    ] = None,
) -> None:
    """Write the model of a run's checkpoint as a model folder, without a GPU; adapters are merged."""
    from foveate.log import print_result
    from foveate.train.export import export_checkpoint

    step = export_checkpoint(checkpoint, target, to)
    print_result(f"{target}: the model after step {step}")
