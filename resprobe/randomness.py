"""Random numbers: what looks at a network, or tries it out, leaves the generators as they were."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn


@contextmanager
def keeping_random_state(network: nn.Module) -> Iterator[None]:
    """Puts back after a `with` block the states of Python's, numpy's and torch's generators, on the host and on the GPUs
    that `network` is on."""
    devices = {tensor.device for tensor in network.parameters()}
    of_torch, of_python, of_numpy = host_random_state()
    on_devices = {device: state for device in devices if (state := device_random_state(device)) is not None}
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
        for device, state in on_devices.items():
            set_device_random_state(state, device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Begins torch's random numbers on the host at `seed` for the length of a `with` block; the caller's go on after it.

    So networks are initialized for a run: `build` in such a block gives the weights that `train` begins with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and no GPU's, which are the caller's
        yield


def device_random_state(device: torch.device) -> torch.Tensor | None:
    """The state of torch's generator on a GPU; None on the host."""
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_device_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Puts back what `device_random_state` gave."""
    if device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def host_random_state() -> tuple:
    """The states of torch's, Python's and numpy's generators on the host."""
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()


def host_random_bytes() -> tuple[bytes, bytes]:
    """The same, to be compared."""
    of_torch, *others = host_random_state()
    return of_torch.numpy().tobytes(), pickle.dumps(others)
