"""From the settings of an algorithm to what a step computes with it. Whatever does not fit is refused here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from foveate.algorithms.checks import advantage_inputs, dry_run, reads_old
from foveate.algorithms.corrections import corrected_loss
from foveate.algorithms.distillation import distilled_loss
from foveate.algorithms.kl import KLPenalty
from foveate.algorithms.table import ADVANTAGES, ALGORITHMS, POLICY_LOSSES, TOKEN_FORMS, TOKEN_MASKS, Algorithm
from foveate.config.algorithm import AlgorithmSettings, CriticSettings, TeacherSettings
from foveate.config.runs import RLSettings
from foveate.environments.trl import gives_reward
from foveate.errors import ConfigError
from foveate.registry import bind, resolve
from foveate.train.targets import PolicyLoss
from foveate.train.teacher import check_teachers, require_another


@dataclass(frozen=True, slots=True)
class ResolvedAlgorithm:
    """An algorithm with its settings.

    advantage is called with the tensors that `inputs` names (`algorithms.checks.ADVANTAGE_INPUTS`), `token_mask` marks
    tokens for the loss (`algorithms.covariance`), `reward_kl` is taken from the rewards; mask_truncated leaves
    truncated answers out of the loss. gamma discounts the returns of the critic.
    """

    name: str
    advantage: Callable[..., Tensor]
    inputs: tuple[str, ...]
    loss: PolicyLoss
    needs_reference: bool
    needs_old: bool
    old_logprobs: Literal["trainer", "engine"]
    keeps_equal_groups: bool
    token_mask: Callable[..., Tensor] | None = None
    reward_kl: KLPenalty | None = None
    advantage_clip: float | None = None
    mask_truncated: bool = False
    resample_rounds: int = 0
    critic: CriticSettings | None = None
    gamma: float = 1.0
    teacher: TeacherSettings | None = None

    def contributes_gradient(self, advantage_M: Tensor) -> bool:
        """Whether a group with these advantages can move the weights."""
        return self.keeps_equal_groups or bool(advantage_M.any())

    @property
    def least_answers(self) -> int:
        """How many graded answers a group needs: two where they are compared with each other."""
        return 2 if "group_S" in self.inputs else 1

    @property
    def needs_baseline(self) -> bool:
        """Whether a greedy answer to each prompt is sampled and graded too."""
        return "baseline_S" in self.inputs

    @property
    def needs_token_values(self) -> bool:
        """Whether rewards or advantages ask for log-probs or values, which are then computed for every answer."""
        return self.reward_kl is not None or self.critic is not None or self.has_teacher_advantage

    @property
    def has_teacher_advantage(self) -> bool:
        """Whether the advantage of a token counts how probable a teacher finds it."""
        return self.teacher is not None and self.teacher.term == "advantage"

    def teacher_in_loss(self, source: str) -> str | None:
        """The teacher that the loss compares answers to the rows of a data_source with."""
        return self.teacher.of(source) if self.teacher is not None and self.teacher.term == "loss" else None


def build_algorithm(settings: AlgorithmSettings, max_tokens: int, *, dropout: bool = False) -> ResolvedAlgorithm:
    """An algorithm with its settings filled in. max_tokens: the budget of an answer, by which a loss divides that asks
    for a constant and names none. dropout: whether updates compute with it, so that their log-probs are not those of
    the weights; a correction then takes a pass for these. Raises ConfigError or DataError for whatever it refuses,
    before a run starts."""
    row = resolve(ALGORITHMS, settings.name, "algorithm")
    if not isinstance(row, Algorithm):
        raise ConfigError(
            f"algorithm {settings.name} is a {type(row).__name__}, not a foveate.algorithms.table.Algorithm"
        )
    where = f"algorithm {settings.name}"
    advantage = resolve(ADVANTAGES, row.advantage, "advantage")
    loss = resolve(POLICY_LOSSES, _token_form(row.loss, settings), "policy loss")
    advantage_settings = {**row.advantage_settings, **settings.advantage}
    loss_settings = {**row.loss_settings, **settings.loss}
    if {**_defaults(loss), **loss_settings}.get("aggregate") == "seq-mean-token-sum-norm":
        loss_settings.setdefault("norm_length", max_tokens)
    bound_advantage = bind(advantage, advantage_settings, f"{where}, advantage")
    bound_loss = bind(loss, loss_settings, f"{where}, loss")
    in_force = {**_defaults(loss), **loss_settings}
    kl_in_loss = in_force.get("kl_coefficient", 0.0) > 0
    if "kl_estimator" in settings.loss and not kl_in_loss:
        raise ConfigError(
            f"{where}: loss.kl_estimator is set, but loss.kl_coefficient is 0; set both, or use reward_kl"
        )
    dry_run(bound_loss, {}, reference=kl_in_loss)
    compares = settings.old_logprobs == "trainer" or reads_old(bound_loss, reference=kl_in_loss)
    if settings.correction is not None:
        bounds = {**settings.correction.model_dump(), "old_logprobs": settings.old_logprobs}
        bound_loss = partial(corrected_loss, loss=bound_loss, **bounds)
        dry_run(bound_loss, {}, reference=kl_in_loss)
    bound_loss = _with_teacher(bound_loss, settings.teacher, in_force)
    token_mask = _bound_token_mask(row.token_mask, in_force, where) if row.token_mask else None
    inputs = advantage_inputs(advantage)
    _check_critic(settings, "value_M" in inputs)
    if row.needs_teacher and settings.teacher is None:
        raise ConfigError(f"{where} learns from a teacher, and there is none: set algorithm.teacher.path")
    taught = settings.teacher.term if settings.teacher is not None else None
    measured = settings.correction is not None and dropout
    needs_old = measured or token_mask is not None or settings.reward_kl is not None or taught == "advantage"
    if not (compares or needs_old):
        raise ConfigError(f"{where}: old_logprobs is engine, but its loss compares with no old log-probs; leave it out")
    return ResolvedAlgorithm(
        name=settings.name,
        advantage=bound_advantage,
        inputs=inputs,
        loss=bound_loss,
        needs_reference=kl_in_loss or settings.reward_kl is not None,
        needs_old=needs_old,
        old_logprobs=settings.old_logprobs,
        keeps_equal_groups=row.trains_without_advantage(in_force) or settings.critic is not None or taught == "loss",
        token_mask=token_mask,
        reward_kl=None if settings.reward_kl is None else KLPenalty(**settings.reward_kl.model_dump()),
        advantage_clip=settings.advantage_clip,
        mask_truncated=settings.mask_truncated,
        resample_rounds=row.resample_rounds if settings.resample_rounds is None else settings.resample_rounds,
        critic=settings.critic,
        gamma={**_defaults(advantage), **advantage_settings}.get("gamma", 1.0),
        teacher=settings.teacher,
    )


def check_run(method: ResolvedAlgorithm, settings: RLSettings) -> None:
    """Raise ConfigError where the algorithm and the rest of a run's settings do not fit together."""
    rollout = settings.rollout
    if method.teacher is not None:
        check_teachers(method.teacher, settings.model.path, settings.rollout.temperature)
        if method.name == "distill":
            require_another(method.teacher, settings.model)
    if method.resample_rounds and (rollout.samples == 1 or rollout.top_k == 1):
        name = "samples" if rollout.samples == 1 else "top_k"
        raise ConfigError(
            f"rollout.{name} is 1, so that the rewards of a group are always equal, but algorithm {method.name}"
            f" replaces groups of equal rewards: raise rollout.{name}, or set algorithm.resample_rounds=0"
        )
    if rollout.partial and method.needs_baseline:
        raise ConfigError(
            f"rollout.partial is true, but algorithm {method.name} compares answers with a greedy one, which has to be "
            "of the same weights: set rollout.partial=false, or choose another algorithm"
        )
    if method.critic is not None and settings.model.lora is not None and settings.model.lora.adapter is not None:
        raise ConfigError(
            "model.lora.adapter is set, but algorithm.critic begins as a copy of the model without adapters; leave one "
            "of them out"
        )
    if method.critic is not None and method.critic.warmup_steps >= settings.train.steps:
        raise ConfigError(
            f"algorithm.critic.warmup_steps is {method.critic.warmup_steps}, but train.steps is {settings.train.steps}:"
            " the policy would never learn; a few percent of the steps are usual"
        )
    _check_reward_of_environment(settings)


def _check_reward_of_environment(settings: RLSettings) -> None:
    """A class with `get_reward` and a reward function: which of them counts is said, and not the default's to say. The
    environment `tools` has no rewards that could."""
    environment = settings.environment
    if environment is not None and environment.name == "tools" and environment.reward != "function":
        raise ConfigError(
            f"environment.reward is {environment.reward}, but the environment tools gives no rewards, and "
            f"{settings.reward.name} scores its answers: leave it out"
        )
    if environment is None or environment.name != "trl" or "reward" in environment.model_fields_set:
        return
    factory = environment.settings.get("factory")
    if isinstance(factory, str) and gives_reward(factory):
        raise ConfigError(
            f"environment trl: {factory} has get_reward(), which does not count beside the reward function "
            f"{settings.reward.name} unless you say so: set environment.reward=environment, both, or function"
        )


def _token_form(loss: str, settings: AlgorithmSettings) -> str:
    """The policy loss to compute: where something weighs single tokens, one that weighs them too."""
    correction, teacher = settings.correction, settings.teacher
    if correction is not None and correction.mode.startswith("token"):
        cause, instead = f"correction.mode is {correction.mode}", "sequence-truncate, sequence-mask or sequence-reject"
    elif teacher is not None and teacher.term == "advantage":
        cause, instead = "teacher.term is advantage", "teacher.term=loss"
    else:
        return loss
    form = TOKEN_FORMS.get(loss, loss)
    if form is None:
        raise ConfigError(
            f"algorithm.{cause}, which weighs single tokens, but the loss {loss} of algorithm {settings.name} has one "
            f"ratio for a whole answer; use {instead}"
        )
    return form


def _with_teacher(loss: PolicyLoss, teacher: TeacherSettings | None, loss_settings: dict[str, Any]) -> PolicyLoss:
    """The loss with the term of a teacher, aggregated as the loss is; a mean over tokens where it does not say how."""
    if teacher is None or teacher.term == "advantage":
        return loss
    aggregate, length = loss_settings.get("aggregate", "token-mean"), loss_settings.get("norm_length")
    return partial(distilled_loss, loss=loss, coefficient=teacher.coefficient, aggregate=aggregate, norm_length=length)


def _check_critic(settings: AlgorithmSettings, is_needed: bool) -> None:
    if is_needed and settings.critic is None:
        raise ConfigError(
            f"algorithm {settings.name} needs a critic, and there is none: set algorithm.critic.lr (1e-5 is usual for"
            " large models), or choose an algorithm without values, such as grpo"
        )
    if settings.critic is not None and not is_needed:
        raise ConfigError(
            f"algorithm.critic is set, but algorithm {settings.name} reads no values; leave it out, or choose ppo"
        )


def _bound_token_mask(path: str, loss_settings: dict[str, Any], where: str) -> Callable[..., Tensor]:
    """A choice of tokens with those settings of the loss that it names."""
    token_mask = resolve(TOKEN_MASKS, path, "choice of tokens")
    named = [p.name for p in inspect.signature(token_mask).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return bind(token_mask, {name: loss_settings[name] for name in named if name in loss_settings}, f"{where}, loss")


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
