"""A step learns from its groups: the passes that are needed, rewards and advantages, then the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Concatenate

import torch
from torch import Tensor

from foveate.algorithms.aggregate import sum_by_sample
from foveate.algorithms.distillation import distilled_advantage
from foveate.algorithms.kl import kl
from foveate.algorithms.metrics import reduce_metrics
from foveate.algorithms.targets import Totals
from foveate.algorithms.values import gae
from foveate.cluster.base import WorkerGroup, scatter, scatter_gather
from foveate.cluster.local import P
from foveate.parallel.balance import Costs
from foveate.parallel.packing import engine_logprobs
from foveate.records import Answer, Group, PackedGroup, Score
from foveate.train.algorithm import ResolvedAlgorithm
from foveate.train.graded import ComparedGroup, compared_groups, is_truncated
from foveate.train.targets import MISMATCH, PolicyRow, Row, ValueRow
from foveate.train.worker import Worker


@dataclass(frozen=True, slots=True)
class Passes:
    """Vectors (M,) over the trained tokens of each of some groups: log-probs under the weights before the step, under
    the frozen reference and under a teacher, and values of the critic; None for a pass that the algorithm does
    without."""

    old: Sequence[Tensor] | None
    ref: Sequence[Tensor] | None
    value: Sequence[Tensor] | None
    teacher: Sequence[Tensor] | None = None


_NO_PASSES = Passes(None, None, None)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The groups that a step trains on, with the answers that count in its loss; and the rows that the updates eat, by
    the index of their group: of the groups that contribute to the gradient alone. There are rows for values where there
    is a critic.

    answer_advantages: for each answer of each group that was sampled, the mean advantage of its tokens; None for one
    that is not trained on.
    """

    groups: tuple[PackedGroup, ...]
    policy_rows: Mapping[int, PolicyRow]
    value_rows: Mapping[int, ValueRow]
    answer_advantages: list[list[float | None]]


def compute_advantages(
    workers: WorkerGroup[Worker], groups: Sequence[Group], algorithm: ResolvedAlgorithm, updates: int, cost_of: Costs
) -> tuple[TrainBatch, dict[str, float]]:
    """The groups of a step with their advantages and the log-probs that `updates` updates on them need, and metrics.

    With one update on fresh weights the old policy is the current one, and its pass is left out unless something else
    asks for it; where the log-probs of the engine are the old ones (`old_logprobs`), there is none. Groups whose
    advantages are all 0 add nothing to the gradient and are not computed, unless the loss has terms beside the
    advantage. cost_of: what balances the ranks.

    Answers that are not graded are left out of everything, and so are groups with too few graded ones. With
    `mask_truncated` truncated answers are compared, and left out of the loss and its denominators.
    """
    compared = compared_groups(groups, least=algorithm.least_answers)
    whole = [PackedGroup(one.group.prompt, one.group.answers) for one in compared]
    by_engine = algorithm.old_logprobs == "engine"
    old, passes = by_engine or updates > 1 or algorithm.needs_old, _NO_PASSES
    if algorithm.needs_token_values:
        passes = _run_passes(workers, whole, algorithm, cost_of, [one.group.task.source for one in compared], old=old)
    advantages, returns, metrics = _advantages([one.group for one in compared], whole, algorithm, passes)
    metrics["rollout/groups_without_advantage"] = float(sum(not own.any() for own in advantages))
    metrics["rollout/groups_not_graded"] = float(len(groups) - len(compared))

    kept = [_trained_answers(group, algorithm) for group in whole]
    trained = [i for i, own in enumerate(kept) if own]

    def pick(vectors: Sequence[Tensor] | None) -> list[Tensor] | None:
        return None if vectors is None else [_of_answers(vectors[i], whole[i], kept[i]) for i in trained]

    packed = [_only(whole[i], kept[i]) for i in trained]
    own_advantages, own_returns = pick(advantages) or [], pick(returns)
    computed = [i for i, own in enumerate(own_advantages) if algorithm.contributes_gradient(own)]
    if algorithm.needs_token_values:
        passes = Passes(*(_at(pick(own), computed) for own in (passes.old, passes.ref, passes.value)))
    else:
        passes = _run_passes(workers, [packed[i] for i in computed], algorithm, cost_of, (), old=old)
    policy_rows: dict[int, PolicyRow] = {}
    value_rows: dict[int, ValueRow] = {}
    for number, i in enumerate(computed):
        old_M, ref_M = (None if own is None else own[number] for own in (passes.old, passes.ref))
        teacher = algorithm.teacher_in_loss(compared[trained[i]].group.task.source)
        engine_M = engine_logprobs(packed[i])
        policy_rows[i] = PolicyRow(packed[i], engine_M, own_advantages[i], old_M, ref_M, None, teacher, by_engine)
        if passes.value is not None and own_returns is not None:
            value_rows[i] = ValueRow(packed[i], passes.value[number], own_returns[i])
    told = _answer_advantages(groups, compared, whole, kept, advantages)
    return TrainBatch(tuple(packed), policy_rows, value_rows, told), metrics


def update(
    workers: WorkerGroup[Worker],
    batch: TrainBatch,
    algorithm: ResolvedAlgorithm,
    updates: int,
    rates: Mapping[str, float],
    cost_of: Costs,
    *,
    epochs: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Train in `updates` optimizer steps, each on its share of the prompts, in order; all of it `epochs` times.

    Groups that contribute no gradient still count in the denominators, so that leaving them out changes no result. An
    update whose groups are all like that is not taken. rates: the learning rates "optim/lr", of the policy, and
    "critic/lr" where there is a critic; a policy of rate 0 is left alone. seed: of a random choice of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = [len(batch.groups) * number // updates for number in range(updates + 1)]
    records: list[dict[str, float]] = []
    critic_records: list[dict[str, float]] = []
    tokens = 0
    for members in [range(*between) for between in pairwise(ends)] * epochs:
        chosen = [i for i in members if i in batch.policy_rows]
        if not chosen:
            continue
        costs = [cost_of(batch.groups[i]) for i in chosen]
        tokens += sum(batch.groups[i].tokens for i in chosen)
        totals = _totals([batch.groups[i] for i in members])
        if algorithm.critic is not None:
            values = [batch.value_rows[i] for i in chosen]
            critic_records.append(_step(workers, Worker.update_critic, values, costs, totals, rates["critic/lr"]))
        if rates["optim/lr"]:
            rows = [batch.policy_rows[i] for i in chosen]
            rows = _masked(workers, rows, algorithm, generator, costs, is_fresh=not records)
            record = _step(workers, Worker.update_policy, rows, costs, algorithm.loss, totals, rates["optim/lr"])
            if records and algorithm.old_logprobs == "engine":  # the weights are not those that were sampled from
                record = {name: value for name, value in record.items() if name not in MISMATCH}
            records.append(record)
    every = [{name: (value, 1.0) for name, value in record.items()} for record in records + critic_records]
    return {
        **reduce_metrics(every),
        "optim/updates": float(len(records)),
        "optim/update_skipped": sum(record["optim/update_skipped"] for record in records),
        "optim/tokens": float(tokens),
    }


# ------------------------------------------------------------------------------------------------------------- passes


def _run_passes(
    workers: WorkerGroup[Worker],
    groups: Sequence[PackedGroup],
    algorithm: ResolvedAlgorithm,
    cost_of: Costs,
    sources: Sequence[str],
    *,
    old: bool,
) -> Passes:
    """The passes that the algorithm needs over some groups; `sources`: the data_source of each, for a teacher."""
    costs = [*map(cost_of, groups)]
    teacher_M = None
    if algorithm.teacher is not None and algorithm.has_teacher_advantage:
        asked = [(group, algorithm.teacher.of(source)) for group, source in zip(groups, sources, strict=True)]
        teacher_M = scatter_gather(workers, Worker.teacher_logprobs, asked, costs)
    old_M, ref_M = _policy_passes(workers, groups, algorithm, costs, old=old)
    value_M = scatter_gather(workers, Worker.values, groups, costs) if algorithm.critic is not None else None
    return Passes(old_M, ref_M, value_M, teacher_M)


def _policy_passes(
    workers: WorkerGroup[Worker],
    groups: Sequence[PackedGroup],
    algorithm: ResolvedAlgorithm,
    costs: Sequence[float],
    *,
    old: bool,
) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
    """Log-probs under the old policy and under the reference, where they are needed."""
    by_trainer, reference = old and algorithm.old_logprobs == "trainer", algorithm.needs_reference
    if by_trainer and reference:
        both = scatter_gather(workers, Worker.both_logprobs, groups, costs)
        return [old_M for old_M, _ in both], [ref_M for _, ref_M in both]
    if by_trainer:
        old_M = scatter_gather(workers, Worker.logprobs, groups, costs)
    else:
        old_M = [*map(engine_logprobs, groups)] if old else None
    return old_M, scatter_gather(workers, Worker.logprobs, groups, costs, True) if reference else None


# ------------------------------------------------------------------------------------------------ answers left out


def _trained_answers(group: PackedGroup, algorithm: ResolvedAlgorithm) -> list[int]:
    """The places of the answers that count in the loss."""
    return [
        place for place, answer in enumerate(group.answers) if not (algorithm.mask_truncated and is_truncated(answer))
    ]


def _only(group: PackedGroup, kept: Sequence[int]) -> PackedGroup:
    if len(kept) == len(group.answers):
        return group
    return PackedGroup(group.prompt, tuple(group.answers[place] for place in kept))


def _of_answers(vector_M: Tensor, group: PackedGroup, kept: Sequence[int]) -> Tensor:
    """The part of a vector over the trained tokens of a group that belongs to some of its answers."""
    if len(kept) == len(group.answers):
        return vector_M
    parts = vector_M.split(group.lengths)
    return torch.cat([parts[place] for place in kept])


def _at(vectors: Sequence[Tensor] | None, places: Sequence[int]) -> Sequence[Tensor] | None:
    return None if vectors is None else [vectors[place] for place in places]


def _answer_advantages(
    groups: Sequence[Group],
    compared: Sequence[ComparedGroup],
    whole: Sequence[PackedGroup],
    kept: Sequence[Sequence[int]],
    advantages: Sequence[Tensor],
) -> list[list[float | None]]:
    """As `TrainBatch` holds them."""
    found: list[list[float | None]] = [[None] * len(group.answers) for group in groups]
    for one, group, places, advantage_M in zip(compared, whole, kept, advantages, strict=True):
        parts = advantage_M.split(group.lengths)
        for place in places:
            found[one.place][one.answers[place]] = parts[place].double().mean().item()
    return found


# --------------------------------------------------------------------------------------------- rewards and advantages


def _advantages(
    groups: Sequence[Group], packed: Sequence[PackedGroup], algorithm: ResolvedAlgorithm, passes: Passes
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, dict[str, float]]:
    """Advantages and the critic's returns, a vector (M,) for each group, and metrics."""
    if not groups:
        return (), None, {}
    length_S = torch.tensor([length for group in packed for length in group.lengths])
    sample_M = torch.arange(len(length_S)).repeat_interleave(length_S)
    reward_M, metrics = _token_rewards(groups, algorithm, passes, length_S)
    available = {
        "rewards_S": sum_by_sample(reward_M, sample_M, len(length_S)),
        "group_S": torch.tensor([i for i, group in enumerate(groups) for _ in group.answers]),
        "source_S": _sources(groups),
        "length_S": length_S,
        "reward_M": reward_M,
        "sample_M": sample_M,
    }
    if algorithm.needs_baseline:
        available["baseline_S"] = torch.tensor([_reward(g.baseline) for g in groups for _ in g.answers])
    sizes = [group.trained_tokens for group in packed]
    returns = None
    if algorithm.critic is not None and passes.value is not None:
        available["value_M"] = value_M = torch.cat([*passes.value])
        lam = algorithm.critic.lam
        gain_M = gae(reward_M, value_M, sample_M, gamma=algorithm.gamma, lam=lam, normalise="none")
        returns = (gain_M + value_M).split(sizes)
    advantage = algorithm.advantage(*(available[name] for name in algorithm.inputs))
    advantage_M = advantage if "sample_M" in algorithm.inputs else advantage.repeat_interleave(length_S)
    if algorithm.teacher is not None and passes.old is not None and passes.teacher is not None:
        old_M, teacher_M = torch.cat([*passes.old]), torch.cat([*passes.teacher])
        taught = distilled_advantage(advantage_M, old_M, teacher_M, algorithm.teacher.coefficient)
        advantage_M, metrics["reward/teacher_kl"] = taught
    if algorithm.advantage_clip is not None:
        advantage_M = advantage_M.clamp(-algorithm.advantage_clip, algorithm.advantage_clip)
    return advantage_M.split(sizes), returns, metrics


def _sources(groups: Sequence[Group]) -> Tensor:
    """The source of each answer's task, by number: int64 (S,)."""
    numbers = {name: number for number, name in enumerate(sorted({group.task.source for group in groups}))}
    return torch.tensor([numbers[group.task.source] for group in groups for _ in group.answers])


def _token_rewards(
    groups: Sequence[Group], algorithm: ResolvedAlgorithm, passes: Passes, length_S: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The reward of each token: the score on the last one of its answer, but what the environment gave for a turn on
    the last one of the turn where the advantage is one of tokens; less the KL to the reference of each."""
    answers = [pair for group in groups for pair in zip(group.answers, group.scores, strict=True)]
    by_turn = "reward_M" in algorithm.inputs
    reward_M = torch.cat([_turn_rewards(answer, _reward(score), by_turn=by_turn) for answer, score in answers])
    penalty = algorithm.reward_kl
    if penalty is None or passes.old is None or passes.ref is None:
        return reward_M, {}
    kl_M = kl(torch.cat([*passes.old]), torch.cat([*passes.ref]), penalty.estimator)
    reward_M -= penalty.coefficient * kl_M
    divergence = kl_M.sum().item() / len(length_S)
    metrics = {"reward/kl": divergence, "reward/kl_coefficient": penalty.coefficient}
    penalty.observe(divergence, len(length_S))
    return reward_M, metrics


def _turn_rewards(answer: Answer, reward: float, *, by_turn: bool) -> Tensor:
    """The reward of an answer over its trained tokens."""
    turns = [segment for segment in answer.segments if segment.trained]
    ends = torch.tensor([len(turn) for turn in turns]).cumsum(0) - 1
    reward_M = torch.zeros(answer.trained_tokens)
    own = [(by_turn and turn.reward) or 0.0 for turn in turns]
    reward_M[ends] = torch.tensor(own)
    reward_M[-1] += reward - sum(own)
    return reward_M


def _reward(score: Score | None) -> float:
    """The reward of an answer. Those without one are left out before."""
    assert score is not None
    assert score.value is not None
    return score.value


# ------------------------------------------------------------------------------------------------------------ updates


def _masked(
    workers: WorkerGroup[Worker],
    rows: list[PolicyRow],
    algorithm: ResolvedAlgorithm,
    generator: torch.Generator,
    costs: Sequence[float],
    *,
    is_fresh: bool,
) -> list[PolicyRow]:
    """The rows of one update with the tokens that its loss treats apart, under the weights of this moment: those of the
    old policy in the first update, unless the engine measured them, else those of another pass."""
    old = [row.old for row in rows if row.old is not None]
    if algorithm.token_mask is None or not old:
        return rows
    is_known = is_fresh and algorithm.old_logprobs == "trainer"
    now = old if is_known else scatter_gather(workers, Worker.logprobs, [row.group for row in rows], costs)
    advantage_M = torch.cat([row.advantage for row in rows])
    masked_M = algorithm.token_mask(torch.cat(now), torch.cat(old), advantage_M, generator)
    masks = masked_M.split([row.group.trained_tokens for row in rows])
    return [replace(row, masked=mask) for row, mask in zip(rows, masks, strict=True)]


def _step(
    workers: WorkerGroup[Worker],
    method: Callable[Concatenate[Worker, Sequence[Row], P], dict[str, float]],
    rows: Sequence[Row],
    costs: Sequence[float],
    *rest: P.args,
    **keywords: P.kwargs,
) -> dict[str, float]:
    """One optimizer step of all ranks together; its metrics, which are those of all on each."""
    return next(scatter(workers, method, rows, costs, *rest, **keywords))[1]


def _totals(groups: Sequence[PackedGroup]) -> Totals:
    return Totals(
        tokens=sum(group.trained_tokens for group in groups),
        samples=sum(len(group.answers) for group in groups),
        groups=len(groups),
    )
