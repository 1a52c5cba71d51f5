"""One training over several processes, as `torchrun` starts them.

    torchrun --nproc-per-node 4 -m studies.imagenet --preset paper --data folder:PATH

The mini-batch stays the recipe's: each process takes an equal part of it, gradients are averaged
(DistributedDataParallel), and batch normalization sees the process's own part, as on the paper's several GPUs. The
first process alone tests, writes and speaks. A training can be resumed by another number of processes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resprobe.errors import UsageError
from resprobe.recipes import Recipe

_PATIENCE = timedelta(seconds=10)
"""How long a process that has failed waits for the others to say that they have too."""
_ASIDE: dict[str, Any] = {}
"""The group of the same processes in which they speak of failures, while others of them may be amid a step."""


@dataclass(frozen=True)
class Team:
    """The processes that train together; one of one where there is no `torchrun`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that tests, writes and speaks."""
        return self.rank == 0

    def part(self, recipe: Recipe) -> slice:
        """This process's part of a mini-batch. Raises `UsageError` where the parts would not be equal and whole."""
        count, rest = divmod(recipe.batch_size, self.size)
        if rest:
            raise UsageError(f"batch_size (={recipe.batch_size}) must be a multiple of the {self.size} processes")
        if self.size > 1 and recipe.bn_batch is not None and count % recipe.bn_batch:
            raise UsageError(
                f"bn_batch (={recipe.bn_batch}) must divide the {count} images of one of the {self.size} processes"
            )
        return slice(self.rank * count, (self.rank + 1) * count)

    def total(self, figures: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(figures)
        return figures

    def broadcast(self, say: Callable[[], Any]) -> Any:
        """What the first process's `say` gives, in every process; the others wait and do not call theirs. Errors are its own."""
        if self.size == 1:
            return say()
        # An exception of the first must not leave the others waiting for ever.
        message: list[Any] = [None, None]
        if self.first:
            try:
                message[0] = say()
            except Exception as error:
                error.known_to_all = True  # type: ignore[attr-defined]
                message[1] = error
        dist.broadcast_object_list(message, device=torch.device("cpu"))
        if message[1] is not None:
            raise message[1]
        return message[0]

    def all_met(self, what: str) -> bool:
        """Whether every process has met `what` and says so now. One that does not may be waiting for this one amid a step."""
        heard: list[Any] = [None] * self.size
        if "group" not in _ASIDE:  # others have made the processes join, and may be amid a step in their only group
            return False
        try:
            dist.all_gather_object(heard, what, group=_ASIDE["group"])
        except RuntimeError:  # somebody says nothing
            return False
        return all(each == what for each in heard)

    def parallel(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network as all processes train it: gradients averaged, buffers each process's own."""
        if self.size == 1:
            return network
        kind = nn.parallel.DistributedDataParallel
        # torch's name for it since 2.15, and before.
        names = {"forward_sync_buffers", "broadcast_buffers"} & set(inspect.signature(kind).parameters)
        own_buffers = {max(names): False}
        devices = [device.index] if device.type == "cuda" else None
        return kind(network, device_ids=devices, gradient_as_bucket_view=True, **own_buffers)


def team() -> Team:
    """The processes that have joined, or this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Team(dist.get_rank(), dist.get_world_size())
    return Team()


def join(device: torch.device) -> torch.device:
    """Joins the processes that `torchrun` started, if it did. Gives the device that is this process's own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UsageError(
                f"nproc-per-node (={os.environ.get('LOCAL_WORLD_SIZE')}) is more than the "
                f"{torch.cuda.device_count()} GPUs of this machine"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # The others wait while the first downloads, or tests a million images: longer than the half hour that is usual.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if "group" not in _ASIDE:
        _ASIDE["group"] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return device


def leave() -> None:
    """Takes leave of the other processes."""
    if dist.is_available() and dist.is_initialized():
        _ASIDE.clear()
        dist.destroy_process_group()


def gathering(network: nn.Module, last: bool) -> AbstractContextManager:
    """A context for one of several backward passes of a step: gradients are exchanged at the last."""
    if last or not isinstance(network, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return network.no_sync()
