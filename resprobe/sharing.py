"""One NVIDIA card, several processes that compute on it at the same time: by NVIDIA's multi-process service (MPS).

Without it they take turns: while kernels of one process run, those of the others wait, however little of the card the
first ones fill. The service needs no rights and changes no setting of the card. A fault on the card itself (not a Python
error) ends all processes that share it in this way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from resprobe.errors import last_words, one_line

_CONTROL = "nvidia-cuda-mps-control"
_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
_USUAL_PIPES = "/tmp/nvidia-mps"
_PATIENCE = 60.0
"""Seconds for a process to reach the card: one that cannot reach the service may wait for ever."""
_refused: list[str] = []
"""Why there is no service, once that is known in this process."""
_CLIENT = "import torch; torch.ones(1, device={device!r}).item()"
"""What a process does that reaches the card."""
_KEEPER = f"""
if {_CONTROL} -d; then
    read -r _
    echo quit | {_CONTROL}
fi
rm -rf "${_PIPES}"
"""
"""Keeps the service for as long as somebody holds the other end of its standard input, who may be killed."""


@contextmanager
def sharing(device: torch.device) -> Iterator[Mapping[str, str]]:
    """Environment variables by which processes of the `with` block compute on `device` at the same time.

    Set before a process first uses the card. None are needed on a CPU, nor where a service runs already. Where there is
    none to be had a warning says why, and processes take turns.
    """
    if device.type != "cuda":
        yield {}
        return
    if _refused:  # it would not come later, and to ask takes minutes where nothing answers
        _warn(_refused[0])
        yield {}
        return
    if _PIPES in os.environ or Path(_USUAL_PIPES, "control").exists():
        # These may be what is left of one that was killed.
        if reason := _no_use(device, {}):
            _warn(reason)
        yield {}
        return
    if shutil.which(_CONTROL) is None:
        _warn(f"there is no {_CONTROL}")
        yield {}
        return
    folder = tempfile.mkdtemp(prefix="mps-")  # a short path: sockets have no room for a long one
    ours = {_PIPES: folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    # The service must not choose cards: processes that choose the same ones would count them anew.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | ours
    keeper = subprocess.Popen(
        ["sh", "-c", _KEEPER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for those who train
    )
    try:
        reason = _no_use(device, ours)
        if reason:
            _warn(reason)
        yield {} if reason else ours
    finally:
        keeper.stdin.close()  # type: ignore[union-attr]
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(_PATIENCE)


def _no_use(device: torch.device, ours: Mapping[str, str]) -> str:
    """Why a process cannot compute on `device` through the service; empty if it can."""

    def answer(*command: str, asked: str = "") -> subprocess.CompletedProcess[str]:
        environment = os.environ | ours
        return subprocess.run(
            command, input=asked, env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )

    try:
        client = answer(sys.executable, "-c", _CLIENT.format(device=str(device)))
        if client.returncode:
            return last_words(client.stderr) or f"it ended with code {client.returncode}"
        # A process goes on without the service where that has not started.
        servers = answer(_CONTROL, asked="get_server_list\n").stdout
    except subprocess.TimeoutExpired:
        return f"{_CONTROL} does not answer"
    except OSError as error:  # a service of others', from a container without its program
        return one_line(error)
    return "" if any(map(str.isdigit, servers.split())) else f"{_CONTROL} starts no server"


def _warn(reason: str) -> None:
    _refused[:] = [reason]
    warnings.warn(f"processes take turns on the card, without NVIDIA's multi-process service: {reason}")
