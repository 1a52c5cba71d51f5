"""Where and in which precision to compute."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys

import pytest
import torch

from resprobe import devices
from resprobe.devices import autocast, deterministic, flush_denormals, resolve_device, resolve_precision
from resprobe.errors import UsageError

CPU = torch.device("cpu")


def there(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("available", "chosen"),
    [({}, "cpu"), ({"cuda": True}, "cuda"), ({"mps": True}, "mps"), ({"cuda": True, "mps": True}, "cuda")],
)
def test_auto_takes_the_fastest_there_is(monkeypatch, available, chosen):
    there(monkeypatch, **available)
    assert resolve_device("auto") == torch.device(chosen)
    assert resolve_device() == torch.device(chosen)


def test_a_named_device_is_taken(monkeypatch):
    there(monkeypatch, cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cpu") == CPU
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match=r"^device \(='cuda:2'\) is not there; this machine has 2, from cuda:0 on$"):
        resolve_device("cuda:2")
    assert resolve_device(torch.device("meta")) == torch.device("meta")


@pytest.mark.parametrize("name", ["tpu", "cpu:first", ""])
def test_an_unknown_device_is_named_with_what_is_accepted(name):
    with pytest.raises(UsageError) as caught:
        resolve_device(name)
    text = str(caught.value)
    assert text.startswith(f"device (={name!r}) is unknown; accepted: auto, cpu, cuda, mps")
    assert "\n" not in text


def test_a_mistyped_device_gets_the_nearest_name():
    with pytest.raises(UsageError, match="nearest: cuda$"):
        resolve_device("cudda")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_without_cuda(monkeypatch, name):
    there(monkeypatch)
    with pytest.raises(UsageError) as caught:
        resolve_device(name)
    assert str(caught.value) == f"device (={name!r}) is not available on this machine; accepted here: auto, cpu"


def test_mps_without_mps_offers_cuda_where_it_is(monkeypatch):
    there(monkeypatch, cuda=True)
    with pytest.raises(UsageError) as caught:
        resolve_device("mps")
    assert str(caught.value) == "device (='mps') is not available on this machine; accepted here: auto, cuda, cpu"


@pytest.mark.parametrize("name", [0, None, ["cpu"]])
def test_what_is_no_name_of_a_device(name):
    with pytest.raises(UsageError, match=r"^device \(=.*\) is unknown; accepted: auto, cpu, cuda, mps"):
        resolve_device(name)


def test_an_unknown_precision_is_named():
    with pytest.raises(UsageError) as caught:
        resolve_precision("fp16", CPU)
    assert str(caught.value) == "precision (='fp16') is unknown; accepted: auto, fp32, bf16; nearest: bf16"


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_named_precision_is_taken_whatever_the_processor(monkeypatch, name):
    monkeypatch.setattr(devices, "_cpu_computes_bf16", lambda: name == "fp32")
    assert resolve_precision(name, CPU) == name


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_processor_computes_in_it(monkeypatch, native, chosen):
    monkeypatch.setattr(devices, "_cpu_computes_bf16", lambda: native)
    assert resolve_precision("auto", CPU) == chosen


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_from_ampere_on(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == chosen


def test_auto_is_not_decided_for_a_card_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError) as caught:
        resolve_precision("auto", torch.device("cuda"))
    assert str(caught.value) == "precision (='auto') cannot be decided without a GPU; accepted here: fp32, bf16"


def test_auto_is_fp32_elsewhere():
    assert resolve_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize(
    ("flags", "native"), [("flags : avx512_bf16 amx", True), ("flags : sse avx512f", False), ("", False)]
)
def test_what_the_processor_says_of_itself(monkeypatch, flags, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices, "_cpu_flags", lambda: flags)
    assert devices._cpu_computes_bf16() is native


def test_the_card_is_for_those_marked_alone():
    assert not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "and from processes that tests start"


def test_autocast_in_fp32_is_nothing():
    with autocast(CPU, "fp32") as entered:
        assert entered is None
        assert not torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert isinstance(autocast(CPU, "fp32"), contextlib.nullcontext)


def test_autocast_in_bf16_multiplies_in_bf16_and_ends_with_its_block():
    weights = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (weights @ weights).dtype == torch.bfloat16
        assert torch.nn.functional.batch_norm(weights, None, None, training=True).dtype == torch.float32
    assert weights.dtype == torch.float32
    assert (weights @ weights).dtype == torch.float32


def unpooled():
    """Of which torch has no way that repeats itself."""
    images, places = torch.nn.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2, return_indices=True)
    return torch.nn.functional.max_unpool2d(images, places, 2)


def test_within_its_block_only_what_repeats_itself_is_computed(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            unpooled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    unpooled()


def test_what_was_asked_of_torch_before_is_so_again_after_it():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(False):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        with deterministic():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                unpooled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")
def test_freed_memory_is_kept():
    script = """
import resource, sys, torch
from resprobe.devices import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():  # 64 MiB each: more than glibc keeps by itself, whatever was freed before
    kept = [torch.empty(2**24).fill_(1.0) for _ in range(2)]
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        way: int(subprocess.run([sys.executable, "-c", script, way], check=True, stdout=subprocess.PIPE).stdout)
        for way in ("kept", "returned")
    }
    assert 10 * faults["kept"] < faults["returned"]


def test_denormals_are_flushed_in_every_thread():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal floats")
    torch.set_flush_denormal(False)
    assert (torch.full((1,), 1e-40) * 0.5).item() != 0, "the test's own number is denormal"
    assert flush_denormals() is True
    many = torch.full((torch.get_num_threads() << 18,), 1e-40)
    assert not (many * 0.5).any()


def test_threads_that_do_not_flush_are_told_of(monkeypatch):
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: False)
    real = torch.full
    # One thread's share of the numbers is not flushed: stood in for by numbers that are not denormal.
    monkeypatch.setattr(torch, "full", lambda shape, value: real(shape, 1.0))
    assert flush_denormals() is False
