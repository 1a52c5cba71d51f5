"""Probes as such: when they measure, how they are attached, and that nothing of them stays behind."""

from __future__ import annotations

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import hook_count, network
from torch import nn

import resprobe as rp
from resprobe.errors import UsageError
from resprobe.probes import PROBES, _Uncompiled, at, attach, every, logarithmic, make_probe


class Counting(rp.Probe):
    """Counts forward passes through every leaf."""

    name = "counting"

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.seen: dict[str, int] = {}
        self.fail_at = fail_at

    def hook(self, network):
        leaves = [(name, module) for name, module in network.named_modules() if not any(module.children())]
        for index, (name, module) in enumerate(leaves):
            if index == self.fail_at:
                raise UsageError(f"cannot measure {name}")
            yield module.register_forward_hook(self.note(name))

    def note(self, name):
        def look(module, inputs, output):
            self.seen[name] = self.seen.get(name, 0) + 1

        return look

    def table(self):
        return pandas.DataFrame(sorted(self.seen.items()), columns=["layer", "passes"])


class Second(Counting):
    name = "second"


@pytest.fixture
def net() -> nn.Module:
    return network("cifar/plain").eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.zeros(1, 1, 8, 8)


# -- schedules ---------------------------------------------------------------------------------------------------


@given(step=st.integers(1, 50), offset=st.integers(0, 50), length=st.integers(0, 300))
def test_every_is_a_range(step, offset, length):
    schedule = every(step, offset=offset)
    assert [iteration for iteration in range(length) if schedule(iteration)] == list(range(offset, length, step))


@pytest.mark.parametrize("value", [0, -1, 1.5, "3"])
def test_every_needs_a_whole_number(value):
    with pytest.raises(UsageError) as caught:
        every(value)
    assert str(caught.value) == f"every: iterations (={value!r}) must be a whole number ≥ 1"


@pytest.mark.parametrize("value", [0, 2.0])
def test_logarithmic_needs_a_whole_number(value):
    with pytest.raises(UsageError) as caught:
        logarithmic(value)
    assert str(caught.value) == f"logarithmic: per_decade (={value!r}) must be a whole number ≥ 1"


def test_logarithmic_by_hand():
    schedule = logarithmic(2)
    assert [i for i in range(2000) if schedule(i)] == [0, 1, 3, 10, 32, 100, 316, 1000]


@given(per_decade=st.integers(1, 20), power=st.integers(2, 7))
def test_logarithmic_has_as_many_points_in_every_decade(per_decade, power):
    schedule = logarithmic(per_decade)
    expected = {round(10 ** (power + step / per_decade)) for step in range(per_decade)}
    assert len(expected) == per_decade
    assert all(schedule(point) for point in expected)
    assert not schedule(10**power + 1)


@given(points=st.sets(st.integers(0, 100)))
def test_at_is_exactly_the_given_points(points):
    schedule = at(iter(points))
    assert {iteration for iteration in range(101) if schedule(iteration)} == points


def test_a_probe_measures_always_unless_told():
    assert all(Counting().schedule(iteration) for iteration in range(10))
    probe = Counting()
    probe.schedule = at([3])
    assert [probe.schedule(2), probe.schedule(3)] == [False, True]
    assert Counting().schedule(2), "another probe of the class keeps its own schedule"


# -- attach ------------------------------------------------------------------------------------------------------


def test_one_probe_is_given_itself_and_measures_only_inside(net, images):
    with attach(net, Counting()) as probe:
        assert isinstance(probe, Counting)
        assert hook_count(net) == sum(not any(module.children()) for module in net.modules())
        net(images)
        net(images)
    assert hook_count(net) == 0
    net(images)
    table = probe.table()
    assert set(table.passes) == {2}
    assert "stem.conv" in set(table.layer)


def test_several_are_given_as_a_tuple_in_their_order(net, images):
    first, second = Second(), Counting()
    with attach(net, first, second) as probes:
        assert probes == (first, second)
        net(images)
    assert hook_count(net) == 0
    assert first.seen == second.seen != {}


def test_a_registered_name_makes_a_new_probe_every_time(net, images):
    with PROBES.temporary("counting", Counting):
        with attach(net, "counting") as one:
            net(images)
        with attach(net, "counting", Second()) as (other, _):
            pass
        assert isinstance(make_probe("counting"), Counting)
    assert isinstance(one, Counting)
    assert other is not one
    assert other.seen == {}
    probe = Counting()
    assert make_probe(probe) is probe


def test_what_was_measured_goes_on_when_attached_again(net, images):
    probe = Counting()
    for _ in range(3):
        with attach(net, probe):
            net(images)
    assert set(probe.seen.values()) == {3}


def test_nothing_to_attach_is_an_error(net):
    with pytest.raises(UsageError) as caught, attach(net):
        pass
    assert str(caught.value) == "attach needs at least one probe: a registered name or a Probe"


def test_an_unknown_name_is_named_with_the_nearest(net):
    with (
        PROBES.temporary("counting", Counting),
        pytest.raises(UsageError, match=r"^probe \(='countin'\) is unknown; accepted: .*; nearest: counting$"),
        attach(net, Second(), "countin"),
    ):
        pass
    assert hook_count(net) == 0


def test_attaching_twice_is_refused_and_the_first_stays(net, images):
    with attach(net, Counting()) as probe:
        hooks = hook_count(net)
        with pytest.raises(UsageError) as caught:
            probe.attach(net)
        assert str(caught.value) == "probe counting is attached already; detach it first"
        assert hook_count(net) == hooks
        net(images)
    assert hook_count(net) == 0
    assert set(probe.seen.values()) == {1}


def test_a_nameless_probe_is_called_by_its_class(net):
    class Nameless(Counting):
        name = ""

    with attach(net, Nameless()) as probe, pytest.raises(UsageError, match="^probe Nameless is attached already"):
        probe.attach(net)


def test_the_same_probe_twice_in_one_attach_leaves_nothing(net):
    probe = Counting()
    with pytest.raises(UsageError, match="attached already"), attach(net, probe, probe):
        pass
    assert hook_count(net) == 0


# -- hooks and exceptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_no_hook_is_left_by_an_exception_inside(net, error):
    inside = []
    with pytest.raises(error), attach(net, Counting(), Second()):
        raise error(inside.append(hook_count(net)))
    assert inside[0] > hook_count(net) == 0


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_no_hook_is_left_by_a_probe_that_fails_half_way(net, fail_at):
    with pytest.raises(UsageError, match="^cannot measure "), attach(net, Second(), Counting(fail_at)):
        pytest.fail("the block must not be entered")
    assert hook_count(net) == 0
    probe = Counting(fail_at)
    with pytest.raises(UsageError, match="^cannot measure "):
        probe.attach(net)
    assert hook_count(net) == 0


def test_hooks_of_others_are_left_alone(net, images):
    seen = []
    handle = net.stem.conv.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError), attach(net, Counting()):
        raise RuntimeError
    assert hook_count(net) == 1
    net(images)
    assert seen == [1]
    handle.remove()


def test_detaching_twice_is_harmless(net):
    probe = Counting()
    probe.detach()
    probe.attach(net)
    probe.detach()
    probe.detach()
    assert hook_count(net) == 0


def test_the_base_class_says_nothing(net, images):
    with attach(net, rp.Probe()) as probe:
        net(images)
    assert hook_count(net) == 0
    assert probe.state() is None
    assert probe.load_state(None) is None
    with pytest.raises(NotImplementedError):
        probe.table()


def test_a_refused_second_attach_leaves_the_first_alone(net, images):
    probe = Counting()
    with attach(net, probe):
        with pytest.raises(UsageError, match="attached already"), attach(net, Second(), probe):
            pytest.fail("the block must not be entered")
        net(images)
    assert hook_count(net) == 0
    assert set(probe.seen.values()) == {1}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_probe_that_fails_when_it_is_detached_leaves_no_hook_of_another(net, order):
    class Stubborn(Counting):
        def detach(self):
            super().detach()
            raise UsageError("cannot be read")

    probes = [Stubborn(), Second()]
    with pytest.raises(UsageError, match="^cannot be read$"), attach(net, *(probes[index] for index in order)):
        pass
    assert hook_count(net) == 0
    assert _Uncompiled._holders == 0


@pytest.mark.filterwarnings("ignore")  # torch's own, about its own
@pytest.mark.parametrize("what", ["the network", "what it is part of", "by method", "a function"])
def test_what_was_compiled_and_run_before_is_measured(net, images, what):
    whole = nn.Sequential(net)
    if what == "by method":
        whole.compile(backend="eager")
    target = {"the network": net, "a function": lambda x: net(x)}.get(what, whole)
    run = whole if what == "by method" else torch.compile(target, backend="eager")
    run(images)
    with attach(net, Counting()) as probe:
        run(images)
    assert set(probe.seen.values()) == {1}
    torch._dynamo.reset()


@pytest.mark.parametrize("value", [5, "10", [1.5], [-1], ["3"]])
def test_at_needs_whole_numbers(value):
    with pytest.raises(UsageError) as caught:
        at(value)
    assert str(caught.value) == f"at: iterations (={value!r}) must be a list of whole numbers ≥ 0"


def test_every_needs_a_whole_offset():
    with pytest.raises(UsageError, match=r"^every: offset \(=0.5\) must be a whole number ≥ 0$"):
        every(3, offset=0.5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("cifar/resnet-20", "flops"),
            r"^network \(='cifar/resnet-20'\) must be a torch.nn.Module: rp.build makes one",
        ),
        ((nn.Identity(), ["flops"]), r"^probe \(=\['flops'\]\) must be a registered name or a Probe$"),
    ],
)
def test_arguments_of_another_kind(arguments, text):
    with pytest.raises(UsageError, match=text), attach(*arguments):
        pytest.fail("the block must not be entered")


@pytest.mark.usefixtures("clean_registries")
def test_what_is_registered_must_make_a_probe():
    rp.register_probe("mine")(dict)
    with pytest.raises(
        UsageError, match=r"^probe \(='mine'\): what is registered must make a resprobe.Probe, not \{\}$"
    ):
        make_probe("mine")


def test_a_probe_that_cannot_be_made_is_one_line():
    class Wanting(rp.Probe):
        name = "wanting"

        def __init__(self, size):
            super().__init__()

    with PROBES.temporary("wanting", Wanting), pytest.raises(UsageError) as caught:
        make_probe("wanting")
    assert str(caught.value).startswith("probe (='wanting') cannot be made: TypeError: ")
    assert "missing 1 required positional argument: 'size'" in str(caught.value)


class Hourly(rp.Probe):
    schedule = 100


def test_a_schedule_is_a_function():
    with pytest.raises(
        UsageError, match=r"^probe Hourly: schedule \(=100\) must be a function of the iteration, such as every"
    ):
        make_probe(Hourly())


class Forgetful(rp.Probe):
    name = "forgetful"

    def __init__(self):
        pass


class Silent(rp.Probe):
    name = "silent"

    def hook(self, network):
        pass


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        (Forgetful, r"^probe forgetful must call super\(\).__init__\(\) in its own$"),
        (Silent, r"^probe silent: hook must return the handles it registers, not None$"),
    ],
)
def test_what_a_probe_of_ones_own_may_lack(probe, text):
    with pytest.raises(UsageError, match=text), attach(network(), probe()):
        pytest.fail("the block must not be entered")


class Eager(rp.Probe):
    """Registers hooks at once, and then finds that it cannot measure, or gives them back in another way."""

    name = "eager"
    gives = None

    def hook(self, network):
        handles = [module.register_forward_hook(lambda *_: None) for module in network.modules()]
        if self.gives is None:
            raise UsageError("no")
        return self.gives(handles)


@pytest.mark.parametrize(
    ("gives", "text"),
    [
        (None, "^no$"),
        (lambda handles: [*handles, "done"], "^probe eager: hook must return the handles it registers, not 'done'$"),
    ],
)
def test_a_probe_that_fails_half_way_leaves_no_hook(gives, text):
    net, probe = network(), Eager()
    probe.gives = gives
    with pytest.raises(UsageError, match=text):
        probe.attach(net)
    assert hook_count(net) == 0


def test_a_single_handle_may_be_returned():
    net, probe = network(), Eager()
    probe.gives = lambda handles: [handle.remove() for handle in handles[1:]] and handles[0]
    probe.attach(net)
    assert hook_count(net) == 1
    probe.detach()
    assert hook_count(net) == 0


def test_copies_for_several_cards_within_the_network_are_refused():
    net = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)), nn.ReLU())
    assert rp.probes.unwrap(net) is net  # here it has no card
    net[0].device_ids = [0, 1]
    with pytest.raises(UsageError, match="cannot be attached to DataParallel, as 0 is, whose copies"):
        rp.probes.unwrap(net)
