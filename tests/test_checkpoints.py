"""Checkpoints: whole or not at all, whatever happens, and no code run when they are read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import pickle
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_files import Crash, Dying, scratch_files
from tiny import assert_same

from resprobe.checkpoints import (
    _MAGIC,
    load_checkpoint,
    not_kept,
    remove_checkpoints,
    save_checkpoint,
)
from resprobe.errors import StorageError


def state(number: int) -> dict:
    return {"iteration": number, "weights": torch.full((3, 2), float(number)), "rows": [{"loss": 0.5}], "lowest": None}


def quietly(path: Path) -> dict | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_checkpoint(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoint.pt"


def test_there_is_none_before_the_first(path):
    assert quietly(path) is None


def test_what_is_saved_is_loaded_and_the_one_before_is_kept(path):
    for number in (1, 2, 3):
        save_checkpoint(path, state(number))
        assert_same(quietly(path), state(number))
    assert sorted(os.listdir(path.parent)) == ["checkpoint.pt", "checkpoint.pt.previous"]
    path.unlink()
    assert_same(quietly(path), state(2))


def test_they_are_removed_with_all_their_names(path):
    for number in (1, 2):
        save_checkpoint(path, state(number))
    path.with_name("checkpoint.pt.incoming").write_bytes(path.read_bytes())
    (path.parent / "history.csv").write_text("kept")
    remove_checkpoints(path)
    assert os.listdir(path.parent) == ["history.csv"]
    remove_checkpoints(path)  # nothing there is nothing to complain of


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("earlier", [1, 2])
def test_a_crash_at_any_call_leaves_the_newest_or_the_one_before(tmp_path, earlier, done):
    found = set()
    for alive in range(100):
        path = tmp_path / str(alive) / "checkpoint.pt"
        for number in range(1, earlier + 1):
            save_checkpoint(path, state(number))
        with pytest.MonkeyPatch.context() as monkeypatch:
            dying = Dying(monkeypatch, alive, done)
            try:
                save_checkpoint(path, state(earlier + 1))
            except Crash:
                pass
            else:
                break
        number = quietly(path)["iteration"]
        assert_same(quietly(path), state(number))
        found.add(number)
        # Life goes on: the next ones are saved and found as if nothing had been.
        for number in (10, 11):
            save_checkpoint(path, state(number))
            assert_same(quietly(path), state(number))
        path.unlink()
        assert_same(quietly(path), state(10))
    assert alive == dying.calls > 5
    assert found == {earlier, earlier + 1}


@pytest.mark.parametrize("failing", range(3))
def test_a_full_disk_leaves_the_checkpoints_as_they_were(path, monkeypatch, failing):
    for number in (1, 2):
        save_checkpoint(path, state(number))
    real, calls = os.replace, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError) as caught:
        save_checkpoint(path, state(3))
    monkeypatch.setattr(os, "replace", real)
    named = path.with_name("checkpoint.pt.incoming") if failing == 0 else path
    assert str(caught.value) == f"cannot write {named}: No space left on device; nothing was half-written"
    assert quietly(path)["iteration"] == (2 if failing == 0 else 3)
    assert scratch_files(path.parent) == []


def damage_truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def damage_empty(content: bytes) -> bytes:
    return b""


def damage_header(content: bytes) -> bytes:
    return content.replace(b"sha256", b"sha257", 1)


def damage_replaced(content: bytes) -> bytes:
    return b"\x00" * len(content)


DAMAGES = [damage_truncate, damage_bit, damage_empty, damage_header, damage_replaced]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_with_a_warning(path, damage):
    for number in (1, 2):
        save_checkpoint(path, state(number))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged") as caught:
        kept = load_checkpoint(path)
    assert_same(kept, state(1))
    assert [str(warning.message) for warning in caught] == [f"checkpoint {path} is damaged and was passed over"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_damaged_is_none(path, damage):
    for number in (1, 2):
        save_checkpoint(path, state(number))
    files = [path, path.with_name("checkpoint.pt.previous")]
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert load_checkpoint(path) is None
    assert [str(warning.message) for warning in caught] == [
        f"checkpoint {file} is damaged and was passed over" for file in files
    ]


def test_a_damaged_incoming_one_does_not_hide_the_whole_ones(path):
    save_checkpoint(path, state(1))
    incoming = path.with_name("checkpoint.pt.incoming")
    incoming.write_bytes(damage_truncate(path.read_bytes()))
    with pytest.warns(UserWarning, match="incoming is damaged and was passed over"):
        assert_same(load_checkpoint(path), state(1))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path, where, bit):
    path = tmp_path / "checkpoint.pt"
    if not path.exists():
        save_checkpoint(path, state(1))
    whole = path.read_bytes()
    where %= len(whole)
    other = tmp_path / "flipped.pt"
    other.write_bytes(whole[:where] + bytes([whole[where] ^ (1 << bit)]) + whole[where + 1 :])
    with pytest.warns(UserWarning, match="damaged"):
        assert load_checkpoint(other) is None


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "owned")


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_malicious_pickle_never_runs(path, tmp_path, how):
    target = tmp_path / "owned"
    if how == "pickle":
        payload = pickle.dumps({"weights": Malicious(target)}, protocol=2)
    else:
        buffer = io.BytesIO()
        torch.save({"weights": Malicious(target)}, buffer)
        payload = buffer.getvalue()
    path.parent.mkdir()
    # Whoever can write the file can write its checksum.
    path.write_bytes(_MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    with pytest.warns(UserWarning, match="is damaged and was passed over"):
        assert load_checkpoint(path) is None
    assert not target.exists()
    if how == "torch":  # the test's own weapon is loaded
        torch.load(io.BytesIO(payload), weights_only=False)
        assert target.read_text() == "owned"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (
            {"rows": [(1, 2.0, "a", None, True, b"c", 1j)], "of": Counter("ab"), "shape": torch.Size([2]), "set": {1}},
            "",
        ),
        ([torch.zeros(2), {"at": OrderedDict(a=torch.float32)}, torch.device("cpu"), bytearray(b"d")], ""),
        ({"rows": [(1, np.float64(2.0))]}, "numpy.float64"),
        ({("a", np.int64(1)): 2}, "numpy.int64"),
        ([np.zeros(3)], "numpy.ndarray"),
        ({np.float32(1)}, "numpy.float32"),
        (Path("a"), f"{type(Path()).__module__}.{type(Path()).__name__}"),
    ],
)
def test_what_a_checkpoint_keeps_is_what_torch_reads_back(value, kind, tmp_path):
    assert not_kept(value) == kind
    save_checkpoint(tmp_path / "checkpoint.pt", {"value": value})
    with contextlib.nullcontext() if not kind else pytest.warns(UserWarning, match="is damaged and was passed over"):
        assert (load_checkpoint(tmp_path / "checkpoint.pt") is None) == bool(kind)
