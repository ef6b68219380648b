"""Stands in for SGLang's kernel package where there is none: every name can be imported, and calling one raises."""

import importlib.abc
import importlib.machinery
import sys

import torch

__version__ = "0.4.10"
READ_AT_IMPORT = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)
"""Operators in `torch.ops.sgl_kernel` that modules of SGLang take as they are imported. Others must stay away: SGLang
looks there for what it has."""


class _Absent:
    """A kernel, or a constant of the package, by its dotted name."""

    def __init__(self, name):
        self.__name__ = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *_args, **_settings):
        raise NotImplementedError(f"{self.__name__}: no kernels for CPUs here")

    def __hash__(self):
        return hash(self.__name__)

    def __eq__(self, other):
        return isinstance(other, _Absent) and other.__name__ == self.__name__


def _attribute_of(module):
    def find(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{module}.{name}")

    return find


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every `sgl_kernel.x` is a module like this one."""

    def find_spec(self, name, _path=None, _target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec):
        module = type(sys)(spec.name)
        module.__getattr__ = _attribute_of(spec.name)
        return module

    def exec_module(self, module):
        pass


for operator in READ_AT_IMPORT:
    setattr(torch.ops.sgl_kernel, operator, _Absent(f"torch.ops.{__name__}.{operator}"))
sys.meta_path.insert(0, _Submodules())
__getattr__ = _attribute_of(__name__)


def _without_pinned_memory():
    """SGLang pins host memory for its adapters, also where no accelerator reads it and PyTorch refuses."""
    import torch

    if torch.accelerator.is_available():
        return

    def unpinned(plain):
        return lambda *arguments, pin_memory=False, **settings: plain(*arguments, **settings)  # noqa: ARG005

    for name in ("tensor", "empty", "zeros", "arange"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, device=None: self  # noqa: ARG005


_without_pinned_memory()
