"""How long trainings will take on this device, from a few timed steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch.nn import functional as F

from resprobe.data import Data, FolderSet, Normalization, batches_of
from resprobe.data.folder import loader_processes
from resprobe.devices import autocast, cpu_threads, fastest, memory_format, place
from resprobe.layers import safe_subsampling
from resprobe.networks import NetworkSpec, build
from resprobe.randomness import keeping_random_state
from resprobe.recipes import Recipe
from resprobe.recompute import recomputing

_SMALL_BATCH = 8
_LONG_STEP = 0.5
"""Seconds beyond which a step is not timed whole, but reckoned from one on a few images."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of one training step and of testing one image."""

    step: float
    test: float

    def of_training(self, data: Data, recipe: Recipe, done: int = 0) -> float:
        """Seconds that a training still takes after `done` iterations, with the tests along it and at its end."""
        left = (recipe.iterations - done) / recipe.iterations
        # At the end both kinds of statistics are tested, the precise ones are gathered, and the training set is tested.
        tested = left * recipe.evaluations * len(data.test) + 2 * (len(data.test) + len(data.train))
        return left * recipe.iterations * self.step + tested * self.test


def costs(
    needed: Sequence[tuple[NetworkSpec, Recipe]],
    data: Data,
    *,
    device: torch.device,
    precision: str,
    threads: int,
    recompute: bool = False,
) -> list[Cost]:
    """The cost of each network under its recipe, while `threads` threads compute.

    Time is linear in depth, so that of each kind of network only the shallowest and the deepest are timed.
    """
    kinds: dict[object, dict[int, Cost]] = {}
    for spec, recipe in needed:
        kinds.setdefault(_kind(spec, recipe), {})[spec.depth or 0] = Cost(0, 0)
    with cpu_threads(threads):
        for spec, recipe in needed:
            timed = kinds[_kind(spec, recipe)]
            if (spec.depth or 0) in (min(timed), max(timed)) and timed[spec.depth or 0].step == 0:
                timed[spec.depth or 0] = _timed(spec, recipe, data, device, precision, recompute)
    return [_between(kinds[_kind(spec, recipe)], spec.depth or 0) for spec, recipe in needed]


def _kind(spec: NetworkSpec, recipe: Recipe) -> object:
    return spec.family, spec.options, recipe.batch_size, recipe.bn_batch, recipe.crop


def _between(timed: dict[int, Cost], depth: int) -> Cost:
    low, high = min(timed), max(timed)
    share = (depth - low) / (high - low) if high > low else 0.0
    low_cost, high_cost = timed[low], timed[high]
    return Cost(
        low_cost.step + share * (high_cost.step - low_cost.step),
        low_cost.test + share * (high_cost.test - low_cost.test),
    )


def _timed(
    spec: NetworkSpec, recipe: Recipe, data: Data, device: torch.device, precision: str, recompute: bool
) -> Cost:
    with torch.random.fork_rng(devices=[]):
        network = build(spec)
    place(network, device)
    images = torch.zeros(recipe.batch_size, *_shape(data, recipe), device=device)
    images = images.contiguous(memory_format=memory_format(device))
    labels = torch.zeros(recipe.batch_size, dtype=torch.long, device=device)
    subsampling = safe_subsampling(network, device)
    part_size = recipe.bn_batch or recipe.batch_size

    def step(count: int) -> None:
        network.train()
        with subsampling, recomputing(network) if recompute else nullcontext():
            for part, part_labels in zip(images[:count].split(part_size), labels[:count].split(part_size), strict=True):
                with autocast(device, precision):
                    logits = network(part)
                F.cross_entropy(logits.float(), part_labels).backward()
        network.zero_grad(set_to_none=True)

    def test(count: int) -> None:
        network.eval()
        with torch.inference_mode(), autocast(device, precision):
            network(images[:count])

    reading = _reading(data, recipe) if isinstance(data.train, FolderSet) else 0.0
    with keeping_random_state(network):
        a_step, a_test = (_seconds(work, recipe.batch_size, device) for work in (step, test))
    # Loader processes read while the device computes: the slower of the two sets the pace.
    return Cost(max(a_step, reading * recipe.batch_size), max(a_test / recipe.batch_size, reading))


def _shape(data: Data, recipe: Recipe) -> tuple[int, ...]:
    images = data.train
    if isinstance(images, FolderSet):
        return 3, recipe.crop, recipe.crop
    return tuple(images.images.shape[1:])


def _seconds(work: Callable[[int], None], images: int, device: torch.device) -> float:
    """Seconds of `work` on so many images."""

    few = min(images, _SMALL_BATCH)
    work(few)  # what the device sets up at first use is no part of a step
    reckoned = fastest(lambda: work(few), device) * images / few
    if device.type == "cpu" and reckoned > _LONG_STEP:
        return reckoned
    work(images)
    return fastest(lambda: work(images), device)


def _reading(data: Data, recipe: Recipe) -> float:
    """Seconds a loader needs for one image, with all its processes."""
    few = dataclasses.replace(recipe, batch_size=_SMALL_BATCH, iterations=2)
    nothing = Normalization.channels((0.0,) * 3, (1.0,) * 3)
    # So few that this process reads them itself: a loader's would have read the second batch beside the first.
    files = data.train.select(torch.linspace(0, len(data.train) - 1, 2 * _SMALL_BATCH).long())
    read = batches_of(files, few, 0, nothing, torch.device("cpu")).drawn(0)
    next(read)
    started = time.perf_counter()
    next(read)
    return (time.perf_counter() - started) / _SMALL_BATCH / max(1, loader_processes(len(data.train)))
