"""The layers that blocks are made of, so that a block need not know how its network is normalized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from resprobe.normalization import NORMALIZATIONS


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
        return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)

    def norm(self, channels: int) -> nn.Module:
        """The network's normalization for `channels` feature maps."""
        return NORMALIZATIONS[self.norm_name](channels)
