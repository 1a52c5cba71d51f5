"""Probes measure a network while they are attached to it, and leave no trace: no hook, no stored activation, and not
one bit of the numbers of the run they watch."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from resprobe.blocks import Block
from resprobe.digests import as_text
from resprobe.errors import UsageError, blamed, check_whole, short
from resprobe.registry import Registry

if TYPE_CHECKING:
    import pandas

Schedule = Callable[[int], bool]
"""When to measure: iteration (from 0) → measure or not."""


def every(iterations: int, *, offset: int = 0) -> Schedule:
    """The schedule that measures every so many iterations, from `offset` on."""
    for name, value, least in (("iterations", iterations, 1), ("offset", offset, 0)):
        if not (isinstance(value, Integral) and value >= least):
            raise UsageError(f"every: {name} (={value!r}) must be a whole number ≥ {least}")
    return functools.partial(_is_one_of_every, iterations, offset)


def _is_one_of_every(iterations: int, offset: int, iteration: int) -> bool:
    return iteration >= offset and (iteration - offset) % iterations == 0


def logarithmic(per_decade: int = 10) -> Schedule:
    """The schedule that measures at 0, and `per_decade` times between each power of ten and the next.

    Points are rounded to whole iterations: below 10 several fall together.
    """
    check_whole("logarithmic: per_decade", per_decade, 1)
    points = {0} | {round(10 ** (step / per_decade)) for step in range(9 * per_decade)}
    return functools.partial(_is_among, frozenset(points))


def _is_among(points: frozenset[int], iteration: int) -> bool:
    return iteration in points


def at(iterations: Iterable[int]) -> Schedule:
    """The schedule that measures at the given iterations, counted from 0."""
    points = list(iterations) if isinstance(iterations, Iterable) else [None]
    if not all(isinstance(point, Integral) and point >= 0 for point in points):
        raise UsageError(f"at: iterations (={iterations!r}) must be a list of whole numbers ≥ 0")
    return functools.partial(_is_among, frozenset(points))


def unwrap(network: nn.Module) -> nn.Module:
    """The module itself, beneath `torch.compile` and `DistributedDataParallel`: what a probe is attached to.

    Raises `UsageError` for `DataParallel`, which runs copies of the module that live for one pass; within the network too.
    """
    while True:
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):  # made by torch.compile
            network = network._orig_mod  # type: ignore[assignment]
        else:
            break
    for name, module in network.named_modules():
        if isinstance(module, nn.DataParallel) and (not name or len(module.device_ids) > 1):
            where = f", as {name} is" if name else ""
            raise UsageError(
                f"a probe cannot be attached to DataParallel{where}, whose copies live for one pass; attach it to its .module "
                "on one device, or use DistributedDataParallel"
            )
    return network


_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))
"""Where a module keeps its hooks. By torch's own names: a stranger's attribute may end like them (`use_hooks`)."""


def without_hooks(network: nn.Module) -> dict[int, Any]:
    """The `memo` with which `copy.deepcopy` makes a copy of `network` that has no hooks.

    A memo holds what has been copied already: this one, an empty table for each table of hooks.
    """
    return {id(getattr(module, name)): OrderedDict() for module in network.modules() for name in _HOOKS}


@contextmanager
def _no_hooks_left(network: nn.Module) -> Iterator[None]:
    """Where the `with` block fails, takes off the hooks that were registered in it, whose handles nobody may have."""
    tables = [table for module in network.modules() for name, table in vars(module).items() if name in _HOOKS]
    before = [set(table) for table in tables]
    try:
        yield
    except BaseException:
        for table, known in zip(tables, before, strict=True):
            for new in set(table) - known:
                del table[new]
        raise


@functools.cache
def stage_of(name: str) -> int:
    """The n of a module's name that says `stageN` or, in torchvision's ResNets, `layerN`; 0 outside the stages."""
    match = re.search(r"(?:^|\.)(?:stage|layer)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else 0


@functools.cache
def block_classes() -> tuple[type[nn.Module], ...]:
    """What counts as a block where nothing else is named: resprobe's blocks, and those of torchvision's ResNets."""
    from torchvision.models import resnet

    return Block, resnet.BasicBlock, resnet.Bottleneck


def block_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the innermost block (see `block_classes`) that the module `name` is inside of; None if there is none.

    `modules` is `dict(network.named_modules())`; a network that is itself a block goes by "".
    """
    parts = name.split(".") if name else []
    parents = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
    return next((parent for parent in parents if isinstance(modules[parent], block_classes())), None)


@functools.cache
def normalization_classes() -> tuple[type[nn.Module], ...]:
    """Layers that normalize: torch's batch, instance, group, layer and RMS normalization, and torchvision's frozen one."""
    from torchvision.ops import FrozenBatchNorm2d

    return _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, FrozenBatchNorm2d


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or gives, in order: itself, or those in tuples, lists and mappings, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(each)


class _Uncompiled:
    """While one is held, compiled networks run their modules as written: compiled code knows no hook that comes later.

    Compiled code is kept, and used again once the last holder has let go. What was compiled may be the network, a part of
    it, something that it is a part of, or a function that calls it: of those the network knows nothing.
    """

    _holders = 0
    _stance: Any = None

    def __init__(self) -> None:
        if _Uncompiled._holders == 0:
            _Uncompiled._stance = torch.compiler.set_stance("force_eager")
            _Uncompiled._stance.__enter__()
        _Uncompiled._holders += 1

    def remove(self) -> None:
        _Uncompiled._holders -= 1
        if _Uncompiled._holders == 0:
            _Uncompiled._stance.__exit__(None, None, None)

    @staticmethod
    def needed() -> bool:
        """Whether anything may have been compiled in this process."""
        return "torch._dynamo" in sys.modules


class Probe:
    """A measurement. A subclass adds hooks in `hook`, reduces what they see on the device, and gives a `table`.

    During training a probe is attached for the iterations of its `schedule` alone; `after_backward` is called there
    when gradients are complete and before the optimizer uses them.
    """

    name: ClassVar[str] = ""
    schedule: Schedule = staticmethod(every(1))  # type: ignore[assignment]

    _made_with = ""

    def __new__(cls, *given: Any, **named: Any) -> Self:
        made = super().__new__(cls)
        made._made_with = str(as_text((given, named)))
        return made

    def __init__(self) -> None:
        self._handles: list[RemovableHandle | _Uncompiled] = []

    def identity(self) -> str:
        """What decides the table: the class with its source, what it was made with, and its schedule, as a digest."""
        parts = (as_text(type(self)), self._made_with, as_text(self.schedule))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def lacks(self) -> str:
        """What this probe lacks to watch a training, in words; empty if it can. Asked before a training begins."""
        return ""

    def hook(self, network: nn.Module) -> Iterable[RemovableHandle]:
        """Registers hooks on `network` and returns their handles; raises `UsageError` for what it cannot measure."""
        return ()

    def after_backward(self, network: nn.Module, iteration: int) -> None:
        """Called in training at scheduled iterations, with `.grad` filled and weights not yet changed."""

    def table(self) -> pandas.DataFrame:
        """What was measured, tidy: one observation a row."""
        raise NotImplementedError(f"{type(self).__name__} must define table()")

    def state(self) -> Any:
        """What a checkpoint must keep for the table to go on after a resume: tensors and plain data."""
        return None

    def load_state(self, state: Any) -> None:
        """Takes back what `state` gave."""

    def cannot_measure(self, name: str, why: str, module: nn.Module | None = None) -> UsageError:
        """The error to raise for a part of the network: its `name`, its class if the `module` is given, and `why`."""
        of_class = f" ({type(module).__name__})" if module is not None else ""
        return UsageError(f"{self.name} cannot measure {name!r}{of_class}: {why}")

    def refuse_scripted(self, name: str, module: nn.Module) -> None:
        """Raises `UsageError` for a module whose hooks are not called."""
        if isinstance(module, torch.jit.ScriptModule):
            raise self.cannot_measure(name, "scripted code calls no hooks; attach the probe before scripting", module)

    def refuse_meta(self, name: str, *measured: Tensor | None) -> None:
        """Raises `UsageError` if a weight or response of the module `name` is on device "meta"."""
        if any(tensor is not None and tensor.is_meta for tensor in measured):
            raise self.cannot_measure(name, "it is on device 'meta' and has no data")

    def attach(self, network: nn.Module) -> None:
        """Attaches to `network`, or what `unwrap` finds in it; nothing is left attached if that fails half-way.

        While a probe is attached, everything compiled in this process runs uncompiled.
        """
        called = self.name or type(self).__name__
        if not hasattr(self, "_handles"):
            raise UsageError(f"probe {called} must call super().__init__() in its own")
        if self._handles:
            raise UsageError(f"probe {called} is attached already; detach it first")
        network = unwrap(network)
        try:
            if _Uncompiled.needed():
                self._handles.append(_Uncompiled())
            with _no_hooks_left(network):
                handles = self.hook(network)
                for handle in handles if isinstance(handles, Iterable) else [handles]:
                    if isinstance(handle, Iterable) or not hasattr(handle, "remove"):
                        raise UsageError(
                            f"probe {called}: hook must return the handles it registers, not {short(handle)}"
                        )
                    self._handles.append(handle)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Removes every hook. What was measured stays."""
        while self._handles:
            self._handles.pop().remove()


def has_table(probe: Probe) -> bool:
    """Whether it defines `table`, as a class or in itself."""
    return getattr(probe.table, "__func__", None) is not Probe.table


def check_watches(probe: Probe) -> Probe:
    """The probe; raises `UsageError` for one that cannot watch a training."""
    if lacking := probe.lacks():
        raise UsageError(f"probe (={probe.name!r}) cannot watch a training without {lacking}")
    if not has_table(probe):
        raise UsageError(f"probe (={probe.name!r}) must define table(), which gives what it saw as a pandas.DataFrame")
    return probe


PROBES: Registry[Callable[[], Probe]] = Registry("probe")
register_probe = PROBES.register


def make_probe(probe: str | Probe) -> Probe:
    """The probe itself, or a new one of the registered name."""
    if not isinstance(probe, Probe | str):
        raise UsageError(f"probe (={short(probe)}) must be a registered name or a Probe")
    with blamed(f"probe (={probe!r}) cannot be made"):  # it may want arguments
        made = probe if isinstance(probe, Probe) else PROBES[probe]()
    if not isinstance(made, Probe):
        raise UsageError(f"probe (={probe!r}): what is registered must make a resprobe.Probe, not {short(made)}")
    if not callable(made.schedule):
        name = made.name or type(made).__name__
        raise UsageError(
            f"probe {name}: schedule (={made.schedule!r}) must be a function of the iteration, such as every(100)"
        )
    return made


def table_of(probe: Probe) -> pandas.DataFrame:
    """The probe's table. Raises `UsageError` for what is none."""
    import pandas

    table = probe.table()
    if not isinstance(table, pandas.DataFrame):
        raise UsageError(f"probe {probe.name}: table() must give a pandas.DataFrame, not {short(table)}")
    return table


@contextmanager
def attach(network: nn.Module, *probes: str | Probe) -> Iterator[Any]:
    """Attaches probes for a `with` block: gives the probe, or a tuple of them if there are several."""
    if not probes:
        raise UsageError("attach needs at least one probe: a registered name or a Probe")
    if not isinstance(network, nn.Module):
        raise UsageError(f"network (={short(network)}) must be a torch.nn.Module: rp.build makes one of a name")
    made = tuple(make_probe(probe) for probe in probes)
    with ExitStack() as attached:  # each is detached, whatever another raises then
        for probe in made:
            probe.attach(network)
            attached.callback(probe.detach)
        yield made[0] if len(made) == 1 else made
