"""What the tests on several gloo ranks share: batches, a loss, and processes that run a function of theirs."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from foveate.parallel.packing import empty, pack, pad_with_dummy_image
from foveate.records import ImageSlot, PackedGroup, Prompt


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tree_of(seed, family, *, images=1):
    """A prompt of random tokens with pictures of four image tokens, and two answers; lengths depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 200, (60,), generator=generator).tolist()
    token_ids, slots, pixels = list(ids[:3]), [], []
    for _ in range(images):
        grid = (2, 2) if family.unit == "pixels" else None
        shape = family.dummy_image.pixels.shape
        entries = shape[0] * 4 if grid else 1
        slots.append(ImageSlot(len(token_ids), 4, entries, grid))
        pixels.append(torch.randn(entries, *shape[1:], generator=generator))
        token_ids += [family.image_token_id] * 4 + [ids[3]]
    token_ids += ids[4 : 9 + seed % 7]
    prompt = Prompt(tuple(token_ids), tuple(slots), torch.cat(pixels) if pixels else None, ())
    return PackedGroup.of_tokens(prompt, (tuple(ids[20:27]), tuple(ids[27 : 30 + seed % 5])))


def loss_of(logp_M, entropy_M):
    weight_M = torch.linspace(0.5, 1.5, len(logp_M))
    return (weight_M * logp_M).sum() / 20 - 0.1 * entropy_M.sum() / 20


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def rows(family, *, ranks):
    """A row for each of `ranks` data ranks: the first has images of several prompts, the last of several has none."""
    vision = family.dummy_image is not None
    first = pack(
        [tree_of(0, family, images=3 * vision), tree_of(1, family, images=0), tree_of(2, family, images=vision)]
    )
    second = pack([tree_of(3, family, images=0)])
    return [
        pad_with_dummy_image(batch, family.dummy_image) for batch in (first, second, empty(family.dummy_image))[:ranks]
    ]


def start_ranks(function, ranks, *arguments):
    """Run `function(rank, *arguments)` in processes of their own. They are forked from one that has the imports
    of conftest.py, so that only the first of a session waits for these."""
    mp.start_processes(_without_views, (function, *arguments), ranks, start_method="forkserver")


def _without_views(rank, function, *arguments):
    """A rank in which a view as the output of a sharded module is an error: an operation in place on it would lose
    FSDP's hook, and with it weights and gradients."""
    warnings.filterwarnings("error", message="FSDP2-wrapped module .* returned a view tensor")
    function(rank, *arguments)


def spawn(function, ranks, folder, *arguments):
    """Run `function(rank, ranks, folder, *arguments)` on gloo ranks; what it returns is saved as `rank.pt`."""
    start_ranks(_on_rank, ranks, ranks, function, str(folder), arguments)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]


def _on_rank(rank, ranks, function, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.save(function(rank, ranks, folder, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
