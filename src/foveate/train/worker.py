"""One rank of training: a policy with its optimizer, and what the pages ask of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.algorithms.metrics import Metrics, reduce_metrics, to_metrics
from foveate.algorithms.supervised import sft_weights
from foveate.algorithms.targets import Totals
from foveate.cluster.rank_engine import RankEngine
from foveate.config.algorithm import CriticSettings, TeacherSettings
from foveate.config.cluster import ClusterSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.files import set_disk_wait, with_room
from foveate.models.adapters import trained_tensors, write_trained
from foveate.models.features import with_kept_features
from foveate.models.forward import evaluating
from foveate.models.logprobs import LOGP_ENTROPY
from foveate.models.lora import adapters_weighed, begin_adapters, frozen_copy, merged_state, train_parts, weighs_tokens
from foveate.models.matmul import use_threads
from foveate.models.offload import kept_activations
from foveate.models.policy import DTYPES, Policy, load_policy
from foveate.models.routing import Routing, follow_routers
from foveate.models.sharded import allocate, load_sharded, meta_policy
from foveate.parallel.fsdp import LogProbs, Root, Values, compile_blocks, full_tensor, shard
from foveate.parallel.packing import empty, micro_batches, pack, pad_with_dummy_image
from foveate.parallel.ranks import Ranks
from foveate.parallel.ulysses import check_heads
from foveate.records import Batch, PackedGroup
from foveate.rollout.seeds import seed_of
from foveate.train.checkpoint import Saving, Trained, load_checkpoint, save_checkpoint, tensors_of
from foveate.train.critic import Critic
from foveate.train.optim import LossScale, apply_gradients, build_optimizer, forget_unseen, optimizer_spec
from foveate.train.reference import PreferenceLoss, TrainPair, pair_targets
from foveate.train.targets import PolicyLoss, PolicyRow, ValueRow, mismatch, policy_targets, split_group
from foveate.train.teacher import Teachers

logger = logging.getLogger(__name__)


class Worker:
    """Holds the model of one rank, and its `engine`. Methods take what they need and keep nothing but weights and
    optimizer state."""

    _root: ClassVar[type[LogProbs]] = LogProbs

    def __init__(
        self,
        model: ModelSettings,
        optim: OptimSettings,
        token_budget: int,
        *,
        temperature: float = 1.0,
        reference: bool = False,
        critic: CriticSettings | None = None,
        teacher: TeacherSettings | None = None,
        cluster: ClusterSettings | None = None,
        seed: int = 0,
        threads: int | None = None,
        disk_wait: float = 0.0,
        router_replay: bool = False,
    ) -> None:
        """`seed`: of what is drawn in updates (the adapters' dropout); `threads`: of the CPU, None: torch's choice;
        `disk_wait`: seconds that this process waits for room on a full disk; `router_replay`: the policy computes with
        the experts that the sampler chose."""
        use_threads(threads)
        set_disk_wait(disk_wait)
        self.ranks = Ranks.of(cluster) if cluster is not None and cluster.ranks > 1 else None
        self.device = torch.device("cpu" if cluster is None else cluster.kind)
        self._autocast = DTYPES[cluster.dtype] if cluster is not None and cluster.dtype else None
        self._compiles, self._lora, self._kept = model.compile, model.lora, kept_activations(model, self.device)
        load = partial(load_policy, device=str(self.device)) if self.ranks is None else meta_policy
        self._read = partial(load, attention=model.attention, dtype=model.dtype)
        again = partial(self._read, model.path, quantization=model.quantization)
        self.policy = again()
        self._balance = model.router_aux_loss_coef
        asked = {"algorithm.router_replay": router_replay, "model.router_aux_loss_coef": self._balance}
        for name, value in asked.items():
            if value:
                follow_routers(self.policy.model, name)
        train_parts(self.policy, model.trainable, model.lora)
        self.policy = with_kept_features(self.policy, model.feature_cache)
        if model.gradient_checkpointing:
            self.policy.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if model.gradient_checkpointing or model.has_dropout:
            self.policy.model.train()  # for checkpointing and the adapters' dropout; the models have no dropout
        self._dummy_image = self.policy.family.dummy_image if self.ranks is not None else None
        self.reference = frozen_copy(self.policy, again, model.lora) if reference else None
        self.critic = Critic(self.policy, critic, optim, partial(self._ready, Values)) if critic is not None else None
        self._logprobs = self._ready(self._root, self.policy)
        self._reference_logprobs = self._logprobs if self.reference is self.policy else None
        if self.reference is not None and self._reference_logprobs is None:
            self._reference_logprobs = self._ready(LogProbs, self.reference)
        self.teachers = None
        if teacher is not None:
            read = partial(self._read, dtype=teacher.dtype or model.dtype)
            self.teachers = Teachers(teacher, read, self._ready, self.policy)
        self.optimizer = build_optimizer(self.policy.model, optim)
        self._bound_to_ranks = "" if optimizer_spec(optim).portable else optim.name
        self.max_grad_norm = optim.max_grad_norm
        self.token_budget = token_budget * (cluster.sequence_parallel if cluster is not None else 1)
        self.temperature = temperature
        self.scale = LossScale() if cluster is not None and cluster.dtype == "float16" else None
        self._saving = Saving()
        self._seed = seed if model.has_dropout else None
        self.engine = RankEngine(self.policy, model, self.ranks)

    def _ready(self, kind: type[Root], policy: Policy) -> Root:
        """A module that computes log-probs or values of a policy. With several ranks its weights are sharded over them,
        and each reads its share."""
        if self._compiles:
            compile_blocks(policy.model, sharded=self.ranks is not None)
        if self.ranks is None:
            return kind(policy, autocast=self._autocast)
        cluster = self.ranks.cluster
        check_heads(policy, cluster.sequence_parallel)
        root = shard(kind(policy, self.ranks.sequence), self.ranks.mesh, cluster)
        allocate(policy, root, "cpu" if cluster.offload else cluster.kind, cluster.kind)
        load_sharded(policy, without=policy.tensors("head") if kind is Values else ())
        begin_adapters(policy, self._lora if policy is self.policy else None)
        return root

    # ------------------------------------------------------------------------------------------------- log-probs

    @torch.no_grad()
    def logprobs(self, groups: Sequence[PackedGroup], reference: bool = False) -> list[Tensor]:
        """Log-probs of all trained tokens, one vector per group, under the policy or the frozen reference."""
        policy = self.reference if reference else self.policy
        compute = self._reference_logprobs if reference else self._logprobs
        assert policy is not None
        assert compute is not None
        as_it_was = adapters_weighed(policy.model, 0) if reference and policy is self.policy else nullcontext()
        found: list[Tensor] = []
        with evaluating(policy.model), as_it_was:
            for batch, members in self._batches(groups, replays=not reference):
                (logp_M,) = compute(batch, self.temperature, ("logp",))
                found.extend(logp_M.cpu().split([groups[i].trained_tokens for i in members]))
        return found

    @torch.no_grad()
    def both_logprobs(self, groups: Sequence[PackedGroup]) -> list[Tensor]:
        """Log-probs (2, M) of all trained tokens of each group, under the policy and the frozen reference: in one pass
        that sees each image once, where adapters can be weighed token by token and the group fits a row twice."""
        policy, places = self.policy, range(len(groups))
        is_split = self.ranks is not None and self.ranks.cluster.sequence_parallel > 1
        two = policy is not self.reference or is_split or self._compiles or not weighs_tokens(policy)
        alone = [i for i in places if two or 2 * groups[i].tokens > self.token_budget]
        joint = sorted({*places} - {*alone})
        passes = (self.logprobs([groups[i] for i in alone], reference) for reference in (False, True))
        found = dict(zip(alone, map(torch.stack, zip(*passes, strict=True)), strict=True))
        with evaluating(policy.model):
            for batch, members in self._batches([groups[i] for i in joint], twice=True):
                is_first = torch.arange(n := len(batch.token_ids_T), device=self.device)[:, None] < n // 2
                with adapters_weighed(policy.model, is_first.float()):
                    (logp_M,) = self._logprobs(batch, self.temperature, ("logp",))
                own = [joint[i] for i in members]
                both = logp_M.cpu().view(2, -1 if members else 0).split([groups[i].trained_tokens for i in own], 1)
                found |= zip(own, both, strict=True)
        return [found[i] for i in places]

    @torch.no_grad()
    def teacher_logprobs(self, asked: Sequence[tuple[PackedGroup, str]]) -> list[Tensor]:
        """Log-probs of all trained tokens of groups under the teacher that stands with each, one vector per group."""
        assert self.teachers is not None
        found: dict[int, Tensor] = {}
        for name in self.teachers.names:
            own = [i for i, (_, teacher) in enumerate(asked) if teacher == name]
            if name in self.teachers.servers:
                found |= zip(own, self.teachers.servers[name].logprobs([asked[i][0] for i in own]), strict=True)
                continue
            for batch, members in self._batches([asked[i][0] for i in own]):
                logp_M = self.teachers.logprobs(name, batch, self.temperature).cpu()
                sizes = [asked[own[i]][0].trained_tokens for i in members]
                found |= zip((own[i] for i in members), logp_M.split(sizes), strict=True)
        return [found[i] for i in range(len(asked))]

    @torch.no_grad()
    def values(self, groups: Sequence[PackedGroup]) -> list[Tensor]:
        """The values that the critic expects before each trained token, one vector per group."""
        assert self.critic is not None
        found: list[Tensor] = []
        with evaluating(self.critic.model):
            for batch, members in self._batches(groups):
                value_M = self.critic.values(batch).cpu()
                found.extend(value_M.split([groups[i].trained_tokens for i in members]))
        return found

    # ---------------------------------------------------------------------------------------------------- updates

    def update_policy(self, rows: Sequence[PolicyRow], loss: PolicyLoss, totals: Totals, lr: float) -> dict[str, float]:
        """One optimizer step of online RL on all `rows`; `totals` counts the whole step over all ranks."""
        losses = self.policy_gradients(rows, loss, totals)
        return self._step(self.policy, self.optimizer, losses, lr, [row.group for row in rows])

    def policy_gradients(self, rows: Sequence[PolicyRow], loss: PolicyLoss, totals: Totals) -> list[Metrics]:
        """Add up the gradients of a policy loss over micro-batches; their metrics."""
        parts = [part for row in rows for part in split_group(row, self.token_budget)]
        losses: list[Metrics] = []
        for teacher in self.teachers.in_loss if self.teachers is not None else (None,):
            own = [part for part in parts if part.teacher == teacher]
            computed = self._computed([part.group for part in own], self.temperature, teacher)
            for batch, members, (logp_M, entropy_M, *divergence), routing in computed:
                targets = policy_targets([own[i] for i in members], logp_M, *divergence)
                out = loss(logp_M, entropy_M, batch, targets, totals)
                balanced = self._backward(out.loss, routing, len(logp_M) / totals.tokens)
                losses.append(to_metrics({**out.metrics, **mismatch(targets, logp_M, own[members[0]]), **balanced}))
        return losses

    def update_critic(self, rows: Sequence[ValueRow], totals: Totals, lr: float) -> dict[str, float]:
        """One optimizer step of the critic towards the returns of all `rows`."""
        assert self.critic is not None
        losses = self.critic_gradients(rows, totals)
        record = self._step(self.critic.policy, self.critic.optimizer, losses, lr, [row.group for row in rows])
        return {
            name if name.startswith("critic/") else f"critic/{name.removeprefix('optim/')}": value
            for name, value in record.items()
        }

    def critic_gradients(self, rows: Sequence[ValueRow], totals: Totals) -> list[Metrics]:
        """Add up the gradients of the value loss over micro-batches; their metrics."""
        assert self.critic is not None
        parts = [part for row in rows for part in split_group(row, self.token_budget)]
        losses: list[Metrics] = []
        self._seed_dropout(self.critic.optimizer)
        for batch, members in self._batches([part.group for part in parts]):
            if not members:
                self.critic.values(batch).sum().backward()
                continue
            chosen = [parts[i] for i in members]
            out = self.critic.loss(batch, [row.value for row in chosen], [row.returns for row in chosen], totals)
            self._backward(out.loss)
            losses.append(to_metrics(out.metrics))
        return losses

    def update_sft(self, groups: Sequence[PackedGroup], weighting: str, total: float, lr: float) -> dict[str, float]:
        """One optimizer step of supervised training on the answers of `groups`; `total` is the sum of the weights
        (`sft_total`) of the whole step over all ranks."""
        losses = []
        for batch, _, (logp_M, entropy_M), routing in self._computed(groups):
            weight_M = sft_weights(batch, weighting)
            loss = -(weight_M * logp_M).sum() / total
            tokens, weight = float(len(logp_M)), weight_M.sum().item() / total
            found = {
                **self._backward(loss, routing, weight),
                "loss/total": (loss, weight),
                "loss/nll": (-logp_M.sum(), tokens),
                "loss/entropy": (entropy_M.sum(), tokens),
            }
            losses.append(to_metrics(found))
        return self._step(self.policy, self.optimizer, losses, lr, groups)

    def update_preference(
        self, pairs: Sequence[TrainPair], loss: PreferenceLoss, totals: Totals, shift: float, lr: float
    ) -> dict[str, float]:
        """One optimizer step of preference learning on all `pairs`; `totals` counts the whole step over all ranks."""
        losses = []
        for batch, members, (logp_M, entropy_M), routing in self._computed([pair.group for pair in pairs]):
            targets = pair_targets([pairs[i] for i in members], shift, logp_M.device)
            out = loss(logp_M, batch, targets, totals)
            balanced = self._backward(out.loss, routing, batch.samples / totals.samples)
            found = {**out.metrics, **balanced, "loss/entropy": (entropy_M.sum(), float(len(entropy_M)))}
            losses.append(to_metrics(found))
        return self._step(self.policy, self.optimizer, losses, lr, [pair.group for pair in pairs])

    def _step(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        losses: Sequence[Metrics],
        lr: float,
        groups: Sequence[PackedGroup] | None,
    ) -> dict[str, float]:
        """groups: what was computed, if images of it went through projectors that are trained."""
        seen = frozenset[int]().union(*(group.tile_sides for group in groups or ()))
        if self.ranks is not None:
            rows = self.ranks.gather((losses, seen))[:: self.ranks.cluster.sequence_parallel]
            losses = [record for own, _ in rows for record in own]
            seen = seen.union(*(sides for _, sides in rows))
        if groups is not None:
            forget_unseen(policy, seen)
        self._saving.check()
        scale = 1.0 if self.scale is None else self.scale.value
        norm, taken = apply_gradients(optimizer, lr, self.max_grad_norm, scale)
        if self.scale is not None:
            self.scale.update(taken)
        if not taken:
            logger.warning("the gradient is not finite (norm %s): this update is skipped", norm)
        return {**reduce_metrics(losses), "optim/grad_norm": norm, "optim/update_skipped": float(not taken)}

    def _backward(self, loss: Tensor, routing: Routing | None = None, share: float = 1.0) -> Metrics:
        """Add up the gradient of a row's loss, and of the load-balancing loss of its routers, which counts by the
        row's share of the step; the metrics of the latter."""
        found: Metrics = {}
        if routing is not None:
            balance = routing.load_balancing_loss()
            loss = loss + self._balance * share * balance
            found = {"loss/router_aux": (share * balance.item(), share)}
        (loss if self.scale is None else loss * self.scale.value).backward()
        return found

    def _computed(
        self, groups: Sequence[PackedGroup], temperature: float = 1.0, teacher: str | None = None
    ) -> Iterator[tuple[Batch, list[int], tuple[Tensor, ...], Routing | None]]:
        """Packed rows, the indices of their groups, what is trained on (log-probs, entropies and, with a `teacher`, the
        divergence to it), and what routers did where their load is balanced. Rows that only keep this rank in step with
        the others end here."""
        self._seed_dropout(self.optimizer)
        for batch, members in self._batches(groups, replays=True):
            terms = LOGP_ENTROPY
            if teacher is not None and self.teachers is not None:
                asked = replace(batch, routed_experts=None)  # these are of the model itself
                terms = (*terms, self.teachers.divergence(teacher, asked, temperature))
            routing = Routing(batch.routed_experts, balances=True) if self._balance else None
            with self._kept():
                found = self._logprobs(batch, temperature, terms, routing=routing)
            if members:
                yield batch, members, found, routing
            else:
                torch.stack([term.sum() for term in found]).sum().backward()

    def _seed_dropout(self, optimizer: torch.optim.Optimizer) -> None:
        """An update draws by its number and its rank, so that a run that was interrupted draws what it would have."""
        if self._seed is not None:
            taken = optimizer.param_groups[0]["updates"]
            torch.manual_seed(seed_of("dropout", self._seed, taken, 0 if self.ranks is None else self.ranks.rank))

    def _batches(
        self, groups: Sequence[PackedGroup], *, replays: bool = False, twice: bool = False
    ) -> Iterator[tuple[Batch, list[int]]]:
        """Packed rows with the indices of their groups: as many as the rank with most has, the last ones empty.
        `replays`: with the sampler's experts; `twice`: groups stand again behind those of a row, with the routers'."""
        rows = micro_batches(groups, self.token_budget // (2 if twice else 1))
        if self.ranks is not None:
            rows += [[] for _ in range(self.ranks.most(len(rows)) - len(rows))]
        for members in rows:
            batch = self._packed([groups[i] for i in members] * (2 if twice else 1))
            if batch.routed_experts is not None and twice:
                batch.routed_experts[len(batch.token_ids_T) // 2 :] = -1
            yield batch if replays or twice else replace(batch, routed_experts=None), members

    def _packed(self, groups: Sequence[PackedGroup]) -> Batch:
        """The row of some groups, or of none, as this rank computes it."""
        batch = pack(groups) if groups else empty(self._dummy_image)
        return pad_with_dummy_image(batch, self._dummy_image).to(self.device)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, folder: Path, step: int, state: Mapping[str, Any], keep: int, in_background: bool = False) -> Path:
        """Write a checkpoint (`save_checkpoint`); `in_background`: while this rank continues. Returns where it is to
        be."""
        self.finish_saving()
        if self.scale is not None:
            state = {**state, "scale": asdict(self.scale)}
        save = self._saving.start if in_background else save_checkpoint
        return save(folder, step, tensors_of(self._trained()), state, keep, self.ranks)

    def finish_saving(self) -> None:
        """Return when no checkpoint is under way. Raises what ended the last one."""
        self._saving.wait()

    def restore(self, path: Path) -> dict[str, Any]:
        state = load_checkpoint(path, self._trained(), self.ranks, bound_to_ranks=self._bound_to_ranks)
        scale = state.pop("scale", None)
        if self.scale is not None and scale is not None:
            self.scale = LossScale(**scale)
        return state

    def _trained(self) -> dict[str, Trained]:
        critic = {} if self.critic is None else {"critic_": (self.critic.model, self.critic.optimizer)}
        return {"": (self.policy.model, self.optimizer), **critic}

    def export(self, folder: Path) -> None:
        """The trained model in the format that it came in, its adapter, or both (`model.lora.save`); whole or not at
        all. Several ranks call it together; the first one gathers the weights, tensor by tensor, and writes."""
        self.finish_saving()
        lora, model = self._lora, self.policy.model
        state = self._gathered({} if lora is not None and lora.save == "adapter" else merged_state(model))
        adapter = self._gathered({} if lora is None or lora.save == "merged" else trained_tensors(self.policy))
        if self.ranks is None or self.ranks.is_first:
            size = sum(tensor.nbytes for tensor in (*state.values(), *adapter.values()))
            with_room(partial(write_trained, self.policy, folder, state, lora, adapter), size)
        if self.ranks is not None:
            self.ranks.gather(None)

    @torch.no_grad()
    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in host memory, none on ranks other than the first."""
        keeps = self.ranks is None or self.ranks.is_first
        found = ((name, full_tensor(tensor)) for name, tensor in tensors.items())
        return {name: tensor.detach().cpu() for name, tensor in found if keeps}
