"""Activation checkpointing: the same numbers to the last bit, running statistics moved once, less memory."""

import pytest
import tiny
import torch
from torch import nn

import resprobe as rp
from plugins.gradient_norms import GradientNorms
from resprobe.memory import peak_memory
from resprobe.recompute import recomputing


def deep(**options) -> nn.Module:
    """Five blocks a stage, so that a stage has several segments."""
    torch.manual_seed(0)
    return rp.build("cifar/resnet-32", width=4, in_channels=1, **options)


def trained(net: nn.Module, **changes) -> tuple[dict, list[dict]]:
    with tiny.one_thread():
        training = tiny.training(net, iterations=6, milestones=(4,), **changes)
        training.run()
    return training.network.state_dict(), training.rows


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"shortcut": "C"}, {"shortcut": "highway"}, {"norm": "none"}])
def test_losses_and_weights_are_the_same_to_the_last_bit(precision, options):
    kept, again = (
        trained(deep(**options), precision=precision, recompute=recompute, bn_batch=8) for recompute in (False, True)
    )
    tiny.assert_same(kept[0], again[0])  # running statistics and their counters among them
    tiny.assert_same(kept[1], again[1])


class Noisy(nn.Module):
    """Draws random numbers on the way, as dropout does."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_numbers_are_drawn_alike(device):
    nets = [deep(), deep()]
    for net in nets:
        net.stage2[1].branch.relu1 = Noisy()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        kept, again = (
            trained(net, recompute=recompute, device=torch.device(device))
            for net, recompute in zip(nets, (False, True), strict=True)
        )
    tiny.assert_same(kept[0], again[0])


def test_frozen_normalization_stays_frozen():
    nets = [deep(), deep()]
    results = []
    for net, recompute in zip(nets, (False, True), strict=True):
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        net.train().stage1.eval()
        before = {name: value.clone() for name, value in net.stage1.named_buffers()}
        with recomputing(net) if recompute else torch.enable_grad():
            net(images).square().sum().backward()
        assert all(torch.equal(before[name], value) for name, value in net.stage1.named_buffers())
        results.append([parameter.grad for parameter in net.parameters()])
    tiny.assert_same(*results)


def test_probes_measure_the_same_and_only_once():
    tables = []
    for recompute in (False, True):
        probe = GradientNorms(rp.probes.every(2))
        trained(deep(), recompute=recompute, probes=[probe])
        tables.append(probe.table())
    assert len(tables[0]) > 0
    assert tables[0].equals(tables[1])


def test_the_network_is_as_it_was_after_an_exception():
    net = deep()
    names = set(vars(net.stage1))
    with pytest.raises(ZeroDivisionError), recomputing(net):
        1 / 0  # noqa: B018
    assert set(vars(net.stage1)) == names


def test_a_network_without_stages_is_named():
    with (
        pytest.raises(rp.UsageError, match=r"recompute needs stages .*, and Linear has none"),
        recomputing(nn.Linear(1, 1)),
    ):
        pass


def test_activations_take_less_memory():
    """Counted tensor by tensor: how much of it a process's allocator gives back differs from run to run."""
    net, images = rp.build("cifar/resnet-56"), torch.randn(4, 3, 32, 32)

    def step() -> None:
        net(images).sum().backward()

    step()  # gradients are there from now on
    kept = peak_memory(step)
    with recomputing(net):
        again = peak_memory(step)
    # 27 blocks of some five activations each; cut into segments of three, a third of one stage's is left, and the inputs.
    assert again < 0.45 * kept
