"""Normalization layers by name. The paper puts batch normalization after each convolution (§3.4)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resprobe.registry import Registry

NORMALIZATIONS: Registry[Callable[[int], nn.Module]] = Registry("norm")
register_normalization = NORMALIZATIONS.register


@register_normalization("batch")
def batch(channels: int) -> nn.Module:
    """Batch normalization with the defaults of the framework (ε = 1e-5, momentum of running statistics 0.1)."""
    return nn.BatchNorm2d(channels)


@register_normalization("none")
def none(channels: int) -> nn.Module:
    """No normalization: the control of the vanishing-gradient study (§4.1). The convolutions then carry biases."""
    return nn.Identity()


@register_normalization("group")
def group(channels: int) -> nn.Module:
    """Group normalization with groups of 8 channels (one group where 8 does not divide). Not in the paper."""
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)
