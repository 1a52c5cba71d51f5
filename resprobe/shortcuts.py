"""Shortcut strategies (§3.3, §4.1): how a block's input reaches its output.

A strategy is filed under a name and called with `(in_channels, out_channels, stride, layers)`. It returns the module
that carries the input across, or None for a plain block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from resprobe.errors import UsageError
from resprobe.layers import Layers
from resprobe.registry import Registry

SHORTCUTS: Registry[Callable[[int, int, int, Layers], nn.Module | None]] = Registry("shortcut")
register_shortcut = SHORTCUTS.register


class ZeroPadding(nn.Module):
    """Option A where the shape changes: subsample by the stride, pad the new channels with zeros. No parameters.

    Input [N, in_channels, H, W], output [N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]. Position (i·stride, j·stride) is
    kept, the same one that a 1×1 convolution of that stride sees; the gradient reaches kept positions only. Any
    out_channels ≥ in_channels will do. Zeros trail, as in the authors' Caffe-like concatenation; `centred` puts half
    of them on either side, which is the same network up to a permutation of channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, centred: bool = False):
        super().__init__()
        if out_channels < in_channels:
            raise UsageError(
                f"shortcut 'A' cannot carry in_channels (={in_channels}) into out_channels (={out_channels}): "
                "padding with zeros only adds channels; use shortcut 'B' or 'C'"
            )
        self.stride = stride
        added = out_channels - in_channels
        self.before = added // 2 if centred else 0
        self.after = added - self.before

    def forward(self, x: Tensor) -> Tensor:
        # Where channels are last in memory: so they are in the gradient of a pool, and in that of a slice they never are.
        # On Apple's GPUs that gradient is wrong (pytorch#175190).
        if x.stride(1) == 1 and x.device.type != "mps":
            kept = F.avg_pool2d(x, kernel_size=1, stride=self.stride)
        else:
            kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, zeros_before={self.before}, zeros_after={self.after}"


def projection(in_channels: int, out_channels: int, stride: int, layers: Layers) -> nn.Module:
    """The projection W_s of Eqn. (2): a 1×1 convolution of the block's stride, then normalization (§3.4)."""
    return nn.Sequential(layers.conv(in_channels, out_channels, kernel=1, stride=stride), layers.norm(out_channels))


def _same_shape(in_channels: int, out_channels: int, stride: int) -> bool:
    return in_channels == out_channels and stride == 1


@register_shortcut("none")
def none(in_channels: int, out_channels: int, stride: int, layers: Layers) -> None:
    """No shortcut: a plain network."""


@register_shortcut("A")
def option_a(in_channels: int, out_channels: int, stride: int, layers: Layers) -> nn.Module:
    """Identity; zero padding, zeros trailing, where the shape changes. Parameter-free (§3.3 A)."""
    same = _same_shape(in_channels, out_channels, stride)
    return nn.Identity() if same else ZeroPadding(in_channels, out_channels, stride)


@register_shortcut("A-centred")
def option_a_centred(in_channels: int, out_channels: int, stride: int, layers: Layers) -> nn.Module:
    """Option A with the zeros on both sides, as in widely used published weights."""
    same = _same_shape(in_channels, out_channels, stride)
    return nn.Identity() if same else ZeroPadding(in_channels, out_channels, stride, centred=True)


@register_shortcut("B")
def option_b(in_channels: int, out_channels: int, stride: int, layers: Layers) -> nn.Module:
    """Identity; a projection where the shape changes (§3.3 B)."""
    same = _same_shape(in_channels, out_channels, stride)
    return nn.Identity() if same else projection(in_channels, out_channels, stride, layers)


@register_shortcut("C")
def option_c(in_channels: int, out_channels: int, stride: int, layers: Layers) -> nn.Module:
    """A projection everywhere (§4.1 C)."""
    return projection(in_channels, out_channels, stride, layers)
