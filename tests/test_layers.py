"""Convolutions whose gradients oneDNN gets wrong on a CPU are computed in another way, whoever made them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import resprobe as rp
from resprobe.layers import Layers, Subsampling1x1, subsampling

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("in_channels", "kernel", "stride", "ours"),
    [(4, 1, 2, True), (15, 1, 3, True), (16, 1, 2, False), (4, 1, 1, False), (4, 3, 2, False)],
)
def test_strided_pointwise_convolutions_of_few_channels_are_computed_in_another_way(in_channels, kernel, stride, ours):
    made = Layers(norm_name="none").conv(in_channels, 8, kernel, stride)
    assert type(made) is (Subsampling1x1 if ours else nn.Conv2d)
    same = nn.Conv2d(in_channels, 8, kernel, stride, padding=kernel // 2)
    same.load_state_dict(made.state_dict())
    assert len(list(subsampling(same))) == ours
    assert list(subsampling(made)) == []
    for side in (7, 8):
        x = torch.randn(2, in_channels, side, side)
        torch.testing.assert_close(made(x), same(x))
    torch.testing.assert_close(made(x[0]), same(x[0]))


def test_others_are_left_as_they_are():
    others = [nn.Conv2d(4, 8, 1, 2, padding=1), nn.Conv2d(4, 8, 1, 2, groups=2), nn.Conv1d(4, 8, 1, 2), nn.Linear(4, 8)]
    assert list(subsampling(nn.ModuleList(others))) == []
    (found,) = subsampling(nn.ModuleList([*others, nn.Conv2d(4, 8, 1, (1, 2), padding="valid")]))
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(found[1](x), found[0](x))


class Strangers(nn.Module):
    """A network of few channels with a projection, in torch's own layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.project = nn.Conv2d(4, 8, 1, stride=2)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.project(self.first(x).relu()).mean((2, 3)))


def gradients(network: nn.Module) -> None:
    """Raises where a step of a training has other gradients than the same in double precision, which oneDNN has not."""
    from tiny import training

    one = training(network, iterations=1, evaluations=1, bn_batch=None)
    exact = copy.deepcopy(network).double()
    images, labels = one.batches.make(*next(one.batches.drawn(0)))
    one.network.train()
    with one.subsampling:
        one._gradients(images, labels, one.network)
    torch.nn.functional.cross_entropy(exact.train()(images.double().contiguous()), labels).backward()
    for (name, parameter), other in zip(network.named_parameters(), exact.parameters(), strict=True):
        wanted = other.grad.float()
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "made",
    ["Strangers()", "rp.build('cifar/resnet-8', width=4, in_channels=1, shortcut='B')"],
    ids=["stranger", "ours"],
)
def test_a_training_step_has_the_right_gradients(made, threads):
    # In a process of its own, since memory that is written beyond its end breaks whatever comes later.
    code = "import torch, resprobe as rp, test_layers as t; from test_layers import Strangers\n"
    code += f"torch.set_num_threads({threads}); torch.manual_seed(0); t.gradients({made})"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_network_is_its_own_after_a_training():
    network = Strangers()
    rp.train(network, "digits", rp.recipes.digits_quick(iterations=2), device="cpu", precision="fp32", progress=False)
    assert "forward" not in vars(network.project)
