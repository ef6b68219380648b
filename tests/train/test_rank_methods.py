"""What one rank learns by imitation, from pairs, by adapters and with a critic, several learn too."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from family_cases import build_family
from rank_cases import spawn
from test_ranks import COSTS, LOSS, Calls, groups_of, require_same

from foveate.algorithms.distillation import distilled_loss
from foveate.algorithms.preference_losses import RewardShift
from foveate.algorithms.supervised import sft_total
from foveate.algorithms.targets import Totals
from foveate.cluster.base import scatter, scatter_gather
from foveate.cluster.local import LocalWorkers
from foveate.config.algorithm import CriticSettings, PreferenceSettings, TeacherSettings
from foveate.config.cluster import ClusterSettings
from foveate.config.model import LoraSettings, ModelSettings
from foveate.config.train import OptimSettings
from foveate.models.policy import load_policy
from foveate.train.mpo import _logprobs, _move, _totals, build_preference_loss
from foveate.train.reference import TrainPair
from foveate.train.targets import ValueRow
from foveate.train.worker import Worker

ADAPTED = {"trainable": ("language",), "lora": LoraSettings(rank=4, targets=("q_proj", "v_proj"))}
CASES = {
    "sft": ("dense", "sft", {}, {}),
    "sft, shared rows": ("dense", "sft", {}, {"sequence_parallel": 2}),
    "sft, mixture": ("moe", "sft", {}, {}),
    "mpo": ("dense", "mpo", {}, {}),
    "mpo, shared rows": ("dense", "mpo", {}, {"sequence_parallel": 2}),
    "mpo, mixture": ("moe", "mpo", {}, {"offload": True}),
    "lora": ("dense", "rl", ADAPTED, {}),
    "lora, mixture": ("moe", "rl", ADAPTED, {"sequence_parallel": 2}),
    "lora beside a projector": ("dense", "rl", {"lora": LoraSettings(rank=4)}, {}),
    "critic": ("dense", "critic", {}, {}),
    "critic, shared rows": ("dense", "critic", {}, {"sequence_parallel": 2}),
    "critic, mixture": ("moe", "critic", {}, {"shard": "none"}),
    "teachers": ("dense", "teachers", {}, {}),
    "teachers, shared rows": ("dense", "teachers", {}, {"sequence_parallel": 2}),
    "teachers by their top k": ("dense", "top k", {}, {}),
    "teachers by their top k, shared rows": ("dense", "top k", {}, {"sequence_parallel": 2}),
    "teachers of tokens, shared rows": ("dense", "tokens", {}, {"sequence_parallel": 2}),
    "sft, compiled": ("dense", "sft", {"compile": True, "gradient_checkpointing": True}, {}),
}
"""The model, what it learns by, its settings, and those of the cluster."""
ROWS = 60
"""Tokens of a row: a step of five prompts takes several."""


def descent(model):
    """Plain, because the first steps of AdamW make much of differences between tiny gradients."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)


def worker_of(folder, kind, settings, cluster):
    optim = OptimSettings(lr=1e-3, max_grad_norm=0.5, weight_decay=0.1)
    critic = CriticSettings(lr=1e-2) if kind == "critic" else None
    budget = ROWS // cluster.get("sequence_parallel", 1)
    model, ranks = ModelSettings(path=str(folder), **settings), ClusterSettings(device="cpu", **cluster)
    teacher = None
    if kind in ("teachers", "top k", "tokens"):
        two = {"path": teachers_of(folder)[0], "sources": {"other": teachers_of(folder)[1]}}
        term = "advantage" if kind == "tokens" else "loss"
        teacher = TeacherSettings(**two, top_k=5 if kind == "top k" else None, term=term)
    worker = Worker(
        model, optim, budget, cluster=ranks, reference=kind in ("rl", "tokens"), critic=critic, teacher=teacher
    )
    worker.optimizer = descent(worker.policy.model)
    if worker.critic is not None:
        worker.critic.optimizer = descent(worker.critic.model)
    return worker


def learn_by_sft(workers, groups):
    packed_groups = [group.group for group in groups]
    rest = "square", sft_total(packed_groups, "square"), 1e-2
    return [next(scatter(workers, Worker.update_sft, packed_groups, [*map(COSTS, packed_groups)], *rest))[1]]


def learn_by_mpo(workers, groups):
    """Reference log-probs of the start, then three steps between which the shift moves."""
    loss, shift, said = build_preference_loss(PreferenceSettings()), RewardShift(), []
    packed_groups = [replace(group.group, answers=group.group.answers[:2]) for group in groups]
    known = [[part.sum().item() for part in own.split([*map(len, packed.answers)])]
             for packed, own in zip(packed_groups, _logprobs(workers, COSTS, packed_groups), strict=True)]  # fmt: skip
    apart = [(0.3, -0.2), (-0.4, 0.5), (0.1, 0.7), (-0.6, -0.2), (0.9, 0.1)]  # else rewards of 0, and signs by chance
    pairs = [
        TrainPair(packed, (own[0] + x, own[1] + y))
        for packed, own, (x, y) in zip(packed_groups, known, apart, strict=True)
    ]
    for some in (pairs, pairs[-1:], pairs[:3]):
        costs = [COSTS(pair.group) for pair in some]
        record = next(scatter(workers, Worker.update_preference, some, costs, loss, _totals(some), shift.mean, 1e-2))[1]
        _move(shift, record, len(some))
        said.append(record)
    return [*said, {"shift": shift.mean, **{f"{i}": value for i, own in enumerate(known) for value in [sum(own)]}}]


def totals_of(groups):
    return Totals(sum(g.group.trained_tokens for g in groups), sum(len(g.group.answers) for g in groups), len(groups))


def learn_by_rl(workers, groups):
    said = []
    for some in (groups, groups[-1:]):
        costs = [COSTS(group.group) for group in some]
        said.append(next(scatter(workers, Worker.update_policy, some, costs, LOSS, totals_of(some), 1e-1))[1])
    packed_groups = [group.group for group in groups]
    both = scatter_gather(workers, Worker.both_logprobs, packed_groups, [*map(COSTS, packed_groups)])
    return [*said, {f"{i} {of}": own[of].sum().item() for i, own in enumerate(both) for of in (0, 1)}]


def learn_by_critic(workers, groups):
    said = []
    for some in (groups, groups[-1:], groups):
        costs, packed_groups = [COSTS(group.group) for group in some], [group.group for group in some]
        values = scatter_gather(workers, Worker.values, packed_groups, costs)
        rows = [ValueRow(g.group, value, g.advantage + 1) for g, value in zip(some, values, strict=True)]
        record = next(scatter(workers, Worker.update_critic, rows, costs, totals_of(rows), 1e-1))[1]
        said.append({**record, **{str(i): value.sum().item() for i, value in enumerate(values)}})
    return said


def teachers_of(folder):
    """The start of `build_sharp`, and the model itself, which moves away from it."""
    return str(Path(folder).with_name("fresh")), str(folder)


def learn_by_teachers(workers, groups):
    """Two steps; in the second, some ranks have no row of either teacher."""
    names = next(iter(workers.call(names_of_teachers, [()] * workers.size)))
    loss, said = partial(distilled_loss, loss=LOSS, coefficient=2.0, aggregate="token-mean"), []
    rows = [replace(group, teacher=names[number % 2]) for number, group in enumerate(groups)]
    for some in (rows, rows[-1:]):
        costs = [COSTS(row.group) for row in some]
        said.append(next(scatter(workers, Worker.update_policy, some, costs, loss, totals_of(some), 1e-1))[1])
    return said


def learn_by_tokens(workers, groups):
    names = next(iter(workers.call(names_of_teachers, [()] * workers.size)))
    asked = [(group.group, names[number % 2]) for number, group in enumerate(groups)]
    found = scatter_gather(workers, Worker.teacher_logprobs, asked, [COSTS(group.group) for group in groups])
    return [{str(i): own.sum().item() for i, own in enumerate(found)}, *learn_by_rl(workers, groups)]


def names_of_teachers(worker):
    return worker.teachers.names


LEARN = {"sft": learn_by_sft, "mpo": learn_by_mpo, "rl": learn_by_rl, "critic": learn_by_critic}
LEARN |= {"teachers": learn_by_teachers, "top k": learn_by_teachers, "tokens": learn_by_tokens}


def on_ranks(rank, ranks, out, folders, cases):
    found = {}
    for case in cases:
        name, kind, settings, cluster = CASES[case]
        worker = worker_of(folders[name], kind, settings, {**cluster, "gpus_per_node": ranks})
        workers = Calls(worker, rank, ranks, worker.ranks.cluster.sequence_parallel)
        workers.call = partial(of_this_rank, workers)
        found[case] = LEARN[kind](workers, groups_of(worker.policy.family))
        worker.export(Path(out) / case)
        path = worker.save(Path(out) / f"{case} saved", 1, {}, 1)
        worker.restore(path)
    return found


def of_this_rank(workers, method, arguments):
    """The results of all ranks, each from its own."""
    mine = LocalWorkers(workers.worker).call(method, [arguments[workers.rank]])[0]
    return workers.worker.ranks.gather(mine)


def alone(folders, out, cases):
    found = {}
    for case in cases:
        name, kind, settings, _ = CASES[case]
        worker = worker_of(folders[name], kind, settings, {})
        found[case] = LEARN[kind](LocalWorkers(worker), groups_of(worker.policy.family))
        worker.export(Path(out) / case)
    return found


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    return {"dense": str(tiny_folder), "moe": str(build_family(tmp_path_factory.mktemp("moe") / "moe", "qwen3_vl_moe"))}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize(("ranks", "cases"), [(2, [*CASES]), (4, [case for case in CASES if "," in case])])
def test_ranks_learn_what_one_learns(tmp_path, folders, ranks, cases):
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    expected = alone(folders, tmp_path / "one", cases)
    for result in spawn(on_ranks, ranks, tmp_path / "many", folders, cases):
        for case, said in expected.items():
            require_same(result[case], said, 2e-5, case, 1e-6)  # rewards are small differences of large sums
    for case in cases:
        name = CASES[case][0]
        start, own, other = (
            load_policy(str(path)).model.state_dict()
            for path in (folders[name], tmp_path / "one" / case, tmp_path / "many" / case)
        )
        moved = torch.cat([(own[name] - start[name]).flatten() for name in start])
        apart = torch.cat([(own[name] - other[name]).flatten() for name in start])
        assert moved.norm() > 0 or case.startswith("critic")
        assert apart.norm() <= 2e-5 * moved.norm(), case


def in_half_precision(rank, ranks, out, folder):
    """Three steps in float16: as they are; scaled beyond its range, which is skipped; and after a checkpoint."""
    worker = worker_of(folder, "rl", {}, {"gpus_per_node": ranks, "dtype": "float16"})
    workers = Calls(worker, rank, ranks, 1)
    groups = groups_of(worker.policy.family)
    costs, totals = [COSTS(group.group) for group in groups], totals_of(groups)

    def step():
        return next(scatter(workers, Worker.update_policy, groups, costs, LOSS, totals, 1e-2))[1]

    worker.scale.value = 1024.0
    first = step()
    worker.scale.value = 2.0**40
    second, scale = step(), worker.scale.value
    path = worker.save(Path(out), 1, {"stream": 7}, 1)
    worker.scale.value = 1.0
    return first, second, scale, worker.restore(path), worker.scale.value


@pytest.mark.slow
def test_float16_learns_with_a_scaled_loss_and_skips_what_overflows(tmp_path, folders):
    worker = worker_of(folders["dense"], "rl", {}, {})
    groups = groups_of(worker.policy.family)
    costs = [COSTS(group.group) for group in groups]
    rest = LOSS, totals_of(groups), 1e-2
    whole = next(scatter(LocalWorkers(worker), Worker.update_policy, groups, costs, *rest))[1]
    for first, second, scale, state, restored in spawn(in_half_precision, 2, tmp_path, folders["dense"]):
        assert first["optim/update_skipped"] == 0
        assert first["optim/grad_norm"] == pytest.approx(whole["optim/grad_norm"], rel=0.02)
        assert first["loss/entropy"] == pytest.approx(whole["loss/entropy"], rel=0.01)
        assert second["optim/update_skipped"] == 1
        assert scale == restored == 2.0**39
        assert state == {"step": 1, "stream": 7}
