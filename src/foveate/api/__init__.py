"""The product's door for Python: one call for each command of the command line.

`import foveate` offers these functions too (`foveate.train_rl`). Each imports its part of the package when it is
called, and raises `foveate.errors.UserError` for anything that a user can fix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.api.run import Run
from foveate.api.training import Recipe as Recipe
from foveate.api.training import finished
from foveate.api.training import from_recipe as from_recipe
from foveate.api.training import train_mpo as train_mpo
from foveate.api.training import train_rl as train_rl
from foveate.api.training import train_sft as train_sft
from foveate.api.training import train_vico as train_vico
from foveate.api.training import train_vir as train_vir
from foveate.config.runs import CascadeSettings, MPOSettings, RLSettings, SFTSettings, StageName
from foveate.errors import ConfigError
from foveate.files import atomic_write_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from foveate.evaluate.evaluate_models import EvalRequest
    from foveate.evaluate.generate import GenerateRequest
    from foveate.models.checkpoint.convert import Conversion
    from foveate.models.checkpoint.names import CheckpointFormat
    from foveate.plan.advice import Plan
    from foveate.serve.engines import EngineRequest
    from foveate.serve.native import ServeRequest
    from foveate.tools.import_verl import Imported
    from foveate.tools.listing import ListEntry


# --------------------------------------------------------------------------------------------------------- training


def demo(run: str | Path, *overrides: str, seed: int = 0, cascade: bool = False, tools: bool = False) -> Run:
    """Train a shipped model by GSPO, in minutes on a CPU: to ground, `cascade` with preference optimisation first, or
    with `tools` to look closer before it answers. The scenes are drawn in a folder beside `run`. Raises ConfigError for
    both."""
    from foveate.tools.demo import run_demo

    return finished(run_demo(Path(run), seed, overrides, cascade=cascade, tools=tools))


def prepare_upload(name: str) -> None:
    """Make the private repository `owner/name` of the Hugging Face Hub where there is none, for `Run.push_to_hub`."""
    from foveate.data.hub import prepare_upload

    prepare_upload(name)


# ------------------------------------------------------------------------------------------- answers and evaluation


def generate(request: GenerateRequest) -> dict[str, Any]:
    """Answer the rows of data files; the same folder asks only for the answers that are missing. Returns a summary."""
    from foveate.evaluate.generate import run_generate

    return run_generate(request)


def evaluate(request: EvalRequest | Run | str | Path) -> Path:
    """Score the answers of models, or those that `generate` left; a run, or its folder: as `Run.evaluate`. Returns the
    path of the report."""
    if isinstance(request, Run | str | Path):
        return Run(request).evaluate()
    from foveate.evaluate.evaluate_models import run_eval

    run_eval(request)
    return report(request.out)


def report(run: str | Path) -> Path:
    """Write `report.html` of a run or an evaluation, and return its path."""
    from foveate.report.page import write_report

    return write_report(Path(run))


def compare_runs(runs: Sequence[str | Path], page: str | Path) -> Path:
    """Write one page of several runs: a line for each in every chart, and the settings in which they differ. Returns
    its path."""
    from foveate.report.compare import write_comparison

    return write_comparison([Path(run) for run in runs], Path(page))


def summary(run: str | Path) -> RenderableType:
    """The result of a run or an evaluation in words and a table, to print with rich."""
    from foveate.report.page import terminal_summary

    return terminal_summary(Path(run))


def view(run: str | Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve the report of a run on this machine until Ctrl-C; `ready` gets the address. Port 0: any free one."""
    from foveate.report.live import serve_report

    serve_report(Path(run), port, ready)


def serve(request: ServeRequest | EngineRequest, ready: Callable[[str], None]) -> None:
    """Serve a model over HTTP until Ctrl-C, by the native engine or by vLLM or SGLang; `ready` gets the address."""
    from foveate.serve.engines import EngineRequest, serve_engine

    if isinstance(request, EngineRequest):
        return serve_engine(request, ready)
    from foveate.serve.native import serve_native

    return serve_native(request, ready)


# ----------------------------------------------------------------------------------------------- models and planning


def doctor(model: str | None = None) -> RenderableType:
    """Facts about this installation, or about a model folder, as a table."""
    from foveate.tools.doctor import examine

    return examine(model)


def write_flash(source: str | Path, target: str | Path, *, seed: int = 0) -> None:
    """Write an InternVL as a Flash model, whose second projector and router are new, for `train_vico`."""
    from foveate.models.checkpoint.flash_folder import write_flash

    write_flash(str(source), Path(target), seed=seed)


def convert(
    source: str | Path, target: str | Path, to: CheckpointFormat, *, shard_bytes: int = 5 * 10**9
) -> Conversion:
    """Write a checkpoint in another layout, bit for bit, in weight files of at most `shard_bytes` bytes."""
    from foveate.models.checkpoint.convert import convert

    return convert(Path(source), Path(target), to, shard_bytes=shard_bytes)


def export(checkpoint: str | Path, target: str | Path, to: CheckpointFormat | None = None) -> int:
    """Write the model of a run's checkpoint as a model folder; returns its step."""
    from foveate.train.export import export_checkpoint

    return export_checkpoint(Path(checkpoint), Path(target), to)


def plan(
    settings: SFTSettings | MPOSettings | RLSettings | CascadeSettings,
    machines: str,
    *,
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
    tiles: int | None = None,
    compressed: float | None = None,
) -> Plan:
    """Memory, time and GPU hours of a run on `machines` ("2x8xH100-80"), from the shapes of its model. The means of a
    prompt (image tokens included), an answer, the tiles of a prompt and, for RL of a Flash model, the share of them
    that is compressed are guessed where they are None."""
    if isinstance(settings, CascadeSettings):
        raise ConfigError(f"{settings.run}: has several stages; plan the recipe of one stage at a time")
    from foveate.plan.advice import plan as make_plan
    from foveate.plan.hardware import parse_machines
    from foveate.plan.workload import workload_of

    return make_plan(workload_of(settings, prompt_tokens, answer_tokens, tiles, compressed), parse_machines(machines))


def plan_report(plan: Plan) -> str:
    """A plan as text: memory by part, whether it fits, what to change, and time by phase."""
    from foveate.plan.report import plan_text

    return plan_text(plan)


def plan_table() -> Iterator[str]:
    """The smallest GPU on which each published model trains, whole, with adapters and with adapters over 4 bits, with a
    server on the same GPU and without: the lines of a table in Markdown, as they are found in a few minutes."""
    from foveate.plan.table import fits_table

    return fits_table()


def settings_list(stage: StageName = "rl", group: str | None = None) -> list[ListEntry]:
    """The settings of a stage, or of one group of it, as `foveate settings` shows them."""
    from foveate.tools import listing

    return listing.settings_list(stage, group)


def settings_page() -> str:
    """The settings of all stages as a page in Markdown."""
    from foveate.tools import listing

    return listing.settings_page()


def recipes_list(name: str | None = None) -> list[ListEntry] | str:
    """The shipped recipes, or the text of one."""
    from foveate.tools import listing

    return listing.recipes_list(name)


def rewards_list(name: str | None = None) -> list[ListEntry]:
    """The known rewards with their settings, or one of them with all that it says."""
    from foveate.tools import listing

    return listing.rewards_list(name)


def environments_list(name: str | None = None) -> list[ListEntry]:
    """The known environments with their settings, and the tools of `tools`; or one of them."""
    from foveate.tools import listing

    return listing.environments_list(name)


def algorithms_list(name: str | None = None) -> list[ListEntry]:
    """The known algorithms, advantages and losses, or those of one name."""
    from foveate.tools import listing

    return listing.algorithms_list(name)


def import_verl(
    script: str | Path,
    rows: int | None = None,
    *,
    out: str | Path | None = None,
    arguments: Sequence[str] = (),
    version: str | None = None,
    launch: int = 1,
    run: bool = False,
) -> Imported:
    """A launch script of verl or EasyR1 as a recipe, with an account of each of its settings.

    out: the file to write it to. rows: of the training data, which the script does not say. Its variables may come from
    the environment, its positional parameters from `arguments`. version: of verl, whose defaults are filled in. launch:
    which one of a script that launches several times. run: execute the script in bash, with its launchers replaced.
    """
    from foveate.tools.import_verl import import_script

    imported = import_script(
        Path(script), os.environ, rows, arguments=arguments, version=version, launch=launch, run=run
    )
    if out is not None:
        atomic_write_text(out, imported.recipe)
    return imported
