"""How cost grows: with depth, with the batch, with runs side by side; what a checkpoint costs, and starting a study.

    python -m benchmarks.scaling [--quick] [--parts depth batch concurrency checkpoint start] [--depths 20 … 1202]

- depth: seconds and memory of a training step of residual networks (§4.2), with the straight line a + b · depth through
  them, its R² and what each depth differs from it. Every layer of a stage costs the same, so a line is what should be
  seen; a network whose cost grew faster would show at the deep end.
- batch: the same for one network over sizes of the mini-batch, as images a second.
- concurrency: K equal runs at a time through `resprobe.sweep`. "while training" sums their speeds, each on its own clock
  from its first log point to the last but one, "whole sweep" is all images over all time, with the start of processes,
  the survey, the tests and what is written. Why processes take turns on a card, where they do, is said below.
- checkpoint: seconds to write one, its size, and the share of a training's time at the interval at which
  `resprobe.keeping` writes one.
- start: `python -m studies.degradation --help`, and the same study up to its first iteration.

Depth and batch are trained by resprobe's loop in a process each (see `benchmarks.turns`): in interleaved rounds on a CPU,
one after the other on a GPU, whose memory they would have to share. Memory is what torch allocated on a GPU, what the
process grew by on a CPU. Images are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import resprobe as rp
from benchmarks import data as _random  # noqa: F401 (registers the data set)
from benchmarks.loops import Case, check_network
from benchmarks.measuring import Deadline, Line, Spread, markdown, seconds, write_json
from benchmarks.turns import Race, race
from resprobe import keeping, runs
from resprobe.checkpoints import save_checkpoint
from resprobe.commands import Parser, answer
from resprobe.devices import flush_denormals, resolve_device, resolve_precision
from resprobe.environment import environment
from resprobe.errors import UsageError
from resprobe.steps import resolve_step
from resprobe.sweep import Job, run_all
from resprobe.training import Training

if TYPE_CHECKING:
    import pandas

HELP_TARGET = 1.5
"""Seconds that a study's --help may take."""
INTERVAL = keeping.CHECKPOINT_SECONDS
STUDY = "studies.degradation"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured. `batch` is for the part on depths, `iterations` for each run of the part on concurrency."""

    depths: tuple[int, ...]
    batch: int
    batches: tuple[int, ...]
    batch_depth: int
    concurrency: tuple[int, ...]
    iterations: int
    checkpoint_depths: tuple[int, ...]
    rounds: int
    window: int
    starts: int


CPU = Plan((20, 56, 110, 218, 434, 866, 1202), 16, (16, 32, 64, 128, 256), 20, (1, 2), 100, (20, 110, 1202), 5, 2, 5)
CUDA = Plan(
    (20, 56, 110, 218, 434, 866, 1202),
    128,
    (32, 64, 128, 256, 512, 1024, 2048),
    20,
    (1, 2, 4, 8),
    10_000,
    (20, 110, 1202),
    5,
    20,
    5,
)
QUICK = Plan((20, 56, 110), 16, (16, 64), 20, (1, 2), 20, (20,), 2, 1, 2)


@dataclasses.dataclass(frozen=True)
class Where:
    """What the figures are measured on and with."""

    device: torch.device
    precision: str
    step: str
    threads: int | None = None
    data: str = "random:4096"
    deadline: Deadline | None = None

    def race(self, networks: dict[str, tuple[str, int]], plan: Plan) -> Race:
        """resprobe's loop on networks, by label, with their batch."""
        cases = {
            label: Case(
                "ours", network, self.precision, self.step, batch, plan.window, str(self.device), data=self.data
            )
            for label, (network, batch) in networks.items()
        }
        together = self.device.type == "cpu"
        return race(cases, plan.rounds, threads=self.threads, deadline=self.deadline, together=together)


# -- depth and batch -----------------------------------------------------------------------------------------------


def of_depth(where: Where, plan: Plan) -> dict[str, Any]:
    """Seconds and bytes of a step over depths, and the lines through them."""
    found = where.race({str(depth): (f"cifar/resnet-{depth}", plan.batch) for depth in plan.depths}, plan)
    rows = [
        {
            "depth": int(label),
            "seconds": Spread.of([window / plan.window for window in timed.windows]),
            "bytes": timed.peak,
        }
        for label, timed in found.timed.items()
    ]
    return {"batch": plan.batch, "rows": rows, "not_measured": found.missing, **lines(rows)}


def lines(rows: Sequence[dict[str, Any]]) -> dict[str, Line]:
    """The straight lines through the medians of seconds, and through bytes where they are known, over depth.

    Nothing where a line through the points would say nothing: it needs three.
    """
    depths = [row["depth"] for row in rows]
    figures = {"seconds": [row["seconds"].median for row in rows], "bytes": [row["bytes"] for row in rows]}
    return {
        f"{name}_line": Line.through(depths, values)
        for name, values in figures.items()
        if len(depths) > 2 and None not in values
    }


def say_depth(found: dict[str, Any]) -> str:
    """A Markdown table, with each depth's difference from the line in percent of what was measured."""

    def off(name: str, index: int, measured: float) -> str:
        line = found.get(f"{name}_line")
        return "" if line is None else f" ({100 * line.residuals[index] / measured:+.1f} %)"

    table = [
        (
            row["depth"],
            f"{1000 * row['seconds'].median:,.1f}{off('seconds', index, row['seconds'].median)}",
            "not known" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.0f}{off('bytes', index, row['bytes'])}",
        )
        for index, row in enumerate(found["rows"])
    ]
    said = [markdown(("depth", "ms a step (from the line)", "MiB (from the line)"), table)]
    for name, unit, scale in (("seconds", "ms", 1000), ("bytes", "MiB", 2**-20)):
        if line := found.get(f"{name}_line"):
            said.append(
                f"{name}: {scale * line.intercept:,.2f} + {scale * line.slope:,.3f} · depth {unit}, R² = {line.r_squared:.5f}"
            )
    return "\n".join([said[0], "", *said[1:]])


def of_batch(where: Where, plan: Plan) -> dict[str, Any]:
    """Images a second and bytes over the size of the mini-batch."""
    network = f"cifar/resnet-{plan.batch_depth}"
    found = where.race({str(batch): (network, batch) for batch in plan.batches}, plan)
    rows = [
        {
            "batch": int(label),
            "images_per_second": Spread.of([int(label) * plan.window / window for window in timed.windows]),
            "bytes": timed.peak,
        }
        for label, timed in found.timed.items()
    ]
    return {"network": network, "rows": rows, "not_measured": found.missing}


def say_batch(found: dict[str, Any]) -> str:
    rows = [
        (
            row["batch"],
            f"{row['images_per_second'].median:,.0f}",
            "not known" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.0f}",
        )
        for row in found["rows"]
    ]
    return markdown(("batch", f"images/s, {found['network']}", "MiB"), rows)


# -- runs side by side ---------------------------------------------------------------------------------------------


def of_concurrency(where: Where, plan: Plan) -> dict[str, Any]:
    """ResNet-20 trained K runs at a time, each time in a fresh folder."""
    network = "cifar/resnet-20"
    recipe = dataclasses.replace(
        rp.recipes.cifar_paper(plan.iterations), learning_rate=0.01, evaluations=1, bn_test_statistics="running"
    )
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    notes: list[str] = []
    configs = [
        runs.configure(network, where.data, recipe, seed=seed, precision=where.precision)
        for seed in range(max(plan.concurrency))
    ]
    for together in plan.concurrency:
        # Nothing interrupts a sweep; at worst so many runs take so many times as long.
        last = rows[-1] if rows else {"seconds": 0.0, "together": 1}
        if where.deadline is not None and where.deadline.left <= last["seconds"] * together / last["together"]:
            missing[f"{together} at a time"] = "no time left"
            continue
        with tempfile.TemporaryDirectory(prefix="resprobe-") as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            store, jobs = rp.RunStore(folder), [Job(config, step=where.step) for config in configs[:together]]
            started = time.perf_counter()
            done = run_all(jobs, store, device=where.device, concurrency=together, plugins=["benchmarks.data"])
            took = time.perf_counter() - started
            steps = {run.environment["step"] for run in done}
        notes += [str(each.message) for each in said]
        if steps != {resolve_step(where.step, where.device)}:
            notes.append(f"{together} at a time: trained by the step {', '.join(sorted(steps))}")
        rows.append(together_speed([run.history for run in done], took, recipe.batch_size))
    notes = list(dict.fromkeys(notes))
    return {"network": network, "iterations": plan.iterations, "rows": rows, "notes": notes, "not_measured": missing}


def together_speed(histories: Sequence[pandas.DataFrame], took: float, batch: int) -> dict[str, Any]:
    """Images a second of runs that were trained at a time: while they trained, and of the whole sweep of `took` seconds."""
    speeds = []
    for history in histories:
        # The first log point comes after what is done once, as capturing; the last one after testing.
        done = history.iloc[-2] - history.iloc[0]
        speeds.append(done["iteration"] * batch / done["seconds"])
    images = sum(history["iteration"].iloc[-1] for history in histories) * batch
    return {"together": len(histories), "training": sum(speeds), "whole": images / took, "seconds": took}


def say_concurrency(found: dict[str, Any]) -> str:
    first = next(iter(found["rows"]), None)
    rows = [
        (
            row["together"],
            f"{row['training']:,.0f} (× {row['training'] / first['training']:.2f})",
            f"{row['whole']:,.0f} (× {row['whole'] / first['whole']:.2f})",
            f"{row['seconds']:.1f}",
        )
        for row in found["rows"]
    ]
    title = f"{found['network']}, {found['iterations']:,} iterations each"
    table = markdown(("at a time", "images/s while training", "images/s, whole sweep", "seconds"), rows)
    return "\n\n".join((title, table, *found["notes"]))


# -- a checkpoint --------------------------------------------------------------------------------------------------


def of_checkpoint(where: Where, plan: Plan) -> dict[str, Any]:
    """Seconds and bytes of a checkpoint, and its share of a training's time."""
    rows = []
    data = rp.load_data("random:256")
    for depth in plan.checkpoint_depths:
        recipe = dataclasses.replace(
            rp.recipes.cifar_paper(1), batch_size=8, learning_rate=0.01, bn_test_statistics="running"
        )
        training = Training(
            rp.build(f"cifar/resnet-{depth}"),
            data,
            recipe,
            device=where.device,
            precision=where.precision,
            step="eager",
        )
        training.run()  # before the first step there are no velocities to save
        with tempfile.TemporaryDirectory(prefix="resprobe-") as folder:
            path = Path(folder, "checkpoint.pt")
            took = [
                seconds(lambda path=path, training=training: save_checkpoint(path, training.state()), where.device)
                for _ in range(plan.starts)
            ]
            size = path.stat().st_size
        rows.append(checkpoint_row(depth, took, size))
    return {"interval_seconds": INTERVAL, "rows": rows, "not_measured": {}}


def checkpoint_row(depth: int, took: Sequence[float], size: int) -> dict[str, Any]:
    """A checkpoint's seconds and bytes. `share`: the part of all time that it takes, one an interval."""
    spread = Spread.of(took)
    return {
        "depth": depth,
        "seconds": spread,
        "bytes": size,
        "share": spread.median / (INTERVAL + spread.median),
    }


def say_checkpoint(found: dict[str, Any]) -> str:
    rows = [
        (
            row["depth"],
            f"{1000 * row['seconds'].median:,.1f}",
            f"{row['bytes'] / 2**20:,.1f}",
            f"{100 * row['share']:.2f}",
        )
        for row in found["rows"]
    ]
    return markdown(("depth", "ms a checkpoint", "MiB", f"% of the time, one every {INTERVAL:g} s"), rows)


# -- starting ------------------------------------------------------------------------------------------------------


def of_start(where: Where, plan: Plan) -> dict[str, Any]:
    """Seconds until a study has said how it is used, and until it trains."""
    helps = [_wall([sys.executable, "-m", STUDY, "--help"]) for _ in range(plan.starts)]
    return {
        "help": Spread.of(helps),
        "help_target": HELP_TARGET,
        "first_iteration": Spread.of([_until_first_iteration(where) for _ in range(plan.starts)]),
        "not_measured": {},
    }


def _wall(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - started


def _until_first_iteration(where: Where) -> float:
    """From the command to the moment at which a run has written what it is trained with, and begins."""
    with tempfile.TemporaryDirectory(prefix="resprobe-") as folder:
        command = [sys.executable, "-m", STUDY, "--depths", "20", "--seeds", "0", "--iterations", "1"]
        command += ["--device", str(where.device), "--precision", where.precision, "--runs", folder]
        command += ["--out", str(Path(folder, "out")), "--concurrency", "1"]
        started = time.time()
        _wall(command)
        return min(path.stat().st_mtime for path in Path(folder).glob("*/config.json")) - started


def say_start(found: dict[str, Any]) -> str:
    return markdown(
        ("start of a study", "seconds, median (range)"),
        [
            (f"--help (wanted: at most {found['help_target']})", found["help"]),
            ("to the first iteration of a run", found["first_iteration"]),
        ],
    )


# -- all of it -----------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Where, Plan], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "depth": (of_depth, say_depth),
    "batch": (of_batch, say_batch),
    "concurrency": (of_concurrency, say_concurrency),
    "checkpoint": (of_checkpoint, say_checkpoint),
    "start": (of_start, say_start),
}


def plan_of(options: argparse.Namespace, device: torch.device) -> Plan:
    """The plan for a device, with what was asked for in place of its own. Raises `UsageError`."""
    plan = QUICK if options.quick else CUDA if device.type == "cuda" else CPU
    given = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in dataclasses.fields(Plan)
        if (value := getattr(options, field.name, None)) is not None
    }
    for name, value in given.items():
        for one in value if isinstance(value, tuple) else (value,):
            if one < 1:
                raise UsageError(f"{name} (={one}) must be ≥ 1")
    if given.get("iterations", 3) < 3:
        raise UsageError(
            f"iterations (={given['iterations']}) must be at least 3, to be timed between the first and the last"
        )
    for depth in given.get("depths", ()):
        check_network(f"cifar/resnet-{depth}")
    return dataclasses.replace(plan, **given)


def run(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    flush_denormals()
    device = resolve_device(options.device)
    plan = plan_of(options, device)
    precision = resolve_precision(options.precision, device)
    where = Where(device, precision, resolve_step(options.step, device), options.threads, options.data)
    machine = environment(device)
    print(
        f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads; residual networks in {precision}, "
        f"{where.step} step"
    )
    record = {"environment": machine, "precision": precision, "step": where.step, "plan": plan}
    record["load"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    for name in options.parts:
        measure, say = PARTS[name]
        record[name] = found = measure(where, plan)
        print(f"\n### {name}\n\n{say(found)}", flush=True)
        for what, reason in found["not_measured"].items():
            print(f"not measured: {what} ({reason})", flush=True)
    write_json(options.out, record)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="three depths, two batches, few rounds: about two minutes")
    parser.add_argument("--depths", type=int, nargs="+", help="6n + 2")
    parser.add_argument("--batch", type=int, help="of the depths")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--concurrency", type=int, nargs="+", help="runs at a time")
    parser.add_argument("--iterations", type=int, help="of each of those runs")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--window", type=int, help="steps of each network a round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--step", default="auto")
    parser.add_argument("--data", default="random:4096", help="random or random:COUNT")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/scaling.json"))
    return answer(lambda: run(parser.parse(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
