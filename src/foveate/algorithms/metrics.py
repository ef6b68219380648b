"""Metrics as (value, weight) pairs that micro-batches, ranks and steps can add up without bias.

A name that ends in `_max` or `_min` holds the extreme of the values it covers; any other name holds a sum, whose mean
is the sum of the values over the sum of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Metrics = Mapping[str, tuple[float, float]]


def to_metrics(values: Mapping[str, tuple[Tensor | float, float]]) -> dict[str, tuple[float, float]]:
    """Scalar tensors (or floats) with their weights as plain floats, fetched from the device in one transfer."""
    found = [value for value, _ in values.values()]
    device = next((value.device for value in found if isinstance(value, Tensor)), None)
    scalars = [
        value.detach().double()
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64, device=device)
        for value in found
    ]
    numbers = torch.stack(scalars).tolist()
    return {name: (number, weight) for number, (name, (_, weight)) in zip(numbers, values.items(), strict=True)}


def reduce_metrics(parts: Iterable[Metrics]) -> dict[str, float]:
    """One number per name over all `parts` (micro-batches, ranks, updates): the maximum of names that end in `_max`,
    the minimum of names that end in `_min`, and for all others the weighted mean. A part may lack a name; a name whose
    weights add up to 0 is left out."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for part in parts:
        for name, pair in part.items():
            if pair[1] > 0:
                pairs.setdefault(name, []).append(pair)
    return {name: _reduce(name, values) for name, values in pairs.items()}


def _reduce(name: str, values: list[tuple[float, float]]) -> float:
    if name.endswith("_max"):
        return max(value for value, _ in values)
    if name.endswith("_min"):
        return min(value for value, _ in values)
    return sum(value for value, _ in values) / sum(weight for _, weight in values)
