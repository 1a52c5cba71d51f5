"""How a training step is executed: operation by operation, compiled, or as one captured CUDA graph.

A small network's step is hundreds of short kernels, and a fast card waits for each of them to be launched. Captured once
as a CUDA graph, the whole step (forward, backward, update) is one launch. The kernels and their order are the same, so
the numbers are.

Compiling (torch.compile) fuses operations; its numbers differ in their last digits. It takes half a minute beforehand.
On a CPU it does not pay: measured in docs/measurements/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resprobe.distributed import team
from resprobe.errors import UsageError, not_accepted

STEPS = ("auto", "eager", "graph", "compile")
_WARM_UP = 3
"""Steps before the capture, in which libraries choose algorithms and reserve memory."""

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images and labels → mean loss and count of wrong images, with the weights updated."""


def resolve_step(name: str, device: torch.device, *, recompute: bool = False) -> str:
    """ "eager", "graph" or "compile". "auto" is a graph on CUDA, in one process that keeps its activations; else eager.

    Raises `UsageError` for what is not there or does not go together.
    """
    if name not in STEPS:
        raise not_accepted("step", name, STEPS)
    alone = team().size == 1
    if name == "auto":
        return "graph" if device.type == "cuda" and alone and not recompute else "eager"
    if name == "graph" and device.type != "cuda":
        raise UsageError(f"step (='graph') needs a CUDA device; accepted on {device.type}: auto, eager, compile")
    if name == "graph" and (recompute or not alone):
        why = "recompute" if recompute else "several processes"
        raise UsageError(f"step (='graph') does not go with {why}; accepted: auto, eager, compile")
    return name


class CapturedStep:
    """`update` as one CUDA graph, called like it. The tensors it gives are overwritten by the next call.

    Capturing trains nothing: weights, statistics, velocities and random numbers are as before. Everything `update` works
    on must keep its place in memory: values are copied into tensors, never tensors put in their stead.
    """

    def __init__(
        self, update: Update, images: Tensor, labels: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer
    ):
        self.images, self.labels = images.clone(), labels.clone()

        def work() -> tuple[Tensor, Tensor]:
            return update(self.images, self.labels)

        with _undone(network, optimizer):
            _warm_up(work, images.device)
        self._replay, self._given = _record(work, images.device)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self._replay()
        return self._given


def _warm_up(work: Callable[[], object], device: torch.device) -> None:
    # On a stream of its own, as capturing wants it: what the default stream holds must not be waited for later.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)


def _record(
    work: Callable[[], tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """What replays `work`, and the tensors in which each replay leaves what `work` gives."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        given = work()

    def replay() -> None:
        with torch.cuda.device(device):  # which need not be the process's first
            graph.replay()

    return replay, given


@contextmanager
def _undone(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts back, in place, what training steps change. Velocities that were not there yet are zero afterwards, from
    which the first step goes on as from none."""
    tensors = [*network.parameters(), *network.buffers()]
    velocities = {p: state["momentum_buffer"] for p, state in optimizer.state.items() if _has_velocity(state)}
    kept = [(tensor, tensor.detach().clone()) for tensor in (*tensors, *velocities.values())]
    device = tensors[0].device
    random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
            for parameter, state in optimizer.state.items():
                if _has_velocity(state) and parameter not in velocities:
                    state["momentum_buffer"].zero_()
        if random is not None:
            torch.cuda.set_rng_state(random, device)


def _has_velocity(state: dict) -> bool:
    return state.get("momentum_buffer") is not None
