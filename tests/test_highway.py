"""The example plugin: a highway block is T·H + (1 − T)·x, and begins by carrying."""

import torch

import resprobe as rp
from plugins.highway import CARRY_BIAS


def block(in_channels: int = 4, width: int = 4, stride: int = 1) -> rp.Block:
    return rp.BLOCKS["basic"](in_channels, width, stride, shortcut="highway").eval()


def test_it_is_found_as_an_installed_plugin():
    assert "highway" in rp.SHORTCUTS.names()


def test_the_block_is_the_highway_formula():
    made = block()
    x = torch.randn(2, 4, 6, 6)
    gate = torch.sigmoid(torch.nn.functional.conv2d(x, made.shortcut.gate.conv.weight, made.shortcut.gate.conv.bias))
    transformed = made.branch.branch(x)
    expected = torch.relu(gate * transformed + (1 - gate) * x)
    torch.testing.assert_close(made(x), expected)


def test_where_the_shape_changes_option_a_is_carried():
    made = block(4, 8, stride=2)
    x = torch.randn(2, 4, 6, 6)
    carried = rp.SHORTCUTS["A"](4, 8, 2, rp.Layers())(x)
    gate = made.shortcut.gate(x)
    torch.testing.assert_close(made.shortcut(x), (1 - gate) * carried)
    assert made(x).shape == (2, 8, 3, 3)


def test_a_new_network_carries():
    network = rp.build("cifar/resnet-8", shortcut="highway")
    for _, made in network.blocks():
        assert torch.all(made.shortcut.gate.conv.bias == CARRY_BIAS)


def test_branch_and_shortcut_share_one_gate():
    made = block()
    assert made.branch.gate.conv.weight is made.shortcut.gate.conv.weight
    names = [name for name, _ in made.named_parameters()]
    assert sum("gate" in name for name in names) == 2  # one weight, one bias
    loss = made(torch.randn(2, 4, 6, 6)).sum()
    loss.backward()
    assert made.shortcut.gate.conv.bias.grad.abs().sum() > 0


def test_a_trained_highway_network_is_read_back(tmp_path):
    recipe = rp.default_recipe(rp.load_data("digits"), 4)
    spec = rp.networks.resolve("cifar/resnet-8", shortcut="highway", width=4, in_channels=1)
    run = rp.train(spec, "digits", recipe, runs=tmp_path, progress=False)
    again = rp.train(spec, "digits", recipe, runs=tmp_path, progress=False)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(run.network.eval()(x), again.network(x))
    for name, tensor in run.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])
    assert again._network is not run.network
