"""Terms of a weighted sum that shape answers: their length, and how sure the policy was of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from foveate.errors import ConfigError
from foveate.records import Answer, Score, Task

SAMPLED = "sampled"
"""The setting `tokenizer` of a length that is counted in the tokens which the policy sampled."""


def overlong_penalty(length: float, limit: int, buffer: int) -> float:
    """The soft overlong punishment of DAPO (Yu et al. 2025, equation 13), in -1..0: 0 up to `limit` - `buffer`, then
    falling in a line to -1 at `limit`, and -1 from there on."""
    return max(min((limit - buffer - length) / buffer, 0.0), -1.0)


def overlong(*, limit: int, buffer: int, tokenizer: str = "") -> Callable[..., Score]:
    """The reward `overlong_penalty` of an answer's length: in the tokens that were sampled, its stop token included
    ("sampled"), in tokens of `tokenizer`, a model folder that holds a `tokenizer.json`, or without one in words. A term
    of a weighted sum. Parts: length. Raises ConfigError for a buffer outside 1..limit and for a folder without
    tokenizer."""
    if not 0 < buffer <= limit:
        raise ConfigError(f"reward overlong: buffer must be in 1..limit, found buffer {buffer} and limit {limit}")
    return _by_length("overlong", tokenizer, lambda length: overlong_penalty(length, limit, buffer))


def band_score(value: float, start: float, low: float, high: float, end: float) -> float:
    """1 between `low` and `high`, 0 before `start` and behind `end`, and linear between."""
    if low <= value <= high:
        return 1.0
    if not start <= value <= end:
        return 0.0
    return (value - start) / (low - start) if value < low else (end - value) / (end - high)


def length_band(*, start: int, low: int, high: int, end: int, tokenizer: str = "") -> Callable[..., Score]:
    """1 for an answer whose length lies between `low` and `high`, falling in a line to 0 at `start` and `end`: the
    length shaping of OpenVLThinkerV2 (arXiv 2604.08539). The length is counted as by `overlong`. Short for perception
    and long for reasoning, chosen by source. A term of a weighted sum. Parts: length. Raises ConfigError for bounds
    that do not grow."""
    if not 0 <= start <= low <= high <= end:
        raise ConfigError(
            f"reward length_band: 0 <= start <= low <= high <= end does not hold for {start}, {low}, {high}, {end}"
        )
    return _by_length("length_band", tokenizer, lambda length: band_score(length, start, low, high, end))


def entropy_band(answer: Answer, task: Task, *, low: float = 0.2, high: float = 0.6) -> Score:  # noqa: ARG001
    """Less by how far an answer's entropy lies outside of `low`..`high`, in nats per token: -(max(H - high, 0) +
    max(low - H, 0)). H is the mean of -log p over the tokens that the policy sampled, as the engine reported them, an
    estimate without bias. The entropy shaping of OpenVLThinkerV2 (arXiv 2604.08539), there a term of the loss over all
    answers of a task. A term of a weighted sum. Parts: entropy."""
    entropy = -float(np.mean(answer.logprobs, dtype=np.float64)) if answer.trained_tokens else 0.0
    return Score(-(max(entropy - high, 0.0) + max(low - entropy, 0.0)), {"entropy": entropy})


def _by_length(name: str, tokenizer: str, value_of: Callable[[int], float]) -> Callable[..., Score]:
    """The reward of a length, which is counted as `overlong` says."""
    if tokenizer == SAMPLED:

        def of_record(answer: Answer, task: Task) -> Score:  # noqa: ARG001
            return Score(value_of(answer.trained_tokens), {"length": float(answer.trained_tokens)})

        return of_record
    length_of = _counter(name, tokenizer)

    def of_text(text: str, task: Task) -> Score:  # noqa: ARG001
        length = length_of(text)
        return Score(value_of(length), {"length": float(length)})

    return of_text


def _counter(name: str, tokenizer: str) -> Callable[[str], int]:
    if not tokenizer:
        return lambda text: len(text.split())
    file = Path(tokenizer) / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"reward {name}: no {file}; `tokenizer` is a model folder that holds a tokenizer.json, or {SAMPLED}"
        )
    tokens = Tokenizer.from_file(str(file))
    return lambda text: len(tokens.encode(text, add_special_tokens=False).ids)
