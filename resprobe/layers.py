"""The layers that blocks are made of, so that a block need not know how its network is normalized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resprobe.modes import OtherForwards
from resprobe.normalization import NORMALIZATIONS

_VECTOR = 16
"""Channels that a processor computes at a time, at most."""


class Subsampling1x1(nn.Conv2d):
    """A strided 1×1 convolution that takes the pixels it sees first, and convolves them without a stride: the same numbers.

    On a CPU alone, where oneDNN gets the gradient of the weights wrong, and writes beyond its memory, if the channels are
    last in memory and fewer than a vector has (uxlfoundation/oneDNN#6035).
    """

    def forward(self, x: Tensor) -> Tensor:
        return _subsampled(self, x) if x.device.type == "cpu" else super().forward(x)


def subsampling(network: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """The plain `Conv2d`s of `network` with the same fault, each with what to call in the place of its `forward`."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _has_the_fault(module):
            yield module, partial(_subsampled, module)


def safe_subsampling(network: nn.Module, device: torch.device) -> OtherForwards:
    """What to compute gradients under, again and again: on a CPU, convolutions of `network` with that fault are computed the
    other way."""
    return OtherForwards(subsampling(network) if device.type == "cpu" else ())


def _has_the_fault(conv: nn.Conv2d) -> bool:
    unpadded = conv.padding in ((0, 0), "valid")
    strided = conv.kernel_size == (1, 1) and conv.stride != (1, 1)
    return strided and unpadded and conv.groups == 1 and conv.in_channels < _VECTOR


def _subsampled(conv: nn.Conv2d, x: Tensor) -> Tensor:
    down, right = conv.stride
    return F.conv2d(x[..., ::down, ::right], conv.weight, conv.bias)


@dataclass(frozen=True)
class Layers:
    """Makes convolutions and normalizations in the manner of one network.

    `norm` names a registered normalization. `stride_in` says which convolution of a bottleneck takes the stride:
    "1x1" is the paper's (and the authors' released models'), "3x3" that of torchvision and fb.resnet.torch ("v1.5").
    """

    norm_name: str = "batch"
    stride_in: str = "1x1"

    def conv(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
        """A convolution that keeps height and width but for its stride. It has a bias only if nothing normalizes."""
        bias = self.norm_name == "none"
        kind = Subsampling1x1 if kernel == 1 < stride and in_channels < _VECTOR else nn.Conv2d
        return kind(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)

    def norm(self, channels: int) -> nn.Module:
        """The network's normalization for `channels` feature maps."""
        return NORMALIZATIONS[self.norm_name](channels)
