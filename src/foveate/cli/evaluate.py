"""`foveate generate`, `eval`, `report` and `view`: answers to the rows of files, and what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from foveate import api
from foveate.cli.options import (
    MOST_TOKENS,
    BadRows,
    Columns,
    EnvironmentOption,
    ImageRoot,
    columns_of,
    environment_of,
    finite,
)
from foveate.config.recipe import read_value
from foveate.errors import ConfigError, counted
from foveate.log import print_result

FirstRows = Annotated[int | None, typer.Option(min=1, help="Only the first rows.")]
Data = Annotated[list[Path], typer.Option(help="Parquet, JSONL or Arrow file, or folder; several times.")]
RunPath = Annotated[Path, typer.Argument(help="Folder of a run, also while it is under way, or of an evaluation.")]
System = Annotated[
    str | None,
    typer.Option(
        help="System prompt of conversations without one: default (the family's), thinking (InternVL3.5's), none, or a "
        "text."
    ),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Thoughts before the answer, switched as the model's family switches them (with --model).",
    ),
]
EvaluatedRun = Annotated[
    Path | None,
    typer.Argument(help="Folder of a run: its model, held-out rows, reward, environment, lengths and system prompt."),
]
EvalOut = Annotated[Path | None, typer.Option(help="Folder for predictions, summary and report; by default RUN/eval.")]
EvalModels = Annotated[
    list[str] | None, typer.Option(help="Model folder, or demo; several to compare them, before that of a run.")
]
EvalData = Annotated[list[Path] | None, typer.Option(help="Parquet or JSONL file (with --model); several times.")]
EvalGenerated = Annotated[list[Path] | None, typer.Option(help="Folder of `foveate generate`; several times.")]
EvalTask = Annotated[
    str | None,
    typer.Option(
        help="grounding (by default), refcoco, geo3k, mmpr, multiple_choice; mathvista, mathverse, mmmu, chartqa, "
        "ocrbench, countbench, screenspot."
    ),
]
EvalReward = Annotated[str | None, typer.Option(help="What scores the answers, in place of the task's own.")]
EvalRewardSettings = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of it.")]
EvalBoxRule = Annotated[
    Literal["first", "last", "vlmevalkit"] | None, typer.Option(help="Which box of an answer counts.")
]
EvalBoxFrame = Annotated[
    Literal["thousandths", "pixels", "fractions", "model"] | None,
    typer.Option(help="What the answers' coordinates are."),
]
EvalCritic = Annotated[
    str | None,
    typer.Option(
        help="What best-of-N goes by: prm:MODEL, a folder of a process reward model, or a reward such as judge."
    ),
]
EvalCriticSettings = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of it.")]
EvalMissing = Annotated[
    Literal["error", "skip", "wrong"], typer.Option(help="Rows without an answer: stop, leave out, or wrong.")
]
EvalMaxTokens = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_TOKENS, help="Longest answer, in tokens; by default the run's, or 256."),
]
EvalMaxPromptTokens = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_TOKENS, help="Longest prompt with images; by default the run's, or 8192."),
]
EvalTiles = Annotated[
    Literal["routed", "whole", "compressed"],
    typer.Option(help="Tiles of a Flash model: compressed as its router says, none, or all."),
]
EvalTextFiles = Annotated[bool, typer.Option("--text-files", help="Also iou.txt, iou_detail.json, latency.txt.")]
CLIENT_KEY = "OPENAI_API_KEY"
"""Environment variable with the key that servers ask for."""
_THINKING = "thinking"
THINKING_TEMPERATURE = 0.6
"""As published with the models; it keeps the thinking mode from repeating itself."""


def generate_command(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the answers; the same folder again resumes.")],
    endpoint: Annotated[list[str] | None, typer.Option(help="Address of a server, with /v1; several times.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, or demo: answers in this process.")] = None,
    served_model: Annotated[str | None, typer.Option(help="Name of the model at the endpoints.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per row.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="0: greedy. Default 0, or 0.6 with thoughts.")
    ] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1, callback=finite, help="Nucleus sampling: mass kept.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Most likely tokens kept; 0: all.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer, in tokens.")] = 1024,
    thinking: Thinking = None,
    system: System = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Keep the log-prob of every token.")] = False,
    rows: FirstRows = None,
    image_root: ImageRoot = None,
    columns: Columns = None,
    on_bad_row: BadRows = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 64,
    retries: Annotated[int, typer.Option(min=0, help="Further tries of a request; waits double up to 30 s.")] = 8,
    timeout: Annotated[
        float, typer.Option(min=0.1, callback=finite, help="Seconds until a request is given up.")
    ] = 600.0,
    key_variable: Annotated[str, typer.Option(help="Environment variable with the API key.")] = CLIENT_KEY,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Longest prompt (with --model).")
    ] = 8192,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image (with --model).")] = None,
    environment: EnvironmentOption = None,
) -> None:
    """Ask a served model, or one in this process, all rows of some files, and keep every answer as it comes."""
    from foveate.evaluate.client import ClientSettings, endpoints_of
    from foveate.evaluate.generate import GenerateRequest, RowsRequest
    from foveate.records import SamplingParams

    if endpoint:
        _check_endpoint(system, thinking)
    prompt, thinks = system_prompt(system), thinking or system == _THINKING
    heat = temperature if temperature is not None else THINKING_TEMPERATURE if thinks else 0.0
    _check_sampling(heat, top_p, samples)
    client = None
    if endpoint:
        prompt = None if prompt == "none" else prompt
        settings = (served_model, key_variable, concurrency, retries, timeout, prompt, logprobs)
        client = ClientSettings(endpoints_of(endpoint), *settings)
    source = RowsRequest(
        tuple(map(str, data)), rows, str(image_root) if image_root else None, dict(columns_of(columns) or {}),
        "skip" if on_bad_row == "skip" else "error",
    )  # fmt: skip
    sampling = SamplingParams(samples, max_tokens, heat, top_p, top_k)
    asked = (source, out, sampling, model, client, prompt, seed, logprobs, max_prompt_tokens, max_tiles)
    summary = api.generate(GenerateRequest(*asked, environment=environment_of(environment), thinking=thinking))
    print_result(f"{summary['answered']:,} of {counted(summary['rows'], 'row')} answered: {out}")


def _check_endpoint(system: str | None, thinking: bool | None) -> None:
    if system == "default":
        raise ConfigError("--system default needs --model; a server's family is not known here, so give the text")
    if thinking is not None:
        raise ConfigError(
            "--thinking needs --model; a server's family is not known here: InternVL3.5 thinks with --system thinking, "
            "others where the server is started so (vLLM: --default-chat-template-kwargs)"
        )


def system_prompt(system: str | None) -> str | None:
    from foveate.encoding.chat import THINKING_SYSTEM

    return THINKING_SYSTEM if system == _THINKING else system


def _check_sampling(heat: float, top_p: float, samples: int) -> None:
    if 0 < heat < 0.01 or not top_p:
        raise ConfigError(f"--temperature {heat:g} --top-p {top_p:g}: give 0 or at least 0.01, and more than 0")
    if heat == 0 and samples > 1:
        raise ConfigError(f"--samples {samples} at temperature 0 are all the same answer; give --temperature")


def evaluate_command(
    run: EvaluatedRun = None,
    out: EvalOut = None,
    model: EvalModels = None,
    data: EvalData = None,
    generated: EvalGenerated = None,
    task: EvalTask = None,
    reward: EvalReward = None,
    reward_setting: EvalRewardSettings = None,
    box_rule: EvalBoxRule = None,
    box_frame: EvalBoxFrame = None,
    samples: Annotated[int, typer.Option(min=0, help="Answers per prompt drawn at temperature 1.")] = 0,
    critic: EvalCritic = None,
    critic_setting: EvalCriticSettings = None,
    missing: EvalMissing = "error",
    max_tokens: EvalMaxTokens = None,
    max_prompt_tokens: EvalMaxPromptTokens = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    tiles: EvalTiles = "routed",
    thinking: Thinking = None,
    system: System = None,
    rows: FirstRows = None,
    image_root: ImageRoot = None,
    gallery: Annotated[int, typer.Option(min=0, help="Images in the report.")] = 40,
    text_files: EvalTextFiles = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampled answers and intervals.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    column: Columns = None,
    on_bad_row: BadRows = None,
    environment: EnvironmentOption = None,
) -> None:
    """Score the answers of models, or those that `foveate generate` left: predictions, a summary and a report."""
    from foveate.api.of_run import options_of_run
    from foveate.evaluate.evaluate_models import EvalRequest

    prompt = system_prompt(system)
    known = {} if run is None else options_of_run(run, prompt, data=data or (), asks=not generated)
    out = out or (run and run / "eval")
    if out is None:
        raise typer.BadParameter("give --out, the folder for predictions, summary and report, or the folder of a run")
    if generated:
        known["models"] = ()
    elif model and not (data or run):
        raise ConfigError("--model needs --data: the files whose rows are asked")
    own = (known["reward"], known["settings"]) if "reward" in known and not (task or reward) else None
    name, settings = _scoring(task or "grounding", reward, reward_setting, box_rule, box_frame, own)
    given = {
        "data": data and tuple(map(str, data)), "hold_out": 0.0 if data else None, "max_tokens": max_tokens,
        "max_prompt_tokens": max_prompt_tokens, "max_tiles": max_tiles, "system": prompt, "thinking": thinking,
        "image_root": image_root and str(image_root), "columns": columns_of(column), "on_bad_row": on_bad_row,
        "models": (*(model or ()), *known.get("models", ())), "reward": name, "settings": settings,
        "environment": environment_of(environment), "text_files": text_files, "tiles": tiles, "missing": missing,
        "critic": critic,
    }  # fmt: skip
    options = {"data": (), **known, **{key: value for key, value in given.items() if value is not None}}
    request = EvalRequest(
        **options, out=out, samples=samples, rows=rows, gallery=gallery, seed=seed, threads=threads,
        generated=tuple(generated or ()), critic_settings=settings_given(critic_setting),
    )  # fmt: skip
    print_report(out, api.evaluate(request))


def report_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Folder of a run, also while it is under way, or of an evaluation; several.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="File of the page of several runs; by default comparison.html.")
    ] = None,
) -> None:
    """Write report.html for a run and print its summary; several runs are laid over each other on one page."""
    if len(runs) > 1:
        print_result(f"Report: {api.compare_runs(runs, out or 'comparison.html')}")
    elif out is not None:
        raise ConfigError("--out is for the page of several runs; that of one is report.html in its folder")
    else:
        print_report(runs[0], api.report(runs[0]))


def view_command(
    run: RunPath,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: any free one.")] = 8700,
) -> None:
    """Serve the report of a run on this machine, always as the files of the run are now."""
    api.view(run, port, lambda address: print_result(f"{run} at {address}"))


def print_report(run: Path, report: Path) -> None:
    """Print the result of a run or an evaluation, and where its report is."""
    print_result(api.summary(run))
    print_result(f"Report: {report}")


def _scoring(
    task: str,
    reward: str | None,
    given: list[str] | None,
    rule: str | None,
    frame: str | None,
    known: tuple[str, dict[str, Any]] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The reward of a task, or the known one of a run, with its settings. The two options about boxes are settings of
    the rewards for boxes."""
    from foveate.evaluate.evaluate_models import TASKS
    from foveate.registry import suggestion

    if task not in TASKS:
        raise ConfigError(f"--task {task}: unknown{suggestion(task, TASKS, then='allowed')}: {', '.join(TASKS)}")
    name, settings = known or ((reward, {}) if reward else TASKS[task])
    if rule is not None and name == "grounding" and reward is None:
        name, settings = "refcoco", {}
    settings = {**settings, **settings_given(given)}
    if rule is not None:
        settings["rule"] = rule
    if frame is not None:
        settings["answer_frame" if name in ("grounding", "boxes") else "frame"] = frame
    return name, settings


def settings_given(given: list[str] | None) -> dict[str, Any]:
    """`NAME=VALUE` options, values as in the overrides of recipes."""
    settings: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"{text}: must be NAME=VALUE, such as threshold=0.7")
        settings[name] = read_value(value, text)
    return settings
