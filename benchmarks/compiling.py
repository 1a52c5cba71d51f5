"""What compiling costs a sweep: the seconds until each of its networks, one after the other, has taken its first step.

    python -m benchmarks.compiling [--networks cifar/plain-20 …] [--steps eager compile compile-blocks]

By default the nine networks of Figure 6 (left and middle). Each way to execute a step (see `resprobe.steps`) has a process
of its own, with nothing compiled before, which trains the networks in their order as a study does. A first step is all from
the network's name to the end of its first iteration (building, compiling, on CUDA capturing); then come `--later` further
iterations, whose median tells what the wait is for. Images are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import resprobe as rp
from benchmarks import data as _random  # noqa: F401 (registers the data set)
from benchmarks.loops import check_network
from benchmarks.measuring import Deadline, markdown, with_caches_in, write_json
from resprobe.commands import Parser, answer
from resprobe.devices import flush_denormals, resolve_device, resolve_precision, synchronize
from resprobe.environment import environment
from resprobe.errors import last_words, not_accepted
from resprobe.steps import resolve_step
from resprobe.training import Training

FIGURE_6 = (
    *(f"cifar/plain-{depth}" for depth in (20, 32, 44, 56)),
    *(f"cifar/resnet-{depth}" for depth in (20, 32, 44, 56, 110)),
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Networks that one process trains for a moment each, and how."""

    networks: tuple[str, ...]
    step: str
    device: str
    precision: str
    batch: int = 128
    later: int = 10
    data: str = "random:1024"


def steps(device: torch.device) -> tuple[str, ...]:
    """The steps worth comparing: what `auto` takes, and the two that compile."""
    return resolve_step("auto", device), "compile", "compile-blocks"


def in_turn(sweep: Sweep) -> list[dict[str, Any]]:
    """Trains the networks in this process: a row each of its first step and the later ones, in seconds."""
    device, data = torch.device(sweep.device), rp.load_data(sweep.data)
    recipe = dataclasses.replace(rp.recipes.cifar_paper(), batch_size=sweep.batch, learning_rate=0.01)
    rows = []
    for name in sweep.networks:
        started = time.perf_counter()
        training = Training(rp.build(name), data, recipe, device=device, precision=sweep.precision, step=sweep.step)
        training.network.train()
        drawn = training.batches.drawn(0)
        took = []
        for _ in range(1 + sweep.later):
            training.step(*next(drawn))
            synchronize(device)
            took.append(time.perf_counter() - started)
            started = time.perf_counter()
        rows.append({"network": name, "first": took[0], "later": statistics.median(took[1:])})
        # A step that could not be taken as asked is not what its name says.
        assert training.how == resolve_step(sweep.step, device), training.how
    return rows


def measure(sweep: Sweep, deadline: Deadline | None = None) -> dict[str, Any]:
    """`in_turn` in a process of its own, with empty caches. If it did not come to an end, `missing` says why."""
    if deadline is not None and deadline.left <= 0:
        return {"step": sweep.step, "rows": [], "missing": "no time left"}
    with tempfile.TemporaryDirectory(prefix="resprobe-", ignore_cleanup_errors=True) as cache:
        command = [sys.executable, "-m", "benchmarks.compiling", "--sweep", json.dumps(dataclasses.asdict(sweep))]
        try:
            done = subprocess.run(
                command,
                env=with_caches_in(cache),
                capture_output=True,
                text=True,
                timeout=None if deadline is None else deadline.left,
            )
        except subprocess.TimeoutExpired:
            return {"step": sweep.step, "rows": [], "missing": "no time left"}
    if done.returncode != 0:
        said = last_words(done.stderr)[:300] or f"its process ended with exit code {done.returncode}"
        return {"step": sweep.step, "rows": [], "missing": said}
    return {"step": sweep.step, "rows": json.loads(done.stdout.splitlines()[-1]), "missing": None}


def waited(rows: Sequence[dict[str, Any]]) -> float:
    """Seconds that first steps took longer than later ones, over all networks."""
    return sum(row["first"] - row["later"] for row in rows)


def report(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row a network, two columns a step; then what all waiting comes to."""
    timed = [each for each in found if each["rows"]]
    lines = []
    if timed:
        header = ["network", *(f"{each['step']}: {what}" for each in timed for what in ("first step, s", "later, ms"))]
        rows = [
            [same[0]["network"], *(f for row in same for f in (f"{row['first']:.1f}", f"{1000 * row['later']:.1f}"))]
            for same in zip(*(each["rows"] for each in timed), strict=True)
        ]
        lines += [markdown(header, rows), ""]
        lines += [f"{each['step']}: {waited(each['rows']):.0f} s of waiting in all" for each in timed]
    lines += [f"not measured: {each['step']} ({each['missing']})" for each in found if each["missing"]]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    if options.sweep:
        flush_denormals()
        given = json.loads(options.sweep)
        print(json.dumps(in_turn(Sweep(**given | {"networks": tuple(given["networks"])}))))
        return
    device = resolve_device(options.device)
    for name in options.networks:
        check_network(name)
    for step in options.steps or ():
        if step not in steps(device):
            raise not_accepted("steps", step, steps(device))
    precision = resolve_precision(options.precision, device)
    machine = environment(device)
    print(
        f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads; {precision}, batch {options.batch}"
    )
    found = [
        measure(Sweep(tuple(options.networks), step, str(device), precision, options.batch, options.later))
        for step in options.steps or steps(device)
    ]
    print("\n" + report(found))
    write_json(options.out, {"environment": machine, "precision": precision, "batch": options.batch, "steps": found})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.compiling", description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=FIGURE_6)
    parser.add_argument("--steps", nargs="+", help="default: what auto takes, compile, compile-blocks")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--later", type=int, default=10, help="iterations after the first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/compiling.json"))
    parser.add_argument("--sweep", help=argparse.SUPPRESS)
    return answer(lambda: run(parser.parse(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
