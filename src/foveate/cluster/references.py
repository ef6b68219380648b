"""The groups of a step and their images travel to each process once, and by reference from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from foveate.records import PackedGroup


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group as an object store holds it, with the references of its images."""

    content: bytes
    references: Sequence[Any]


class References:
    """The references of groups and of tensors of pixels, the only ones with four dimensions, while these live.

    put: stores an object and gives its reference; pack: an object as bytes, with the references in it."""

    def __init__(self, put: Callable[[Any], Any], pack: Callable[[Any], tuple[bytes, Sequence[Any]]]) -> None:
        self._put, self._pack = put, pack
        self._images: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._groups: WeakKeyDictionary[PackedGroup, Any] = WeakKeyDictionary()

    def of(self, obj: Any) -> Any:
        """The reference that stands for a group or for pixels; anything else is given back."""
        if isinstance(obj, PackedGroup):
            if obj not in self._groups:
                self._groups[obj] = self._put(StoredGroup(*self._pack((obj.prompt, obj.answers))))
            return self._groups[obj]
        if isinstance(obj, Tensor) and obj.ndim == 4:
            if obj not in self._images:
                self._images[obj] = self._put(obj.numpy())
            return self._images[obj]
        return obj

    def clear(self) -> None:
        """Forget all: the store is gone."""
        self._images.clear()
        self._groups.clear()


def restored(found: Any, load: Callable[[bytes, Sequence[Any]], Any]) -> Any:
    """The object that a reference stood for. load: the object of bytes and references."""
    if isinstance(found, StoredGroup):
        return PackedGroup(*load(found.content, found.references))
    return torch.tensor(found) if isinstance(found, np.ndarray) else found
