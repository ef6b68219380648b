"""Frozen teachers of a run: checked by their small files before it starts, then asked about its packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foveate.config.algorithm import TeacherSettings
from foveate.encoding.family import Family
from foveate.errors import ConfigError
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.logprobs import Divergence
from foveate.models.policy import Policy
from foveate.parallel.fsdp import LogProbs, TeacherOutput
from foveate.records import Batch

_OWN = {"name", "stop_ids", "budget", "proof", "conversation"}
"""Facts of a family in which a teacher may differ: they change no prompt that the model has encoded."""


class Teachers:
    """The teachers of a rank by their paths. They read the rows of the policy: one forest, with its images once."""

    def __init__(
        self,
        settings: TeacherSettings,
        read: Callable[[str], Policy],
        ready: Callable[[Any, Policy], Any],
        vocabulary: int,
    ) -> None:
        """`read` gives the policy in a folder; `ready` makes the module that computes one, and shards its weights where
        there are several ranks; `vocabulary`: the length of the model's head."""
        self.names = settings.paths
        self._settings, self._vocabulary = settings, vocabulary
        kind = LogProbs if settings.term == "advantage" else TeacherOutput
        self._modules: dict[str, Any] = {}
        for name in self.names:
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
        return Divergence(self._settings.divergence, output, self._settings.beta or 0.5)

    @torch.no_grad()
    def logprobs(self, name: str, batch: Batch, temperature: float) -> Tensor:
        """Log-probs (M,) of the trained tokens of a batch under a teacher."""
        return self._modules[name](batch, temperature, ("logp",))[0]


def check_teachers(settings: TeacherSettings, model: str) -> None:
    """Raise ConfigError unless each teacher reads the tokens and images that the model in the folder `model` reads, and
    DataError for one that is no model folder."""
    own = inspect_model_folder(model)
    for path in settings.paths:
        found = inspect_model_folder(path)
        _require_vocabulary(path, found.tokenizer, own.tokenizer)
        _require_images(path, found.family, own.family)


def check_sources(settings: TeacherSettings, sources: Iterable[Any]) -> None:
    """Raise ConfigError for a teacher of a data_source that no row has."""
    there = {source for source in sources if isinstance(source, str)}
    for source in settings.sources:
        if source not in there:
            raise ConfigError(
                f"algorithm.teacher.sources names {source!r}, but no row of data.train has that data_source; there are "
                f"{', '.join(sorted(there)[:8]) or 'none'}"
            )


def _require_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> None:
    theirs, ours = tokenizer.get_vocab(), own.get_vocab()
    if theirs == ours:
        return
    token = min((theirs.items() ^ ours.items()), key=lambda item: (item[1], item[0]))[0]
    raise ConfigError(
        f"algorithm.teacher: the tokenizer of {path} is another than the model's: {len(theirs):,} and {len(ours):,} "
        f"tokens, {token!r} is number {theirs.get(token, 'none')} and {ours.get(token, 'none')}; distillation compares"
        " probabilities of the same tokens, so take a teacher with the model's tokenizer"
    )


def _require_images(path: str, family: Family, own: Family) -> None:
    """A teacher is shown the tokens and pixels of the model's prompts."""
    if type(family) is not type(own):
        raise ConfigError(
            f"algorithm.teacher: {path} is of the family {family.name} and the model of {own.name}; a teacher reads "
            "the prompts of the model, so take one of its family"
        )
    theirs, ours = asdict(family), asdict(own)
    for name in ours.keys() - _OWN:
        if theirs[name] != ours[name]:
            raise ConfigError(
                f"algorithm.teacher: {path} sees images otherwise than the model: {name} is {theirs[name]} and "
                f"{ours[name]}; "
                "a teacher reads the images of the model's prompts, so take one with its preprocessing"
            )
