"""What decides the numbers of a run and is not resprobe's own, in a few characters: sources, and networks made elsewhere."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def source_digest(thing: Any) -> str | None:
    """SHA-256 of the source file that a class or function comes from, and of those beside it that it imports; None for
    resprobe's own."""
    thing = inspect.unwrap(thing)
    module = getattr(thing, "__module__", None) or ""
    if module.split(".")[0] == "resprobe":
        return None
    try:
        file = Path(inspect.getsourcefile(thing) or "")
        own = hashlib.sha256(file.read_bytes()).hexdigest()
        helpers = sorted(_helpers(module, file.parent, {file}))
        return hashlib.sha256("".join((own, *helpers)).encode()).hexdigest() if helpers else own
    except (OSError, TypeError):  # typed into a notebook or an interpreter: there is no file
        try:
            return hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()
        except (OSError, TypeError):
            return f"unknown source of {origin(thing)}"


def _helpers(module: str, folder: Path, seen: set[Path]) -> Iterator[str]:
    """Digests of files in `folder` and below of which a module uses something."""
    for value in list(vars(sys.modules[module]).values()) if module in sys.modules else ():
        used = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
        if not isinstance(used, str) or used.split(".")[0] == "resprobe":
            continue
        file = getattr(sys.modules.get(used), "__file__", None)
        path = Path(file) if file else folder
        if path in seen or not path.is_relative_to(folder) or not path.is_file() or "site-packages" in path.parts:
            continue
        seen.add(path)
        yield hashlib.sha256(path.read_bytes()).hexdigest()
        yield from _helpers(used, folder, seen)


def origin(thing: object) -> str:
    """Module and name of a class or function."""
    module, name = getattr(thing, "__module__", "?"), getattr(thing, "__qualname__", repr(thing))
    return f"{module}.{name}"


def network_digest(network: nn.Module, *about: str) -> str:
    """What a built network is: its modules and how they are set, weights and buffers, what of them learns, and the sources
    of those that are neither torch's, torchvision's nor ours. `about`: what else is part of it.

    What a module holds beside numbers, texts, functions and tensors (an object of a class of its own, say) is not seen.
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


def as_text(value: Any) -> str | None:
    """A value as text that is the same in every process; None for what has no such text."""
    from torch import Tensor, dtype

    if isinstance(value, bool | int | float | complex | str | bytes | None | dtype):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes(value)).hexdigest()}"
    if isinstance(value, Mapping):
        value = [each for pair in value.items() for each in pair]
    if isinstance(value, set | frozenset):
        return str(sorted(str(as_text(each)) for each in value))
    if isinstance(value, list | tuple):
        return str([as_text(each) for each in value])
    if isinstance(value, partial):
        return f"{as_text(value.func)} {as_text(value.args)} {as_text(value.keywords)}"
    if inspect.isroutine(value) or inspect.isclass(value):
        known = origin(value).split(".")[0] in ("torch", "torchvision", "resprobe")
        # A stranger's file is what is in it, whatever it is called.
        return origin(value) if known else f"{value.__qualname__} {source_digest(value)}"
    return None


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
