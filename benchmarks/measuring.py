"""Timing several variants side by side: interleaved rounds, medians and spread, ratios of the same round."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of n figures."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:,.2f} ({self.low:,.2f}–{self.high:,.2f}, n = {self.n})"


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of `work`, the device's queue included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def ratios(rounds: list[Mapping[str, float]], ours: str) -> dict[str, Spread]:
    """`ours` over each rival, round by round: a machine's slow moments fall on both sides of a ratio."""
    rivals = [name for name in rounds[0] if name != ours]
    return {rival: Spread.of([each[ours] / each[rival] for each in rounds]) for rival in rivals}


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a benchmark's record and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=vars) + "\n")
    print(f"\nwritten to {path}")
