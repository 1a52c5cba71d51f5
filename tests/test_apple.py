"""On Apple's GPUs, which the tests do not have: no float64, no channels last. By a stand-in for their tensors."""

import pytest
import torch
from apple import Apple
from torch import nn

import resprobe as rp
from plugins import attribution, gradient_norms
from plugins.detection import metrics
from plugins.layer_responses import LayerResponses
from resprobe import devices, evaluation
from resprobe.data import batches
from resprobe.devices import memory_format


def test_the_stand_in_has_no_float64():
    tensor = Apple(torch.ones(3))
    assert tensor.device.type == (tensor + 1).device.type == "mps"
    assert tensor.cpu().device.type == "cpu"
    with pytest.raises(TypeError, match="float64"):
        tensor.double()


def test_layer_responses_are_tabulated():
    probe, network = LayerResponses(), rp.build("cifar/resnet-8", in_channels=1).eval()
    with rp.attach(network, probe), torch.no_grad():
        network(torch.randn(4, 1, 8, 8))
    expected = probe.table()
    probe._count, probe._mean, probe._squares = (
        Apple(figure.float()) for figure in (probe._count, probe._mean, probe._squares)
    )
    assert probe.table()["std"].tolist() == pytest.approx(expected["std"].tolist(), rel=1e-5)


def test_contributions_are_summed_up():
    branch, shortcut = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = attribution._sums(branch, shortcut)
    found = attribution._sums(Apple(branch), Apple(shortcut))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert attribution._wide(Apple(branch)).dtype == torch.float64


def test_detections_are_taken_in():
    entry = {"boxes": torch.rand(2, 4).cumsum(1), "labels": torch.ones(2).long(), "scores": torch.rand(2)}
    expected = metrics._flat([entry], "predictions", ("scores",))
    found = metrics._flat([{name: Apple(value) for name, value in entry.items()}], "predictions", ("scores",))
    for one, other in zip(found, expected, strict=True):
        assert (one == other).all()


def test_norms_below_the_range_of_squares_are_found():
    tiny = Apple(torch.full((10, 10), 1e-25))
    norm = gradient_norms._norms([tiny])[0]
    assert gradient_norms._doubtful(tiny, float(norm.cpu()))
    assert float(gradient_norms._wide_norm(tiny)) == pytest.approx(1e-24)
    assert gradient_norms._to_host([Apple(torch.tensor(2.0)), torch.tensor(3.0)]).tolist() == [2.0, 3.0]


def test_channels_are_last_but_on_apples(monkeypatch):
    assert memory_format(torch.device("mps")) == torch.contiguous_format
    assert memory_format(torch.device("cpu")) == memory_format(torch.device("cuda")) == torch.channels_last
    for module in devices, batches, evaluation:
        monkeypatch.setattr(module, "memory_format", lambda device: torch.contiguous_format)
    seen = []

    class Watched(nn.BatchNorm2d):
        def forward(self, x):
            seen.append(x.is_contiguous())
            return super().forward(x)

    network = rp.build("cifar/resnet-8", in_channels=3)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = Watched
    images = rp.ImageSet(torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 10)
    data = rp.Data("noise", "noise", images, images, tuple("0123456789"))
    recipe = rp.recipes.cifar_paper(iterations=2)
    rp.train(network, data, recipe, device="cpu", precision="fp32", progress=False)
    assert seen and all(seen)
