"""What decides the numbers of a run and is not resprobe's own, in a few characters: sources, and networks made elsewhere."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

from resprobe.errors import is_installed, is_pythons

if TYPE_CHECKING:
    from torch import Tensor, nn


_seen_sources: dict[tuple[str, str], tuple[Any, str]] = {}
"""Module and file → how the module was loaded, and its digest: the file may be edited later, and the process not know."""

_texts: dict[str, dict[str, bytes]] = {}
"""Digest → the files that went into it, by their names from the first one's folder."""


def sources_of(digest: str) -> dict[str, bytes]:
    """The files of a `source_digest` of this process, by their names; of what was typed in, the cells of a notebook."""
    return dict(_texts.get(digest, {}))


def source_digest(thing: Any) -> str | None:
    """SHA-256 of the source file that a class or function comes from, and of those beside it that it imports, as they were
    when this was first asked of what was loaded; None for resprobe's own. What decorators made it from counts as well. What was
    typed in has the digest of what it does, and all that it names does, now."""
    if isinstance(thing, partial) or not (inspect.isroutine(thing) or inspect.isclass(thing)):  # made of something
        return _told_digest(thing)
    *decorators, last = _unwrapped(thing)
    parts = [_digest_of_one(each) for each in (*(each for each in decorators if not is_known(each)), last)]
    digests = list(dict.fromkeys(filter(None, parts)))
    if len(digests) <= 1:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _unwrapped(thing: Any) -> list[Any]:
    """A function, what it wraps, what that wraps, and so on."""
    chain = [thing]
    while (inner := getattr(chain[-1], "__wrapped__", None)) is not None and len(chain) < 100:
        chain.append(inner)
    return chain


def _digest_of_one(thing: Any) -> str | None:
    module = module_of(thing)
    if module.split(".")[0] == "resprobe":
        return None
    file = source_file(thing)
    return _told_digest(thing) if file is None else loaded_digest(module, file)


def _told_digest(thing: Any) -> str:
    from resprobe.typed import told

    text, cells = told(thing)
    digest = hashlib.sha256(text.encode()).hexdigest()
    _texts[digest] = cells
    return digest


def loaded_digest(module: str, file: Path) -> str:
    """`files_digest` as it was when it was first asked of what was loaded."""
    loaded_by = getattr(sys.modules.get(module), "__spec__", None)  # another one after a reload
    known = _seen_sources.get((module, str(file)))
    if known is None or known[0] is not loaded_by:
        known = _seen_sources[module, str(file)] = loaded_by, files_digest(module, file)
    return known[1]


def typed_in(thing: Any) -> bool:
    """Whether something, or what it is made of, was typed into a notebook or an interpreter, so that no other process can have
    it."""
    if isinstance(thing, partial):
        return typed_in(thing.func)
    if not (inspect.isroutine(thing) or inspect.isclass(thing)):
        return typed_in(type(thing))
    functions = [getattr(each, "__func__", each) for each in _unwrapped(thing)]
    written = [each for each in functions if isinstance(each, FunctionType) or inspect.isclass(each)]  # not built in
    return any(not is_known(each) and source_file(each) is None for each in written)


def source_file(thing: Any) -> Path | None:
    """The file that a class or function comes from. None for what was typed in, also where a notebook's debugger keeps its cells
    in files, and for what is built in."""
    module = module_of(thing)
    if module == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        return None
    try:
        file = Path(inspect.getsourcefile(thing) or "")
    except (OSError, TypeError):
        return None
    return file if (module, str(file)) in _seen_sources or file.is_file() else None  # it may be gone since


def module_of(thing: Any) -> str:
    """The module that a class or function was written in, which a decorator would have be that of what it wraps."""
    function = getattr(thing, "__func__", thing)
    of_function = getattr(function, "__globals__", {}).get("__name__")
    return of_function or getattr(thing, "__module__", None) or ""


def is_known(thing: Any) -> bool:
    """Whether a function or class is told by its name alone: resprobe's, torch's, and Python's own."""
    return is_known_module(module_of(thing))


def is_known_module(name: str) -> bool:
    """Whether a module is resprobe's, torch's or Python's own."""
    top = name.partition(".")[0]
    if top in ("builtins", "resprobe", "torch", "torchvision"):
        return True
    return top in sys.stdlib_module_names and _is_pythons(sys.modules.get(top))


def _is_pythons(module: Any) -> bool:
    """Whether a module of a name of the standard library's is that, and not a user's file of the same name."""
    file = getattr(module, "__file__", None)
    return module is not None and (file is None or is_pythons(Path(file)))


def files_digest(module: str, file: Path) -> str:
    """SHA-256 of a module's source file, and of those beside it that it imports, as they are now."""
    texts = {file: file.read_bytes()}
    _add_helpers(module, file, file.parent, texts)
    # Line ends are those of the system, or of git's settings there: no other source.
    own, *helpers = (hashlib.sha256(text.replace(b"\r\n", b"\n")).hexdigest() for text in texts.values())
    digest = hashlib.sha256("".join((own, *sorted(helpers))).encode()).hexdigest() if helpers else own
    _texts[digest] = {path.relative_to(file.parent).as_posix(): text for path, text in texts.items()}
    return digest


def _add_helpers(module: str, file: Path, folder: Path, texts: dict[Path, bytes]) -> None:
    """Adds the files in `folder` and below that the source `file` of a module imports, and that those import."""
    for name in _imports(module, file):
        path = _file_of(name, folder)
        if path is None or path in texts or is_installed(path):
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
    texts = {name: as_text(value) for name, value in sorted(vars(thing).items()) if not name.startswith("_")}
    return {name: text for name, text in texts.items() if text is not None and name != "training"}


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
    if hasattr(value, "__qualname__") and (inspect.isroutine(value) or inspect.isclass(value)):
        if is_known(value):
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
