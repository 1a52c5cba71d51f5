"""Files that are written whole or not at all: bytes, JSON, tables and tensors."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from resprobe.errors import StorageError, UsageError

if TYPE_CHECKING:
    import pandas

_WINDOWS = os.name == "nt"
_PATIENCE = 2.0
"""Seconds for which Windows is asked again to replace a file."""


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
        replace_file(scratch, path)
        _sync_folder(path.parent)
    except OSError as error:
        scratch_exists = error.errno not in (errno.ENOTDIR, errno.ENAMETOOLONG) and scratch.exists()
        if scratch_exists:
            scratch.unlink()
        raise StorageError(f"cannot write {path}: {error.strerror or error}; nothing was half-written") from error


def remove_scratch(folder: Path) -> None:
    """Removes what a killed process has left half-written, in a folder and below it. Nobody else may write there now."""
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


def write_json(path: Path, content: object) -> None:
    """Writes JSON for people to read too. Errors are those of `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where the file is missing, unreadable or damaged."""
    try:
        return load_json(path) or {}
    except OSError:
        return {}


def load_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where it is damaged. Raises `OSError` where it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors by their names, in safetensors' format. Errors are those of `write_atomically`."""
    from safetensors.torch import save

    # Cloned, since the format refuses tensors that share memory, as tied weights do.
    alone = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_atomically(path, save(alone))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file in safetensors' format, by their names, on the CPU. Errors are safetensors' own."""
    # Copied: while tensors are mapped from a file, Windows neither deletes it nor writes it anew.
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that `write_tensors` wrote into a run's folder. Raises `UsageError` if they are missing or damaged."""
    from safetensors import SafetensorError

    try:
        return load_tensors(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"the weights in {path.parent} are missing or damaged ({error}); delete that folder and the run is made again"
        ) from error


def write_table(path: Path, table: pandas.DataFrame) -> None:
    """Writes a table that `read_table` gives back to the last bit."""
    # "nan" for what was not measured, so that it is not taken for an empty text.
    write_atomically(path, table.to_csv(index=False, na_rep="nan", lineterminator="\n").encode())


def read_table(path: Path, kinds: Mapping[str, str] = MappingProxyType({})) -> pandas.DataFrame:
    """A table as it was written, to the last bit. `kinds` names columns that are no numbers, though they may read like some:
    column → "string" or "boolean"."""
    import pandas

    # Read as text: pandas' own parser rounds some numbers differently.
    table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    for column in table:
        if kinds.get(column) == "string":
            continue
        if kinds.get(column) == "boolean" and set(table[column]) <= {"True", "False"}:
            table[column] = table[column] == "True"
            continue
        # A gap in a column of numbers is a missing number; a column of gaps alone is one of empty texts.
        filled = table[column].where(table[column] != "", "nan") if (table[column] != "").any() else table[column]
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                table[column] = filled.map(kind)
                break
    return table


def replace_file(source: Path, target: Path) -> None:
    """Puts a file in the place of another. Raises `OSError`.

    Windows refuses that while anyone has the other file open, as a virus scanner does for moments: there it is tried for a
    while.
    """
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
