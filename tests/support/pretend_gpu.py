"""A GPU that is not there: tensors that live on the CPU, say that they are on `cuda:0`, and refuse what a GPU refuses.

`with pretend_gpu():` makes `device="cuda"` possible in everything that foveate calls. Tensors there have their data in
memory of the CPU, and every operation that meets one on the CPU beside one on the GPU raises, as PyTorch does, unless
the other is a single number or an index. Kernels are those of the CPU: what is tested is where tensors are.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

GPU = torch.device("cuda:0")
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
    torch.ops.aten._unsafe_index.Tensor,
}


class OnGpu(torch.Tensor):
    """A tensor whose data, `held`, are on the CPU."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        assert not isinstance(held, OnGpu)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    device = property(lambda _: GPU)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)

    def __repr__(self):
        return f"OnGpu({self.held!r})"

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def data_ptr(self):
        return self.held.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = OnGpu(self.held.detach().clone(), self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.pop("device", None)
        if func not in _COPIES:
            _same_device(func, args, kwargs)
        own = tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs))
        if func is torch.ops.aten.histc.default:  # of integers, which it counts on GPUs alone
            return OnGpu(func(own[0][0].float(), *own[0][1:], **own[1]).to(own[0][0].dtype))
        out = func(*own[0], **own[1])
        if not func._schema.returns:
            return None
        in_backward = torch._C._current_graph_task_id() != -1  # where autograd believes that all is on the CPU
        if func is torch.ops.aten._to_copy.default and device is not None and not in_backward:
            return out
        if func is torch.ops.aten.copy_.default:
            return args[0]
        named = func._schema.name.split("::")[1]
        if named.endswith("_") and not named.startswith("_foreach"):  # in place: the very tensor
            return args[0]
        return tree_map(_wrap, out)


def _wrap(value):
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def _same_device(func, args, kwargs):
    tensors = []
    args = args[:1] + args[2:] if func in _INDEXED else args
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    for tensor in tensors:
        if not isinstance(tensor, OnGpu) and tensor.dim() > 0:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")


class _Factories(TorchFunctionMode):
    """`device="cuda"` in calls that make or move tensors."""

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "tolist" and isinstance(args[0], OnGpu):
            return args[0].held.tolist()
        if name == "cpu":
            return _moved(args[0], torch.device("cpu"))
        if name == "to":
            return _to(*args, **kwargs)
        if name == "backward":  # backward functions in Python make tensors, too
            with self:
                one = torch.ones((), dtype=args[0].dtype)
                if not isinstance(args[0], OnGpu):
                    return _engine_run_backward((args[0],), (one,), False, False, (), True, accumulate_grad=True)
                with _Zeros():
                    return _engine_run_backward((args[0],), (OnGpu(one),), False, False, (), True, accumulate_grad=True)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cpu")
            made = func(*args, **kwargs)
            wanted = made.requires_grad
            return OnGpu(made.detach(), wanted)
        return func(*args, **kwargs)


def _to(tensor, *rest, device=None, dtype=None, copy=False, **_):
    for word in rest:
        if isinstance(word, torch.Tensor):
            device, dtype = word.device, word.dtype
        elif isinstance(word, torch.dtype):
            dtype = word
        elif isinstance(word, str | torch.device):
            device = word
    return _moved(tensor, device, dtype, copy)


def _moved(tensor, device=None, dtype=None, copy=False):
    is_there, dtype = isinstance(tensor, OnGpu), tensor.dtype if dtype is None else dtype
    to_gpu = is_there if device is None else torch.device(device).type == "cuda"
    if to_gpu == is_there:
        return tensor if dtype == tensor.dtype and not copy else _Cast.apply(tensor, dtype)
    return (_Up if to_gpu else _Down).apply(tensor, dtype)


class _Zeros(TorchDispatchMode):
    """Autograd makes zeros for what has no gradient, by its own idea of where that is."""

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return OnGpu(out) if func is torch.ops.aten.zeros.default else out


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dtype):
        ctx.dtype = tensor.dtype
        return torch.ops.aten._to_copy(tensor, dtype=dtype)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.aten._to_copy(grad, dtype=ctx.dtype), None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dtype):
        ctx.dtype = tensor.dtype
        return OnGpu(torch.ops.aten._to_copy(tensor.detach(), dtype=dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad.held.to(ctx.dtype), None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dtype):
        ctx.dtype = tensor.dtype
        return torch.ops.aten._to_copy(tensor.held, dtype=dtype)

    @staticmethod
    def backward(ctx, grad):
        return OnGpu(grad.to(ctx.dtype)), None


@contextmanager
def pretend_gpu(patch):
    """`patch`: pytest's monkeypatch."""
    from foveate.models.attention import kernels

    def on_the_gpu(query, key, value, forest, scale, window=None, sinks=None):
        """In the place of FlexAttention, which other tests hold equal to the reference."""
        assert all(isinstance(tensor, OnGpu) for tensor in (query, key, value))
        options = kernels.AttentionOptions(window, None if sinks is None else sinks.to("cpu"))
        rows = (tensor.to("cpu") for tensor in (query, key, value))
        return kernels.parts_attention(*rows, forest, scale, options).to("cuda")

    patch.setattr(kernels, "flex_forest_attention", on_the_gpu)
    patch.setattr(torch, "inference_mode", torch.no_grad)  # which such tensors do not know
    patch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    patch.setattr(torch.cuda, "mem_get_info", lambda _=None: (1 << 30, 1 << 31))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Factories():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
