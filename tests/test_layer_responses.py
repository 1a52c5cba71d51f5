"""Layer responses: equal to the statistics of all responses put together, and without a trace on what they measure."""

from __future__ import annotations

import copy
import math
import weakref

import numpy
import pandas
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, digits, hook_count, network, recipe, training
from torch import nn
from torch.nn import functional as F

import resprobe as rp
from plugins import layer_responses
from plugins.flops import Flops
from plugins.layer_responses import CHANNEL_COLUMNS, COLUMNS, LayerResponses

IMAGES = 12


def images(count: int = IMAGES, channels: int = 1, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def seeded(make, *arguments, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*arguments, **options)


def randomized(net: nn.Module) -> nn.Module:
    """With normalizations that do something, in evaluation mode too."""
    random = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 2),
                (module.bias, -1, 1),
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
            ):
                tensor.data.uniform_(low, high, generator=random)
    return net


def naive(net: nn.Module, names: list[str], batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """All outputs of the modules of these names, kept and put together, channels first: what the probe must not do."""
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    modules = dict(net.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _, __, output, name=name: kept[name].append(output.detach().clone()))
        for name in set(names)
    ]
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(outputs).double().transpose(0, 1).flatten(1) for name, outputs in kept.items()}


def check(table: pandas.DataFrame, channels: pandas.DataFrame, responses: dict[str, torch.Tensor], rtol=1e-5):
    for row in table.itertuples():
        expected = responses[row.measured]
        assert row.count == expected.numel()
        assert row.channels == len(expected)
        assert row.std == pytest.approx(expected.std().item(), rel=rtol)
        assert row.mean == pytest.approx(expected.mean().item(), rel=rtol, abs=rtol * row.std)
        own = channels[(channels.layer == row.layer) & (channels.call == row.call)]
        assert own.channel.tolist() == list(range(row.channels))
        assert set(own["count"]) == {expected.shape[1]}
        numpy.testing.assert_allclose(own["std"], expected.std(1), rtol=rtol)
        numpy.testing.assert_allclose(own["mean"], expected.mean(1), rtol=rtol, atol=rtol * row.std)


class Own(nn.Module):
    """A user's: no blocks, names that say nothing, in-place work, a layer without normalization, one used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.c = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.d, self.e = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.b(self.a(x)))
        x = x + self.relu(self.c(x))
        for _ in range(2):
            y = self.e(self.d(x))
            y += x
            x = self.relu(y)
        return x.mean((1, 2, 3))


# -- the figures -------------------------------------------------------------------------------------------------


NETWORKS = {
    "plain": (lambda: network("cifar/plain"), 1, 8),
    "residual A": (lambda: network(), 1, 8),
    "residual B": (lambda: network(shortcut="B"), 1, 8),
    "residual C": (lambda: network(shortcut="C"), 1, 8),
    "group": (lambda: network(norm="group"), 1, 8),
    "without normalization": (lambda: network(norm="none"), 1, 8),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(width_per_group=64, num_classes=4), 3, 32),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(num_classes=4), 3, 32),
    "torchvision vgg11": (lambda: nn.Sequential(*torchvision.models.vgg11().features), 3, 32),
    "torchvision vgg11_bn": (lambda: nn.Sequential(*torchvision.models.vgg11_bn().features), 3, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_figures_are_those_of_all_responses_put_together(name, mode):
    make, channels, size = NETWORKS[name]
    net = randomized(seeded(make))
    net.train(mode == "train")
    batches = list(images(6, channels, size).split([3, 2, 1] if mode == "eval" or size == 8 else [4, 2]))
    twin = copy.deepcopy(net)
    with rp.attach(net, LayerResponses()) as probe, torch.no_grad():
        for batch in batches:
            net(batch)
    table = probe.table()
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(table.layer) == sorted(convolutions)
    check(table, probe.channels(), naive(twin, table.measured.tolist(), batches), rtol=1e-4)
    normalized = not any(word in name for word in ("without", "vgg11")) or name.endswith("_bn")
    assert ((table.measured != table.layer) == normalized).all()
    assert hook_count(net) == 0


def test_the_columns_of_our_networks():
    net = network(shortcut="C")
    with rp.attach(net, LayerResponses()) as probe:
        net(images())
    table, channels = probe.table(), probe.channels()
    assert tuple(table.columns) == COLUMNS
    assert tuple(channels.columns) == CHANNEL_COLUMNS
    row = table.set_index("layer").loc["stage2.0.branch.conv2"]
    assert row.drop(["mean", "std"]).to_dict() == {
        "call": 0,
        "stage": 2,
        "block": "stage2.0",
        "position": 6,
        "kind": "branch",
        "kernel_size": "3x3",
        "measured": "stage2.0.branch.norm2",
        "channels": 8,
        "count": IMAGES * 8 * 4 * 4,
    }
    assert table.position.tolist() == list(range(1, 11))
    assert table.layer.tolist()[:4] == [
        "stem.conv",
        "stage1.0.branch.conv1",
        "stage1.0.branch.conv2",
        "stage1.0.shortcut.0",
    ]
    assert table.kind.value_counts().to_dict() == {"branch": 6, "shortcut": 3, "stem": 1}
    assert len(table.query("kernel_size == '3x3' and kind != 'shortcut'")) == net.depth - 1, (
        "all but the last, which is fc"
    )
    assert len(channels) == table.channels.sum()


def test_channels_that_change_their_place_do_no_harm():
    """ConvNeXt normalizes with the channels last."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    net, image = ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), rp.attach(net, LayerResponses()) as probe:
        answer = net(image)
        assert torch.equal(answer, net(image))
    assert len(probe.table()) > 3


def test_the_columns_of_torchvision_and_of_a_stranger():
    with rp.attach(net := torchvision.models.resnet18().eval(), LayerResponses()) as probe, torch.no_grad():
        net(images(1, 3, 32))
    table = probe.table().set_index("layer")
    assert table.kind.value_counts().to_dict() == {"branch": 16, "shortcut": 3, "stem": 1}
    assert table.loc["layer2.0.downsample.0", ["stage", "block", "kind", "kernel_size", "measured"]].tolist() == [
        *(2, "layer2.0", "shortcut", "1x1", "layer2.0.downsample.1")
    ]
    assert table.loc["conv1", ["stage", "block", "kind", "kernel_size"]].tolist() == [0, "", "stem", "7x7"]

    with rp.attach(net := Own(), LayerResponses()) as probe:
        net(images())
    table = probe.table()
    assert table[["layer", "call", "measured", "kernel_size", "kind"]].to_numpy().tolist() == [
        ["a", 0, "b", "3x3", "other"],
        ["c", 0, "c", "1x3", "other"],
        ["d", 0, "e", "3x3", "other"],
        ["d", 1, "e", "3x3", "other"],
    ]


def test_a_module_that_is_called_twice_is_kept_apart_by_call():
    net = Own()
    kept: list[torch.Tensor] = []
    with rp.attach(net, LayerResponses()) as probe:
        handle = net.e.register_forward_hook(lambda _, __, output: kept.append(output.detach().clone()))
        net(images())
        net(images(seed=1))
        handle.remove()
    rows = probe.table().query("layer == 'd'")
    for call in (0, 1):
        expected = torch.cat(kept[call::2]).double()
        assert rows["std"].iloc[call] == pytest.approx(expected.std().item(), rel=1e-5)
        assert rows["count"].iloc[call] == expected.numel()


@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(1, 39), max_size=6, unique=True),
    mean=st.sampled_from([0.0, 3.0, 1e4]),
    channels=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_any_split_into_batches_gives_the_same(cuts, mean, channels, seed):
    net = nn.Sequential(nn.Conv2d(channels, channels, 1, groups=channels, bias=False))
    nn.init.ones_(net[0].weight)  # the response is the input
    x = images(40, channels, 4, seed) * (1e-2 if mean else 1) + mean
    edges = [0, *sorted(cuts), 40]
    with rp.attach(net, LayerResponses()) as probe, torch.no_grad():
        for start, end in zip(edges, edges[1:], strict=False):
            net(x[start:end])
    # float32 holds 10⁴ in steps of 10⁻³: the input is that coarse, its moments are not.
    check(probe.table(), probe.channels(), {"0": x.double().transpose(0, 1).flatten(1)}, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(130, 16, 32, 32), (3, 300, 40, 40), (2, 1, 1, 1)])
def test_a_large_mean_costs_no_precision(shape, layout):
    x = (images(1).new_empty(shape).normal_(generator=torch.Generator().manual_seed(3)) * 1e-2 + 1e4).contiguous(
        memory_format=layout
    )
    mean, variance = layer_responses._moments(x, 1)
    exact = x.double()
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=1e-12, atol=1e-6)
    torch.testing.assert_close(variance, exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-12)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 140), st.sampled_from([1, 3, 16, 40, 64]), st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last, "sliced", "transposed"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    mean=st.sampled_from([0.0, 3.0, 90.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_moments_are_exact_in_every_layout_and_type(shape, layout, dtype, mean, seed):
    # Means that differ by channel, and one channel that never responds.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean * torch.arange(shape[1]).view(-1, 1, 1)
    x[:, -1] = mean
    x = x.clamp(max=6e4).to(dtype)
    if layout == "sliced":
        x = torch.stack([x, x + 1], dim=-1)[..., 0]
    elif layout == "transposed":
        x = x.transpose(2, 3)
    else:
        x = x.contiguous(memory_format=layout)
    found, variance = layer_responses._moments(x, 1)
    exact = x.double()
    std = exact.std((0, 2, 3), correction=0)
    torch.testing.assert_close(found, exact.mean((0, 2, 3)), rtol=5e-6, atol=5e-6 * max(1e-3, float(std.max())))
    torch.testing.assert_close(variance.sqrt(), std, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_usual_responses_take_the_fast_way_and_others_do_not(layout, dtype):
    x = images(128, 16, 8).to(dtype).contiguous(memory_format=layout)
    assert layer_responses._by_columns(x) is not None
    assert layer_responses._by_columns(x + 1e4) is None
    assert layer_responses._by_columns(x[:2, :, :2, :2]) is None


def test_a_first_image_unlike_all_others_costs_little():
    # The worst case for a shift that comes from the first images.
    x = images(200, 3, 8)
    x[0] += 1e5
    old, layer_responses._SCRATCH = layer_responses._SCRATCH, 100
    try:
        mean, variance = layer_responses._moments(x, 1)
    finally:
        layer_responses._SCRATCH = old
    torch.testing.assert_close(variance, x.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-5, atol=0)


def test_half_precision_is_summed_in_single():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with torch.autocast("cpu", torch.bfloat16):
        kept = []
        with rp.attach(net, LayerResponses()) as probe:
            net[1].register_forward_hook(lambda _, __, output: kept.append(output.detach()))
            net(images(64, 1, 16))
    assert kept[0].dtype == torch.bfloat16
    check(probe.table(), probe.channels(), {"1": kept[0].double().transpose(0, 1).flatten(1)}, rtol=1e-5)


def test_double_precision_stays_double():
    net = network().double()
    with rp.attach(net, LayerResponses()) as probe:
        net(images().double())
    responses = naive(copy.deepcopy(net), probe.table().measured.tolist(), [images().double()])
    check(probe.table(), probe.channels(), responses, rtol=1e-12)


@pytest.mark.parametrize("shortcut", ["none", "A", "B"])
def test_the_closed_form_of_batch_normalization(shortcut):
    """In training mode std² = mean_c[γ²σ²/(σ²+ε)] + var_c[β], exactly, with σ² the variance of what BN is given."""
    net = randomized(network(shortcut=shortcut)).train()
    given = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, x, __, name=name: given.update({name: x[0].detach().double()}))
    with rp.attach(net, LayerResponses()) as probe:
        net(images(32))
    modules = dict(net.named_modules())
    for row in probe.table().itertuples():
        norm, variance = modules[row.measured], given[row.measured].var((0, 2, 3), correction=0)
        gamma, beta = norm.weight.double(), norm.bias.double()
        expected = (gamma**2 * variance / (variance + norm.eps)).mean() + beta.var(correction=0)
        assert row.std**2 * (row.count - 1) / row.count == pytest.approx(expected.item(), rel=1e-5)
        assert row.mean == pytest.approx(beta.mean().item(), rel=1e-5)


def test_one_number_has_no_standard_deviation_and_nan_stays_nan():
    net = nn.Sequential(nn.Conv2d(1, 1, 3))
    with rp.attach(net, LayerResponses()) as probe:
        net(images(1, 1, 3))
    assert probe.table()["count"].tolist() == [1]
    assert math.isnan(probe.table()["std"][0])
    with rp.attach(net, probe):
        net(images(1, 1, 3) * math.nan)
    assert probe.table()["mean"].isna().all()


def test_empty_batches_and_single_images():
    net = nn.Sequential(nn.Conv2d(1, 3, 3))
    with rp.attach(net, LayerResponses()) as probe:
        net(images(0))
        assert probe.table().empty
        net(images()[0])
        net(images()[1:])
        net(images(0))
    check(probe.table(), probe.channels(), naive(net, ["0"], [images()]))


def test_other_dimensions_and_transposed_convolutions():
    net = nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ConvTranspose3d(2, 3, (1, 2, 2)))
    x = torch.randn(2, 1, 4, 4, 4)
    with rp.attach(net, LayerResponses()) as probe:
        net(x)
    assert probe.table().kernel_size.tolist() == ["2x2x2", "1x2x2"]
    check(probe.table(), probe.channels(), naive(copy.deepcopy(net), ["1", "2"], [x]), rtol=1e-4)


# -- which normalization follows ---------------------------------------------------------------------------------


class Functional(nn.Module):
    """`between` is done to the response before the module that normalizes."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), between

    def forward(self, x):
        return self.norm(input=self.between(self.conv(x)))


class Alone(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("no_gradients", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    ("between", "measured"),
    [
        (lambda x: x, "norm"),
        (nn.Identity(), "norm"),
        (F.relu, "conv"),
        (F.relu_, "conv"),
        (nn.ReLU(inplace=True), "conv"),
        (lambda x: x.add_(1), "conv"),
    ],
    ids=["nothing", "identity", "relu", "relu_", "in-place module", "add_"],
)
def test_a_response_that_something_changed_is_not_the_normalizations(between, measured, no_gradients):
    net = Functional(between).eval()
    with no_gradients(), rp.attach(net, LayerResponses()) as probe:
        for seed in range(3):
            net(images(seed=seed))
    assert probe.table().measured.tolist() == [measured]
    batches = [images(seed=seed) for seed in range(3)]
    # The convolution alone, since what follows it may write over its response.
    twin = net if measured == "norm" else Alone(net.conv)
    check(probe.table(), probe.channels(), naive(twin, [measured], batches), rtol=1e-4)


def test_a_normalization_before_its_convolution_is_not_its_own():
    # Pre-activation (not in the paper): norm, relu, conv, and an addition in place that changes the response.
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1)
            self.norm2, self.conv2 = nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            out = self.conv1(self.norm1(x))
            out += x
            return self.conv2(self.norm2(out)) + out

    with rp.attach(net := PreActivation(), LayerResponses()) as probe:
        net(images())
    assert probe.table().measured.tolist() == ["conv1", "conv2"]


def test_full_backward_hooks_of_others_do_not_hide_the_normalization():
    net = network()
    handles = [module.register_full_backward_hook(lambda *_: None) for module in net.modules()]
    with rp.attach(net, LayerResponses()) as probe:
        net(images())
    for handle in handles:
        handle.remove()
    table = probe.table()
    assert (table.measured != table.layer).all()


def test_a_strangers_normalization_is_known_by_its_class():
    class ScaleNorm(nn.Module):
        def forward(self, x):
            return x / x.norm()

    net = nn.Sequential(nn.Conv2d(1, 4, 3), ScaleNorm())
    with rp.attach(net, LayerResponses()) as probe:
        net(images())
    check(probe.table(), probe.channels(), naive(net, ["1"], [images()]))


# -- what is refused ---------------------------------------------------------------------------------------------


class ActivatedNorm(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


def refused(net: nn.Module, probe: rp.Probe | None = None) -> str:
    with pytest.raises(rp.UsageError) as caught, rp.attach(net, probe or LayerResponses()):
        net(images(1).to(next(net.parameters()).device))
    assert hook_count(net) == 0
    return str(caught.value)


def test_a_normalization_with_its_own_activation_is_refused_by_name():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), ActivatedNorm(4))
    assert refused(net) == (
        "layer-responses cannot measure '1' (ActivatedNorm): it has ReLU inside, so its response before the "
        "nonlinearity is never given; use a normalization and an activation of their own"
    )


class NormAct(nn.Module):
    """Normalizes in its own code, and holds the activation as a module."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.ones(channels, 1, 1)), nn.ReLU()

    def forward(self, x):
        return self.act(x / x.square().mean(1, keepdim=True).sqrt() * self.weight)


def test_a_strangers_normalization_with_its_own_activation_is_refused_too():
    assert refused(nn.Sequential(nn.Conv2d(1, 4, 3), NormAct(4))).startswith(
        "layer-responses cannot measure '1' (NormAct): it has ReLU inside, so its response before the nonlinearity is never"
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_scripted_modules_are_refused_by_name():
    net = nn.Sequential(torch.jit.script(nn.Conv2d(1, 4, 3)))
    assert refused(net).startswith(
        "layer-responses cannot measure '0' (RecursiveScriptModule): scripted code calls no hooks"
    )


def test_networks_without_data_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3)).to("meta")
    assert refused(net) == "layer-responses cannot measure '0': it is on device 'meta' and has no data"


def test_data_parallel_is_refused():
    with pytest.raises(rp.UsageError, match="DataParallel"), rp.attach(nn.DataParallel(network()), LayerResponses()):
        pass


def test_another_networks_figures_are_not_mixed_in():
    with rp.attach(net := network(), LayerResponses()) as probe:
        net(images())
    assert refused(network(), probe) == "layer-responses has figures of another network (7 layers); use a new probe"
    with rp.attach(net, probe):
        net(images())
    assert probe.table()["count"][0] == 2 * IMAGES * 4 * 64


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other, self.route = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(1, 4, 3), 0

    def forward(self, x):
        if self.route == 0:
            return self.norm(self.conv(x))
        return self.conv(x) if self.route == 1 else self.norm(self.other(x))


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (1, "layer-responses cannot measure 'conv': its normalization was not called in this pass, as it was before"),
        (
            2,
            "layer-responses cannot measure 'conv': 'norm' normalized it in an earlier pass, and something else in this one",
        ),
    ],
)
def test_a_network_that_goes_another_way_is_refused_by_name(route, message):
    net, probe = Changing(), LayerResponses()
    with rp.attach(net, probe):
        net(images())
    before = probe.table()
    net.route = route
    assert refused(net, probe) == message
    pandas.testing.assert_frame_equal(probe.table(), before)


def test_a_layer_that_appears_later_is_added():
    net = Changing()
    net.route = 1
    with rp.attach(net, LayerResponses()) as probe:
        net(images())
        net.other = nn.Conv2d(1, 4, 3)  # not there when the probe was attached
        net(images())
    assert probe.table().layer.tolist() == ["conv"]
    net.route, probe = 2, LayerResponses()
    with rp.attach(net, probe):
        net(images())
        net.route = 3
        net.norm = nn.Identity()
        with pytest.raises(rp.UsageError, match="^layer-responses cannot measure 'other': its normalization was not"):
            net(images())


# -- the common rules --------------------------------------------------------------------------------------------


class Raising(nn.Module):
    fails = True

    def forward(self, x):
        if self.fails:
            raise RuntimeError("inside")
        return x


def test_no_hook_is_left_and_a_failed_pass_is_not_counted():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), Raising(), nn.Conv2d(4, 4, 3))
    probe = LayerResponses()
    with pytest.raises(RuntimeError, match="inside"), rp.attach(net, probe):
        net(images())
    assert hook_count(net) == 0
    assert probe.table().empty
    net[2].fails = False
    with rp.attach(net, probe):
        net(images())
        net[2].fails = True
        with pytest.raises(RuntimeError):
            net(images())
        net[2].fails = False
        net(images(seed=1))
    check(probe.table(), probe.channels(), naive(copy.deepcopy(net), ["1", "3"], [images(), images(seed=1)]), rtol=1e-4)
    with pytest.raises(KeyboardInterrupt), rp.attach(net, probe):
        raise KeyboardInterrupt
    assert hook_count(net) == 0


def test_calls_to_parts_are_not_counted():
    net = network()
    with rp.attach(net, LayerResponses()) as probe:
        net.stem(images())
    assert probe.table().empty
    assert tuple(probe.table().columns) == COLUMNS
    assert tuple(probe.channels().columns) == CHANNEL_COLUMNS


def test_what_checkpointing_computes_again_is_not_counted():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    net = Checkpointed()
    with rp.attach(net, LayerResponses()) as probe:
        net(images()).sum().backward()
    assert set(probe.table().query("stage < 2")["count"]) == {IMAGES * 4 * 64}


def test_several_at_once_give_what_each_gives_alone():
    net = network().eval()
    with rp.attach(net, LayerResponses()) as alone:
        net(images())
    with rp.attach(net, LayerResponses(), LayerResponses()) as (one, other):
        net(images())
    for probe in (one, other):
        pandas.testing.assert_frame_equal(probe.table(), alone.table())
    assert hook_count(net) == 0


def test_attached_again_it_goes_on():
    net = network().eval()
    probe = LayerResponses()
    for seed in range(3):
        with rp.attach(net, probe):
            net(images(seed=seed))
    with rp.attach(net, LayerResponses()) as once:
        for seed in range(3):
            net(images(seed=seed))
    pandas.testing.assert_frame_equal(probe.table(), once.table())


@pytest.mark.parametrize("options", [{}, {"bn_batch": 8}], ids=["whole", "in parts"])
def test_a_training_that_is_watched_ends_the_same(options):
    def trained(probes):
        return rp.train(
            network(), digits(), recipe(**options), probes=probes, device="cpu", precision="fp32", progress=False
        )

    bare, watched = trained([]), trained([LayerResponses(rp.probes.every(5)), Flops()])
    assert_same(bare.network.state_dict(), watched.network.state_dict())
    assert_same(bare.metrics, watched.metrics)
    table = watched.tables["layer-responses"]
    assert table.groupby("iteration").size().to_dict() == {0: 7, 5: 7, 10: 7}
    assert table["count"][0] == 16 * 4 * 64, "of one iteration"
    assert hook_count(watched.network) == 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_is_disturbed(mode):
    def passed(watch):
        net = network(shortcut="B")
        net.fc = nn.Sequential(nn.Dropout(0.5), net.fc)
        net.train(mode == "train")
        torch.manual_seed(5)
        x = images().requires_grad_()
        probe = LayerResponses()
        if watch:
            probe.attach(net)
        out = net(x)
        out.square().sum().backward()
        probe.detach()
        return [out, x.grad, torch.get_rng_state(), *net.state_dict().values(), *(p.grad for p in net.parameters())]

    for one, other in zip(passed(False), passed(True), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_resumed_training_goes_on_with_the_table(tmp_path):
    whole = training(probes=[LayerResponses()])
    whole.run()
    states = []
    half = training(probes=[LayerResponses()])
    half.run(lambda at, _: states.append(copy.deepcopy(at.state())))
    assert states[1]["iteration"] == 6
    torch.save(states[1], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = training(probes=[LayerResponses()])
    resumed.load_state(state)
    kept = copy.deepcopy(state["probes"])
    resumed.run()
    assert_same(kept, state["probes"])
    for table in ("table", "channels"):
        one, other = (getattr(each.probes[0], table)() for each in (whole, resumed))
        pandas.testing.assert_frame_equal(one, other, rtol=0, atol=0)


def test_figures_of_a_training_are_those_of_each_iteration():
    """Beside a probe that is made for one iteration alone."""
    watching = training(probes=[LayerResponses()])
    watching.run()
    for figures in ("table", "channels"):
        watched = getattr(watching.probes[0], figures)()
        assert watched.columns[0] == "iteration"
        assert set(watched["iteration"]) == {0, 1, 2, 3, 4, 5, 6, 8, 10} & set(range(watching.recipe.iterations))
        for iteration in (0, 5):
            alone = training(probes=[LayerResponses(rp.probes.at([iteration]))])
            alone.run()
            one = watched[watched["iteration"] == iteration].reset_index(drop=True)
            pandas.testing.assert_frame_equal(one, getattr(alone.probes[0], figures)(), rtol=0, atol=0)


def test_passes_after_a_training_are_told_apart():
    watching = training(probes=[LayerResponses(rp.probes.at([3]))])
    watching.run()
    with rp.attach(watching.network, probe := watching.probes[0]):
        watching.network(images())
    assert probe.table().groupby("iteration").size().to_dict() == {3: 7, 4: 7}


def test_a_layer_that_an_iteration_does_not_use_has_no_row_there():
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.seldom, self.passes = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 3, 3), 0

        def forward(self, x):
            self.passes += 1
            return self.often(x).sum() + (self.seldom(x).sum() if self.passes == 2 else 0)

    with rp.attach(net := Alternating(), LayerResponses()) as probe:
        for iteration in range(3):
            net(images())
            probe.after_backward(net, iteration)
    rows = list(zip(probe.table()["iteration"], probe.table()["layer"], strict=True))
    assert rows == [(0, "often"), (1, "often"), (1, "seldom"), (2, "often")]


def test_figures_of_another_shape_are_refused():
    with rp.attach(net := network(), LayerResponses()) as probe:
        net(images())
    other = LayerResponses()
    other.load_state(probe.state())
    with pytest.raises(rp.UsageError) as caught, rp.attach(net := network(width=8), other):
        net(images())
    assert str(caught.value) == "layer-responses has figures of 4 channels for 'stem.conv', which now has 8"


def test_no_activation_is_kept():
    net = network().eval()
    alive = []
    for module in net.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    with rp.attach(net, LayerResponses()) as probe, torch.no_grad():
        for _ in range(2):
            net(images())
            assert [ref for ref in alive if ref() is not None] == []
        # Another network with more images keeps no more.
        numbers = sum(tensor.numel() for tensor in probe.state().values() if isinstance(tensor, torch.Tensor))
        assert numbers == 3 * probe.table().channels.sum()


@pytest.mark.parametrize("how", ["compile before", "compile while", "in place", "part"])
def test_compiled_networks_run_as_written_while_measured(how):
    net = network().eval()
    with rp.attach(net, LayerResponses()) as eager, torch.no_grad():
        net(images())
    call = torch.compile(net, backend="eager") if how.startswith("compile") else net
    if how == "in place":
        net.compile(backend="eager")
    if how == "part":
        net.stage1 = torch.compile(net.stage1, backend="eager")
    with torch.no_grad():
        if how != "compile while":
            expected = call(images())
        with rp.attach(call, LayerResponses()) as probe:
            out = call(images())
        assert hook_count(net) == 0
        torch.testing.assert_close(call(images()), out)
        if how != "compile while":
            torch.testing.assert_close(out, expected)
    figures = ["kernel_size", "mean", "std", "count"]
    pandas.testing.assert_frame_equal(probe.table()[figures], eager.table()[figures])
    torch.compiler.reset()


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_is_measured_beneath(one_process):
    net = network()
    twin = copy.deepcopy(net)
    wrapped = nn.parallel.DistributedDataParallel(net)
    with rp.attach(wrapped, LayerResponses()) as probe:
        wrapped(images()).sum().backward()
    with rp.attach(twin, LayerResponses()) as expected:
        twin(images())
    assert hook_count(net) == 0
    pandas.testing.assert_frame_equal(probe.table(), expected.table())


def test_it_is_found_by_its_name():
    assert isinstance(rp.probes.make_probe("layer-responses"), LayerResponses)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_the_same_and_nothing_waits(kind):
    net = randomized(network()).cuda().to(memory_format=torch.channels_last).eval()
    batches = [images(count).cuda() for count in (7, 5)]
    probe = LayerResponses()
    with rp.attach(net, probe), torch.no_grad(), torch.autocast("cuda", kind, enabled=kind != torch.float32):
        net(batches[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            net(batches[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with torch.autocast("cuda", kind, enabled=kind != torch.float32):
        expected = naive(net, probe.table().measured.tolist(), batches)
    check(probe.table(), probe.channels(), {name: each.cpu() for name, each in expected.items()}, rtol=1e-4)


# -- the range of float32, and networks that change ---------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("flush", [False, True], ids=["", "denormals flushed"])
@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-19, 1e-12, 1e12, 1e19])
def test_vanished_and_exploded_responses_keep_their_figures(scale, flush, layout):
    """Squares below 1e-38 are zero in float32, and above 1e38 infinite, long before the responses are."""
    net = seeded(nn.Conv2d, 3, 4, 3, bias=False)
    batch = (images(64, channels=3) * scale).contiguous(memory_format=layout)
    torch.set_flush_denormal(flush)
    try:
        with torch.no_grad(), rp.attach(net, "layer-responses") as probe:
            responses = net(batch).double()
    finally:
        torch.set_flush_denormal(True)  # as conftest.py has it
    assert probe.table()["std"].item() == pytest.approx(responses.std().item(), rel=1e-5, abs=0)
    by_channel = responses.transpose(0, 1).flatten(1)
    assert probe.channels()["std"].tolist() == pytest.approx(by_channel.std(1).tolist(), rel=1e-5, abs=0)
    assert probe.channels()["mean"].tolist() == pytest.approx(by_channel.mean(1).tolist(), abs=1e-6 * scale)


@pytest.mark.parametrize("inference", [False, True])
def test_another_use_of_a_normalization_in_a_later_pass_is_refused(inference):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor, between: bool) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(F.relu(y) * 100 if between else y)

    net = Net()
    with torch.inference_mode(inference), rp.attach(net, "layer-responses") as probe:
        net(images(), False)
        net(images(), False)
        with pytest.raises(
            rp.UsageError, match="^layer-responses cannot measure 'conv': 'norm' normalized it in an earl"
        ):
            net(images(), True)
    assert probe.table()["count"].item() == 2 * IMAGES * 4 * 36


def test_a_checkpointed_network_is_counted_once():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    for reentrant in (True, False):
        with rp.attach(net, "layer-responses") as probe:
            torch.utils.checkpoint.checkpoint(net, images().requires_grad_(), use_reentrant=reentrant).sum().backward()
        assert probe.table()["count"].item() == IMAGES * 4 * 36, reentrant


def test_the_normalization_is_known_where_the_first_pass_has_nan():
    net = randomized(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))).eval()
    broken = images()
    broken[0, 0, 0, 0] = math.nan
    with torch.inference_mode(), rp.attach(net, "layer-responses") as probe:
        net(broken)
    assert probe.table()["measured"].item() == "1"


class Pair(nn.Conv2d):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("net", "kind"),
    [(Pair(1, 4, 3), "tuple"), (nn.Conv2d(1, 4, 3, dtype=torch.complex64), "torch.complex64 tensor")],
    ids=["tuple", "complex"],
)
def test_responses_that_are_no_real_numbers_are_refused(net, kind):
    given_images = images().to(net.weight.dtype)
    with (
        rp.attach(net, "layer-responses"),
        pytest.raises(rp.UsageError, match=f"it gives a {kind}, not a tensor of real"),
    ):
        net(given_images)
