"""Blocks (Fig. 2, Fig. 5): every registered block with every registered shortcut, and blocks that break the promise."""

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import resprobe as rp

OWN_BLOCKS = ("basic", "bottleneck", "single")
# Those of installed plugins are among them: the promise is the same for all.
BLOCKS, SHORTCUTS = rp.BLOCKS.names(), rp.SHORTCUTS.names()
RESIDUAL = tuple(name for name in SHORTCUTS if name != "none")

CHANNELS, WIDTHS, STRIDES, SIZES = st.integers(1, 12), st.integers(1, 8), st.integers(1, 3), st.integers(3, 9)


def made(block: str, shortcut: str, channels: int, width: int, stride: int, **options) -> rp.Block:
    """The block in eval mode with normalizations that do something, or no example where the shortcut refuses it."""
    result, refusal = None, ""
    try:
        result = rp.BLOCKS[block](channels, width, stride, shortcut=shortcut, layers=rp.Layers(**options))
    except rp.UsageError as error:
        refusal = str(error)
    if result is None:
        out_channels = width * rp.BLOCKS[block].expansion
        assert f"in_channels (={channels})" in refusal
        assert f"out_channels (={out_channels})" in refusal
        assert shortcut not in ("none", "B", "C")
        assert out_channels < channels
        assume(False)
    for module in result.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return result.eval()


@given(
    st.sampled_from(BLOCKS),
    st.sampled_from(SHORTCUTS),
    CHANNELS,
    WIDTHS,
    STRIDES,
    SIZES,
    st.sampled_from(["batch", "none", "group"]),
    st.sampled_from(["1x1", "3x3"]),
)
def test_output_shape_is_the_plain_branchs(block, shortcut, channels, width, stride, size, norm, stride_in):
    options = {"norm_name": norm, "stride_in": stride_in}
    residual = made(block, shortcut, channels, width, stride, **options)
    plain = made(block, "none", channels, width, stride, **options)
    x = torch.randn(2, channels, size, size)
    halved = -(-size // stride)
    assert residual(x).shape == plain(x).shape == (2, width * residual.expansion, halved, halved)
    assert residual.out_channels == width * residual.expansion
    residual.check_shapes()


@given(st.sampled_from(BLOCKS), CHANNELS, WIDTHS, STRIDES, SIZES)
def test_plain_block_is_its_activated_branch(block, channels, width, stride, size):
    plain = made(block, "none", channels, width, stride)
    x = torch.randn(2, channels, size, size)
    assert plain.shortcut is None
    assert torch.equal(plain(x), plain.activation(plain.branch(x)))


@given(st.sampled_from(BLOCKS), st.sampled_from(RESIDUAL), CHANNELS, WIDTHS, STRIDES, SIZES)
def test_residual_block_is_its_activated_sum(block, shortcut, channels, width, stride, size):
    residual = made(block, shortcut, channels, width, stride)
    x = torch.randn(2, channels, size, size)
    assert torch.equal(residual(x), residual.activation(residual.branch(x) + residual.shortcut(x)))


@given(st.sampled_from(OWN_BLOCKS), st.sampled_from(RESIDUAL), CHANNELS, WIDTHS, STRIDES, SIZES)
def test_silenced_branch_leaves_the_rectified_shortcut(block, shortcut, channels, width, stride, size):
    residual = made(block, shortcut, channels, width, stride)
    last = [module for module in residual.branch.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    x = torch.randn(2, channels, size, size)
    assert not torch.equal(residual.branch(x), torch.zeros_like(residual.branch(x)))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    assert torch.equal(residual(x), residual.shortcut(x).relu())


@pytest.mark.parametrize(
    ("block", "width", "weights"), [("basic", 64, 73_728), ("bottleneck", 64, 69_632), ("single", 64, 36_864)]
)
def test_convolution_weights_of_figure_5(block, width, weights):
    expansion = rp.BLOCKS[block].expansion
    made = rp.BLOCKS[block](width * expansion, width, shortcut="A")
    assert sum(module.weight.numel() for module in made.modules() if isinstance(module, nn.Conv2d)) == weights


@pytest.mark.parametrize("block", BLOCKS)
def test_weighted_layers_are_the_branchs_convolutions(block):
    branch = rp.BLOCKS[block](8, 4).branch
    weighted = [module for module in branch.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == rp.BLOCKS[block].weighted_layers


@pytest.mark.parametrize(("stride_in", "strides"), [("1x1", [2, 1, 1]), ("3x3", [1, 2, 1])])
def test_bottleneck_strides_where_it_is_told_to(stride_in, strides):
    branch = rp.BLOCKS["bottleneck"](8, 4, 2, layers=rp.Layers(stride_in=stride_in)).branch
    assert [branch.conv1.stride[0], branch.conv2.stride[0], branch.conv3.stride[0]] == strides


def test_shortcut_may_gate_the_branch():
    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    class HalfEach(Half):
        def gate_branch(self, branch):
            return nn.Sequential(branch, Half())

    with rp.SHORTCUTS.temporary("half-each", lambda *shape: HalfEach()):
        gated = made("basic", "half-each", 4, 4, 1)
    ungated = copy.deepcopy(gated)
    ungated.branch, ungated.shortcut = gated.branch[0], nn.Identity()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(2 * gated(x), ungated(x))


class Promise(rp.Block):
    """A block whose branch is given by the test."""

    weighted_layers = 2

    def make_branch(self, in_channels, width, stride, layers):
        raise NotImplementedError


def broken(branch) -> type[rp.Block]:
    return type("Broken", (Promise,), {"make_branch": lambda self, *shape: branch(*shape)})


def channel_short(in_channels, width, stride, layers):
    return layers.conv(in_channels, width - 1, stride=stride)


def one_channel(in_channels, width, stride, layers):
    return layers.conv(in_channels, 1, stride=stride)


def forgets_the_stride(in_channels, width, stride, layers):
    return layers.conv(in_channels, width)


def does_not_run(in_channels, width, stride, layers):
    return layers.conv(in_channels + 1, width, stride=stride)


@pytest.mark.parametrize(
    ("network", "branch", "text"),
    [
        (
            "cifar/resnet-8",
            channel_short,
            "cifar/resnet-8, stage1.0: Broken: the branch gives (2, 15, 4, 4) but the shortcut (2, 16, 4, 4) "
            "for an input of (2, 16, 4, 4); they must be equal",
        ),
        (
            "cifar/resnet-8",
            one_channel,  # would be broadcast in silence
            "cifar/resnet-8, stage1.0: Broken: the branch gives (2, 1, 4, 4) but the shortcut (2, 16, 4, 4) "
            "for an input of (2, 16, 4, 4); they must be equal",
        ),
        (
            "cifar/resnet-8",
            forgets_the_stride,
            "cifar/resnet-8, stage2.0: Broken: the branch gives (2, 32, 8, 8) but the shortcut (2, 32, 4, 4) "
            "for an input of (2, 16, 8, 8); they must be equal",
        ),
        (
            "cifar/plain-8",
            channel_short,
            "cifar/plain-8, stage1.0: Broken turns an input of (2, 16, 4, 4) into (2, 15, 4, 4); "
            "expected (2, 16, 4, 4) (width · expansion = 16 channels, stride 1)",
        ),
        (
            "cifar/plain-8",
            forgets_the_stride,
            "cifar/plain-8, stage2.0: Broken turns an input of (2, 16, 8, 8) into (2, 32, 8, 8); "
            "expected (2, 32, 4, 4) (width · expansion = 32 channels, stride 2)",
        ),
        (
            "imagenet/resnet-18",
            channel_short,
            "imagenet/resnet-18, stage1.0: Broken: the branch gives (2, 63, 4, 4) but the shortcut (2, 64, 4, 4) "
            "for an input of (2, 64, 4, 4); they must be equal",
        ),
    ],
)
def test_wrong_shape_is_refused_by_build_with_both_shapes(network, branch, text):
    with rp.BLOCKS.temporary("broken", broken(branch)), pytest.raises(rp.UsageError) as error:
        rp.build(network, block="broken")
    assert str(error.value) == text


@pytest.mark.parametrize("network", ["cifar/resnet-8", "cifar/plain-8"])
def test_block_that_does_not_run_is_refused_with_its_input_and_cause(network):
    with (
        rp.BLOCKS.temporary("broken", broken(does_not_run)),
        pytest.raises(rp.UsageError) as error,
    ):
        rp.build(network, block="broken")
    text = str(error.value)
    assert text.startswith(
        f"{network}, stage1.0: Broken fails on an input of (2, 16, 4, 4): RuntimeError: Given groups=1"
    )
    assert "\n" not in text
    assert isinstance(error.value.__cause__, RuntimeError)


def test_wrong_shortcut_shape_is_refused_too():
    with (
        rp.SHORTCUTS.temporary("forgetful", lambda *shape: nn.Identity()),
        pytest.raises(rp.UsageError, match=r"branch gives \(2, 32, 4, 4\) but the shortcut \(2, 16, 8, 8\)"),
    ):
        rp.build("cifar/resnet-8", shortcut="forgetful")


def test_shapes_are_checked_on_every_forward():
    block = rp.BLOCKS["basic"](4, 4, shortcut="A")
    block.shortcut = nn.AvgPool2d(2)
    with pytest.raises(rp.UsageError, match=r"gives \(2, 4, 6, 6\) but the shortcut \(2, 4, 3, 3\) for an input of"):
        block(torch.zeros(2, 4, 6, 6))


@pytest.mark.parametrize("training", [True, False])
def test_checking_shapes_leaves_mode_and_statistics_alone(training):
    block = rp.BLOCKS["basic"](4, 4, shortcut="A").train(training)
    before = copy.deepcopy(block.state_dict())
    block.check_shapes()
    assert block.training is training
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_block_without_a_branch_says_what_to_define():
    class Bare(rp.Block):
        pass

    with pytest.raises(NotImplementedError) as error:
        Bare(4, 4)
    assert str(error.value) == "Bare must define make_branch(in_channels, width, stride, layers)"


def test_make_branch_is_called_with_what_it_must_take():
    class Short(rp.Block):
        def make_branch(self, in_channels, width, stride):
            return nn.Identity()

    with pytest.raises(rp.UsageError) as error:
        Short(4, 4)
    assert str(error.value) == (
        "Short: make_branch must take (in_channels, width, stride, layers), and takes (in_channels, width, stride)"
    )


@pytest.mark.parametrize("thing", [nn.ReLU, len, Promise.forward])
def test_only_blocks_are_registered(thing):
    with pytest.raises(rp.UsageError) as error:
        rp.register_block("mine")(thing)
    assert str(error.value) == f"block (='mine') must be a subclass of resprobe.Block, not {thing!r}"


@pytest.mark.parametrize("count", [0, -1, 2.0, None])
def test_weighted_layers_must_be_a_count(count):
    with pytest.raises(rp.UsageError) as error:
        rp.register_block("mine")(type("Mine", (Promise,), {"weighted_layers": count}))
    assert str(error.value) == f"block (='mine'): weighted_layers (={count!r}) must be a whole number ≥ 1"
    assert "mine" not in rp.BLOCKS


def test_a_decorator_without_a_name_is_refused():
    """Else the class would silently be something else, and no block be registered."""
    with pytest.raises(rp.UsageError, match=r'^block Nameless needs a name: @rp.register_…\("my-block"\) in'):

        @rp.register_block
        class Nameless(rp.Block):
            weighted_layers = 2


def test_a_branch_of_other_depth_than_it_says_is_told(clean_registries):
    @rp.register_block("deeper-than-it-says")
    class Deeper(rp.Block):
        weighted_layers = 2

        def make_branch(self, in_channels, width, stride, layers):
            middle = [layers.conv(width, width), layers.norm(width), torch.nn.ReLU(), layers.conv(width, width)]
            return torch.nn.Sequential(layers.conv(in_channels, width, stride=stride), *middle)

    said = "^Deeper: weighted_layers = 2, but its branch has 3; depths are counted by what it says$"
    with pytest.warns(UserWarning, match=said) as told:
        rp.build("cifar/resnet-8", block="deeper-than-it-says")
    assert len(told) == 1, "once, however many such blocks are built"
    rp.build("cifar/resnet-14", block="deeper-than-it-says")  # a warning would be an error here


@pytest.mark.parametrize("inplace", [True, False])
def test_a_block_that_spoils_its_own_gradients_is_refused(inplace, clean_registries):
    @rp.register_block("spoils")
    class Spoils(rp.Block):
        weighted_layers = 2

        def make_branch(self, in_channels, width, stride, layers):
            squashed = torch.nn.Sequential(layers.conv(in_channels, width, stride=stride), torch.nn.Sigmoid())
            return torch.nn.Sequential(squashed, torch.nn.ELU(inplace=inplace), layers.conv(width, width))

    if not inplace:
        rp.build("cifar/resnet-8", block="spoils")
        return
    with pytest.raises(rp.UsageError) as caught:
        rp.build("cifar/resnet-8", block="spoils")
    assert str(caught.value) == "cifar/resnet-8, stage1.0: Spoils fails when it is trained: branch.1 works in place"


@pytest.mark.parametrize("shortcut", ["A", "none"])
def test_a_block_that_changes_what_it_is_given_is_refused(shortcut, clean_registries):
    """The shortcut would carry what the branch has left: in silence, where autograd has nothing against it."""

    @rp.register_block("begins-in-place")
    class BeginsInPlace(rp.Block):
        weighted_layers = 2

        def make_branch(self, in_channels, width, stride, layers):
            convolutions = layers.conv(in_channels, width, stride=stride), layers.conv(width, width)
            return torch.nn.Sequential(torch.nn.ReLU(inplace=True), *convolutions)

    with pytest.raises(rp.UsageError) as caught:
        rp.build("cifar/resnet-8", block="begins-in-place", norm="none", shortcut=shortcut)
    assert str(caught.value) == (
        "cifar/resnet-8, stage1.0: BeginsInPlace changes what it is given: branch.0 works in place, and "
        f"{'the shortcut' if shortcut == 'A' else 'what comes before'} needs the same"
    )


def test_trying_a_block_leaves_its_modes_and_the_random_numbers(clean_registries):
    @rp.register_block("half-frozen")
    class HalfFrozen(rp.Block):
        weighted_layers = 1

        def make_branch(self, in_channels, width, stride, layers):
            always = torch.nn.Module()
            always.forward = lambda x: torch.nn.functional.dropout(x, 0.5, training=True)
            return torch.nn.Sequential(
                layers.conv(in_channels, width, stride=stride), layers.norm(width).eval(), always
            )

    with rp.seeded(3):
        network = rp.build("cifar/plain-5", block="half-frozen")
    assert not network.stage1[0].branch[1].training and network.stage1[0].branch[0].training
    with rp.seeded(3):
        other = rp.build("cifar/plain-5", block="single")
    assert torch.equal(network.fc.weight, other.fc.weight)


def test_a_module_that_fails_to_initialize_itself_is_one_line(clean_registries):
    @rp.register_block("not-initialized")
    class NotInitialized(rp.Block):
        weighted_layers = 1

        def make_branch(self, in_channels, width, stride, layers):
            return layers.conv(in_channels, width, stride=stride)

        def initialize(self, weights):
            """Of another meaning."""

    with pytest.raises(
        rp.UsageError, match=r"^cifar/plain-5 \(.*\) cannot be initialized: TypeError: .*missing 1 required"
    ):
        rp.build("cifar/plain-5", block="not-initialized")


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 2 * x

    @staticmethod
    def backward(context, gradient):
        raise TypeError("no gradient for you")


def odd_block(kind):
    class Odd(rp.Block):
        weighted_layers = 1

        def make_branch(self, in_channels, width, stride, layers):
            conv = layers.conv(in_channels, width, stride=stride)
            more = {"dropout": [torch.nn.Sigmoid(), torch.nn.Dropout(0.5), torch.nn.ReLU(inplace=True)]}.get(kind, [])
            return torch.nn.Sequential(conv, *more)

        def forward(self, x):
            if kind == "checkpoint" and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(torch.nn.functional.relu, 1 * self.branch(x), use_reentrant=True)
                return self.activation(x)
            return Doubling.apply(super().forward(x)) if kind == "raises" else super().forward(x)

    return Odd


@pytest.mark.parametrize("kind", ["checkpoint", "dropout"])
def test_blocks_that_train_pass_the_try(kind):
    with rp.BLOCKS.temporary("odd", odd_block(kind)), rp.seeded(3):
        network = rp.build("cifar/plain-5", block="odd", norm="none")
    assert all(parameter.grad is None for parameter in network.parameters())
    with rp.seeded(3):
        other = rp.build("cifar/plain-5", block="single", norm="none")  # of the same layers: trying draws no numbers
    assert all(map(torch.equal, network.parameters(), other.parameters()))


def test_a_backward_that_raises_is_one_line():
    with rp.BLOCKS.temporary("odd", odd_block("raises")), pytest.raises(rp.UsageError) as caught:
        rp.build("cifar/plain-5", block="odd")
    said = "cifar/plain-5, stage1.0: Odd fails when it is trained: TypeError: no gradient for you"
    assert str(caught.value).startswith(said)
