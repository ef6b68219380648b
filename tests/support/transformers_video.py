"""transformers' video processors without torchvision, which they want as a whole and of which sampling, sizes and the
order of patches need nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import transformers


def processing_of(family):
    """The module with the video processor of `qwen2_vl` or `qwen3_vl`."""
    name = f"transformers.models.{family}.video_processing_for_tests"
    path = Path(transformers.__file__).parent / "models" / family / f"video_processing_{family}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    missing = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    missing = (*missing, "torchvision.transforms.v2.functional")
    with patch.dict(sys.modules, {name: module, **{one: ModuleType(one) for one in missing}}):
        spec.loader.exec_module(module)
    return module
