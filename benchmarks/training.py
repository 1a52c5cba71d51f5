"""Training throughput: resprobe's loop beside the usual loop, Lightning, timm, and the bare step as the limit.

    python -m benchmarks.training [--networks cifar/resnet-20 cifar/resnet-56] [--rounds 7] [--device auto]

Each loop trains the same network (§4.2) on the same 50,000 random images of CIFAR's shape at batch 128, in a process of
its own, in interleaved rounds of a window of steps (see `benchmarks.turns`, which also says what a cold start is):

- ours: `resprobe.training.Training`, with augmentation, schedule, logging and the safety copy at each log point, here
  one a window; in each precision that the device has, with an eager step, a captured graph (CUDA) and a network that is
  compiled as a whole or block by block;
- deterministic: the same as a study's `--deterministic` has it;
- bare: the limit. Forward, backward, update on one fixed batch, no data, no log, with the same precision and step;
- usual: a DataLoader with PIL transforms, eager float32, `.item()` at each step, as most CIFAR repositories train;
- lightning: `Trainer.fit` with the usual DataLoader and PIL transforms, in float32 and in its mixed bf16;
- timm: `create_loader` (PIL transforms, normalization on the device), its optimizer and the step of its training script,
  in float32, and in bf16 with channels last.

The others are left as they come: on a CUDA device their float32 is torch's default, which is TF32 in convolutions, and
named so. What is not installed or fails is listed as not measured.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.loops import Case, absent, check_network
from benchmarks.measuring import Deadline, Spread, markdown, ratios, write_json
from benchmarks.turns import Race, race
from resprobe.commands import Parser, answer
from resprobe.devices import cores, resolve_device, resolve_precision
from resprobe.environment import environment
from resprobe.errors import not_accepted
from resprobe.steps import STEPS, resolve_step

BATCH = 128
NETWORKS = tuple(f"cifar/{family}-{depth}" for depth in (20, 56, 110) for family in ("plain", "resnet"))


def precisions(device: torch.device) -> tuple[str, ...]:
    """The precisions that the device computes in."""
    fast = ("bf16",) if resolve_precision("auto", device) == "bf16" else ()
    tf32 = ("tf32",) if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else ()
    return ("fp32", *tf32, *fast)


def steps(device: torch.device) -> tuple[str, ...]:
    """The ways to execute a step that the device has."""
    return tuple(step for step in STEPS if step != "auto" and (step != "graph" or device.type == "cuda"))


def loops(device: torch.device) -> list[tuple[str, str, str]]:
    """All (loop, precision, step) that are worth timing on a device; the one that is compared with the rest first."""
    own, ways = precisions(device), steps(device)
    best, usual = own[-1], "tf32" if "tf32" in own else "fp32"
    step = resolve_step("auto", device)
    first = ("ours", best, step)
    every = [("ours", precision, step) for precision in reversed(own) for step in ways]
    every += [("deterministic", best, step)]
    every += [("bare", best, step) for step in ways if step != "compile-blocks"] + [("bare", "fp32", "eager")]
    every += [("usual", usual, "eager")]
    every += [(rival, precision, "eager") for rival in ("lightning", "timm") for precision in {usual: 0, best: 0}]
    return list(dict.fromkeys([first, *every]))


def default_workers() -> int:
    """Processes that load images for those who do not have them on the device: one a core, up to eight."""
    return min(8, cores())


def chosen(texts: Sequence[str] | None, device: torch.device) -> list[tuple[str, str, str]]:
    """The loops named by their labels, such as "ours eager bf16" or "usual fp32"; None: all. Raises `UsageError`."""
    known = {Case(loop, "", precision, step).label: (loop, precision, step) for loop, precision, step in loops(device)}
    for text in texts or ():
        if text not in known:
            raise not_accepted("loops", text, known)
    return [known[text] for text in texts or known]


def cases(
    network: str, which: Sequence[tuple[str, str, str]], **options: Any
) -> tuple[dict[str, Case], dict[str, str]]:
    """The loops that can be timed, by label, and why the others cannot."""
    every = [Case(loop, network, precision, step, **options) for loop, precision, step in which]
    missing = {case.label: reason for case in every if (reason := absent(case.loop))}
    return {case.label: case for case in every if case.label not in missing}, missing


def measure(
    network: str,
    which: Sequence[tuple[str, str, str]],
    rounds: int,
    *,
    threads: int | None = None,
    deadline: Deadline | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One network's loops, timed: images a second, cold starts, ratios of the first to the rest, and what is missing."""
    ready, missing = cases(network, which, **options)
    return outcome(race(ready, rounds, threads=threads, deadline=deadline), ready, missing)


def outcome(found: Race, ready: Mapping[str, Case], missing: Mapping[str, str]) -> dict[str, Any]:
    """What was timed, as figures to print and to keep."""
    speeds = found.rounds({label: case.batch * case.window for label, case in ready.items()})
    record: dict[str, Any] = {"images_per_second": {}, "cold_seconds": {}, "peak_bytes": {}, "told": {}}
    for label, timed in found.timed.items():
        record["images_per_second"][label] = Spread.of([each[label] for each in speeds])
        record["cold_seconds"][label], record["peak_bytes"][label] = timed.cold, timed.peak
        record["told"] |= {label: timed.told} if timed.told else {}
    record["compared"] = compared = next(iter(found.timed), None)
    record["over"] = ratios(speeds, compared) if compared else {}
    record["not_measured"] = {**missing, **found.missing}
    return record


def report(network: str, record: Mapping[str, Any]) -> str:
    """A network's figures as a Markdown table."""
    compared = record["compared"]
    lines = [f"### {network}", ""]
    if compared:
        rows = [
            (
                label,
                f"{speed.median:,.0f} ({speed.low:,.0f}–{speed.high:,.0f})",
                record["over"].get(label, "—"),
                f"{record['cold_seconds'][label]:.1f}",
            )
            for label, speed in record["images_per_second"].items()
        ]
        lines += [markdown(("loop", "images/s, median (range)", f"{compared} / it", "cold start (s)"), rows)]
    lines += [f"not measured: {label} ({reason})" for label, reason in record["not_measured"].items()]
    return "\n".join(lines)


def default_window(device: torch.device) -> int:
    """Steps a window: as many as the recipe averages a logged figure over on a GPU, a second's work on a CPU."""
    return 100 if device.type == "cuda" else 8


def run(options: argparse.Namespace) -> None:
    device = resolve_device(options.device)
    which = chosen(options.loops, device)
    for network in options.networks:
        check_network(network)
    options.window = options.window or default_window(device)
    machine = environment(device)
    print(
        f"{machine['device']}, torch {machine['torch']}, {options.threads or machine['threads']} threads; batch {BATCH}, "
        f"windows of {options.window} steps\n",
        flush=True,
    )
    record = {
        "environment": machine,
        "batch": BATCH,
        "window": options.window,
        "rounds": options.rounds,
        "workers": options.workers,
        "networks": {},
    }
    record["load"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    for network in options.networks:
        found = measure(
            network,
            which,
            options.rounds,
            threads=options.threads,
            batch=BATCH,
            window=options.window,
            device=str(device),
            workers=options.workers,
            data=options.data,
        )
        print(report(network, found) + "\n", flush=True)
        record["networks"][network] = found
    write_json(options.out, record)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--loops", nargs="+", metavar="LOOP", help="by their names in the table; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--window", type=int, help="steps of each loop a window; by default 8, on a GPU 100")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="of a DataLoader; by default one a core, up to 8"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="random", help="random or random:COUNT")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/training.json"))
    return answer(lambda: run(parser.parse(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
