"""A stand-in for Apple's GPU: tensors on the CPU that say they are on device mps, and refuse float64 as it does."""

import torch
from torch.utils._pytree import tree_map


class Apple(torch.Tensor):
    """Wraps a tensor. What is computed of it stays there, but for what is asked for on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        if inner.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        about = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **about, device=torch.device("mps:0"))
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), named=None):
        named = dict(named or {})
        to_cpu = "device" in named and torch.device(named["device"] or "mps").type == "cpu"
        if "device" in named:
            named["device"] = torch.device("cpu")
        arguments, named = tree_map(lambda value: getattr(value, "inner", value), (arguments, named))
        found = operation(*arguments, **named)
        return (
            found if to_cpu else tree_map(lambda value: cls(value) if isinstance(value, torch.Tensor) else value, found)
        )
