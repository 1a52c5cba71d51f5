"""What was typed into a notebook or an interpreter, as text: what it does, and what everything that it names does.

Such things are in no file whose source could say what they are, and a notebook's cells change one by one: a block's helper is
edited, and the block itself, which names it, stays as it was.
"""

from __future__ import annotations

import dis
import inspect
import linecache
import logging
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from resprobe import digests
from resprobe.errors import is_installed

_OF_PYTHON = {
    *("__dict__", "__doc__", "__firstlineno__", "__static_attributes__", "__weakref__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
}
"""Attributes of a class that say nothing of what it does; some are there only once somebody has asked for them."""

Text = str | list


def told(thing: Any) -> tuple[str, dict[str, bytes]]:
    """What a thing is and does, the same in every process, and the cells of a notebook that it is from, by names for files."""
    teller = _Teller()
    text = repr(teller.tell(thing))
    return text, {f"typed-{number}.py": cell for number, cell in enumerate(teller.cells.values(), start=1)}


class _Teller:
    """Tells each thing once, and numbers them in the order in which they are met, since they may name one another."""

    def __init__(self):
        self.met: dict[int, tuple[int, Any]] = {}  # with the thing, or another one might get its id
        self.cells: dict[str, bytes] = {}

    def tell(self, value: Any) -> Text:
        if (text := _leaf(value)) is not None:
            return text
        if id(value) in self.met:
            return f"#{self.met[id(value)][0]}"
        self.met[id(value)] = len(self.met), value
        return [type(value).__name__, *self._parts(value)]

    def _parts(self, value: Any) -> list[Text]:
        if isinstance(value, FunctionType):
            return self._function(value)
        if inspect.isclass(value):
            return self._class(value)
        if isinstance(value, partial):
            return self._each((value.func, value.args, value.keywords))
        if inspect.ismethod(value):
            return self._each((value.__func__, value.__self__))
        if isinstance(value, staticmethod | classmethod):
            return [self.tell(value.__func__)]
        if isinstance(value, property):
            return self._each((value.fget, value.fset, value.fdel))
        if isinstance(value, Mapping):
            return self._each(each for pair in value.items() for each in pair)
        if isinstance(value, list | tuple | deque):
            return self._each(value)
        if isinstance(value, set | frozenset):  # in an order of their own, not that of this process
            return self._each(sorted(value, key=lambda each: str(_leaf(each) or digests.origin(each))))
        return self._instance(value)

    def _each(self, values: Any) -> list[Text]:
        return [self.tell(each) for each in values]

    def _function(self, function: FunctionType) -> list[Text]:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        held = {name: cell.cell_contents for name, cell in cells.items() if cell != CellType()}
        if digests.typed_in(function):
            what: Text = self._code(function.__code__)
            names = sorted(_globals(function.__code__))
            held |= {name: function.__globals__[name] for name in names if name in function.__globals__}
            name = function.__code__.co_filename
            if lines := linecache.getlines(name):  # where a notebook puts its cells, for tracebacks
                self.cells[name] = "".join(lines).encode()
        else:
            what = str(digests.source_digest(function))
        own = (function.__defaults__, function.__kwdefaults__, vars(function))
        return [function.__qualname__, what, *self._each(own), self.tell(held)]

    def _code(self, code: CodeType) -> list[Text]:
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        constants = [self._code(each) if inspect.iscode(each) else self.tell(each) for each in code.co_consts]
        return [code.co_code.hex(), getattr(code, "co_exceptiontable", b"").hex(), repr(shape), repr(names), constants]

    def _class(self, cls: type) -> list[Text]:
        if not digests.typed_in(cls):
            return [cls.__qualname__, str(digests.source_digest(cls))]
        held = {name: value for name, value in sorted(vars(cls).items()) if name not in _OF_PYTHON}
        return [cls.__qualname__, *self._each((type(cls), cls.__bases__, held))]

    def _instance(self, value: Any) -> list[Text]:
        kind = self.tell(type(value))
        if type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "to_csv"):
            return [kind, value.to_csv(lineterminator="\n")]
        slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
        held = {name: getattr(value, name) for name in sorted(slots) if hasattr(value, name)}
        held |= dict(sorted(getattr(value, "__dict__", {}).items()))
        if held:
            return [kind, self.tell(held)]
        text = repr(value)
        return [kind, "" if " at 0x" in text else text]


def _leaf(value: Any) -> str | None:
    """The text of what holds nothing else, and of what its name tells; None for all else."""
    import numpy
    import torch

    if isinstance(value, numpy.ndarray) and value.dtype == object:
        return None
    if isinstance(value, numpy.generic | numpy.ndarray | torch.Tensor):
        return digests.as_text(value)
    if (
        isinstance(value, bool | int | float | complex | str | bytes | None | torch.dtype | range | slice)
        or value is ...
    ):
        return repr(value)
    if isinstance(value, torch.device):  # where something is trained is no part of what it is
        return "a device"
    if isinstance(value, logging.Logger):
        return f"logger {value.name}"
    if isinstance(value, ModuleType):
        return _module(value)
    built_in = inspect.isroutine(value) and not isinstance(value, FunctionType | staticmethod | classmethod)
    if built_in and hasattr(value, "__qualname__"):
        bound = getattr(value, "__self__", None)
        return digests.origin(value) if bound is None or isinstance(bound, ModuleType) else None
    if (isinstance(value, FunctionType) or inspect.isclass(value)) and digests.is_known(value):
        return digests.origin(value)
    return None


def _module(module: ModuleType) -> str:
    """A module's name, and what is in a user's own."""
    file = Path(getattr(module, "__file__", None) or "")
    if digests.is_known_module(module.__name__) or not file.is_file() or is_installed(file):
        return f"module {module.__name__}"
    return f"module {module.__name__} {digests.loaded_digest(module.__name__, file)}"


def _names(slots: Any) -> list[str]:
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _globals(code: CodeType) -> set[str]:
    """Names of globals that a function reads, and those in it."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_globals(each) for each in code.co_consts if inspect.iscode(each)))
