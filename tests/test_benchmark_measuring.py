"""What benchmarks share: spreads, ratios of a round, straight lines, memory, tables, exit codes."""

import json
import math
import mmap
from types import SimpleNamespace

import pytest
import torch

from benchmarks.measuring import (
    Deadline,
    Line,
    Memory,
    Spread,
    markdown,
    ratios,
    seconds,
    telling,
    write_json,
)

CPU = torch.device("cpu")


def test_a_ratio_is_of_the_same_round():
    slow_machine = [{"ours": 10.0, "rival": 5.0}, {"ours": 2.0, "rival": 1.0}, {"ours": 6.0, "rival": 2.0}]
    assert ratios(slow_machine, "ours") == {"rival": Spread(median=2.0, low=2.0, high=3.0, n=3)}
    assert str(Spread.of([1234.5, 1.0, 2.0])) == "2.00 (1.00–1,234.50, n = 3)"


def test_a_line_finds_a_line_and_shows_a_bend():
    line = Line.through([20, 56, 110], [3 + 2 * depth for depth in (20, 56, 110)])
    assert (line.intercept, line.slope, line.r_squared) == pytest.approx((3, 2, 1))
    assert line.residuals == pytest.approx((0, 0, 0), abs=1e-9)
    bend = Line.through([1, 2, 3], [1, 4, 9])  # by hand: −10/3 + 4x, left over 1/3, −2/3, 1/3
    assert (bend.intercept, bend.slope) == pytest.approx((-10 / 3, 4))
    assert bend.residuals == pytest.approx((1 / 3, -2 / 3, 1 / 3))
    assert bend.r_squared == pytest.approx(1 - (6 / 9) / (98 / 3))
    assert Line.through([1, 2, 3], [5, 5, 5]).r_squared == 1


def test_a_deadline_passes_and_is_never_put_off():
    assert 99 < Deadline(100).left <= 100
    assert Deadline(0).left <= 0
    assert Deadline(5).within(100).left <= 5 < Deadline(100).within(50).left <= 50


def test_memory_sees_what_was_taken_since():
    memory = Memory(CPU)
    if not memory.known:
        pytest.skip("no /proc/self/clear_refs")
    before = memory.peak()
    # 256 MiB from the system itself, let go at once: the allocator may answer with what other tests have freed.
    mmap.mmap(-1, 2**28, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
    assert 2**27 < memory.peak() - before < 2**29
    assert Memory(CPU).peak() < memory.peak() + 2**27  # the peak began anew


def test_memory_that_cannot_be_told_is_none():
    assert Memory(torch.device("mps")).peak() is None


def test_seconds_are_of_the_work():
    assert 0.05 < seconds(lambda: __import__("time").sleep(0.05), CPU) < 5


def test_a_table_keeps_its_columns():
    assert markdown(("a", "b"), [(1, "|x|")]) == "| a | b |\n| --- | --- |\n| 1 | \\|x\\| |"


def test_a_record_holds_dataclasses(tmp_path, capsys):
    write_json(tmp_path / "deep" / "record.json", {"spread": Spread(1.0, 0.5, 2.0, 3)})
    record = json.loads((tmp_path / "deep" / "record.json").read_text())
    assert record == {"spread": {"median": 1.0, "low": 0.5, "high": 2.0, "n": 3}}
    assert "written to" in capsys.readouterr().out
    assert math.isfinite(record["spread"]["median"])


def test_a_card_tells_of_itself_by_its_drivers_program(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$2" = GPU-0-1-2 ] && echo "1980, 431.5, [N/A]"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1-2"))
    assert telling(torch.device("cuda")) == {"clock_mhz": 1980, "power_w": 431.5}
    smi.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert telling(torch.device("cuda")) == {}
    assert telling(torch.device("cpu")) == {}
