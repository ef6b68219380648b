"""The gradient of every algorithm, with all its terms, is that of the whole step: however the answers are packed,
ordered, split over micro-batches and shared by ranks. In float64, through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import start_ranks
from test_toy_runs import ALGORITHMS, algorithm_of
from toy import make_data

from foveate.algorithms.targets import Totals
from foveate.cluster.local import LocalWorkers
from foveate.config.algorithm import AlgorithmSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.data.table import open_tasks
from foveate.encoding.encode import Encoder
from foveate.parallel.balance import Costs
from foveate.records import Answer, Group, Score
from foveate.train.algorithm import ResolvedAlgorithm, build_algorithm
from foveate.train.targets import PolicyRow, ValueRow
from foveate.train.update import compute_advantages
from foveate.train.worker import Worker

LENGTHS = ((12, 5, 20, 9), (8, 1, 16, 4), (3, 20, 11, 7), (15, 6, 6, 14))
REWARDS = ((0.0, 1.0, 0.5, 0.0), (1.0, 1.0, 0.9, 0.3), (0.2, 0.9, 0.0, 0.4), (0.0, 0.1, 0.0, 0.8))
RANKS = 2


def method_of(name: str) -> ResolvedAlgorithm:
    """The algorithm with a KL and an entropy term, a KL in its reward, and a correction for its sampler."""
    settings: dict[str, Any] = algorithm_of(name) | {
        "loss": {"kl_coefficient": 0.1, "entropy_coefficient": 0.01},
        "reward_kl": {"coefficient": 0.01},
        "correction": {"mode": "sequence-truncate", "high": 1.5},
    }
    return build_algorithm(AlgorithmSettings.model_validate(settings), 16)


def worker_of(folder: Path) -> Worker:
    settings = AlgorithmSettings.model_validate(algorithm_of("ppo"))
    optim = OptimSettings(lr=1.0)
    worker = Worker(ModelSettings(path=str(folder)), optim, 4096, reference=True, critic=settings.critic)
    assert worker.critic is not None
    for model in (worker.policy.model, worker.critic.model):
        model.double()
    torch.nn.init.normal_(worker.critic.policy.part("head").weight, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return worker


Example = tuple[PolicyRow, ValueRow | None]
"""A group as updates of the policy and, where there is one, of the critic eat it."""


def examples_of(worker: Worker, method: ResolvedAlgorithm, groups: Sequence[Group]) -> list[Example]:
    """The groups of a step as its later updates see them: the policy has moved away from the old one."""
    batch, _ = compute_advantages(LocalWorkers(worker), groups, method, 2, Costs(0.01, 2.0))
    generator = torch.Generator().manual_seed(1)
    assert [*batch.policy_rows] == [*range(len(groups))]

    def moved(vector: torch.Tensor | None) -> torch.Tensor:
        assert vector is not None
        return vector.double() + 0.3 * torch.randn(len(vector), generator=generator, dtype=torch.float64)

    examples: list[Example] = []
    for n, row in batch.policy_rows.items():
        old, ref, engine = moved(row.old), moved(row.ref), moved(row.old)
        value = None
        if n in batch.value_rows:
            value = replace(batch.value_rows[n], value=moved(batch.value_rows[n].value))
        masked = torch.rand(row.group.trained_tokens, generator=generator) > 0.7
        examples.append((PolicyRow(row.group, engine, row.advantage, old, ref, masked), value))
    return examples


def singles(example: Example) -> list[Example]:
    """A group of its own for every answer."""
    row, value = example
    parts: list[Example] = []
    first = 0
    for number, length in enumerate(row.group.lengths):
        own = slice(number, number + 1), slice(first, first + length)
        parts.append((row.part(*own), None if value is None else value.part(*own)))
        first += length
    return parts


def gradient(
    worker: Worker, method: ResolvedAlgorithm, examples: Sequence[Example], totals: Totals, budget: int
) -> torch.Tensor:
    """The gradient of the policy, and of the critic where there is one, as one vector."""
    worker.token_budget = budget
    worker.policy_gradients([row for row, _ in examples], method.loss, totals)
    models = [worker.policy.model]
    if method.critic is not None:
        assert worker.critic is not None
        worker.critic_gradients([value for _, value in examples if value is not None], totals)
        models.append(worker.critic.model)
    found = []
    for model in models:
        found += [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
    return torch.cat(found)


def totals_of(examples: Sequence[Example]) -> Totals:
    groups = [row.group for row, _ in examples]
    tokens = sum(group.trained_tokens for group in groups)
    return Totals(tokens, sum(len(group.answers) for group in groups), len(groups))


@pytest.fixture(scope="module")
def worker(tiny_folder):
    return worker_of(tiny_folder)


@pytest.fixture(scope="module")
def cases(worker, tmp_path_factory):
    """The groups of a step by algorithm."""
    encoder = Encoder(worker.policy.tokenizer, worker.policy.family, 1, 128)
    data = make_data(tmp_path_factory.mktemp("shapes"))
    generator = torch.Generator().manual_seed(0)
    groups = []
    for number, (lengths, rewards) in enumerate(zip(LENGTHS, REWARDS, strict=True)):
        task = open_tasks(data / "train.parquet")[number]
        ids = [tuple(torch.randint(300, (length,), generator=generator).tolist()) for length in lengths]
        answers = tuple(Answer.sampled(own, (-1.0,) * len(own), "", "stop", 0) for own in ids)
        groups.append(Group(task, encoder(task), answers, tuple(map(Score, rewards)), Score(0.25)))
    return {name: examples_of(worker, method_of(name), groups) for name in ALGORITHMS}


@pytest.fixture(scope="module")
def by_ranks(cases, tiny_folder, tmp_path_factory):
    """The gradients by algorithm, summed over two processes that have half of the groups each."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(cases, folder / "cases.pt")
    start_ranks(_rank, RANKS, folder, tiny_folder)
    return torch.load(folder / "gradients.pt")


def _rank(rank: int, folder: Path, model: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS)
    worker, found = worker_of(model), {}
    for name, examples in torch.load(folder / "cases.pt", weights_only=False).items():
        found[name] = gradient(worker, method_of(name), examples[rank::RANKS], totals_of(examples), 4096)
        dist.all_reduce(found[name])
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    dist.destroy_process_group()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 1e-3
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_packing_order_and_micro_batches_change_no_gradient(worker, cases, name):
    method, examples = method_of(name), cases[name]
    totals = totals_of(examples)
    whole = gradient(worker, method, examples, totals, 4096)
    assert_same(gradient(worker, method, examples, totals, 50), whole)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2)).tolist()
    alone = [single for example in examples for single in singles(example)]
    assert_same(gradient(worker, method, [alone[i] for i in order], totals, 150), whole)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradients_of_two_ranks_add_up_to_that_of_one(worker, cases, by_ranks, name):
    whole = gradient(worker, method_of(name), cases[name], totals_of(cases[name]), 4096)
    assert_same(by_ranks[name], whole)
