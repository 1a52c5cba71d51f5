"""How a training step is executed: operation by operation, compiled, or as one captured CUDA graph.

A small network's step is hundreds of short kernels, and a fast card waits for each of them to be launched. Captured once
as a CUDA graph, the whole step (augmentation, forward, backward, update) is one launch. The kernels and their order are
the same, so the numbers are.

Compiling (torch.compile) fuses operations; its numbers differ in their last digits. A network compiled as a whole takes
a quarter of a minute or more before its first step, and every depth anew; compiled block by block, each kind of block is compiled
once in a process, whatever the depth. On a CPU neither pays: measured in docs/measurements/.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from resprobe.blocks import Block
from resprobe.distributed import team
from resprobe.errors import UsageError, not_accepted
from resprobe.modes import OtherForwards
from resprobe.randomness import host_random_bytes, keeping_random_state

STEPS = ("auto", "eager", "graph", "compile", "compile-blocks")
_KINDS_OF_BLOCKS = 256
"""How many kinds of block a process compiles; Figure 6 has more than torch's own limit of eight."""
_WARM_UP = 3
"""Steps before the capture, in which libraries choose algorithms and reserve memory."""

Update = Callable[..., tuple[Tensor, Tensor]]
"""Tensors drawn for a batch → mean loss and count of wrong images, with the weights updated."""


def resolve_step(name: str, device: torch.device, *, recompute: bool = False) -> str:
    """One of `STEPS` but "auto", which is a graph on CUDA, in one process that keeps its activations, and else eager.

    Raises `UsageError` for what is not there or does not go together.
    """
    if name not in STEPS:
        raise not_accepted("step", name, STEPS)
    alone = team().size == 1
    if name == "auto":
        return "graph" if device.type == "cuda" and alone and not recompute else "eager"
    others = ", ".join(step for step in STEPS if step != "graph")
    if name == "graph" and device.type != "cuda":
        raise UsageError(f"step (='graph') needs a CUDA device; accepted on {device.type}: {others}")
    if name == "graph" and (recompute or not alone):
        why = "recompute" if recompute else "several processes"
        raise UsageError(f"step (='graph') does not go with {why}; accepted: {others}")
    return name


class CompiledBlocks:
    """The blocks of `network`, each compiled by itself: blocks of one kind (same code, shapes and strides) share what was
    compiled for the first of them, in this network and in others of the process.

    Raises `UsageError` if the network has no blocks.
    """

    def __init__(self, network: nn.Module):
        blocks = [module for module in network.modules() if isinstance(module, Block)]
        if not blocks:
            raise UsageError(
                f"step (='compile-blocks') needs a network of blocks, and {type(network).__name__} has none; "
                "accepted: auto, eager, compile"
            )
        # Else sizes that differ between kinds would become variables, and what is compiled slower for it.
        self.compiled = OtherForwards((block, torch.compile(block.forward, dynamic=False)) for block in blocks)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """For the length of a `with` block, the network's blocks run compiled."""
        from torch._dynamo import config  # seconds to import, and there already where something is compiled

        with self.compiled, config.patch(recompile_limit=_KINDS_OF_BLOCKS), warnings.catch_warnings():
            # Dynamo's own look at what enters a block.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield


class CapturedStep:
    """`update` as one CUDA graph, called like it. The tensors it gives are overwritten by the next call.

    Capturing trains nothing: weights, statistics, velocities and random numbers are as before. Everything `update` works
    on must keep its place in memory: values are copied into tensors, never tensors put in their stead. Raises
    `RuntimeError` for what cannot be captured.
    """

    def __init__(self, update: Update, drawn: Sequence[Tensor], network: nn.Module, optimizer: torch.optim.Optimizer):
        if any(_hooks(module) for module in network.modules()):
            raise RuntimeError("hooks are attached to it, which a graph would not call")
        self.drawn = [tensor.clone() for tensor in drawn]

        def work() -> tuple[Tensor, Tensor]:
            return update(*self.drawn)

        with _without_collector():
            with _undone(network, optimizer), _repeatable(network):
                stream = _warm_up(work, self.drawn[0].device)
            self._replay, self._given = _record(work, stream)

    def __call__(self, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        for place, tensor in zip(self.drawn, drawn, strict=True):
            place.copy_(tensor)
        self._replay()
        return self._given


def _hooks(module: nn.Module) -> bool:
    """Whether anybody is to be called along with the module."""
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or backward)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keeps Python's collector out of a capture, which ends if a graph that nobody holds any more is destroyed meanwhile."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which all steps of a process are captured: matrix products keep a workspace for every stream."""
    return torch.cuda.Stream(device)


def _warm_up(work: Callable[[], object], device: torch.device) -> torch.cuda.Stream:
    # On a stream of its own, as capturing wants it: what the default stream holds must not be waited for later.
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    asked = torch.cuda.get_sync_debug_mode()
    try:
        with torch.cuda.stream(stream):
            for left in reversed(range(_WARM_UP)):
                if left == 0:  # a question to the device is named here; amid a capture it would leave torch in disorder
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # it warns that it does not know all of them
                        torch.cuda.set_sync_debug_mode("error")
                work()
    finally:
        torch.cuda.set_sync_debug_mode(asked)
        torch.cuda.current_stream(device).wait_stream(stream)
    return stream


def _record(
    work: Callable[[], tuple[Tensor, Tensor]], stream: torch.cuda.Stream
) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """What replays `work`, and the tensors in which each replay leaves what `work` gives."""
    graph, device = torch.cuda.CUDAGraph(), stream.device
    # "thread_local": a loader's thread that pins batches for later iterations meanwhile is no part of the step.
    capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    # The current stream once more: up to torch 2.11 at least, a capture that fails leaves its own in that place.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            with capture:
                figures = work()
        except Exception:
            # And the card's random numbers in the capture: no more are drawn until one succeeds. (Where the device broke it
            # off, torch takes itself to be amid a capture for good, and gives no cached memory back; training needs none.)
            with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                torch.zeros((), device=device)
            raise

    def replay() -> None:
        with torch.cuda.device(device):  # which need not be the process's first
            graph.replay()

    return replay, figures


@contextmanager
def _repeatable(network: nn.Module) -> Iterator[None]:
    """Raises `RuntimeError` where a step draws random numbers on the host, or puts tensors in the place of others: a
    graph would repeat the same numbers, and go on working on the tensors of old. Other state of the host goes unseen."""

    tensors, before = [*network.parameters(), *network.buffers()], host_random_bytes()
    yield
    if host_random_bytes() != before:
        raise RuntimeError("it draws random numbers on the host")
    after = [*network.parameters(), *network.buffers()]
    if len(after) != len(tensors) or any(one is not other for one, other in zip(after, tensors, strict=True)):
        raise RuntimeError("it puts a new tensor in the place of a parameter or buffer")


@contextmanager
def _undone(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts back after a `with` block, in place, what training steps change."""
    tensors = [*network.parameters(), *network.buffers()]
    places = [
        (kind, name, kind[name])
        for module in network.modules()
        for kind in (module._parameters, module._buffers)
        for name in kind
    ]
    velocities = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    kept = [(tensor, tensor.detach().clone()) for tensor in (*tensors, *velocities)]
    try:
        with keeping_random_state(network):
            yield
    finally:
        for kind, name, tensor in places:
            kind[name] = tensor
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
