"""Checkpoints: written whole or not at all, checksummed, with the previous one kept; loading runs no code.

A finished run's weights are written whole or not at all too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import time
import uuid
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from resprobe.errors import StorageError, UsageError

_WINDOWS = os.name == "nt"
_PATIENCE = 2.0
"""Seconds for which a file that Windows does not let be replaced is tried again."""
_MAGIC = b"resprobe checkpoint 1 sha256 "


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that after a crash at any moment it holds either all of the old content or all of the new.

    Raises `StorageError` in one line if the disk is full or the place cannot be written.
    """
    # A process number is not enough: the folder may be shared by machines that count alike.
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        _replace(scratch, path)
        _sync_folder(path.parent)
    except OSError as error:
        scratch_exists = error.errno not in (errno.ENOTDIR, errno.ENAMETOOLONG) and scratch.exists()
        if scratch_exists:
            scratch.unlink()
        raise StorageError(f"cannot write {path}: {error.strerror or error}; nothing was half-written") from error


def remove_scratch(folder: Path) -> None:
    """Removes what a process that was killed while it wrote has left in a folder, and those in it, where nobody else
    writes now."""
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Raises `UsageError` naming `option` if nothing can be written to `folder`, which is made if it is not there.

    Asked before anything is trained: an hour's work must not end at a folder that takes nothing.
    """
    try:
        write_atomically(folder / ".writable", b"")
        with contextlib.suppress(PermissionError):  # on Windows another process may be at it
            (folder / ".writable").unlink(missing_ok=True)
    except StorageError as error:
        cause = error.__cause__
        why = "it is a file, not a folder" if folder.is_file() else getattr(cause, "strerror", cause)
        raise UsageError(f"{option} (={str(folder)!r}) cannot be written to: {why}") from cause


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
            _replace(current, previous)
        _replace(incoming, current)
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


def write_json(path: Path, content: object) -> None:
    """Writes JSON for people to read too. Errors are those of `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(file: Path) -> dict[str, Any]:
    """What a file of a run's folder says; nothing where it is not there or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a run's tensors by their names, in safetensors' format. Errors are those of `write_atomically`."""
    from safetensors.torch import save

    # Cloned, since the format refuses tensors that share memory, as tied weights do.
    alone = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_atomically(path, save(alone))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a file in safetensors' format holds. Copies: what is mapped from the file keeps Windows from deleting it, or writing
    it anew."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What `write_tensors` wrote into a run's folder, on the CPU. Raises `UsageError` if it is missing or damaged."""
    from safetensors import SafetensorError

    try:
        return load_tensors(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"the weights in {path.parent} are missing or damaged ({error}); delete that folder and the run is made again"
        ) from error


def _names(path: Path) -> tuple[Path, Path, Path]:
    """The names a checkpoint can go by, newest first."""
    return path.with_name(path.name + ".incoming"), path, path.with_name(path.name + ".previous")


def _replace(source: Path, target: Path) -> None:
    """Puts a file in the place of another. Windows refuses that while somebody has the other open, as a scanner for viruses does
    for moments: there it is tried for a while."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if not _WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
