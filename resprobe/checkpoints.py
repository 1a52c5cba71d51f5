"""Checkpoints: written whole or not at all, checksummed, with the previous one kept; loading runs no code."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch

from resprobe.errors import StorageError
from resprobe.files import replace_file, write_atomically

_MAGIC = b"resprobe checkpoint 1 sha256 "


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors and plain data. What was at `path` becomes `path` with the suffix `.previous`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    content = _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload
    incoming, current, previous = _names(path)
    write_atomically(incoming, content)
    # Killed between these steps, the newest checkpoint still goes by one of the names that `load_checkpoint` knows.
    try:
        if current.exists():
            replace_file(current, previous)
        replace_file(incoming, current)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; nothing was half-written") from error


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The newest undamaged checkpoint, on the CPU; None if there never was one. A damaged one is warned of."""
    for candidate in _names(path):
        try:
            content = candidate.read_bytes()
        except FileNotFoundError:
            continue
        header, _, payload = content.partition(b"\n")
        if header == _MAGIC + hashlib.sha256(payload).hexdigest().encode():
            try:
                return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError):
                pass  # a checksum over something that was never a checkpoint
        warnings.warn(f"checkpoint {candidate} is damaged and was passed over")
    return None


_PLAIN = (int, float, bool, str, bytes, bytearray, complex, type(None), torch.Size, torch.device, torch.dtype)
_HOLDING = (list, tuple, set, dict, OrderedDict, Counter)


def not_kept(value: Any) -> str:
    """The type of something in `value` that no checkpoint gives back, since reading one runs no code; nothing if there is none.

    A subclass of what is accepted, as numpy's float64 is of float, is not.
    """
    if type(value) in _HOLDING:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next(filter(None, map(not_kept, parts)), "")
    plain = isinstance(value, torch.Tensor) or type(value) in _PLAIN
    return "" if plain else f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def remove_checkpoints(path: Path) -> None:
    """Removes a finished run's checkpoints: its result says all they said."""
    for candidate in _names(path):
        candidate.unlink(missing_ok=True)


def _names(path: Path) -> tuple[Path, Path, Path]:
    """The names a checkpoint can go by, newest first."""
    return path.with_name(path.name + ".incoming"), path, path.with_name(path.name + ".previous")
