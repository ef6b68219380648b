"""`foveate prepare vero`, `hints`, `mixed` and `steps`: data of reasoners, beside `foveate.cli.prepare`."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli.evaluate import EvalRewardSettings, System, settings_given, system_prompt
from foveate.cli.options import (
    MOST_TOKENS,
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
from foveate.cli.prepare import NewFolder, PartName, Rollouts, Threshold, prepare, tell
from foveate.cli.prepare_drawn import TestRows, TrainRows, asked_rows, print_rows
from foveate.errors import ConfigError


@prepare.command("vero")
def prepare_vero_command(
    source: Annotated[str, typer.Argument(help="Local copy (a folder of parquet files), or name on the hub.")],
    out: OutFolder,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """Vero-600k (zlab-princeton/Vero-600k) for the vero reward, its six domains as sources."""
    from foveate.datasets.vero import prepare_vero

    tell(prepare_vero(source, out, reading=reading_of(None, on_bad_row, workers)))


@prepare.command("hints")
def prepare_hints_command(
    sources: Sources,
    out: OutFolder,
    rollouts: Rollouts = None,
    field: Annotated[str, typer.Option(help="Field of extra_info with the hint of a row.")] = "hint",
    at_most: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Largest share of right answers of a row with a hint.")
    ] = 0.0,
    form: Annotated[str, typer.Option(help="What joins the question; {hint} is filled in.")] = "Hint: {hint}",
    part: PartName = None,
    threshold: Threshold = 0.5,
    column: Columns = None,
    image_root: ImageRoot = None,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """Give a hint to the rows that a model never solves; the others stay as they are."""
    from foveate.data.answers import CorrectnessRule
    from foveate.datasets.hints import HintRule, prepare_hints

    if not rollouts:
        raise ConfigError("--rollouts is missing: which rows get a hint is told by the answers of a model")
    made = prepare_hints(
        sources, out, HintRule(field, at_most, form), rollouts=rollouts,
        correctness_rule=CorrectnessRule(part, threshold), reading=reading_of(image_root, on_bad_row, workers, column),
    )  # fmt: skip
    tell(made)


@prepare.command("steps")
def prepare_steps_command(
    sources: Sources,
    out: OutFolder,
    model: Annotated[
        str, typer.Option(help="Folder of the model that continues the answers: the one that wrote them.")
    ],
    rollouts: Rollouts = None,
    reward: Annotated[str, typer.Option(help="What says which continuations are right.")] = "math",
    reward_setting: EvalRewardSettings = None,
    continuations: Annotated[int, typer.Option(min=1, help="Continuations from behind each step.")] = 16,
    answers: Annotated[
        int | None, typer.Option(min=1, help="Answers of a prompt, the first ones; default: all.")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Most steps of an answer; neighbours are merged.")] = 12,
    all_steps: Annotated[bool, typer.Option("--all-steps", help="Rows also hold what follows a wrong step.")] = False,
    above: Annotated[
        float, typer.Option(min=0, max=0.99, callback=finite, help="A step is right above this share of right ones.")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=2, max=MOST_TOKENS, help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.01, callback=finite, help="Of the continuations.")] = 1.0,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest prompt.")] = 8192,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    system: System = None,
    part: PartName = None,
    threshold: Threshold = 0.5,
    column: Columns = None,
    image_root: ImageRoot = None,
    seed: Seed = 0,
    on_bad_row: BadRows = None,
    workers: Workers = None,
) -> None:
    """Labels of the steps of a model's answers, by its own continuations, for a process reward model."""
    from foveate.data.answers import CorrectnessRule
    from foveate.evaluate.steps import StepOptions, prepare_steps

    if not rollouts:
        raise ConfigError("--rollouts is missing: the steps are those of the answers of a model")
    made = prepare_steps(
        sources, out, model=model, rollouts=rollouts, reward=reward, settings=settings_given(reward_setting),
        options=StepOptions(
            continuations, answers, max_tokens, temperature, max_steps, max_prompt_tokens, max_tiles,
            system_prompt(system), seed, all_steps, above,
        ),
        correctness_rule=CorrectnessRule(part, threshold), reading=reading_of(image_root, on_bad_row, workers, column),
    )  # fmt: skip
    tell(made)


@prepare.command("mixed")
def prepare_mixed_command(
    out: NewFolder,
    train: TrainRows = 6000,
    test: TestRows = 1200,
    side: Annotated[int, typer.Option(min=48, max=2_048, help="Side of the square pictures, in pixels.")] = 100,
    shortcut: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Share of right demonstrations; the rest are careless.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
) -> None:
    """Scenes of six sources with a reward each: count, read, point, compare, list, choose."""
    from foveate.datasets.mixed import prepare_mixed
    from foveate.log import progress

    rows = asked_rows(train=train, test=test)
    with progress("drawing scenes", sum(rows.values())) as advance:
        prepare_mixed(out, rows, seed=seed, side=side, shortcut=shortcut, advance=advance)
    print_rows(out, rows)
