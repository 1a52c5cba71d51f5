"""Training throughput: resprobe's loop beside the usual loop and beside the bare step.

    python -m benchmarks.training [--depths 20 56] [--rounds 9] [--steps 8] [--device auto]

Four variants train the same residual network (§4.2) at batch 128 in interleaved rounds of a few steps:

- ours: `resprobe.training.Training`, with augmentation, schedule, logging and the safety copy at each log point;
- bare, our precision: forward, backward, update on one fixed batch in the loop's own precision and memory format;
- bare, fp32: the same in eager fp32, channels first;
- usual: a DataLoader with PIL transforms, eager fp32, `.item()` at each step, as most CIFAR repositories train.

Images are random bytes of CIFAR's shape: what is in them costs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

from resprobe.devices import autocast, flush_denormals, resolve_device, resolve_precision

flush_denormals()  # for every variant alike, before torch starts its threads

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

import resprobe as rp  # noqa: E402
from benchmarks.measuring import Spread, ratios, seconds, synchronize, write_json  # noqa: E402
from resprobe.environment import environment  # noqa: E402
from resprobe.training import Training  # noqa: E402

BATCH = 128
IMAGES = 2048
WARM_UP = 3
"""Steps of a rival before those that are timed."""


def random_data() -> rp.Data:
    """Random bytes in CIFAR's shape."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, 10, (IMAGES,), generator=random)
    whole = rp.ImageSet(images, labels)
    return rp.Data("random", "random", whole, whole.select(torch.arange(128)), tuple("0123456789"))


class Pictures(Dataset):
    """The same images as the usual data set gives them: PIL images through transforms."""

    def __init__(self, images: rp.ImageSet):
        to_pil = transforms.ToPILImage()
        self.pictures = [to_pil(image) for image in images.images]
        self.labels = images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.pictures[index]), self.labels[index]


def sgd(network: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, **options)


def bare_step(depth: int, device: torch.device, precision: str):
    """A function that does one step on a fixed batch."""
    ours = precision != "fp32 channels first"
    network = rp.build(f"cifar/resnet-{depth}").to(device)
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(0, 10, (BATCH,), device=device)
    if ours:
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = sgd(network, fused=True) if ours and device.type in ("cpu", "cuda") else sgd(network)

    def step() -> None:
        with autocast(device, precision if ours else "fp32"):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def usual_loop(depth: int, device: torch.device, images: rp.ImageSet, workers: int):
    """A function that does one iteration of the usual loop, its loader's workers running on beside it."""
    network = rp.build(f"cifar/resnet-{depth}").to(device)
    optimizer = sgd(network)
    loader = DataLoader(
        Pictures(images),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    def step() -> float:
        pictures, labels = next(batches)
        pictures, labels = pictures.to(device), labels.to(device)
        loss = F.cross_entropy(network(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def measure(depth: int, device: torch.device, precision: str, rounds: int, steps: int, workers: int) -> list[dict]:
    """Images a second of each variant, a mapping a round; the first round only warms up."""
    data = random_data()
    own_step = bare_step(depth, device, precision)
    fp32_step = bare_step(depth, device, "fp32 channels first")
    usual_step = usual_loop(depth, device, data.train, workers)
    recipe = rp.recipes.cifar_paper()
    # A log point ends each round, so that logging and its safety copy are paid for, as often as every `steps` steps.
    # Of two windows the first is not timed: whoever comes after another variant first gets its caches and threads back.
    total = 2 * steps * (rounds + 1)
    recipe = dataclasses.replace(recipe, iterations=total, milestones=(), window=steps, evaluations=1)
    training = Training(rp.build(f"cifar/resnet-{depth}"), data, recipe, device=device, precision=precision)
    done: list[dict] = []
    timed_from: float | None = None

    def at_log_point(training: Training, news: object) -> None:
        nonlocal timed_from
        synchronize(device)
        if timed_from is None:
            timed_from = time.perf_counter()
            return
        took = {"ours": time.perf_counter() - timed_from}
        for name, step in (("bare, our precision", own_step), ("bare, fp32", fp32_step), ("usual", usual_step)):
            for _ in range(WARM_UP):
                step()
            took[name] = seconds(lambda step=step: [step() for _ in range(steps)], device)
        done.append({name: steps * BATCH / duration for name, duration in took.items()})
        timed_from = None

    training.test_now = lambda part=None: rp.Evaluation(1, 0, 0.0, 0.0, 0.0)  # testing is no part of a step
    training.run(at_log_point)
    return done[1:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="steps of each variant a round")
    parser.add_argument("--workers", type=int, default=2, help="of the usual loop's DataLoader")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/training.json"))
    options = parser.parse_args()
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    machine = environment(device)
    print(
        f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads; ours in {precision}, batch {BATCH}"
    )
    record = {"environment": machine, "precision": precision, "batch": BATCH, "steps": options.steps, "networks": {}}
    for depth in options.depths:
        rounds = measure(depth, device, precision, options.rounds, options.steps, options.workers)
        speed = {name: Spread.of([each[name] for each in rounds]) for name in rounds[0]}
        against = ratios(rounds, "ours")
        print(f"\nResNet-{depth}: images/s, median (range)")
        for name, spread in speed.items():
            print(f"  {name:<22} {spread}")
        for name, spread in against.items():
            print(f"  ours / {name:<15} {spread}")
        record["networks"][f"resnet-{depth}"] = {"images_per_second": speed, "ours_over": against}
    write_json(options.out, record)


if __name__ == "__main__":
    main()
