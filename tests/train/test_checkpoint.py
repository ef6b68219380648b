from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rank_cases import spawn
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import foveate.files
import foveate.train.checkpoint
from foveate.config.cluster import ClusterSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.errors import DataError, DiskError, DiskFull
from foveate.files import disk_error, set_disk_wait
from foveate.parallel.ranks import Ranks
from foveate.train.checkpoint import Saving, checkpoints, load_checkpoint, save_checkpoint, tensors_of
from foveate.train.optim import apply_gradients, build_optimizer
from foveate.train.worker import Worker


def trained(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model with a frozen part after some steps of AdamW."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimSettings(lr=0.1, weight_decay=0.1))
    learn(model, optimizer, steps)
    return model, optimizer


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        model(torch.arange(8.0).reshape(2, 4) + step).pow(2).sum().backward()
        apply_gradients(optimizer, 0.1, 1.0)


def saved(folder: Path, step: int = 7, keep: int = 2) -> Path:
    model, optimizer = trained(3)
    return save_checkpoint(folder, step, tensors_of({"": (model, optimizer)}), {"stream": {"position": 12}}, keep)


def test_weights_optimizer_and_state_come_back_bitwise(tmp_path):
    model, optimizer = trained(3)
    path = save_checkpoint(tmp_path, 7, tensors_of({"": (model, optimizer)}), {"stream": {"position": 12}}, keep=2)
    other, its_optimizer = trained(0, seed=1)
    assert load_checkpoint(path, {"": (other, its_optimizer)}) == {"step": 7, "stream": {"position": 12}}
    learn(model, optimizer, 3)
    learn(other, its_optimizer, 3)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_before_the_first_step_can_be_saved_and_restored(tmp_path):
    model, optimizer = trained(0)
    path = save_checkpoint(tmp_path, 0, tensors_of({"": (model, optimizer)}), {}, keep=1)
    assert load_checkpoint(path, {"": trained(0, seed=1)}) == {"step": 0}


def test_a_checkpoint_before_the_first_step_changes_nothing_that_is_learned_later(tmp_path):
    (model, optimizer), (other, its_optimizer) = trained(0), trained(0)
    save_checkpoint(tmp_path, 0, tensors_of({"": (model, optimizer)}), {}, keep=1)
    learn(model, optimizer, 2)
    learn(other, its_optimizer, 2)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_parameters_that_had_no_gradient_yet_go_on_as_they_would_have(tmp_path):
    """As a vision tower's that trains on text alone: their state is still the first one."""

    def some(seed):
        model, _ = trained(0, seed)
        model[0].requires_grad_(True)
        return model, build_optimizer(model, OptimSettings(lr=0.1))

    def learn_last(model, optimizer, layers):
        for _ in range(2):
            sum(model[i].weight.pow(2).sum() for i in layers).backward()
            apply_gradients(optimizer, 0.1, 1.0)

    model, optimizer = some(0)
    learn_last(model, optimizer, [2])
    assert optimizer.state[model[0].weight]["step"] == 0
    path = save_checkpoint(tmp_path, 1, tensors_of({"": (model, optimizer)}), {}, keep=1)
    other, its_optimizer = some(1)
    load_checkpoint(path, {"": (other, its_optimizer)})
    undisturbed, own = some(0)
    learn_last(undisturbed, own, [2])
    for one, its in ((model, optimizer), (other, its_optimizer), (undisturbed, own)):
        learn_last(one, its, [0, 2])
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
        assert torch.equal(value, other.state_dict()[name])


def test_a_checkpoint_that_was_half_deleted_is_none(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    remove = foveate.train.checkpoint.shutil.rmtree

    def killed(path, *rest, **more):
        if "step_000001" in str(path):
            (path / "state.json").unlink()
            raise KeyboardInterrupt
        remove(path, *rest, **more)

    monkeypatch.setattr(foveate.train.checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 3)
    monkeypatch.undo()
    saved(tmp_path, 4)
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 4]


def test_what_failed_on_another_rank_than_the_first_is_found():
    error = CheckpointException("write", {3: (OSError(errno.ENOSPC, "No space left on device"), None)})
    assert foveate.train.checkpoint._cause(error).errno == errno.ENOSPC


def test_the_newest_few_are_kept(tmp_path):
    for step in (5, 10, 1_000_000):
        saved(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 1_000_000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000010", "step_1000000"]
    assert (tmp_path / "latest").resolve().name == "step_1000000"


def test_the_best_is_kept_however_old(tmp_path):
    model, optimizer = trained(3)
    for step, score in enumerate([0.2, 0.6, None, 0.6, 0.3, 0.1], 1):
        save_checkpoint(tmp_path, step, tensors_of({"": (model, optimizer)}), {"score": score}, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6]
    assert (tmp_path / "best").resolve().name == "step_000004"


def test_saving_the_same_step_again_replaces_it(tmp_path):
    saved(tmp_path)
    path = saved(tmp_path)
    assert checkpoints(tmp_path) == [(7, path)]


def test_half_written_and_foreign_entries_are_never_picked_up(tmp_path):
    saved(tmp_path, 3)
    for name in (".step_000009.123.tmp", "step_9", "step_000009.old", "notes"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [3]


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "state.json"])
def test_a_checkpoint_that_cannot_be_read_is_named_in_one_line(tmp_path, file, damage):
    path = saved(tmp_path)
    if damage == "remove":
        (path / file).unlink()
    else:
        size = (path / file).stat().st_size
        os.truncate(path / file, 0 if damage == "empty" else size // 2)
    with pytest.raises(DataError) as caught:
        load_checkpoint(path, {"": trained(0)})
    said = str(caught.value)
    assert said.startswith(f"{path}: this checkpoint cannot be read (")
    assert said.endswith("; delete it to resume from an older one")
    assert "\n" not in said


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = saved(tmp_path)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    with pytest.raises(DataError, match="cannot be read"):
        load_checkpoint(path, {"": (model, build_optimizer(model, OptimSettings(lr=0.1)))})


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path):
    code = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from foveate.config.train import OptimSettings
from foveate.errors import DiskError
from foveate.train.checkpoint import save_checkpoint, tensors_of
from foveate.train.optim import build_optimizer
model = nn.Linear(200, 200)
optimizer = build_optimizer(model, OptimSettings(lr=0.1))
save_checkpoint(Path(sys.argv[1]), 1, tensors_of({"": (model, optimizer)}), {}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_checkpoint(Path(sys.argv[1]), 2, tensors_of({"": (model, optimizer)}), {}, 1)
except DiskError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ended.stdout.startswith(f"cannot write {tmp_path}/step_000002: "), ended.stderr
    assert ended.stdout.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_000001"]


# --------------------------------------------------------------------------------------------- beside the next steps


def held_back(monkeypatch):
    """Writing begins only when the event is set."""
    go, original = threading.Event(), foveate.train.checkpoint.save

    def save(*arguments, **keywords):
        assert go.wait(60)
        return original(*arguments, **keywords)

    monkeypatch.setattr(foveate.train.checkpoint, "save", save)
    return go


def test_a_checkpoint_written_apart_holds_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    model, optimizer = trained(3)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    go, saving = held_back(monkeypatch), Saving()
    path = saving.start(tmp_path, 3, tensors_of({"": (model, optimizer)}), {}, 1)
    learn(model, optimizer, 2)
    saving.check()  # it is not done, and nothing is wrong
    assert not path.exists()
    go.set()
    saving.wait()
    other, its_optimizer = trained(0, seed=1)
    load_checkpoint(path, {"": (other, its_optimizer)})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in expected.items())
    assert not torch.equal(other.state_dict()["2.weight"], model.state_dict()["2.weight"])
    learn(other, its_optimizer, 2)  # with the moments of then
    assert torch.equal(other.state_dict()["2.weight"], model.state_dict()["2.weight"])


def test_what_ends_a_checkpoint_that_is_written_apart_is_raised_once_at_the_next_chance(tmp_path, monkeypatch):
    def save(*_, **__):
        raise CheckpointException("", {0: (OSError(errno.EROFS, "Read-only file system"), None)})

    monkeypatch.setattr(foveate.train.checkpoint, "save", save)
    saving = Saving()
    saving.start(tmp_path, 3, tensors_of({"": trained(0)}), {}, 1)
    while not saving._under_way.done():
        time.sleep(0.01)
    with pytest.raises(DiskError, match=r"cannot write .*step_000003: Read-only file system"):
        saving.check()
    saving.wait()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- a full disk


def full_at_first(monkeypatch, times, number=errno.ENOSPC):
    original, tried = foveate.train.checkpoint.save, []
    monkeypatch.setattr(foveate.files, "_RETRY", 0.01)

    def save(*arguments, **keywords):
        tried.append(1)
        if len(tried) <= times:
            raise CheckpointException("", {0: (OSError(number, os.strerror(number)), None)})
        return original(*arguments, **keywords)

    monkeypatch.setattr(foveate.train.checkpoint, "save", save)
    return tried


def test_a_full_disk_is_waited_for_and_says_what_is_needed_and_where(tmp_path, monkeypatch, caplog):
    tried = full_at_first(monkeypatch, 2)
    monkeypatch.setattr(foveate.files, "_disk_wait", 60.0)
    path = save_checkpoint(tmp_path, 1, tensors_of({"": trained(3)}), {}, 1)
    assert len(tried) == 3
    load_checkpoint(path, {"": trained(0)})
    first, _ = (record.getMessage() for record in caplog.records if record.name == "foveate.files")
    for part in (f"cannot write {path}: No space left on device (", f"MiB free in {tmp_path}", "needs 0 MiB; waiting"):
        assert part in first


def test_the_wait_for_a_full_disk_ends_and_other_errors_are_not_waited_for(tmp_path, monkeypatch):
    content = tensors_of({"": trained(0)})
    full_at_first(monkeypatch, 10**6)
    for seconds in (0.0, 0.1):
        monkeypatch.setattr(foveate.files, "_disk_wait", seconds)
        with pytest.raises(DiskFull, match="No space left on device"):
            save_checkpoint(tmp_path, 1, content, {}, 1)
    tried = full_at_first(monkeypatch, 1, errno.EROFS)
    monkeypatch.setattr(foveate.files, "_disk_wait", 60.0)
    with pytest.raises(DiskError, match="Read-only"):
        save_checkpoint(tmp_path, 1, content, {}, 1)
    assert len(tried) == 1


def test_a_worker_sets_how_long_its_process_waits_for_a_full_disk(monkeypatch, tiny_folder):
    monkeypatch.setattr(foveate.files, "_disk_wait", 0.0)
    Worker(ModelSettings(path=str(tiny_folder)), OptimSettings(lr=1e-3), 4096, disk_wait=7.0)
    assert set_disk_wait(0.0) == 7.0


def full_on_one(rank, ranks, folder):
    """The disk is full for the first of the ranks alone, twice."""
    own = Ranks.of(ClusterSettings(gpus_per_node=ranks))
    tried, original = [], foveate.train.checkpoint._write_state
    foveate.files._RETRY = 0.01
    set_disk_wait(60.0)

    def write_state(*arguments):
        tried.append(1)
        if len(tried) < 3:
            raise disk_error(Path(folder) / "step_000001", OSError(errno.ENOSPC, "No space left on device"))
        original(*arguments)

    foveate.train.checkpoint._write_state = write_state
    model, optimizer = trained(3)
    path = save_checkpoint(Path(folder), 1, tensors_of({"": (model, optimizer)}), {"x": rank}, 1, own)
    return len(tried), load_checkpoint(path, {"": trained(0)}, own)


@pytest.mark.slow
def test_ranks_wait_together_for_a_disk_that_is_full_for_one(tmp_path):
    assert spawn(full_on_one, 2, tmp_path) == [(3, {"step": 1, "x": 0}), (0, {"step": 1, "x": 0})]
