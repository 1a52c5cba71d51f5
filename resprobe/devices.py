"""Where and in which precision to compute."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from resprobe.errors import UsageError, not_accepted

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""mallopt's numbers, from glibc's malloc.h: free memory above which it is returned (-1: never), and how many pieces are
asked of the system one by one."""


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device for a name: "auto" is CUDA, else Apple's GPU, else the CPU. Raises `UsageError` if it is not there."""
    if isinstance(name, torch.device):
        return name
    kind = name.split(":")[0] if isinstance(name, str) else None
    if kind not in DEVICES:
        raise not_accepted("device", name, DEVICES)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        return torch.device(next(candidate for candidate in ("cuda", "mps", "cpu") if there[candidate]))
    if not there[kind]:
        usable = ["auto", *(candidate for candidate, available in there.items() if available)]
        raise UsageError(f"device (={name!r}) is not available on this machine; accepted here: {', '.join(usable)}")
    try:
        device = torch.device(name)
    except RuntimeError:  # "cpu:first"
        raise not_accepted("device", name, DEVICES) from None
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device (={name!r}) is not there; this machine has {torch.cuda.device_count()}, from cuda:0 on"
        )
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16". "auto" is bf16 where the processor computes in it natively, else fp32."""
    if name not in PRECISIONS:
        raise not_accepted("precision", name, PRECISIONS)
    if name != "auto":
        return name
    if device.type == "cuda":
        if not torch.cuda.is_available():  # the GPUs are another machine's
            raise UsageError("precision (='auto') cannot be decided without a GPU; accepted here: fp32, bf16")
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        return "bf16" if _cpu_computes_bf16() else "fp32"
    return "fp32"


def _cpu_computes_bf16() -> bool:
    # There is no public question for this in torch; the private one is used where it exists.
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if known is not None and known():
        return True
    return sys.platform == "linux" and "avx512_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            return next((line for line in stream if line.startswith("flags")), "")
    except OSError:
        return ""


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision for the forward pass: weights, normalization and the loss stay in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def deterministic(wanted: bool = True, *, warn_only: bool = False) -> Iterator[None]:
    """Has torch take, within a `with` block, only what computes the same last digits each time on the same machine, as its
    `torch.use_deterministic_algorithms` does: an operation that has no such way raises `RuntimeError`, or is warned of.

    `wanted` false leaves torch as it is.
    """
    if not wanted:
        yield
        return
    # cuBLAS's own condition, which torch asks for: workspaces of a fixed size for products on several streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    # A search for the errors of programs that read what nobody wrote: one more pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of images in memory in which convolutions are fastest: channels last on a CPU and on CUDA. Not on Apple's
    GPUs, where gradients of batch normalization and of pools are wrong with it (pytorch#175189, #175190)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def place(network: nn.Module, device: torch.device) -> None:
    """Moves a network to `device`, in place, with its convolutions' weights in the layout of `memory_format`."""
    network.to(device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format(device))


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def fastest(work: Callable[[], object], device: torch.device, passes: int = 3) -> float:
    """Seconds of the fastest of some passes of `work`: what else a machine does can only slow one."""

    def once() -> float:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - started

    return min(once() for _ in range(passes))


def usable(device: torch.device) -> bool:
    """Does this process still compute on the device? After a fault in a kernel (an index beyond its tensor, say), CUDA
    refuses a process everything."""
    try:
        torch.ones(1, device=device).item()
        synchronize(device)
    except RuntimeError:
        return False
    return True


def cores() -> int:
    """How many of the processor's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Has torch compute with `count` threads on a CPU within a `with` block.

    Times of one thread are steadier on a busy machine, where several wait for the slowest at every layer. Sums are split
    among threads, so that the last digits of what comes out depend on their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_cpu() -> bool:
    """Settings of this process with which small networks train fast on a CPU: `keep_freed_memory`, `flush_denormals`."""
    keep_freed_memory()
    return flush_denormals()


def keep_freed_memory() -> None:
    """Has glibc keep the memory that tensors free, and give it to those of the next step.

    Left to itself it returns large pieces to the system, and gets them anew page by page, zeroed, in every step: with them
    kept, ResNet-20 trains 7 % faster on two cores (docs/measurements/). The process then stays as large as it was
    at its largest. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def flush_denormals() -> bool:
    """Makes the processor treat denormal floats as zero, in this thread and those it starts. True if all threads do.

    A deep plain network's activations and gradients fall into the denormal range, where x86 arithmetic is many times
    slower. The setting is inherited when a thread starts, so it must come before torch's first parallel operation.
    """
    torch.set_flush_denormal(True)
    smallest = torch.full((torch.get_num_threads() << 16,), 1e-40)
    return not bool((smallest * 0.5).any())
