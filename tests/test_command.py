"""The console command: it finds studies, says which is meant, and does not keep anyone waiting."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import resprobe as rp
from resprobe.commands import answer
from resprobe.errors import SweepFailed
from studies.__main__ import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def as_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/resprobe"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


def test_a_study_is_run_with_its_options(capsys):
    assert main(["degradation", "--depths", "8", "--seeds", "0", "--iterations", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("2 runs: 0 finished already, 2 to train")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["degradaton"], "study (='degradaton') is unknown; accepted: "),
        (["layer-responses"], "; nearest: layer_responses\n"),
        (["__main__"], "study (='__main__') is unknown"),
        (["degradation", "--depth", "20"], "option (='--depth') is unknown; accepted: --preset, "),
        (["degradation", "--depths", "21"], "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26"),
        (
            ["--reslts", "here"],
            "option (='--reslts') is unknown; accepted: --help, --results, --version; nearest: --results",
        ),
        (["--results"], "argument --results: expected one argument"),
        (["layer_responses", "--weights"], "--weights needs a value after it, or several"),
        (["layer_responses", "--weights", "--seeds", "0"], "--weights needs a value after it, or several"),
        (["scorecard", "--run", "fast"], "--run (='fast') is unknown; accepted: quick, paper"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        ([], 0, ""),
        (
            ["degradation", "--depths", "8", "--seeds", "0", "--iterations", "2"],
            1,
            "error: nobody reads the output any more; finished runs and checkpoints are kept, the same command goes on from "
            "there\n",
        ),
        (["scorecard"], 0, ""),
        (
            ["scorecard", "--run", "quick", "--studies", "complexity"],
            1,
            "error: nobody reads the output any more; finished studies, runs and checkpoints are kept, the same command goes "
            "on from there\n",
        ),
    ],
    ids=["list", "study", "scorecard", "scorecard that runs"],
)
def test_readers_may_leave(arguments, code, error):
    """As `head` does."""
    command = [sys.executable, "-m", "studies", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == code
    assert said.endswith(error) and "Traceback" not in said and "Exception ignored" not in said
    # Who has left may have read both streams.
    reading, writing = os.pipe()
    os.close(reading)
    both = subprocess.run(command, stdout=writing, stderr=writing, env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(writing)
    assert both.returncode == code


@pytest.mark.filterwarnings("default:it is slow")
def test_an_answer_is_an_exit_code_and_one_line(capsys):
    def fails(error):
        def work():
            raise error

        return work

    assert answer(lambda: None) == 0
    assert answer(lambda: 3) == 3
    assert capsys.readouterr().err == ""
    for error, code in [
        (rp.UsageError("depth (=21)"), 2),
        (rp.TrainingDiverged("it broke"), 1),
        (SweepFailed("two"), 1),
    ]:
        assert answer(fails(error), kept="all is kept") == code
        assert capsys.readouterr().err == f"error: {error}\n"
    assert answer(fails(KeyboardInterrupt()), kept="all is kept") == 1
    assert capsys.readouterr().err == "error: interrupted; all is kept\n"
    assert answer(lambda: warnings.warn("it is slow")) == 0
    assert capsys.readouterr().err == "note: it is slow\n"
    with pytest.raises(RuntimeError, match="a bug"):  # whose traceback is wanted
        answer(fails(RuntimeError("a bug")))


def test_told_to_end_it_keeps_what_it_has(capsys):
    """As by `kill`, `timeout` or a cluster's queue."""
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def work():
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    assert answer(work, kept="all is kept") == 1
    assert capsys.readouterr().err == "error: interrupted; all is kept\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_one_of_torchruns_processes_ends_at_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert answer(lambda: signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) == 1


def test_a_script_is_called_by_its_own_name(tmp_path):
    script = tmp_path / "studies_mine.py"
    script.write_text(
        "from resprobe.commands import called_as\nfrom types import SimpleNamespace\n"
        "def judge(results): ...\n"
        "study = SimpleNamespace(name='mine', judge=judge)\nprint(called_as('mine'), '|', called_as('degradation'))\n"
    )
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "python studies_mine.py | python -m studies.degradation\n", done.stderr


def test_a_script_that_has_a_study_from_elsewhere_is_not_how_that_is_called(tmp_path):
    script = tmp_path / "lesson.py"
    script.write_text(
        "from resprobe.commands import called_as\nfrom studies.degradation import study\nprint(called_as(study.name))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stdout == "python -m studies.degradation\n", done.stderr


@pytest.mark.parametrize("module", ["benchmarks.card", "benchmarks.training", "plugins.tensorboard"])
def test_mistakes_elsewhere_are_one_line_too(module, capsys):
    assert importlib.import_module(module).main(["--wrong"]) == 2
    assert capsys.readouterr().err.startswith("error: option (='--wrong') is unknown; accepted: --help, --")


@pytest.mark.parametrize("name", ["degradation", "scorecard"])
def test_help_names_the_command_that_was_given(name, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: resprobe {name} ")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "studies/__main__.py")])
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m studies.{name} ")


def test_the_list_names_commands_that_can_be_given(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert (
        "resprobe degradation\n    C1   not tested             Deeper plain networks have higher training error"
        in listed
    )
    assert "resprobe scorecard puts them on one page" in listed
    assert "python -m" not in listed


HEAVY = {"torch", "torchvision", "pandas", "numpy", "scipy", "matplotlib", "seaborn", "sklearn", "PIL"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["degradation", "--help"], ["detection", "--help"], ["degradaton"], []]
)
def test_nothing_that_takes_long_is_imported_for_an_answer(arguments, tmp_path):
    code = (
        "import sys\nfrom studies.__main__ import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        f"print(*({HEAVY!r} & set(sys.modules)), file=sys.stderr, sep=' and ')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == ""


def test_public_names_are_all_there():
    assert {"build", "train", "attach", "register_block", "recipes", "load_weights", "evaluate"} <= set(rp.__all__)
    for name in rp.__all__:
        assert getattr(rp, name) is not None
    assert dir(rp) == rp.__all__
    with pytest.raises(AttributeError, match="module 'resprobe' has no attribute 'biuld'"):
        rp.biuld  # noqa: B018
