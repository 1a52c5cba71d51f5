"""Modes of a network: what looks at it, or tries it out, leaves them as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode for the length of a block; every module gets its own mode back, frozen ones included."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class OtherForwards:
    """Has modules run other functions in the place of their `forward`, for the length of each `with` block."""

    def __init__(self, forwards: Iterable[tuple[nn.Module, Callable[..., Tensor]]]):
        self._forwards = list(forwards)

    def __enter__(self) -> None:
        self._before = [vars(module).get("forward") for module, _ in self._forwards]
        for module, forward in self._forwards:
            module.forward = forward  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for (module, _), own in zip(self._forwards, self._before, strict=True):
            if own is None:
                del module.forward  # the class's again
            else:
                module.forward = own  # type: ignore[method-assign]
