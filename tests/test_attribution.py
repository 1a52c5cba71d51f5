"""Attribution against plain autograd and captum's own; completeness; and a network that is as it was before."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy
import pandas
import pytest
import torch
import torchvision
from captum.attr import LayerConductance
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, Boom, Fragile, assert_same, digits, hook_count, network, recipe, training
from torch import Tensor, nn
from torch.nn import functional as F

import plugins.layer_responses  # noqa: F401  # the probe's name
import resprobe as rp
from plugins import attribution
from plugins.attribution import COLUMNS, Attribution, branch_and_shortcut, integrated_gradients, pictures
from plugins.gradient_norms import GradientNorms
from resprobe.probes import at, attach, every


def batch(count: int = 5, channels: int = 1, size: int = 8, classes: int = 10) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=random), torch.randint(
        classes, (count,), generator=random
    )


def settled(net: nn.Module, channels: int = 1, size: int = 8) -> nn.Module:
    """The network with batch statistics that are not those of a new one, and some of every sign, in eval mode."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=random)
                module.bias.uniform_(-0.3, 0.3, generator=random)
        net.train()
        for _ in range(20):
            net(torch.randn(16, channels, size, size, generator=random))
    return net.eval()


def twin(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Gradient × activation of branch, shortcut and sum of every block, [N] each, in plain autograd: no hook."""
    parts, x = {}, net.stem(images)
    for stage in ("stage1", "stage2", "stage3"):
        for index, block in enumerate(getattr(net, stage)):
            branch = block.branch(x)
            shortcut = torch.zeros_like(branch) if block.shortcut is None else block.shortcut(x)
            total = branch + shortcut
            parts[f"{stage}.{index}"] = {"branch": branch, "shortcut": shortcut, "total": total}
            x = block.activation(total)
    logits = net.fc(net.flatten(net.pool(x))).gather(1, labels[:, None])
    gradients = torch.autograd.grad(logits.sum(), [each["total"] for each in parts.values()])
    return {
        name: {kind: (gradient * value).flatten(1).sum(1).detach() for kind, value in each.items()}
        for (name, each), gradient in zip(parts.items(), gradients, strict=True)
    }


def column(table: pandas.DataFrame, block: str, name: str) -> list[float]:
    return table.query("block == @block")[name].tolist()


# -- branch and shortcut -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("cifar/plain", {}),
        ("cifar/resnet", {"shortcut": "A"}),
        ("cifar/resnet", {"shortcut": "B"}),
        ("cifar/resnet", {"shortcut": "C"}),
        ("cifar/resnet", {"shortcut": "highway"}),
        ("cifar/resnet", {"norm": "none"}),
    ],
)
def test_gradient_x_activation_is_that_of_plain_autograd(family, options, dtype):
    net, (images, labels) = settled(network(family, **options)).to(dtype), batch()
    images = images.to(dtype)
    table = branch_and_shortcut(net, images, labels, per_image=True)
    expected = twin(net, images, labels)
    assert table.block.unique().tolist() == list(expected)
    close = {"rel": 1e-4, "abs": 1e-5} if dtype == torch.float32 else {"rel": 1e-11, "abs": 1e-12}
    for block, parts in expected.items():
        for kind, values in parts.items():
            assert column(table, block, kind) == pytest.approx(values.tolist(), **close), (block, kind)
    logits = net(images).gather(1, labels[:, None])[:, 0]
    assert column(table, "stage1.0", "logit") == pytest.approx(logits.tolist(), rel=1e-5)
    assert table.query("block == 'stage3.0'").target_class.tolist() == labels.tolist()


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), shortcut=st.sampled_from(["A", "A-centred", "B", "C"]), count=st.integers(1, 4))
def test_branch_and_shortcut_add_up_to_the_block(seed, shortcut, count):
    """The stated tolerance: a relative 1e-4 of the absolute contributions, in float32."""
    net, (images, labels) = network(seed=seed, shortcut=shortcut).eval(), batch(count)
    for row in branch_and_shortcut(net, images, labels, per_image=True).itertuples():
        size = row.branch_absolute + row.shortcut_absolute
        assert row.branch + row.shortcut == pytest.approx(row.total, abs=1e-4 * size)
        assert abs(row.branch) <= row.branch_absolute * (1 + 1e-9)
        assert 0 <= row.branch_share_absolute <= 1
        assert row.branch_share == pytest.approx(abs(row.branch) / (abs(row.branch) + abs(row.shortcut)))


def test_the_table_averages_over_images():
    net, (images, labels) = settled(network()), batch()
    table, each = branch_and_shortcut(net, images, labels), branch_and_shortcut(net, images, labels, per_image=True)
    assert tuple(table.columns) == COLUMNS[1:]
    assert table.position.tolist() == [1, 2, 3] == table.stage.tolist()
    assert set(table.images) == {5} and set(table.target) == {"given"}
    for measure in ("branch", "shortcut", "total", "branch_absolute", "branch_share", "branch_share_absolute", "logit"):
        for row in table.itertuples():
            values = pandas.Series(column(each, row.block, measure))
            assert getattr(row, measure) == pytest.approx(values.mean())
            assert getattr(row, f"{measure}_std") == pytest.approx(values.std())
    assert branch_and_shortcut(net, images[:1], labels[:1]).branch_std.isna().all()


def test_a_plain_block_is_all_branch():
    table = branch_and_shortcut(settled(network("cifar/plain")), *batch())
    assert set(table.shortcut) == set(table.shortcut_absolute) == {0.0}
    assert set(table.branch_share) == set(table.branch_share_absolute) == {1.0}
    assert table.branch.tolist() == pytest.approx(table.total.tolist())


def test_a_block_without_effect_has_no_share():
    net = settled(network("cifar/plain"))
    nn.init.zeros_(net.fc.weight)
    assert branch_and_shortcut(net, *batch()).branch_share.isna().all()


def test_more_images_than_a_pass_takes():
    net, (images, labels) = settled(network()), batch(7)
    whole = {method: branch_and_shortcut(net, images, labels, method=method, steps=8) for method in attribution.METHODS}
    for method, table in whole.items():
        again = branch_and_shortcut(net, images, labels, method=method, steps=8, batch_size=3)
        pandas.testing.assert_frame_equal(again, table, rtol=1e-3, atol=1e-5)


def test_targets():
    net, (images, _) = settled(network()), batch()
    predicted = branch_and_shortcut(net, images, per_image=True)
    assert predicted.query("block == 'stage1.0'").target_class.tolist() == net(images).argmax(1).tolist()
    assert set(predicted.target) == {"predicted"}
    assert set(branch_and_shortcut(net, images, 3, per_image=True).target_class) == {3}


def manual_basic(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    return branch, x if block.downsample is None else block.downsample(x)


def manual_bottleneck(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x1 = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    return block.bn3(block.conv3(x1)), x if block.downsample is None else block.downsample(x)


@pytest.mark.parametrize(("name", "manual"), [("resnet18", manual_basic), ("resnet50", manual_bottleneck)])
def test_torchvision(name, manual):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=5)
    settled(net, 3, 32)
    images, labels = batch(2, 3, 32, 5)
    table = branch_and_shortcut(net, images, labels)

    sums, x = {}, net.maxpool(F.relu(net.bn1(net.conv1(images))))
    for stage in range(1, 5):
        for index, block in enumerate(getattr(net, f"layer{stage}")):
            branch, shortcut = manual(block, x)
            sums[f"layer{stage}.{index}"] = branch, shortcut
            x = F.relu(branch + shortcut)
    logits = net.fc(x.mean((2, 3))).gather(1, labels[:, None])
    gradients = torch.autograd.grad(logits.sum(), [branch for branch, _ in sums.values()])
    assert table.block.tolist() == list(sums)
    assert table.stage.tolist() == [int(name[5]) for name in sums]
    for row, (branch, shortcut), gradient in zip(table.itertuples(), sums.values(), gradients, strict=True):
        size = row.branch_absolute + row.shortcut_absolute
        assert row.branch == pytest.approx((gradient * branch).sum().item() / 2, abs=1e-4 * size)
        assert row.shortcut == pytest.approx((gradient * shortcut).sum().item() / 2, abs=1e-4 * size)
    assert hook_count(net) == 0
    assert net.relu.inplace and type(net.layer1[0].bn2).__name__ != "Tap", "only the copy was changed"


def test_a_network_that_works_in_place_on_its_input():
    tail = [rp.BLOCKS["basic"](1, 2, shortcut="A"), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 10)]
    net, (images, labels) = nn.Sequential(nn.ReLU(inplace=True), *tail), batch()
    before = images.clone()
    table = branch_and_shortcut(net, images, labels)
    integrated_gradients(net, images, labels, steps=4)
    assert torch.equal(images, before)
    pandas.testing.assert_frame_equal(branch_and_shortcut(nn.Sequential(nn.ReLU(), *tail), images, labels), table)


# -- conductance -------------------------------------------------------------------------------------------------


class Linear(rp.Block):
    """A block without a nonlinearity, on which every integral is exact."""

    weighted_layers = 1

    def make_branch(self, in_channels, width, stride, layers):
        return layers.conv(in_channels, width, kernel=3, stride=stride)

    def make_activation(self):
        return nn.Identity()


def linear_network() -> nn.Module:
    torch.manual_seed(0)
    blocks = [Linear(1, 3, 2, shortcut="B"), Linear(3, 3, shortcut="A"), Linear(3, 4, shortcut="none")]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()


def test_conductance_of_a_linear_network_is_exact():
    net, (images, labels) = linear_network(), batch()
    baseline = torch.full((1, 8, 8), 0.5)
    table = branch_and_shortcut(net, images, labels, method="conductance", steps=2, baseline=baseline)
    difference = (net(images) - net(baseline[None])).gather(1, labels[:, None]).mean().item()
    assert table.logit.tolist() == pytest.approx([difference] * 3, rel=1e-5)
    assert table.total.tolist() == pytest.approx([difference] * 3, rel=1e-5)
    assert (table.branch + table.shortcut).tolist() == pytest.approx([difference] * 3, rel=1e-5)
    # There, it is also gradient × activation, less the baseline's.
    one = branch_and_shortcut(net, images, labels)
    other = branch_and_shortcut(net, baseline.expand_as(images), labels)
    assert table.branch.tolist() == pytest.approx((one.branch - other.branch).tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shortcut", ["A", "B", "none"])
def test_conductance_adds_up_to_the_logits_difference(shortcut):
    """The stated measure of the integral's error: `total` against `logit`, relative to the absolute contributions."""
    net, (images, labels) = settled(network(shortcut=shortcut)), batch()
    errors = []
    for steps in (8, 64, 512):
        table = branch_and_shortcut(net, images, labels, method="conductance", steps=steps, per_image=True)
        size = table.branch_absolute + table.shortcut_absolute
        errors.append(float(((table.total - table.logit).abs() / size).max()))
        assert (table.branch + table.shortcut).tolist() == pytest.approx(table.total.tolist(), abs=1e-5)
    assert errors[1] < 0.03 and errors[2] < 0.005 and errors[2] < errors[0], errors
    logits = net(images) - net(torch.zeros(1, 1, 8, 8))
    assert column(table, "stage2.0", "logit") == pytest.approx(
        logits.gather(1, labels[:, None])[:, 0].tolist(), abs=1e-5
    )


def test_conductance_is_captums():
    class Copy(nn.Module):
        def forward(self, x):
            return x.clone()

    net, (images, labels) = settled(network()), batch(3)
    table = branch_and_shortcut(net, images, labels, method="conductance", steps=400, per_image=True)
    apart = copy.deepcopy(net)
    apart.stage1[0].shortcut = Copy()  # else captum takes the identity's output for the block's input
    for name, block in apart.blocks():
        for kind in ("branch", "shortcut"):
            method = LayerConductance(apart, getattr(block, kind))
            theirs = method.attribute(images, target=labels, n_steps=400, method="riemann_trapezoid")
            size = max(column(table, name, f"{kind}_absolute"))
            ours = column(table, name, kind)
            assert ours == pytest.approx(theirs.flatten(1).sum(1).tolist(), abs=0.02 * size), (name, kind)


# -- what is refused ---------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = rp.BLOCKS["basic"](1, 1, shortcut="A")
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.block(self.block(x)).flatten(1))


class Weighed(rp.BLOCKS["basic"]):
    def forward(self, x):
        return self.activation(self.branch(x) + 0.5 * self.shortcut(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_block_is_measured_or_refused_whatever_the_scale_of_the_logits(scale, dtype):
    images, labels = batch()
    for block in (rp.BLOCKS["basic"], Weighed):
        torch.manual_seed(0)
        net = nn.Sequential(block(1, 1, shortcut="A"), nn.Flatten(), nn.Linear(64, 10, bias=False)).to(dtype)
        with torch.no_grad():
            net[2].weight *= scale
        for method in attribution.METHODS:
            if block is Weighed:
                with pytest.raises(rp.UsageError, match="^attribution cannot measure '0' .Weighed.: it does not add"):
                    branch_and_shortcut(net, images, labels, method=method, steps=4)
            else:
                assert branch_and_shortcut(net, images, labels, method=method, steps=4).shortcut_absolute[0] > 0


def test_a_block_whose_gradient_is_zero_or_no_number_is_measured():
    images, labels = batch()
    tail = [nn.Flatten(), nn.Linear(64, 10), nn.Softplus()]  # whose gradient is NaN where the image is
    net = nn.Sequential(rp.BLOCKS["basic"](1, 1, shortcut="A"), *tail)
    images[0] = torch.nan
    share = branch_and_shortcut(net, images, labels, per_image=True).branch_share
    assert share.isna().tolist() == [True, False, False, False, False]
    nn.init.zeros_(net[2].weight)
    assert branch_and_shortcut(net, images[1:], labels[1:]).shortcut_absolute.tolist() == [0.0]


class Uncopied(nn.Sequential):
    def __deepcopy__(self, memo):
        raise RuntimeError("no\ncopies")


class LooksInside(rp.BLOCKS["basic"]):
    """Its own forward pass takes the branch layer by layer."""

    def forward(self, x):
        out = self.branch.conv1(x) if len(self.branch) == 5 and self.branch[0] is self.branch.conv1 else x
        for layer in list(self.branch)[1:]:
            out = layer(out)
        return self.activation(out + self.shortcut(x))


def test_a_block_that_looks_into_its_branch_is_named():
    net = nn.Sequential(LooksInside(1, 1, shortcut="A"), nn.Flatten(), nn.Linear(64, 10))
    said = r"^attribution cannot measure '0' \(LooksInside\): its branch or shortcut is called 0 times in one pass; expected"
    with pytest.raises(rp.UsageError, match=said):
        branch_and_shortcut(net, *batch())


def test_a_network_without_data_is_refused():
    with torch.device("meta"):
        net = rp.build("cifar/resnet-8", in_channels=1)
    with pytest.raises(rp.UsageError, match="^attribution explains numbers, and a network on device 'meta' has none$"):
        branch_and_shortcut(net, *batch())


def test_what_cannot_be_measured_is_named():
    images, labels = batch()
    tail = [nn.Flatten(), nn.Linear(64, 10)]
    weighed = nn.Sequential(Weighed(1, 1, shortcut="A"), *tail)
    unused = nn.Sequential(rp.BLOCKS["basic"](1, 1, shortcut="A"), nn.Flatten(), nn.Linear(64, 10))
    unused[1].spare = rp.BLOCKS["basic"](1, 1)
    for net, message in (
        (
            torchvision.models.vgg11(num_classes=2, init_weights=False).features,
            "attribution finds no block in Sequential: it knows resprobe.Block (`.branch` and `.shortcut`) and "
            "torchvision's BasicBlock and Bottleneck",
        ),
        (
            Shared(),
            "attribution cannot measure 'block' (BasicBlock): its branch or shortcut is called 2 times in one pass; "
            "expected once",
        ),
        (
            unused,
            "attribution cannot measure '1.spare' (BasicBlock): its branch or shortcut is called 0 times in one pass; "
            "expected once",
        ),
        (
            weighed.eval(),
            "attribution cannot measure '0' (Weighed): it does not add its branch and its shortcut as they are",
        ),
        (
            Uncopied(*tail),
            "attribution works on a copy of the network, and Uncopied cannot be copied: no copies (test_attribution.py, "
            f"line {Uncopied.__deepcopy__.__code__.co_firstlineno + 1})",
        ),
        (
            nn.Sequential(rp.BLOCKS["basic"](1, 1, shortcut="A")),
            "attribution explains logits [N, classes]; the network turns (1, 1, 8, 8) into (1, 1, 8, 8)",
        ),
    ):
        with pytest.raises(rp.UsageError) as caught:
            branch_and_shortcut(net, images, labels)
        assert str(caught.value) == message
        assert hook_count(net) == 0
    with (
        pytest.raises(rp.UsageError, match="^attribution finds no block in Sequential"),
        attach(nn.Sequential(), "attribution"),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "shap"}, "method (='shap') is unknown; accepted: gradient-x-activation, conductance"),
        (
            {"method": "Conductance"},
            "method (='Conductance') is unknown; accepted: gradient-x-activation, conductance; nearest: conductance",
        ),
        ({"steps": 1}, "steps (=1) must be a whole number ≥ 2"),
        ({"targets": 10}, "targets hold the class 10; the network has 0 to 9"),
        ({"targets": -1}, "targets hold the class -1; the network has 0 to 9"),
        ({"targets": torch.tensor([1, 2])}, "targets have the shape (2,); expected [5], one an image"),
        (
            {"baseline": torch.zeros(3, 8)},
            "baseline has the shape (3, 8); expected one value or that of an image, (1, 8, 8)",
        ),
        (
            {"baseline": torch.zeros(5, 1, 8, 8)},
            "baseline has the shape (5, 1, 8, 8); expected one value or that of an image, (1, 8, 8)",
        ),
        (
            {"baseline": torch.zeros(3, 8, 8)},
            "baseline has the shape (3, 8, 8); expected one value or that of an image, (1, 8, 8)",
        ),
        (
            {"images": torch.zeros(5, 1, 8, 8, dtype=torch.uint8)},
            "images (=(5, 1, 8, 8) of torch.uint8) must be floating-point [N, C, H, W], normalized, N ≥ 1",
        ),
        (
            {"images": torch.zeros(0, 1, 8, 8)},
            "images (=(0, 1, 8, 8) of torch.float32) must be floating-point [N, C, H, W], normalized, N ≥ 1",
        ),
        ({"images": [1]}, "images (=list) must be floating-point [N, C, H, W], normalized, N ≥ 1"),
    ],
)
def test_arguments_that_are_refused(change, message):
    images, labels = batch()
    options = {"images": images, "targets": labels} | change
    for explain in (branch_and_shortcut, integrated_gradients) if "method" not in change else (branch_and_shortcut,):
        with pytest.raises(rp.UsageError) as caught:
            explain(network(), **options)
        assert str(caught.value) == message


def test_one_baseline_in_every_shape():
    net, (images, labels) = settled(network()), batch(3)
    for explain, options in ((branch_and_shortcut, {"method": "conductance"}), (integrated_gradients, {})):
        expected = explain(net, images, labels, steps=4, baseline=0.5, **options)
        for shape in ((), (1,), (8, 8), (1, 8, 8), (1, 1, 8, 8)):
            table = explain(net, images, labels, steps=4, baseline=torch.full(shape, 0.5), **options)
            assert_same(table.to_dict("list"), expected.to_dict("list"))


# -- no trace ----------------------------------------------------------------------------------------------------


def everything(net: nn.Module) -> list[Any]:
    """All of a network that an attribution might change."""
    return [
        {name: value.clone() for name, value in net.state_dict().items()},
        {name: (p.requires_grad, p.grad is None or p.grad.clone(), p._version) for name, p in net.named_parameters()},
        [(type(module).__name__, module.training, getattr(module, "inplace", None)) for module in net.modules()],
        torch.get_rng_state(),
        hook_count(net),
    ]


@pytest.mark.parametrize("train", [True, False])
def test_the_network_is_as_it_was(train):
    net, (images, labels) = settled(network()), batch()
    net.train(train)
    net.stage2.eval()  # as a frozen part is
    net.stem.requires_grad_(False)
    F.cross_entropy(net(images), labels).backward()
    calls: list[int] = []
    net.stage1[0].register_forward_hook(lambda *_: calls.append(1))
    before, given_images = everything(net), images.clone()
    with attach(net, "attribution", "gradient-norms", "layer-responses") as probes:
        probes[0].explain(images, labels)
        for method in attribution.METHODS:
            branch_and_shortcut(net, images, labels, method=method, steps=4)
        pictures(net, images, steps=4)
    assert_same(everything(net), before)
    assert calls == [], "no pass through the network itself"
    assert probes[1].table().empty and probes[2].table().empty, "and none that another probe could see"
    assert torch.equal(images, given_images) and not images.requires_grad


def test_it_is_explained_as_in_eval_mode():
    net, given = settled(network()), batch()
    table = branch_and_shortcut(net, *given)
    pandas.testing.assert_frame_equal(branch_and_shortcut(net.train(), *given), table)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        pandas.testing.assert_frame_equal(branch_and_shortcut(net, *given), table)
    pandas.testing.assert_frame_equal(branch_and_shortcut(net.requires_grad_(False), *given), table)


class Restless(nn.Module):
    """Draws random numbers from every generator in eval mode too."""

    def __init__(self):
        super().__init__()
        self.block, self.fc = rp.BLOCKS["basic"](1, 1, shortcut="A"), nn.Linear(64, 10)

    def forward(self, x):
        random.random(), numpy.random.rand()
        return self.fc(F.dropout(self.block(x), 0.5).flatten(1))


def test_the_random_numbers_are_as_they_were():
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1:3]]

    net, (images, labels) = Restless(), batch()
    before = states()
    for explain in (
        *(partial(branch_and_shortcut, method=method, steps=4) for method in attribution.METHODS),
        partial(integrated_gradients, steps=4),
        partial(pictures, steps=4),
        partial(branch_and_shortcut, targets=10),
    ):
        given = {"targets": labels} | explain.keywords
        with pytest.raises(rp.UsageError) if given["targets"] is not labels else nullcontext():
            explain(net, images, **given)
        numpy.testing.assert_equal(states(), before)


@pytest.mark.parametrize("made_there", [False, True], ids=["network", "inference-network"])
def test_in_inference_mode_it_is_the_same(made_there):
    explanations = (
        *(partial(branch_and_shortcut, method=method, steps=4) for method in attribution.METHODS),
        partial(integrated_gradients, steps=4),
    )
    net, (images, labels) = settled(network()), batch()
    baseline = images[0] / 2
    for targets in (labels, None, 3):
        expected = [explain(net, images, targets, baseline=baseline) for explain in explanations]
        with torch.inference_mode():
            there = network() if made_there else net
            there.load_state_dict(net.state_dict())
            # What is made there cannot be saved for a backward pass.
            given = [each.clone() if isinstance(each, Tensor) else each for each in (images, targets, baseline)]
            assert given[0].is_inference() and next(there.parameters()).is_inference() == made_there
            for explain, table in zip(explanations, expected, strict=True):
                found = explain(there, given[0], given[1], baseline=given[2])
                assert_same(found.to_dict("list"), table.to_dict("list"))
            pictures(there, *given[:2], baseline=given[2], steps=4)
            assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_is_left_by_an_exception(where):
    net = Fragile(where)
    before = everything(net)
    with pytest.raises(Boom), attach(net, "attribution") as probe:
        probe.explain(*batch())
    assert_same(everything(net), before)
    assert probe._network is None
    assert probe.table().empty


# -- as a probe --------------------------------------------------------------------------------------------------


def test_a_probe_explains_while_it_is_attached():
    net, (images, labels) = settled(network()), batch()
    with attach(net, "attribution") as probe:
        with pytest.raises(rp.UsageError, match="^probe attribution is attached already"):
            probe.attach(net)
        first = probe.explain(images, labels)
        probe.explain(images)
    table = probe.table()
    assert tuple(table.columns) == COLUMNS == tuple(Attribution().table().columns)
    assert table.iteration.tolist() == [0, 0, 0, 1, 1, 1]
    assert table.target.tolist() == ["given"] * 3 + ["predicted"] * 3
    plain = branch_and_shortcut(net, images, labels)
    pandas.testing.assert_frame_equal(first.drop(columns="iteration"), plain)
    pandas.testing.assert_frame_equal(table.iloc[:3].drop(columns="iteration"), plain)
    with pytest.raises(rp.UsageError) as caught:
        probe.explain(images)
    assert str(caught.value) == "attribution is not attached: explain inside `with rp.attach(network, ...)`"
    with attach(net, Attribution(method="conductance", steps=4)) as probe:
        assert set(probe.explain(images).method) == {"conductance"}


def test_a_training_with_probes_ends_with_the_same_weights():
    bare = training()
    probed = training(probes=[Attribution(*batch(), schedule=every(5)), GradientNorms(every(1))])
    alone = training(probes=[GradientNorms(every(1))])
    for each in (bare, probed, alone):
        each.run()
    for part in ("network", "optimizer", "rows", "random"):
        assert_same(bare.state()[part], probed.state()[part], part)
    assert probed.probes[0].table().iteration.tolist() == [0] * 3 + [5] * 3 + [10] * 3
    pandas.testing.assert_frame_equal(probed.probes[1].table(), alone.probes[0].table())
    assert hook_count(probed.network) == 0


def test_a_resumed_table_goes_on(tmp_path):
    given = batch()
    whole = training(probes=[Attribution(*given, schedule=every(2))])
    kept = io.BytesIO()
    whole.run(lambda each, news: torch.save(each.state(), kept) if news.iteration == 6 else None)
    kept.seek(0)
    resumed = training(probes=[Attribution(*given, schedule=every(2))])
    resumed.load_state(torch.load(kept, weights_only=True))
    resumed.run()
    pandas.testing.assert_frame_equal(resumed.probes[0].table(), whole.probes[0].table(), check_exact=True)


def test_the_table_is_saved_with_the_run(tmp_path):
    given = ("cifar/resnet-8", digits(), recipe(iterations=4))
    options = {"runs": tmp_path, "device": CPU, "precision": "fp32", "progress": False}
    table = rp.train(*given, **options, probes=[Attribution(*batch(), schedule=at([2]))]).tables["attribution"]
    watched = []
    again = [Attribution(*batch(), schedule=at([2]))]
    found = rp.train(*given, **options | {"progress": watched.append}, probes=again).tables["attribution"]
    assert watched == [], "it is not trained again"
    pandas.testing.assert_frame_equal(found, table, check_exact=True)


def test_a_training_needs_images(tmp_path):
    with pytest.raises(rp.UsageError) as caught:
        rp.train("cifar/resnet-8", "digits", probes=["attribution"], runs=tmp_path / "runs")
    assert str(caught.value) == (
        "probe (='attribution') cannot watch a training without images to explain: in Python "
        "probes=[plugins.attribution.Attribution(images, targets)]; studies.branch_contribution explains trained networks"
    )
    assert list(tmp_path.iterdir()) == []


# -- compiled and distributed ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch's own, about its own
@pytest.mark.parametrize("way", ["function", "method"])
def test_compiled(way):
    torch._dynamo.reset()
    net, given = settled(network()), batch()
    expected = branch_and_shortcut(net, *given)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    if way == "function":
        compiled = torch.compile(net, backend=backend)
    else:
        net.compile(backend=backend)
        compiled = net
    compiled(given[0])
    before = len(compilations)
    pandas.testing.assert_frame_equal(branch_and_shortcut(compiled, *given), expected)
    with attach(compiled, "attribution") as probe:
        pandas.testing.assert_frame_equal(probe.explain(*given).drop(columns="iteration"), expected)
    compiled(given[0])
    assert len(compilations) == before > 0
    torch._dynamo.reset()


@pytest.fixture
def gloo(tmp_path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed(gloo):
    net, given = settled(network()), batch()
    expected = branch_and_shortcut(net, *given)
    parallel = nn.parallel.DistributedDataParallel(net)
    pandas.testing.assert_frame_equal(branch_and_shortcut(parallel, *given), expected)
    with attach(parallel, "attribution") as probe:
        pandas.testing.assert_frame_equal(probe.explain(*given).drop(columns="iteration"), expected)


# -- pictures ----------------------------------------------------------------------------------------------------


def test_integrated_gradients_of_a_linear_network_are_exact():
    net, (images, labels) = linear_network(), batch()
    table = integrated_gradients(net, images, labels, steps=4, baseline=0.25)
    inputs = images.clone().requires_grad_()
    gradient = torch.autograd.grad(net(inputs).gather(1, labels[:, None]).sum(), inputs)[0]
    for row, expected in zip(table.itertuples(), gradient * (images - 0.25), strict=True):
        torch.testing.assert_close(row.attribution, expected)
        assert row.delta == pytest.approx(0, abs=1e-5)
        assert row.difference == pytest.approx(expected.sum().item(), abs=1e-5)


def test_integrated_gradients_are_complete():
    net, (images, labels) = settled(network()), batch()
    table = integrated_gradients(net, images, labels, steps=200)
    sizes = [each.abs().sum().item() for each in table.attribution]
    assert (table.delta.abs() / sizes).max() < 0.02
    sums = [each.sum().item() for each in table.attribution]
    assert sums == pytest.approx((table.difference + table.delta).tolist(), abs=1e-5)
    assert table.logit.tolist() == pytest.approx(net(images).gather(1, labels[:, None])[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (3, 3), (9, 3)])
def test_pictures(count, channels):
    net, (images, labels) = settled(network(in_channels=channels), channels), batch(count, channels)
    figure = pictures(net, images, labels, steps=8)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 2 * count
    table = integrated_gradients(net, images, labels, steps=8)
    below = [axis for axis in shown if axis.get_title().startswith("sum off by")]
    assert below[0].get_title() == f"sum off by {table.delta[0]:+.1g}\nof {table.difference[0]:.2f}"
    numpy.testing.assert_array_equal(below[0].images[0].get_array(), table.attribution[0].sum(0))
    low, high = below[0].images[0].get_clim()
    assert low == -high < 0
    above = [axis.get_title() for axis in shown if not axis.get_title().startswith("sum off by")]
    assert above[0] == f"class {labels[0]}\nlogit {table.logit[0]:.2f}"
    assert rp.figures.render(figure, "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "net",
    [
        rp.build("imagenet/vgg-16", width=2, num_classes=3, norm="batch"),
        torchvision.models.squeezenet1_1(num_classes=3),
    ],
    ids=["ours", "torchvision"],
)
def test_a_network_without_blocks_has_pictures_all_the_same(net):
    images = torch.randn(2, 3, 64, 64)
    table = integrated_gradients(net, images, steps=8)
    assert [each.shape for each in table["attribution"]] == [(3, 64, 64)] * 2
    assert len(pictures(net, images, steps=2).axes) >= 4


def test_pictures_of_images_as_they_are_to_be_seen():
    net, (images, _) = settled(network()), batch(2)
    figure = pictures(net, images, shown=torch.rand(2, 3, 16, 16), steps=2)
    assert figure.axes[0].images[0].get_array().shape == (16, 16, 3)
    assert figure.axes[0].get_title().startswith("predicted ")
    with pytest.raises(rp.UsageError) as caught:
        pictures(net, images, shown=images[:1], steps=2)
    assert str(caught.value) == "shown has 1 images, but 2 are explained"


@pytest.mark.gpu
@pytest.mark.parametrize("method", attribution.METHODS)
def test_on_cuda_it_is_the_same(method):
    tables = []
    for device in ("cpu", "cuda"):
        net = settled(network()).to(device)
        images, labels = (each.to(device) for each in batch())
        with attach(net, Attribution(method=method, steps=4)) as probe:
            probe.explain(images, labels)
        tables.append(probe.table())
    here, there = tables
    pandas.testing.assert_frame_equal(there, here, rtol=1e-3, atol=1e-5)
