"""The scaling benchmark: lines through what was timed, speeds of runs side by side, and what was left out."""

import argparse
import dataclasses
import json
import warnings

import pandas
import pytest
import torch

from benchmarks import scaling
from benchmarks.measuring import Deadline, Spread
from benchmarks.turns import Race, Timed
from resprobe.errors import UsageError

CPU = torch.device("cpu")
WHERE = scaling.Where(CPU, "fp32", "eager", data="random:128")


def options(**given):
    return argparse.Namespace(quick=False, **given)


def raced(monkeypatch, timed, missing=None):
    """Lets `race` find this, and gives what it was asked for."""
    asked = {}

    def race(cases, rounds, **how):
        asked.update(cases=cases, rounds=rounds, **how)
        return Race(timed, missing or {})

    monkeypatch.setattr(scaling, "race", race)
    return asked


def test_time_and_memory_over_depth_have_their_lines(monkeypatch):
    plan = dataclasses.replace(scaling.CPU, depths=(20, 56, 110), window=2)
    timed = {str(d): Timed(0.0, (2 * (0.1 + 0.01 * d),) * 3, 2**20 * (5 + d)) for d in plan.depths}
    asked = raced(monkeypatch, timed, {"1202": "no time left"})
    found = scaling.of_depth(WHERE, plan)
    assert [case.network for case in asked["cases"].values()] == [f"cifar/resnet-{depth}" for depth in plan.depths]
    assert all(case.batch == plan.batch for case in asked["cases"].values()) and asked["together"]
    seconds, memory = found["seconds_line"], found["bytes_line"]
    assert (seconds.intercept, seconds.slope, seconds.r_squared) == pytest.approx((0.1, 0.01, 1))
    assert (memory.intercept / 2**20, memory.slope / 2**20) == pytest.approx((5, 1))
    said = scaling.say_depth(found)
    assert "seconds: 100.00 + 10.000 · depth ms, R² = 1.00000" in said
    assert "bytes: 5.00 + 1.000 · depth MiB" in said and "| 56 | 660.0 (" in said
    assert found["not_measured"] == {"1202": "no time left"}


def test_a_gpu_is_not_shared_by_depths(monkeypatch):
    asked = raced(monkeypatch, {})
    scaling.of_depth(dataclasses.replace(WHERE, device=torch.device("cuda")), scaling.CUDA)
    assert not asked["together"]


def test_residuals_are_shown_beside_what_was_measured():
    rows = [{"depth": d, "seconds": Spread.of([s]), "bytes": None} for d, s in ((1, 1.0), (2, 4.0), (3, 9.0))]
    found = {"rows": rows, **scaling.lines(rows)}
    assert "bytes_line" not in found
    said = scaling.say_depth(found)
    assert "| 2 | 4,000.0 (-16.7 %) | not known |" in said  # 4 − 14/3 of 4
    assert "seconds_line" not in scaling.lines(rows[:2])


def test_images_a_second_over_the_batch(monkeypatch):
    plan = dataclasses.replace(scaling.CPU, batches=(16, 64), window=2)
    raced(monkeypatch, {"16": Timed(0.0, (0.5, 0.5), None), "64": Timed(0.0, (1.0, 1.0), 2**21)})
    found = scaling.of_batch(WHERE, plan)
    assert [row["images_per_second"].median for row in found["rows"]] == [64, 128]
    assert "| 64 | 128 | 2 |" in scaling.say_batch(found)


def test_speeds_side_by_side_are_added_up():
    # The first log point comes after a cold start, the last one after testing: neither counts.
    slow = pandas.DataFrame({"iteration": [10, 20, 30, 40], "seconds": [100.0, 101.0, 102.0, 500.0]})
    fast = pandas.DataFrame({"iteration": [10, 20, 30, 40], "seconds": [7.0, 7.5, 8.0, 9.0]})
    row = scaling.together_speed([slow, fast], took=10.0, batch=8)
    assert row == {"together": 2, "training": 20 * 8 / 2 + 20 * 8 / 1, "whole": 80 * 8 / 10, "seconds": 10.0}
    alone = scaling.together_speed([slow], took=16.0, batch=8)
    found = {"network": "n", "iterations": 40, "rows": [alone, row], "notes": ["they take turns"], "not_measured": {}}
    said = scaling.say_concurrency(found)
    assert "| 2 | 240 (× 3.00) | 64 (× 3.20) | 10.0 |" in said
    assert said.endswith("they take turns")


def test_runs_that_have_no_time_left_are_named():
    late = dataclasses.replace(WHERE, deadline=Deadline(0))
    found = scaling.of_concurrency(late, dataclasses.replace(scaling.QUICK, concurrency=(1, 4)))
    assert found["rows"] == []
    assert found["not_measured"] == {"1 at a time": "no time left", "4 at a time": "no time left"}


def test_runs_that_would_take_longer_than_is_left_are_not_begun(monkeypatch):
    """At worst K runs at a time take K times as long as one."""

    def run_all(jobs, *_, **__):
        warnings.warn("they take turns")
        return [
            argparse.Namespace(history=None, environment={"step": step}) for step in ("eager", "graph")[: len(jobs)]
        ]

    monkeypatch.setattr(scaling, "run_all", run_all)
    monkeypatch.setattr(
        scaling, "together_speed", lambda histories, *_: {"together": len(histories), "seconds": 3.0 * len(histories)}
    )
    soon = dataclasses.replace(WHERE, deadline=Deadline(10))
    found = scaling.of_concurrency(soon, dataclasses.replace(scaling.QUICK, concurrency=(1, 2, 4)))
    assert [row["together"] for row in found["rows"]] == [1, 2]
    assert found["notes"] == ["they take turns", "2 at a time: trained by the step eager, graph"], "each once"
    assert found["not_measured"] == {"4 at a time": "no time left"}


def test_the_share_of_a_checkpoint_is_of_the_interval():
    row = scaling.checkpoint_row(20, [1.0, 2.0, 3.0], 2**20)
    assert row["share"] == pytest.approx(2 / (2 + scaling.INTERVAL))
    assert "| 20 | 2,000.0 | 1.0 | 6.25 |" in scaling.say_checkpoint({"rows": [row]})


def test_a_plan_takes_what_was_asked_for():
    plan = scaling.plan_of(options(depths=[20, 32], rounds=3), CPU)
    assert plan == dataclasses.replace(scaling.CPU, depths=(20, 32), rounds=3)
    assert scaling.plan_of(options(), torch.device("cuda")) == scaling.CUDA
    assert scaling.plan_of(argparse.Namespace(quick=True), CPU) == scaling.QUICK


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"depths": [21]}, r"depth \(=21\)"),
        ({"batches": [0]}, r"batches \(=0\) must be ≥ 1"),
        ({"iterations": 2}, r"iterations \(=2\) must be at least 3"),
    ],
)
def test_mistakes_are_told(given, said):
    with pytest.raises(UsageError, match=said):
        scaling.plan_of(options(**given), CPU)


@pytest.mark.slow
def test_depth_is_measured(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    asked = ["--parts", "depth", "--depths", "8", "14", "20", "--batch", "4", "--rounds", "1", "--window", "1"]
    assert (
        scaling.main([*asked, "--data", "random:128", "--device", "cpu", "--precision", "fp32", "--out", str(out)]) == 0
    )
    found = json.loads(out.read_text())["depth"]
    assert [row["depth"] for row in found["rows"]] == [8, 14, 20] and not found["not_measured"]
    assert all(row["seconds"]["median"] > 0 for row in found["rows"])
    assert len(found["seconds_line"]["residuals"]) == 3 and found["seconds_line"]["r_squared"] <= 1
    assert "### depth" in capsys.readouterr().out


def test_a_checkpoint_is_measured(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    assert scaling.main(["--quick", "--parts", "checkpoint", "--device", "cpu", "--out", str(out)]) == 0
    (saved,) = json.loads(out.read_text())["checkpoint"]["rows"]
    # ResNet-20's 269,722 weights and their velocities, in four bytes each, and little beside them.
    assert 2 * 4 * 269_722 < saved["bytes"] < 2.3 * 4 * 269_722 and 0 < saved["share"] < 1
    assert "### checkpoint" in capsys.readouterr().out
