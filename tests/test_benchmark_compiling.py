"""What compiling costs a sweep: rows as they are measured, what did not come to an end, and the sums."""

import json

import pytest

from benchmarks import compiling
from benchmarks.compiling import Sweep, in_turn, main, measure, report, waited
from benchmarks.measuring import Deadline

TINY = Sweep(("cifar/plain-8", "cifar/resnet-8"), "eager", "cpu", "fp32", batch=2, later=2, data="random:8")


def test_networks_are_trained_in_their_order_and_each_step_is_timed(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: float(next(clock)))
    rows = in_turn(TINY)
    assert [row["network"] for row in rows] == list(TINY.networks)
    assert all(row["first"] > 0 and row["later"] == 1 for row in rows)


def test_a_process_of_its_own_begins_with_empty_caches(monkeypatch):
    asked = {}
    real = compiling.subprocess.run

    def run(command, **options):
        asked.update(options["env"])
        return real(command, **options)

    monkeypatch.setattr(compiling.subprocess, "run", run)
    found = measure(TINY)
    assert found["missing"] is None and [row["network"] for row in found["rows"]] == list(TINY.networks)
    assert asked["TORCHINDUCTOR_CACHE_DIR"] and asked["TRITON_CACHE_DIR"].startswith(asked["TORCHINDUCTOR_CACHE_DIR"])


def test_what_does_not_come_to_an_end_is_named():
    assert measure(TINY, Deadline(0))["missing"] == "no time left"
    assert measure(TINY, Deadline(0.2))["missing"] == "no time left", "no process starts in so short a time"
    failed = measure(Sweep(("cifar/plain-9",), "eager", "cpu", "fp32"))
    assert failed["rows"] == [] and "depth (=9)" in failed["missing"]


def test_the_report_puts_the_steps_of_a_network_side_by_side():
    found = [
        {"step": "eager", "rows": [{"network": "a", "first": 1.0, "later": 0.25}], "missing": None},
        {"step": "compile", "rows": [{"network": "a", "first": 9.5, "later": 0.125}], "missing": None},
        {"step": "compile-blocks", "rows": [], "missing": "no time left"},
    ]
    assert waited(found[1]["rows"]) == 9.375
    said = report(found)
    assert "| a | 1.0 | 250.0 | 9.5 | 125.0 |" in said
    assert "compile: 9 s of waiting in all" in said
    assert "not measured: compile-blocks (no time left)" in said


def test_the_command(tmp_path, capsys):
    out = tmp_path / "compiling.json"
    arguments = ["--networks", "cifar/plain-8", "--steps", "eager", "--batch", "2", "--later", "1", "--device", "cpu"]
    assert main([*arguments, "--precision", "fp32", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [each["step"] for each in record["steps"]] == ["eager"] and record["batch"] == 2
    assert "| cifar/plain-8 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--steps", "compil"],
            "steps (='compil') is unknown; accepted: eager, compile, compile-blocks; nearest: compile",
        ),
        (["--networks", "cifar/plain-9"], "depth (=9) must be 6n+2"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert main([*arguments, "--device", "cpu"]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
