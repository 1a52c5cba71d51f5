"""Random numbers that are global: those of torch, Python and numpy, which networks draw (dropout, a stranger's block).

What looks at a network, or tries it out, leaves the generators as they were. Batches draw from generators of their own.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn

_HOST = torch.device("cpu")


@contextmanager
def keeping_random_state(network: nn.Module) -> Iterator[None]:
    """Puts back after a `with` block the states of Python's, numpy's and torch's generators, on the host and on the GPUs
    that `network` is on."""
    devices = {_HOST, *(tensor.device for tensor in network.parameters())}
    states = {device: random_state(device) for device in devices}
    try:
        yield
    finally:
        for device, state in states.items():
            set_random_state(state, device)


@contextmanager
def drawing_from(state: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """Draws random numbers from `state` on for the length of a `with` block; the caller's go on after it."""
    outer = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(outer, device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Begins torch's random numbers on the host at `seed` for the length of a `with` block; the caller's go on after it.

    So networks are initialized for a run: `build` in such a block gives the weights that `train` begins with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and no GPU's, which are the caller's
        yield


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators on the host and on `device`, as tensors and plain data, which a checkpoint may hold.

    "cpu": torch's, "python", "numpy", and "cuda" or "mps": torch's on that device.
    """
    state = {"cpu": torch.get_rng_state(), "python": random.getstate(), "numpy": _plain(numpy.random.get_state())}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` gave. Where that was of another kind of device, `device` keeps its own."""
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def seeded_random_state(seed: int, device: torch.device) -> dict[str, Any]:
    """What `random_state` would give after `torch.manual_seed` and its like. The caller's generators are left alone."""
    state = {"cpu": torch.Generator().manual_seed(seed).get_state(), "python": random.Random(seed).getstate()}
    state["numpy"] = _plain(numpy.random.RandomState(numpy.random.MT19937(seed)).get_state())
    if device.type != "cpu":
        state[device.type] = torch.Generator(device).manual_seed(seed).get_state()
    return state


def host_random_bytes() -> tuple[bytes, bytes]:
    """The states of the generators on the host, to be compared."""
    state = random_state(_HOST)
    return state.pop("cpu").numpy().tobytes(), pickle.dumps(state)


def _plain(of_numpy: tuple) -> tuple:
    """numpy's state with a list in the place of its array."""
    kind, keys, *rest = of_numpy
    return kind, keys.tolist(), *rest
