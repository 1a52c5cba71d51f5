"""Runs are found again by what they are, whatever happened to the process that made them."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import RECIPE, assert_same, digits, hook_count, network, one_thread, recipe, spec
from torch import nn

import resprobe as rp
from resprobe import checkpoints, keeping
from resprobe.blocks import BLOCKS, BasicBlock
from resprobe.errors import StorageError, TrainingDiverged, UsageError
from resprobe.evaluation import evaluate
from resprobe.runs import RunConfig, RunStore, configure, default_recipe
from resprobe.training import Training


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def unchanged_code(monkeypatch):
    """A run keeps what was changed in the checkout, of which the tests must not depend."""
    monkeypatch.setattr(keeping, "local_changes", lambda: b"")


def train(folder, net=None, data="digits", chosen=RECIPE, **options) -> rp.Run:
    options = {"device": "cpu", "precision": "fp32", "progress": False, "runs": folder, **options}
    return rp.train(net or spec(), data, chosen, **options)


def config(folder=None, **changes) -> RunConfig:
    return replace(configure(spec(), "digits", RECIPE), **changes)


def tensors(run: rp.Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "network.safetensors")


@pytest.fixture
def no_training(monkeypatch):
    """From the call on, training is a failure."""

    def forbid():
        def fail(*arguments, **options):
            raise AssertionError("it was trained again")

        monkeypatch.setattr(Training, "run", fail)

    return forbid


class Norms(rp.Probe):
    """The gradient's norm, and a figure with many digits."""

    name = "norms"
    schedule = staticmethod(rp.probes.every(4))

    def __init__(self):
        super().__init__()
        self.rows = []

    def hook(self, network):
        yield network.register_forward_hook(lambda *_: None)

    def after_backward(self, network, iteration):
        norm = sum(float(parameter.grad.square().sum()) for parameter in network.parameters())
        self.rows.append({"iteration": iteration, "norm": norm, "third": norm / 3})

    def table(self):
        return pandas.DataFrame(self.rows)

    def state(self):
        return self.rows

    def load_state(self, state):
        self.rows = list(state)


class Norms2(Norms):
    name = "norms2"


# -- found again -------------------------------------------------------------------------------------------------


def test_the_second_call_finds_what_the_first_trained(tmp_path, no_training):
    first = train(tmp_path)
    assert list(first.history.iteration) == [3, 6, 9, 12]
    no_training()
    second = train(tmp_path)
    assert second.metrics == first.metrics
    pandas.testing.assert_frame_equal(second.history, first.history, check_exact=True)
    assert second.path == first.path == RunStore(tmp_path).folder(first.config)
    assert second.config == first.config
    assert RunStore(tmp_path).find(first.config).metrics == first.metrics
    assert RunStore(tmp_path).find(first.config, ["norms"]) is None, "it has no such table"
    assert RunStore(tmp_path).find(replace(first.config, seed=9)) is None


@pytest.mark.parametrize("changes", [b"", b"--- a/resprobe/training.py\n"])
def test_what_is_in_a_runs_folder(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "local_changes", lambda: changes)
    run = train(tmp_path, chosen=recipe(name="mine"))
    names = ["config.json", "environment.json", "history.csv", "lock", "network.safetensors", "result.json"]
    assert sorted(os.listdir(run.path)) == sorted(names + ["local_changes.patch"] * bool(changes))
    if changes:
        assert (run.path / "local_changes.patch").read_bytes() == changes
    assert run.path.name.startswith("cifar-resnet-8_A_digits_12it_seed0_")
    assert run.path.name.endswith(run.config.key)
    told = json.loads((run.path / "config.json").read_text())
    assert told["recipe_name"] == "mine"
    assert told["data_given"] == "digits"
    assert told["network"]["options"] == [list(pair) for pair in run.config.network.options]
    assert json.loads((run.path / "environment.json").read_text())["torch"] in torch.__version__
    assert os.listdir(tmp_path) == [run.path.name]


def test_a_run_that_is_trained_anew_for_a_probe_keeps_its_figures(tmp_path):
    first = train(tmp_path)
    watched = train(tmp_path, probes=[Norms()])  # it ends alike, and nothing is said
    assert watched.metrics == first.metrics
    assert len(watched.tables["norms"])
    result, weights = first.path / "result.json", (first.path / "network.safetensors").read_bytes()
    result.write_text(json.dumps({"metrics": first.metrics | {"train_loss": 1.0, "train_error": 12.0}}))
    shutil.rmtree(first.path / "probes")  # as if that had been another machine's
    with pytest.warns(
        UserWarning,
        match="was trained anew for a probe's table and ended with training error .*, not training error 12",
    ):
        again = train(tmp_path, probes=[Norms()])
    assert again.metrics["train_error"] == train(tmp_path).metrics["train_error"] == 12.0
    assert (first.path / "network.safetensors").read_bytes() == weights
    assert_same(again.network.state_dict(), first.network.state_dict())
    pandas.testing.assert_frame_equal(again.tables["norms"], watched.tables["norms"])


def test_a_strangers_source_is_kept_with_the_run(tmp_path, monkeypatch, clean_registries):
    """As it was when it was loaded, with what it imports from beside it: it may be edited, or lost."""
    (tmp_path / "mine").mkdir()
    helper, file, block = "FACTOR = 2\n", tmp_path / "mine" / "strange.py", f"import beside_strange\n{BLOCK}"
    (tmp_path / "mine" / "beside_strange.py").write_text(helper)
    file.write_text(block)
    monkeypatch.syspath_prepend(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "beside_strange", None)  # so that it is forgotten after the test
    del sys.modules["beside_strange"]
    rp.load_plugin(str(file))
    file.write_text("edited since")
    run = train(tmp_path / "runs", spec(block="strange"))
    assert {path.name: path.read_text() for path in run.path.glob("sources/*/*")} == {
        "strange.py": block,
        "beside_strange.py": helper,
    }


def test_the_environment_says_how_steps_ran_not_how_they_were_to(tmp_path, monkeypatch):
    prepare = Training.__init__

    def on_a_card(training, *args, **options):
        prepare(training, *args, **options)
        training.how, training.capturing = "graph", True

    def fail(work, device):
        steps = json.loads(next(tmp_path.glob("*/environment.json")).read_text())["step"]
        raise RuntimeError(f"begun as {steps}")

    monkeypatch.setattr(Training, "__init__", on_a_card)
    monkeypatch.setattr("resprobe.steps._warm_up", fail)
    with pytest.warns(UserWarning, match="runs as it is written: begun as graph"):
        run = train(tmp_path)
    assert json.loads((run.path / "environment.json").read_text())["step"] == "eager"


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(None)
    assert run.path is None
    assert os.listdir(tmp_path) == []
    kept = train(tmp_path)
    assert_same(run.metrics, kept.metrics)
    assert_same(dict(run.network.state_dict()), dict(kept.network.state_dict()))


def test_the_network_is_read_again_and_gives_equal_outputs(tmp_path):
    first = train(tmp_path, seed=2)
    second = train(tmp_path, seed=2)
    images = rp.load_data("digits").test.images
    assert second.network is second.network
    assert second.network is not first.network
    assert_same(dict(second.network.state_dict()), dict(first.network.state_dict()))
    for one, other in zip(first.network.modules(), second.network.modules(), strict=True):
        assert (one.training, other.training) == (False, False)
    with torch.no_grad():
        one, other = (run.network(run.network.normalization(images)) for run in (first, second))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    tested = evaluate(second.network, "digits", device="cpu")
    assert tested.error == pytest.approx(first.metrics["test_error"])
    assert {parameter.device.type for parameter in second.network.parameters()} == {"cpu"}


def test_the_running_statistics_are_kept_beside_the_precise_ones(tmp_path):
    run = train(tmp_path)
    stored = tensors(run)
    precise, running = (stored[f"{part}.stem.norm.running_mean"] for part in ("network", "running"))
    assert not torch.equal(precise, running)
    assert torch.equal(precise, run.network.stem.norm.running_mean)
    twin = train(None, chosen=recipe(bn_test_statistics="running"))
    assert torch.equal(twin.network.stem.norm.running_mean, running)
    assert twin.metrics["test_error"] == run.metrics["test_error_running"]


def test_reading_a_network_draws_no_random_numbers_and_runs_no_code(tmp_path, monkeypatch):
    train(tmp_path)
    found = RunStore(tmp_path).find(config())

    def never(*arguments, **options):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr("pickle.load", never)
    monkeypatch.setattr("pickle.loads", never)
    monkeypatch.setattr(torch, "load", never)
    before = torch.get_rng_state()
    assert isinstance(found.network, rp.Network)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_initial_weights_are_the_seeds(tmp_path):
    starts = []

    class Start(rp.Probe):
        name = "start"
        schedule = staticmethod(rp.probes.at([0]))

        def after_backward(self, network, iteration):
            starts.append({name: tensor.clone() for name, tensor in network.named_parameters()})

        def table(self):
            return pandas.DataFrame()

    for seed in (3, 3, 4):
        torch.rand(2)
        train(None, seed=seed, probes=[Start()])
    expected = dict(network(seed=3).named_parameters())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in starts[0].items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in starts[1].items())
    assert not torch.equal(starts[2]["fc.weight"], starts[0]["fc.weight"])


# -- keys --------------------------------------------------------------------------------------------------------

CHANGED_RECIPE = {
    "iterations": 13,
    "batch_size": 17,
    "learning_rate": 0.06,
    "milestones": (5, 10),
    "decay": 9.0,
    "plateau": 3,
    "warm_up_rate": 0.01,
    "warm_up_until": 79.0,
    "warm_up_iterations": 5,
    "momentum": 0.8,
    "momentum_form": "caffe",
    "nesterov": True,
    "weight_decay": 2e-4,
    "weight_decay_on": "weights",
    "bn_batch": 8,
    "bn_test_statistics": "running",
    "augmentation": "pad-crop",
    "pad": 3,
    "pad_value": "black",
    "flip": 0.25,
    "scale": (256, 300),
    "crop": 200,
    "colour": "pca",
    "normalization": "channel-mean-std",
    "validation_fraction": 0.1,
    "window": 4,
    "evaluations": 3,
}


def test_every_field_of_a_recipe_but_its_name_is_tried():
    assert set(CHANGED_RECIPE) == set(asdict(RECIPE)) - {"name"}


@pytest.mark.parametrize("name", CHANGED_RECIPE)
def test_any_change_of_the_recipe_is_another_run(name):
    needed = {"warm_up_iterations": {"warm_up_rate": 0.01}, "colour": {"augmentation": "scale-crop"}}.get(name, {})
    usual, changed = config(recipe=recipe(**needed)), config(recipe=recipe(**needed, **{name: CHANGED_RECIPE[name]}))
    assert changed.key != usual.key
    assert changed.folder_name != usual.folder_name


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"precision": "bf16"},
        {"start": "0123456789abcdef"},
        {"data_identity": "other"},
        {"network": rp.NetworkSpec("cifar/resnet", 14, spec().options)},
        {"network": rp.NetworkSpec("cifar/plain", 8, spec().options)},
        {"network": spec(width=5)},
        {"network": spec(shortcut="B")},
        {"network": spec(norm="group")},
    ],
    ids=str,
)
def test_any_change_of_what_a_run_is_is_another_run(changes):
    assert config(**changes).key != config().key


def test_what_a_run_is_called_and_where_its_data_are_does_not_matter():
    assert config(recipe=recipe(name="another")).key == config().key
    assert config(data="digits:/elsewhere").key == config().key
    assert config().key == config().key
    assert len(config().key) == 12


@settings(max_examples=30)
@given(
    one=st.tuples(st.integers(0, 3), st.sampled_from([4, 5]), st.sampled_from(["fp32", "bf16"]), st.integers(1, 3)),
    other=st.tuples(st.integers(0, 3), st.sampled_from([4, 5]), st.sampled_from(["fp32", "bf16"]), st.integers(1, 3)),
)
def test_keys_are_equal_exactly_where_runs_are(one, other):
    def key(parts):
        seed, width, precision, iterations = parts
        chosen = recipe(iterations=iterations)
        return config(seed=seed, network=spec(width=width), precision=precision, recipe=chosen).key

    assert (key(one) == key(other)) == (one == other)


def test_two_copies_of_a_folder_are_one_data_set(tmp_path, no_training):
    from PIL import Image

    for copy in ("here", "there"):
        for part in ("train", "val"):
            for index, label in enumerate("ab"):
                folder = tmp_path / copy / part / label
                folder.mkdir(parents=True)
                for number in range(3):
                    Image.new("RGB", (8, 8), (80 * index, 10 * number, 0)).save(folder / f"{number}.png")
    chosen = recipe(batch_size=4, iterations=3, window=1)
    first = train(tmp_path / "runs", "cifar/plain-8", f"folder:{tmp_path / 'here'}", chosen)
    no_training()
    second = train(tmp_path / "runs", "cifar/plain-8", f"folder:{tmp_path / 'there'}", chosen)
    assert second.metrics == first.metrics
    assert (tmp_path / "there" / "train" / "a" / "0.png").write_bytes(b"another size")
    with pytest.raises(UsageError, match=r"0\.png"):
        train(tmp_path / "runs", "cifar/plain-8", f"folder:{tmp_path / 'there'}", chosen)


def test_data_of_ones_own_are_known_by_their_identity(tmp_path, no_training):
    mine, other = digits(), digits(train=150)
    first = train(tmp_path, data=mine)
    assert first.metrics["train_images"] == 160
    assert first.config.key not in (configure(spec(), "digits", RECIPE).key, configure(spec(), other, RECIPE).key)
    assert configure(spec(), rp.load_data("digits"), RECIPE).key == configure(spec(), "digits", RECIPE).key
    no_training()
    assert train(tmp_path, data=mine).metrics == first.metrics
    with pytest.raises(AssertionError, match="it was trained again"):
        train(tmp_path, data=other)


BLOCK = """
import resprobe as rp
from resprobe.blocks import BasicBlock

@rp.register_block("strange")
class Strange(BasicBlock):
    \"\"\"A block of a stranger's.\"\"\"
    number = 1
"""


def strange_key(file: Path, source: str) -> str:
    """The key of a run with the block that `source` defines."""
    file.write_text(source)
    rp.load_plugin(str(file))
    try:
        return configure(spec(block="strange"), "digits", RECIPE).key
    finally:
        BLOCKS._things.pop("strange")
        for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", "") == str(file)]:
            del sys.modules[name]


def test_a_strangers_block_is_known_by_its_source(tmp_path):
    one = strange_key(tmp_path / "one.py", BLOCK)
    assert strange_key(tmp_path / "two.py", BLOCK) == one, "where the file is does not matter"
    assert strange_key(tmp_path / "three.py", BLOCK.replace("number = 1", "number = 2")) != one
    with BLOCKS.temporary("strange", BasicBlock):
        assert configure(spec(block="strange"), "digits", RECIPE).key != one


# -- networks that were handed over built ------------------------------------------------------------------------


class Own(nn.Module):
    """A network of no family."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.fc, self.norm = nn.Linear(64, 10), nn.BatchNorm1d(10)
        with torch.no_grad():
            self.fc.weight *= scale

    def forward(self, x):
        return self.norm(self.fc(x.flatten(1)))


@pytest.mark.parametrize("make", [network, Own])
def test_a_built_network_is_trained_in_place_and_found_in_place(tmp_path, no_training, make):
    first, before = make(), make()
    run = train(tmp_path, first)
    assert run.network is first
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), before.parameters(), strict=True))
    no_training()
    second = make()
    again = train(tmp_path, second)
    assert again.network is second
    assert again.metrics == run.metrics
    assert_same(dict(second.state_dict()), dict(first.state_dict()))
    assert not first.training
    assert not second.training
    if make is network:
        assert torch.equal(second.normalization.mean, first.normalization.mean)
        one, other = (evaluate(net, "digits", device="cpu") for net in (first, second))
        assert (one.errors, one.loss) == (other.errors, pytest.approx(other.loss, rel=1e-6))


def test_a_built_network_is_known_by_its_weights_and_what_learns(tmp_path):
    assert configure(Own(), "digits", RECIPE).key == configure(Own(), "digits", RECIPE).key
    keys = [configure(net, "digits", RECIPE).key for net in (Own(), Own(1.5), network(), network(seed=1))]
    frozen = Own()
    frozen.fc.weight.requires_grad_(False)
    keys += [configure(frozen, "digits", RECIPE).key, config().key]
    assert len(set(keys)) == len(keys)


def test_a_strangers_network_is_known_by_its_source(tmp_path, monkeypatch):
    source = (
        "from torch import nn\nclass Mine(nn.Linear):\n    def forward(self, x): return super().forward(x.flatten(1))\n"
    )
    keys = []
    for index, text in enumerate([source, source, source.replace("flatten(1)", "flatten(1) * 2")]):
        module = f"strangers_network_{index}"
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        made = __import__(module).Mine(64, 10)
        nn.init.zeros_(made.weight)
        nn.init.zeros_(made.bias)
        keys.append(configure(made, "digits", RECIPE).key)
        del sys.modules[module]
    assert keys[0] == keys[1] != keys[2]


# -- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, None])
def test_a_seed_is_a_whole_number_from_0_on(tmp_path, seed):
    with pytest.raises(UsageError) as caught:
        train(tmp_path, seed=seed)
    assert str(caught.value) == f"seed (={seed!r}) must be a whole number ≥ 0"
    with pytest.raises(UsageError, match="must be a whole number ≥ 0"):
        config(seed=seed)
    assert list(tmp_path.rglob("result.json")) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"iterations": 20},
            "iterations is the recipe's: recipe=rp.default_recipe(data, iterations=…), or one of rp.recipes",
        ),
        ({"epochs": 2}, "epochs is the recipe's: recipe=rp.default_recipe(data, iterations=…)"),
        ({"lr": 0.1}, "lr is the recipe's: recipe=dataclasses.replace(rp.default_recipe(data), learning_rate=…)"),
        ({"probe": "flops"}, "probe is no option of train; nearest: probes"),
        ({"blok": "basic"}, "option of cifar/resnet (='blok') is unknown; accepted: block"),
        ({"shortcut": "D"}, "shortcut (='D') is unknown; accepted: A"),
        ({"shortcut": ["A"]}, "shortcut (=['A']) must be a text, a number, True, False, None or a tuple"),
        ({"probes": None}, "probes (=None) must be a list of names or probes"),
        ({"runs": True}, "runs (=True) must be a folder, or None to keep nothing"),
    ],
)
def test_what_is_asked_in_another_place_is_said_in_one_line(options, text):
    given = {"recipe": RECIPE, "progress": False, "device": "cpu"} | options
    with pytest.raises(UsageError) as caught:
        rp.train("cifar/resnet-8", "digits", **given)
    assert str(caught.value).startswith(text)


def test_numbers_of_numpys_are_numbers():
    asked = configure("cifar/resnet-8", "digits", RECIPE, seed=np.int64(3), width=np.int32(4))
    assert asked == configure("cifar/resnet-8", "digits", RECIPE, seed=3, width=4)
    assert asked.key == configure("cifar/resnet-8", "digits", RECIPE, seed=3, width=4).key
    changed = replace(RECIPE, learning_rate=np.float64(0.5), milestones=[np.int64(2), 3])
    assert changed == replace(RECIPE, learning_rate=0.5, milestones=(2, 3))
    assert {type(changed.learning_rate), *map(type, changed.milestones)} == {float, int}
    assert rp.recipes.cifar_paper(np.int64(100)) == rp.recipes.cifar_paper(100)


def test_a_network_that_does_not_fit_the_data_is_refused_before_training(tmp_path, no_training):
    no_training()
    with pytest.raises(UsageError) as caught:
        train(tmp_path, rp.NetworkSpec("cifar/resnet", 8, (("width", 4), ("in_channels", 3), ("num_classes", 10))))
    assert str(caught.value) == "in_channels (=3) of cifar/resnet-8 does not fit data 'digits', which has 1"


@pytest.mark.parametrize("probes", [[Norms(), Norms()], [rp.Probe()]])
def test_probes_need_a_name_each(tmp_path, probes):
    names = ", ".join(repr(probe.name) for probe in probes)
    with pytest.raises(UsageError) as caught:
        train(tmp_path, probes=probes)
    assert str(caught.value) == f"probes ({names}) must have a name each, and each its own"


def test_the_default_recipe_is_the_papers_but_for_the_digits():
    assert default_recipe(rp.load_data("digits")).name == "digits-quick"
    assert default_recipe(rp.load_data("digits"), 40).iterations == 40
    cifar = replace(digits(), name="cifar10")
    assert default_recipe(cifar) == rp.recipes.cifar_paper()
    assert default_recipe(cifar, depth=110) == rp.recipes.cifar_paper(depth=110)
    assert configure("cifar/resnet-8", "digits").recipe == rp.recipes.digits_quick()


def test_a_progress_function_is_told_and_the_bar_shows(tmp_path, capfd):
    told = []
    train(tmp_path / "one", progress=told.append)
    assert [news.iteration for news in told] == [3, 6, 9, 12]
    assert capfd.readouterr() == ("", "")
    train(tmp_path / "two", progress=True)
    shown = capfd.readouterr().err
    assert "cifar/resnet-8 seed 0" in shown
    assert "12/12" in shown
    assert "images/s" in shown


# -- probes ------------------------------------------------------------------------------------------------------


def test_tables_of_probes_are_kept_and_found(tmp_path, no_training):
    first = train(tmp_path, probes=[Norms()])
    assert list(first.tables) == ["norms"]
    assert list(first.tables["norms"].iteration) == [0, 4, 8]
    assert hook_count(first.network) == 0
    no_training()
    second = train(tmp_path, probes=[Norms()])
    pandas.testing.assert_frame_equal(second.tables["norms"], first.tables["norms"], check_exact=True)
    assert train(tmp_path).tables == {}, "who asks for no table gets none"


@pytest.mark.parametrize(
    ("table", "error", "said"),
    [
        (lambda: [1, 2], UsageError, r"^probe norms: table\(\) must give a pandas.DataFrame, not \[1, 2\]$"),
        (lambda: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
)
def test_a_table_that_fails_does_not_take_the_run_with_it(tmp_path, no_training, table, error, said):
    class LateToFail(Norms):
        def table(self):
            return super().table() if len(self.rows) < 2 else table()

    with pytest.raises(error, match=said):
        train(tmp_path, probes=[LateToFail()])
    with pytest.raises(error, match=said):
        rp.train("cifar/resnet-8", "digits", RECIPE, probes=[LateToFail()], progress=False, device="cpu")
    seen = Norms()
    no_training()
    found = train(tmp_path)
    assert found.metrics["iterations"] == RECIPE.iterations
    assert rp.RunStore(tmp_path).find(found.config, [seen]) is None  # its table is not there


def test_a_table_that_cannot_be_made_is_told_where_training_begins(tmp_path):
    class Failing(Norms):
        def table(self):
            return pandas.DataFrame([[1, 2]], columns=["one"])

    class Silent(rp.Probe):
        name = "silent"

    with (
        pytest.raises(ValueError, match="1 columns passed"),
        pytest.warns(UserWarning, match=r"^probe norms: table\(\) fails after its first measurement: ValueError: "),
    ):
        train(tmp_path, probes=[Failing()])
    with pytest.raises(UsageError, match=r"^probe \(='silent'\) must define table\(\), "):
        train(tmp_path, probes=[Silent()])


def test_to_try_a_table_changes_neither_the_probe_nor_the_training(tmp_path):
    class Draining(Norms):
        def table(self):
            rows, self.rows = self.rows, []
            return pandas.DataFrame(rows).assign(drawn=torch.rand(()).item())

    class Dropping(BasicBlock):
        def make_activation(self):
            return torch.nn.Dropout(0.5)

    with BLOCKS.temporary("dropping", Dropping):
        net = spec(block="dropping")
        watched, alone = train(tmp_path / "watched", net, probes=[Draining()]), train(tmp_path / "alone", net)
    assert watched.metrics["train_loss"] == alone.metrics["train_loss"]
    assert list(watched.tables["norms"].iteration) == [0, 4, 8]


def test_a_run_is_shown_in_a_line(tmp_path):
    run = train(tmp_path)
    start = "Run(cifar/resnet-8 on digits, 12 iterations, seed 0: training error "
    assert repr(run).startswith(start)
    assert repr(run).endswith(f" %, {run.path})")
    shown = repr(rp.load_data("digits"))
    assert "train=ImageSet(1437 images of 1×8×8), test=ImageSet(360 images of 1×8×8)" in shown


def test_a_table_that_is_found_has_the_kinds_of_the_fresh_one(tmp_path, no_training):
    class Kinds(Norms):
        name = "kinds"

        def table(self):
            columns = {"layer": ["0", "1_0"], "count": [1, 2], "share": [0.5, None], "is_last": [False, True]}
            return pandas.DataFrame(columns | {"text": ["", "nan"], "said": [None, True]})

    first = train(tmp_path, probes=[Kinds()]).tables["kinds"]
    no_training()
    second = train(tmp_path, probes=[Kinds()]).tables["kinds"]
    assert second["layer"].tolist() == ["0", "1_0"] and second["is_last"].tolist() == [False, True]
    exact = ["layer", "count", "share", "is_last", "text"]
    pandas.testing.assert_frame_equal(second[exact], first[exact], check_exact=True)


def test_named_data_are_read_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("resprobe.runs.load_data", lambda name: read.append(name) or rp.load_data(name))
    run = train(tmp_path)
    assert sum(isinstance(name, str) for name in read) == 1 and run.config.data == "digits"


def test_data_with_a_validation_part_of_their_own_are_found(tmp_path, no_training):
    data = digits()
    mine = replace(data, train=data.train.select(torch.arange(100)), validation=data.train, identity="mine")
    first = train(tmp_path, data=mine)
    assert first.metrics["validation_images"] == 160
    no_training()
    assert train(tmp_path, data=mine).metrics == first.metrics


def test_a_strangers_own_spec_is_not_ours():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.spec = {"layers": 1}
    run = train(None, net)
    assert run.config.network.name == "module/Sequential"
    assert rp.evaluate(net, "digits", device="cpu").images == 360


def test_a_run_without_the_table_is_made_again_and_is_the_same(tmp_path):
    first = train(tmp_path)
    second = train(tmp_path, probes=[Norms()])
    assert len(second.tables["norms"]) == 3
    assert_same(second.metrics, first.metrics)
    third = train(tmp_path, probes=[Norms(), Norms2()])
    assert list(third.tables) == ["norms", "norms2"]
    assert_same(dict(third.network.state_dict()), dict(first.network.state_dict()))


# -- interruptions in this process -------------------------------------------------------------------------------


def stop_at(iteration: int, error: BaseException | None = None):
    def watch(news):
        if news.iteration == iteration:
            raise error or KeyboardInterrupt

    return watch


def result_of(run: rp.Run) -> dict:
    history = run.history.drop(columns="seconds").to_dict("list")
    return {"tensors": tensors(run), "metrics": run.metrics, "history": history}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    return result_of(train(tmp_path_factory.mktemp("whole"), probes=[Norms()]))


def test_an_interrupt_keeps_a_checkpoint_and_the_next_call_goes_on(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=stop_at(6))
    folder = RunStore(tmp_path).folder(config())
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / "result.json").exists()
    assert checkpoints.load_checkpoint(folder / "checkpoint.pt")["iteration"] == 6
    told = []
    run = train(tmp_path, progress=told.append)
    assert [news.iteration for news in told] == [9, 12], "what was done is not done again"
    assert_same(result_of(run), whole)
    assert not list(folder.glob("checkpoint*"))


def test_an_interrupt_before_the_first_log_point_begins_again(tmp_path, whole, monkeypatch):
    real = Training.step

    def interrupted(self, *drawn):
        if self.iteration == 1:
            raise KeyboardInterrupt
        return real(self, *drawn)

    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.setattr(Training, "step", real)
    assert_same(result_of(train(tmp_path)), whole)


def test_tables_go_on_after_an_interruption(tmp_path):
    undisturbed = train(tmp_path / "one", probes=[Norms()])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "two", probes=[Norms()], progress=stop_at(6))
    resumed = train(tmp_path / "two", probes=[Norms()])
    pandas.testing.assert_frame_equal(resumed.tables["norms"], undisturbed.tables["norms"], check_exact=True)


def test_a_run_begun_without_the_probe_begins_again_and_says_so(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=stop_at(6))
    with pytest.warns(UserWarning, match="was begun without the probes asked for now; it begins again$"):
        run = train(tmp_path, probes=[Norms()])
    assert list(run.tables["norms"].iteration) == [0, 4, 8]
    assert_same(result_of(run), whole)


def test_a_begin_with_other_probes_that_is_broken_off_leaves_what_was_done(tmp_path, whole):
    """It has nothing to keep, and the checkpoint of the other begin has."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=stop_at(6))
    before = RunStore(tmp_path).iterations_done(config())

    class Stopping(Norms):
        def after_backward(self, network, iteration):
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="it begins again$"), pytest.raises(KeyboardInterrupt):
        train(tmp_path, probes=[Stopping()])
    assert RunStore(tmp_path).iterations_done(config()) == before == 6
    checkpoint = checkpoints.load_checkpoint(RunStore(tmp_path).folder(config()) / "checkpoint.pt")
    assert checkpoint["iteration"] == 6
    assert_same(result_of(train(tmp_path)), whole)


def test_an_interrupt_is_one_though_nothing_can_be_written(tmp_path, monkeypatch):
    """A full disk must not take its place: the next run would be begun."""

    def full(*_):
        raise StorageError("cannot write there: no space left on device")

    monkeypatch.setattr(keeping, "save_checkpoint", full)
    with pytest.warns(UserWarning, match="no space left on device"), pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=stop_at(6))


def test_a_probe_without_state_is_told_of_when_a_run_goes_on(tmp_path):
    class Forgetting(Norms):
        name = "forgetting"
        state, load_state = rp.Probe.state, rp.Probe.load_state

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, probes=[Forgetting()], progress=stop_at(6))
    said = "goes on from iteration 6, and probe forgetting has no state(): its table lacks what was seen before"
    with pytest.warns(UserWarning, match=re.escape(said)):
        run = train(tmp_path, probes=[Forgetting()])
    assert list(run.tables["forgetting"].iteration) == [8]


@pytest.mark.parametrize("name", ["result.json", "norms.json"])
def test_what_cannot_be_read_now_is_not_made_again(name, tmp_path, monkeypatch):
    run, read = train(tmp_path, probes=[Norms()]), Path.read_text

    def away(file, *arguments, **options):
        if file.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return read(file, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", away)
    with pytest.raises(StorageError, match=f"^cannot read {run.path}: Input/output error$"):
        train(tmp_path, probes=[Norms()])


def test_a_probe_whose_state_no_checkpoint_keeps_is_told_of(tmp_path, whole, monkeypatch):
    """It would be written, and be taken for damaged when it is read."""

    class Odd(Norms):
        def state(self):
            return [{"iteration": row["iteration"], "norm": np.float64(row["norm"])} for row in self.rows]

    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0)
    said = r"state\(\) of probe norms holds a numpy.float64, which no checkpoint keeps; accepted: tensors, "
    with pytest.warns(UserWarning, match=said) as told, pytest.raises(KeyboardInterrupt):
        train(tmp_path, probes=[Odd()], progress=stop_at(6))
    assert len(told) == 1
    assert RunStore(tmp_path).iterations_done(config()) == 0
    with pytest.warns(UserWarning, match=said):
        run = train(tmp_path, probes=[Odd()])
    assert_same(result_of(run), whole)
    assert list(run.tables["norms"].iteration) == [0, 4, 8]


def test_a_table_is_never_found_under_what_is_said_of_another(tmp_path):
    run = train(tmp_path, probes=[Norms()])
    about = run.path / "probes" / "norms.json"
    store, chosen = RunStore(tmp_path), config()
    assert store.find(chosen, [Norms()]) is not None
    about.write_text("{")
    assert store.find(chosen, [Norms()]) is None
    about.unlink()  # as runs of old have it
    assert store.find(chosen, [Norms()]) is not None


def test_divergence_names_the_run_and_keeps_the_last_good_weights(tmp_path):
    huge = recipe(learning_rate=1e30, warm_up_rate=0.01, warm_up_iterations=7, milestones=())
    for _ in range(2):  # from the start, and from the checkpoint
        with pytest.raises(TrainingDiverged) as caught:
            train(tmp_path, chosen=huge, seed=3)
        text = str(caught.value)
        assert text.startswith(
            "cifar/resnet-8, seed 3: the loss is not finite at iteration 9, learning rate 1e+30, first in"
        )
        folder = RunStore(tmp_path).folder(config(recipe=huge, seed=3))
        assert text.endswith(f"; the weights of iteration 6, the last good ones, are kept in {folder}")
        kept = checkpoints.load_checkpoint(folder / "checkpoint.pt")
        assert kept["iteration"] == 6
        assert all(torch.isfinite(tensor).all() for tensor in kept["network"].values())
    assert not (folder / "result.json").exists()


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"metrics": {"test_er', b"[]", b"3", b'{"other": 1}', b'{"metrics": {}}', b"\xff\xfe\x00"],
    ids=repr,
)
def test_a_damaged_result_is_said_and_made_again(tmp_path, whole, content):
    run = train(tmp_path)
    (run.path / "result.json").write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged") as caught:
        again = train(tmp_path)
    assert str(caught[0].message).startswith(f"the result in {run.path} is damaged (")
    assert str(caught[0].message).endswith("; the run is made again")
    assert_same(result_of(again), whole)
    assert RunStore(tmp_path).find(run.config).metrics == again.metrics


def test_other_data_of_the_same_identity_are_refused(tmp_path):
    data = digits()
    common = {"recipe": recipe(iterations=2), "runs": tmp_path, "device": "cpu", "progress": False}
    rp.train("cifar/resnet-8", data, **common)
    fewer = replace(data, train=data.train.select(torch.arange(100)))
    with pytest.raises(
        UsageError, match=r"with 160 training images, not 100, are those of .*; give yours an identity of its"
    ):
        rp.train("cifar/resnet-8", fewer, **common)
    assert rp.train("cifar/resnet-8", replace(fewer, identity="mine"), **common).metrics["train_images"] == 100


def test_a_damaged_history_is_said_and_made_again(tmp_path, whole):
    run = train(tmp_path)
    (run.path / "history.csv").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        assert_same(result_of(train(tmp_path)), whole)


def test_a_missing_history_is_made_again(tmp_path, whole):
    run = train(tmp_path)
    (run.path / "history.csv").unlink()
    assert_same(result_of(train(tmp_path)), whole)


@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, whole, monkeypatch, both):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=stop_at(9))
    folder = RunStore(tmp_path).folder(config())
    files = [folder / "checkpoint.pt", folder / "checkpoint.pt.previous"]
    # What was saved before the interruption is the same log point: let the one before be an earlier one.
    assert checkpoints.load_checkpoint(files[0])["iteration"] == 9
    for file in files[: 2 if both else 1]:
        content = file.read_bytes()
        file.write_bytes(content[:-100] + bytes(100))
    told = []
    with pytest.warns(UserWarning, match="is damaged and was passed over") as caught:
        run = train(tmp_path, progress=told.append)
    assert [str(warning.message) for warning in caught] == [
        f"checkpoint {file} is damaged and was passed over" for file in files[: 2 if both else 1]
    ]
    assert told[0].iteration == (3 if both else 12)
    assert_same(result_of(run), whole)


# -- places that cannot be written -------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["file", "file/runs", "file/deeper/runs"])
def test_a_folder_that_cannot_be_is_said_before_training(tmp_path, no_training, below):
    (tmp_path / "file").write_text("mine")
    no_training()
    with pytest.raises(rp.UsageError) as caught:
        train(tmp_path / below)
    why = "it is a file, not a folder" if below == "file" else ""
    assert str(caught.value).startswith(f"runs (={str(tmp_path / below)!r}) cannot be written to: {why}")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder_is_said_before_training(tmp_path, no_training, monkeypatch):
    real = Path.open

    def read_only(self, mode="r", *arguments, **options):
        if "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(self, mode, *arguments, **options)

    no_training()
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(rp.UsageError) as caught:
        train(tmp_path)
    assert str(caught.value) == f"runs (={str(tmp_path)!r}) cannot be written to: Read-only file system"
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", range(9))
def test_a_full_disk_half_way_leaves_nothing_half_written(tmp_path, whole, monkeypatch, failing):
    """The disk is full from the `failing`-th file on, then it is not."""
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0)
    store, real, calls = RunStore(tmp_path), os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2 * failing:  # a file's and its folder's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        train(store)
    assert str(caught.value).startswith(f"cannot write {tmp_path}")
    assert str(caught.value).endswith(": No space left on device; nothing was half-written")
    monkeypatch.setattr(os, "fsync", real)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("result.json"))
    told = []
    run = train(store, progress=told.append)
    saved = max(0, (failing - 2 + 1) // 2)  # after two descriptions, a checkpoint and a history a log point
    assert [news.iteration for news in told] == [3, 6, 9, 12][min(saved, 4) :]
    assert_same(result_of(run), whole)


# -- processes ---------------------------------------------------------------------------------------------------

LONG = replace(RECIPE, iterations=40, milestones=(20, 30), window=1, evaluations=4, momentum_form="caffe")


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything, in milliseconds, and ends those that are left."""
    if not hasattr(os, "fork"):
        pytest.skip("needs a server of forks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "resprobe.runs",
            "pandas",
            "sklearn.datasets",
            "sklearn.model_selection",
            "torch._dynamo",
            "pytest",
            "hypothesis",
        ]
    )
    started = []

    def start(target, *arguments):
        process = context.Process(target=target, args=arguments, daemon=True)
        process.start()
        started.append(process)
        return process

    start.context = context
    yield start
    for process in started:
        process.kill()
        process.join()


def in_another_process(folder: str, queue, pause: float | Path, chosen: rp.Recipe) -> None:
    """Trains slowly, with a checkpoint at every log point; says what it did. `pause`: seconds at each, or a file that is waited
    for at the first."""
    torch.set_num_threads(1)
    keeping.CHECKPOINT_SECONDS = 0
    iterations = []

    def watch(news):
        iterations.append(news.iteration)
        queue.put(("at", os.getpid(), news.iteration))
        if isinstance(pause, Path):
            while not pause.exists():
                time.sleep(0.02)
        else:
            time.sleep(pause)

    def hear(message, *_, **__):
        told.append(str(message))
        queue.put(("told", os.getpid(), str(message)))

    told: list[str] = []
    warnings.showwarning = hear
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run = train(folder, chosen=chosen, progress=watch, probes=[Norms()])
    queue.put(("done", os.getpid(), (iterations, run.metrics, told)))


def hold_the_lock(folder: str, chosen: rp.Recipe, queue) -> None:
    with RunStore(folder).lock(config(recipe=chosen), print):
        queue.put("held")
        time.sleep(600)


def quiet_lock(folder, chosen) -> bool:
    """True if the lock of a run is free."""
    told = []

    class Waited(Exception):
        pass

    def tell(text):
        told.append(text)
        raise Waited

    try:
        with RunStore(folder).lock(config(recipe=chosen), tell):
            return True
    except Waited:
        assert "another process trains cifar-resnet-8_A_digits" in told[0]
        assert told[0].endswith("; waiting for it")
        return False


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path, processes):
    undisturbed = train(tmp_path / "undisturbed", chosen=LONG, probes=[Norms()])
    seed = random.randrange(2**32)
    print(f"the moments are those of seed {seed}")
    chance, kills, reached = random.Random(seed), 0, []
    folder = tmp_path / "killed"
    result = RunStore(folder).folder(undisturbed.config) / "result.json"
    while kills < 5:
        queue = processes.context.Queue()
        process = processes(in_another_process, str(folder), queue, 0.002, LONG)
        first = queue.get(timeout=180)
        # Somewhere in the next few iterations, whatever is being computed or written there.
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL or result.exists()
        reached.append(first)
        if result.exists():
            break
        kills += 1
    assert kills >= 2, "it was killed in the middle at least twice"
    starts = [iteration for what, _, iteration in reached if what == "at"]
    assert starts[0] == 1
    assert starts == sorted(starts)
    assert starts[-1] > 1, "some process went on where another was killed"
    last = train(folder, chosen=LONG, probes=[Norms()])
    assert (last.path / "network.safetensors").read_bytes() == (undisturbed.path / "network.safetensors").read_bytes()
    assert_same(result_of(last), result_of(undisturbed))
    pandas.testing.assert_frame_equal(last.tables["norms"], undisturbed.tables["norms"], check_exact=True)
    assert not list(last.path.glob("checkpoint*"))


def test_of_two_processes_that_want_the_same_run_one_trains(tmp_path, processes):
    queue = processes.context.Queue()
    both = [processes(in_another_process, str(tmp_path), queue, 0.005, LONG) for _ in range(2)]
    done = {}
    while len(done) < 2:
        what, pid, told = queue.get(timeout=180)
        if what == "done":
            done[pid] = told
    for process in both:
        process.join(timeout=180)
        assert process.exitcode == 0
    (one, one_metrics, one_told), (other, other_metrics, other_told) = sorted(
        done.values(), key=lambda entry: len(entry[0])
    )
    assert one == []
    assert other == list(range(1, 41))
    assert one_metrics == other_metrics
    assert other_told == []
    assert len(one_told) <= 1
    assert all("another process trains" in text for text in one_told)


def test_the_second_waits_and_says_so(tmp_path, processes):
    queue, second, go_on = processes.context.Queue(), processes.context.Queue(), tmp_path / "go on"
    folder = str(tmp_path / "runs")
    processes(in_another_process, folder, queue, go_on, LONG)
    assert queue.get(timeout=180)[0] == "at", "the first trains"
    processes(in_another_process, folder, second, 0, LONG)
    assert second.get(timeout=180)[0] == "told", "the second waits"
    go_on.touch()
    what, _, (iterations, metrics, told) = second.get(timeout=180)
    assert what == "done"
    assert iterations == []
    assert metrics["iterations"] == 40
    assert len(told) == 1
    assert told[0].startswith("another process trains cifar-resnet-8_A_digits_40it_seed0_")
    assert told[0].endswith("; waiting for it")


def test_a_lock_whose_holder_was_killed_is_free(tmp_path, processes):
    queue = processes.context.Queue()
    holder = processes(hold_the_lock, str(tmp_path), RECIPE, queue)
    assert queue.get(timeout=180) == "held"
    assert not quiet_lock(tmp_path, RECIPE)
    holder.kill()
    holder.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(tmp_path).metrics["iterations"] == 12


# -- on a card ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_cuda_is_interrupted_taken_up_and_found(tmp_path, no_training, precision):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, device="cuda", precision=precision, progress=stop_at(6))
    run = train(tmp_path, device="cuda", precision=precision)
    assert math.isfinite(run.metrics["test_loss"])
    assert {parameter.device.type for parameter in run.network.parameters()} == {"cpu"}
    no_training()
    found = train(tmp_path, device="cpu", precision=precision)
    assert found.metrics == run.metrics, "the device is not part of what a run is"
    assert_same(dict(found.network.state_dict()), dict(run.network.state_dict()))


def test_damaged_weights_are_named_with_what_to_do(tmp_path):
    run = train(tmp_path)
    (run.path / "network.safetensors").write_bytes(b"\x00" * 100)
    found = train(tmp_path)
    with pytest.raises(
        UsageError, match=r"the weights in .* are missing or damaged .*; delete that folder and the run is"
    ):
        _ = found.network


def test_scratch_files_of_a_killed_process_are_cleared(tmp_path):
    folder = RunStore(tmp_path).folder(config())
    folder.mkdir()
    (folder / "probes").mkdir()
    left = folder / ".checkpoint.pt.incoming.4711.tmp", folder / "probes" / ".norms.csv.4711.tmp"
    for file in left:
        file.write_bytes(b"half")
    assert train(tmp_path).path == folder
    assert not any(file.exists() for file in left)


def test_a_history_with_gaps_is_read_as_numbers(tmp_path):
    """As another program may have saved it."""
    run = train(tmp_path)
    file = run.path / "history.csv"
    file.write_text(file.read_text().replace("nan", ""))
    found = train(tmp_path)
    pandas.testing.assert_frame_equal(found.history, run.history, check_exact=True)
    assert found.history["test_error"].isna().any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"recipe": "cifar_paper"},
            r"^recipe \(='cifar_paper'\) must be a Recipe, such as rp.recipes.cifar_paper\(\)$",
        ),
        ({"recipe": rp.recipes.cifar_paper}, r"^recipe \(=<function cifar_paper .*\) must be a Recipe"),
        ({"probes": "gradient-norms"}, r"^probes \(='gradient-norms'\) must be a list of names or probes$"),
        ({"shortcuts": "B"}, r"^option of cifar/resnet \(='shortcuts'\) is unknown; accepted: .*nearest: shortcut$"),
        (
            {"network": network(), "width": 4},
            r"^option \(='width'\) is for a network that is to be built; this one is$",
        ),
        ({"seed": 2**70}, r"^seed \(=1180591620717411303424\) must be below 2³²$"),
    ],
)
def test_arguments_of_another_kind(options, text):
    with pytest.raises(rp.UsageError, match=text):
        rp.train(**{"network": "cifar/resnet-8", "data": "digits", **options})


def test_options_of_the_network_are_those_of_build(tmp_path):
    run = train(tmp_path, "cifar/resnet-8", shortcut="B", width=4)
    assert (run.config.network.get("shortcut"), run.config.network.get("in_channels")) == ("B", 1)
    assert train(tmp_path, spec(shortcut="B")).path == run.path
    assert rp.default_recipe("digits") == rp.recipes.digits_quick()


def test_edited_data_of_the_same_identity_are_refused(tmp_path):
    data = digits()
    train(tmp_path, data=data)
    train(tmp_path, data=data)
    edited = replace(data, train=rp.ImageSet(255 - data.train.images, data.train.labels))
    with pytest.raises(UsageError, match="^data of identity 'digits 160 60' with other images or labels, are those of"):
        train(tmp_path, data=edited)
    with pytest.raises(UsageError, match="with other images or labels"):  # before anything is trained on them
        train(tmp_path, data=edited, probes=[Norms()])
    assert RunStore(tmp_path).find(configure(spec(), data, RECIPE), ["norms"]) is None
    train(tmp_path, data=replace(edited, identity="mine, inverted"))
    for identity in ("", None):
        with pytest.raises(UsageError, match=r"^data: identity \(=.*\) must be a text that says which data these are$"):
            replace(data, identity=identity)


def test_a_registered_set_that_has_shrunk_is_refused(tmp_path, clean_registries):
    """It is given by its name, and there is no digest of such a set's images."""
    images = [160]

    @rp.register_dataset("shrinking")
    def shrinking(path=None):
        return replace(digits(train=images[0]), name="shrinking", identity="shrinking")

    common = {"recipe": recipe(iterations=2), "runs": tmp_path, "device": "cpu", "progress": False}
    rp.train("cifar/resnet-8", "shrinking", **common)
    images[0] = 100
    with pytest.raises(UsageError, match="with 160 training images, not 100, are those of"):
        rp.train("cifar/resnet-8", "shrinking", **common)
