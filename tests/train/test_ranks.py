"""Steps of several ranks are those of one: gradients, optimizer, checkpoints, exports."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from family_cases import build_family
from rank_cases import spawn, tree_of

from foveate.algorithms.policy_losses import gspo
from foveate.algorithms.targets import Totals
from foveate.cluster.base import scatter, scatter_gather
from foveate.cluster.local import LocalWorkers
from foveate.cluster.rank_engine import RankEngine, RankEngines
from foveate.config.cluster import ClusterSettings
from foveate.config.model import ModelSettings
from foveate.config.rollout import RolloutSettings
from foveate.config.train import OptimSettings
from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.models.policy import load_policy
from foveate.parallel.balance import Costs, balance
from foveate.records import SamplingParams
from foveate.rollout.build import choose_engine
from foveate.rollout.engine import Request
from foveate.train.checkpoint import checkpoints
from foveate.train.targets import PolicyRow
from foveate.train.worker import Worker

LOSS = partial(gspo, entropy_coefficient=0.01, kl_coefficient=0.1)
COSTS = Costs(0.01, 2.0)
SAMPLING = SamplingParams(2, 6)


def engine_of(worker):
    encoder = Encoder(worker.policy.tokenizer, worker.policy.family, 4, 128)
    return choose_engine(RolloutSettings(), 128), encoder, RolloutSettings()


class Calls:
    """The part of one rank in calls that all make: what a driver would send to this rank, and its result."""

    def __init__(self, worker, rank, size, row):
        self.worker, self.rank, self.size, self.row = worker, rank, size, row

    def call(self, method, per_rank_arguments):
        """The results of this rank stand for those of all, which is right for results that all share."""
        return LocalWorkers(self.worker).call(method, [per_rank_arguments[self.rank]]) * self.size


def groups_of(family, count=5):
    """Groups of different lengths; only the first two have pictures, one of them many."""
    vision = family.dummy_image is not None
    made = []
    for seed in range(count):
        packed = tree_of(seed, family, images=vision * {0: 3, 1: 1}.get(seed, 0))
        generator = torch.Generator().manual_seed(seed)
        vectors = [torch.randn(packed.trained_tokens, generator=generator) for _ in range(2)]
        old = -3 + 0.1 * vectors[0]
        made.append(PolicyRow(packed, old, vectors[1], old, old - 0.1, None))
    return made


def worker_of(folder, budget, *, adam=False, **cluster):
    """With plain descent, because the first steps of AdamW make much of differences between tiny gradients."""
    optim = OptimSettings(lr=1e-3, max_grad_norm=0.5, weight_decay=0.1)
    model = ModelSettings(path=str(folder), gradient_checkpointing=cluster.pop("checkpointing", False))
    worker = Worker(model, optim, budget, cluster=ClusterSettings(device="cpu", **cluster))
    if not adam:
        worker.optimizer = torch.optim.SGD([*worker.policy.model.parameters()], lr=1.0, momentum=0.9)
    return worker


def step(workers, groups, rate=1e-2):
    costs = [COSTS(group.group) for group in groups]
    totals = Totals(sum(g.group.trained_tokens for g in groups), sum(len(g.group.answers) for g in groups), len(groups))
    return next(scatter(workers, Worker.update_policy, groups, costs, LOSS, totals, rate))[1]


def two_steps(workers, groups):
    """What two updates say, the second on fewer groups than there may be ranks."""
    return [step(workers, groups), step(workers, groups[-1:])]


def on_ranks(rank, ranks, out, cases, adam=False):
    """Two steps, then a checkpoint, an export, answers, and the metrics of one step more."""
    found = {}
    for case, (folder, budget, cluster) in cases.items():
        worker = worker_of(folder, budget, adam=adam, gpus_per_node=ranks, **cluster)
        groups = groups_of(worker.policy.family)
        workers = Calls(worker, rank, ranks, worker.ranks.cluster.sequence_parallel)
        said = two_steps(workers, groups)
        worker.save(Path(out) / case, 2, {"stream": 7}, 1)
        worker.export(Path(out) / f"{case}-model")
        worker.engine.start(*engine_of(worker), 2)
        answers = worker.engine.generate([Request(groups[1].group.prompt, 3)], SAMPLING)
        found[case] = said, two_steps(workers, groups), answers
    return found


def resumed(rank, ranks, _, checkpoints_of):
    """The step after a checkpoint, on another number of ranks."""
    found = {}
    for case, (folder, path) in checkpoints_of.items():
        worker = worker_of(folder, 60, adam=True, gpus_per_node=ranks)
        assert worker.restore(Path(path)) == {"step": 2, "stream": 7}
        workers = Calls(worker, rank, ranks, 1)
        found[case] = two_steps(workers, groups_of(worker.policy.family))
    return found


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    return {"dense": str(tiny_folder), "moe": str(build_family(tmp_path_factory.mktemp("moe") / "moe", "qwen3_vl_moe"))}


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """What one rank does, by model."""
    found = {}
    for name, folder in folders.items():
        worker = worker_of(folder, 60)
        workers, groups = LocalWorkers(worker), groups_of(worker.policy.family)
        said = two_steps(workers, groups)
        out = tmp_path_factory.mktemp("alone") / "model"
        worker.export(out)
        worker.engine.start(*engine_of(worker), 2)
        answers = worker.engine.generate([Request(groups[1].group.prompt, 3)], SAMPLING)
        found[name] = said, two_steps(workers, groups), answers, out
    return found


def require_same(found, expected, tolerance=1e-4, case="", least=1e-7):
    for record, other in zip(found, expected, strict=True):
        assert record.keys() == other.keys()
        for name, value in other.items():
            assert record[name] == pytest.approx(value, rel=tolerance, abs=least), (case, name)


def require_as_alone(results, folder, case, alone):
    said, _, answers, model = alone
    for result in results:
        require_same(result[case][0], said, 1e-5, case, 1e-6)
        assert [answer.token_ids for answer in result[case][2][0]] == [answer.token_ids for answer in answers[0]]
    start, own, other = (
        load_policy(str(path)).model.state_dict() for path in (folder, model, results[0]["out"] / f"{case}-model")
    )
    moved = torch.cat([(own[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(own[name] - other[name]).flatten() for name in start])
    assert moved.norm() > 0
    assert apart.norm() <= 2e-5 * moved.norm()  # measured 9e-6


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path, folders, alone):
    """A rank may have no group, or more rows than the other; pictures may be on one of them only."""
    cases = {
        "dense": (folders["dense"], 60, {}),
        "moe": (folders["moe"], 60, {}),
        "whole rows": (folders["dense"], 4096, {"shard": "none"}),
        "offload": (folders["dense"], 60, {"offload": True}),
        "shared": (folders["dense"], 30, {"sequence_parallel": 2}),
        "moe, everything": (folders["moe"], 30, {"sequence_parallel": 2, "offload": True, "checkpointing": True}),
    }
    results = [{**found, "out": tmp_path} for found in spawn(on_ranks, 2, tmp_path, cases)]
    for case in cases:
        name = "moe" if "moe" in case else "dense"
        require_as_alone(results, folders[name], case, alone[name])


@pytest.mark.slow
def test_four_ranks_learn_what_one_learns(tmp_path, folders, alone):
    """Cut over four, with and without rows that two share."""
    cases = {
        "dense": (folders["dense"], 60, {}),
        "moe": (folders["moe"], 60, {"checkpointing": True}),
        "dense, shared": (folders["dense"], 30, {"sequence_parallel": 2, "offload": True}),
        "moe, shared": (folders["moe"], 30, {"sequence_parallel": 2}),
    }
    results = [{**found, "out": tmp_path} for found in spawn(on_ranks, 4, tmp_path, cases)]
    for case in cases:
        name = "moe" if "moe" in case else "dense"
        require_as_alone(results, folders[name], case, alone[name])


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_continues_on_two_and_on_one(tmp_path, folders, alone):
    cases = {name: (folders[name], 30, {"sequence_parallel": 2}) for name in ("dense", "moe")}
    results = spawn(on_ranks, 4, tmp_path, cases, True)
    paths = {name: (folders[name], str(tmp_path / name / "step_000002")) for name in cases}
    for name in cases:
        assert [path.name for _, path in checkpoints(tmp_path / name)] == ["step_000002"]
        require_same(results[0][name][0][:1], alone[name][0][:1])
    two = tmp_path / "two"
    two.mkdir()
    for found in spawn(resumed, 2, two, paths):
        for name in cases:
            require_same(found[name], results[0][name][1])
    for name, (folder, path) in paths.items():
        worker = worker_of(folder, 60, adam=True)
        assert worker.restore(Path(path)) == {"step": 2, "stream": 7}
        require_same(two_steps(LocalWorkers(worker), groups_of(worker.policy.family)), results[0][name][1])


def test_work_is_dealt_out_evenly_and_in_order():
    costs = [5.0, 1.0, 4.0, 3.0, 3.0, 2.0]
    shares = balance(costs, 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert all(share == sorted(share) for share in shares)
    assert [sum(costs[i] for i in share) for share in shares] == [9.0, 9.0]
    assert balance(costs, 1) == [list(range(6))]
    assert balance([1.0], 3) == [[0], [], []]


def test_a_group_costs_its_prompt_and_its_pictures_once(tiny_policy):
    packed = tree_of(1, tiny_policy.family, images=2)
    twice = replace(packed, answers=packed.answers * 2)
    costs = Costs(0.5, 7.0)
    prompt, lengths = len(packed.prompt), [len(answer) for answer in packed.answers]
    answers = sum(n * (1 + 0.5 * (prompt + n / 2)) for n in lengths)
    assert costs(packed) == pytest.approx(prompt * (1 + 0.5 * prompt / 2) + 2 * 7.0 + answers)
    assert costs(twice) - costs(packed) == pytest.approx(answers)


def test_costs_follow_from_the_configuration(tiny_policy):
    costs = Costs.of(tiny_policy.model.config)
    assert costs.pair == 1 / (6 * 64)
    assert costs.entry == pytest.approx(16 * (2 * 32**2) / (3 * 64**2))


class Recorder:
    size, row = 4, 2

    def __init__(self):
        self.calls = []

    def call(self, _, per_rank_arguments):
        self.calls = per_rank_arguments
        return [[(rank, item) for item in own[-2]] for rank, own in enumerate(per_rank_arguments)]


def test_neighbours_that_share_rows_get_the_same_share_and_results_keep_the_order():
    workers = Recorder()
    results = scatter_gather(workers, Worker.logprobs, ["a", "b", "c"], [1.0, 5.0, 3.0], "more")
    assert workers.calls == [(["b"], "more")] * 2 + [(["a", "c"], "more")] * 2
    assert results == [(2, "a"), (0, "b"), (2, "c")]
    assert [own[0] for own in workers.calls] != [None]
    scatter_gather(RankEngines(workers), RankEngine.generate, ["a", "b", "c"], [1.0, 5.0, 3.0], "more")
    assert [own[1] for own in workers.calls] == [["b"], ["c"], ["a"], []]


def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path, folders):
    worker = worker_of(folders["dense"], 60)
    path = worker.save(tmp_path, 2, {"stream": 7}, 1)
    [file] = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"__0_0.distcp is not as it was written"):
        worker.restore(path)
