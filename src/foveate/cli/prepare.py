"""`foveate prepare`: datasets in the field's parquet schema, from what users have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foveate.cli.options import (
    BadRows,
    Columns,
    ImageRoot,
    OutFolder,
    Seed,
    Sources,
    Workers,
    finite,
    reading_of,
)
from foveate.errors import ConfigError

if TYPE_CHECKING:
    from foveate.datasets.grounding import Buckets
    from foveate.datasets.prepared import Prepared

prepare = typer.Typer(help="Make datasets in the field's parquet schema.", no_args_is_help=True)

TestFraction = Annotated[float, typer.Option(min=0, max=1, callback=finite, help="Share of rows that is held out.")]
NewFolder = Annotated[Path, typer.Argument(help="Folder to write to.")]
Rollouts = Annotated[
    list[Path] | None,
    typer.Option(help="Answers of a model: the folder of a run, rollouts/step_*.jsonl, or evals/step_*.jsonl."),
]
PartName = Annotated[
    str | None,
    typer.Option(help="PartName of the score that makes an answer right; by default accuracy, hit, or the score."),
]
Threshold = Annotated[float, typer.Option(callback=finite, help="The least value of a right answer.")]


@prepare.command("grounding")
def prepare_grounding_command(
    sources: Annotated[list[Path], typer.Argument(help="Files of RefCOCO-style rows: JSONL, JSON, CSV, TSV.")],
    out: OutFolder,
    prompt_form: Annotated[
        Literal["internvl", "amodal", "qwen", "qwen_amodal"], typer.Option(help="How boxes are asked for.")
    ] = "internvl",
    box: Annotated[
        Literal["bbox", "modal_bbox"], typer.Option(help="Field with the box in pixels that counts where both are.")
    ] = "bbox",
    box_unit: Annotated[
        Literal["auto", "xyxy", "xywh", "fractions", "fractions-xywh", "thousandths"],
        typer.Option(help="Unit of the boxes; auto: corners in pixels, unless the first rows of a file say otherwise."),
    ] = "auto",
    variant: Annotated[
        Literal["all", "hard"], typer.Option(help="All rows, or hard negatives and as many positives by IoU.")
    ] = "all",
    iou_key: Annotated[str | None, typer.Option(help="hard: field with the IoU of the model's answer.")] = None,
    teacher_iou_key: Annotated[
        str, typer.Option(help="hard: field with the IoU of the larger model's answer.")
    ] = "241b_model_iou",
    buckets: Annotated[
        str, typer.Option(help="hard: where each range of IoU starts, and its share of the positives; the last: rest.")
    ] = "0.5:0.15,0.6:0.2,0.7:0.2,0.8:0.2,0.9",
    val_fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Validation: take this share of each file, one test file for each and all."),
    ] = None,
    test_fraction: Annotated[float, typer.Option(min=0, max=1, callback=finite, help="Share that is held out.")] = 0.1,
    split_by: Annotated[Literal["image", "row"], typer.Option(help="Hold out whole images, or single rows.")] = "image",
    image_root: ImageRoot = None,
    copy_images: Annotated[bool, typer.Option(help="Copy the images into the folder.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; by default 0, with --val-fraction 42.")] = None,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """Referring expressions with boxes (RefCOCO-style rows) as training and test files."""
    from foveate.datasets.grounding import HardSet, prepare_grounding, prepare_validation

    if (variant == "hard") != (iou_key is not None):
        raise ConfigError("--variant hard and --iou-key belong together: --variant hard --iou-key iou_2b")
    reading = reading_of(image_root, on_bad_row, workers)
    if val_fraction is not None:
        if iou_key is not None:
            raise ConfigError("--val-fraction makes validation files; it does not go with --variant hard")
        made = prepare_validation(
            sources, out, fraction=val_fraction, prompt_form=prompt_form, box_field=box, box_unit=box_unit,
            copy_images=copy_images, seed=42 if seed is None else seed, reading=reading,
        )  # fmt: skip
    else:
        hard = HardSet(iou_key, teacher_iou_key, _buckets(buckets)) if iou_key is not None else None
        made = prepare_grounding(
            sources, out, prompt_form=prompt_form, box_field=box, box_unit=box_unit, hard=hard,
            test_fraction=test_fraction, split_by=split_by, copy_images=copy_images, seed=seed or 0, reading=reading,
        )  # fmt: skip
    tell(made)


@prepare.command("geo3k")
def prepare_geo3k_command(
    source: Annotated[str, typer.Argument(help="Local copy (parquet, or of save_to_disk), or name on the hub.")],
    out: OutFolder,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """Geometry3K (hiyouga/geometry3k) for the geo3k reward."""
    from foveate.datasets.geo3k import prepare_geo3k

    tell(prepare_geo3k(source, out, reading=reading_of(None, on_bad_row, workers)))


@prepare.command("mmpr-tiny")
def prepare_mmpr_tiny_command(
    parquet: Annotated[Path, typer.Argument(help="mmpr_tiny.parquet.")],
    out: OutFolder,
    image_root: ImageRoot = None,
    source: Annotated[str, typer.Option(help="data_source of the rows, for rewards by source.")] = "mmpr_tiny",
    test_fraction: TestFraction = 0.0,
    seed: Seed = 0,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """MMPR-Tiny for online reinforcement learning, scored by the geo3k reward."""
    from foveate.datasets.mmpr import prepare_mmpr_tiny

    reading = reading_of(image_root, on_bad_row, workers)
    tell(prepare_mmpr_tiny(parquet, out, source=source, test_fraction=test_fraction, seed=seed, reading=reading))


@prepare.command("mmpr")
def prepare_mmpr_command(
    meta: Annotated[Path, typer.Argument(help="meta.json of the dataset.")],
    out: OutFolder,
    root: Annotated[Path | None, typer.Option(help="Folder that the paths in meta.json start from.")] = None,
    seed: Seed = 0,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """MMPR's preference pairs for MPO."""
    from foveate.datasets.mmpr import prepare_mmpr

    tell(prepare_mmpr(meta, out, root=root, seed=seed, reading=reading_of(None, on_bad_row, workers)))


@prepare.command("rows")
def prepare_rows_command(
    sources: Sources,
    out: OutFolder,
    column: Columns = None,
    test_fraction: TestFraction = 0.0,
    image_root: ImageRoot = None,
    seed: Seed = 0,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """Your own data: any files, with the columns that you name."""
    from foveate.datasets.prepared import prepare_rows

    reading = reading_of(image_root, on_bad_row, workers, column)
    tell(prepare_rows(sources, out, test_fraction=test_fraction, seed=seed, reading=reading))


@prepare.command("filter")
def prepare_filter_command(
    sources: Sources,
    out: OutFolder,
    rollouts: Rollouts = None,
    accuracy: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Share of right answers of rows that stay: 0.2:0.8."),
    ] = None,
    gap: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Pass@N less pass@1 of rows that stay: 0.3:1.")
    ] = None,
    min_answers: Annotated[int, typer.Option(min=1, help="Fewest answers that tell the accuracy of a row.")] = 1,
    part: PartName = None,
    threshold: Threshold = 0.5,
    model: Annotated[str | None, typer.Option(help="Model folder whose tokens count, or demo.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt, images included.")] = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    min_side: Annotated[int | None, typer.Option(min=1, help="Fewest pixels of an image's shorter side.")] = None,
    max_side: Annotated[int | None, typer.Option(min=1, help="Most pixels of an image's longer side.")] = None,
    name: Annotated[str, typer.Option(help="Name of the file, without .parquet.")] = "train",
    column: Columns = None,
    image_root: ImageRoot = None,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """Keep rows by difficulty for a model, by length and by size of their images."""
    from foveate.data.answers import CorrectnessRule
    from foveate.datasets.filter import Limits, prepare_filter

    if (model is None) != (max_prompt_tokens is None):
        raise ConfigError("--model and --max-prompt-tokens belong together: --model FOLDER --max-prompt-tokens 8192")
    length = None
    if model is not None and max_prompt_tokens is not None:
        from foveate.models.checkpoint.inspect import load_encoder

        length = load_encoder(model, max_tiles=max_tiles, max_prompt_tokens=max_prompt_tokens).length
    made = prepare_filter(
        sources, out,
        Limits(_range(accuracy), min_answers, max_prompt_tokens, min_side, max_side, _range(gap, "--gap")), name=name,
        rollouts=rollouts or (), correctness_rule=CorrectnessRule(part, threshold), length=length,
        reading=reading_of(image_root, on_bad_row, workers, column),
    )  # fmt: skip
    tell(made)


@prepare.command("pairs")
def prepare_pairs_command(
    sources: Sources,
    out: OutFolder,
    rollouts: Rollouts = None,
    max_per_prompt: Annotated[int, typer.Option(min=1, help="Most pairs of one prompt.")] = 15,
    part: PartName = None,
    threshold: Threshold = 0.5,
    column: Columns = None,
    image_root: ImageRoot = None,
    seed: Seed = 0,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """Preference pairs of right and wrong answers, from the rollouts of a model."""
    from foveate.data.answers import CorrectnessRule
    from foveate.datasets.pairs import prepare_pairs

    if not rollouts:
        raise ConfigError("--rollouts is missing: pairs are made of the answers of a model")
    made = prepare_pairs(
        sources, out, rollouts=rollouts, max_per_prompt=max_per_prompt, seed=seed,
        correctness_rule=CorrectnessRule(part, threshold), reading=reading_of(image_root, on_bad_row, workers, column),
    )  # fmt: skip
    tell(made)


def _buckets(text: str) -> Buckets:
    from foveate.datasets.grounding import Buckets

    *ranges, last = text.split(",")
    try:
        edges, shares = zip(*(map(float, entry.split(":")) for entry in ranges), strict=True) if ranges else ((), ())
        final = float(last)
    except ValueError:
        raise ConfigError(f"--buckets {text}: must be EDGE:SHARE,...,EDGE, such as 0.5:0.5,0.8") from None
    return Buckets((*edges, final), shares)


def _range(text: str | None, option: str = "--accuracy") -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise ConfigError(f"{option} {text}: must be LOW:HIGH, such as 0.2:0.8") from None
    return low, high


def tell(made: Prepared) -> None:
    """Print what was left out, and the summary."""
    from foveate.log import print_result

    for problem in made.problems:
        print_result(f"left out: {problem}")
    for line in made.summary():
        print_result(line)


@prepare.command("tiny")
def prepare_tiny_command(
    out: NewFolder,
    tile: Annotated[int, typer.Option(min=28, help="Side of an image tile, in pixels (InternVL3.5: 448).")] = 112,
    max_tiles: Annotated[int, typer.Option(min=1, help="Most tiles per image.")] = 12,
    start: Annotated[
        str | None, typer.Option("--from", help="Take the weights of this tiny model (demo: the shipped one).")
    ] = None,
    calls: Annotated[bool, typer.Option("--calls", help="Tokens for calls of tools, which are spelled else.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A quarter of the parameters, with random weights.")] = False,
) -> None:
    """A small InternVL with random weights, or with those of another one: the real architecture."""
    from foveate.log import print_result
    from foveate.models.tiny import SMALL, TinySize, add_call_words, build_tiny, retile

    if tile % 28:
        raise ConfigError(f"--tile {tile}: must be a multiple of 28 (patches of 14 pixels, joined two by two)")
    if small and start is not None:
        raise ConfigError(
            f"--small has random weights, and those of --from {start} have another size; give one of them"
        )
    if start is None:
        build_tiny(out, replace(SMALL if small else TinySize(), tile=tile, max_tiles=max_tiles), seed=seed)
    else:
        retile(start, out, tile, max_tiles)
    if calls:
        add_call_words(out)
    print_result(f"{out}: a tiny InternVL with {tile}-pixel tiles")
