"""Activation checkpointing: layers are computed again in the backward pass instead of being kept from the forward pass.

The 1202-layer network of §4.2 keeps some 15 GiB of activations at a batch of 128. With each stage cut into √n segments
of its n blocks, only what enters a segment is kept, and one segment at a time is computed again: a few hundred MiB, for
about a third more time. The numbers stay the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resprobe.blocks import Block
from resprobe.errors import UsageError
from resprobe.modes import OtherForwards


@contextmanager
def recomputing(network: nn.Module) -> Iterator[None]:
    """For the length of a `with` block, the stages of `network` keep no activations for the backward pass.

    The backward pass must be inside the `with` block too. A stage is an `nn.Sequential` of blocks. Hooks inside the
    stages are called twice, so probes do not go with this. Raises `UsageError` if there is no stage.
    """
    stages = [module for module in network.modules() if isinstance(module, nn.Sequential) and _is_stage(module)]
    if not stages:
        raise UsageError(f"recompute needs stages (nn.Sequential of blocks), and {type(network).__name__} has none")
    with OtherForwards((stage, partial(_in_segments, stage)) for stage in stages):
        yield


def _is_stage(module: nn.Sequential) -> bool:
    return len(module) > 0 and all(isinstance(block, Block) for block in module)


def _in_segments(stage: nn.Sequential, x: Tensor) -> Tensor:
    length = math.isqrt(len(stage) - 1) + 1  # √n rounded up: the least sum of segments kept and blocks in one
    for start in range(0, len(stage), length):
        segment = stage[start : start + length]
        x = checkpoint(segment, x, use_reentrant=False, context_fn=partial(_contexts, segment))
    return x


def _contexts(segment: nn.Sequential) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _buffers_kept(segment)


@contextmanager
def _buffers_kept(segment: nn.Sequential) -> Iterator[None]:
    """The second pass over a batch works on copies of the buffers: running statistics must not move once more."""
    kept = [(module, module._buffers) for module in segment.modules() if module._buffers]
    for module, buffers in kept:
        module._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers = buffers
