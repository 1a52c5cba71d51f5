"""Captured and compiled steps: the same training as operation by operation."""

import contextlib
import gc
import random
import warnings

import numpy
import pytest
import tiny
import torch
from torch import nn

import resprobe as rp
from plugins.gradient_norms import GradientNorms
from resprobe import steps
from resprobe.devices import deterministic
from resprobe.steps import CapturedStep, resolve_step
from resprobe.training import _copy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _alike():
    with tiny.one_thread(), deterministic():  # else the eager step itself need not repeat its last bits
        yield


@pytest.fixture
def captures(monkeypatch):
    """What was captured."""
    works, record = [], steps._record
    monkeypatch.setattr(steps, "_record", lambda work, stream: (record(work, stream), works.append(work))[0])
    return works


def pair(net=tiny.network, **changes):
    """The same training operation by operation, and captured."""
    return [tiny.training(net(), device=CUDA, step=step, **changes) for step in ("eager", "graph")]


def assert_alike(one, other):
    tiny.assert_same(one.network.state_dict(), other.network.state_dict())
    tiny.assert_same(one.rows, other.rows)
    tiny.assert_same(one.state()["optimizer"], other.state()["optimizer"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"iterations": 60, "milestones": (30,)},
        {"iterations": 60, "milestones": (30,), "precision": "bf16"},
        {"augmentation": "pad-crop", "pad": 2},
        {"bn_batch": 8},
        {"momentum_form": "caffe"},
        {"nesterov": True},
        {"momentum": 0.0},
        {"weight_decay_on": "weights"},
        {"warm_up_rate": 0.01, "warm_up_until": 85.0},
    ],
    ids=str,
)
def test_a_captured_training_is_the_same_to_the_last_bit(changes):
    eager, captured = pair(**changes)
    eager.run()
    captured.run()
    assert eager.captured is None and isinstance(captured.captured, CapturedStep)
    assert_alike(eager, captured)


@pytest.mark.gpu
def test_augmentation_is_captured_with_the_step():
    training = tiny.training(device=CUDA, augmentation="pad-crop", pad=2)
    training.run()
    (drawn,) = training.captured.drawn
    assert torch.equal(drawn, training.batches.choices(training.iteration - 1))


@pytest.mark.gpu
def test_it_is_captured_once_and_again_after_resuming(captures):
    whole, first = pair()
    whole.run()

    class Stop(Exception):
        pass

    def stop(training, news):
        if news.iteration == 6:
            raise Stop

    with pytest.raises(Stop):
        first.run(stop)
    assert len(captures) == 1
    resumed = tiny.training(device=CUDA)
    resumed.load_state(first.state())
    resumed.run()
    assert len(captures) == 2
    assert_alike(whole, resumed)
    first.load_state(first.last_good)  # velocities have moved to another place
    assert first.captured is None
    first.run()
    assert len(captures) == 3
    assert_alike(whole, first)


@pytest.mark.gpu
def test_measured_iterations_run_as_they_are_written(captures):
    tables, ends = [], []
    for step in ("eager", "graph"):
        probe = GradientNorms(rp.probes.every(4))
        training = tiny.training(device=CUDA, step=step, probes=[probe])
        training.run()
        tables.append(probe.table())
        ends.append(training)
    assert len(captures) == 1
    assert tables[0]["iteration"].nunique() == 3 and tables[0].equals(tables[1])
    assert_alike(*ends)


@pytest.mark.gpu
def test_hooks_are_called_at_every_step(captures):
    training, calls = tiny.training(device=CUDA), []
    training.network.fc.register_forward_hook(
        lambda one, *_: calls.append(training.iteration) if one.training else None
    )
    with pytest.warns(UserWarning, match="as it is written: hooks are attached to it, which a graph would not call"):
        training.run()
    assert len(set(calls)) == training.recipe.iterations
    assert not captures


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_as_it_is_written(monkeypatch):
    def refuse(work, stream):
        raise RuntimeError("operation not permitted when\n stream is capturing")

    monkeypatch.setattr(steps, "_record", refuse)
    eager, other = pair()
    eager.run()
    with pytest.warns(
        UserWarning, match="cannot be captured as a CUDA graph, and runs as it is written: operation not"
    ):
        other.run()
    assert not other.capturing
    assert_alike(eager, other)


class Shy(nn.Module):
    """Draws random numbers, and does not let itself be captured."""

    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while you look")
        return nn.functional.dropout(x, 0.1)


@pytest.mark.gpu
def test_after_a_capture_that_fails_random_numbers_are_drawn():
    eager, other = (
        tiny.training(nn.Sequential(Shy(), tiny.network()), device=CUDA, step=step) for step in ("eager", "graph")
    )
    eager.run()
    with pytest.warns(UserWarning, match="and runs as it is written: not while you look"):
        other.run()
    assert_alike(eager, other)


class Asking(nn.Module):
    """Asks the device for a number, which no capture can answer."""

    def forward(self, x):
        return x * float(x.mean() < 1e9)


@pytest.mark.gpu
def test_a_network_that_waits_for_the_device_trains_without_a_graph():
    net = tiny.network()
    net.stage2[0].branch.relu1 = Asking()
    training = tiny.training(net, device=CUDA)
    with pytest.warns(UserWarning, match="as it is written: called a synchronizing CUDA operation"):
        training.run()
    assert training.iteration == 12


class Drawing(nn.Module):
    """Drops itself at random, as in stochastic depth, with numbers drawn on the host."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x * (self.draw() < 0.5)


class Averaging(nn.Module):
    """Keeps a running mean in a new tensor each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean()
        return x - self.mean


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("part", "why"),
    [
        (lambda: Drawing(random.random), "it draws random numbers on the host"),
        (lambda: Drawing(numpy.random.rand), "it draws random numbers on the host"),
        (lambda: Drawing(lambda: float(torch.rand(()))), "it draws random numbers on the host"),
        (Averaging, "it puts a new tensor in the place of a parameter or buffer"),
    ],
    ids=["random", "numpy", "torch", "buffer"],
)
def test_what_a_graph_would_freeze_runs_as_it_is_written(part, why):
    ends = []
    for step in ("eager", "graph"):
        random.seed(0)
        numpy.random.seed(0)
        net = tiny.network()
        net.stage2[0].branch.relu1 = part()
        training = tiny.training(net, device=CUDA, step=step)
        with pytest.warns(UserWarning, match=why) if step == "graph" else contextlib.nullcontext():
            training.run()
        assert training.captured is None
        ends.append(training)
    assert_alike(*ends)


@pytest.mark.gpu
def test_the_collector_waits_until_a_step_is_captured(monkeypatch):
    """What it destroys meanwhile, an older graph above all, would end the capture."""
    seen = []
    warm_up, record = steps._warm_up, steps._record
    monkeypatch.setattr(steps, "_warm_up", lambda *given: (seen.append(gc.isenabled()), warm_up(*given))[1])
    monkeypatch.setattr(steps, "_record", lambda *given: (seen.append(gc.isenabled()), record(*given))[1])
    tiny.training(device=CUDA, iterations=2).run()
    assert seen == [False, False] and gc.isenabled()
    gc.disable()
    try:
        tiny.training(device=CUDA, iterations=2).run()
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()


def test_a_warm_up_leaves_nothing_behind():
    net = tiny.network().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    first, *others = net.parameters()
    for parameter in net.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 3.0 if parameter is first else 0.0)
    places = {name: value.data_ptr() for name, value in net.state_dict().items()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with steps._undone(net, optimizer):
        net(torch.randn(8, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        assert tiny.differ(before, net.state_dict())
    tiny.assert_same(before, dict(net.state_dict()))
    assert places == {name: value.data_ptr() for name, value in net.state_dict().items()}
    assert (optimizer.state[first]["momentum_buffer"] == 3).all()
    assert all((optimizer.state[other]["momentum_buffer"] == 0).all() for other in others)


def test_which_step_is_taken():
    assert resolve_step("auto", CPU) == "eager"
    assert resolve_step("auto", CUDA) == "graph"
    assert resolve_step("auto", CUDA, recompute=True) == "eager"
    assert resolve_step("compile", CPU) == "compile"
    assert resolve_step("compile-blocks", CUDA, recompute=True) == "compile-blocks"
    for name, options, message in (
        (
            "graph",
            {"device": CPU},
            r"step \(='graph'\) needs a CUDA device; accepted on cpu: auto, eager, compile, compile-b",
        ),
        ("graph", {"device": CUDA, "recompute": True}, r"step \(='graph'\) does not go with recompute"),
        (
            "grahp",
            {"device": CPU},
            r"step \(='grahp'\) is unknown; accepted: auto, eager, graph, compile, compile-blocks; nearest: graph",
        ),
    ):
        with pytest.raises(rp.UsageError, match=message):
            resolve_step(name, **options)
    with pytest.raises(rp.UsageError, match="needs a CUDA device"):
        rp.train("cifar/resnet-8", data="digits", step="graph", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["compile", "compile-blocks"])
def test_a_compiled_step_gives_the_same_losses(step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        eager, compiled = (tiny.training(iterations=6, milestones=(4,), step=how) for how in ("eager", step))
        assert (eager.how, compiled.how) == ("eager", step)
        eager.run()
        compiled.run()
    for one, other in zip(eager.rows, compiled.rows, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    for name, value in eager.network.state_dict().items():
        torch.testing.assert_close(compiled.network.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.fixture
def compiled(monkeypatch):
    """Has torch.compile run what it is given as it is written. Tells what was compiled."""
    graphs, compile_with = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda what, **options: compile_with(what, backend=backend, **options))
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


def test_every_architecture_of_a_process_is_compiled(compiled):
    """Dynamo takes all of them for one function, of which it compiles eight."""
    for width in range(2, 12):
        graphs = len(compiled)
        tiny.training(tiny.network(width=width), step="compile", iterations=1, milestones=()).run()
        assert len(compiled) > graphs, f"width {width} was not compiled"


def by_blocks(net=None, **changes):
    return tiny.training(net, step="compile-blocks", **changes)


def test_each_kind_of_block_is_compiled_once_whatever_the_depth(compiled):
    def network(family, depth, **options):
        return rp.build(f"cifar/{family}-{depth}", width=4, in_channels=1, **options)

    counts = []
    for net in (network("resnet", 14), network("resnet", 20), network("plain", 14), network("plain", 26)):
        by_blocks(net, iterations=2, milestones=()).run()
        counts.append(len(compiled))
    # Of one width: at one size, between two, at the next, and so on.
    assert counts == [5, 5, 10, 10]
    for width in range(5, 8):  # more kinds than torch compiles by itself
        by_blocks(network("resnet", 14, shortcut="B") if width == 5 else tiny.network(width=width), iterations=1).run()
        assert len(compiled) > counts[-1], f"width {width} was not compiled"
        counts.append(len(compiled))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("changes", [{}, {"bn_batch": 8}, {"recompute": True}, {"precision": "bf16"}], ids=str)
def test_compiled_blocks_train_as_they_are_written(changes):
    """What compiling by blocks does around the compiler changes nothing."""
    eager, blocks = tiny.training(step="eager", **changes), by_blocks(**changes)
    eager.run()
    blocks.run()
    assert_alike(eager, blocks)


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
def test_compiled_blocks_are_captured():
    eager, blocks = tiny.training(device=CUDA, step="eager"), by_blocks(device=CUDA)
    eager.run()
    blocks.run()
    assert isinstance(blocks.captured, CapturedStep)
    assert_alike(eager, blocks)


@pytest.mark.usefixtures("compiled")
def test_blocks_are_compiled_for_the_step_alone():
    training = by_blocks(iterations=1)
    block = training.network.stage1[0]
    assert "forward" not in vars(block)
    with contextlib.suppress(tiny.Boom), training.blocks.in_use():
        assert "forward" in vars(block)
        raise tiny.Boom
    assert "forward" not in vars(block)
    own = block.forward
    block.forward = lambda x: own(x)  # a user's
    users = block.forward
    with training.blocks.in_use():
        assert block.forward is not users
    assert block.forward is users


def test_a_network_without_blocks_is_compiled_as_a_whole_only():
    with pytest.raises(rp.UsageError) as error:
        by_blocks(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert str(error.value) == (
        "step (='compile-blocks') needs a network of blocks, and Sequential has none; accepted: auto, eager, compile"
    )


@pytest.mark.gpu
def test_random_numbers_and_resuming_go_on_as_without_a_graph():
    def noisy():
        net = tiny.network()
        net.stage2[0].branch.relu1 = nn.Dropout(0.5)
        return net

    eager, graph = pair(noisy)
    eager.run()
    states = []
    graph.run(lambda training, news: states.append(_copy(training.state())) if news.iteration == 6 else None)
    assert_alike(eager, graph)
    resumed = tiny.training(noisy(), device=CUDA)
    resumed.load_state(states[0])
    resumed.run()
    assert_alike(eager, resumed)
