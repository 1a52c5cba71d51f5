"""Curves for TensorBoard: what the histories hold, brought up to date, and one line where there is nothing to show."""

import os
import sys

import pandas
import pytest

from plugins.tensorboard import export, main

pytest.importorskip("tensorboard")

HISTORY = pandas.DataFrame(
    {
        "iteration": [0, 10, 20],
        "train_loss": [2.5, 1.0, 0.5],
        "test_error": [90.0, float("nan"), 5.0],
        "seconds": [0.0, 3.0, 6.0],
    }
)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.glob("events.*")
    found = EventAccumulator(str(events))
    found.Reload()
    return {name: found.Scalars(name) for name in found.Tags()["scalars"]}


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "empty").mkdir()
    file = tmp_path / "runs" / "one" / "history.csv"
    HISTORY.to_csv(file, index=False)
    os.utime(file, (1000, 1000))
    return tmp_path / "runs"


def test_every_column_is_a_curve_over_iterations(runs, tmp_path):
    assert export(runs, tmp_path / "log") == ["one"]
    found = scalars(tmp_path / "log" / "one")
    assert set(found) == {"train_loss", "test_error"}
    assert [(point.step, point.value) for point in found["train_loss"]] == [(0, 2.5), (10, 1.0), (20, 0.5)]
    assert [point.step for point in found["test_error"]] == [0, 20]
    assert [point.wall_time for point in found["train_loss"]] == [994.0, 997.0, 1000.0]


def test_called_again_it_brings_them_up_to_date(runs, tmp_path):
    export(runs, tmp_path / "log")
    assert export(runs, tmp_path / "log") == []
    grown = pandas.concat([HISTORY, HISTORY.tail(1).assign(iteration=30, seconds=9.0)])
    grown.to_csv(runs / "one" / "history.csv", index=False)
    os.utime(runs / "one" / "history.csv", (2e9, 2e9))
    assert export(runs, tmp_path / "log") == ["one"]
    assert [point.step for point in scalars(tmp_path / "log" / "one")["train_loss"]] == [0, 10, 20, 30]


def test_what_was_broken_off_is_written_the_next_time(runs, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(SummaryWriter, "add_scalar", stop)
        with pytest.raises(KeyboardInterrupt):
            export(runs, tmp_path / "log")
    assert export(runs, tmp_path / "log") == ["one"]
    assert [point.step for point in scalars(tmp_path / "log" / "one")["train_loss"]] == [0, 10, 20]


def test_mistakes_get_one_line(runs, tmp_path, monkeypatch, capsys):
    absent = str(tmp_path / "absent")
    assert main(["--runs", absent]) == 2
    assert capsys.readouterr().err == f"error: runs (={absent!r}) has no runs with a history\n"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["--runs", str(runs), "--logdir", str(tmp_path / "log")]) == 2
    assert capsys.readouterr().err == "error: tensorboard is not installed; pip install 'resprobe[tensorboard]'\n"
    assert not (tmp_path / "log").exists()


def test_a_run_that_is_finished_meanwhile_is_written_whole(runs, tmp_path, monkeypatch):
    """Its history along the training goes when the whole one is there."""
    from pathlib import Path

    whole = runs / "one" / "history.csv"
    unfinished = whole.with_name("history.unfinished.csv")
    whole.rename(unfinished)
    glob = Path.glob

    def finish(folder, pattern):
        found = list(glob(folder, pattern))
        if pattern.endswith("history.csv"):
            unfinished.rename(whole)
        return found

    monkeypatch.setattr(Path, "glob", finish)
    assert export(runs, tmp_path / "log") == ["one"]
