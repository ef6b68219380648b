"""What a step learns from its groups: the passes that are needed, rewards and advantages, then the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Concatenate

import torch
from torch import Tensor

from foveate.algorithms.kl import kl
from foveate.algorithms.metrics import reduce_metrics
from foveate.algorithms.values import gae
from foveate.cluster.base import P, WorkerGroup, scatter, scatter_gather
from foveate.parallel.balance import Costs
from foveate.parallel.packing import PackedGroup
from foveate.records import Group, Totals, sum_by_sample
from foveate.train.algorithm import ResolvedAlgorithm
from foveate.train.targets import TrainGroup
from foveate.train.worker import Worker


def compute_advantages(
    workers: WorkerGroup[Worker], groups: Sequence[Group], method: ResolvedAlgorithm, updates: int, costs: Costs
) -> tuple[list[TrainGroup], dict[str, float]]:
    """The groups of a step with their advantages and the log-probs that `updates` updates on them need, and metrics.

    With one update on fresh weights the old policy is the current one, and its pass is left out unless something else
    asks for it. Groups whose advantages are all 0 add nothing to the gradient and are not computed, unless the loss has
    terms beside the advantage. costs: by which work is dealt out to the ranks.
    """
    examples = [_example(group) for group in groups]
    old = updates > 1 or method.needs_old
    if method.needs_token_values:
        examples = _with_passes(workers, examples, method, costs, old=old)
    examples, metrics = _with_advantages(groups, examples, method)
    if not method.needs_token_values:
        kept = [i for i, example in enumerate(examples) if contributes_gradient(method, example)]
        for i, example in zip(
            kept, _with_passes(workers, [examples[i] for i in kept], method, costs, old=old), strict=True
        ):
            examples[i] = example
    without = sum(not example.has_advantage for example in examples)
    return examples, {**metrics, "rollout/groups_without_advantage": float(without)}


def update(
    workers: WorkerGroup[Worker],
    examples: Sequence[TrainGroup],
    method: ResolvedAlgorithm,
    updates: int,
    rates: Mapping[str, float],
    costs: Costs,
    *,
    epochs: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Learn in `updates` optimizer steps, each on its share of the prompts, in order; all of it `epochs` times.

    Groups that were left out by `compute_advantages` still count in the denominators, so that leaving them out changes
    no result. An update whose groups are all like that is not taken. rates: the learning rates "optim/lr", of the
    policy, and "critic/lr" where there is a critic; a policy of rate 0 is left alone. seed: of a random choice of
    tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    share = len(examples) // updates
    records: list[dict[str, float]] = []
    critic_records: list[dict[str, float]] = []
    tokens = 0
    for first in [*range(0, len(examples), share)] * epochs:
        members = examples[first : first + share]
        chosen = [example for example in members if contributes_gradient(method, example)]
        if not chosen:
            continue
        tokens += sum(example.packed.tokens for example in chosen)
        totals = _totals(members)
        if method.critic is not None:
            critic_records.append(_learn(workers, Worker.update_critic, chosen, costs, totals, rates["critic/lr"]))
        if rates["optim/lr"]:
            chosen = _marked(workers, chosen, method, generator, costs, is_fresh=not records)
            records.append(_learn(workers, Worker.update_policy, chosen, costs, method.loss, totals, rates["optim/lr"]))
    every = [{name: (value, 1.0) for name, value in record.items()} for record in records + critic_records]
    return {
        **reduce_metrics(every),
        "optim/updates": float(len(records)),
        "optim/update_skipped": sum(record["optim/update_skipped"] for record in records),
        "optim/tokens": float(tokens),
    }


def contributes_gradient(method: ResolvedAlgorithm, example: TrainGroup) -> bool:
    """Whether a group can move the weights."""
    return method.keeps_equal_groups or example.has_advantage


def _example(group: Group) -> TrainGroup:
    packed = PackedGroup(group.prompt, tuple(answer.token_ids for answer in group.answers))
    engine = torch.tensor([logp for answer in group.answers for logp in answer.logprobs])
    return TrainGroup(packed, engine)


def _with_passes(
    workers: WorkerGroup[Worker], examples: Sequence[TrainGroup], method: ResolvedAlgorithm, costs: Costs, *, old: bool
) -> list[TrainGroup]:
    """The groups with the log-probs of the old and the reference policy and with values, each where it is needed."""
    packed_groups = [example.packed for example in examples]
    nothing = [None] * len(packed_groups)
    estimates = [*map(costs, packed_groups)]
    old_logprobs = scatter_gather(workers, Worker.logprobs, packed_groups, estimates) if old else nothing
    ref_logprobs = (
        scatter_gather(workers, Worker.logprobs, packed_groups, estimates, True) if method.needs_reference else nothing
    )
    values = scatter_gather(workers, Worker.values, packed_groups, estimates) if method.critic is not None else nothing
    return [
        replace(example, old=old_M, ref=ref_M, value=value_M)
        for example, old_M, ref_M, value_M in zip(examples, old_logprobs, ref_logprobs, values, strict=True)
    ]


def _with_advantages(
    groups: Sequence[Group], examples: Sequence[TrainGroup], method: ResolvedAlgorithm
) -> tuple[list[TrainGroup], dict[str, float]]:
    length_S = torch.tensor([len(answer) for example in examples for answer in example.packed.answers])
    sample_M = torch.arange(len(length_S)).repeat_interleave(length_S)
    reward_M, metrics = _token_rewards(groups, examples, method, length_S, sample_M)
    available = {
        "rewards_S": sum_by_sample(reward_M, sample_M, len(length_S)),
        "group_S": torch.tensor([i for i, group in enumerate(groups) for _ in group.answers]),
        "length_S": length_S,
        "reward_M": reward_M,
        "sample_M": sample_M,
    }
    if method.needs_baseline:
        available["baseline_S"] = torch.tensor([g.baseline.value for g in groups if g.baseline for _ in g.answers])
    sizes = [example.packed.answer_tokens for example in examples]
    returns: Sequence[Tensor | None] = [None] * len(examples)
    if method.critic is not None:
        available["value_M"] = value_M = torch.cat([example.value for example in examples if example.value is not None])
        lam = method.critic.lam
        gain_M = gae(reward_M, value_M, sample_M, gamma=method.gamma, lam=lam, normalise="none")
        returns = (gain_M + value_M).split(sizes)
    advantage = method.advantage(*(available[name] for name in method.inputs))
    advantage_M = advantage if "sample_M" in method.inputs else advantage.repeat_interleave(length_S)
    if method.advantage_clip is not None:
        advantage_M = advantage_M.clamp(-method.advantage_clip, method.advantage_clip)
    parts = zip(examples, advantage_M.split(sizes), returns, strict=True)
    return [replace(example, advantage=part_M, returns=return_M) for example, part_M, return_M in parts], metrics


def _token_rewards(
    groups: Sequence[Group],
    examples: Sequence[TrainGroup],
    method: ResolvedAlgorithm,
    length_S: Tensor,
    sample_M: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """The reward of each token: the score on the last one of its answer, less the KL to the reference of each."""
    reward_M = torch.zeros(len(sample_M))
    reward_M[length_S.cumsum(0) - 1] = torch.tensor([score.value for group in groups for score in group.scores])
    penalty = method.reward_kl
    if penalty is None:
        return reward_M, {}
    old_M = torch.cat([example.old for example in examples if example.old is not None])
    ref_M = torch.cat([example.ref for example in examples if example.ref is not None])
    kl_M = kl(old_M, ref_M, penalty.estimator)
    reward_M -= penalty.coefficient * kl_M
    divergence = kl_M.sum().item() / len(length_S)
    metrics = {"reward/kl": divergence, "reward/kl_coefficient": penalty.coefficient}
    penalty.observe(divergence, len(length_S))
    return reward_M, metrics


def _marked(
    workers: WorkerGroup[Worker],
    examples: list[TrainGroup],
    method: ResolvedAlgorithm,
    generator: torch.Generator,
    costs: Costs,
    *,
    is_fresh: bool,
) -> list[TrainGroup]:
    """The groups of one update with the tokens marked that its loss treats apart, under the weights of this moment:
    those of the old policy in the first update, later on those of another pass."""
    if method.token_mask is None:
        return examples
    old = [example.old for example in examples if example.old is not None]
    packed_groups = [example.packed for example in examples]
    now = old if is_fresh else scatter_gather(workers, Worker.logprobs, packed_groups, [*map(costs, packed_groups)])
    advantage_M = torch.cat([example.advantage for example in examples if example.advantage is not None])
    masked_M = method.token_mask(torch.cat(now), torch.cat(old), advantage_M, generator)
    masks = masked_M.split([example.packed.answer_tokens for example in examples])
    return [replace(example, masked=masked) for example, masked in zip(examples, masks, strict=True)]


def _learn(
    workers: WorkerGroup[Worker],
    method: Callable[Concatenate[Worker, Sequence[TrainGroup], P], dict[str, float]],
    examples: Sequence[TrainGroup],
    costs: Costs,
    *rest: P.args,
    **keywords: P.kwargs,
) -> dict[str, float]:
    """One optimizer step of all ranks together; its metrics, which are those of all on each."""
    return next(scatter(workers, method, examples, [costs(example.packed) for example in examples], *rest, **keywords))[
        1
    ]


def _totals(examples: Sequence[TrainGroup]) -> Totals:
    return Totals(
        tokens=sum(example.packed.answer_tokens for example in examples),
        samples=sum(len(example.packed.answers) for example in examples),
        groups=len(examples),
    )
