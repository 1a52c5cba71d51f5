"""What probes cost, as ratios in one run, beside the naive ways to measure the same.

    python -m benchmarks.probes [--depth 110] [--batch 128] [--rounds 7] [--device auto] [--threads N]

Layer responses: forward passes of a residual network (§4.2) on one batch, in interleaved rounds:

- bare: no probe;
- layer-responses: mean and standard deviation of every layer and channel, merged over batches (plugins/layer_responses.py);
- std in a hook: a forward hook on each normalization that calls `.std()`, a figure a layer and batch, not merged;
- captum: `LayerActivation` of all normalizations, then `.std()` of each.

Gradient norms: training steps with the probe at every step, over bare steps.

Operation counts: seconds for the 1202-layer network.

Memory: the peak of 1 and of 8 forward passes, each the median of three processes of its own, over that of one bare pass:
of the process's resident memory on a CPU (Linux), of what torch allocated on a GPU.

Ratios are taken round by round, every round in another order. What else a machine does can only add, so the lower
quartiles are compared too; `rounds` in the record has all times. They are wall time on a GPU. On a CPU they are the
processor time of this process, all threads together, which other processes on the machine disturb least.

Targets: layer responses at most 1.35 × a bare pass on a CPU and 1.15 × on a GPU, gradient norms at most 1.05 × and 1.03 ×
a step, peak memory within 5 %, the count of 1202 layers in ten seconds. Images are random: what is in them costs nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from resprobe.commands import Parser, answer
from resprobe.devices import autocast, flush_denormals, resolve_device, resolve_precision, synchronize

flush_denormals()  # for every variant alike, before torch starts its threads

import numpy  # noqa: E402
import torch  # noqa: E402
from captum.attr import LayerActivation  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import resprobe as rp  # noqa: E402
from benchmarks.measuring import Memory, Spread, ratios, seconds, write_json  # noqa: E402
from plugins import flops  # noqa: E402
from plugins.gradient_norms import GradientNorms  # noqa: E402
from plugins.layer_responses import LayerResponses  # noqa: E402
from resprobe.environment import environment  # noqa: E402
from resprobe.errors import UsageError  # noqa: E402

TARGETS = {
    "layer-responses": {"cpu": 1.35, "cuda": 1.15},
    "gradient-norms": {"cpu": 1.05, "cuda": 1.03},
    "memory": 1.05,
    "flops": 10.0,
}

PASSES = {"cuda": 8}
"""Passes that a probe stays attached for; elsewhere 1, beside which attaching takes no time."""


def subject(depth: int, batch: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A residual network and a batch in CIFAR's shape, channels last as in training."""
    network = rp.build(f"cifar/resnet-{depth}").to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    return network, images


def cost(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, by the clock that the module's docstring names."""
    if device.type != "cpu":
        return seconds(work, device)
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Seconds of each variant, a mapping a round, with another one first in every round; one round before only warms up."""
    names, done = list(variants), []
    for turn in range(rounds + 1):
        first = turn % len(names)
        times = {name: cost(variants[name], device) for name in names[first:] + names[:first]}
        done.append({name: times[name] for name in names})
    return done[1:]


def with_std(network: nn.Module, images: Tensor, passes: int = 1) -> list[Tensor]:
    """The usual hook."""
    kept: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: kept.append(output.std()))
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    try:
        for _ in range(passes):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def with_captum(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Captum's activations of all layers at once, then their standard deviations."""
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return [activation.std() for activation in LayerActivation(network, layers).attribute(images)]


def forward_rounds(network: nn.Module, images: Tensor, rounds: int, precision: str) -> list[dict[str, float]]:
    """Seconds for a pass of each variant. What watches is attached for `PASSES` passes, as for a set of images."""
    probe, passes = LayerResponses(), PASSES.get(images.device.type, 1)

    def bare() -> None:
        for _ in range(passes):
            network(images)

    def probed() -> None:
        with rp.attach(network, probe):
            bare()

    def captum() -> None:
        for _ in range(passes):
            with_captum(network, images)

    variants: dict[str, Callable[[], object]] = {
        "bare": bare,
        "layer-responses": probed,
        "std in a hook": lambda: with_std(network, images, passes),
        "captum": captum,
    }
    network.eval()
    with torch.no_grad(), autocast(images.device, precision):
        timed = in_turns(variants, rounds, images.device)
    return [{name: seconds / passes for name, seconds in each.items()} for each in timed]


def step_rounds(network: nn.Module, images: Tensor, rounds: int, precision: str) -> list[dict[str, float]]:
    """Seconds for a training step without and with gradient norms, and with layer responses."""
    labels = torch.randint(0, 10, (len(images),), device=images.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    iteration = 0

    def step(probes: list[rp.Probe]) -> None:
        # As in `resprobe.training`: attached for the step, read when gradients are complete.
        nonlocal iteration
        for probe in probes:
            probe.attach(network)
        with autocast(images.device, precision):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        for probe in probes:
            probe.after_backward(network, iteration)
            probe.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        iteration += 1

    norms, responses = GradientNorms(rp.probes.every(1)), LayerResponses(rp.probes.every(1))
    variants = {"bare": [], "gradient-norms": [norms], "layer-responses": [responses]}
    network.train()
    return in_turns({name: partial(step, probes) for name, probes in variants.items()}, rounds, images.device)


def peak_bytes(depth: int, batch: int, device: torch.device, precision: str, passes: int, probed: bool) -> int:
    """Peak of some forward passes in this process, which has done nothing before."""
    network, images = subject(depth, batch, device)
    network.eval()
    probe = LayerResponses() if probed else rp.Probe()
    gc.collect()
    memory = Memory(device)
    with torch.no_grad(), autocast(device, precision), rp.attach(network, probe):
        for _ in range(passes):
            network(images)
    synchronize(device)
    peak = memory.peak()
    if peak is None:
        raise UsageError(f"memory cannot be told on {device.type} here; a CPU under Linux and CUDA can")
    return peak


def peaks(options: argparse.Namespace) -> dict[str, list[int]]:
    """Peaks of fresh processes, three of each: now and then an allocator leaves holes."""
    runs = {"bare, 1 pass": (1, False), "bare, 8 passes": (8, False), "1 pass": (1, True), "8 passes": (8, True)}
    found: dict[str, list[int]] = {name: [] for name in runs}
    for name in list(runs) * 3:
        passes, probed = runs[name]
        command = [sys.executable, "-m", "benchmarks.probes", "--peak-of", str(passes), *(["--probed"] * probed)]
        for option in ("depth", "batch", "device", "precision", "threads"):
            command += [f"--{option}", str(getattr(options, option))] if getattr(options, option) is not None else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name].append(json.loads(done.stdout))
    return found


def report(title: str, rounds: list[dict[str, float]], device: torch.device) -> dict[str, Spread]:
    """Prints and gives each variant's ratio to the bare one; beside it, that of the lower quartiles of their times."""
    print(
        f"\n{title}: bare {Spread.of([each['bare'] for each in rounds])} s; over bare, median (range); lower quartiles"
    )
    found = {name: ratios(rounds, name)["bare"] for name in rounds[0] if name != "bare"}
    for name, spread in found.items():
        target = TARGETS.get(name, {}).get(device.type) if title.startswith(f"{name}:") else None
        quartile, bare = (numpy.quantile([each[which] for each in rounds], 0.25) for which in (name, "bare"))
        print(f"  {name:<18} {spread}  {quartile / bare:.2f}" + (f"  target {target}" if target else ""))
    return found


def run(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    if options.peak_of:
        found = peak_bytes(options.depth, options.batch, device, precision, options.peak_of, options.probed)
        print(json.dumps(found))
        return
    machine = environment(device)
    print(
        f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads; ResNet-{options.depth} at batch "
        f"{options.batch} in {precision}"
    )
    network, images = subject(options.depth, options.batch, device)
    passes = forward_rounds(network, images, options.rounds, precision)
    steps = step_rounds(network, images, options.rounds, precision)
    record = {"environment": machine, "precision": precision, "depth": options.depth, "batch": options.batch}
    record["targets"] = TARGETS
    record["rounds"] = {"pass": passes, "step": steps}
    record["pass_over_bare"] = report("layer-responses: a forward pass", passes, device)
    record["step_over_bare"] = report("gradient-norms: a training step", steps, device)

    deep = rp.build("cifar/resnet-1202")
    record["flops_seconds"] = cost(lambda: flops.count(deep, (3, 32, 32)), torch.device("cpu"))
    print(f"\nflops: the 1202-layer network in {record['flops_seconds']:.1f} s  target {TARGETS['flops']}")

    record["peak_bytes"] = found = peaks(options)
    bare = statistics.median(found["bare, 1 pass"])
    print("\nmemory of layer-responses: median peak over that of one bare pass")
    for name, each in found.items():
        peak = statistics.median(each)
        print(f"  {name:<16} {peak / 2**20:8.1f} MiB  {peak / bare:.3f}  target {TARGETS['memory']}")
    write_json(options.out, record)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.probes", description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/probes.json"))
    parser.add_argument("--peak-of", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--probed", action="store_true", help=argparse.SUPPRESS)
    return answer(lambda: run(parser.parse(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
