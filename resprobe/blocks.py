"""Building blocks (Fig. 2, Fig. 5): `activation(branch(x) + shortcut(x))`, or `activation(branch(x))` when plain.

Nothing works in place and every module is used once per pass, so that hooks see what happens.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from resprobe.errors import UsageError, blamed, check_whole, one_line, short
from resprobe.layers import Layers
from resprobe.modes import evaluation_mode
from resprobe.randomness import keeping_random_state
from resprobe.registry import Registry
from resprobe.shortcuts import SHORTCUTS

BLOCKS: Registry[type[Block]] = Registry("block")


class Block(nn.Module):
    """One building block. A subclass says what its branch is and how many weighted layers that has.

    Input [N, in_channels, H, W], output [N, width · expansion, ⌈H/stride⌉, ⌈W/stride⌉].

    A block of one's own:

        @rp.register_block("my-block")
        class MyBlock(rp.Block):
            weighted_layers = 2

            def make_branch(self, in_channels, width, stride, layers):
                return nn.Sequential(
                    layers.conv(in_channels, width, kernel=3, stride=stride), layers.norm(width), nn.ReLU(),
                    layers.conv(width, width * self.expansion, kernel=3), layers.norm(width * self.expansion),
                )
    """

    weighted_layers: ClassVar[int] = 2
    """Weighted layers on the longest path through the branch, as the paper counts depth."""

    expansion: ClassVar[int] = 1
    """Output channels per unit of `width`."""

    def __init__(
        self, in_channels: int, width: int, stride: int = 1, *, shortcut: str = "none", layers: Layers = Layers()
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, width * self.expansion, stride
        called, strategy = f"{type(self).__name__}: make_branch", SHORTCUTS[shortcut]
        _check_takes(called, self.make_branch, "(in_channels, width, stride, layers)")
        self.branch = self.make_branch(in_channels, width, stride, layers)
        if not isinstance(self.branch, nn.Module):
            raise UsageError(f"{called} must return a torch.nn.Module, not {short(self.branch)}")
        called = f"shortcut {shortcut!r}"
        _check_takes(called, strategy, "(in_channels, out_channels, stride, layers)")
        self.shortcut = strategy(in_channels, self.out_channels, stride, layers)
        if not isinstance(
            self.shortcut, nn.Module | None
        ):  # what it learned would be neither counted, trained nor kept
            raise UsageError(f"{called} must return a torch.nn.Module, or None, not {short(self.shortcut)}")
        # A gated shortcut scales the branch too; it says so here, and the sum below stays the sum.
        gate_branch = getattr(self.shortcut, "gate_branch", None)
        if gate_branch is not None:
            self.branch = gate_branch(self.branch)
        self.activation = self.make_activation()

    def make_branch(self, in_channels: int, width: int, stride: int, layers: Layers) -> nn.Module:
        """The residual function F: [N, in_channels, H, W] → [N, width · expansion, ⌈H/stride⌉, ⌈W/stride⌉]."""
        raise NotImplementedError(f"{type(self).__name__} must define make_branch(in_channels, width, stride, layers)")

    def make_activation(self) -> nn.Module:
        """The nonlinearity after the addition. ReLU in the paper."""
        return nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.shortcut is not None:
            carried = self.shortcut(x)
            if carried.shape != out.shape:  # else a shape of 1 would be broadcast in silence
                raise UsageError(
                    f"{type(self).__name__}: the branch gives {tuple(out.shape)} but the shortcut "
                    f"{tuple(carried.shape)} for an input of {tuple(x.shape)}; they must be equal"
                )
            out = out + carried
        return self.activation(out)

    def check_shapes(self) -> None:
        """Sends a small image through, and gradients back, and raises `UsageError` if that fails or what comes out is not what
        was promised."""
        size = 4 * self.stride
        parameter = next(self.parameters(), torch.empty(0))
        drawn = torch.randn(2, self.in_channels, size, size, generator=torch.Generator().manual_seed(0), device="cpu")
        drawn = drawn.to(parameter.device, parameter.dtype)
        image = drawn.clone()
        failing = blamed(f"{type(self).__name__} fails on an input of {tuple(image.shape)}")
        with failing, torch.no_grad(), keeping_random_state(self), evaluation_mode(self):
            out = self(image)
        if not image.is_meta and not torch.equal(image, drawn):
            raise UsageError(
                f"{type(self).__name__} changes what it is given: {self._in_place() or 'its forward pass'} works in place, and "
                + ("what comes before" if self.shortcut is None else "the shortcut")
                + " needs the same"
            )
        expected = (2, self.out_channels, size // self.stride, size // self.stride)
        if tuple(out.shape) != expected:
            raise UsageError(
                f"{type(self).__name__} turns an input of {tuple(image.shape)} into {tuple(out.shape)}; "
                f"expected {expected} (width · expansion = {self.out_channels} channels, stride {self.stride})"
            )
        self._check_backward(image)
        self._compare_depth()

    def _check_backward(self, image: Tensor) -> None:
        """Tries on a copy, as it is trained, whether gradients come back."""
        if torch.is_inference_mode_enabled():
            return
        try:
            trial = copy.deepcopy(self).train()
        except Exception:  # a stranger's module may not allow it
            return
        try:
            with torch.enable_grad(), keeping_random_state(self):
                out = trial(image.requires_grad_().tanh())  # in a network, what comes in is itself computed, and kept
                if out.requires_grad and out.is_floating_point():
                    out.sum().backward()
        except Exception as error:
            why = f"{self._in_place()} works in place" if self._in_place() else one_line(error, named=True)
            raise UsageError(f"{type(self).__name__} fails when it is trained: {why}") from error

    def _in_place(self) -> str:
        """The modules that say that they work in place, by their names."""
        return ", ".join(name for name, module in self.named_modules() if getattr(module, "inplace", False))

    def _compare_depth(self) -> None:
        """Warns if a branch that is a plain sequence of layers has other than `weighted_layers` weighted ones."""
        parts = list(self.branch) if isinstance(self.branch, nn.Sequential) else []
        weighted = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in parts)
        # A stranger's module may hold more.
        ours = all(type(part).__module__.startswith(("torch.nn.", "resprobe.")) for part in parts)
        if ours and not any(list(part.children()) for part in parts) and weighted not in (0, self.weighted_layers):
            _note_depth(type(self), weighted)


def _check_takes(called: str, make: Callable[..., object], arguments: str) -> None:
    try:
        inspect.signature(make).bind(*arguments.split(","))
    except TypeError:
        raise UsageError(f"{called} must take {arguments}, and takes {inspect.signature(make)}") from None


@functools.cache
def _note_depth(block: type[Block], weighted: int) -> None:
    """Warns once a class: a study builds hundreds of its blocks."""
    warnings.warn(
        f"{block.__name__}: weighted_layers = {block.weighted_layers}, but its branch has {weighted}; depths are counted by "
        "what it says"
    )


def register_block(name: str):
    """Decorator that files a subclass of `Block` under `name`, so that networks and studies accept it."""

    file = BLOCKS.register(name)  # a name that is none is said before the class is looked at

    def file_under_name(cls: type[Block]) -> type[Block]:
        if not (isinstance(cls, type) and issubclass(cls, Block)):
            raise UsageError(f"block (={name!r}) must be a subclass of resprobe.Block, not {cls!r}")
        check_whole(f"block (={name!r}): weighted_layers", cls.weighted_layers, 1)
        return file(cls)

    return file_under_name


@register_block("basic")
class BasicBlock(Block):
    """Two 3×3 convolutions (Fig. 5 left). The first takes the stride."""

    weighted_layers = 2

    def make_branch(self, in_channels: int, width: int, stride: int, layers: Layers) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                conv1=layers.conv(in_channels, width, kernel=3, stride=stride),
                norm1=layers.norm(width),
                relu1=nn.ReLU(),
                conv2=layers.conv(width, width, kernel=3),
                norm2=layers.norm(width),
            )
        )


@register_block("bottleneck")
class BottleneckBlock(Block):
    """1×1 that narrows, 3×3, 1×1 that restores (Fig. 5 right). `layers.stride_in` says which takes the stride."""

    weighted_layers = 3
    expansion = 4

    def make_branch(self, in_channels: int, width: int, stride: int, layers: Layers) -> nn.Module:
        stride_1x1, stride_3x3 = (stride, 1) if layers.stride_in == "1x1" else (1, stride)
        return nn.Sequential(
            OrderedDict(
                conv1=layers.conv(in_channels, width, kernel=1, stride=stride_1x1),
                norm1=layers.norm(width),
                relu1=nn.ReLU(),
                conv2=layers.conv(width, width, kernel=3, stride=stride_3x3),
                norm2=layers.norm(width),
                relu2=nn.ReLU(),
                conv3=layers.conv(width, width * self.expansion, kernel=1),
                norm3=layers.norm(width * self.expansion),
            )
        )


@register_block("single")
class SingleLayerBlock(Block):
    """One 3×3 convolution: the case y = W₁x + x, for which §3.2 observed no advantage."""

    weighted_layers = 1

    def make_branch(self, in_channels: int, width: int, stride: int, layers: Layers) -> nn.Module:
        return nn.Sequential(
            OrderedDict(conv1=layers.conv(in_channels, width, kernel=3, stride=stride), norm1=layers.norm(width))
        )
