"""Whether probes change what they watch: what an iteration comes to without them, and with them."""

from __future__ import annotations

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
        """As they are now, after the backward pass."""
        gradients = {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}
        return cls(loss.clone(), gradients, host_random_bytes())

    def differs(self, other: Outcome, allowed: float) -> str:
        """In what the other differs, by more than this part of its size; nothing where in none. Where this one is not finite
        itself nothing is said."""
        if self.random != other.random:
            return "random numbers"
        if set(self.gradients) != set(other.gradients):
            return "gradients"
        # Of all gradients together: those that are 0 but for rounding (of a bias before a normalization) are not alike twice.
        for ours, theirs in ((self.loss[None], other.loss[None]), (_joined(self.gradients), _joined(other.gradients))):
            size = ours.norm()
            if bool(size.isfinite()) and not bool((ours - theirs).norm() <= allowed * size):
                return "loss and gradients"
        return ""


def _joined(gradients: dict[str, Tensor]) -> Tensor:
    """All in one, in an order of their names."""
    parts = [gradients[name].flatten().double() for name in sorted(gradients)]
    return torch.cat(parts) if parts else torch.zeros(1)
