"""Numbers on a card: one command that checks and measures what a GPU is for, in under eight minutes.

    python -m benchmarks.card [--minutes 7.5] [--parts equality training …] [--out results/benchmarks/card.json]

In this order, each part with its share of the time:

- equality: a training with the captured and with the compiled step beside the eager one, from the same seed, in float32
  and bf16: losses at the log points and weights at the end. A captured step runs the same kernels and must be equal to
  the last bit wherever the eager one, run twice, is. Otherwise, and for a compiled step, which rounds elsewhere, the
  tolerance is `TOLERANCE` times what rounding does to the eager training in as many iterations: every initial weight
  moved by the last digit of the precision. Rounding grows as training goes on, so this is asked of every log point;
- training: `benchmarks.training` for ResNet-20, -56, -110 and their plain twins, with cold starts;
- probes: what they cost (`benchmarks.probes`, all but memory); detection: beside torchvision's (`benchmarks.detection`);
- checkpoint, start, concurrency (1, 2, 4, 8 runs at a time), depth: as in `benchmarks.scaling`;
- compiling: what Figure 6's networks wait for their first steps in one process (`benchmarks.compiling`).

It prints one Markdown table with card, versions and date, and lists what was not measured and why. `--device cpu --quick`
does a small version of it without a GPU, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resprobe.commands import Parser, answer
from resprobe.devices import deterministic, flush_denormals, resolve_device

flush_denormals()

import torch  # noqa: E402

import resprobe as rp  # noqa: E402
from benchmarks import compiling, scaling, training  # noqa: E402
from benchmarks import data as _random  # noqa: E402, F401 (registers the data set)
from benchmarks.loops import OWN  # noqa: E402
from benchmarks.measuring import Deadline, Spread, markdown, ratios, write_json  # noqa: E402
from resprobe.environment import environment  # noqa: E402
from resprobe.errors import UsageError, one_line  # noqa: E402
from resprobe.steps import resolve_step  # noqa: E402

TOLERANCE = 10.0
_COMPILING = 40.0
"""Seconds that a part must have left for a step to be compiled in it. On two CPU cores ResNet-20 takes 46 to 56."""


@dataclasses.dataclass
class Card:
    """The device, how much time there is, and what has been found: rows of (what, setting, measured, beside it)."""

    device: torch.device
    quick: bool
    deadline: Deadline
    rows: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def precision(self) -> str:
        return training.precisions(self.device)[-1]

    def add(self, what: str, setting: str, measured: object, beside: object = "") -> None:
        self.rows.append((what, setting, str(measured), str(beside)))

    def where(self, deadline: Deadline) -> scaling.Where:
        step = resolve_step("auto", self.device)
        data = "random:256" if self.quick else "random:4096"
        return scaling.Where(self.device, self.precision, step, data=data, deadline=deadline)

    def plan(self, **changes: Any) -> scaling.Plan:
        plan = dataclasses.replace(scaling.CUDA, **changes)
        if not self.quick:
            return plan
        few = dataclasses.replace(plan, depths=(20, 32, 44), checkpoint_depths=(20,), concurrency=(1,))
        return dataclasses.replace(few, batch=8, iterations=4, starts=1, rounds=1, window=1)


# -- equality ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two trainings are apart: the relative difference of the loss at each log point, and |Δw| / |w| over all weights."""

    losses: tuple[float, ...]
    weights: float

    @classmethod
    def between(cls, one: rp.Run, other: rp.Run) -> Difference:
        losses = one.history["train_loss"], other.history["train_loss"]
        first, second = one.network.state_dict(), other.network.state_dict()
        pairs = [(first[name].double(), second[name].double()) for name in first if first[name].is_floating_point()]
        apart = sum(float((a - b).square().sum()) for a, b in pairs)
        size = sum(float(a.square().sum()) for a, _ in pairs)
        return cls(tuple((losses[0] - losses[1]).abs() / losses[0].abs()), (apart / size) ** 0.5)

    @property
    def exact(self) -> bool:
        return self.weights == 0 and not any(self.losses)

    def within(self, other: Difference, times: float) -> bool:
        """Whether this is at most so many times what the other has come to by the next log point, at every one.

        What comes much earlier is no rounding; just when rounding begins to grow is chance.
        """
        allowed = [*itertools.accumulate(other.losses, max)][1:] + [max(other.losses)]
        losses = all(ours <= times * most for ours, most in zip(self.losses, allowed, strict=True))
        return losses and self.weights <= times * other.weights

    def __str__(self) -> str:
        if self.exact:
            return "equal to the last bit"
        return f"losses {self.losses[0]:.0e} at first, {max(self.losses):.0e} at most, weights {self.weights:.0e} apart"


def trained(card: Card, precision: str, step: str, iterations: int, *, nudged: bool = False) -> rp.Run:
    """ResNet-20 from seed 0; `nudged`: with every initial weight moved, up or down, by the last digit of `precision`."""
    digit = torch.finfo(torch.bfloat16 if precision == "bf16" else torch.float32).eps
    with rp.seeded(0), torch.no_grad():
        network = rp.build("cifar/resnet-20")
        for parameter in network.parameters() if nudged else ():
            parameter.mul_(1 + digit * torch.randn_like(parameter).sign())
    recipe = dataclasses.replace(
        rp.recipes.cifar_paper(iterations),
        batch_size=16 if card.quick else 128,
        learning_rate=0.01,
        window=min(10, iterations),
        evaluations=1,
        bn_test_statistics="running",
    )
    data = "random:256" if card.quick else "random:4096"
    with same_kernels(), warnings.catch_warnings():
        # Else what says that it was captured would compare the eager step with itself.
        warnings.filterwarnings("error", message="the training step cannot be captured")
        return rp.train(network, data, recipe, device=card.device, precision=precision, step=step, progress=False)


@contextlib.contextmanager
def same_kernels() -> Iterator[None]:
    """Kernels that repeat their last digits, chosen by rule, not by a race; float32 is float32, not TF32."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = False, False
    try:
        with deterministic():
            yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def verdict(step: str, found: Difference, again: Difference, nudge: Difference) -> tuple[bool, str]:
    """Whether a step is equal to the eager one, and by which measure; `again`: the eager one from itself."""
    if found.exact:
        return True, "equal"
    if step == "graph" and again.exact:
        return False, "NOT EQUAL: the eager step repeats itself to the last bit"
    good = found.within(nudge, TOLERANCE)
    measure = f"{TOLERANCE:g} × what the weights' last digit does ({nudge})"
    return good, f"within {measure}" if good else f"NOT WITHIN {measure}"


def equality(card: Card, deadline: Deadline) -> None:
    iterations = 4 if card.quick else 300
    others = [step for step in training.steps(card.device) if step != "eager"]
    others.sort(key="compile".__eq__)  # last, what takes longest to be ready
    if card.quick:
        card.missing |= {f"equality: {step}": "left out by --quick" for step in others}
        others = []
    found = card.record["equality"] = []
    precisions = tuple(dict.fromkeys(("fp32", card.precision)))
    known: dict[str, tuple[rp.Run, Difference, Difference]] = {}
    for precision in precisions:
        if deadline.left <= 0:
            card.missing[f"equality: eager in {precision}"] = "no time left"
            continue
        eager = trained(card, precision, "eager", iterations)
        again = Difference.between(eager, trained(card, precision, "eager", iterations))
        nudge = Difference.between(eager, trained(card, precision, "eager", iterations, nudged=True))
        known[precision] = eager, again, nudge
        setting = f"ResNet-20, {precision}, {iterations} iterations"
        card.add("eager against itself", setting, again, f"with the weights' last digit moved: {nudge}")
        found.append({"precision": precision, "step": "eager", "difference": again, "nudged": nudge})
    for step, precision in itertools.product(others, precisions):
        needs = _COMPILING if step.startswith("compile") else 0.0  # which cannot be broken off
        if precision not in known or deadline.left <= needs:
            card.missing[f"equality: {step} in {precision}"] = "no time left"
            continue
        eager, again, nudge = known[precision]
        try:
            difference = Difference.between(eager, trained(card, precision, step, iterations))
        except Exception as error:  # the others' equality is not lost with it
            card.missing[f"equality: {step} in {precision}"] = one_line(error, named=True)[:200]
            continue
        good, why = verdict(step, difference, again, nudge)
        card.add(f"{step} against eager", f"ResNet-20, {precision}, {iterations} iterations", difference, why)
        found.append({"precision": precision, "step": step, "difference": difference, "equal": good, "why": why})


# -- speed ---------------------------------------------------------------------------------------------------------


def throughput(card: Card, deadline: Deadline) -> None:
    """The first network with all that matters but compiling, which comes last; the deeper ones with our step, the bare
    one and the usual loop; plain twins, which differ by their additions, with ours and the usual loop."""
    best, step = card.precision, resolve_step("auto", card.device)
    ours, usual = ("ours", best, step), next(each for each in training.loops(card.device) if each[0] == "usual")
    some = list(dict.fromkeys([ours, ("ours", best, "eager"), ("bare", best, step), usual]))
    every = [
        each
        for each in training.loops(card.device)
        if not each[2].startswith("compile") and (each[0] not in ("bare", "lightning", "timm") or each[1] == best)
    ]
    wanted: dict[str, list[tuple[str, str, str]]] = {
        "cifar/resnet-20": every,
        "cifar/resnet-110": some,
        "cifar/resnet-56": some,
        **{f"cifar/plain-{depth}": [ours, usual] for depth in (20, 56, 110)},
        "cifar/resnet-20 compiled": [("ours", best, "compile-blocks"), ("ours", best, "compile"), ours],
        "cifar/resnet-110 compiled": [("ours", best, "compile-blocks"), ours],
    }
    if card.quick:
        wanted = {"cifar/resnet-20": [ours, usual]}
    card.record["training"], workers = {}, training.default_workers()
    for subject, which in wanted.items():
        network = subject.split()[0]
        if deadline.left <= 0:
            card.missing[f"training of {subject}"] = "no time left"
            continue
        found = training.measure(
            network,
            which,
            1 if card.quick else 3,
            deadline=deadline,
            batch=8 if card.quick else training.BATCH,
            window=1 if card.quick else 50,
            device=str(card.device),
            workers=workers,
            data="random:256" if card.quick else "random",
        )
        card.record["training"][subject] = found
        for label, speed in found["images_per_second"].items():
            beside = f"cold start {found['cold_seconds'][label]:.1f} s"
            if label in found["over"]:
                beside = f"{found['compared']} / it {found['over'][label]}; {beside}"
            else:
                beside = f"64,000 iterations: {64_000 * training.BATCH / speed.median / 60:.1f} min; {beside}"
            loader = "" if label.split()[0] in OWN else f", {workers} loader processes"
            card.add("training, images/s", f"{subject}, {label}{loader}", speed, beside)
        card.missing |= {f"training of {subject}, {label}": why for label, why in found["not_measured"].items()}


def compiling_costs(card: Card, deadline: Deadline) -> None:
    """Seconds that Figure 6's networks wait for their first steps; the step that is done soonest comes first."""
    found = card.record["compiling"] = []
    for step in (resolve_step("auto", card.device), "compile-blocks", "compile"):
        networks = compiling.FIGURE_6[:1] if card.quick else compiling.FIGURE_6
        if card.quick and step != "eager":
            card.missing[f"compiling: {step}"] = "left out by --quick"
            continue
        some = {"batch": 8, "later": 2, "data": "random:64"} if card.quick else {}
        sweep = compiling.Sweep(networks, step, str(card.device), card.precision, **some)
        found.append(each := compiling.measure(sweep, deadline))
        if each["missing"]:
            card.missing[f"compiling: {step}"] = each["missing"]
            continue
        waited = f"{compiling.waited(each['rows']):.0f}"
        card.add("waiting for first steps, s", f"{len(networks)} networks of Figure 6, {step}", waited)


def concurrency(card: Card, deadline: Deadline) -> None:
    trained_there = card.record.get("training", {}).get("cifar/resnet-20", {})
    speed = next(iter(trained_there.get("images_per_second", {}).values()), None)
    # Eight seconds of training each: the processes do not start at the same moment.
    iterations = 10_000 if speed is None else max(1000, round(8 * speed.median / 128))
    found = scaling.of_concurrency(card.where(deadline), card.plan(iterations=iterations))
    card.record["concurrency"] = found
    first = found["rows"][0] if found["rows"] else {}
    for row in found["rows"]:
        card.add(
            "runs at a time, images/s",
            f"{found['network']}, {row['together']} at a time, {found['iterations']:,} iterations",
            f"{row['training']:,.0f} (× {row['training'] / first['training']:.2f})",
            f"whole sweep: {row['whole']:,.0f} (× {row['whole'] / first['whole']:.2f})",
        )
    card.missing |= {f"concurrency, {what}": why for what, why in found["not_measured"].items()}
    if found["notes"]:
        card.missing["concurrency, computing at the same time"] = "; ".join(found["notes"])


# -- what comes with it --------------------------------------------------------------------------------------------


def probes(card: Card, deadline: Deadline) -> None:
    from benchmarks import probes

    depth, batch, rounds = (20, 8, 1) if card.quick else (110, 128, 5)
    network, images = probes.subject(depth, batch, card.device)
    parts = {
        "layer-responses": ("a forward pass", probes.forward_rounds(network, images, rounds, card.precision)),
        "gradient-norms": ("a training step", probes.step_rounds(network, images, rounds, card.precision)),
    }
    card.record["probes"] = {}
    for probe, (of, timed) in parts.items():
        over = {name: ratios(timed, name)["bare"] for name in timed[0] if name != "bare"}
        card.record["probes"][probe] = {"rounds": timed, "over_bare": over}
        for name, spread in over.items():
            target = probes.TARGETS[probe].get(card.device.type) if name == probe else None
            beside = f"wanted: at most {target}" if target else ""
            card.add("probe, time over bare", f"{name} in {of} of ResNet-{depth}", spread, beside)
    card.missing["memory of probes"] = "see python -m benchmarks.probes"


def detection(card: Card, deadline: Deadline) -> None:
    from benchmarks import detection

    backbone, side, rounds = ("imagenet/resnet-18", 64, 1) if card.quick else ("imagenet/resnet-50", 600, 5)
    models = detection.subjects(backbone, side, card.device)
    images, targets = detection.batch(1, side, card.device)
    setting = f"{backbone}, one image of {side} pixels, {detection.precision(card.device)}"
    timed = detection.timed(models, images, targets, rounds, card.device)
    card.record["detection"] = {"setting": setting, **timed}
    for what, seconds in timed.items():
        speed = Spread.of([1 / each["ours"] for each in seconds])
        over = ratios(seconds, "ours")["torchvision"]
        card.add(f"detection, {what}, images/s", setting, speed, f"time, ours over torchvision's: {over}")


def checkpoint(card: Card, deadline: Deadline) -> None:
    card.record["checkpoint"] = found = scaling.of_checkpoint(card.where(deadline), card.plan())
    for row in found["rows"]:
        card.add(
            "a checkpoint, ms",
            f"ResNet-{row['depth']}, {row['bytes'] / 2**20:.1f} MiB",
            f"{1000 * row['seconds'].median:,.1f}",
            f"{100 * row['share']:.2f} % of the time, one every {found['interval_seconds']:g} s",
        )


def start(card: Card, deadline: Deadline) -> None:
    card.record["start"] = found = scaling.of_start(card.where(deadline), card.plan(starts=3))
    card.add("start of a study, s", "--help", found["help"], f"wanted: at most {found['help_target']}")
    card.add("start of a study, s", "to the first iteration", found["first_iteration"])


def depth(card: Card, deadline: Deadline) -> None:
    plan = card.plan(depths=(20, 110, 434, 1202), rounds=3)
    card.record["depth"] = found = scaling.of_depth(card.where(deadline), plan)
    for row in found["rows"]:
        memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.0f} MiB"
        step = f"{1000 * row['seconds'].median:,.2f}"
        card.add("a training step, ms", f"ResNet-{row['depth']}, batch {found['batch']}", step, memory)
    if line := found.get("seconds_line"):
        card.add(
            "line through depths, ms",
            f"depths {', '.join(str(row['depth']) for row in found['rows'])}",
            f"{1000 * line.intercept:.2f} + {1000 * line.slope:.4f} · depth",
            f"R² = {line.r_squared:.5f}",
        )
    card.missing |= {f"a training step of ResNet-{what}": why for what, why in found["not_measured"].items()}


# -- all of it -----------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Card, Deadline], None], float, float]] = {
    "equality": (equality, 0, 90),
    "training": (throughput, 0, 200),
    "probes": (probes, 20, 30),
    "detection": (detection, 20, 30),
    "checkpoint": (checkpoint, 10, 20),
    "start": (start, 45, 50),
    "concurrency": (concurrency, 20, 90),
    "compiling": (compiling_costs, 45, 150),
    "depth": (depth, 20, 120),
}
"""Each part, the seconds without which it is not begun, and those after which it begins nothing more unless its share of
what is left is larger, as where few parts are asked for."""


def work_through(card: Card, parts: Sequence[str], keep: Callable[[], None] = lambda: None) -> None:
    """Does the parts in order. One that fails or has no time left is listed, and the next is begun.

    `keep` is called after each, so that what ends the whole does not take what has been measured.
    """
    for index, name in enumerate(parts):
        part, needs, most = PARTS[name]
        if card.deadline.left <= needs:
            card.missing[name] = "no time left"
            continue
        share = card.deadline.left * most / sum(PARTS[other][2] for other in parts[index:])
        print(f"{name} …", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            part(card, card.deadline.within(max(most, share)))
        except Exception as error:  # what has been measured must not be lost with what could not be
            traceback.print_exc()
            card.missing[name] = one_line(error, named=True)[:200]
        card.record.setdefault("seconds", {})[name] = time.monotonic() - started
        keep()
    for name in PARTS:
        if name not in parts:
            card.missing[name] = "not asked for"


def title(machine: dict[str, object], device: torch.device) -> str:
    """What everything was measured on and with."""
    words = [f"{machine['device']}", f"torch {machine['torch']}", f"Python {machine['python']}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        words.insert(
            1, f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        )
        words += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    words += [f"resprobe {machine['resprobe']} ({str(machine.get('commit', 'no commit'))[:10]})", f"{machine['date']}"]
    return ", ".join(words)


def report(card: Card, machine: dict[str, object]) -> str:
    """Everything as Markdown: title, table, what was not measured."""
    lines = [title(machine, card.device), ""]
    for subject, found in card.record.get("training", {}).items():
        told = found["told"].get(found["compared"], {})
        said = [f"{name.replace('_', ' ')} {figure:g}" for name, figure in told.items()]
        lines += [f"{subject}, {found['compared']}: {', '.join(said)}"] if said else []
    lines += ["", markdown(("what", "setting", "measured", "beside it"), card.rows), ""]
    if card.missing:
        lines += ["Not measured:", "", *(f"- {what}: {why}" for what, why in card.missing.items())]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    started = time.monotonic()
    device = resolve_device(options.device)
    if device.type != "cuda" and not options.quick:
        raise UsageError(
            f"device (={device.type!r}) is no CUDA device, which this benchmark is for; --device cpu --quick does a small "
            "version without one"
        )
    card = Card(device, options.quick, Deadline(60 * options.minutes))
    machine = environment(device)
    card.record |= {"environment": machine, "quick": options.quick, "precision": card.precision}
    card.record["load"] = os.getloadavg() if hasattr(os, "getloadavg") else None

    def keep() -> None:
        card.record |= {"rows": card.rows, "not_measured": card.missing, "minutes": (time.monotonic() - started) / 60}
        write_json(options.out, card.record, say=False)

    work_through(card, options.parts, keep)
    keep()
    print(report(card, machine))
    print(f"\n{card.record['minutes']:.1f} minutes; {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.card", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="after these nothing new is begun")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a few iterations of everything, to see that it works")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/card.json"))
    return answer(lambda: run(parser.parse(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
