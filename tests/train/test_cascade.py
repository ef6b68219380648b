"""The cascade: every stage on the artefacts of the one before, once, whenever it was interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pages import Page, rendered
from pydantic import ValidationError
from slow_cases import slow_but
from test_resume import interrupt
from toy import HERE, cascade_settings
from video_cases import write_video

import foveate.train.cascade as cascade
from foveate.config.recipe import load_recipe, to_yaml
from foveate.config.runs import MPOSettings, RLSettings, SFTSettings, VirSettings
from foveate.data.demos import check_pair
from foveate.data.table import open_tasks
from foveate.datasets.shapes import prepare_shapes
from foveate.errors import ConfigError, DataError
from foveate.evaluate.predictions import read_evaluations
from foveate.log import read_metrics
from foveate.report.page import write_report
from foveate.report.stages import read_stages
from foveate.run_folder import RunFolder
from foveate.train.cascade import run_cascade
from foveate.train.mpo import run_mpo
from foveate.train.rl import run_rl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    prepare_shapes(folder, {"train": 16, "test": 6}, seed=1)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Several files of answers, so that an interruption can fall between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "CHUNK", 5)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The uninterrupted cascade."""
    return run_cascade(cascade_settings(tmp_path_factory.mktemp("runs") / "whole", data))


def weights(run: RunFolder, stage: str) -> bytes:
    return (run.path / stage / "final" / "model.safetensors").read_bytes()


def assert_equal(run: RunFolder, whole: RunFolder) -> None:
    for stage in ("sft", "mpo", "rl"):
        assert weights(run, stage) == weights(whole, stage), stage
    for file in (*whole.rollouts.glob("step_*.jsonl"), whole.path / "pairs" / "pairs.parquet"):
        assert (run.path / file.relative_to(whole.path)).read_bytes() == file.read_bytes()
    assert read_evaluations(run.path) == read_evaluations(whole.path)
    assert [(s.name, s.step) for s in read_stages(run.path)] == [(s.name, s.step) for s in read_stages(whole.path)]
    assert not list(run.path.rglob("*.tmp"))


STAGES: dict[str, Any] = {"sft": SFTSettings, "mpo": MPOSettings, "rl": RLSettings}


def test_every_stage_starts_from_the_model_of_the_one_before(whole):
    starts = {name: load_recipe(whole.path / name / "config.yaml", [], cls).model.path for name, cls in STAGES.items()}
    final = {stage: str(whole.path / stage / "final") for stage in ("sft", "mpo")}
    assert starts == {"sft": "demo", "mpo": final["sft"], "rl": final["mpo"]}
    assert len({weights(whole, stage) for stage in STAGES}) == 3


def test_the_pairs_are_right_and_wrong_answers_to_the_prompts_that_were_asked(whole):
    lines = [json.loads(line) for file in whole.rollouts.glob("step_*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == 12
    answers = {line["id"]: {a["text"]: a["score"] for a in line["answers"]} for line in lines}
    pairs = list(open_tasks(whole.path / "pairs" / "pairs.parquet"))
    assert pairs
    for task in pairs:
        given = answers[task.meta["prompt_id"]]
        assert given[task.meta["chosen"]] >= 0.75  # an IoU of 0.5 or more, in the reward's mixture
        assert given[task.meta["rejected"]] < 0.25
        assert check_pair(task) == []


def test_the_stages_are_evaluated_on_the_same_rows_and_stand_in_one_row(whole):
    assert [(stage.name, stage.step) for stage in read_stages(whole.path)] == [
        ("start", 0),
        ("sft", 2),
        ("mpo", 5),
        ("gspo", 7),
    ]
    assert [row["step"] for row in read_metrics(whole.metrics)] == list(range(1, 8))
    found = read_evaluations(whole.path)
    assert [one.step for one in found] == [0, 2, 5, 7]
    assert len({tuple(row.id for row in one.predictions) for one in found}) == 1


def test_the_report_compares_the_stages_with_table_curves_and_pictures(whole):
    page = Page(write_report(whole.path))
    heads = [" ".join(text.split()) for text in page.texts]
    for name in ("start", "sft", "mpo", "gspo"):
        assert heads.count(name) >= 2, name  # the table and the switch of the pictures
    assert "against the start, points (95 % interval)" in page.text
    assert "against the stage before" in page.text
    assert "time of the stage" in page.text
    assert len([tag for tag in page.attributes("img") if tag["src"]]) == 2
    for title in ("Loss", "Reward", "Gradient norm"):
        assert title in page.text
    assert "gspo" in rendered(whole.path)


def test_a_finished_cascade_does_nothing_again(whole, data, monkeypatch):
    for page in ("run_sft", "run_mpo", "run_rl", "start_workers", "prepare_pairs"):
        monkeypatch.setattr(cascade, page, None)
    before = weights(whole, "rl")
    run_cascade(cascade_settings(whole.path, data))
    assert weights(whole, "rl") == before


@pytest.mark.parametrize("stage", ["mpo", "rl"])
def test_a_stage_runs_alone_on_the_artefacts_of_the_one_before(tmp_path, whole, stage):
    page = {"mpo": run_mpo, "rl": run_rl}[stage]
    settings = load_recipe(whole.path / stage / "config.yaml", [f"run={tmp_path / 'alone'}"], STAGES[stage])
    alone = page(settings)
    assert (alone.final / "model.safetensors").read_bytes() == weights(whole, stage)


# ---------------------------------------------------------------------------------------------------- interruptions


MOMENTS = {
    "evaluation of the start": ("foveate.evaluate.predict.write_evaluation", 1),
    "supervised stage": ("foveate.train.offline.learning_rate", 2),
    "answers for the pairs": ("foveate.train.cascade.write_rollouts", 2),
    "pairs": ("foveate.train.cascade.prepare_pairs", 1),
    "reference log-probs": ("foveate.train.reference.digest", 6),
    "preference stage": ("foveate.train.offline.learning_rate", 2 + 2),  # behind two supervised steps
    "online stage": ("foveate.train.rl.learning_rate", 2),
    "report": ("foveate.train.cascade.write_stages", 1),
}
QUICK = ("answers for the pairs",)


def stop_in(patch: pytest.MonkeyPatch, moment: str, stop: Any) -> None:
    """Call `stop` in place of the n-th call of a function that a stage uses."""
    path, at = MOMENTS[moment]
    module, _, name = path.rpartition(".")
    owner = sys.modules[module]
    original, calls = vars(owner)[name], 0

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return stop() if calls == at else original(*arguments, **keywords)

    patch.setattr(owner, name, stopping)


@pytest.mark.parametrize("moment", slow_but(QUICK, MOMENTS))
def test_an_interrupted_cascade_ends_as_the_uninterrupted_one(tmp_path, data, whole, moment):
    settings = cascade_settings(tmp_path / "run", data)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_cascade(settings)
    assert_equal(run_cascade(settings), whole)


KILLED = """
import os, signal, sys
import pytest, torch
torch.set_num_threads(1)
import foveate.train.cascade as cascade
from test_cascade import stop_in
cascade.CHUNK = 5
if moment := sys.argv.pop(1):
    stop_in(pytest.MonkeyPatch(), moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
from foveate.cli.app import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["reference log-probs", "online stage"])
def test_a_killed_cascade_goes_on_with_the_same_command(tmp_path, data, whole, moment):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(cascade_settings(tmp_path / "run", data)))
    command = [sys.executable, "-c", KILLED]
    places = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(HERE).parent), str(Path(__file__).parent)])}
    killed = subprocess.run([*command, moment, "cascade", str(recipe)], env=places)
    assert killed.returncode == -signal.SIGKILL
    again = [*command, "", "cascade", str(recipe)]
    said = subprocess.run(again, env=places, check=True, capture_output=True, text=True).stdout
    assert f"Model: {tmp_path / 'run' / 'rl' / 'final'}" in said.replace("\n", "")
    assert (tmp_path / "run" / "report.html").exists()
    assert_equal(RunFolder(tmp_path / "run"), whole)


# ------------------------------------------------------------------------------------------------ fewer image tokens


def with_flash(run: Path, data: Path, **changes: Any) -> Any:
    """A cascade that ends in a Flash model."""
    rows = {"train": [str(data / "train.parquet")], "test": [str(data / "test.parquet")], "max_prompt_tokens": 128}
    train = {"steps": 2, "samples_per_step": 4, "save_every": 1, "tokens_per_micro_batch": 256, "threads": 1}
    stages = {
        "vico": {"data": rows, "optim": {"lr": 1e-4}, "train": train},
        "vir": {"optim": {"lr": 1e-3}, "train": {**train, "quantile": 0.5}},
    }
    return cascade_settings(run, data, **{"sft": None, **stages, **changes})


@pytest.mark.slow
def test_a_cascade_ends_in_a_routed_model_and_is_resumed_in_its_last_stages(tmp_path, data):
    whole = run_cascade(with_flash(tmp_path / "whole", data))
    assert [(stage.name, stage.step) for stage in read_stages(whole.path)] == [
        ("start", 0), ("mpo", 3), ("gspo", 5), ("vico", 7), ("vir", 9),
    ]  # fmt: skip
    assert [one.step for one in read_evaluations(whole.path)] == [0, 3, 5, 9]
    assert {row.image_tokens for row in read_evaluations(whole.path)[-1].predictions} == {1.0}  # pictures of one tile
    assert whole.model == whole.path / "vir" / "final"
    assert load_recipe(whole.path / "vir" / "config.yaml", [], VirSettings).train.reference == str(whole.path / "flash")
    assert "vir" in rendered(whole.path)
    for place in ("vico", "vir"):
        settings = with_flash(tmp_path / place, data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(MOMENTS, place, ("foveate.train.offline.learning_rate", {"vico": 5, "vir": 7}[place]))
            stop_in(patch, place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_cascade(settings)
        assert weights(run_cascade(settings), "vir") == weights(whole, "vir")


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changes",
    [{"eval": {"samples": 3}}, {"pairs": {"prompts": 13}}, {"rl": {"optim": {"lr": 1e-5}}}, {"seed": 1}],
    ids=str,
)
def test_a_changed_recipe_is_refused(whole, data, changes):
    settings = cascade_settings(whole.path, data, **changes)
    with pytest.raises(ConfigError, match=r"belongs to a run with other settings: .* choose another run="):
        run_cascade(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"test": []}}, "data.test is empty; name held-out files, on which the stages are compared"),
        (
            {"rl": {"train": {"steps": 2, "prompts_per_step": 4, "updates_per_step": 3}}},
            "rl.train.updates_per_step is 3",
        ),
        ({"mpo": {"optim": {"lr": 1e-3, "warmup_steps": 9}}}, "mpo.optim.warmup_steps is 9, more than train.steps=3"),
        ({"rollout": {"samples": 1}}, "rollout.samples is 1, but algorithm gspo compares answers"),
        ({"pairs": {"samples": 1}}, "greater than or equal to 2"),
        ({"vir": {"train": {"steps": 1}}}, "vico is not set, but visual consistency learning and its router need each"),
        (
            {"mpo": {"optim": {"lr": 1e-3}, "train": {"steps": 3, "tokens_per_micro_batch": 152}}},
            "mpo.train.tokens_per_micro_batch is 152, less than one longest prompt and sampled answer: .* use 153",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_their_place_in_the_recipe(tmp_path, data, changes, message):
    with pytest.raises(ValidationError, match=message):
        cascade_settings(tmp_path / "run", data, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mpo": {"loss": {"name": "dpo", "settings": {"betta": 1.0}}}},
            "preference loss dpo: unknown setting 'betta'",
        ),
        ({"rl": {"algorithm": {"name": "gspoo"}}}, "unknown algorithm 'gspoo'; did you mean 'gspo'"),
    ],
)
def test_what_a_later_stage_refuses_is_refused_before_the_first(tmp_path, data, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_cascade(cascade_settings(tmp_path / "run", data, **changes))
    assert not (tmp_path / "run").exists()


def still_videos(data: Path, folder: Path) -> dict[str, list[str]]:
    """The rows of `data` with a video of two equal frames in place of each image, as JSONL."""
    found = {}
    for split in ("train", "test"):
        rows = []
        for number, task in enumerate(open_tasks(data / f"{split}.parquet")):
            [shown] = task.images
            assert shown.data is not None
            pixels = np.asarray(PIL.Image.open(io.BytesIO(shown.data)).convert("RGB"))
            size, still = (shown.width, shown.height), lambda *_, pixels=pixels: pixels
            clip = write_video(folder / f"{split}{number}.mp4", 2, size=size, quality=1, frame_of=still)
            question = "<video>\n" + task.messages[-1].content.replace("<image>", "").strip()
            row = {"question": question, "answer": task.answer, "videos": [clip.name]}
            about = {"id": task.id, "response": task.meta["response"], "width": size[0], "height": size[1]}
            rows.append(json.dumps({**row, "extra_info": about}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
        found[split] = [str(folder / f"{split}.jsonl")]
    return found


@pytest.mark.slow
def test_rows_with_video_files_go_through_every_stage(tmp_path, data):
    pytest.importorskip("av", reason="needs foveate[video]")
    rows = {**still_videos(data, tmp_path), "max_prompt_tokens": 128, "video": {"frames": 1}}
    train = {"steps": 1, "tokens_per_micro_batch": 512, "threads": 1}
    flash = {
        "vico": {"data": rows, "optim": {"lr": 1e-4}, "train": {**train, "samples_per_step": 2}},
        "vir": {"train": {**train, "samples_per_step": 2}},
    }
    run = run_cascade(cascade_settings(tmp_path / "run", tmp_path, data=rows, sft=None, **flash))
    assert [stage.name for stage in read_stages(run.path)] == ["start", "mpo", "gspo", "vico", "vir"]
    pairs = list(open_tasks(run.path / "pairs" / "pairs.parquet"))
    assert {task.videos[0].path for task in pairs} <= {*tmp_path.glob("train*.mp4")}
    assert load_recipe(run.path / "mpo" / "config.yaml", [], MPOSettings).data.video.frames == 1
    assert json.loads((run.path / "gallery.json").read_text()) == []  # it shows images
    assert len(read_evaluations(run.path)) == 4  # of all but vico, whose router is new


def test_a_start_that_is_always_right_leaves_no_pairs_and_is_told_so(tmp_path, data):
    settings = cascade_settings(tmp_path / "run", data, sft=None, reward={"name": f"{HERE}:always_one", "workers": 0})
    with pytest.raises(DataError, match="nearly all are right; take harder prompts"):
        run_cascade(settings)
