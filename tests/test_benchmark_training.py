"""The training benchmark: every loop does what its name says, ratios are of what was timed, gaps are named."""

import json
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import loops, training, turns
from benchmarks.data import Pictures, random_images
from benchmarks.loops import LOOPS, Case
from benchmarks.measuring import Deadline, Spread
from benchmarks.turns import Race, Timed, race
from resprobe.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DATA = random_images("64")


class Enough(Exception):
    """Ends a loop."""


class Watch:
    """Counts optimizer steps between pauses, and notes what the first convolution gets and what all give."""

    def __init__(self, pauses: int):
        self.pauses, self.steps, self.at_pause = pauses, 0, []
        self.inputs, self.outputs = [], set()

    def pause(self) -> None:
        self.at_pause.append(self.steps)
        if len(self.at_pause) == self.pauses:
            raise Enough

    def __enter__(self):
        def look(module, inputs, output):
            if (
                isinstance(module, nn.Conv2d) and output.requires_grad and len(output) > 2
            ):  # when built, a block is tried with 2
                self.outputs.add(output.dtype)
                if module.in_channels == 3:
                    self.inputs.append(inputs[0].detach().float().clone())

        def count(*_):
            self.steps += 1

        self.handles = [
            nn.modules.module.register_module_forward_hook(look),
            register_optimizer_step_post_hook(count),
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    ("loop", "precision"),
    [(loop, precision) for loop in LOOPS for precision in ("fp32", "bf16") if (loop, precision) != ("usual", "bf16")],
)
def test_a_loop_trains_and_pauses_after_each_window(loop, precision):
    if reason := loops.absent(loop):
        pytest.skip(reason)
    case = Case(loop, "cifar/resnet-8", precision, batch=16, window=2, workers=0)
    with Watch(pauses=3) as watch, pytest.raises(Enough):
        LOOPS[loop](case, DATA, watch.pause)
    assert watch.at_pause == [2, 4, 6]
    assert watch.outputs == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert {tuple(images.shape) for images in watch.inputs} == {(16, 3, 32, 32)}
    different = {round(float(images.mean()), 6) for images in watch.inputs}
    assert len(different) == (1 if loop == "bare" else len(watch.inputs))


@pytest.mark.parametrize("loop", ["usual", "lightning", "timm"])
def test_rivals_get_normalized_images(loop):
    if reason := loops.absent(loop):
        pytest.skip(reason)
    case = Case(loop, "cifar/resnet-8", batch=64, window=1, workers=0)
    with Watch(pauses=2) as watch, pytest.raises(Enough):
        LOOPS[loop](case, DATA, watch.pause)
    for images in watch.inputs:
        assert abs(float(images.mean())) < 0.4  # what a crop has added is black
        assert 0.9 < float(images.std()) < 1.4  # random bytes: 0.289 / 0.25
        assert float(images.max()) == pytest.approx((1 - 0.45) / 0.26, abs=0.1)


def test_pictures_are_the_images_cropped_and_flipped():
    pictures = Pictures(DATA.train)
    assert len(pictures) == 64
    image, label = pictures[5]
    assert label == int(DATA.train.labels[5]) and image.shape == (3, 32, 32)
    back = (image * torch.tensor([0.25, 0.24, 0.26])[:, None, None]) + torch.tensor([0.49, 0.48, 0.45])[:, None, None]
    original = DATA.train.images[5].float() / 255
    padded = nn.functional.pad(original, (4,) * 4)
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    assert any(torch.allclose(back, flipped, atol=1e-3) for window in windows for flipped in (window, window.flip(2)))


def test_a_rival_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(loops.importlib.util, "find_spec", lambda name: None if name == "lightning" else object())
    ready, missing = training.cases("cifar/resnet-8", [("ours", "fp32", "eager"), ("lightning", "fp32", "eager")])
    assert list(ready) == ["ours eager fp32"]
    assert missing == {"lightning fp32": "lightning is not installed"}
    record = training.outcome(Race(), ready, missing)
    assert "not measured: lightning fp32 (lightning is not installed)" in training.report("cifar/resnet-8", record)


def test_a_gpu_is_offered_every_step_and_precision(monkeypatch):
    monkeypatch.setattr(training, "precisions", lambda device: ("fp32", "tf32", "bf16"))
    every = training.loops(CUDA)
    assert every[0] == ("ours", "bf16", "graph")
    assert len(set(every)) == len(every)
    own = {(precision, step) for loop, precision, step in every if loop == "ours"}
    assert own == {(p, s) for p in ("fp32", "tf32", "bf16") for s in ("eager", "graph", "compile", "compile-blocks")}
    assert [each for each in every if each[0] == "deterministic"] == [("deterministic", "bf16", "graph")]
    # What torch does unasked on such a card is what the others are timed with.
    assert {each for each in every if each[0] in ("usual", "lightning", "timm")} == {
        ("usual", "tf32", "eager"),
        *((rival, precision, "eager") for rival in ("lightning", "timm") for precision in ("tf32", "bf16")),
    }


def test_a_cpu_is_offered_no_graph():
    assert {step for _, _, step in training.loops(CPU)} == {"eager", "compile", "compile-blocks"}
    assert training.loops(CPU)[0][0] == "ours"


def test_loops_are_chosen_by_the_names_in_the_table():
    assert training.chosen(["usual fp32"], CPU) == [("usual", "fp32", "eager")]
    assert training.chosen(None, CPU) == training.loops(CPU)
    with pytest.raises(UsageError, match=r"loops \(='usul fp32'\) is unknown; accepted: .*; nearest: usual fp32$"):
        training.chosen(["usul fp32"], CPU)


def test_figures_are_of_the_timed_windows():
    ready = {name: Case(name, "cifar/resnet-20", batch=10, window=4) for name in ("ours", "usual")}
    found = Race(
        {"ours": Timed(1.5, (0.5, 1.0), 2**20, {"power_w": 400.0}), "usual": Timed(0.0, (1.0, 4.0), None)},
        {"timm": "broke"},
    )
    record = training.outcome(found, ready, {})
    assert record["images_per_second"] == {"ours": Spread(60, 40, 80, 2), "usual": Spread(25, 10, 40, 2)}
    assert record["compared"] == "ours" and record["over"] == {"usual": Spread(3.0, 2.0, 4.0, 2)}
    assert record["cold_seconds"] == {"ours": 1.5, "usual": 0.0}
    assert record["told"] == {"ours": {"power_w": 400.0}}
    assert record["not_measured"] == {"timm": "broke"}
    said = training.report("cifar/resnet-20", record)
    assert "| usual | 25 (10–40) | 3.00 (2.00–4.00, n = 2) | 0.0 |" in said
    assert "| ours | 60 (40–80) | — | 1.5 |" in said


# -- taking turns --------------------------------------------------------------------------------------------------


class Puppet:
    """A loop's process that says what it was told to: seconds of its windows, or why it stops."""

    def __init__(self, script, threads=None):
        self.script, self.closed = iter(script), False
        ORDER.append(self)

    def word(self, deadline=None):
        return {"ready": True}

    def window(self, deadline=None):
        ORDER.append(self)
        said = next(self.script)
        if isinstance(said, str):
            raise (turns.OutOfTime if said == "no time left" else turns.Stopped)(said)
        return {"seconds": said, "peak": 7, "told": {"clock_mhz": said}}

    def close(self, patience=10.0):
        self.closed = True


ORDER: list[Puppet] = []


@pytest.fixture
def puppets(monkeypatch):
    ORDER.clear()
    monkeypatch.setattr(turns, "Runner", Puppet)


def test_the_first_window_is_the_cold_start_and_each_second_one_is_timed(puppets):
    found = race({"one": [9.0, 5.0, 1.0, 5.0, 3.0], "other": [2.0, 6.0, 4.0, 6.0, 4.0]}, 2)
    assert found.timed == {
        "one": Timed(7.0, (1.0, 3.0), 7, {"clock_mhz": 3.0}),
        "other": Timed(0.0, (4.0, 4.0), 7, {"clock_mhz": 4.0}),
    }
    assert found.rounds({"one": 3, "other": 4}) == [{"one": 3.0, "other": 1.0}, {"one": 1.0, "other": 1.0}]
    one, other = ORDER[:2]
    assert ORDER[2:] == [one, other, one, one, other, other, one, one, other, other]
    assert one.closed and other.closed


@pytest.mark.parametrize("script", [["out of memory"], [1.0, "out of memory"], [1.0, 1.0, 1.0, 1.0, "out of memory"]])
def test_a_loop_that_fails_is_named_and_the_rest_goes_on(puppets, script):
    found = race({"bad": script, "good": [1.0] * 5}, 2)
    assert found.missing == {"bad": "out of memory"}
    assert found.timed == {"good": Timed(0.0, (1.0, 1.0), 7, {"clock_mhz": 1.0})}
    assert all(puppet.closed for puppet in ORDER[:2])


def test_what_has_no_time_left_is_named(puppets):
    assert race({"late": [1.0] * 5}, 2, deadline=Deadline(0)).missing == {"late": "no time left"}
    found = race({"slow": ["no time left"], "late": [1.0] * 5}, 2, deadline=Deadline(60))
    assert found.missing == {"slow": "no time left"} and list(found.timed) == ["late"]
    alone = race({"one": [1.0] * 5, "other": ["broke"]}, 1, together=False)
    assert list(alone.timed) == ["one"] and alone.missing == {"other": "broke"}


def test_rounds_that_do_not_fit_are_left_out(puppets):
    found = race({"one": [1.0, 1.0, 1.0, "no time left"], "other": [1.0] * 9}, 3, deadline=Deadline(60))
    assert found.timed["one"].windows == (1.0,)
    assert not found.missing and len(found.rounds({"one": 1, "other": 1})) == 1


def test_a_process_that_fails_says_why():
    runner = turns.Runner(Case("ours", "cifar/resnet-21"))
    try:
        runner.word()
        with pytest.raises(turns.Stopped, match=r"depth \(=21\)"):
            runner.window()
    finally:
        runner.close()
    assert runner.process.returncode == 1


@pytest.mark.slow
def test_it_prints_ratios_and_writes_what_was_measured(tmp_path, capsys):
    out = tmp_path / "training.json"
    asked = [
        "--networks",
        "cifar/resnet-8",
        "--loops",
        "ours eager fp32",
        "usual fp32",
        "--rounds",
        "2",
        "--window",
        "1",
    ]
    assert training.main([*asked, "--data", "random:256", "--device", "cpu", "--out", str(out)]) == 0
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    network = record["networks"]["cifar/resnet-8"]
    speeds = network["images_per_second"]
    assert list(speeds) == ["ours eager fp32", "usual fp32"] and not network["not_measured"]
    assert all(speed["n"] == 2 and 0 < speed["low"] <= speed["high"] < math.inf for speed in speeds.values())
    assert list(network["over"]) == ["usual fp32"]
    assert "| loop | images/s, median (range) | ours eager fp32 / it | cold start (s) |" in said


def test_a_mistake_is_one_line(capsys):
    assert training.main(["--networks", "cifar/resnet-21", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: depth (=21)")
    assert training.main(["--loops", "mine", "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
