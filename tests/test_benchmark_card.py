"""Numbers on a card: what counts as equal, how time runs out, and that nothing unmeasured goes unsaid."""

import json
from types import SimpleNamespace

import pandas
import pytest
import tiny
import torch

from benchmarks import card as module
from benchmarks.card import PARTS, Card, Difference, report, title, verdict, work_through
from benchmarks.measuring import Deadline
from resprobe.environment import environment

CPU = torch.device("cpu")
EXACT, NEAR, FAR = (Difference((size / 10, size), size) for size in (0, 1e-4, 1e-2))


def run(losses, network):
    return SimpleNamespace(history=pandas.DataFrame({"train_loss": losses}), network=network)


def test_a_difference_is_relative_and_sees_every_weight():
    one, other = tiny.network(), tiny.network()
    assert Difference.between(run([2.0, 1.0], one), run([2.0, 1.0], other)).exact
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    found = Difference.between(run([2.0, 1.0], one), run([1.8, 0.75], other))
    assert (*found.losses, found.weights) == pytest.approx((0.1, 0.25, 0.5))
    assert str(found) == "losses 1e-01 at first, 2e-01 at most, weights 5e-01 apart"


def test_a_graph_must_be_exact_where_eager_repeats_itself():
    assert verdict("graph", EXACT, EXACT, NEAR) == (True, "equal")
    good, why = verdict("graph", NEAR, EXACT, FAR)
    assert not good and why.startswith("NOT EQUAL")
    assert verdict("graph", NEAR, NEAR, NEAR)[0]  # eager does not repeat itself: then as near as rounding


def test_a_compiled_step_may_be_as_far_off_as_rounding():
    good, why = verdict("compile", NEAR, EXACT, NEAR)
    assert good and why.startswith("within 10 × what the weights' last digit does (losses 1e-05 at first")
    good, why = verdict("compile", FAR, EXACT, NEAR)
    assert not good and why.startswith("NOT WITHIN")
    assert not verdict("compile", Difference(NEAR.losses, 1), EXACT, NEAR)[0]


def test_a_difference_may_not_come_early():
    rounding = Difference((1e-6, 1e-5, 1e-4, 1e-5), 1e-3)
    assert Difference((1e-5, 1e-4, 1e-4, 1e-4), 1e-3).within(rounding, times=1)
    assert not Difference((1e-4, 1e-4, 1e-4, 1e-4), 1e-3).within(rounding, times=1)
    assert Difference((1e-4, 1e-4, 1e-4, 1e-4), 1e-3).within(rounding, times=10)


def test_one_part_that_fails_does_not_take_the_rest(monkeypatch, capsys):
    done = []

    def broken(card, deadline):
        raise RuntimeError("the card\nfell off")

    monkeypatch.setattr(
        module,
        "PARTS",
        {
            "first": (broken, 0, 10),
            "second": (lambda card, deadline: done.append(deadline.left), 0, 10),
            "long": (lambda card, deadline: done.append("long"), 1000, 2000),
            "unwanted": (lambda card, deadline: done.append("unwanted"), 0, 10),
        },
    )
    card = Card(CPU, True, Deadline(100))
    work_through(card, ["first", "second", "long"])
    assert len(done) == 1 and 9 < done[0] <= 10
    line = broken.__code__.co_firstlineno + 1
    assert card.missing == {
        "first": f"RuntimeError: the card fell off (test_benchmark_card.py, line {line})",
        "long": "no time left",
        "unwanted": "not asked for",
    }
    card.record["training"] = {"cifar/resnet-20": {"compared": "ours", "told": {"ours": {"clock_mhz": 1980.0}}}}
    said = report(card, environment(CPU))
    assert "\ncifar/resnet-20, ours: clock mhz 1980\n" in said
    assert f"Not measured:\n\n- first: {card.missing['first']}\n- long: no time left" in said


def test_without_time_every_part_is_named():
    card = Card(CPU, True, Deadline(0))
    work_through(card, list(PARTS))
    assert card.missing == dict.fromkeys(PARTS, "no time left") and not card.rows


def test_equality_compares_what_it_says(monkeypatch):
    """The nudged and the other steps are told from the eager one."""
    weights = {("eager", False): 1.0, ("eager", True): 1.001, ("graph", False): 1.0, ("compile", False): 1.1}

    def trained(card, precision, step, iterations, *, nudged=False):
        network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(network.weight, weights[step, nudged])
        return run([weights[step, nudged]], network)

    monkeypatch.setattr(module, "trained", trained)
    monkeypatch.setattr(module.training, "steps", lambda device: ("eager", "graph", "compile"))
    monkeypatch.setattr(Card, "precision", "fp32")
    card = Card(CPU, False, Deadline(100))
    module.equality(card, Deadline(100))
    outcome = {each["step"]: each.get("equal") for each in card.record["equality"]}
    assert outcome == {"eager": None, "graph": True, "compile": False}
    measured = {what: (found, beside) for what, _, found, beside in card.rows}
    assert measured["graph against eager"] == ("equal to the last bit", "equal")
    assert measured["compile against eager"][1].startswith("NOT WITHIN")
    late = Card(CPU, False, Deadline(0))
    module.equality(late, Deadline(0))
    assert late.missing == {f"equality: {step} in fp32": "no time left" for step in ("eager", "graph", "compile")}
    hasty = Card(CPU, False, Deadline(20))
    module.equality(hasty, Deadline(20))
    assert hasty.missing == {"equality: compile in fp32": "no time left"}, "compiling is not begun"


def test_the_nudge_is_the_last_digit():
    card = Card(CPU, True, Deadline(100))
    for precision, digit in (("fp32", 2**-23), ("bf16", 2**-7)):
        plain, nudged = (module.trained(card, precision, "eager", 1, nudged=nudged) for nudged in (False, True))
        found = Difference.between(plain, nudged)
        assert digit / 8 < found.weights < digit * 8
    assert Difference.between(plain, module.trained(card, "bf16", "eager", 1)).exact


def test_choices_of_kernels_are_put_back():
    cudnn = torch.backends.cudnn

    def choices():
        return torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.allow_tf32

    before = choices()
    with module.same_kernels():
        assert choices() == (True, False, False)
    assert choices() == before


def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert module.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "error: device (='cpu') is no CUDA device, which this benchmark is for; --device cpu --quick does a small version "
        "without one\n"
    )


def test_the_title_names_machine_and_versions():
    machine = environment(CPU)
    said = title(machine, CPU)
    for word in (machine["device"], f"torch {torch.__version__}".split("+")[0], machine["date"]):
        assert word in said


@pytest.mark.slow
def test_a_small_version_runs_without_a_gpu(tmp_path, capsys):
    out = tmp_path / "card.json"
    assert module.main(["--device", "cpu", "--quick", "--minutes", "30", "--out", str(out)]) == 0
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    parts = {what for what, *_ in record["rows"]}
    assert {
        "eager against itself",
        "training, images/s",
        "runs at a time, images/s",
        "probe, time over bare",
        "detection, inference, images/s",
        "a checkpoint, ms",
        "start of a study, s",
        "a training step, ms",
        "waiting for first steps, s",
    } <= parts
    compiled = {f"{part}: {step}" for part in ("equality", "compiling") for step in ("compile", "compile-blocks")}
    assert set(record["not_measured"]) == {*compiled, "memory of probes"}
    assert "| what | setting | measured | beside it |" in said and "- memory of probes: " in said
    assert set(record["seconds"]) == set(PARTS)
    (row,) = record["concurrency"]["rows"]
    assert row["together"] == 1 and row["training"] > row["whole"] > 0
    assert 0 < record["start"]["help"]["median"] < record["start"]["first_iteration"]["median"]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.gpu(real=True)
def test_on_a_card_the_graph_is_equal(tmp_path):
    out = tmp_path / "card.json"
    assert module.main(["--parts", "equality", "--minutes", "1.5", "--out", str(out)]) == 0
    outcome = json.loads(out.read_text())["equality"]
    assert all(each["equal"] for each in outcome if each["step"] != "eager"), outcome
    captured = {each["precision"]: each["difference"]["weights"] for each in outcome if each["step"] == "graph"}
    assert set(captured) >= {"fp32", "bf16"} and not any(captured.values()), "to the last bit, and not left out"
