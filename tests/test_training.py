"""The training loop against naive twins, to the last bit where it goes on after an interruption."""

from __future__ import annotations

import collections
import copy
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pandas
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import CPU, assert_same, differ, digits, hook_count, network, one_thread, recipe, training
from torch import Tensor, nn
from torch.nn import functional as F

import resprobe as rp
from resprobe import distributed
from resprobe.checkpoints import load_checkpoint, save_checkpoint
from resprobe.data import Data, FolderSet, Normalization
from resprobe.errors import TrainingDiverged, UsageError
from resprobe.evaluation import Evaluation, precise_batch_norm
from resprobe.recipes import learning_rate, plateaus
from resprobe.training import Training, _copy, _log_points, _test_points


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


class Stop(BaseException):
    """Stands for a kill."""


class Stranger(nn.Module):
    """A network of no family, which draws random numbers as it trains."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))

    def forward(self, x):
        return self.body(x)


class AnySize(nn.Module):
    """Takes images of any size; with dropout."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d(2), nn.Dropout(0.5), nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(self.drop(self.pool(x).flatten(1)))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Data:
    folder, numbers = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(10)]
    for path in paths:
        Image.fromarray(numbers.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path)
    parts = (FolderSet(tuple(part), torch.arange(len(part)) % 2, size=16) for part in (paths[:6], paths[6:]))
    return Data("files", "files", *parts, classes=("a", "b"))


# -- interrupted and taken up again ------------------------------------------------------------------------------

CASES = {
    "paper": {},
    "pad-crop": {"augmentation": "pad-crop", "pad": 2},
    "caffe": {"momentum_form": "caffe"},
    "bn-batch": {"bn_batch": 6},
    "nesterov": {"nesterov": True, "weight_decay_on": "weights", "weight_decay": 0.01},
    "dropout": {"net": Stranger},
    "dropout-files": {
        "net": AnySize,
        "augmentation": "scale-crop",
        "crop": 16,
        "scale": (18, 26),
        "colour": "pca",
        "batch_size": 4,
    },
    "warm-up": {"warm_up_rate": 0.01, "warm_up_until": 88.0, "momentum_form": "caffe", "milestones": (11,)},
    "warm-up-iterations": {"warm_up_rate": 0.01, "warm_up_iterations": 4, "momentum_form": "caffe"},
    "plateau": {"plateau": 1, "milestones": (), "evaluations": 4, "learning_rate": 1e-4, "decay": 2.0},
    "validation": {"validation_fraction": 0.25, "bn_test_statistics": "running"},
    "bf16": {"precision": "bf16"},
}


class Watching(rp.Probe):
    """Keeps what it saw of the outputs and the gradients; its state goes into checkpoints."""

    name = "watching"

    def __init__(self):
        super().__init__()
        self.rows: list[list[float]] = []
        self.outputs: list[float] = []

    def hook(self, network):
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                yield module.register_forward_hook(self.look)

    def look(self, module, inputs, output):
        self.outputs.append(float(output.detach().float().std()))

    def after_backward(self, network, iteration):
        norm = sum(float(parameter.grad.square().sum()) for parameter in network.parameters())
        self.rows.append([iteration, norm, *self.outputs])
        self.outputs = []

    def table(self):
        return pandas.DataFrame({"iteration": [row[0] for row in self.rows], "norm": [row[1] for row in self.rows]})

    def state(self):
        return {"rows": self.rows}

    def load_state(self, state):
        self.rows = [list(row) for row in state["rows"]]


def make(case: str, files: Data, probe: rp.Probe | None = None) -> Training:
    changes = dict(CASES[case])
    net = changes.pop("net", network)()
    data = files if case.endswith("files") else digits(128, 32)
    return training(net, data, seed=3, probes=[probe] if probe else [], **changes)


def end(train: Training) -> dict:
    """All that a finished training says."""
    metrics, running = train.finish()
    return {**train.state(), "metrics": metrics, "running": running}


@pytest.fixture(scope="module")
def undisturbed(files):
    """The end of a training that was never interrupted, made once a case."""
    known: dict[str, dict] = {}

    def of(case: str) -> dict:
        if case not in known:
            whole = make(case, files, Watching())
            whole.run()
            known[case] = end(whole)
        return known[case]

    return of


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(stops=st.sets(st.sampled_from([3, 6, 9, 12]), min_size=1, max_size=2))
def test_an_interrupted_training_ends_with_the_same_bits(case, files, undisturbed, tmp_path, stops):
    path = tmp_path / "checkpoint.pt"
    for stop in [*sorted(stops), None]:
        # A new process knows nothing of the old one: other weights, other random numbers, a new probe.
        part = make(case, files, Watching())
        for parameter in part.network.parameters():
            nn.init.constant_(parameter, 9.0)
        torch.rand(7)
        kept = load_checkpoint(path) if stop != min(stops) else None
        if kept is None:
            part = make(case, files, Watching())
        else:
            part.load_state(kept)

        def watch(now, news, stop=stop):
            if news.iteration == stop:
                save_checkpoint(path, now.state())
                raise Stop

        if stop is None:
            part.run(watch)
        else:
            with pytest.raises(Stop):
                part.run(watch)
    assert_same(end(part), undisturbed(case))


def test_the_cases_differ_and_dropout_matters(undisturbed):
    ends = [undisturbed(case)["metrics"]["test_loss"] for case in CASES]
    assert len(set(ends)) == len(ends)
    assert all(math.isfinite(loss) for loss in ends)
    rates = {case: [row["learning_rate"] for row in undisturbed(case)["rows"]] for case in CASES}
    assert rates["warm-up"][0] == 0.01 < max(rates["warm-up"]), "the warm-up ended on the way"
    assert len(set(rates["plateau"])) > 1, "there was a plateau on the way"


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(window=st.integers(1, 5), stop=st.integers(0, 10))
def test_any_log_point_is_as_good_as_another(tmp_path, window, stop):
    changes = {"window": window, "iterations": 9, "momentum_form": "caffe"}
    whole, states = training(**changes), []
    whole.run(
        lambda now, news: states.append((now.iteration, save_checkpoint(tmp_path / f"{now.iteration}", now.state())))
    )
    iteration, _ = states[stop % len(states)]
    part = training(network(seed=8), **changes)
    part.load_state(load_checkpoint(tmp_path / f"{iteration}"))
    assert part.iteration == iteration
    part.run()
    assert_same(part.state(), whole.state())


def test_a_state_taken_up_is_not_changed_by_going_on():
    first = training()
    kept = {}
    first.run(lambda now, news: kept.setdefault("state", now.last_good))
    assert kept["state"]["iteration"] == 3
    copy = {name: tensor.clone() for name, tensor in kept["state"]["network"].items()}
    part = training()
    part.load_state(kept["state"])
    part.run()
    assert not differ(copy, kept["state"]["network"])
    assert len(kept["state"]["rows"]) == 1
    assert_same(part.state(), first.state())


def test_two_trainings_are_alike_and_another_seed_is_another_training():
    ends = []
    for seed in (0, 0, 1):
        one = training(seed=seed)
        one.run()
        ends.append(one.network.state_dict())
    assert not differ(ends[0], ends[1])
    assert differ(ends[0], ends[2])


# -- naive twins -------------------------------------------------------------------------------------------------


def batches(train: Training):
    return tiny.batches(train.data.train, train.recipe, train.seed, train.normalization, CPU, 0)


def naive_training(net: nn.Module, made, rates: list[float], form: str, decay, nesterov=False, part: int | None = None):
    """§4.2 in plain arithmetic. `decay(parameter)` is its weight decay. Gives losses and counts of wrong images."""
    net.train()
    velocity = [torch.zeros_like(parameter) for parameter in net.parameters()]
    seen = []
    for rate, (images, labels) in zip(rates, made, strict=False):
        net.zero_grad()
        loss = wrong = 0
        part = part or len(labels)
        for start in range(0, len(labels), part):
            scores, truth = net(images[start : start + part]), labels[start : start + part]
            share = F.cross_entropy(scores, truth, reduction="sum") / len(labels)
            share.backward()
            loss += share.item()
            wrong += (scores.argmax(1) != truth).sum().item()
        seen.append((loss, wrong))
        with torch.no_grad():
            for parameter, v in zip(net.parameters(), velocity, strict=True):
                if parameter.grad is None:
                    continue
                g = parameter.grad + decay(parameter) * parameter
                if form == "caffe":
                    v.mul_(0.9).add_(rate * g)
                    parameter -= v
                else:
                    v.mul_(0.9).add_(g)
                    parameter -= rate * (g + 0.9 * v if nesterov else v)
    return seen


def close(one: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    for (name, left), right in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((left.detach() - right.detach()).abs().max()) for left, right in pairs)


@pytest.mark.parametrize("family", ["cifar/plain", "cifar/resnet"])
@pytest.mark.parametrize("changes", [{}, {"nesterov": True}, {"augmentation": "pad-crop", "pad": 2}])
def test_the_loop_equals_a_naive_twin(family, changes):
    one, twin = training(network(family), iterations=10, weight_decay=0.01, window=1, **changes), network(family)
    one.run()
    rates = [0.05] * 5 + [0.005] * 4 + [0.0005]
    seen = naive_training(twin, batches(one), rates, "torch", lambda _: 0.01, nesterov="nesterov" in changes)
    close(one.network, twin)
    assert [row["train_loss"] for row in one.rows] == pytest.approx([loss for loss, _ in seen], rel=1e-4)
    assert [row["train_error"] for row in one.rows] == pytest.approx([100 * wrong / 16 for _, wrong in seen])
    assert differ(one.network.state_dict(), network(family).state_dict())


RATES_UP_AND_DOWN = {"warm_up_rate": 0.01, "warm_up_iterations": 4, "milestones": (7,), "iterations": 10}


@pytest.mark.parametrize("form", ["caffe", "torch"])
def test_both_forms_of_momentum_across_changes_of_the_rate(form):
    one, twin, other = training(momentum_form=form, **RATES_UP_AND_DOWN), network(), network()
    one.run()
    rates = [0.01] * 4 + [0.05] * 3 + [0.005] * 3
    naive_training(twin, batches(one), rates, form, lambda _: 1e-4)
    close(one.network, twin)
    naive_training(other, batches(one), rates, {"caffe": "torch", "torch": "caffe"}[form], lambda _: 1e-4)
    assert distance(twin, other) > 1e-3, "the two forms differ where the rate changes"


def test_both_forms_of_momentum_agree_while_the_rate_stays():
    one, other = (training(momentum_form=form, milestones=()) for form in ("torch", "caffe"))
    one.run()
    other.run()
    assert not differ(one.network.state_dict(), other.network.state_dict())


def test_bn_batch_of_64_equals_two_half_batches():
    one, twin = training(batch_size=128, bn_batch=64, iterations=3, milestones=(), window=1), network()
    one.run()
    seen = naive_training(twin, batches(one), [0.05] * 3, "torch", lambda _: 1e-4, part=64)
    close(one.network, twin)
    assert one.network.stem.norm.num_batches_tracked == 6
    assert [row["train_loss"] for row in one.rows] == pytest.approx([loss for loss, _ in seen], rel=1e-4)
    assert [row["train_error"] for row in one.rows] == pytest.approx([100 * wrong / 128 for _, wrong in seen])
    whole = training(batch_size=128, iterations=3, milestones=(), window=1)
    whole.run()
    assert distance(whole.network, twin) > 1e-4, "two halves are not the whole"


def test_a_bn_batch_that_does_not_divide_counts_every_image_once():
    one, twin = training(bn_batch=12, iterations=3, milestones=()), network()
    one.run()
    naive_training(twin, batches(one), [0.05] * 3, "torch", lambda _: 1e-4, part=12)
    close(one.network, twin)


@pytest.mark.parametrize("on", ["all", "weights"])
def test_what_weight_decay_is_on(on):
    one, twin = training(weight_decay=0.5, weight_decay_on=on, iterations=3, milestones=()), network()
    free = training(weight_decay=0.0, weight_decay_on=on, iterations=1, milestones=())
    one.run()
    naive_training(twin, batches(one), [0.05] * 3, "torch", lambda p: 0.5 if on == "all" or p.ndim > 1 else 0.0)
    close(one.network, twin)
    # After one iteration the undecayed parameters are where no decay at all would have put them.
    first = training(weight_decay=0.5, weight_decay_on=on, iterations=1, milestones=())
    first.run()
    free.run()
    for (name, decayed), spared in zip(first.network.named_parameters(), free.network.parameters(), strict=True):
        started_at_zero = name.endswith("bias")
        assert torch.equal(decayed, spared) == (started_at_zero or (on == "weights" and decayed.ndim == 1)), name


def test_parameters_that_do_not_learn_stay():
    net = network()
    net.stem.conv.weight.requires_grad_(False)
    one, before = training(net, weight_decay=0.1), net.stem.conv.weight.clone()
    one.run()
    assert torch.equal(net.stem.conv.weight, before)
    assert differ(net.state_dict(), network().state_dict())


# -- the learning rate -------------------------------------------------------------------------------------------


class Scripted(Training):
    """A training whose training errors (percent, one a window) and test errors are written down beforehand."""

    train_errors: tuple[float, ...] = ()
    test_errors: tuple[float, ...] = ()

    def step(self, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        window = self.iteration // self.recipe.window
        loss, wrong = super().step(*drawn)
        if self.train_errors:
            wrong = torch.tensor(self.train_errors[window] * self.recipe.batch_size / 100)
        return loss, wrong

    def test_now(self, part=None) -> Evaluation:
        tested = super().test_now(part)
        count = sum(not math.isnan(row["test_error"]) for row in self.rows)
        return replace(tested, error=self.test_errors[count]) if self.test_errors else tested


def scripted(**changes) -> Scripted:
    script = {name: changes.pop(name) for name in ("train_errors", "test_errors") if name in changes}
    made = Scripted(network(), digits(), recipe(**changes), device=CPU)
    vars(made).update(script)
    return made


def rates(train: Training) -> list[float]:
    return [row["learning_rate"] for row in train.rows]


def test_the_history_follows_the_pure_function():
    for changes in ({}, {"warm_up_rate": 0.01, "warm_up_until": 88.0}, {"plateau": 1, "evaluations": 4}):
        one = training(**changes)
        one.run()
        for index, row in enumerate(one.rows):
            earlier = one.rows[:index]
            lowest = min((before["train_error"] for before in earlier), default=None)
            count = plateaus(one.recipe, [e["test_error"] for e in earlier if not math.isnan(e["test_error"])])
            assert row["learning_rate"] == learning_rate(one.recipe, int(row["iteration"]) - 1, lowest, count)


def test_the_warm_up_ends_once_and_for_all():
    one = scripted(
        train_errors=(95, 70, 90, 99), warm_up_rate=0.01, warm_up_until=80.0, milestones=(), iterations=12, window=3
    )
    one.run()
    assert rates(one) == [0.01, 0.01, 0.05, 0.05]
    assert one.lowest_error == pytest.approx(70)


def test_the_warm_up_does_not_begin_again_after_an_interruption(tmp_path):
    changes = {"train_errors": (95, 70, 90, 99), "warm_up_rate": 0.01, "milestones": (), "iterations": 12, "window": 3}
    one = scripted(**changes)

    def stop(now, news):
        if news.iteration == 9:
            save_checkpoint(tmp_path / "c", now.state())
            raise Stop

    with pytest.raises(Stop):
        one.run(stop)
    other = scripted(**changes)
    other.load_state(load_checkpoint(tmp_path / "c"))
    other.run()
    assert rates(other) == [0.01, 0.01, 0.05, 0.05]


def test_a_warm_up_that_never_succeeds_goes_on_to_the_first_milestone():
    one = scripted(train_errors=(95, 81, 80, 80), warm_up_rate=0.01, warm_up_until=80.0, iterations=12, window=3)
    one.run()
    assert rates(one) == pytest.approx([0.01, 0.005, 0.005, 0.0005])  # milestones 5 and 9


def test_a_plateau_of_the_test_error_divides_the_rate():
    errors = (50, 40, 41, 42, 30, 31)
    one = scripted(test_errors=errors, plateau=2, milestones=(), iterations=12, window=2, evaluations=6)
    one.run()
    assert [row["test_error"] for row in one.rows] == list(errors)
    # 41 and 42 are two evaluations without a new minimum: divided from then on.
    assert rates(one) == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.005, 0.005])


# -- history and metrics -----------------------------------------------------------------------------------------

COLUMNS = ["iteration", "epoch", "learning_rate", "train_loss", "train_error", "test_loss", "test_error", "seconds"]


class Noting(Training):
    """Notes what every iteration gave."""

    def step(self, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        loss, wrong = super().step(*drawn)
        vars(self).setdefault("noted", []).append((loss.item(), wrong.item()))
        return loss, wrong


def noting(**changes) -> Noting:
    return Noting(network(), digits(), recipe(**changes), device=CPU)


def test_history_has_its_columns_and_windows_equal_a_naive_twin():
    one, news = noting(iterations=11, window=4, evaluations=2), []
    one.run(lambda now, progress: news.append(progress))
    assert [list(row) for row in one.rows] == [COLUMNS] * 3
    # Every window's end, where tests are too, and the last iteration.
    assert [row["iteration"] for row in one.rows] == [4, 8, 11]
    for (start, stop), row in zip(itertools.pairwise([0, 4, 8, 11]), one.rows, strict=True):
        losses, wrong = zip(*one.noted[start:stop], strict=True)
        assert row["train_loss"] == pytest.approx(sum(losses) / (stop - start), rel=1e-5)
        assert row["train_error"] == pytest.approx(100 * sum(wrong) / (16 * (stop - start)), rel=1e-5)
        assert row["epoch"] == stop * 16 / 160
        assert math.isnan(row["test_error"]) == math.isnan(row["test_loss"]) == (stop not in (4, 11))
    seconds = [row["seconds"] for row in one.rows]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert [(told.iteration, told.iterations, told.train_error) for told in news] == [
        (row["iteration"], 11, row["train_error"]) for row in one.rows
    ]
    assert [told.test_error is None for told in news] == [False, True, False]
    assert all(told.images_per_second > 0 for told in news)


@settings(max_examples=50)
@given(iterations=st.integers(1, 5000), window=st.integers(1, 200), evaluations=st.integers(1, 100))
def test_only_the_last_window_is_shorter(iterations, window, evaluations):
    """The warm-up ends, and convergence is reckoned, on windows: a short one's error says little."""
    chosen = recipe(iterations=iterations, window=window, evaluations=evaluations)
    tests, logs = _test_points(chosen), sorted(_log_points(chosen))
    assert all(stop - start == window for start, stop in itertools.pairwise([0, *logs[:-1]]))
    assert logs[-1] == iterations and tests <= set(logs) and iterations in tests
    assert len(tests) == min(evaluations, max(1, iterations // window))


def test_with_a_part_held_out_what_is_tested_on_decides_nothing():
    changes = {"plateau": 1, "milestones": (), "evaluations": 4, "iterations": 16, "validation_fraction": 0.25}
    ends = []
    for labels in (lambda labels: labels, lambda labels: labels.flip(0)):
        data = digits()
        data = replace(data, test=replace(data.test, labels=labels(data.test.labels)))
        one = training(data=data, **changes)
        one.run()
        ends.append([(row["learning_rate"], row["validation_error"]) for row in one.rows])
        assert one.rows[-1]["validation_error"] == one.test_now(one.validation).error
    assert str(ends[0]) == str(ends[1])
    rows = [{"test_error": 1.0, "validation_error": error} for error in (3.0, 2.0, 2.0, 2.0)]
    one.rows = rows
    assert one._plateaus() == 2


class Skipping(nn.Module):
    """Stochastic depth: the branch is left out in some steps, here in the first two."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.calls = 0

    def forward(self, x):
        x = self.stem(x.flatten(1))
        self.calls += self.training
        return self.head(x + self.branch(x) if not self.training or self.calls > 2 else x)


def test_parts_may_have_no_gradient_at_first():
    one = training(Skipping(), iterations=6, milestones=(), weight_decay=0.0)
    twin = copy.deepcopy(one.network)
    one.run()
    made = batches(one)
    naive_training(twin, made, [row["learning_rate"] for row in one.rows for _ in range(3)], "torch", lambda _: 0.0)
    for (name, ours), theirs in zip(one.network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


class Drawing(nn.Module):
    """Draws from Python's and numpy's generators."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(x.flatten(1)) * (random.random() + np.random.rand() if self.training else 1.0)


def test_random_numbers_of_python_and_numpy_are_the_seeds_too(tmp_path):
    ends = []
    for caller in (1, 2):
        random.seed(caller)
        np.random.seed(caller)
        before = random.getstate(), np.random.get_state()[1].tolist()
        whole = training(Drawing(), iterations=9)
        whole.run(lambda now, news: save_checkpoint(tmp_path / str(now.iteration), now.state()))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before, "the caller's are left alone"
        ends.append(end(whole))
    part = training(Drawing(), iterations=9)
    part.load_state(load_checkpoint(tmp_path / "6"))
    part.run()
    assert_same(ends[0], ends[1])
    assert_same(ends[0], end(part))
    other = training(Drawing(), iterations=9, seed=1)
    other.run()
    assert other.rows[-1]["train_loss"] != whole.rows[-1]["train_loss"]


def test_frozen_parts_stay_in_evaluation_mode():
    one = training(network(), iterations=3)
    frozen = one.network.stem[1]
    frozen.eval()
    before = frozen.running_mean.clone()
    one.run()
    assert torch.equal(frozen.running_mean, before) and not frozen.training
    other = training(network().eval(), iterations=3)  # as one that was read from a file
    other.run()
    assert not torch.equal(other.network.stem[1].running_mean, before)


class Voxels(nn.Module):
    """Convolutions of two and of three dimensions."""

    def __init__(self):
        super().__init__()
        self.flat, self.deep, self.head = nn.Conv2d(1, 4, 3), nn.Conv3d(1, 2, 3), nn.Linear(2 * 2 * 4 * 4, 10)

    def forward(self, x):
        return self.head(self.deep(self.flat(x)[:, None]).flatten(1))


def test_a_network_with_convolutions_of_three_dimensions_is_trained():
    one = training(Voxels(), iterations=3)
    one.run()
    assert one.iteration == 3
    assert one.network.flat.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_test_curve_is_the_network_as_it_stood():
    one = training(evaluations=4)
    expected = []
    one.run(lambda now, news: expected.append(now.test_now()))
    tested = [(row["test_error"], row["test_loss"]) for row in one.rows]
    assert tested == [(twin.error, twin.loss) for twin in expected]
    assert one.network.training, "testing gives training mode back"


def naive_error(net: nn.Module, normalization: Normalization, images: Tensor, labels: Tensor) -> float:
    net.eval()
    with torch.no_grad():
        wrong = sum(
            int(net(normalization(image[None])).argmax()) != int(label)
            for image, label in zip(images, labels, strict=True)
        )
    net.train()
    return 100 * wrong / len(labels)


def test_metrics_equal_naive_twins():
    one = noting(iterations=22, window=4, evaluations=2, milestones=(), learning_rate=0.02)
    one.run()
    twin = network()
    twin.load_state_dict(one.network.state_dict())
    data, steps = digits(), one.noted
    metrics, running = one.finish()
    # Of 160 images in batches of 16 the last epoch is the last ten iterations, over which windows are uneven.
    assert [row["iteration"] for row in one.rows] == [4, 8, 12, 16, 20, 22]
    assert metrics["train_error"] == pytest.approx(100 * sum(wrong for _, wrong in steps[12:]) / 160, rel=1e-5)
    assert metrics["train_loss"] == pytest.approx(sum(loss for loss, _ in steps[12:]) / 10, rel=1e-5)
    test = (one.normalization, data.test.images, data.test.labels)
    assert metrics["test_error_running"] == pytest.approx(naive_error(twin, *test))
    for name, tensor in twin.state_dict().items():
        if "running" in name:
            assert torch.equal(running[name], tensor), name
    precise_batch_norm(twin, itertools.islice((images for images, _ in batches(one)), 10))
    assert metrics["test_error"] == pytest.approx(naive_error(twin, *test))
    single = naive_error(twin, one.normalization, data.train.images, data.train.labels)
    assert metrics["train_error_single_view"] == pytest.approx(single)
    assert not differ(one.network.state_dict(), twin.state_dict()), "the precise statistics are part of the network"
    assert metrics["test_loss"] != one.rows[-1]["test_loss"], "precise statistics are not the running ones"
    assert metrics["parameters"] == sum(tensor.numel() for tensor in twin.parameters())
    assert (metrics["iterations"], metrics["train_images"], metrics["test_images"]) == (22, 160, 60)
    assert metrics["images_per_second"] == pytest.approx(22 * 16 / metrics["seconds"])
    assert "validation_error" not in metrics


def test_running_statistics_are_reported_when_asked_for():
    one = training(bn_test_statistics="running")
    one.run()
    before = {name: tensor.clone() for name, tensor in one.network.state_dict().items()}
    metrics, running = one.finish()
    assert metrics["test_error"] == metrics["test_error_running"] == one.rows[-1]["test_error"]
    assert not differ(before, one.network.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in running.items())


def test_a_window_longer_than_an_epoch_is_the_best_that_is_known():
    one = training(iterations=30, window=30, evaluations=1)
    one.run()
    assert len(one.rows) == 1
    assert one.finish()[0]["train_error"] == pytest.approx(one.rows[0]["train_error"])


def test_a_validation_part_is_held_out_and_tested():
    data = digits()
    one = training(data=data, validation_fraction=0.25)
    one.run()
    held = data.hold_out(0.25)
    metrics, _ = one.finish()
    assert (metrics["train_images"], metrics["validation_images"]) == (120, 40)
    assert metrics["validation_error"] == pytest.approx(
        naive_error(one.network, one.normalization, held.validation.images, held.validation.labels)
    )
    mean = held.train.images.double().mean(0) / 255
    torch.testing.assert_close(one.normalization.mean.double(), mean, rtol=1e-6, atol=1e-6)
    assert one.rows[-1]["epoch"] == 12 * 16 / 120


def test_scale_crop_of_images_in_memory_is_refused():
    with pytest.raises(UsageError, match=r"^augmentation \(='scale-crop'\) needs image files, as from folder:PATH"):
        training(augmentation="scale-crop").run()


def test_bf16_keeps_float32_weights_and_learns():
    one, exact = training(network("cifar/resnet"), precision="bf16", learning_rate=0.02), training(learning_rate=0.02)
    one.run()
    exact.run()
    assert {parameter.dtype for parameter in one.network.parameters()} == {torch.float32}
    assert differ(one.network.state_dict(), exact.network.state_dict())
    assert one.rows[-1]["train_loss"] < one.rows[0]["train_loss"]
    assert one.rows[-1]["train_loss"] == pytest.approx(exact.rows[-1]["train_loss"], rel=0.1)


# -- divergence --------------------------------------------------------------------------------------------------


class Bomb(nn.Module):
    """Gives infinity from its `fuse`-th training pass on."""

    def __init__(self, fuse: int):
        super().__init__()
        self.fuse = fuse
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return x * (math.inf if self.passes >= self.fuse else 1.0)


def bombed(fuse: int) -> nn.Module:
    made = Stranger()
    made.body.insert(3, Bomb(fuse))
    return made


class Meddler(rp.Probe):
    """Changes what it watches, in one of the ways in which that happens by mistake."""

    name = "meddler"
    schedule = staticmethod(rp.probes.every(4, offset=1))

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def hook(self, network):
        def look(module, inputs, output):
            if self.how == "output":
                return output * 2
            if self.how == "in place":
                with torch.no_grad():
                    output.abs_()
            if self.how == "random":
                torch.rand(1)

        return [network.stem.conv.register_forward_hook(look)]

    def after_backward(self, network, iteration):
        if self.how == "gradients":
            network.fc.weight.grad.div_(2)

    def table(self):
        return pandas.DataFrame()


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("output", "loss and gradients"),
        ("in place", "loss and gradients"),
        ("gradients", "loss and gradients"),
        ("random", "random numbers"),
    ],
)
def test_a_probe_that_changes_what_it_watches_ends_the_training(how, what):
    one = training(probes=[Meddler(how)])
    with pytest.raises(
        rp.UsageError, match=f"^probe meddler changes what it watches: without it the {what} of iteration 2 "
    ):
        one.run()
    assert hook_count(one.network) == 0


class Counts(nn.Module):
    """Of which Python knows something that no tensor holds."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += self.training
        return x * (1 + 0.1 * self.passes)


def test_what_python_knows_of_a_network_is_no_fault_of_a_probe():
    def counting():
        made = network()
        made.stage1.append(Counts())
        return made

    watched, alone = training(counting(), probes=[Watching()]), training(counting())
    watched.run()
    alone.run()
    assert_same(watched.rows, alone.rows)
    assert watched.network.stage1[-1].passes == alone.network.stage1[-1].passes == 12


def test_gradients_from_before_a_training_are_no_part_of_it():
    used, fresh = network(), network()
    used(torch.ones(2, 1, 8, 8)).sum().backward()
    used.load_state_dict(fresh.state_dict())  # running statistics too
    one, other = training(used, probes=[Watching()]), training(fresh)
    one.run()
    other.run()
    assert_same(one.network.state_dict(), other.network.state_dict())


def test_a_probe_that_makes_gradients_no_numbers_is_named():
    class Dividing(Watching):
        def after_backward(self, network, iteration):
            network.fc.weight.grad.div_(0)

    with pytest.raises(
        rp.UsageError, match="^probe watching changes what it watches: without it the loss and gradients"
    ):
        training(probes=[Dividing()]).run()


def test_what_is_copied_shares_nothing():
    pair = collections.namedtuple("Pair", "x y")(torch.zeros(2), 1)
    assert _copy(pair)._fields == ("x", "y") and _copy(pair).x is not pair.x
    held = {"a": [torch.zeros(2), (torch.zeros(2), {"b": torch.zeros(2)})]}
    copied = _copy(held)
    assert type(copied["a"][1]) is tuple
    for tensor in (held["a"][0], held["a"][1][0], held["a"][1][1]["b"]):
        tensor += 1
    assert not any(tensor.any() for tensor in (copied["a"][0], copied["a"][1][0], copied["a"][1][1]["b"]))


@pytest.mark.parametrize(("broken", "kept"), [(3, 0), (6, 3)], ids=["at a log point", "at the end"])
def test_weights_that_the_last_update_of_a_window_breaks_are_no_good_ones(broken, kept):
    """The loss is that before the update, and finite."""
    late = {"warm_up_rate": 0.01, "warm_up_iterations": broken - 1, "learning_rate": 1e300}
    one = training(iterations=6, milestones=(), window=3, **late)
    with pytest.raises(TrainingDiverged) as caught:
        one.run()
    assert str(caught.value) == (
        f"the weights are not finite after iteration {broken}, learning rate 1e+300; "
        f"the weights of iteration {kept}, the last good ones, are kept"
    )
    assert one.iteration == kept
    assert all(torch.isfinite(tensor).all() for tensor in one.network.state_dict().values())


class Odd(Stranger):
    """Holds parameters that are no weights that are trained."""

    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.tensor(3), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 4))


def test_what_is_not_trained_need_not_be_finite():
    one = training(Odd())
    one.run()
    assert one.iteration == 12


def test_processes_that_train_together_draw_other_numbers():
    """Those of the first are the seed's. A process that goes on draws no numbers twice."""
    one = training()
    draws = {}
    for rank in (0, 1, 2):
        for iteration in (0, 6):
            one.team, one.iteration = distributed.Team(rank, 3), iteration
            generator = torch.Generator()
            generator.set_state(one._first_random_state()["cpu"])
            draws[rank, iteration] = torch.rand(4, generator=generator)
    assert torch.equal(draws[0, 0], draws[0, 6])
    assert torch.equal(draws[0, 0], torch.rand(4, generator=torch.Generator().manual_seed(one.seed)))
    different = [draws[0, 0], draws[1, 0], draws[1, 6], draws[2, 0], draws[2, 6]]
    assert len({tuple(draw.tolist()) for draw in different}) == 5


@pytest.mark.parametrize(("fuse", "kept"), [(1, 0), (4, 3), (8, 6), (9, 6), (12, 9)])
def test_divergence_names_iteration_rate_and_layer_and_goes_back(fuse, kept):
    one, states = training(bombed(fuse)), {}
    states[0] = one.last_good
    with pytest.raises(TrainingDiverged) as caught:
        one.run(lambda now, news: states.setdefault(news.iteration, now.last_good))
    rate = 0.05 if fuse <= 5 else 0.005 if fuse <= 9 else 0.0005
    assert str(caught.value) == (
        f"the loss is not finite at iteration {fuse}, learning rate {rate:g}, first in body.3; "
        f"the weights of iteration {kept}, the last good ones, are kept"
    )
    assert one.iteration == kept
    assert_same(one.state(), states[kept])
    assert_same(one.last_good, states[kept])
    assert hook_count(one.network) == 0


def naive_divergence(net: nn.Module, made, rates: list[float]) -> int:
    """The iteration, from 1, whose loss is the first that is not finite."""
    seen = naive_training(net, made, rates, "torch", lambda _: 1e-4)
    return next(index for index, (loss, _) in enumerate(seen, 1) if not math.isfinite(loss))


@pytest.mark.parametrize("family", ["cifar/plain", "cifar/resnet"])
def test_a_huge_learning_rate_diverges_where_a_naive_twin_does(family):
    huge = {"learning_rate": 1e30, "warm_up_rate": 0.01, "warm_up_iterations": 7, "milestones": (), "window": 5}
    one, states = training(network(family), **huge), {}
    with pytest.raises(TrainingDiverged) as caught:
        one.run(lambda now, news: states.setdefault(news.iteration, now.last_good))
    expected = naive_divergence(network(family), batches(one), [0.01] * 7 + [1e30] * 5)
    assert expected in (8, 9, 10)
    text = str(caught.value)
    assert text.startswith(f"the loss is not finite at iteration {expected}, learning rate 1e+30, first in ")
    assert text.endswith("; the weights of iteration 5, the last good ones, are kept")
    layer = text.split("first in ")[1].split(";")[0]
    assert layer in dict(one.network.named_modules())
    assert not any(dict(one.network.named_modules())[layer].children())
    assert list(states) == [5]
    assert_same(one.state(), states[5])
    assert all(torch.isfinite(tensor).all() for tensor in one.network.state_dict().values())


def test_a_probe_that_watched_goes_back_too():
    probe = Watching()
    one = training(bombed(8), probes=[probe])
    with pytest.raises(TrainingDiverged):
        one.run()
    assert [row[0] for row in probe.rows] == list(range(6))
    assert hook_count(one.network) == 0


# -- what a training leaves alone --------------------------------------------------------------------------------


def random_states() -> tuple:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def assert_random_states(before: tuple) -> None:
    after = random_states()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


def test_the_callers_random_numbers_and_grad_mode_are_left_alone(files):
    before = random_states()
    one = make("dropout", files)
    one.run()
    one.finish()
    other = make("dropout-files", files)
    other.run()
    other.finish()
    rp.train("cifar/plain-8", digits(), recipe(), device="cpu", precision="fp32", progress=False)
    assert_random_states(before)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_the_callers_random_numbers_are_left_alone_by_an_exception(files):
    before, one = random_states(), make("dropout", files)

    def stop(now, news):
        torch.rand(3)
        raise Stop

    with pytest.raises(Stop):
        one.run(stop)
    assert_random_states(before)
    diverging = training(bombed(2))
    with pytest.raises(TrainingDiverged):
        diverging.run()
    assert_random_states(before)
    assert torch.is_grad_enabled()


def test_the_callers_random_numbers_do_not_matter(files):
    ends = []
    for draws in (0, 5):
        torch.rand(draws)
        one = make("dropout", files)
        one.run()
        ends.append(one.state())
    assert_same(*ends)


def test_no_generator_of_another_device_is_seeded(monkeypatch):
    def never(seed):
        raise AssertionError("the caller's CUDA generators were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", never)
    one = rp.train("cifar/plain-8", digits(), recipe(), seed=4, device="cpu", precision="fp32", progress=False)
    assert one.metrics["iterations"] == 12


# -- probes that watch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"bn_batch": 8}, {"precision": "bf16"}], ids=["whole", "parts", "bf16"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_probe_that_watches_changes_no_bit(step, changes):
    probe = Watching()
    probe.schedule = rp.probes.every(step)
    watched, alone = training(probes=[probe], **changes), training(**changes)
    watched.run()
    alone.run()
    assert_same(watched.network.state_dict(), alone.network.state_dict())
    assert_same(watched.rows, alone.rows)
    assert_same(watched.finish()[0], alone.finish()[0])
    assert [row[0] for row in probe.rows] == list(range(0, 12, step))
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in alone.network.modules())
    passes = 2 if "bn_batch" in changes else 1
    assert all(len(row) == 2 + layers * passes for row in probe.rows)
    assert hook_count(watched.network) == 0


def test_a_probe_sees_the_gradients_the_optimizer_will_use():
    seen, grads = [], []

    class Gradients(rp.Probe):
        name = "gradients"

        def after_backward(self, network, iteration):
            seen.append([parameter.grad.clone() for parameter in network.parameters()])

        def table(self):
            return pandas.DataFrame()

    one = training(probes=[Gradients()], iterations=2, milestones=(), bn_batch=8)
    one.run()
    twin = network().train()
    images, labels = next(batches(one))
    for half in (slice(0, 8), slice(8, 16)):
        (F.cross_entropy(twin(images[half]), labels[half]) / 2).backward()
    grads = [parameter.grad for parameter in twin.parameters()]
    assert len(seen) == 2
    for mine, expected in zip(seen[0], grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


class Failing(Watching):
    """Fails where it is told."""

    name = "failing"
    where = ""

    def hook(self, network):
        yield from super().hook(network)
        if self.where == "hook":
            raise RuntimeError("hook")

    def look(self, module, inputs, output):
        if self.where == "forward":
            raise RuntimeError("forward")

    def after_backward(self, network, iteration):
        raise RuntimeError("after_backward")


@pytest.mark.parametrize("where", ["hook", "forward", "after_backward"])
def test_no_hook_is_left_where_a_probe_fails(where):
    probe = Failing()
    probe.where = where
    one = training(probes=[Watching(), probe])
    with pytest.raises(RuntimeError, match=f"^{where}$"):
        one.run()
    assert hook_count(one.network) == 0


def test_no_hook_is_left_where_a_network_or_a_watcher_fails():
    class Breaks(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    net = Stranger()
    net.body.append(Breaks())
    one = training(net, probes=[Watching()])
    with pytest.raises(RuntimeError, match="^broken$"):
        one.run()
    assert hook_count(net) == 0
    other = training(probes=[Watching()])

    def stop(now, news):
        assert hook_count(now.network) == 0, "a log point sees the network without hooks"
        raise Stop

    with pytest.raises(Stop):
        other.run(stop)
    assert hook_count(other.network) == 0


# -- waiting for the device --------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch) -> list[str]:
    """Every call that would make the host wait for a device."""
    called: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        real = getattr(Tensor, name)

        def wrapped(self, *arguments, name=name, real=real, **options):
            called.append(name)
            return real(self, *arguments, **options)

        monkeypatch.setattr(Tensor, name, wrapped)
    return called


@pytest.mark.parametrize("changes", [{}, {"momentum_form": "caffe", "bn_batch": 8}, {"augmentation": "pad-crop"}])
def test_the_host_waits_only_at_log_points(waits, changes):
    one = training(iterations=24, window=8, evaluations=1, **changes)
    by_iteration: list[int] = []
    step = one.step

    def counted(*drawn):
        result = step(*drawn)
        by_iteration.append(len(waits))
        return result

    one.step = counted
    one.test_now = lambda: Evaluation(60, 0, 0.0, 0.0, 0.0)
    waits.clear()
    one.run()
    # Twice in a window's midst, and once at each of its three ends.
    assert waits == ["tolist"] * 3
    assert by_iteration == [0] * 8 + [1] * 8 + [2] * 8
    assert bool(torch.ones(())), "the counters count"
    assert waits[-1] == "__bool__"


# -- on a card ---------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


@pytest.mark.gpu
def test_batches_on_cuda_are_those_of_the_cpu():
    data, chosen = digits(), recipe(augmentation="pad-crop", pad=2)
    normalization = Normalization.fit(data.train.images, "per-pixel-mean")
    ours = tiny.batches(data.train, chosen, 0, normalization, CUDA, 0)
    for (one, one_labels), (other, other_labels) in zip(
        ours, tiny.batches(data.train, chosen, 0, normalization, CPU, 0), strict=True
    ):
        assert one.device.type == "cuda"
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-6)
        assert torch.equal(one_labels.cpu(), other_labels)


@pytest.mark.gpu
def test_training_on_cuda_is_that_on_the_cpu():
    one, other = (training(device=device, iterations=6, learning_rate=0.02) for device in (CUDA, CPU))
    one.run()
    other.run()
    for (name, left), right in zip(one.network.state_dict().items(), other.network.state_dict().values(), strict=True):
        torch.testing.assert_close(
            left.cpu(), right, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert one.finish()[0]["train_loss"] == pytest.approx(other.finish()[0]["train_loss"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("net", [network, Stranger])
def test_a_training_on_cuda_is_taken_up(tmp_path, net):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = training(net(), device=CUDA)
        whole.run(lambda now, news: save_checkpoint(tmp_path / str(now.iteration), now.state()))
        part = training(net(), device=CUDA)
        part.load_state(load_checkpoint(tmp_path / "6"))
        torch.rand(5, device=CUDA)
        part.run()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in part.network.state_dict().items():
        torch.testing.assert_close(tensor, whole.network.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(part.random["cuda"], whole.random["cuda"])


@pytest.mark.gpu
def test_the_callers_cuda_random_numbers_are_left_alone():
    stranger = Stranger()  # it seeds all generators itself
    before = torch.cuda.get_rng_state()
    one = training(stranger, device=CUDA)
    one.run()
    rp.train("cifar/plain-8", digits(), recipe(), device="cuda", precision="fp32", progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.gpu
def test_bf16_on_cuda_learns():
    one = training(device=CUDA, precision="bf16", learning_rate=0.02)
    one.run()
    assert {parameter.dtype for parameter in one.network.parameters()} == {torch.float32}
    assert one.rows[-1]["train_loss"] < one.rows[0]["train_loss"]


@pytest.mark.gpu
def test_nothing_waits_for_the_card_between_log_points():
    one = training(device=CUDA, iterations=8, window=8, evaluations=1, augmentation="pad-crop")
    drawn = one.batches.drawn(0)
    one.network.train()
    one.step(*next(drawn))  # the first of everything may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in itertools.islice(drawn, 3):
            one.iteration += 1
            one.step(*each)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert one.iteration == 3


@pytest.mark.gpu
def test_a_training_on_a_cpu_is_taken_up_on_cuda():
    """Its state has no random numbers of a card: those are the seed's, not the caller's."""
    part = training(network(), device=CPU)
    ends = []
    for caller in (1, 2):
        torch.cuda.manual_seed(caller)
        taken = training(network(), device=CUDA)
        taken.load_state(part.state())
        ends.append(taken.random["cuda"])
        taken.run()
        assert taken.iteration == taken.recipe.iterations
    assert torch.equal(*ends)
