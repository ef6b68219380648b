from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from foveate.config_parts import OptimSettings
from foveate.errors import DataError
from foveate.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from foveate.train.optim import apply_gradients, build_optimizer


def trained(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    """A small model with a frozen part after some steps of AdamW."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimSettings(lr=0.1, weight_decay=0.1))
    learn(model, optimizer, steps)
    return model, optimizer


def learn(model: nn.Module, optimizer: torch.optim.AdamW, steps: int) -> None:
    for step in range(steps):
        model(torch.arange(8.0).reshape(2, 4) + step).pow(2).sum().backward()
        apply_gradients(optimizer, 0.1, 1.0)


def saved(folder: Path, step: int = 7, keep: int = 2) -> Path:
    model, optimizer = trained(3)
    return save_checkpoint(folder, step, {"": (model, optimizer)}, {"stream": {"position": 12}}, keep)


def test_weights_optimizer_and_state_come_back_bitwise(tmp_path):
    model, optimizer = trained(3)
    path = save_checkpoint(tmp_path, 7, {"": (model, optimizer)}, {"stream": {"position": 12}}, keep=2)
    other, its_optimizer = trained(0, seed=1)
    assert load_checkpoint(path, {"": (other, its_optimizer)}) == {"step": 7, "stream": {"position": 12}}
    learn(model, optimizer, 3)
    learn(other, its_optimizer, 3)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_before_the_first_step_can_be_saved_and_restored(tmp_path):
    model, optimizer = trained(0)
    path = save_checkpoint(tmp_path, 0, {"": (model, optimizer)}, {}, keep=1)
    assert load_checkpoint(path, {"": trained(0, seed=1)}) == {"step": 0}


def test_the_newest_few_are_kept(tmp_path):
    for step in (5, 10, 1_000_000):
        saved(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 1_000_000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000010", "step_1000000"]
    assert (tmp_path / "latest").resolve().name == "step_1000000"


def test_the_best_is_kept_however_old(tmp_path):
    model, optimizer = trained(3)
    for step, score in enumerate([0.2, 0.6, None, 0.6, 0.3, 0.1], 1):
        save_checkpoint(tmp_path, step, {"": (model, optimizer)}, {"score": score}, keep=1)
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
    assert said.endswith("; delete it to go on from an older one")
    assert "\n" not in said


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = saved(tmp_path)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    with pytest.raises(DataError, match="cannot be read"):
        load_checkpoint(path, {"": (model, build_optimizer(model, OptimSettings(lr=0.1)))})


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path):
    code = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from foveate.config_parts import OptimSettings
from foveate.errors import DiskError
from foveate.train.checkpoint import save_checkpoint
from foveate.train.optim import build_optimizer
model = nn.Linear(200, 200)
optimizer = build_optimizer(model, OptimSettings(lr=0.1))
save_checkpoint(Path(sys.argv[1]), 1, {"": (model, optimizer)}, {}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_checkpoint(Path(sys.argv[1]), 2, {"": (model, optimizer)}, {}, 1)
except DiskError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ended.stdout.startswith(f"cannot write {tmp_path}/step_000002: "), ended.stderr
    assert ended.stdout.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_000001"]
