"""What a number was measured with: versions, processor or card, commit."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import resprobe
from resprobe.devices import cores
from resprobe.distributed import team

_CODE = (":/resprobe", ":/plugins", ":/studies")
_PACKAGES = ("torch", "torchvision", "numpy", "pandas", "scipy", "scikit-learn")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine, device and git commit of resprobe's checkout, if it is one."""
    return {
        "resprobe": resprobe.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": team().size,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **git_commit(),
    }


def pooled(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several runs were made with: each entry's value, or where they differ a list of all, in order. Three are
    reduced: the most processes, local changes if any had them, deterministic if all were."""
    entries: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in environments for name in each):
        values = list(dict.fromkeys(each[name] for each in environments if each.get(name) is not None))
        if values and name in ("processes", "local_changes"):
            values = [max(values)]
        if name == "deterministic":
            values = [all(each.get(name) for each in environments)]
        entries[name] = values[0] if len(values) == 1 else values or None
    return entries


def device_name(device: torch.device) -> str:
    """The card's or the processor's name with what matters of its size."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _processor()
    return f"{device.type}: {name}, {cores()} cores" if device.type == "cpu" else f"{device.type}: {name}"


@functools.cache
def git_commit() -> dict[str, object]:
    """The commit that this code is, and whether it was changed since; empty where there is no checkout."""
    # A checkout of something else around an installed resprobe is not its history.
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return {}
    commit = _git("rev-parse", "HEAD").decode().strip()
    return {"commit": commit, "local_changes": bool(_git("status", "--porcelain", "-uno"))}


@functools.cache
def local_changes() -> bytes:
    """A patch of what was changed in the code since its commit; empty if nothing was, or there is no checkout."""
    changed = git_commit().get("local_changes")
    return _git("diff", "--binary", "--no-ext-diff", "--no-color", "HEAD", "--", *_CODE) if changed else b""


def _git(*arguments: str) -> bytes:
    """What git says of the checkout that this code lies in; nothing if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
