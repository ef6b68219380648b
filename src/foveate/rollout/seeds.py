"""Seeds of sampled answers, so that every draw of a run is known from its settings alone."""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["train", "eval", "choice", "pairs", "ahead", "go on", "dropout", "steps", "vico"]
_PURPOSES = {
    "train": 1,
    "eval": 2,
    "choice": 3,
    "pairs": 4,
    "ahead": 5,
    "go on": 6,
    "dropout": 7,
    "steps": 8,
    "vico": 22,
}


def seed_of(purpose: Purpose, *parts: int) -> int:
    """A 63-bit seed from several integers, such as (seed of the run, step, index); each purpose has seeds of its own.
    The purpose stands last, since a sequence that ends in zeros mixes to the same state as one without them."""
    return int(np.random.SeedSequence([*parts, _PURPOSES[purpose]]).generate_state(1, np.uint64)[0] >> 1)
