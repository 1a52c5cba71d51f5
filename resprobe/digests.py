"""What decides the numbers of a run and is not resprobe's own, in a few characters: sources, and networks made elsewhere."""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import linecache
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import CellType, CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


_seen_sources: dict[tuple[str, str], tuple[Any, str]] = {}
"""Module and file → how the module was loaded, and its digest: the file may be edited later, and the process not know."""

_texts: dict[str, dict[str, bytes]] = {}
"""Digest → the files that it is of, by their names from the first one's folder."""


def sources_of(digest: str) -> dict[str, bytes]:
    """The files of a `source_digest` of this process, by their names; of what was typed in, the cells of a notebook."""
    return dict(_texts.get(digest, {}))


def source_digest(thing: Any) -> str | None:
    """SHA-256 of the source file that a class or function comes from, and of those beside it that it imports, as they were
    when this was first asked of what was loaded; None for resprobe's own. Of what was typed in: of what it does, and all that
    it names does, now."""
    thing = inspect.unwrap(thing)
    module = getattr(thing, "__module__", None) or ""
    if module.split(".")[0] == "resprobe":
        return None
    file = source_file(thing)
    if file is None:
        return _typed_digest(thing)
    loaded_by = getattr(sys.modules.get(module), "__spec__", None)  # another one after a reload
    known = _seen_sources.get((module, str(file)))
    if known is None or known[0] is not loaded_by:
        known = _seen_sources[module, str(file)] = loaded_by, files_digest(module, file)
    return known[1]


def typed_in(thing: Any) -> bool:
    """Whether a class or function was typed into a notebook or an interpreter, so that no other process can have it."""
    return source_file(thing) is None


def source_file(thing: Any) -> Path | None:
    """The file that a class or function comes from. None for what was typed in, also where a notebook's debugger keeps its cells
    in files."""
    thing = inspect.unwrap(thing)
    if getattr(thing, "__module__", None) == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        return None
    try:
        file = Path(inspect.getsourcefile(thing) or "")
    except (OSError, TypeError):
        return None
    known = (getattr(thing, "__module__", None), str(file)) in _seen_sources  # the file may be gone since
    return file if known or file.is_file() else None


def files_digest(module: str, file: Path) -> str:
    """SHA-256 of a module's source file, and of those beside it that it imports, as they are now."""
    texts = {file: file.read_bytes()}
    _add_helpers(module, file, file.parent, texts)
    own, *helpers = (hashlib.sha256(text).hexdigest() for text in texts.values())
    digest = hashlib.sha256("".join((own, *sorted(helpers))).encode()).hexdigest() if helpers else own
    _texts[digest] = {path.relative_to(file.parent).as_posix(): text for path, text in texts.items()}
    return digest


def _add_helpers(module: str, file: Path, folder: Path, texts: dict[Path, bytes]) -> None:
    """Adds the files in `folder` and below that the source `file` of a module imports, and that those import."""
    for name in _imports(module, file):
        path = _file_of(name, folder)
        if path is None or path in texts or "site-packages" in path.parts:
            continue
        texts[path] = path.read_bytes()
        _add_helpers(name, path, folder, texts)


def _imports(module: str, file: Path) -> Iterator[str]:
    """Names of modules, and of what may be one, that a source imports."""
    package = getattr(sys.modules.get(module), "__package__", None) or module.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # edited since, and not yet right
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*filter(None, up), *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:  # importing a.b imports a
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _file_of(module: str, folder: Path) -> Path | None:
    """The source of a module, imported or not yet, if it lies in `folder` or below and is not resprobe's."""
    if module.split(".")[0] == "resprobe" or not module:
        return None
    if module in sys.modules:
        candidates = [Path(getattr(sys.modules[module], "__file__", None) or "")]
    else:
        roots = [folder, *(Path(root) for root in sys.path if root and folder.is_relative_to(root))]
        bases = [root.joinpath(*module.split(".")) for root in roots]
        candidates = [path for base in bases for path in (base.with_suffix(".py"), base / "__init__.py")]
    return next((path for path in candidates if path.is_relative_to(folder) and path.is_file()), None)


_OF_PYTHON = {"__dict__", "__doc__", "__firstlineno__", "__static_attributes__", "__weakref__"}
"""Attributes of a class that say nothing of what it does."""

_telling: ContextVar[tuple[int, ...]] = ContextVar("_telling", default=())


def _typed_digest(thing: Any) -> str:
    """SHA-256 of what something typed in does: of its code, and of what that names, the same again."""
    if id(thing) in _telling.get():  # by way of something that it names
        return origin(thing)
    within = _telling.set((*_telling.get(), id(thing)))
    told: dict[int, str] = {}
    cells: dict[str, bytes] = {}
    ahead = [thing]
    try:
        while ahead:
            one = ahead.pop()
            if id(one) not in told:
                told[id(one)] = f"{origin(one)} {_own(one, ahead)}"
                cells |= _cells(one)
    finally:
        _telling.reset(within)
    digest = hashlib.sha256("\n".join(sorted(told.values())).encode()).hexdigest()
    _texts[digest] = {f"typed-{number}.py": text for number, text in enumerate(cells.values(), start=1)}
    return digest


def _cells(thing: Any) -> dict[str, bytes]:
    """The cells of a notebook that the functions of something typed in are from, by what Python calls them."""
    parts = vars(thing).values() if inspect.isclass(thing) else [thing]
    functions = [getattr(part, "__func__", part) for part in parts]
    names = {each.__code__.co_filename: None for each in functions if inspect.isfunction(each) and typed_in(each)}
    texts = {name: "".join(linecache.getlines(name)) for name in names}
    return {name: text.encode() for name, text in texts.items() if text}


def _own(thing: Any, ahead: list[Any]) -> object:
    """What a function or class, or a value, is by itself, as text; what it names and was typed in too is put `ahead`."""
    routine = getattr(thing, "__func__", thing)
    if isinstance(thing, property):
        return [_own(each, ahead) for each in (thing.fget, thing.fset, thing.fdel)]
    if inspect.isclass(thing) and typed_in(thing):
        ahead += [base for base in thing.__bases__ if _is_typed(base)]
        bases = [origin(base) if _is_typed(base) else as_text(base) for base in thing.__bases__]
        held = sorted((name, value) for name, value in vars(thing).items() if name not in _OF_PYTHON)
        return bases, [(name, _own(value, ahead)) for name, value in held]
    code = getattr(routine, "__code__", None)
    if code is None or not typed_in(routine):
        return as_text(thing)
    held = {name: routine.__globals__[name] for name in sorted(_globals(code)) if name in routine.__globals__}
    closed = zip(code.co_freevars, getattr(routine, "__closure__", None) or (), strict=False)
    held |= {name: cell.cell_contents for name, cell in closed if cell != CellType()}
    named = []
    for name, value in held.items():
        if _is_typed(value):
            ahead.append(value)
            named.append((name, origin(value)))
        else:
            named.append((name, as_text(value)))
    defaults = [
        _own(value, ahead) for value in (*(routine.__defaults__ or ()), *sorted((routine.__kwdefaults__ or {}).items()))
    ]
    return _code(code), defaults, named


def _is_typed(value: Any) -> bool:
    """Whether a value is a function or class that was typed in."""
    return (inspect.isfunction(value) or inspect.isclass(value)) and typed_in(value) and not _is_known(value)


def _is_known(value: Any) -> bool:
    """Whether a function or class is told by its name alone."""
    return origin(value).split(".")[0] in ("builtins", "resprobe", "torch", "torchvision")


def _code(code: CodeType) -> object:
    constants = [_code(each) if inspect.iscode(each) else as_text(each) for each in code.co_consts]
    return code.co_code.hex(), code.co_names, constants


def _globals(code: CodeType) -> set[str]:
    """Names of globals that a function reads, and those in it."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_globals(each) for each in code.co_consts if inspect.iscode(each)))


def origin(thing: object) -> str:
    """Module and name of a class or function."""
    module, name = getattr(thing, "__module__", "?"), getattr(thing, "__qualname__", repr(thing))
    return f"{module}.{name}"


def network_digest(network: nn.Module, *about: str) -> str:
    """What a built network is: its modules and how they are set, weights and buffers, what of them learns, and the sources
    of those that are neither torch's, torchvision's nor ours. `about`: what else is part of it.

    What a module holds that neither tells what it is made of nor has attributes (an open file, say) is not seen.
    """
    digest = hashlib.sha256(repr(about).encode())
    for name, module in network.named_modules(remove_duplicate=False):
        kind = as_text(type(module))
        missing = [part for part, held in module._modules.items() if held is None]
        # A network that is in evaluation mode as a whole is trained all the same; a part that is, is frozen.
        frozen = network.training and not module.training
        digest.update(repr((name, kind, module.extra_repr(), settings(module), missing, frozen)).encode())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        digest.update(f"{name} {tensor.requires_grad}".encode() + _bytes(tensor))
    return digest.hexdigest()[:16]


def settings(thing: object) -> dict[str, str]:
    """The attributes of an object that can be told in words, as text; private ones, and a module's mode, are left out."""
    found = {name: as_text(value) for name, value in sorted(vars(thing).items()) if not name.startswith("_")}
    return {name: text for name, text in found.items() if text is not None and name != "training"}


def as_text(value: Any, within: tuple[int, ...] = ()) -> str | None:
    """A value as text that is the same in every process; None for what has no such text.

    `within`: what it is a part of, by `id`, since things may hold one another.
    """
    import numpy
    from torch import Tensor, dtype

    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, bool | int | float | complex | str | bytes | None | dtype | range | slice):
        return repr(value)
    if isinstance(value, numpy.ndarray) and value.dtype != object:
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes(value)).hexdigest()}"
    if id(value) in within:
        return "itself"
    text = partial(as_text, within=(*within, id(value)))
    if isinstance(value, Mapping):
        value = [each for pair in value.items() for each in pair]
    if isinstance(value, set | frozenset):
        return str(sorted(str(text(each)) for each in value))
    if isinstance(value, list | tuple):
        return str([text(each) for each in value])
    if isinstance(value, partial):
        return f"{text(value.func)} {text(value.args)} {text(value.keywords)}"
    if inspect.isroutine(value) or inspect.isclass(value):
        if _is_known(value):
            return origin(value)
        # A stranger's file is what is in it, whatever it is called.
        of_function = getattr(value, "__func__", value)
        made_of = [getattr(of_function, name, None) for name in ("__defaults__", "__kwdefaults__")]
        cells = [cell.cell_contents for cell in getattr(of_function, "__closure__", None) or () if cell != CellType()]
        bound_to = value.__self__ if inspect.ismethod(value) else None
        return f"{value.__qualname__} {source_digest(value)} {text([bound_to, *made_of, *cells])}"
    if inspect.ismodule(value):
        return value.__name__
    held = getattr(value, "__dict__", None)
    return None if held is None else f"{text(type(value))} {text(dict(sorted(held.items())))}"


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
