"""Loops that take turns: each in a process of its own, a window of steps at a time.

In its own process a loop has the settings, threads and memory that its users have: one that has torch search for the
fastest kernels does not do so for another, and its memory is its own. In turns, a machine's slow moments fall on all.

A turn is two windows, of which the second is timed: whoever comes after another gets its caches back first, and uses up
what its loader has prepared meanwhile. A cold start is all from data in memory to the end of the first window (building
and moving the network, starting a loader's processes, compiling with an empty cache, capturing, searching for kernels),
less what a window takes later.
"""

from __future__ import annotations

import contextlib
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.measuring import Deadline, with_caches_in
from resprobe.errors import last_words

PATIENCE = 900.0
"""Seconds to wait for a word where there is no deadline; compiling the deepest network takes minutes."""


@dataclass(frozen=True)
class Timed:
    """What was seen of one case: seconds of its cold start, of each timed window, and its peak of memory in bytes.

    Memory is what torch allocated on a GPU; on a CPU, how much the process grew by from data in memory. `told`: what the
    card said of itself at the end of the last window (`benchmarks.measuring.telling`).
    """

    cold: float
    windows: tuple[float, ...]
    peak: int | None
    told: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Race:
    """The outcome: what was timed, by label, and why the rest was not."""

    timed: dict[str, Timed] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def rounds(self, images: Mapping[str, int]) -> list[dict[str, float]]:
        """Images a second, a mapping a round, where `images` is how many a window of each label has."""
        each = [[images[label] / seconds for seconds in timed.windows] for label, timed in self.timed.items()]
        return [dict(zip(self.timed, speeds, strict=True)) for speeds in zip(*each, strict=False)]


class Stopped(Exception):
    """A loop's process ended or failed."""


class OutOfTime(Stopped):
    """The deadline passed while a loop was at work."""


class Runner:
    """A loop's process, seen from the one that calls the turns."""

    def __init__(self, case: Any, threads: int | None = None):
        command = [sys.executable, "-m", "benchmarks.turns", json.dumps(asdict(case))]
        # What an earlier process compiled would make the start less cold.
        self.cache = tempfile.TemporaryDirectory(prefix="resprobe-", ignore_cleanup_errors=True)
        environment = with_caches_in(self.cache.name) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.heard: queue.Queue[str] = queue.Queue()
        self.complaints: list[str] = []
        # Both pipes are emptied as they fill: a full one would stop the loop.
        self.listeners = [
            threading.Thread(target=self._listen, args=(stream, take), daemon=True)
            for stream, take in (
                (self.process.stdout, self.heard.put),
                (self.process.stderr, self.complaints.append),
            )
        ]
        for listener in self.listeners:
            listener.start()

    def _listen(self, stream: Any, take: Any) -> None:
        for line in stream:
            take(line)
        if stream is self.process.stdout:
            take("")

    def word(self, deadline: Deadline | None = None) -> dict[str, Any]:
        """What the process says next. Raises `Stopped`."""
        try:
            line = self.heard.get(timeout=PATIENCE if deadline is None else max(0.0, deadline.left))
        except queue.Empty:
            raise OutOfTime("no time left") from None
        if not line:
            self.process.wait()
            self.listeners[1].join(timeout=5)
            said = last_words("".join(self.complaints))[:300]
            raise Stopped(said or f"its process ended with exit code {self.process.returncode}")
        return json.loads(line)

    def window(self, deadline: Deadline | None = None) -> dict[str, Any]:
        """Lets it do one window: seconds, and the peak of memory so far. Raises `Stopped`."""
        if deadline is not None and deadline.left <= 0:
            raise OutOfTime("no time left")
        with contextlib.suppress(BrokenPipeError):
            print("go", file=self.process.stdin, flush=True)
        return self.word(deadline)

    def close(self, patience: float = 10.0) -> None:
        """Ends the process, with its loader's processes if it has any; after `patience` seconds, whatever it does."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for listener in self.listeners:
            listener.join(timeout=5)
        self.process.stdout.close()
        self.process.stderr.close()
        self.cache.cleanup()


def race(
    cases: Mapping[str, Any],
    rounds: int,
    *,
    threads: int | None = None,
    deadline: Deadline | None = None,
    together: bool = True,
) -> Race:
    """Times `cases`, by label, in interleaved rounds; one after the other where they have no room `together`.

    A case that fails, or does not come to its first round before the deadline, is listed with the reason; rounds that do
    not fit into the time are left out.
    """
    if not together:
        whole = Race()
        for label, case in cases.items():
            one = race({label: case}, rounds, threads=threads, deadline=deadline)
            whole.timed |= one.timed
            whole.missing |= one.missing
        return whole
    found = Race()
    if deadline is not None and deadline.left <= 0:
        found.missing = dict.fromkeys(cases, "no time left")
        return found
    runners: dict[str, Runner] = {}
    first: dict[str, float] = {}
    windows: dict[str, list[float]] = {label: [] for label in cases}
    last: dict[str, dict[str, Any]] = {}

    def drop(label: str, reason: str) -> None:
        found.missing[label] = reason
        runners.pop(label).close(patience())

    def patience() -> float:
        return 10.0 if deadline is None else max(0.0, min(10.0, deadline.left))

    try:
        for label, case in cases.items():
            runners[label] = Runner(case, threads)
        # They load their modules side by side; what is timed begins when all are there, and one does it at a time.
        for stage in (Runner.word, Runner.window):
            for label, runner in list(runners.items()):
                try:
                    first[label] = stage(runner, deadline).get("seconds", 0.0)
                except Stopped as stopped:
                    drop(label, str(stopped))
        with contextlib.suppress(OutOfTime):
            for _ in range(rounds):
                for label, runner in list(runners.items()):
                    try:
                        runner.window(deadline)
                        said = runner.window(deadline)
                    except OutOfTime:
                        raise
                    except Stopped as stopped:
                        drop(label, str(stopped))
                    else:
                        windows[label].append(said["seconds"])
                        last[label] = said
    finally:
        for runner in runners.values():
            runner.close(patience())
    for label in runners:
        if windows[label]:
            cold = first[label] - statistics.median(windows[label])
            found.timed[label] = Timed(max(0.0, cold), tuple(windows[label]), last[label]["peak"], last[label]["told"])
        else:
            found.missing[label] = "no time left"
    return found


# -- the loop's process --------------------------------------------------------------------------------------------


def _main(case_text: str) -> None:
    from resprobe.devices import flush_denormals, synchronize

    flush_denormals()  # for every loop alike, before torch starts its threads

    import importlib

    import torch

    import resprobe as rp
    from benchmarks import loops
    from benchmarks.measuring import Memory, telling

    # What a loop prints is not for the one that calls the turns.
    answers, sys.stdout = sys.stdout, sys.stderr
    case = loops.Case(**json.loads(case_text))
    device = torch.device(case.device)
    if (package := loops.needed(case.loop)) is not None:
        importlib.import_module(package)
    if case.precision == "fp32" and device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    data = rp.load_data(case.data)
    synchronize(device)
    memory = Memory(device)
    before = 0 if device.type == "cuda" else memory.peak()

    def waiting() -> Iterator[None]:
        while sys.stdin.readline():
            yield
        sys.exit(0)

    turns = waiting()

    def answer(**words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    def pause() -> None:
        nonlocal started
        synchronize(device)
        took, peak = time.perf_counter() - started, memory.peak()
        # The card tells of itself while it is warm: its clock falls once it has been idle for a while.
        answer(seconds=took, peak=None if peak is None or before is None else peak - before, told=telling(device))
        next(turns)
        started = time.perf_counter()

    answer(ready=True)
    next(turns)
    started = time.perf_counter()
    loops.LOOPS[case.loop](case, data, pause)


if __name__ == "__main__":
    _main(sys.argv[1])
