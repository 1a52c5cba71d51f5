"""Networks, data and recipes that train in milliseconds, and comparisons to the last bit."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resprobe.data import Data, batches_of, load_data
from resprobe.devices import cpu_threads
from resprobe.networks import NetworkSpec, build
from resprobe.recipes import Recipe
from resprobe.training import Training

CPU = torch.device("cpu")
RECIPE = Recipe(
    "tiny",
    iterations=12,
    batch_size=16,
    learning_rate=0.05,
    milestones=(5, 9),
    augmentation="none",
    window=3,
    evaluations=2,
)


def one_thread() -> AbstractContextManager[None]:
    """One thread is fastest for tiny networks, and splits sums alike in every process."""
    return cpu_threads(1)


def spec(family: str = "cifar/resnet", **options: Any) -> NetworkSpec:
    return NetworkSpec(family, 8, tuple({"width": 4, "in_channels": 1, "num_classes": 10, **options}.items()))


def network(family: str = "cifar/resnet", seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(spec(family, **options))


def digits(train: int = 160, test: int = 60) -> Data:
    whole = load_data("digits")
    parts = whole.train.select(torch.arange(train)), whole.test.select(torch.arange(test))
    return replace(whole, train=parts[0], test=parts[1], identity=f"digits {train} {test}")


def recipe(**changes: Any) -> Recipe:
    return replace(RECIPE, **changes)


def batches(images, recipe: Recipe, seed: int, normalization, device=CPU, start: int = 0, part=slice(None)):
    """The images and labels of a run's batches from iteration `start` on."""
    found = batches_of(images, recipe, seed, normalization, device, part)
    return (found.make(*drawn) for drawn in found.drawn(start))


def training(net: nn.Module | None = None, data: Data | None = None, *, device=CPU, **changes: Any) -> Training:
    """A training of a tiny network on a few digits. `changes` are of the recipe or the training."""
    own = {name: changes.pop(name) for name in ("seed", "precision", "probes", "recompute", "step") if name in changes}
    return Training(net or network(), data or digits(), recipe(**changes), device=device, **own)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the last bit, NaN equal to NaN; what a clock showed is passed over."""
    assert isinstance(one, dict) or type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, dict):
        names = [name for name in one if name not in ("seconds", "images_per_second")]
        assert names == [name for name in other if name not in ("seconds", "images_per_second")], where
        for name in names:
            assert_same(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}/{index}")
    else:
        assert one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other)), (where, one, other)


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


class Boom(Exception):
    """What breaks a pass off."""


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Boom


class Fragile(nn.Module):
    """Raises in the forward or in the backward pass, behind the first block."""

    def __init__(self, where: str):
        super().__init__()
        self.net, self.where = network(), where

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.stage1(self.net.stem(x))
        if self.where == "forward":
            raise Boom
        x = Raising.apply(x) if self.where == "backward" else x
        return self.net.fc(self.net.flatten(self.net.pool(self.net.stage3(self.net.stage2(x)))))


def hook_count(net: nn.Module) -> int:
    """All hooks on all modules and parameters."""
    tables = [table for module in net.modules() for name, table in vars(module).items() if name.endswith("_hooks")]
    of_tensors = [parameter._backward_hooks or {} for parameter in net.parameters()]
    of_tensors += [parameter._post_accumulate_grad_hooks or {} for parameter in net.parameters()]
    return sum(map(len, tables)) + sum(map(len, of_tensors))
