"""`foveate doctor`: facts about this installation, or about a model folder."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

import foveate


def examine(model: str | None) -> RenderableType:
    """A table of facts. Raises DataError for a model folder that cannot be used, with the reason."""
    table = Table(show_header=False, box=None)
    facts = environment() if model is None else _facts_of(model)
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def environment() -> dict[str, str]:
    """Versions, processors, memory and disk, each as text."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "foveate": foveate.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "pyarrow", "pillow")},
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set (spinning threads slow their neighbours down)"),
        "memory": f"{pages * size / 2**30:.1f} GiB",
        "disk free here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
        "gpus": ", ".join(devices) or "none",
    }


def _facts_of(model: str) -> dict[str, str]:
    from foveate.models.policy import load_on_meta  # models take seconds to import, and an installation needs none
    from foveate.tools.model_facts import model_facts

    return model_facts(load_on_meta(model))
