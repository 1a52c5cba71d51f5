"""Processes that share a card: the service is there for as long as they are, and the user is told where it is not.

A stand-in for NVIDIA's control program writes down what it is asked; a card is not needed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from resprobe import sharing as sharing_module
from resprobe.sharing import sharing

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)
CONTROL = """#!/bin/sh
echo "$@ in $(basename $CUDA_MPS_PIPE_DIRECTORY | cut -c1-4), cards ${{CUDA_VISIBLE_DEVICES-all}}" >> {log}
if [ "$1" = -d ]; then exit {started}; fi
read -r asked
echo "$asked" >> {log}
if [ "$asked" = get_server_list ]; then echo {servers}; fi
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Puts a stand-in in place, and gives the file in which it writes down what it is asked."""
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(sharing_module, "_refused", [])
    monkeypatch.setattr(sharing_module, "_USUAL_PIPES", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    log = tmp_path / "log"

    def put(*, started: int = 0, servers: str = "4711") -> Path:
        program = tmp_path / "nvidia-cuda-mps-control"
        program.write_text(CONTROL.format(log=log, started=started, servers=servers))
        program.chmod(0o755)
        return log

    return put


@pytest.fixture
def reached(monkeypatch):
    """As if a process had reached the card."""
    monkeypatch.setattr(sharing_module, "_CLIENT", "")


def test_the_service_is_there_for_the_length_of_the_block(control, reached):
    log = control()
    with sharing(CUDA) as variables:
        folder = Path(variables["CUDA_MPS_PIPE_DIRECTORY"])
        assert folder.is_dir()
        # The stand-in for a process on the card takes no time, and may have asked before the service was there.
        deadline = time.monotonic() + 30
        while log.read_text().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        # All cards: processes choose among them by themselves.
        assert sorted(log.read_text().splitlines()) == [" in mps-, cards 3", "-d in mps-, cards all", "get_server_list"]
    assert log.read_text().splitlines()[3:] == [" in mps-, cards all", "quit"]
    assert not folder.exists()


def test_an_error_in_the_block_ends_the_service_too(control, reached):
    log = control()
    with pytest.raises(KeyboardInterrupt), sharing(CUDA):
        raise KeyboardInterrupt
    assert log.read_text().splitlines()[-1] == "quit"


HOLDER = """
import os, signal, sys, torch
from resprobe import sharing
sharing._no_use = lambda *_: ""
with sharing.sharing(torch.device("cuda", 0)):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_service_ends_with_a_process_that_is_killed(control):
    log = control()
    killed = subprocess.run([sys.executable, "-c", HOLDER], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    # The keeper may not even have begun the service when its process is killed.
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().endswith("quit\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.read_text().splitlines()[-1] == "quit"


NOT_REACHED = "import sys; print('at a line\\nno such card', file=sys.stderr); sys.exit(1)"
HANGS = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("settings", "client", "reason"),
    [
        ({"started": 1, "servers": ""}, "", "nvidia-cuda-mps-control starts no server"),
        ({"servers": ""}, "", "nvidia-cuda-mps-control starts no server"),
        ({}, NOT_REACHED, "no such card"),
        ({}, HANGS, "nvidia-cuda-mps-control does not answer"),
        (None, "", "there is no nvidia-cuda-mps-control"),
    ],
)
def test_without_the_service_a_warning_says_why(settings, client, reason, control, tmp_path, monkeypatch):
    if settings is None:
        monkeypatch.setattr(sharing_module.shutil, "which", lambda name: None)
    else:
        control(**settings)
    monkeypatch.setattr(sharing_module, "_CLIENT", client)
    monkeypatch.setattr(sharing_module, "_PATIENCE", 0.5 if client == HANGS else 60.0)
    said = f"^processes take turns on the card, without NVIDIA's multi-process service: {reason}$"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.warns(UserWarning, match=said), sharing(CUDA) as variables:
        assert variables == {}
    deadline = time.monotonic() + 30  # its keeper may be slower than our patience
    while list(tmp_path.glob("mps-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(tmp_path.glob("mps-*")), "nothing is left behind"
    monkeypatch.setattr(sharing_module, "_no_use", None)  # not asked again
    with pytest.warns(UserWarning, match=said), sharing(CUDA) as variables:
        assert variables == {}


@pytest.mark.parametrize("where", ["variable", "usual"])
@pytest.mark.parametrize("servers", ["4711", ""])
def test_a_service_that_is_there_is_used_and_not_ended(where, servers, control, reached, tmp_path, monkeypatch):
    log = control(servers=servers)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/mps-of-others")
    if where == "usual":
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / "control").touch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with sharing(CUDA) as variables:
            assert variables == {}
    # What is left of one that was killed is no service.
    left = "processes take turns on the card, without NVIDIA's multi-process service: nvidia-cuda-mps-control starts no server"
    assert [str(each.message) for each in said] == ([] if servers else [left])
    assert log.read_text().splitlines() == [" in mps-, cards 3", "get_server_list"]


def test_nothing_is_started_where_it_is_not_needed(control):
    log = control()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sharing(torch.device("cpu")) as variables:
            assert variables == {}
    assert not log.exists()
