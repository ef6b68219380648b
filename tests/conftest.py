"""What several test files share: a random tiny InternVL, its policy, and pictures."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import time
from contextlib import chdir
from zlib import crc32

import numpy as np
import PIL.Image
import pytest

if not os.environ.get("FOVEATE_TEST_GPU"):  # with it, tests of what a GPU does run on a real one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch

from foveate.encoding.encode import Encoder
from foveate.models.policy import load_policy, save_policy
from foveate.models.tiny import TinySize, build_tiny
from foveate.records import Image, Message, Task

torch.set_num_threads(1)


def _refuse_devices(call):
    """A rename that no test makes into /dev: run as root, it would put a file in the place of a device."""

    def checked(source, target, **named):
        folder = os.path.realpath(os.path.dirname(os.path.abspath(os.fspath(target))))
        if f"{os.fsdecode(folder)}/".startswith("/dev/") and not f"{os.fsdecode(folder)}/".startswith("/dev/shm/"):
            raise AssertionError(f"a test would replace {target}")
        return call(source, target, **named)

    return checked


os.replace, os.rename = _refuse_devices(os.replace), _refuse_devices(os.rename)
BEGIN = time.monotonic()
# What processes of tests import that are forked from a server: once for all of them.
multiprocessing.set_forkserver_preload(["foveate.train.worker", "foveate.evaluate.generate", "openai"])


def pytest_collection_modifyitems(items):
    """With FOVEATE_TEST_ORDER, any text, files come in an order that it decides: where time is short, others each time
    are left out."""
    order = os.environ.get("FOVEATE_TEST_ORDER")
    if order:
        items.sort(key=lambda item: crc32(f"{order} {item.path.name}".encode()))


def pytest_runtest_setup():
    """With FOVEATE_TEST_SECONDS, tests that would begin later than that are skipped: what has run still decides."""
    limit = float(os.environ.get("FOVEATE_TEST_SECONDS", "inf"))
    if time.monotonic() - BEGIN > limit:
        pytest.skip(f"no time left (FOVEATE_TEST_SECONDS={limit:g})")


@pytest.fixture(scope="session", autouse=True)
def working_folder(tmp_path_factory):
    """The folder that tests run in. It is empty: no test sees what commands have left in the clone."""
    folder = tmp_path_factory.mktemp("working")
    with chdir(folder):
        yield folder


@pytest.fixture(autouse=True)
def _empty_the_working_folder(working_folder):
    yield
    for path in working_folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


TINY = TinySize(tile=56, vision_width=32, vision_layers=2, vision_ffn=64, width=64, layers=3, head_dim=16, ffn=96)


def build_sharp(folder, size):
    """A random model whose attention is far from uniform and whose next token is neither flat nor certain, with more
    rows in its embedding than the tokenizer has tokens. A fresh model would hide wrong masks: it attends evenly."""
    policy = load_policy(str(build_tiny(folder / "fresh", size, padded_vocabulary=700)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if name.endswith("norm.weight") or "layernorm" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.6, generator=generator))
            else:
                parameter.mul_(4 if "embed_tokens" in name or "lm_head" in name else 2)
    save_policy(policy, folder / "sharp")
    return folder / "sharp"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The folder of a sharp tiny model: 56-pixel tiles of 4 image tokens. Copy it before changing anything."""
    return build_sharp(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture(scope="session")
def tiny_policy(tiny_folder):
    """The policy of `tiny_folder`, shared: tests that change weights, modes or gradients load their own."""
    return load_policy(str(tiny_folder))


@pytest.fixture
def encode(tiny_policy):
    """An encoder with six tiles for a prompt and 1,024 tokens."""
    return Encoder(tiny_policy.tokenizer, tiny_policy.family, 6, 1024)


@pytest.fixture(scope="session")
def make_image():
    """make_image(width, height, seed) -> the record of a picture of noise, as PNG bytes."""

    def make(width, height, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG")
        return Image(None, buffer.getvalue(), width, height)

    return make


@pytest.fixture(scope="session")
def make_task():
    """make_task(text, *images) -> a task of one user message."""

    def make(text, *images):
        return Task("id", "test", (Message("user", text),), tuple(images), None, where="rows.parquet, row 3")

    return make
