"""Timing several variants side by side: medians and spread, ratios of the same round, straight lines, tables."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resprobe.devices import synchronize


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of n figures."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:,.2f} ({self.low:,.2f}–{self.high:,.2f}, n = {self.n})"


@dataclass(frozen=True)
class Line:
    """The straight line y = intercept + slope · x of least squares, with what it leaves: `residuals` are y − line."""

    intercept: float
    slope: float
    r_squared: float
    residuals: tuple[float, ...]

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        """Through at least two points of different x."""
        slope, intercept = np.polyfit(x, y, 1)
        residuals = np.asarray(y) - (intercept + slope * np.asarray(x))
        spread = float(np.square(y - np.mean(y)).sum())
        left = float(np.square(residuals).sum())
        return cls(float(intercept), float(slope), 1 - left / spread if spread else 1.0, tuple(residuals.tolist()))


class Deadline:
    """A moment after which nothing new is begun."""

    def __init__(self, seconds: float):
        self.at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then; negative after it."""
        return self.at - time.monotonic()

    def within(self, seconds: float) -> Deadline:
        """The earlier of this and `seconds` from now."""
        return Deadline(min(seconds, self.left))


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of `work`, the device's queue included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


class Memory:
    """The peak of memory since this was made: what torch allocated on a GPU, the process's resident memory on a CPU.

    `peak()` is in bytes; None where it cannot be told (a CPU outside Linux, Apple's GPU).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.known = device.type == "cuda" or (device.type == "cpu" and Path("/proc/self/clear_refs").exists())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self.known:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew

    def peak(self) -> int | None:
        if not self.known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024


TOLD = {"clock_mhz": "clocks.sm", "power_w": "power.draw", "temperature_c": "temperature.gpu"}
"""What a card says of itself, and nvidia-smi's names for it."""


def telling(device: torch.device) -> dict[str, float]:
    """Clock (MHz), power (W) and temperature (°C) of a card, as its driver's nvidia-smi tells them, which changes nothing."""
    if device.type != "cuda":
        return {}
    told: dict[str, float] = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # it is not there, or does not answer
        card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        asked = ["nvidia-smi", "-i", card, f"--query-gpu={','.join(TOLD.values())}", "--format=csv,noheader,nounits"]
        line = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        for name, figure in zip(TOLD, line.split(","), strict=False):
            with contextlib.suppress(ValueError):  # [N/A]
                told[name] = float(figure)
    return told


def ratios(rounds: Sequence[Mapping[str, float]], ours: str) -> dict[str, Spread]:
    """`ours` over each rival, round by round: a machine's slow moments fall on both sides of a ratio."""
    rivals = [name for name in rounds[0] if name != ours]
    return {rival: Spread.of([each[ours] / each[rival] for each in rounds]) for rival in rivals}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. A bar inside a cell would end it, and is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def with_caches_in(folder: str) -> dict[str, str]:
    """This process's environment for another one, which keeps what it compiles in `folder`, and finds only that."""
    return dict(os.environ) | {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}


def write_json(path: Path, record: Mapping[str, Any], *, say: bool = True) -> None:
    """Writes a benchmark's record and, if asked to, says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=vars) + "\n")
    if say:
        print(f"\nwritten to {path}")
