"""Costs: against closed forms, fvcore's tracing and torch's own counter, and without a trace on what is counted."""

from __future__ import annotations

import copy
import random
import time
import warnings

import numpy
import pandas
import pytest
import torch
import torchvision
from test_layer_responses import images, one_process  # noqa: F401
from tiny import assert_same, digits, hook_count, network, recipe, training
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import resprobe as rp
from plugins import flops
from plugins.flops import COLUMNS, TOTALS, UNCOUNTED_COLUMNS, Flops
from plugins.layer_responses import LayerResponses

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


def cifar_closed_form(depth: int, option: str) -> tuple[int, int]:
    """Parameters and multiply-adds of §4.2's networks, counted by hand."""
    n, width, parameters, macs = (depth - 2) // 6, 16, 0, 0

    def convolution(inputs, outputs, kernel, size):
        nonlocal parameters, macs
        parameters += inputs * outputs * kernel**2 + 2 * outputs
        macs += inputs * outputs * kernel**2 * size**2

    convolution(3, 16, 3, 32)
    for outputs, size in (16, 32), (32, 16), (64, 8):
        for _ in range(n):
            convolution(width, outputs, 3, size)
            convolution(outputs, outputs, 3, size)
            if option == "C" or (option == "B" and width != outputs):
                convolution(width, outputs, 1, size)
            width = outputs
    return parameters + 64 * 10 + 10, macs + 64 * 10


def imagenet_closed_form(counts, bottleneck: bool, stride_in: str) -> tuple[int, int]:
    parameters, macs, width, size = 3 * 64 * 49 + 128, 3 * 64 * 49 * 112**2, 64, 56

    def convolution(inputs, outputs, kernel, size):
        nonlocal parameters, macs
        parameters += inputs * outputs * kernel**2 + 2 * outputs
        macs += inputs * outputs * kernel**2 * size**2

    for stage, count in enumerate(counts):
        narrow = 64 * 2**stage
        for block in range(count):
            small = size // 2 if stage and not block else size
            out = narrow * (4 if bottleneck else 1)
            if bottleneck:
                convolution(width, narrow, 1, small if stride_in == "1x1" else size)
                convolution(narrow, narrow, 3, small)
                convolution(narrow, out, 1, small)
            else:
                convolution(width, out, 3, small)
                convolution(out, out, 3, small)
            if width != out:
                convolution(width, out, 1, small)
            width, size = out, small
    return parameters + width * 1000 + 1000, macs + width * 1000


def by_fvcore(net: nn.Module, image: torch.Tensor) -> dict[str, int]:
    """Convolutions and products alone: fvcore also counts normalization and average pooling, as operations of another kind."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        analyses = FlopCountAnalysis(net, image), ActivationCountAnalysis(net, image)
        for analysis in analyses:
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        operators = analyses[0].by_operator()
        macs = sum(operators[name] for name in ("conv", "linear", "addmm", "matmul", "mm", "bmm", "einsum"))
        return {"parameters": parameter_count(net)[""], "macs": macs, "activations": analyses[1].total()}


def by_torch(net: nn.Module, image: torch.Tensor | list[torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def seeded_eval(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return make().eval()


# -- the figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
@pytest.mark.parametrize("shortcut", ["none", "A", "B", "C"])
def test_cifar_networks_by_closed_form(depth, shortcut):
    name = "cifar/plain" if shortcut == "none" else "cifar/resnet"
    options = {} if shortcut == "none" else {"shortcut": shortcut}
    net = rp.build(f"{name}-{depth}", **options)
    assert tuple(flops.total(net, CIFAR)[["parameters", "macs"]]) == cifar_closed_form(depth, shortcut)


@pytest.mark.parametrize(
    ("name", "options", "parameters", "macs"),
    [
        # Table 6 prints 0.27 M and 1.7 M parameters; Table 1 1.8, 3.6, 3.8 and 11.3 × 10⁹ multiply-adds.
        ("cifar/resnet-20", {}, 269_722, 40_551_040),
        ("cifar/resnet-110", {}, 1_727_962, 252_887_680),
        ("cifar/resnet-56", {"shortcut": "C"}, 900_858, 132_301_440),
        ("imagenet/resnet-18", {}, 11_515_688, 1.795e9),
        ("imagenet/plain-34", {}, 21_623_848, 3.644e9),
        ("imagenet/resnet-34", {}, 21_623_848, 3.644e9),
        ("imagenet/resnet-50", {}, 25_557_032, 3.858e9),
        ("imagenet/resnet-50", {"stride_in": "3x3"}, 25_557_032, 4.089e9),
        ("imagenet/resnet-50", {"shortcut": "C"}, 40_128_552, 6.324e9),
        ("imagenet/resnet-152", {}, 60_192_808, 11.282e9),
        ("imagenet/vgg-16", {}, 138_357_544, 15.470e9),
        ("imagenet/vgg-19", {}, 143_667_240, 19.632e9),
    ],
)
def test_the_papers_networks(name, options, parameters, macs):
    net = rp.build(name, **options).to("meta")
    total = flops.total(net, CIFAR if name.startswith("cifar") else IMAGENET)
    assert total.parameters == parameters
    assert total.macs == (macs if isinstance(macs, int) else pytest.approx(macs, abs=0.5e6))


@pytest.mark.parametrize(
    ("depth", "stride_in", "counts"),
    [
        (18, "1x1", (2, 2, 2, 2)),
        (50, "1x1", (3, 4, 6, 3)),
        (50, "3x3", (3, 4, 6, 3)),
        (101, "1x1", (3, 4, 23, 3)),
    ],
)
def test_imagenet_networks_by_closed_form(depth, stride_in, counts):
    net = rp.build(f"imagenet/resnet-{depth}", shortcut="B", stride_in=stride_in)
    expected = imagenet_closed_form(counts, depth >= 50, stride_in)
    assert tuple(flops.total(net, IMAGENET)[["parameters", "macs"]]) == expected


class Stranger(nn.Module):
    """Functions instead of modules, a weight of its own, a layer used twice, tied weights, two inputs."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(6, 2, 3, 3))
        self.twice = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 5)
        self.second.weight = self.first.weight

    def forward(self, x, scale=None):
        x = F.conv2d(x, self.kernel, groups=1 if x.shape[1] == 2 else 2)
        x = torch.sigmoid(self.twice(F.relu(self.twice(x)))) if scale is None else x * scale
        x = self.up(x).mean((2, 3))
        a, b = self.first(x), self.second(x)
        return a @ b.T, torch.einsum("nc,nc->n", a, b), torch.bmm(a[:, None], b[..., None])


NETWORKS = {
    "cifar resnet A": (lambda: rp.build("cifar/resnet-20"), CIFAR),
    "cifar resnet B": (lambda: rp.build("cifar/resnet-20", shortcut="B"), CIFAR),
    "cifar bottleneck C": (lambda: rp.build("cifar/resnet-29", block="bottleneck", shortcut="C"), CIFAR),
    "cifar plain": (lambda: rp.build("cifar/plain-20"), CIFAR),
    "imagenet resnet-18": (lambda: rp.build("imagenet/resnet-18"), IMAGENET),
    "imagenet resnet-50 stride in 1x1": (lambda: rp.build("imagenet/resnet-50"), IMAGENET),
    "imagenet resnet-50 stride in 3x3": (lambda: rp.build("imagenet/resnet-50", stride_in="3x3"), IMAGENET),
    "imagenet vgg-16": (lambda: rp.build("imagenet/vgg-16", width=16), IMAGENET),
    "torchvision resnet18": (torchvision.models.resnet18, (3, 64, 64)),
    "torchvision vgg11": (torchvision.models.vgg11, (3, 64, 64)),
    "stranger": (Stranger, (2, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fvcore_and_torch_count_the_same(name):
    make, shape = NETWORKS[name]
    net = seeded_eval(make)
    image = torch.zeros(1, *shape)
    total = flops.total(net, shape)
    assert total.to_dict() == by_fvcore(net, image)
    assert total.macs == by_torch(net, image)
    with rp.attach(net, Flops()) as probe, torch.no_grad():
        net(torch.zeros(2, *shape))
    if name != "stranger":  # whose a @ b.T compares every image with every other
        pandas.testing.assert_frame_equal(probe.table(), flops.count(net, shape))


def test_the_tables_columns():
    net = network(shortcut="B")
    with rp.attach(net, Flops()) as probe:
        net(images())
    table = probe.table()
    assert tuple(table.columns) == COLUMNS
    rows = table.set_index("layer")
    assert rows.loc["stage2.0.shortcut.0"].to_dict() == {
        "type": "Subsampling1x1",
        "stage": 2,
        "block": "stage2.0",
        "position": 11,
        "kernel_size": "1x1",
        "calls": 1,
        "parameters": 4 * 8,
        "macs": 4 * 8 * 4 * 4,
        "activations": 8 * 4 * 4,
        "output_shape": "8x4x4",
    }
    assert rows.loc["fc", ["type", "stage", "block", "kernel_size", "macs", "output_shape"]].tolist() == [
        *("Linear", 0, "", "", 160, "10")
    ]
    assert rows.loc["stem.norm", ["parameters", "macs", "activations"]].tolist() == [8, 0, 0]
    assert table.position.tolist() == list(range(1, len(table) + 1))
    assert probe.total().to_dict() == table[list(TOTALS)].sum().to_dict()


def test_what_is_not_counted_is_listed():
    uncounted = flops.uncounted(rp.build("cifar/resnet-20"), CIFAR)
    assert tuple(uncounted.columns) == UNCOUNTED_COLUMNS
    assert uncounted.groupby("operator").calls.sum().to_dict() == {
        "aten::add": 9,
        "aten::mean": 1,
        "aten::native_batch_norm": 19,
        "aten::relu": 19,
    }
    assert set(uncounted[uncounted.operator == "aten::add"].layer) == {
        f"stage{s}.{b}" for s in (1, 2, 3) for b in range(3)
    }
    uncounted = flops.uncounted(Stranger(), (2, 8, 8))
    assert {"aten::sigmoid", "aten::relu", "aten::mean"} <= set(uncounted.operator)
    assert set(uncounted.layer) == {""}


class InPlace(nn.Module):
    def forward(self, x):
        x = x.clone()
        x.addmm_(x, x)
        x[None].baddbmm_(x[None], x[None])
        x[0].addmv_(x, x[1])
        x.addbmm_(x[None], x[None])
        whole = torch.zeros(32, 32, dtype=torch.int8)
        torch._int_mm(whole, whole)
        return x


def test_products_in_place_and_of_whole_numbers_are_counted():
    net = InPlace()
    with rp.attach(net, "flops") as probe:
        net(torch.ones(4, 4))
    assert probe.table()["macs"].sum() == (3 * 4**3 + 4**2 + 32**3) / 4
    assert not {"aten::addmm_", "aten::_int_mm"} & set(probe.uncounted().operator)


def test_a_strangers_own_work_and_shared_weights():
    table = flops.count(Stranger(), (2, 8, 8)).set_index("layer")
    assert table.loc["twice", ["calls", "parameters", "macs", "activations"]].tolist() == [
        *(2, 6 * 3 * 9 + 6, 2 * 6 * 3 * 9 * 36, 2 * 6 * 36)
    ]
    assert table.loc["", ["type", "calls", "parameters"]].tolist() == ["Stranger", 1, 6 * 2 * 9]
    assert table.loc["", "macs"] == 6 * 2 * 9 * 36 + 3 * 5
    assert table.loc["", "output_shape"] == ""
    assert table.loc[["first", "second"], "parameters"].tolist() == [25, 5], "the shared weight counts once"
    assert table.loc["up", "output_shape"] == "4x12x12"


def test_modules_that_were_not_called_are_listed_with_their_parameters():
    net = network()
    net.spare = nn.Conv2d(1, 1, 3)
    net.forward = lambda x: net.stem(x)
    table = flops.count(net, (1, 8, 8)).set_index("layer")
    assert table.loc["spare", ["calls", "parameters", "macs", "output_shape"]].tolist() == [0, 10, 0, ""]
    assert table.parameters.sum() == sum(parameter.numel() for parameter in net.parameters())


def test_attention_and_recurrent_products():
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    tokens = torch.zeros(3, 5, 16)
    for mode in (True, False):
        with rp.attach(net.train(mode), Flops()) as probe:
            net(tokens)
        # Four projections, two feed-forward layers, and scores and mixing of 5 × 5 pairs.
        assert probe.total().macs == 5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16, f"training={mode}"


@pytest.mark.slow
def test_1202_layers_in_ten_seconds():
    net = rp.build("cifar/resnet-1202")
    start = time.process_time()
    total = flops.total(net, CIFAR)
    assert time.process_time() - start < 10
    assert tuple(total[["parameters", "macs"]]) == cifar_closed_form(1202, "A") == (19_421_274, 2_829_238_912)


def test_cost_does_not_depend_on_the_batch_the_mode_or_the_precision():
    net = network()
    expected = flops.count(net, (1, 8, 8))
    for mode in (True, False):
        for count in (1, 7):
            with rp.attach(net.train(mode), Flops()) as probe, torch.autocast("cpu", torch.bfloat16):
                net(images(count))
            pandas.testing.assert_frame_equal(probe.table(), expected)
    with torch.inference_mode(), rp.attach(net, Flops()) as probe:
        net(images())
    pandas.testing.assert_frame_equal(probe.table(), expected)
    pandas.testing.assert_frame_equal(flops.count(net.double().to("meta"), (1, 8, 8)), expected)


def test_named_and_several_inputs():
    net = Stranger()
    with rp.attach(net, Flops()) as probe:
        net(x=torch.zeros(4, 2, 8, 8), scale=torch.ones(4, 1, 6, 6))
    assert probe.table().set_index("layer").calls.to_dict() == {"": 1, "up": 1, "first": 1, "second": 1, "twice": 0}


class Detector(nn.Module):
    """Takes a list of images, as torchvision's detectors do."""

    def __init__(self, together: bool):
        super().__init__()
        self.conv, self.together = nn.Conv2d(3, 4, 3), together

    def forward(self, images, targets=None):
        return self.conv(torch.stack(images)) if self.together else [self.conv(image) for image in images]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("container", [list, tuple])
def test_a_list_of_images_is_counted_by_its_length(together, container):
    net, images = Detector(together), container(torch.zeros(2, 3, 8, 8))
    with rp.attach(net, Flops()) as probe:
        net(images)
    assert probe.total().macs == by_torch(net, images) // 2 == 3 * 4 * 9 * 36
    assert probe.table().output_shape.tolist() == ["4x6x6"]
    with rp.attach(net, Flops()) as probe:
        net(images=images, targets=[{"boxes": torch.zeros(5, 4)}] * 2)
    assert probe.total().macs == 3 * 4 * 9 * 36


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_an_image_without_a_batch_is_one_image(dimensions):
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    net, image = nn.Sequential(make(3, 4, 3), nn.ReLU(), make(4, 5, 1)), torch.zeros(3, *[8] * dimensions)
    with rp.attach(net, Flops()) as probe:
        net(image)
    assert probe.total().macs == by_torch(net, image)
    assert probe.table().output_shape.tolist() == ["x".join(map(str, (c, *[6] * dimensions))) for c in (4, 5)]
    pandas.testing.assert_frame_equal(probe.table(), flops.count(net, image.shape))


def test_a_batch_that_the_network_takes_apart_is_still_a_batch():
    net, images = Detector(together=False), torch.zeros(2, 3, 8, 8)
    with rp.attach(net, Flops()) as probe:
        net(images)
    assert probe.total().macs == by_torch(net, images) // 2


# -- what is refused, and what needs data ------------------------------------------------------------------------


class Deciding(nn.Module):
    """Looks at numbers, which there are none of on "meta"."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, 2, 3), nn.Dropout(0.5)
        self.seen: torch.Tensor | None = None

    def forward(self, x):
        self.seen = self.drop(self.conv(x))  # no leaf: this could not be copied
        return self.seen if x.sum() < 1e9 else x


def test_a_network_that_looks_at_its_numbers_is_run_with_them():
    net = Deciding()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert flops.total(net, (1, 8, 8)).macs == 2 * 9 * 36
    assert torch.equal(torch.get_rng_state(), state)
    with rp.attach(net, Flops()) as probe:
        net(images(3))
    assert probe.total().macs == 2 * 9 * 36
    assert torch.count_nonzero(net.seen) > 0, "the network's own result, not a copy's"


class If(nn.Module):
    """Looks at its numbers, then calls a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) if x.sum() < 1e9 else x


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)


LAYERS = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    "attention": lambda: Attention(16, 2, batch_first=True),
    "lstm": lambda: nn.LSTM(16, 8, batch_first=True),
    "convolutions": lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 6, 2, groups=2)),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_run_with_its_numbers_costs_the_same(layer, mode):
    backends = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [torch.backends.mha.get_fastpath_enabled(), *(each.enabled for each in backends)]
    plain, x = LAYERS[layer]().train(mode == "train"), torch.zeros(3, 5, 16)
    macs = []
    for net in (plain, If(plain)):
        with rp.attach(net, Flops()) as probe, torch.no_grad():
            net(x)
        macs.append(probe.total().macs)
    assert macs[0] == macs[1] > 0
    assert before == [torch.backends.mha.get_fastpath_enabled(), *(each.enabled for each in backends)]


class Named(nn.Module):
    """Names its own attributes as torch names tables of hooks."""

    def __init__(self):
        super().__init__()
        self.conv, self.use_hooks, self.num_hooks = nn.Conv2d(1, 1, 3), True, 1
        self.own_hooks = {"last": torch.relu}

    def forward(self, x):
        assert (self.use_hooks, self.num_hooks) == (True, 1)
        assert self.conv.kernel_size == (3, 3)
        assert self.conv.training is True or self.conv.training is False
        return self.own_hooks["last"](self.conv(x))


def test_attributes_that_are_called_hooks_are_left():
    assert flops.total(Named(), (1, 8, 8)).macs == 9 * 36
    with rp.attach(Named(), Flops()) as probe:
        probe.count(Named(), images(2))
    assert probe.total().macs == 9 * 36


class Caching(nn.Module):
    """Keeps what it has computed, which has a gradient and so could not be copied."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.results: list = []
        self.by_name: dict = {"weights": [self.conv.weight]}

    def forward(self, x):
        self.results.append(self.conv(x))
        self.by_name["last"] = (self.results[-1] * 2,)
        assert self.by_name["weights"][0] is self.conv.weight
        return self.results[-1]


@pytest.mark.parametrize("looks", [False, True])
def test_a_network_that_keeps_results_is_copied(looks):
    net = Caching()
    with rp.attach(If(net) if looks else net, Flops()) as probe:
        for _ in range(2):
            net(images(3))
        probe.count(If(net) if looks else net, images(3))
    assert probe.total().macs == 2 * 9 * 36
    assert len(net.results) == 2, "the network's own are left"
    assert net.results[-1].requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("script", [torch.jit.script, lambda net: torch.jit.trace(net, images())])
def test_a_scripted_network_is_refused(script):
    net = script(nn.Sequential(nn.Conv2d(1, 2, 3)))
    message = "^flops: the network is scripted, which hides its layers; count before scripting$"
    with pytest.raises(rp.UsageError, match=message):
        flops.count(net, (1, 8, 8))
    with pytest.raises(rp.UsageError, match=message), rp.attach(net, Flops()):
        net(images())
    assert hook_count(net) == 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8)])
def test_an_image_of_another_shape_is_named(shape):
    with pytest.raises(rp.UsageError) as caught:
        flops.count(network(), shape)
    message = str(caught.value)
    assert message.startswith(f"flops: Network fails on an input of shape {(1, *shape)}: ")
    assert "\n" not in message


@pytest.mark.parametrize("shape", [(0, 8, 8), (1.5, 8, 8), ("3", 8, 8)])
def test_an_impossible_shape_is_named(shape):
    with pytest.raises(rp.UsageError) as caught:
        flops.count(network(), shape)
    assert str(caught.value) == f"image_shape (={shape!r}) must be whole numbers ≥ 1, such as (3, 32, 32)"


def test_no_images_is_an_error_and_leaves_nothing():
    net = network().eval()
    with pytest.raises(rp.UsageError, match="^flops: Network was given no images"), rp.attach(net, Flops()):
        net(images(0))
    assert hook_count(net) == 0


def test_data_parallel_is_refused():
    with pytest.raises(rp.UsageError, match="DataParallel"), rp.attach(nn.DataParallel(network()), Flops()):
        pass


# -- the common rules --------------------------------------------------------------------------------------------


def test_no_hook_is_left_and_a_failed_pass_is_not_counted():
    net = network()
    probe = Flops()
    with rp.attach(net, probe):
        assert hook_count(net) > 0
        with pytest.raises(RuntimeError):
            net(images(1, 3))
        assert probe.table().empty
        net(images())
    assert hook_count(net) == 0
    assert probe.total().parameters == sum(parameter.numel() for parameter in net.parameters())
    with pytest.raises(KeyboardInterrupt), rp.attach(net, probe):
        raise KeyboardInterrupt
    assert hook_count(net) == 0
    flops.count(net, (1, 8, 8))
    assert hook_count(net) == 0


def test_without_a_pass_the_table_is_empty():
    with rp.attach(network(), Flops()) as probe:
        pass
    assert tuple(probe.table().columns) == COLUMNS
    assert tuple(probe.uncounted().columns) == UNCOUNTED_COLUMNS
    assert probe.total().to_dict() == dict.fromkeys(TOTALS, 0)


def test_each_attach_counts_its_first_pass():
    net, probe = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)), Flops()
    with rp.attach(net, probe):
        net(images(2, 1, 8))
        net(images(2, 1, 16))
        assert probe.total().macs == 64
    with rp.attach(net, probe):
        net(images(2, 1, 16))
    assert probe.total().macs == 256


def test_other_hooks_neither_see_the_count_nor_are_counted():
    net = network()
    calls = []
    for module in net.modules():
        module.register_forward_hook(lambda *_: calls.append(torch.ones(3, 3) @ torch.ones(3, 3)))
    hooks = hook_count(net)
    with rp.attach(net, Flops(), Flops(), LayerResponses()) as (probe, other, responses):
        net(images())
    assert len(calls) == hooks == hook_count(net)
    pandas.testing.assert_frame_equal(probe.table(), flops.count(network(), (1, 8, 8)))
    pandas.testing.assert_frame_equal(probe.uncounted(), flops.uncounted(network(), (1, 8, 8)))
    pandas.testing.assert_frame_equal(probe.table(), other.table())
    assert set(responses.table()["count"]) == {12 * 4 * 64, 12 * 8 * 16, 12 * 16 * 4}
    assert len(calls) == hooks, "none of these ran on the network"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_is_disturbed(mode):
    def passed(watch):
        net = network(shortcut="B")
        net.fc = nn.Sequential(nn.Dropout(0.5), net.fc)
        net.train(mode == "train")
        net.stage1.eval()
        torch.manual_seed(5)
        x = images().requires_grad_()
        probe = Flops()
        if watch:
            flops.count(net, (1, 8, 8))
            probe.attach(net)
        out = net(x)
        out.square().sum().backward()
        probe.detach()
        modes = torch.tensor([module.training for module in net.modules()])
        gradients = [parameter.grad for parameter in net.parameters()]
        return [out, x.grad, modes, torch.get_rng_state(), *net.state_dict().values(), *gradients]

    for one, other in zip(passed(False), passed(True), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_training_that_is_watched_ends_the_same(tmp_path):
    def trained(probes, **options):
        settings = {"device": "cpu", "precision": "fp32", "progress": False}
        return rp.train(network(), digits(), recipe(), probes=probes, **settings, **options)

    bare, watched = trained([]), trained([Flops()])
    assert_same(bare.network.state_dict(), watched.network.state_dict())
    assert_same(bare.metrics, watched.metrics)
    expected = flops.count(network(), (1, 8, 8))
    pandas.testing.assert_frame_equal(watched.tables["flops"], expected)
    assert hook_count(watched.network) == 0
    trained([Flops()], runs=tmp_path)
    stored = trained([Flops()], runs=tmp_path).tables["flops"]
    assert stored.macs.tolist() == expected.macs.tolist()


class Noise(nn.Module):
    """Draws from every generator on the host, also where its input is on "meta"."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x) * (1 + (torch.randn(()) + random.random() + numpy.random.rand()) / 10)


@pytest.mark.parametrize("looks", [False, True])
def test_a_training_that_draws_random_numbers_ends_the_same(looks):
    def trained(probes):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        net = network()
        net.stage1[0] = Noise(If(net.stage1[0]) if looks else net.stage1[0])
        return rp.train(net, digits(), recipe(), probes=probes, device="cpu", precision="fp32", progress=False)

    bare, watched = trained([]), trained(["flops"])
    assert_same(bare.network.state_dict(), watched.network.state_dict())
    assert watched.tables["flops"].macs.sum() == flops.total(network(), (1, 8, 8)).macs


def test_a_resumed_training_still_has_the_table():
    whole = training(probes=[Flops()])
    states = []
    whole.run(lambda at, _: states.append(copy.deepcopy(at.state())))
    resumed = training(probes=[Flops()])
    resumed.load_state(states[1])
    resumed.run()
    for table in ("table", "uncounted"):
        one, other = (getattr(each.probes[0], table)() for each in (whole, resumed))
        pandas.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("how", ["compile", "in place", "part"])
def test_compiled_networks_are_counted_as_written(how):
    net = network().eval()
    expected = flops.count(net, (1, 8, 8))
    call = torch.compile(net, backend="eager") if how == "compile" else net
    if how == "in place":
        net.compile(backend="eager")
    if how == "part":
        net.stage1 = torch.compile(net.stage1, backend="eager")
    with torch.no_grad():
        call(images())
        with rp.attach(call, Flops()) as probe:
            call(images())
    for table in (probe.table(), flops.count(call, (1, 8, 8))):
        figures = [*TOTALS, "calls", "output_shape", "kernel_size"]
        pandas.testing.assert_frame_equal(table[figures], expected[figures])
    assert hook_count(net) == 0
    torch.compiler.reset()


def test_distributed_data_parallel_is_counted_beneath(one_process):  # noqa: F811
    net = network()
    wrapped = nn.parallel.DistributedDataParallel(net)
    expected = flops.count(network(), (1, 8, 8))
    with rp.attach(wrapped, Flops()) as probe:
        wrapped(images()).sum().backward()
    pandas.testing.assert_frame_equal(probe.table(), expected)
    pandas.testing.assert_frame_equal(flops.count(wrapped, (1, 8, 8)), expected)
    assert hook_count(net) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_scripted_parts_count_as_their_callers_work():
    net = nn.Sequential(torch.jit.script(nn.Conv2d(1, 2, 3)), nn.ReLU())
    assert flops.total(net, (1, 8, 8)).macs == 2 * 9 * 36
    macs = flops.count(net, (1, 8, 8)).set_index("layer").macs
    assert macs.to_dict() == {"": 2 * 9 * 36, "0": 0}


def test_it_is_found_by_its_name():
    assert isinstance(rp.probes.make_probe("flops"), Flops)


@pytest.mark.gpu
def test_on_cuda_the_same_is_counted():
    tables = []
    for device in ("cpu", "cuda"):
        net = network(shortcut="B").to(device)
        with rp.attach(net, "flops") as probe:
            net(torch.zeros(2, 1, 8, 8, device=device))
        tables.append(probe.table())
    pandas.testing.assert_frame_equal(*tables)
