"""Initialization of weights by name. The paper uses that of He et al. 2015 (§3.4, reference [13])."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from resprobe.registry import Registry

INITIALIZATIONS: Registry[Callable[[Tensor], object]] = Registry("init")
register_initialization = INITIALIZATIONS.register


@register_initialization("he")
def he(weight: Tensor) -> None:
    """Normal, std = √(2 / fan-in): the form He et al. 2015 derive first, for the forward signal."""
    nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")


@register_initialization("he-fan-out")
def he_fan_out(weight: Tensor) -> None:
    """Normal, std = √(2 / fan-out): the backward form, as in fb.resnet.torch and torchvision."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


@register_initialization("xavier")
def xavier(weight: Tensor) -> None:
    """Normal, std = √(2 / (fan-in + fan-out)) (Glorot and Bengio 2010)."""
    nn.init.xavier_normal_(weight)


@register_initialization("small-normal")
def small_normal(weight: Tensor) -> None:
    """Normal, std = 0.01 whatever the fan: the naive choice, under which deep unnormalized signals vanish."""
    nn.init.normal_(weight, std=0.01)


def initialize(network: nn.Module, name: str) -> None:
    """Initializes every convolution and fully connected layer of `network`; biases become zero.

    A module that needs something else (the carry bias of a gate, say) defines a method `initialize()`; it is called
    last. Weights are drawn in module order, so a plain network and its twin with parameter-free shortcuts start from
    the same weights under the same seed.
    """
    draw = INITIALIZATIONS[name]
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        own = getattr(module, "initialize", None)
        if callable(own):
            own()
