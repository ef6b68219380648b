"""Frozen teachers of a run: checked by their small files before it starts, then asked about its packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from foveate.config.algorithm import TeacherSettings
from foveate.config.model import ModelSettings
from foveate.errors import ConfigError, DataError
from foveate.models.checkpoint.inspect import ModelFolder, inspect_model_folder, resolve_folder
from foveate.models.logprobs import Divergence, TeacherStates
from foveate.models.policy import DTYPES, Policy
from foveate.parallel.fsdp import LogProbs, TeacherOutput
from foveate.records import Batch
from foveate.registry import resolve

SERVERS = {"vllm": "foveate.train.remote_teacher:RemoteTeacher"}
"""Teachers behind servers of each kind."""
_OWN = {"name", "stop_ids", "budget", "proof", "conversation", "thresholds"}
"""Facts of a family in which a frozen model may differ: they change no prompt that the model has encoded."""


class Teachers:
    """The teachers of a rank by their paths. They read the rows of the policy: one forest, with its images once."""

    def __init__(
        self,
        settings: TeacherSettings,
        read: Callable[[str], Policy],
        ready: Callable[[Any, Policy], Any],
        model: Policy,
    ) -> None:
        """`read` gives the policy in a folder; `ready` makes the module that computes one, and shards its weights where
        there are several ranks; `model`: the one that learns."""
        self.names = settings.paths
        head: Any = model.part("head")
        self._settings, self._vocabulary = settings, len(head.weight)
        dtype = DTYPES[settings.dtype] if settings.dtype else next(model.model.parameters()).dtype
        self.servers = {url: resolve(SERVERS, "vllm", "teacher")(url, model.family, dtype) for url in settings.servers}
        kind = LogProbs if settings.term == "advantage" else TeacherOutput
        self._modules: dict[str, Any] = {}
        for name in settings.folders:
            policy = read(name)
            policy.model.requires_grad_(False)
            self._modules[name] = ready(kind, policy)

    @property
    def in_loss(self) -> tuple[str | None, ...]:
        """The teachers that the loss compares with, one after the other; None: without one."""
        return self.names if self._settings.term == "loss" else (None,)

    @torch.no_grad()
    def divergence(self, name: str, batch: Batch, temperature: float) -> Divergence:
        """How far the policy is from a teacher at each trained token of a batch, as a term of its head."""
        output = self._modules[name](batch, temperature, self._settings.top_k, self._vocabulary)
        _require_finite(name, output.hidden if isinstance(output, TeacherStates) else output.logprobs)
        return Divergence(self._settings.divergence, output, self._settings.beta or 0.5)

    @torch.no_grad()
    def logprobs(self, name: str, batch: Batch, temperature: float) -> Tensor:
        """Log-probs (M,) of the trained tokens of a batch under a teacher."""
        logp_M = self._modules[name](batch, temperature, ("logp",))[0]
        _require_finite(name, logp_M)
        return logp_M


def _require_finite(name: str, output: Tensor) -> None:
    if not output.isfinite().all():
        raise DataError(
            f"algorithm.teacher: {name} computes numbers that are not finite (NaN), so that nothing can be learned "
            "from it; its weights are damaged, or algorithm.teacher.dtype is too small for them: try float32"
        )


def check_teachers(settings: TeacherSettings, model: str, temperature: float) -> None:
    """Raise ConfigError unless each teacher reads the tokens and images that the model in the folder `model` reads, and
    DataError for one that is no model folder. A server is asked; its log-probs are those of a `temperature` of 1."""
    own = inspect_model_folder(model)
    for url in settings.servers:
        if temperature != 1:
            raise ConfigError(
                f"rollout.temperature is {temperature:g}, but the log-probs of the teacher at {url} are those of "
                "temperature 1; set it to 1, or use a teacher in a folder"
            )
        resolve(SERVERS, "vllm", "teacher")(url, own.family, torch.float32, patience=0).check(own.tokenizer)
    for path in settings.folders:
        found = inspect_model_folder(path)
        if type(found.family) is not type(own.family):
            raise ConfigError(
                f"algorithm.teacher: {path} is of the family {found.family.name} and the model of {own.family.name}; a "
                "teacher reads the prompts of the model, so take one of its family"
            )
        require_same_input("algorithm.teacher", path, found, own)


def require_another(settings: TeacherSettings, model: ModelSettings) -> None:
    """Raise ConfigError where the only teacher is the model as it begins: their divergence is 0, and an optimizer that
    divides by the size of gradients would follow its rounding errors."""
    changes = (model.quantization, model.lora and model.lora.adapter, settings.dtype not in (None, model.dtype))
    if settings.servers or any(changes):
        return
    if {resolve_folder(path).resolve() for path in settings.folders} == {resolve_folder(model.path).resolve()}:
        raise ConfigError(
            f"algorithm.teacher.path is {settings.path}, the model itself, from which there is nothing to learn; name "
            "another one, or an algorithm that learns from rewards beside it"
        )


def check_sources(settings: TeacherSettings, sources: Iterable[Any]) -> None:
    """Raise ConfigError for a teacher of a data_source that no row has."""
    there = {source for source in sources if isinstance(source, str)}
    for source in settings.sources:
        if source not in there:
            raise ConfigError(
                f"algorithm.teacher.sources names {source!r}, but no row of data.train has that data_source; there are "
                f"{', '.join(sorted(there)[:8]) or 'none'}"
            )


def require_same_input(setting: str, path: str, found: ModelFolder, own: ModelFolder) -> None:
    """Raise ConfigError unless a frozen model reads tokens and pixels that were encoded for the model that is trained,
    whose family is that of the frozen one, or made of it."""
    theirs, ours = found.tokenizer.get_vocab(), own.tokenizer.get_vocab()
    if theirs != ours:
        token = min((theirs.items() ^ ours.items()), key=lambda item: (item[1], item[0]))[0]
        raise ConfigError(
            f"{setting}: the tokenizer of {path} is another than the model's: {len(theirs):,} and {len(ours):,} "
            f"tokens, {token!r} is number {theirs.get(token, 'none')} and {ours.get(token, 'none')}; probabilities of "
            "the same tokens are compared, so take one with the model's tokenizer"
        )
    if not isinstance(own.family, type(found.family)):
        raise ConfigError(
            f"{setting}: {path} is of the family {found.family.name} and the model of {own.family.name}; take one of "
            "its family"
        )
    facts = asdict(own.family)
    for name, value in asdict(found.family).items():
        if name not in _OWN and value != facts[name]:
            raise ConfigError(
                f"{setting}: {path} sees images otherwise than the model: {name} is {value} and {facts[name]}; it "
                "reads the images of the model's prompts, so take one with its preprocessing"
            )
