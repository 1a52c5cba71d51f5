"""Probes measure a network while they are attached to it, and leave no trace: no hook, no stored activation, and not
one bit of the numbers of the run they watch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from resprobe.errors import UsageError
from resprobe.registry import Registry

if TYPE_CHECKING:
    import pandas

Schedule = Callable[[int], bool]
"""When to measure: iteration (from 0) → measure or not."""


def every(iterations: int, *, offset: int = 0) -> Schedule:
    """Every so many iterations."""
    if not (isinstance(iterations, int) and iterations >= 1):
        raise UsageError(f"every: iterations (={iterations!r}) must be a whole number ≥ 1")
    return lambda iteration: iteration >= offset and (iteration - offset) % iterations == 0


def logarithmic(per_decade: int = 10) -> Schedule:
    """At 0 and then `per_decade` times between each power of ten and the next."""
    if not (isinstance(per_decade, int) and per_decade >= 1):
        raise UsageError(f"logarithmic: per_decade (={per_decade!r}) must be a whole number ≥ 1")
    points = {0} | {round(10 ** (step / per_decade)) for step in range(9 * per_decade)}
    return points.__contains__


def at(iterations: Iterable[int]) -> Schedule:
    """At the given iterations."""
    return frozenset(iterations).__contains__


class Probe:
    """A measurement. A subclass adds hooks in `hook`, reduces what they see on the device, and gives a `table`.

    During training a probe is attached for the iterations of its `schedule` alone; `after_backward` is called there
    when gradients are complete and before the optimizer uses them.
    """

    name: ClassVar[str] = ""
    schedule: Schedule = staticmethod(every(1))  # type: ignore[assignment]

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def hook(self, network: nn.Module) -> Iterable[RemovableHandle]:
        """Registers hooks on `network` and returns their handles; raises `UsageError` for what it cannot measure."""
        return ()

    def after_backward(self, network: nn.Module, iteration: int) -> None:
        """Called in training at scheduled iterations, with `.grad` filled and weights not yet changed."""

    def table(self) -> pandas.DataFrame:
        """What was measured, tidy: one observation a row."""
        raise NotImplementedError

    def state(self) -> Any:
        """What a checkpoint must keep for the table to go on after a resume: tensors and plain data."""
        return None

    def load_state(self, state: Any) -> None:
        """Takes back what `state` gave."""

    def attach(self, network: nn.Module) -> None:
        """Attaches to `network`; nothing is left attached if that fails half-way."""
        if self._handles:
            raise UsageError(f"probe {self.name or type(self).__name__} is attached already; detach it first")
        try:
            for handle in self.hook(network):
                self._handles.append(handle)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Removes every hook. What was measured stays."""
        while self._handles:
            self._handles.pop().remove()


PROBES: Registry[Callable[[], Probe]] = Registry("probe")
register_probe = PROBES.register


def make_probe(probe: str | Probe) -> Probe:
    """The probe itself, or a new one of the registered name."""
    return probe if isinstance(probe, Probe) else PROBES[probe]()


@contextmanager
def attach(network: nn.Module, *probes: str | Probe) -> Iterator[Any]:
    """Attaches probes for a `with` block: gives the probe, or a tuple of them if there are several."""
    if not probes:
        raise UsageError("attach needs at least one probe: a registered name or a Probe")
    made = tuple(make_probe(probe) for probe in probes)
    try:
        for probe in made:
            probe.attach(network)
        yield made[0] if len(made) == 1 else made
    finally:
        for probe in made:
            probe.detach()
