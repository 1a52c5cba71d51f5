"""Gradient norms against plain autograd, on networks of ours, of torchvision and of a user; and without a trace."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pandas
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, Boom, Fragile, assert_same, digits, hook_count, network, recipe, training
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import resprobe as rp
from plugins import gradient_norms
from plugins.gradient_norms import COLUMNS, GradientNorms
from resprobe.probes import at, attach, every, unwrap

WEIGHTED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def batch(count: int = 6, channels: int = 1, size: int = 8, classes: int = 10) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=random), torch.randint(
        classes, (count,), generator=random
    )


def loss_of(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images).float(), labels)


def block_outputs(net: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The blocks' outputs and the logits, from one pass that calls the parts one after the other: no hook."""
    outputs, x = {}, net.stem(images)
    for stage in ("stage1", "stage2", "stage3"):
        for index, block in enumerate(getattr(net, stage)):
            x = outputs[f"{stage}.{index}"] = block(x)
    return outputs, net.fc(net.flatten(net.pool(x)))


def twin(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Norms of the layers' weight gradients and of the blocks' output gradients, in plain autograd."""
    layers = {name: module.weight for name, module in net.named_modules() if isinstance(module, WEIGHTED)}
    outputs, logits = block_outputs(net, images)
    wanted = [*layers.values(), *outputs.values()]
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), wanted)
    norms = [gradient.double().norm().item() for gradient in gradients]
    return dict(zip(layers, norms, strict=False)), dict(zip(outputs, norms[len(layers) :], strict=True))


def layers_of(table: pandas.DataFrame) -> dict[str, float]:
    return table.query("kind != 'block'").set_index("layer").gradient_norm.to_dict()


def blocks_of(table: pandas.DataFrame) -> dict[str, float]:
    return table.query("kind == 'block'").set_index("layer").output_gradient_norm.to_dict()


# -- the figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("cifar/plain", {}),
        ("cifar/resnet", {}),
        ("cifar/resnet", {"shortcut": "C"}),
        ("cifar/resnet", {"norm": "none"}),
        ("cifar/resnet", {"shortcut": "highway"}),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_figures_are_those_of_plain_autograd(family, options, train, dtype):
    net = network(family, **options).train(train).to(dtype)
    images, labels = batch()
    images = images.to(dtype)
    with attach(net, "gradient-norms") as probe:
        F.cross_entropy(net(images), labels).backward()
    table = probe.table()
    layers, blocks = twin(net, images, labels)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert layers_of(table) == pytest.approx(layers, rel=tolerance, abs=tolerance)
    assert blocks_of(table) == pytest.approx(blocks, rel=tolerance, abs=tolerance)
    for row in table.query("kind != 'block'").itertuples():
        own = net.get_submodule(row.layer).weight.double().norm().item()
        assert row.weight_norm == pytest.approx(own, rel=1e-6)
        assert row.gradient_to_weight == pytest.approx(row.gradient_norm / own, rel=1e-5)
    rows = table.query("kind == 'block'")
    assert rows.output_gradient_rms.tolist() == pytest.approx((math.sqrt(6) * rows.output_gradient_norm).tolist())
    assert hook_count(net) == 0


def test_columns_say_where_a_row_belongs():
    net = network("cifar/resnet", shortcut="C")
    with attach(net, "gradient-norms") as probe:
        loss_of(net, *batch()).backward()
    table = probe.table()
    assert tuple(table.columns) == COLUMNS
    row = table.set_index("layer").loc["stage2.0.branch.conv2"]
    assert (row.iteration, row.kind, row.stage, row.block, row.call) == (0, "conv", 2, "stage2.0", 0)
    assert table.set_index("layer").kind[["stem.conv", "stem.norm", "fc", "stage3.0"]].tolist() == [
        *("conv", "norm", "linear", "block")
    ]
    assert table.set_index("layer").block["stem.conv"] == table.set_index("layer").block["fc"] == ""
    assert table.set_index("layer").stage[["stem.conv", "fc"]].tolist() == [0, 0]
    layers, blocks = table.query("kind != 'block'"), table.query("kind == 'block'")
    assert sorted(layers.position) == list(range(1, len(layers) + 1))
    assert blocks.position.tolist() == [1, 2, 3]
    assert layers.output_gradient_norm.isna().all() and blocks.gradient_norm.isna().all()


def test_rms_over_images_compares_between_batch_sizes():
    """An image twice is no other gradient per image; the norm over the batch shrinks by √2."""
    net = network().eval()
    images, labels = batch()
    tables = []
    for repeats in (1, 2):
        with attach(net, "gradient-norms") as probe:
            loss_of(net, images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)).backward()
        net.zero_grad()
        tables.append(probe.table().query("kind == 'block'"))
    assert tables[0].output_gradient_rms.tolist() == pytest.approx(tables[1].output_gradient_rms.tolist(), rel=1e-5)
    ratio = tables[0].output_gradient_norm / tables[1].output_gradient_norm
    assert ratio.tolist() == pytest.approx([math.sqrt(2)] * 3, rel=1e-5)
    own = [twin(net, image[None], label[None])[1]["stage1.0"] for image, label in zip(images, labels, strict=True)]
    assert tables[0].output_gradient_rms.iloc[0] == pytest.approx(math.sqrt(sum(n * n for n in own) / 6), rel=1e-5)


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_accumulated_gradients_are_those_of_the_whole_batch(sizes):
    net = network().eval()  # in train mode each part has statistics of its own
    images, labels = batch(sum(sizes))
    with attach(net, "gradient-norms") as probe:
        for part, part_labels in zip(images.split(sizes), labels.split(sizes), strict=True):
            (loss_of(net, part, part_labels) * (len(part) / len(images))).backward()
    layers, blocks = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx(layers, rel=1e-4, abs=1e-6)
    assert blocks_of(probe.table()) == pytest.approx(blocks, rel=1e-4, abs=1e-6)
    rms = probe.table().query("kind == 'block'").output_gradient_rms
    assert rms.tolist() == pytest.approx([norm * math.sqrt(len(images)) for norm in blocks.values()], rel=1e-4)


def test_a_training_in_parts_is_measured_as_one_step():
    probe = GradientNorms(at([0]))
    with_probe = training(probes=[probe], bn_batch=8, iterations=1)
    images, labels = with_probe.batches.make(*next(with_probe.batches.drawn(0)))
    net = network().train()
    squares = dict.fromkeys(["stage1.0", "stage2.0", "stage3.0"], 0.0)
    for part, part_labels in zip(images.split(8), labels.split(8), strict=True):
        outputs, logits = block_outputs(net, part)
        loss = F.cross_entropy(logits, part_labels) / 2
        for name, gradient in zip(outputs, torch.autograd.grad(loss, outputs.values(), retain_graph=True), strict=True):
            squares[name] += gradient.norm().item() ** 2
        loss.backward()
    with_probe.run()
    table = probe.table()
    assert blocks_of(table) == pytest.approx({name: math.sqrt(square) for name, square in squares.items()}, rel=1e-4)
    weights = {name: net.get_submodule(name).weight.grad.norm().item() for name in layers_of(table)}
    assert layers_of(table) == pytest.approx(weights, rel=1e-4)


def test_under_autocast_norms_are_summed_in_float32():
    net, (images, labels) = network().eval(), batch(64)
    kept = []
    handles = [
        module.register_forward_hook(lambda m, i, out: kept.append(out) or out.retain_grad())
        for _, module in net.blocks()
    ]
    with attach(net, "gradient-norms") as probe:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()
    for handle in handles:
        handle.remove()
    assert kept[0].dtype == torch.bfloat16
    norms = [out.grad.float().norm().item() for out in kept]
    assert list(blocks_of(probe.table()).values()) == pytest.approx(norms, rel=1e-5)
    weights = {name: net.get_submodule(name).weight.grad.norm().item() for name in layers_of(probe.table())}
    assert layers_of(probe.table()) == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", ["by image", "alike", "one image", "one number", "broadcast", "zero", "nan"])
def test_norms_of_large_bfloat16_gradients_hold_their_digits(layout, kind):
    gradient = torch.randn(64, 16, 32, 32, generator=torch.Generator().manual_seed(0)) * 1e-4
    if kind == "by image":
        gradient *= torch.linspace(0.1, 3, 64).view(-1, 1, 1, 1)
    elif kind == "alike":
        gradient = gradient.sign() * 3e-4
    elif kind == "one image":
        gradient[1:] = 0
    elif kind == "one number":
        gradient[5, 3, 2, 1] = 7.77
    elif kind == "broadcast":
        gradient = gradient.mean((2, 3), keepdim=True).expand(64, 16, 32, 32)
    elif kind == "zero":
        gradient = gradient * 0
    else:
        gradient[3, 1, 4, 1] = math.nan
    gradient = gradient.bfloat16()
    if kind != "broadcast":
        gradient = gradient.contiguous(memory_format=layout)
    exact = gradient.double().norm().item()
    assert gradient_norms._norm(gradient).item() == pytest.approx(exact, rel=2e-4, nan_ok=True)
    assert (gradient_norms._rounded_rows(gradient) is not None) == (kind in ("by image", "broadcast"))


def test_half_precision_gradients_do_not_lose_their_norm():
    net = nn.Sequential(nn.Sequential(nn.Linear(2000, 500, dtype=torch.bfloat16)))
    images = torch.ones(200, 2000, dtype=torch.bfloat16)
    with attach(net, GradientNorms(blocks=["0"])) as probe:
        net(images).sum().backward()
    table = probe.table().set_index("kind")
    assert table.output_gradient_norm["block"] == pytest.approx(math.sqrt(200 * 500), rel=1e-6)
    assert table.gradient_norm["linear"] == pytest.approx(200 * math.sqrt(2000 * 500), rel=1e-6)


# -- other people's networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn"])
def test_torchvision(name):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=5)
    images, labels = batch(2, channels=3, size=32, classes=5)
    with attach(net, "gradient-norms") as probe:
        loss_of(net, images, labels).backward()
    assert hook_count(net) == 0
    table = probe.table()
    grads = {name: module.weight.grad for name, module in net.named_modules() if isinstance(module, WEIGHTED)}
    assert layers_of(table) == pytest.approx(
        {name: grad.double().norm().item() for name, grad in grads.items()}, rel=1e-5
    ), "VGG's largest layer included: a hundred million weights"
    blocks = [name for name, module in net.named_modules() if type(module).__name__ in ("BasicBlock", "Bottleneck")]
    assert list(blocks_of(table)) == blocks
    if blocks:
        assert table.query("kind == 'block'").stage.tolist() == [int(name[5]) for name in blocks]
        last = net.layer4[-1]
        assert blocks_of(table)[blocks[-1]] == pytest.approx(self_made_last_norm(net, last, images, labels), rel=1e-4)


def self_made_last_norm(net: nn.Module, last: nn.Module, images: Tensor, labels: Tensor) -> float:
    """‖∂L/∂y‖ of the last block, from the formula of what follows: average pool, fc, softmax."""
    seen = []
    handle = last.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    with torch.no_grad():
        net(images)
    handle.remove()
    y = seen[0].requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net.fc(y.mean((2, 3))), labels), y)[0].norm().item()


class User(nn.Module):
    """Declared backwards, a block's output worked on in place, one block used twice, one never, loose parameters."""

    def __init__(self, inplace: bool = True):
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.unused = nn.Linear(5, 5)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Softplus())
        self.scale = nn.Parameter(torch.full((5,), 2.0))
        self.stem = nn.Linear(4, 5)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x) * self.scale)
        x = F.threshold(x, 0.7, 0.0, inplace=self.inplace)
        return self.head(self.body(x))


def test_a_users_module():
    torch.manual_seed(0)
    net, x = User(), torch.randn(7, 4)
    probe = GradientNorms(blocks=["body", "unused"])
    with attach(net, probe):
        net(x).square().mean().backward()
    table = probe.table()
    ordered = table.query("kind != 'block'").sort_values("position").layer.tolist()
    assert ordered == ["stem", "body.0", "head", "scale", "unused"], "in the order of the pass, the unused one last"
    assert table.set_index("layer").kind["scale"] == "other"
    for name, parameter in net.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in ordered and parameter.grad is not None:
            assert layers_of(table)[layer] == pytest.approx(parameter.grad.norm().item(), rel=1e-5)
    assert math.isnan(layers_of(table)["unused"])
    assert math.isnan(blocks_of(table)["unused"])

    net.inplace = False
    first = net.body(net.stem(x) * net.scale)
    second = net.body(F.threshold(first, 0.7, 0.0))
    gradients = torch.autograd.grad(net.head(second).square().mean(), (first, second))
    rows = table.query("layer == 'body'")
    assert rows.call.tolist() == [0, 1], "a module that is used twice is kept apart by call"
    assert rows.output_gradient_norm.tolist() == pytest.approx([g.norm().item() for g in gradients], rel=1e-5)


def test_blocks_may_be_given_by_class():
    net = network()
    with attach(net, GradientNorms(blocks=[nn.ReLU])) as probe:
        loss_of(net, *batch()).backward()
    assert set(blocks_of(probe.table())) == {n for n, m in net.named_modules() if isinstance(m, nn.ReLU)}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant):
    class Thrifty(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            x = self.net.stem(x)
            for stage in (self.net.stage1, self.net.stage2, self.net.stage3):
                x = checkpoint(stage[0], x, use_reentrant=reentrant)
            return self.net.fc(self.net.flatten(self.net.pool(x)))

    net, (images, labels) = network().eval(), batch()
    with attach(Thrifty(net), "gradient-norms") as probe:
        loss_of(probe._network, images, labels).backward()
    table = probe.table()
    assert table.call.tolist() == [0] * len(table)
    expected = {f"net.{name}": norm for name, norm in twin(net, images, labels)[1].items()}
    assert blocks_of(table) == pytest.approx(expected, rel=1e-5)


# -- when gradients are read -------------------------------------------------------------------------------------


def test_reading_is_once_for_each_backward_pass():
    net, (images, labels) = network(), batch()
    with attach(net, "gradient-norms") as probe:
        assert probe.table().empty, "nothing was measured yet"
        with torch.no_grad():
            net(images)
        net(images)
        assert probe.table().empty, "a forward pass alone has no gradient"
        loss_of(net, images, labels).backward()
        first = probe.table()
        assert len(first) > 0
        pandas.testing.assert_frame_equal(probe.table(), first)
    net.zero_grad()
    pandas.testing.assert_frame_equal(probe.table(), first)
    assert tuple(GradientNorms().table().columns) == COLUMNS


@pytest.mark.parametrize("zero_between", [True, False])
def test_a_loop_of_ones_own(zero_between):
    """With `read` after each pass, and with gradients set to None before or after the forward pass."""
    net, probe = network().eval(), GradientNorms()
    images, labels = batch(18)
    expected = []
    with attach(net, probe):
        for part, part_labels in zip(images.split(6), labels.split(6), strict=True):
            expected.append(twin(net, part, part_labels))
            if not zero_between:
                net.zero_grad()
            loss = loss_of(net, part, part_labels)
            if zero_between:
                net.zero_grad()
            loss.backward()
            probe.read()
    for iteration, (layers, blocks) in enumerate(expected):
        rows = probe.table().query(f"iteration == {iteration}")
        assert layers_of(rows) == pytest.approx(layers, rel=1e-5)
        assert blocks_of(rows) == pytest.approx(blocks, rel=1e-5)
    assert probe.table().iteration.max() == 2


@pytest.mark.parametrize("zero_late", [True, False])
def test_unread_passes_of_earlier_steps_do_not_add_up(zero_late):
    net, (images, labels) = network().eval(), batch()
    with attach(net, "gradient-norms") as probe:
        for scale in (100.0, 1.0):
            if not zero_late:
                net.zero_grad()
            loss = loss_of(net, images, labels) * scale
            if zero_late:
                net.zero_grad()
            loss.backward()
    layers, blocks = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx(layers, rel=1e-5)
    assert blocks_of(probe.table()) == pytest.approx(blocks, rel=1e-5)


@pytest.mark.parametrize("first", [0, 1])
def test_one_backward_call_through_two_passes(first):
    net, (images, labels) = network().eval(), batch()
    with attach(net, "gradient-norms") as probe:
        for _ in range(2):  # the first is not read, and must not add to the second
            net.zero_grad()
            logits = [net(images[:3]), net(images[3:])]
            losses = [F.cross_entropy(logits[index], labels.split(3)[index]) / 2 for index in (first, 1 - first)]
            (losses[0] + losses[1]).backward()
    layers, blocks = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx(layers, rel=1e-5)
    assert blocks_of(probe.table()) == pytest.approx(blocks, rel=1e-5)


def test_a_network_that_is_one_block():
    """Its output is the block's: the gradient meets both hooks on one tensor."""
    block = rp.BLOCKS["basic"](2, 2, shortcut="A")
    net = nn.Sequential(block)
    for _ in range(3):
        with attach(net, "gradient-norms") as probe:
            net(torch.ones(2, 2, 4, 4)).sum().backward()
        net.zero_grad()
    with attach(block, "gradient-norms") as alone:
        block(torch.ones(2, 2, 4, 4)).sum().backward()
    assert blocks_of(probe.table())["0"] == blocks_of(alone.table())[""] == pytest.approx(8.0)


def test_frozen_layers_and_zero_weights():
    net, (images, labels) = network(), batch()
    net.stem.requires_grad_(False)
    net.stage1.requires_grad_(False)
    nn.init.zeros_(net.fc.weight)
    with attach(net, "gradient-norms") as probe:
        loss_of(net, images, labels).backward()
    table = probe.table().set_index("layer")
    assert math.isnan(table.gradient_norm["stem.conv"]) and table.weight_norm["stem.conv"] > 0
    assert math.isnan(table.output_gradient_norm["stage1.0"]) and table.output_gradient_norm["stage3.0"] == 0
    assert table.gradient_to_weight["fc"] == math.inf


def test_the_table_goes_on_when_attached_again():
    net, probe = network(), GradientNorms()
    for _ in range(3):
        with attach(net, probe):
            loss_of(net, *batch()).backward()
        net.zero_grad()
    assert probe.table().iteration.unique().tolist() == [0, 1, 2]
    other = nn.Sequential(nn.Linear(2, 2))
    with attach(other, probe):
        other(torch.ones(1, 2)).sum().backward()
    assert probe.table().query("iteration == 3").layer.tolist() == ["0"]


# -- no trace ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bn_batch", [None, 8])
def test_a_training_with_probes_ends_with_the_same_weights(precision, bn_batch):
    bare = training(precision=precision, bn_batch=bn_batch)
    probed = training(precision=precision, bn_batch=bn_batch, probes=[GradientNorms(every(1)), Recorder()])
    bare.run()
    probed.run()
    for one, other in ((bare.state(), probed.state()),):
        for part in ("network", "optimizer", "rows", "random"):
            assert_same(one[part], other[part], part)
    assert hook_count(probed.network) == 0
    table = probed.probes[0].table()
    assert table.iteration.unique().tolist() == list(range(12))
    assert table.drop(columns=[c for c in COLUMNS if "norm" in c or "rms" in c or "weight" in c]).notna().all().all()


class Recorder(rp.Probe):
    """Another probe beside ours, which looks at `.grad` as it is given to the optimizer."""

    name = "recorder"

    def __init__(self):
        super().__init__()
        self.norms: list[dict[str, float]] = []

    def hook(self, network):
        yield network.register_forward_hook(lambda m, i, out: None)

    def after_backward(self, network, iteration):
        self.norms.append(
            {name: m.weight.grad.norm().item() for name, m in network.named_modules() if isinstance(m, WEIGHTED)}
        )


def test_several_at_once_and_the_gradients_that_the_optimizer_uses():
    probe, recorder, second = GradientNorms(every(1)), Recorder(), GradientNorms(every(2))
    second.name = "second"
    training(probes=[probe, recorder, second]).run()
    for iteration, norms in enumerate(recorder.norms):
        assert layers_of(probe.table().query(f"iteration == {iteration}")) == pytest.approx(norms, rel=1e-5)
    even = probe.table().query("iteration % 2 == 0").reset_index(drop=True)
    pandas.testing.assert_frame_equal(second.table(), even)


def test_the_default_schedule_is_logarithmic():
    probe = GradientNorms()
    assert [i for i in range(30) if probe.schedule(i)] == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25]


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_a_resumed_table_goes_on(stop):
    whole = training(probes=[GradientNorms(every(2))], window=1)
    states = {}

    def keep(each: Any, news: Any) -> None:
        if news.iteration == stop:
            torch.save(each.state(), states.setdefault(stop, io.BytesIO()))

    whole.run(keep)
    states[stop].seek(0)
    resumed = training(probes=[GradientNorms(every(2))], window=1)
    resumed.load_state(torch.load(states[stop], weights_only=True))
    resumed.run()
    pandas.testing.assert_frame_equal(resumed.probes[0].table(), whole.probes[0].table(), check_exact=True)


def test_the_table_is_saved_with_the_run(tmp_path):
    given = ("cifar/resnet-8", digits(), recipe(iterations=4))
    options = {"runs": tmp_path, "probes": ["gradient-norms"], "device": CPU, "precision": "fp32", "progress": False}
    table = rp.train(*given, **options).tables["gradient-norms"]
    found = rp.train(*given, **options).tables["gradient-norms"]
    assert table.iteration.unique().tolist() == [0, 1, 2, 3]
    pandas.testing.assert_frame_equal(found, table, check_exact=True, check_dtype=False)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_is_left_by_an_exception(where):
    net, probe = Fragile(where), GradientNorms()
    with pytest.raises(Boom), attach(net, probe):
        loss_of(net, *batch()).backward()
    assert hook_count(net) == 0
    assert probe.table().empty, "a pass that was broken off is not measured"
    net.where = "nowhere"
    net.zero_grad()
    with attach(net, probe):
        loss_of(net, *batch()).backward()
    assert len(probe.table()) > 0


def test_an_exception_that_is_handled_outside_does_not_stop_the_reading():
    net, probe = network(), GradientNorms()
    try:
        raise Boom
    except Boom:
        with attach(net, probe):
            loss_of(net, *batch()).backward()
    assert len(probe.table()) > 0


def test_no_hook_stays_on_a_graph_that_lives_on():
    net, (images, labels) = network(), batch()
    with attach(net, "gradient-norms") as probe:
        outputs, logits = [], None
        handle = net.stage1[0].register_forward_hook(lambda m, i, out: outputs.append(out))
        logits = net(images)
        handle.remove()
    assert not outputs[0]._backward_hooks and not logits._backward_hooks
    F.cross_entropy(logits, labels).backward()
    assert probe.table().empty


def test_no_activation_is_kept():
    net, (images, labels) = network(), batch()
    kept: list[weakref.ref] = []
    handle = net.stage2[0].register_forward_hook(lambda m, i, out: kept.append(weakref.ref(out)))
    with attach(net, "gradient-norms"):
        loss_of(net, images, labels).backward()
        gc.collect()
        assert len(kept) == 1 and kept[0]() is None
    handle.remove()


def test_one_transfer_a_step(monkeypatch):
    """`tolist` once for all figures; no other way from the device to the host is taken."""
    net, (images, labels) = network(), batch()
    taken: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)
        return lambda self, *args, **kwargs: taken.append(name) or original(self, *args, **kwargs)

    with attach(net, "gradient-norms") as probe:
        loss_of(net, images, labels).backward()
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(Tensor, name, counted(name))
        probe.read()
        assert taken == ["tolist"]
        probe.table()
        probe.state()
    monkeypatch.undo()
    assert "item" not in taken


@pytest.mark.gpu
def test_one_wait_for_the_gpu_a_step(recwarn):
    net = network().cuda()
    images, labels = (each.cuda() for each in batch())
    with attach(net, "gradient-norms") as probe:
        loss_of(net, images, labels).backward()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            recwarn.clear()
            probe.read()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in recwarn if "synchronizing" in str(each.message)]) == 1
    layers, blocks = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx(layers, rel=1e-3)
    assert blocks_of(probe.table()) == pytest.approx(blocks, rel=1e-3)


# -- compiled and distributed ------------------------------------------------------------------------------------


@pytest.fixture
def gloo(tmp_path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own, about its own
@pytest.mark.parametrize("first", [True, False], ids=["probe first", "compiled first"])
@pytest.mark.parametrize("way", ["function", "method"])
def test_a_compiled_network_runs_uncompiled_while_it_is_measured(first, way):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    net, (images, labels) = network().eval(), batch()
    if way == "function":
        compiled = torch.compile(net, backend=backend)
        assert unwrap(compiled) is net
    else:
        net.compile(backend=backend)
        compiled = net
    if not first:
        loss_of(compiled, images, labels)
    before = len(compilations)
    with attach(compiled, "gradient-norms", GradientNorms()) as (probe, second):
        loss_of(compiled, images, labels).backward()
    assert len(compilations) == before
    layers, blocks = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx(layers, rel=1e-5)
    assert blocks_of(probe.table()) == pytest.approx(blocks, rel=1e-5)
    pandas.testing.assert_frame_equal(probe.table(), second.table())
    assert hook_count(net) == 0
    loss_of(compiled, images, labels)
    loss_of(compiled, images, labels)
    assert len(compilations) == max(before, len(compilations)) > 0
    now = len(compilations)
    loss_of(compiled, images, labels)
    assert len(compilations) == now, "compiled once, and used again"
    torch._dynamo.reset()


def test_distributed(gloo):
    net, (images, labels) = network().eval(), batch()
    parallel = nn.parallel.DistributedDataParallel(net)
    assert unwrap(parallel) is net
    with attach(parallel, "gradient-norms") as probe:
        loss_of(parallel, images, labels).backward()
    layers, blocks = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx(layers, rel=1e-5), "names without `module.`"
    assert blocks_of(probe.table()) == pytest.approx(blocks, rel=1e-5)
    assert hook_count(net) == 0


def test_data_parallel_is_refused():
    with pytest.raises(
        rp.UsageError, match="^a probe cannot be attached to DataParallel, whose copies live for one pass"
    ):
        unwrap(nn.DataParallel(network()))


# -- refusals ----------------------------------------------------------------------------------------------------


def test_a_block_that_is_not_there():
    net = network()
    with pytest.raises(rp.UsageError) as caught, attach(net, GradientNorms(blocks=["stage9"])):
        pass
    assert str(caught.value) == (
        "blocks (='stage9') is no module of the network; its modules have names like 'stem', 'stem.conv', 'stem.norm'"
    )
    assert hook_count(net) == 0


def test_a_block_whose_output_is_no_tensor():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    net = nn.Sequential(nn.Linear(2, 2), Two())
    with pytest.raises(rp.UsageError) as caught, attach(net, GradientNorms(blocks=["1"])):
        net(torch.ones(1, 2))
    assert str(caught.value) == (
        "gradient-norms cannot measure block '1' (Two): its output is a tuple, not a tensor; name other modules by `blocks=`"
    )
    assert hook_count(net) == 0


def test_sparse_gradients():
    net = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    with (
        pytest.raises(
            rp.UsageError, match=r"^gradient-norms cannot measure '0.weight': its gradient is torch.sparse_coo"
        ),
        attach(net, "gradient-norms"),
    ):
        net(torch.tensor([1])).sum().backward()
    assert hook_count(net) == 0


def test_weights_without_a_shape():
    net = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(rp.UsageError) as caught, attach(net, "gradient-norms"):
        pass
    assert str(caught.value) == (
        "gradient-norms cannot measure '0': its weights have no shape yet; run a forward pass first"
    )


def test_a_network_that_gives_a_dictionary():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return {"out": [self.fc(x)], "size": 2}

    net = Named()
    with attach(net, "gradient-norms") as probe:
        net(torch.ones(1, 2))["out"][0].sum().backward()
    assert layers_of(probe.table()) == pytest.approx({"fc": 2.0})


# -- the range of float32 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e20])
@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 1, 64, 64)], ids=["small", "large"])
def test_vanished_and_exploded_gradients_keep_their_norms(shape, scale):
    """Squares below 1e-38 are zero in float32, and above 1e38 infinite, long before the gradients are."""
    random = torch.Generator().manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU())
    with attach(net, GradientNorms(blocks=["1"])) as probe:
        output = net(torch.rand(shape, generator=random))
        given_back = scale * torch.randn(output.shape, generator=random)
        output.backward(given_back)
    (layer,), (block,) = layers_of(probe.table()).values(), blocks_of(probe.table()).values()
    assert layer == pytest.approx(net[0].weight.grad.double().norm().item(), rel=1e-5, abs=0)
    assert block == pytest.approx(given_back.double().norm().item(), rel=1e-5, abs=0)


def test_gradients_that_are_zero_have_no_norm():
    net, (images, labels) = network(), batch()
    with attach(net, "gradient-norms") as probe:
        (0 * loss_of(net, images, labels)).backward()
    assert set(layers_of(probe.table()).values()) == set(blocks_of(probe.table()).values()) == {0.0}


# -- what else a network may be ----------------------------------------------------------------------------------


def test_several_backward_passes_through_one_forward_pass():
    """The gradients add up, which norms do not: the weights' are measured, the blocks' are not."""
    net, (images, labels) = network().eval(), batch()
    with attach(net, "gradient-norms") as probe:
        loss = loss_of(net, images, labels)
        loss.backward(retain_graph=True)
        loss.backward()
    layers, _ = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx({name: 2 * norm for name, norm in layers.items()}, rel=1e-4)
    assert all(math.isnan(norm) for norm in blocks_of(probe.table()).values())


def test_a_deep_copy_is_not_measured():
    net, (images, labels) = network().eval(), batch()
    with attach(net, "gradient-norms") as probe:
        loss_of(net, images, labels).backward()
        loss_of(copy.deepcopy(net), 10 * images, labels).backward()
    layers, blocks = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx(layers, rel=1e-5)
    assert blocks_of(probe.table()) == pytest.approx(blocks, rel=1e-5)


def test_an_output_without_tensors_to_be_seen():
    @dataclasses.dataclass
    class Answer:
        logits: Tensor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Answer:
            return Answer(self.inner(x))

    net = Net()
    with attach(net, "gradient-norms") as probe:
        net(torch.ones(2, 4))
        assert probe.table().empty, "there was no backward pass"
        net(torch.ones(2, 4)).logits.square().sum().backward()
        assert len(probe.table()) == len(probe.table()) == 1
    assert layers_of(probe.table()) == pytest.approx({"inner": net.inner.weight.grad.norm().item()})


def test_weights_that_go_by_other_names():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    prune.l1_unstructured(net[0], "weight", 0.5)
    nn.utils.spectral_norm(net[2])
    with attach(net, "gradient-norms") as probe:
        net(torch.ones(2, 1, 8, 8)).square().sum().backward()
    own = {"0.weight_orig": net[0].weight_orig, "2.weight_orig": net[2].weight_orig}
    assert layers_of(probe.table()) == pytest.approx({name: each.grad.norm().item() for name, each in own.items()})
    assert set(probe.table().kind) == {"conv"}


def test_parameters_that_are_replaced_are_found():
    net, (images, labels) = network().eval(), batch()
    other = {name: tensor.clone() for name, tensor in network("cifar/resnet", seed=3).state_dict().items()}
    with attach(net, "gradient-norms") as probe:
        net.load_state_dict(other, assign=True)
        net.requires_grad_()
        loss_of(net, images, labels).backward()
    layers, _ = twin(net, images, labels)
    assert layers_of(probe.table()) == pytest.approx(layers, rel=1e-5)


def test_complex_weights():
    net = nn.Linear(3, 2, bias=False, dtype=torch.complex64)
    with attach(net, "gradient-norms") as probe:
        net(torch.ones(1, 3, dtype=torch.complex64)).abs().sum().backward()
    assert layers_of(probe.table()) == pytest.approx({"": net.weight.grad.norm().item()})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_code_is_refused_by_name():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), torch.jit.script(nn.ReLU()))
    with pytest.raises(rp.UsageError, match=r"^gradient-norms cannot measure '1' .*before scripting$"):
        GradientNorms().attach(net)
    assert hook_count(net) == 0


def test_one_name_is_no_list_of_names():
    with pytest.raises(rp.UsageError, match=r"^blocks \(='stage1'\) must be a list of names or classes"):
        GradientNorms(blocks="stage1")


def readings(scale: float) -> pandas.DataFrame:
    torch.manual_seed(0)
    net = rp.build("cifar/resnet-8", width=4).train()
    with rp.attach(net, "gradient-norms") as probe:
        (scale * net(torch.randn(4, 3, 32, 32)).square().mean()).backward()
        for parameter in net.parameters():
            parameter.grad /= scale  # as `unscale_` does
        probe.read(scale=scale)
    return probe.table()


def test_what_a_loss_was_scaled_by_is_divided_out():
    pandas.testing.assert_frame_equal(readings(1024.0), readings(1.0), rtol=1e-5)


def test_a_probe_does_not_keep_the_network():
    net = rp.build("cifar/resnet-8", width=4)
    with rp.attach(net, "gradient-norms") as probe:
        net(torch.randn(2, 3, 32, 32)).sum().backward()
    gone = weakref.ref(net.stage1[0])
    del net
    gc.collect()
    assert gone() is None and len(probe.table())


def test_a_network_without_data_is_refused():
    with torch.device("meta"):
        net = rp.build("cifar/resnet-8")
    probe = GradientNorms()
    with pytest.raises(
        rp.UsageError, match=r"^gradient-norms cannot measure 'stem.conv': it is on device 'meta' and has no"
    ):
        probe.attach(net)
