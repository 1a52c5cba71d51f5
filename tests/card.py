"""A stand-in for a CUDA device, with which tests marked `gpu` run where there is none.

Its tensors say that they are on "cuda:0" and are computed by the CPU. What a card would refuse is refused: an operation on
tensors of both sides, and a wait for the device where none is allowed. A captured graph is the list of its operations,
computed anew at each replay in the memory of the capture, whatever Python has meanwhile put in its place. Random numbers
are drawn from a stream of the card's own.

What it cannot show: other kernels and their rounding, faults, streams that overtake each other, memory, speed; code in
other threads or processes; what a compiler makes for a card.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # imported late, its annotations would meet the generator below
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
NAME = "stand-in for a card"
_ASKED_FOR = torch.device("meta")
"""By the name of which an operation that makes a tensor on the card is known below torch's own code."""
_ANSWERS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2")
"""Whose outcome, or its size, the host waits for."""


class OnCard(Tensor):
    """A tensor of the card. `kept` is the CPU's tensor that holds its numbers."""

    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor) -> OnCard:
        # To torch's own code it is the CPU's: autograd would look for a card's threads.
        made = Tensor._make_wrapper_subclass(
            cls, kept.size(), strides=kept.stride(), storage_offset=kept.storage_offset(), dtype=kept.dtype
        )
        made.kept = kept
        return made

    @property
    def device(self) -> torch.device:
        return CARD

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: OnCard) -> None:
        self.kept = value.kept
        Tensor.data.__set__(self, value)

    def numpy(self, **_: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        _card.wait("tolist")
        return self.kept.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.kept!r} on {CARD}"

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.kept.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Graph:
    """As `torch.cuda.CUDAGraph`: the operations of a capture, and the tensors in which they left what they gave."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.places: dict[int, tuple[Tensor, Tensor | None]] = {}

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        for tensor in _tensors((args, kwargs)):
            # Memory that was there before the capture, as it was.
            self.places.setdefault(tensor.untyped_storage().data_ptr(), (tensor, tensor.clone()))
        given = _compute(func, args, kwargs)
        for tensor in _tensors(given):
            self.places.setdefault(tensor.untyped_storage().data_ptr(), (tensor, None))
        self.calls.append((func, args, kwargs, _tensors(given)))
        return given

    def end(self) -> None:
        """A capture computes nothing: memory is as it was before, and what the graph will give is not there yet."""
        for tensor, before in self.places.values():
            if before is not None:
                tensor.copy_(before)
            elif tensor.is_floating_point():
                tensor.fill_(torch.nan)
        # The tensors stay, in the calls: what they hold is the graph's own memory.
        self.places.clear()

    def replay(self) -> None:
        for func, args, kwargs, places in self.calls:
            for place, value in zip(places, _tensors(_compute(func, args, kwargs)), strict=True):
                if place.data_ptr() != value.data_ptr():  # else a view, or written in place
                    place.copy_(value)


class _Card:
    """Its random numbers, what it does when the host waits for it, and the graph that is being captured."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(2015).get_state()
        self.watch = "default"
        self.graph: _Graph | None = None
        self.stuck = False
        """Whether a capture has failed and none succeeded since: torch (2.11) then draws no random numbers there."""

    def wait(self, what: str) -> None:
        """The host waits for the card, which it may not always."""
        if self.graph is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self.watch == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        if self.watch == "warn":
            warnings.warn(f"called a synchronizing CUDA operation: {what}")

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Random numbers within a `with` block are the card's, not the host's."""
        if self.stuck and self.graph is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        host = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(host)

    @contextlib.contextmanager
    def capturing(self, graph: _Graph, **_: Any) -> Iterator[None]:
        """As `torch.cuda.graph`."""
        self.graph, before = graph, self.random
        try:
            yield
            self.stuck = False
        except BaseException:
            self.stuck = True
            raise
        finally:
            self.graph, self.random = None, before
            graph.end()

    def functions(self) -> dict[str, Any]:
        """What stands in for functions of `torch.cuda`."""
        return {
            "is_available": lambda: True,
            "_initialized": True,  # else recomputing would not ask for its random numbers
            "device_count": lambda: 1,
            "get_device_name": lambda device=None: NAME,
            "get_device_capability": lambda device=None: (8, 0),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "get_rng_state": lambda device=None: self.random.clone(),
            "set_rng_state": lambda state, device=None: setattr(self, "random", state.clone()),
            "manual_seed": lambda seed: setattr(self, "random", torch.Generator().manual_seed(seed).get_state()),
            "get_sync_debug_mode": lambda: self.watch,
            "set_sync_debug_mode": lambda mode: setattr(self, "watch", mode),
            "device": _Aside,
            "stream": _Aside,
            "Stream": _Stream,
            "current_stream": _Stream,
            "CUDAGraph": _Graph,
            "is_current_stream_capturing": lambda: self.graph is not None,
            "graph": self.capturing,
        }


_card = _Card()


class _Aside(contextlib.ContextDecorator):
    """Nothing: a choice among streams or devices, of which there is one."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class _Stream:
    def __init__(self, device: Any = None):
        self.device = CARD

    def wait_stream(self, other: _Stream) -> None:
        """All that was asked for is computed."""


class _Generator(torch.Generator):
    """Of whichever side: both draw as the CPU does."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def _map(change: Callable[[Tensor], Any], tree: Any) -> Any:
    return tree_map(lambda each: change(each) if isinstance(each, Tensor) else each, tree)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    draws = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
    with _card.drawing() if draws else contextlib.nullcontext():
        return func(*args, **kwargs)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, below autograd: on the card if anything it takes is there, or it is to make a tensor there."""
    name, tensors = func._schema.name, _tensors((args, kwargs))
    cards = [each for each in tensors if isinstance(each, OnCard)]
    made_there = kwargs.get("device") == _ASKED_FOR
    if not cards and not made_there:
        return func(*args, **kwargs)
    # A number may come from the host, and what autograd makes of no elements comes from there.
    hosts = [each for each in tensors if not isinstance(each, OnCard) and each.ndim > 0 and each.numel() > 0]
    if name == "aten::copy_":
        if hosts and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
            _card.wait(name)
        if not isinstance(args[0], OnCard):
            return func(args[0], args[1].kept)
    elif hosts and name.startswith("aten::index") and not any(each.is_floating_point() for each in hosts):
        _card.wait("indices of the host")
    elif hosts:
        found = ", ".join(str(each.device) for each in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {found}")
    elif name in _ANSWERS:
        _card.wait(name)
    if made_there:
        kwargs = kwargs | {"device": torch.device("cpu"), "pin_memory": None}
    below = _map(lambda each: each.kept if isinstance(each, OnCard) else each, (args, kwargs))
    given = (_compute if _card.graph is None else _card.graph.record)(func, *below)
    whose = {id(each.kept): each for each in cards}  # what is changed in place is given back as it came
    return _map(lambda each: whose[id(each)] if id(each) in whose else OnCard(each), given)


class _Below(TorchDispatchMode):
    """Sees what makes tensors from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Above(TorchFunctionMode):
    """Sees where tensors shall be, before torch's own code looks for a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return _moved(args[0], CARD)
        if func is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is Tensor.new_tensor and isinstance(args[0], OnCard):  # of what the host has, as those below
            return _moved(torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs), CARD)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            if func in (torch.tensor, torch.as_tensor):
                return _moved(func(*args, **kwargs | {"device": "cpu"}), CARD)
            kwargs = kwargs | {"device": _ASKED_FOR}
        return func(*args, **kwargs)


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """`Tensor.to`."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    found = tensor if device is None else _moved(tensor, device, non_blocking)
    form = {} if memory_format is None else {"memory_format": memory_format}
    return Tensor.to(found, dtype=dtype or found.dtype, copy=copy and found is tensor, **form)


def _moved(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    return tensor if tensor.device.type == device.type else _Moved.apply(tensor, non_blocking)


class _Moved(torch.autograd.Function):
    """A tensor of the other side, and its gradient of this one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, non_blocking: bool) -> Tensor:
        if _card.graph is not None or not non_blocking:
            _card.wait("copy between host and card")
        return tensor.kept.clone() if isinstance(tensor, OnCard) else OnCard(tensor.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Moved.apply(grad, False), None


def _without_gradients(mode: Any = True) -> Any:
    """In the place of `torch.inference_mode`, in which tensors of this kind cannot be made."""
    return torch.no_grad(mode) if callable(mode) else torch.no_grad() if mode else _Aside()


def _shares_identity(parameter: Tensor, moved: Tensor) -> bool:
    """A module's parameter that is moved to the other side becomes another one; any else stays the same."""
    return isinstance(parameter, OnCard) == isinstance(moved, OnCard)


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Within a `with` block, "cuda" is there. What was put on it is of no use afterwards."""
    global _card
    _card, autocast = _Card(), torch.autocast

    def of_the_cpu(kind: str, *given: Any, **named: Any) -> torch.autocast:
        """To torch's own code all is the CPU's."""
        return autocast(kind.replace("cuda", "cpu"), *given, **named)

    changes = {
        "Generator": _Generator,
        "autocast": of_the_cpu,
        "inference_mode": _without_gradients,
        "_has_compatible_shallow_copy_type": _shares_identity,
    }
    with (
        mock.patch.multiple(torch.cuda, **_card.functions()),
        mock.patch.multiple(torch, **changes),
        _Above(),
        _Below(),
    ):
        yield
