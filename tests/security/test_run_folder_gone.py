"""A run whose folder is taken away notices it, says so, and makes no other one in its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy import make_data, rl_settings, sft_settings

from foveate.errors import ConfigError, DiskError
from foveate.files import atomic_write_text, held, keep
from foveate.log import MetricsWriter, read_metrics
from foveate.run_folder import open_run
from foveate.train.rl import run_rl
from foveate.train.sft import run_sft


def replace(run: Path, _: Path) -> None:
    shutil.rmtree(run)
    shutil.copytree(run.parent / "other", run)


WAYS = {
    "renamed": lambda run, aside: run.rename(aside),
    "deleted": lambda run, _: shutil.rmtree(run),
    "another in its place": replace,
    "only its settings deleted": lambda run, _: (run / "config.yaml").unlink(),
    "the folder above renamed": lambda run, aside: run.parent.rename(aside),
}


def at_step(patch: pytest.MonkeyPatch, step: int, act) -> None:
    write = MetricsWriter.write

    def acting(self, number, metrics):
        write(self, number, metrics)
        if number == step:
            act()

    patch.setattr(MetricsWriter, "write", acting)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_without_its_folder_stops_and_makes_no_other(tmp_path, tiny_folder, data, way):
    run = tmp_path / "runs" / "run"
    (run.parent / "other").mkdir(parents=True)
    (run.parent / "other" / "mine.txt").write_text("mine")
    left: list[set[str]] = []

    def take() -> None:
        WAYS[way](run, tmp_path / "aside")
        left.append(files(run))

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, take)
        with pytest.raises(DiskError) as caught:
            run_sft(sft_settings(run, tiny_folder, data, train={"steps": 9, "save_every": 3}))
    assert str(caught.value).startswith(f"{run} was renamed, emptied or deleted while the run wrote to it")
    assert files(run) == left[0]


def test_a_folder_that_is_brought_back_is_continued(tmp_path, tiny_folder, data):
    run, aside = tmp_path / "run", tmp_path / "aside"
    settings = rl_settings(run, tiny_folder, data, train={"steps": 4, "save_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, lambda: run.rename(aside))
        with pytest.raises(DiskError, match="Bring the folder back, and the same command continues"):
            run_rl(settings)
    assert not run.exists()
    aside.rename(run)
    run_rl(settings)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_what_is_held_is_not_written_to_after_it_is_gone(tmp_path):
    folder = tmp_path / "a"
    with held(folder, "another"):
        atomic_write_text(folder / "b" / "c", "text")
        atomic_write_text(folder / "kept", "text")
        keep(folder / "kept")
        atomic_write_text(tmp_path / "elsewhere", "text")
        shutil.rmtree(folder)
        atomic_write_text(tmp_path / "elsewhere", "text")
        for write in (
            lambda: atomic_write_text(folder / "b" / "c", "text"),
            lambda: MetricsWriter(folder / "metrics.jsonl").write(1, {}),
        ):
            with pytest.raises(DiskError, match="was renamed, emptied or deleted"):
                write()
    assert not folder.exists()
    atomic_write_text(folder / "b", "free again")


def test_the_first_error_is_the_one_that_is_told(tmp_path):
    """Also where the folder is gone when the start is to be taken back."""
    path = tmp_path / "run"

    def fail() -> None:
        with open_run(path, rl_settings(path, "demo", path)):
            shutil.rmtree(path)
            raise ConfigError("the user's")

    with pytest.raises(ConfigError, match="the user's"):
        fail()
