"""Whether probes change what they watch: what an iteration comes to without them, and with them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resprobe.randomness import host_random_bytes


@dataclass(frozen=True)
class Outcome:
    """What forward and backward of an iteration come to: loss, gradients by the names of their parameters, and where they
    leave the host's random numbers."""

    loss: Tensor
    gradients: dict[str, Tensor]
    random: tuple[bytes, bytes]

    @classmethod
    def of(cls, loss: Tensor, network: nn.Module) -> Outcome:
        """The outcome as it is now, after the backward pass."""
        gradients = {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}
        return cls(loss.clone(), gradients, host_random_bytes())

    def differs(self, other: Outcome, allowed: float) -> str:
        """What of the other differs by more than the part `allowed` of its size; empty where nothing does, or this one is not
        finite itself."""
        if self.random != other.random:
            return "random numbers"
        if set(self.gradients) != set(other.gradients):
            return "gradients"
        # All gradients together: some that are 0 but for rounding (a bias before a normalization) are never the same twice.
        gradients = [(self.gradients[name], other.gradients[name]) for name in self.gradients]
        for pairs in ([(self.loss, other.loss)], gradients):
            size = _norm(ours for ours, _ in pairs)
            apart = _norm(ours.double() - theirs.double() for ours, theirs in pairs)
            if math.isfinite(size) and not apart <= allowed * size:
                return "loss and gradients"
        return ""


def _norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all together, taken one by one: a large network leaves no room for copies of all."""
    each = [tensor.double().norm() for tensor in tensors]
    return torch.stack(each).norm().item() if each else 0.0
