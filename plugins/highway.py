"""A gated shortcut, as an example of a plugin: Highway Networks (Srivastava, Greff and Schmidhuber 2015).

    python -m studies.degradation --shortcut highway

A highway layer is y = T(x) · H(x) + (1 − T(x)) · x, where the transform gate T = σ(W x + b) decides how much of the
branch H is used and 1 − T, the carry gate, how much of the input is carried on. §1 and §2 of the residual paper contrast
its own parameter-free, never closed shortcuts with these. The bias b starts negative, so that a new network carries.

What this file shows: a shortcut is a callable `(in_channels, out_channels, stride, layers)` that returns a module; one
that also scales the branch offers `gate_branch`; one whose parameters need a start of their own offers `initialize`.
"""

from __future__ import annotations

from torch import Tensor, nn

import resprobe as rp

CARRY_BIAS = -2.0
"""The initial b: a new gate lets σ(−2) ≈ 12 % of the branch through and carries 88 % of the input."""


class Gate(nn.Module):
    """T(x): a 1×1 convolution with bias and a sigmoid, [N, in_channels, H, W] → [N, out_channels, ⌈H/s⌉, ⌈W/s⌉]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        # Not from `layers.conv`: a gate has its bias whatever normalizes the network.
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.conv(x))

    def twin(self) -> Gate:
        """A second module on the same weights: each is used once a pass, so that hooks on either see one call."""
        other = Gate(self.conv.in_channels, self.conv.out_channels, self.conv.stride[0])
        other.conv.weight, other.conv.bias = self.conv.weight, self.conv.bias
        return other

    def initialize(self) -> None:
        """Called after the network's own initialization, which would set the bias to zero."""
        nn.init.constant_(self.conv.bias, CARRY_BIAS)


class GatedBranch(nn.Module):
    """T(x) · H(x)."""

    def __init__(self, branch: nn.Module, gate: Gate):
        super().__init__()
        self.branch, self.gate = branch, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) * self.gate(x)


class HighwayShortcut(nn.Module):
    """(1 − T(x)) · carry(x), where `carry` is option A: the gate is all that is added to the paper's network.

    The gate is computed for the branch and for the shortcut, one small convolution each, so that a block remains the
    sum of two modules that probes can tell apart.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, layers: rp.Layers):
        super().__init__()
        self.carry = rp.SHORTCUTS["A"](in_channels, out_channels, stride, layers)
        self.gate = Gate(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.gate(x)) * self.carry(x)

    def gate_branch(self, branch: nn.Module) -> nn.Module:
        """What a block puts in its branch's place."""
        return GatedBranch(branch, self.gate.twin())


rp.register_shortcut("highway")(HighwayShortcut)
