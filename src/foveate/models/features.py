"""Features of images under a frozen vision tower, kept on disk: each image goes through it once, whatever passes,
epochs and runs follow.

A prompt's images are encoded by themselves, so that their features do not depend on what else is in a row, and are the
same bits whether they were computed or read. A file is named by what went in: a digest of the weights of tower and
projector and of the configuration, and one of the pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from foveate.config.model import FeatureCacheSettings
from foveate.encoding.family import Features
from foveate.errors import ConfigError, one_line
from foveate.models.policy import Policy
from foveate.records import ImageSource

logger = logging.getLogger(__name__)

_FROZEN = ("vision", "projector")
_CHECKSUM = "checksum"
_OWN_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""What a configuration says that changes no feature."""


def with_kept_features(policy: Policy, settings: FeatureCacheSettings | None) -> Policy:
    """The policy with what `model.feature_cache` asks for."""
    if settings is None:
        return policy
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "foveate" / "features" if settings.folder is None else Path(settings.folder).expanduser()
    return replace(policy, features=FeatureStore(policy, folder, settings.gigabytes * 1e9))


class FeatureStore:
    """Keeps features in a folder, up to so many bytes: images beyond them are computed in each pass."""

    def __init__(self, policy: Policy, folder: Path, limit: float) -> None:
        """limit: bytes of the folder, of all models in it, as they are found now and written here. Raises ConfigError
        for a model without images, or one whose tower or projector is trained."""
        if not policy.family.sees_images:
            raise ConfigError(f"model.feature_cache is set, but {policy.folder} sees no images; leave it out")
        learning = {policy.family.part_of(name) for name, one in policy.model.named_parameters() if one.requires_grad}
        trained = sorted(learning & {*_FROZEN})
        if trained:
            raise ConfigError(
                f"model.feature_cache keeps features of frozen parts, but {', '.join(trained)} is trained"
            )
        self.folder = folder / _digest_of(policy)
        self._limit = limit
        self._bytes = sum(map(_size_of, folder.glob("*/*")))
        self._digests: Any = WeakIdKeyDictionary()

    def of(self, policy: Policy, images: Sequence[ImageSource]) -> Features:
        """The features of some images, one after the other, as `Family.features` gives them."""
        found = [self._of_one(policy, one) for one in images]
        deeper = zip(*(one.deeper for one in found), strict=True)
        return Features(torch.cat([one.embeddings for one in found]), tuple(map(torch.cat, deeper)))

    def _of_one(self, policy: Policy, image: ImageSource) -> Features:
        path = self._path(policy, image)
        if (known := self._read(path, policy.device)) is not None:
            return known
        with torch.no_grad():
            seen = policy.family.features(policy.model, image.pixels.to(policy.device), image.grids)
        self._write(path, seen)
        return seen

    def _path(self, policy: Policy, image: ImageSource) -> Path:
        digest = self._digests.get(image.pixels)
        if digest is None:
            numbers = image.pixels.contiguous().view(torch.uint8).numpy()
            digest = self._digests[image.pixels] = hashlib.sha256(numbers.data).hexdigest()
        kind = policy.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        how = f"{tuple(image.pixels.shape)} {image.grids} {kind} {computed}"
        return self.folder / f"{digest[:32]}-{hashlib.sha256(how.encode()).hexdigest()[:8]}.safetensors"

    def _read(self, path: Path, device: torch.device) -> Features | None:
        """The features of a file; None without one, and for one that is damaged, which is written anew."""
        try:
            tensors = load_file(path)
            checksum = tensors.pop(_CHECKSUM).item()
            seen = [tensors[str(number)] for number in range(len(tensors))]
            if seen and checksum == _checksum(seen):
                return Features(seen[0].to(device), tuple(one.to(device) for one in seen[1:]))
            damage = "its checksum is another"
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            damage = one_line(error)
        logger.warning("%s: damaged features (%s); they are computed again", path, damage)
        self._bytes -= _size_of(path)
        with suppress(OSError):
            path.unlink()
        return None

    def _write(self, path: Path, seen: Features) -> None:
        tensors = [one.cpu().contiguous() for one in (seen.embeddings, *seen.deeper)]
        if not self._has_room(path.parent, sum(one.nbytes for one in tensors)):
            return
        checksum = torch.tensor(_checksum(tensors))
        content = save({_CHECKSUM: checksum, **{str(number): one for number, one in enumerate(tensors)}})
        if not self._has_room(path.parent, len(content)):
            return
        beside = path.with_suffix(f".{uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.replace(path)
            self._bytes += len(content)
        except OSError as error:  # a full disk
            self._limit = 0
            logger.warning("%s: no more image features are kept (%s); they are computed in each pass", path, error)
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def _has_room(self, folder: Path, size: int) -> bool:
        has = self._bytes + size <= self._limit
        if self._limit and not has:
            self._limit = 0
            logger.warning("%s is full; features of further images are computed in each pass", folder.parent)
        return has


def _size_of(file: Path) -> int:
    """0 for one that is gone by now."""
    with suppress(OSError):
        return file.stat().st_size
    return 0


def _checksum(tensors: Sequence[Tensor]) -> int:
    found = 0
    for one in tensors:
        found = zlib.crc32(one.view(-1).view(torch.uint8).numpy().data, found)
    return found


def _digest_of(policy: Policy) -> str:
    config: Any = policy.model.config
    said = {name: value for name, value in config.to_dict().items() if name not in _OWN_KEYS}
    key = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in policy.model.state_dict().items():  # scales of quantised layers are no parameters
        if policy.family.part_of(name) not in _FROZEN or not isinstance(tensor, Tensor):
            continue
        weight = tensor.detach().cpu().contiguous()
        key.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        key.update(weight.view(-1).view(torch.uint8).numpy().data)
    return key.hexdigest()[:32]
