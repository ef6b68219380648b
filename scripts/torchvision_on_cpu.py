"""Lets PyPI's torchvision, built for CUDA, be imported beside a CPU-only torch. Installed with a .pth file, so that
every process of an environment has it.

Its extension cannot load there, which torchvision itself tolerates, but for two registrations of fake kernels that need
their operators to exist. They are declared just before torchvision is imported. With a CUDA torch nothing happens.
"""

import importlib.machinery
import sys

_OPERATORS = []  # a torch Library takes its operators with it when it goes


class _BeforeTorchvision:
    """A finder of modules that finds nothing, and sees the import of torchvision come."""

    @classmethod
    def find_spec(cls, name, _path=None, _target=None):
        if name == "torchvision" and not _OPERATORS and importlib.machinery.PathFinder.find_spec(name) is not None:
            import torch

            if torch.version.cuda is None and torch.version.hip is None:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _OPERATORS.append(library)
        return


sys.meta_path.insert(0, _BeforeTorchvision)
