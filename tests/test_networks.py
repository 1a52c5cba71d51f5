"""Networks: the paper's counts to the last digit, names and options, twins, and what a stranger registers."""

import dataclasses
import json
import math
import time

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resprobe as rp
from resprobe.shortcuts import projection

DEPTHS = (20, 32, 44, 56, 110, 1202)
# Multiply-adds of convolutions and fully connected layers for one image; parameters with normalization's.
CIFAR = {
    "A": {
        20: (269_722, 40_551_040),
        32: (464_154, 68_862_592),
        44: (658_586, 97_174_144),
        56: (853_018, 125_485_696),
        110: (1_727_962, 252_887_680),
        1202: (19_421_274, 2_829_238_912),
    },
    "B": {
        20: (272_474, 40_813_184),
        32: (466_906, 69_124_736),
        44: (661_338, 97_436_288),
        56: (855_770, 125_747_840),
        110: (1_730_714, 253_149_824),
        1202: (19_424_026, 2_829_501_056),
    },
    "C": {
        20: (283_962, 42_648_192),
        32: (489_594, 72_532_608),
        44: (695_226, 102_417_024),
        56: (900_858, 132_301_440),
        110: (1_826_202, 266_781_312),
        1202: (20_538_714, 2_986_263_168),
    },
}
CIFAR_CASES = [(depth, option, *counts) for option, rows in CIFAR.items() for depth, counts in rows.items()]
IMAGENET = {
    "A": {
        18: (11_515_688, "1.795"),
        34: (21_623_848, "3.644"),
        50: (22_780_456, "3.498"),
        101: (41_772_584, "7.211"),
        152: (57_416_232, "10.923"),
    },
    "B": {
        18: (11_689_512, "1.814"),
        34: (21_797_672, "3.664"),
        50: (25_557_032, "3.858"),
        101: (44_549_160, "7.570"),
        152: (60_192_808, "11.282"),
    },
    "C": {
        18: (12_043_816, "1.878"),
        34: (22_716_840, "3.831"),
        50: (40_128_552, "6.324"),
        101: (76_981_288, "13.530"),
        152: (107_335_720, "20.736"),
    },
}
IMAGENET_CASES = [(depth, option, *counts) for option, rows in IMAGENET.items() for depth, counts in rows.items()]


def weightless(network: str, **options) -> rp.Network:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return rp.build(network, **options)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: nn.Module, size: int) -> int:
    """Multiply-adds as torch's own counter sees them: it counts two operations for each."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def giga(count: int) -> str:
    return f"{count / 1e9:.3f}"


def cifar_closed_form(depth: int, option: str, width: int = 16, classes: int = 10) -> tuple[int, int]:
    """Parameters and multiply-adds of §4.2's networks, from a list of their convolutions (in, out, kernel, side)."""
    n = (depth - 2) // 6
    convolutions = [(3, width, 3, 32)]
    for stage in range(3):
        wide, side = width << stage, 32 >> stage
        entering = wide if stage == 0 else wide // 2
        convolutions += [(entering, wide, 3, side)] + [(wide, wide, 3, side)] * (2 * n - 1)
        if option == "C" or (option == "B" and entering != wide):
            convolutions.append((entering, wide, 1, side))
        if option == "C":
            convolutions += [(wide, wide, 1, side)] * (n - 1)
    weights = [(before * after * kernel**2, after, side) for before, after, kernel, side in convolutions]
    last = 4 * width * classes
    return (
        sum(count + 2 * after for count, after, _ in weights) + last + classes,
        sum(count * side**2 for count, _, side in weights) + last,
    )


class TestCounts:
    @pytest.mark.parametrize(("depth", "option", "expected_parameters", "expected_macs"), CIFAR_CASES)
    def test_cifar(self, depth, option, expected_parameters, expected_macs):
        network = weightless(f"cifar/resnet-{depth}", shortcut=option)
        assert (parameters(network), macs(network, 32)) == (expected_parameters, expected_macs)

    @pytest.mark.parametrize(("depth", "option", "expected_parameters", "expected_macs"), CIFAR_CASES)
    def test_cifar_table_is_the_closed_form(self, depth, option, expected_parameters, expected_macs):
        assert cifar_closed_form(depth, option) == (expected_parameters, expected_macs)

    @pytest.mark.parametrize("depth", DEPTHS[:-1])
    def test_cifar_plain_is_option_a(self, depth):
        network = weightless(f"cifar/plain-{depth}")
        assert (parameters(network), macs(network, 32)) == CIFAR["A"][depth]

    @pytest.mark.parametrize(
        ("depth", "table_6"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7"), (1202, "19.4")]
    )
    def test_cifar_rounds_to_table_6(self, depth, table_6):
        digits = len(table_6.partition(".")[2])
        assert f"{CIFAR['A'][depth][0] / 1e6:.{digits}f}" == table_6

    @settings(max_examples=15)
    @given(st.integers(1, 6), st.integers(1, 40), st.sampled_from("ABC"), st.integers(1, 100))
    def test_any_cifar_network_is_the_closed_form(self, n, width, option, classes):
        network = weightless(f"cifar/resnet-{6 * n + 2}", shortcut=option, width=width, num_classes=classes)
        expected = cifar_closed_form(6 * n + 2, option, width, classes)
        assert (parameters(network), macs(network, 32)) == expected

    @pytest.mark.parametrize(("depth", "option", "expected_parameters", "expected_gmacs"), IMAGENET_CASES)
    def test_imagenet(self, depth, option, expected_parameters, expected_gmacs):
        network = weightless(f"imagenet/resnet-{depth}", shortcut=option)
        assert (parameters(network), giga(macs(network, 224))) == (expected_parameters, expected_gmacs)

    @pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
    def test_imagenet_plain_is_option_a(self, depth):
        network = weightless(f"imagenet/plain-{depth}")
        assert (parameters(network), giga(macs(network, 224))) == IMAGENET["A"][depth]

    @pytest.mark.parametrize(("depth", "gmacs"), [(50, "4.089"), (101, "7.801"), (152, "11.514")])
    def test_imagenet_with_the_stride_in_the_3x3(self, depth, gmacs):
        network = weightless(f"imagenet/resnet-{depth}", stride_in="3x3")
        assert (parameters(network), giga(macs(network, 224))) == (IMAGENET["B"][depth][0], gmacs)

    @pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
    def test_option_b_has_as_many_parameters_as_torchvisions(self, depth):
        with torch.device("meta"):
            theirs = getattr(torchvision.models, f"resnet{depth}")()
        assert parameters(weightless(f"imagenet/resnet-{depth}", shortcut="B")) == parameters(theirs)

    @pytest.mark.parametrize(("depth", "gmacs"), [(16, "15.470"), (19, "19.632")])
    def test_vgg(self, depth, gmacs):
        with torch.device("meta"):
            theirs = getattr(torchvision.models, f"vgg{depth}")()
        network = weightless(f"imagenet/vgg-{depth}")
        assert parameters(network) == parameters(theirs)
        assert giga(macs(network, 224)) == gmacs

    def test_vgg_16_convolutions_alone(self):
        network = weightless("imagenet/vgg-16")
        fully_connected = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
        assert giga(macs(network, 224) - fully_connected) == "15.347"

    def test_a_bottlenecks_projection(self):
        conv, _ = projection(256, 256, 1, rp.Layers())
        assert conv.weight.numel() == 65_536

    def test_option_c_adds_13_projections_to_resnet_34(self):
        def projections(option: str) -> int:
            blocks = weightless("imagenet/resnet-34", shortcut=option).blocks()
            return sum(isinstance(block.shortcut, nn.Sequential) for _, block in blocks)

        assert len(weightless("imagenet/resnet-34").blocks()) == 16
        assert (projections("A"), projections("B"), projections("C")) == (0, 3, 3 + 13)

    def test_resnet_101_has_91_convolutions_below_stage_4(self):
        network = weightless("imagenet/resnet-101")
        shared = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        assert len([name for name in shared if "shortcut" not in name and "stage4" not in name]) == 91

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("cifar/resnet-20", {}),
            ("cifar/resnet-11", {"block": "bottleneck"}),
            ("cifar/resnet-8", {"block": "single", "shortcut": "C"}),
            ("cifar/plain-44", {}),
            ("imagenet/resnet-18", {"shortcut": "C"}),
            ("imagenet/resnet-101", {}),
            ("imagenet/plain-152", {}),
            ("imagenet/vgg-16", {"norm": "batch"}),
            ("imagenet/vgg-19", {}),
        ],
    )
    def test_depth_is_the_weighted_layers_of_the_longest_path(self, name, options):
        network = weightless(name, **options)
        weighted = [
            path
            for path, module in network.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and ".shortcut." not in path
        ]
        assert network.depth == len(weighted) == int(name.rpartition("-")[2])

    @settings(max_examples=15)
    @given(st.sampled_from(["basic", "bottleneck", "single"]), st.integers(1, 4), st.integers(1, 24), st.integers(1, 4))
    def test_plain_and_option_a_have_equal_parameters(self, block, n, width, in_channels):
        depth = 3 * n * rp.BLOCKS[block].weighted_layers + 2
        options = {"block": block, "width": width, "in_channels": in_channels}
        plain, residual = (weightless(f"cifar/{kind}-{depth}", **options) for kind in ("plain", "resnet"))
        assert parameters(plain) == parameters(residual)
        assert len(plain.blocks()) == len(residual.blocks()) == 3 * n


class TestBuilding:
    def test_1202_layers_take_less_than_5_seconds(self):
        start = time.process_time()
        assert rp.build("cifar/resnet-1202").depth == 1202
        assert time.process_time() - start < 5

    @pytest.mark.parametrize("name", ["cifar/{}-20", "imagenet/{}-18"])
    def test_twins_start_from_the_same_weights_under_the_same_seed(self, name):
        twins = []
        for kind in ("plain", "resnet"):
            torch.manual_seed(3)
            twins.append(rp.build(name.format(kind), width=8))
        plain, residual = (twin.state_dict() for twin in twins)
        assert list(plain) == list(residual)
        for key, value in plain.items():
            assert torch.equal(value, residual[key]), key
        torch.manual_seed(4)
        assert not torch.equal(rp.build(name.format("plain"), width=8).stem.conv.weight, plain["stem.conv.weight"])

    @pytest.mark.parametrize(
        ("name", "shortcut", "block"),
        [
            ("cifar/resnet-20", "A", "basic"),
            ("imagenet/resnet-18", "A", "basic"),
            ("imagenet/resnet-34", "A", "basic"),
            ("imagenet/resnet-50", "B", "bottleneck"),
            ("imagenet/resnet-101", "B", "bottleneck"),
            ("imagenet/resnet-152", "B", "bottleneck"),
        ],
    )
    def test_defaults_are_the_papers(self, name, shortcut, block):
        spec = weightless(name).spec
        assert (spec["shortcut"], spec["block"], spec["norm"], spec["init"], spec["stride_in"]) == (
            shortcut,
            block,
            "batch",
            "he",
            "1x1",
        )

    @pytest.mark.parametrize(
        ("name", "options", "size"),
        [
            ("cifar/resnet-8", {"in_channels": 1, "num_classes": 7, "width": 4}, 8),
            ("cifar/resnet-8", {"norm": "group", "width": 8}, 33),
            ("cifar/plain-11", {"block": "bottleneck", "norm": "none", "width": 4}, 32),
            ("cifar/resnet-8", {"shortcut": "highway", "width": 4}, 9),
            ("imagenet/resnet-50", {"width": 4, "num_classes": 3}, 64),
        ],
    )
    def test_any_size_gives_one_score_a_class(self, name, options, size):
        if options.get("shortcut", "A") not in rp.SHORTCUTS:
            pytest.skip("the highway plugin is not installed")
        network = rp.build(name, **options).eval()
        scores = network(torch.randn(2, network.spec["in_channels"], size, size))
        assert scores.shape == (2, network.spec["num_classes"])
        assert scores.isfinite().all()

    def test_blocks_come_in_forward_order_with_their_names(self):
        names = [name for name, _ in weightless("cifar/resnet-14").blocks()]
        assert names == ["stage1.0", "stage1.1", "stage2.0", "stage2.1", "stage3.0", "stage3.1"]

    @pytest.mark.parametrize(
        ("name", "options", "side"),
        [
            ("cifar/resnet-14", {"shortcut": "C"}, 16),
            ("cifar/resnet-11", {"block": "bottleneck"}, 16),
            ("cifar/plain-14", {"norm": "none"}, 16),
            ("imagenet/resnet-18", {"width": 4}, 64),
            ("imagenet/resnet-50", {"width": 4}, 64),
            ("imagenet/vgg-16", {"width": 2}, 32),
        ],
    )
    def test_nothing_in_place_and_no_module_twice(self, name, options, side):
        network = rp.build(name, **options).train()
        leaves = [(path, module) for path, module in network.named_modules() if not list(module.children())]
        calls, seen = {path: 0 for path, _ in leaves}, []

        def note(path: str):
            def hook(module, inputs, output):
                calls[path] += 1
                seen.extend((path, tensor, tensor._version, tensor.detach().clone()) for tensor in (*inputs, output))

            return hook

        for path, module in leaves:
            module.register_forward_hook(note(path))
        network(torch.randn(2, network.spec["in_channels"], side, side))
        assert set(calls.values()) == {1}, [path for path, count in calls.items() if count != 1]
        changed = [path for path, tensor, version, then in seen if tensor._version != version or not tensor.equal(then)]
        assert changed == []


class TestInitialization:
    @pytest.mark.parametrize(
        ("name", "std"),
        [
            ("he", math.sqrt(2 / (32 * 9))),
            ("he-fan-out", math.sqrt(2 / (64 * 9))),
            ("xavier", math.sqrt(2 / (32 * 9 + 64 * 9))),
            ("small-normal", 0.01),
        ],
    )
    def test_standard_deviation_of_a_convolution(self, name, std):
        torch.manual_seed(0)
        weight = rp.build("cifar/plain-8", width=32, init=name).stage2[0].branch.conv1.weight
        assert weight.shape == (64, 32, 3, 3)
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean().item()) < 0.05 * std
        beyond = (weight.abs() > math.sqrt(3) * std).float().mean().item()  # none of uniform ones
        assert beyond == pytest.approx(0.083, abs=0.01)

    def test_standard_deviation_of_the_last_layer(self):
        torch.manual_seed(0)
        weight = rp.build("cifar/plain-8", num_classes=300).fc.weight
        assert weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.03)

    @pytest.mark.parametrize("norm", ["batch", "none"])
    def test_biases_are_zero_and_exist_only_without_normalization(self, norm):
        network = rp.build("cifar/resnet-8", norm=norm, shortcut="C")
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                assert (module.bias is not None) == (norm == "none"), name
            if getattr(module, "bias", None) is not None:
                assert not module.bias.any(), name
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all(), name

    def test_module_may_initialize_itself_last(self):
        class Sevens(nn.Conv2d):
            def initialize(self):
                nn.init.constant_(self.weight, 7)

        with rp.SHORTCUTS.temporary("sevens", lambda a, b, stride, layers: Sevens(a, b, 1, stride)):
            network = rp.build("cifar/resnet-8", shortcut="sevens")
        for _, block in network.blocks():
            assert (block.shortcut.weight == 7).all()
            assert not (block.branch.conv1.weight == 7).any()


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "block": st.sampled_from(["basic", "bottleneck", "single"]),
        "shortcut": st.sampled_from(["none", "A", "A-centred", "B", "C"]),
        "width": st.integers(1, 8),
        "num_classes": st.integers(1, 9),
        "in_channels": st.integers(1, 4),
        "norm": st.sampled_from(["batch", "none", "group"]),
        "init": st.sampled_from(["he", "he-fan-out", "xavier", "small-normal"]),
        "stride_in": st.sampled_from(["1x1", "3x3"]),
    },
)


class TestSpec:
    @settings(max_examples=15)
    @given(st.integers(1, 3), OPTIONS)
    def test_rebuilds_the_network_after_any_way_through_json(self, n, options):
        depth = 3 * n * rp.BLOCKS[options.get("block", "basic")].weighted_layers + 2
        network = weightless(f"cifar/resnet-{depth}", **options)
        spec = network.spec
        plain_json = rp.NetworkSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))
        assert rp.NetworkSpec.from_json(spec.to_json()) == plain_json == spec
        assert hash(plain_json) == hash(spec)
        with torch.device("meta"):
            again = rp.build(plain_json)
        assert again.spec == spec
        assert str(again) == str(network)
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        assert {name: value.shape for name, value in again.state_dict().items()} == shapes
        for option, value in options.items():
            assert spec[option] == value

    def test_is_complete_and_readable(self):
        spec = weightless("cifar/resnet-20", width=8).spec
        assert str(spec) == (
            "cifar/resnet-20 (block=basic, in_channels=3, init=he, norm=batch, num_classes=10, shortcut=A, "
            "stride_in=1x1, width=8)"
        )
        assert (spec.family, spec.depth, spec.name) == ("cifar/resnet", 20, "cifar/resnet-20")
        assert "\n" not in spec.to_json()

    def test_is_frozen(self):
        spec = weightless("cifar/resnet-20").spec
        with pytest.raises(dataclasses.FrozenInstanceError):
            spec.depth = 32

    def test_order_of_options_does_not_matter(self):
        one = rp.NetworkSpec("f", 1, (("b", 2), ("a", 1)))
        assert one == rp.NetworkSpec("f", 1, {"a": 1, "b": 2}) == rp.NetworkSpec("f", 1, [["a", 1], ["b", 2]])
        assert one.options == (("a", 1), ("b", 2))

    def test_missing_option_has_a_default(self):
        spec = weightless("imagenet/vgg-16").spec
        assert spec.get("shortcut") is None
        assert spec.get("shortcut", "none") == "none"
        with pytest.raises(KeyError, match="shortcut"):
            spec["shortcut"]

    def test_options_replace_those_of_a_spec(self):
        spec = weightless("cifar/resnet-20", width=8).spec
        with torch.device("meta"):
            changed = rp.build(spec, shortcut="B").spec
        assert (changed["shortcut"], changed["width"], changed.depth) == ("B", 8, 20)


@settings(max_examples=25)
@given(st.sampled_from(["basic", "bottleneck", "single"]), st.integers(0, 60))
def test_depths_of_a_block_and_no_others_are_accepted(block, depth):
    per_n = 3 * rp.BLOCKS[block].weighted_layers
    options = {"block": block, "width": 1}
    if depth > 2 and (depth - 2) % per_n == 0:
        assert weightless(f"cifar/resnet-{depth}", **options).depth == depth
        return
    with pytest.raises(rp.UsageError) as error:
        weightless(f"cifar/resnet-{depth}", **options)
    start = f"depth (={depth}) must be {per_n}n+2 with block {block!r}; "
    assert str(error.value).startswith(start)
    proposed = [int(word) for word in str(error.value).removeprefix(start).split() if word.isdecimal()]
    if depth < per_n + 2:
        assert proposed == [per_n + 2]
    else:
        assert proposed[0] < depth < proposed[1] == proposed[0] + per_n
    for neighbour in proposed:
        assert weightless(f"cifar/resnet-{neighbour}", **options).depth == neighbour


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("cifar/resnet-21", {}, "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26"),
        ("cifar/plain-21", {}, "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26"),
        ("cifar/resnet-7", {}, "depth (=7) must be 6n+2 with block 'basic'; the smallest is 8"),
        (
            "cifar/resnet-20",
            {"block": "bottlenek"},
            "block (='bottlenek') is unknown; accepted: basic, bottleneck, single, single-linear; nearest: bottleneck",
        ),
        ("cifar/resnet-many", {}, "depth (='many') of network 'cifar/resnet-many' must be a whole number"),
        ("cifar/resnet-2.5", {}, "depth (='2.5') of network 'cifar/resnet-2.5' must be a whole number"),
        ("cifar/resnet", {}, "network (='cifar/resnet') needs a depth: cifar/resnet-DEPTH"),
        ("imagenet/vgg", {}, "network (='imagenet/vgg') needs a depth: imagenet/vgg-DEPTH"),
        (
            "imagenet/resnet-35",
            {},
            "depth (=35) of ImageNet networks must be one of 18, 34, 50, 101, 152",
        ),
        (
            "imagenet/resnet-34",
            {"block": "bottleneck"},
            "depth (=34) of ImageNet networks must be one of 18, 34, 50, 101, 152; with block 'bottleneck': 50, 101, 152",
        ),
        (
            "imagenet/resnet-50",
            {"block": "basic"},
            "depth (=50) of ImageNet networks must be one of 18, 34, 50, 101, 152; with block 'basic': 18, 34",
        ),
        (
            "imagenet/resnet-18",
            {"block": "single"},
            "block (='single') has 1 weighted layers; Table 1 has 2 or 3 a block",
        ),
        ("imagenet/vgg-17", {}, "depth (=17) of imagenet/vgg must be one of 16, 19; nearest: 16"),
        ("imagenet/vgg-50", {}, "depth (=50) of imagenet/vgg must be one of 16, 19; nearest: 19"),
        ("cifar/resnet-20", {"width": 0}, "width (=0) must be a whole number ≥ 1"),
        ("cifar/resnet-20", {"width": 2.5}, "width (=2.5) must be a whole number ≥ 1"),
        ("cifar/resnet-20", {"num_classes": "10"}, "num_classes (='10') must be a whole number ≥ 1"),
        ("cifar/resnet-20", {"in_channels": -3}, "in_channels (=-3) must be a whole number ≥ 1"),
        (
            "imagenet/resnet-50",
            {"stride_in": "5x5"},
            "stride_in (='5x5') is unknown; accepted: 1x1, 3x3",
        ),
        (
            "cifar/resnet-20",
            {"norm": "bach"},
            "norm (='bach') is unknown; accepted: batch, group, none; nearest: batch",
        ),
        (
            "cifar/resnet-20",
            {"init": "He2"},
            "init (='He2') is unknown; accepted: he, he-fan-out, small-normal, xavier; nearest: he",
        ),
        (
            "cifar/resnet-20",
            {"witdh": 8},
            "option of cifar/resnet (='witdh') is unknown; accepted: block, shortcut, width, num_classes, in_channels, "
            "norm, init, stride_in; nearest: width",
        ),
        (
            "cifar/plain-20",
            {"shortcut": "A"},
            "option of cifar/plain (='shortcut') is unknown; accepted: block, width, num_classes, in_channels, norm, "
            "init, stride_in",
        ),
        (20, {}, "network (=20) must be a name such as 'cifar/resnet-20' or a NetworkSpec"),
    ],
)
def test_unusable_requests_are_refused_in_one_line(name, options, text):
    with pytest.raises(rp.UsageError) as error:
        weightless(name, **options)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cifar/resnets-20", "cifar/resnet"), ("cifr/plain-20", "cifar/plain"), ("imagenet/vg", "imagenet/vgg")],
)
def test_unknown_family_gets_the_nearest_one(name, nearest):
    with pytest.raises(rp.UsageError) as error:
        rp.build(name)
    family = name.removesuffix("-20")
    assert str(error.value) == (
        f"network (={family!r}) is unknown; accepted: {', '.join(rp.NETWORKS.names())}; nearest: {nearest}"
    )


def test_unknown_shortcut_lists_those_of_plugins_too():
    with pytest.raises(rp.UsageError) as error:
        rp.build("cifar/resnet-20", shortcut="D")
    assert str(error.value).startswith(f"shortcut (='D') is unknown; accepted: {', '.join(rp.SHORTCUTS.names())}; ")


@pytest.mark.usefixtures("clean_registries")
class TestStrangersNetwork:
    def test_with_depth_and_defaults_by_depth(self):
        @rp.register_network("mine/tower", defaults=lambda depth: {"width": 2 * depth})
        def tower(depth, *, width=None, num_classes=10):
            layers = [nn.Conv2d(3 if index == 0 else width, width, 3) for index in range(depth - 1)]
            return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

        network = rp.build("mine/tower-4", num_classes=5)
        assert isinstance(network, rp.Network)
        assert (network.depth, network.spec["width"], network.spec["num_classes"]) == (4, 8, 5)
        assert network(torch.zeros(1, 3, 9, 9)).shape == (1, 5)
        assert rp.build(network.spec).spec == network.spec
        assert rp.build("mine/tower-4", width=3).spec["width"] == 3
        with pytest.raises(rp.UsageError, match=r"network \(='mine/tower'\) needs a depth: mine/tower-DEPTH$"):
            rp.build("mine/tower")

    @pytest.mark.parametrize("name", ["flat", "my-flat", "my-flat-2"])
    def test_without_depth(self, name):
        @rp.register_network(name)
        def flat(*, hidden=6):
            return nn.Sequential(nn.Flatten(), nn.Linear(12, hidden), nn.Linear(hidden, 2))

        network = rp.build(name, hidden=4)
        assert network.depth is None
        assert (network.spec.name, network.spec["hidden"]) == (name, 4)
        assert network(torch.zeros(1, 3, 2, 2)).shape == (1, 2)
        assert rp.build(rp.NetworkSpec.from_json(network.spec.to_json())).spec == network.spec
        with pytest.raises(rp.UsageError) as error:
            rp.build(f"{name}-20")
        assert str(error.value) == f"network (='{name}-20') takes no depth: {name}"

    def test_function_with_further_keywords(self):
        rp.register_network("tv/resnet18")(torchvision.models.resnet18)
        network = weightless("tv/resnet18")
        assert parameters(network) == 11_689_512
        assert dict(network.spec.options) == {"weights": None, "progress": True}

    def test_option_without_a_default_must_be_given(self):
        @rp.register_network("needy")
        def needy(*, hidden):
            return nn.Linear(3, hidden)

        assert rp.build("needy", hidden=2).spec["hidden"] == 2
        with pytest.raises(rp.UsageError) as error:
            rp.build("needy")
        assert str(error.value) == "network (='needy') needs a value for its option hidden, which has no default"

    def test_network_of_own_blocks_is_checked(self):
        class Shrinks(rp.Block):
            def make_branch(self, in_channels, width, stride, layers):
                return nn.Conv2d(in_channels, width, 3)

        @rp.register_network("shrinking")
        def shrinking():
            return nn.Sequential(Shrinks(3, 4, shortcut="A"))

        with pytest.raises(rp.UsageError, match=r"^shrinking, body\.0: Shrinks: the branch gives \(2, 4, 2, 2\) but"):
            rp.build("shrinking")


@pytest.mark.parametrize("name", ["cifar/resnet--20", "cifar/plain--20"])
def test_a_negative_depth_is_called_a_depth(name):
    with pytest.raises(rp.UsageError, match=r"^depth \(=-20\) must be 6n\+2 with block 'basic'; the smallest is 8$"):
        rp.build(name)


def test_a_network_where_its_name_is_wanted_gets_one_line():
    with pytest.raises(rp.UsageError, match=r"^network \(=a Network\) must be a name such as 'cifar/resnet-20'"):
        rp.build(rp.build("cifar/resnet-8"))


@pytest.mark.usefixtures("clean_registries")
def test_a_block_that_cannot_be_built_is_named_in_one_line():
    @rp.register_block("unfinished")
    class Unfinished(rp.Block):
        pass

    with pytest.raises(rp.UsageError) as caught:
        rp.build("cifar/resnet-8", block="unfinished")
    assert str(caught.value).startswith("cifar/resnet-8 (block=unfinished, ")
    assert "cannot be built: NotImplementedError: Unfinished must define make_branch(" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("cifar/plain-8", {}, "plain"),
        ("cifar/resnet-8", {}, "residual"),
        ("cifar/resnet-8", {"shortcut": "none"}, "plain"),
        ("imagenet/vgg-16", {}, "VGG"),
    ],
)
def test_kinds_of_networks(name, options, kind):
    assert rp.networks.resolve(name, **options).kind == kind


@pytest.mark.parametrize(
    ("given", "meant"),
    [("cifar/resnet20", "cifar/resnet-20"), ("resnet50", "imagenet/resnet-50"), ("imagnet/vgg16", "imagenet/vgg-16")],
)
def test_a_name_without_its_dash_is_understood(given, meant):
    with pytest.raises(rp.UsageError) as caught:
        rp.build(given)
    assert str(caught.value) == f"network (={given!r}) is unknown; nearest: {meant}"


def test_a_family_is_asked_without_its_weights(clean_registries):
    with pytest.raises(rp.UsageError, match=r"^depth \(=21\) must be 6n\+2"):
        rp.networks.check_family(rp.networks.resolve("cifar/resnet-21"))
    rp.networks.check_family(rp.networks.resolve("cifar/resnet-1202"))

    @rp.register_block("computes")
    class Computes(rp.BLOCKS["basic"]):
        def make_branch(self, in_channels, width, stride, layers):
            self.rates = torch.linspace(0, 1, 3).tolist()  # which a tensor without memory has not
            return super().make_branch(in_channels, width, stride, layers)

    rp.networks.check_family(rp.networks.resolve("cifar/resnet-8", block="computes"))
    rp.build("cifar/resnet-8", block="computes")
