"""Shortcuts (§3.3): what option A keeps, what it costs, and where its gradient goes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import resprobe as rp
from resprobe.shortcuts import ZeroPadding

LAYERS = rp.Layers()
WIDENING = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda pair: (pair[0], pair[0] + pair[1]))
STRIDES, SIZES = st.integers(1, 3), st.integers(1, 9)
LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last])


def images(channels: int, size: int) -> torch.Tensor:
    """No value is zero, so that a zero in the output is padding."""
    return torch.arange(1, 2 * channels * size * size + 1, dtype=torch.float32).view(2, channels, size, size)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@given(WIDENING, STRIDES, SIZES, LAYOUTS)
def test_trailing_zeros_follow_the_subsampled_input(channels, stride, size, layout):
    before, after = channels
    x = images(before, size).to(memory_format=layout)
    out = ZeroPadding(before, after, stride)(x)
    for i in range(0, size, stride):
        for j in range(0, size, stride):
            assert torch.equal(out[:, :before, i // stride, j // stride], x[:, :, i, j])
    assert out.shape == (2, after, -(-size // stride), -(-size // stride))
    assert torch.equal(out[:, before:], torch.zeros_like(out[:, before:]))


@given(WIDENING, STRIDES, SIZES)
def test_centred_zeros_are_the_trailing_ones_up_to_a_permutation(channels, stride, size):
    before, after = channels
    x = images(before, size)
    trailing, centred = ZeroPadding(before, after, stride)(x), ZeroPadding(before, after, stride, centred=True)(x)
    first = (after - before) // 2
    kept = list(range(first, first + before))
    order = kept + [channel for channel in range(after) if channel not in kept]
    assert torch.equal(centred[:, order], trailing)


@given(WIDENING, STRIDES, SIZES, st.booleans(), LAYOUTS)
def test_gradient_reaches_the_kept_positions_only(channels, stride, size, centred, layout):
    x = images(channels[0], size).to(memory_format=layout).requires_grad_()
    ZeroPadding(*channels, stride, centred=centred)(x).sum().backward()
    expected = torch.zeros_like(x)
    expected[:, :, ::stride, ::stride] = 1
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradient_lie_in_memory_as_the_input_does(layout):
    given = []
    x = torch.randn(2, 16, 8, 8).to(memory_format=layout).requires_grad_() * 1
    x.register_hook(given.append)
    out = ZeroPadding(16, 32, 2)(x)
    out.backward(torch.randn(out.shape).to(memory_format=layout))
    assert out.is_contiguous(memory_format=layout)
    assert given[0].is_contiguous(memory_format=layout)


@given(WIDENING, STRIDES)
def test_option_a_has_no_parameters_and_keeps_what_a_strided_projection_sees(channels, stride):
    before, after = channels
    projection = nn.Conv2d(before, after, 1, stride, bias=False)
    nn.init.zeros_(projection.weight)
    with torch.no_grad():
        projection.weight[range(before), range(before)] = 1
    for name in ("A", "A-centred"):
        shortcut = rp.SHORTCUTS[name](before, after, stride, LAYERS)
        assert list(shortcut.parameters()) == []
        assert list(shortcut.buffers()) == []
    x = images(before, 5)
    assert torch.equal(rp.SHORTCUTS["A"](before, after, stride, LAYERS)(x), projection(x))


@given(st.integers(2, 9), st.integers(1, 8), STRIDES, st.sampled_from(["A", "A-centred"]))
def test_option_a_refuses_to_drop_channels(before, fewer, stride, name):
    after = max(1, before - fewer)
    with pytest.raises(rp.UsageError) as error:
        rp.SHORTCUTS[name](before, after, stride, LAYERS)
    assert str(error.value) == (
        f"shortcut 'A' cannot carry in_channels (={before}) into out_channels (={after}): "
        "padding with zeros only adds channels; use shortcut 'B' or 'C'"
    )


@pytest.mark.parametrize("name", ["A", "A-centred", "B"])
def test_same_shape_is_the_identity(name):
    assert type(rp.SHORTCUTS[name](16, 16, 1, LAYERS)) is nn.Identity


@pytest.mark.parametrize("shape", [(16, 32, 1), (16, 16, 2), (16, 32, 2)])
def test_projection_is_a_strided_1x1_convolution_and_normalization(shape):
    before, after, stride = shape
    conv, norm = rp.SHORTCUTS["B"](before, after, stride, LAYERS)
    assert (conv.in_channels, conv.out_channels) == (before, after)
    assert (conv.kernel_size, conv.stride, conv.bias) == ((1, 1), (stride, stride), None)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == after


def test_option_c_projects_the_same_shape_too():
    assert parameters(rp.SHORTCUTS["C"](16, 16, 1, LAYERS)) == 16 * 16 + 2 * 16


def test_projection_without_normalization_carries_a_bias():
    assert parameters(rp.SHORTCUTS["C"](16, 16, 1, rp.Layers("none"))) == 16 * 16 + 16


def test_plain_has_no_shortcut():
    assert rp.SHORTCUTS["none"](16, 32, 2, LAYERS) is None


def test_padding_describes_itself():
    assert ZeroPadding(16, 33, 2, centred=True).extra_repr() == "stride=2, zeros_before=8, zeros_after=9"


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        # What it learns would be in no count, no optimizer and no file.
        (lambda i, o, stride, layers: lambda x: x, "shortcut 'mine' must return a torch.nn.Module, or None, not "),
        (
            lambda i, o: nn.Identity(),
            "shortcut 'mine' must take (in_channels, out_channels, stride, layers), and takes (i, o)",
        ),
        (
            lambda i, o, stride, layers: None,
            "shortcut (='mine') returns none in any block of cifar/resnet-8, which would be a plain network",
        ),
    ],
)
def test_a_shortcut_that_is_none_is_refused(strategy, message):
    with rp.SHORTCUTS.temporary("mine", strategy), pytest.raises(rp.UsageError) as error:
        rp.build("cifar/resnet-8", shortcut="mine")
    assert message in str(error.value)
