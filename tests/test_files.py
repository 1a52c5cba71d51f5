"""Files: whole or not at all, whatever happens."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
import torch

from resprobe import files
from resprobe.errors import StorageError
from resprobe.files import read_tensors, write_atomically, write_tensors


class Crash(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


def scratch_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*.tmp"))


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path):
    file = tmp_path / "a" / "b" / "result.json"
    write_atomically(file, b"old")
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["result.json"]


class Dying:
    """Lets the first `alive` of a write's calls to the system through, then crashes, after or instead of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, alive: int, done: bool):
        self.calls, self.alive, self.done = 0, alive, done
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "mkdir"), (Path, "open")):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, real):
        def call(*arguments, **options):
            self.calls += 1
            if self.calls <= self.alive:
                return real(*arguments, **options)
            if self.done:
                result = real(*arguments, **options)
                if hasattr(result, "close"):
                    result.close()  # as the system does for the dead
            raise Crash

        return call


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_crash_at_any_call_leaves_the_old_or_the_new_content(tmp_path, done):
    file, seen = tmp_path / "result.json", set()
    for alive in range(100):
        write_atomically(file, b"old")
        with pytest.MonkeyPatch.context() as monkeypatch:
            dying = Dying(monkeypatch, alive, done)
            try:
                write_atomically(file, b"new")
            except Crash:
                pass
            else:
                break
        seen.add(file.read_bytes())
    assert alive == dying.calls > 3
    assert seen == {b"old", b"new"}


def test_a_crash_in_the_middle_of_the_bytes_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_atomically(file, b"old content")
    real = Path.open

    class Half(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise Crash

    monkeypatch.setattr(Path, "open", lambda self, mode: Half(self, "wb"))
    with pytest.raises(Crash):
        write_atomically(file, b"new content")
    monkeypatch.setattr(Path, "open", real)
    assert file.read_bytes() == b"old content"
    (left,) = scratch_files(tmp_path)  # whoever takes up a run removes those in its folder
    write_atomically(file, b"new content")
    assert file.read_bytes() == b"new content"
    assert scratch_files(tmp_path) == [left]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content_and_no_scratch(tmp_path, monkeypatch, call):
    file = tmp_path / "result.json"
    write_atomically(file, b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError) as caught:
        write_atomically(file, b"new")
    assert str(caught.value) == f"cannot write {file}: No space left on device; nothing was half-written"
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("below", ["file", "file/deeper", "file/deeper/still"])
def test_a_place_below_a_file_cannot_be_written(tmp_path, below):
    (tmp_path / "file").write_bytes(b"mine")
    place = tmp_path / below / "result.json"
    with pytest.raises(StorageError) as caught:
        write_atomically(place, b"new")
    assert str(caught.value).startswith(f"cannot write {place}: ")
    assert str(caught.value).endswith("; nothing was half-written")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_name_too_long_is_said_in_one_line(tmp_path):
    with pytest.raises(StorageError, match="File name too long; nothing was half-written$"):
        write_atomically(tmp_path / ("x" * 300), b"new")


def test_a_read_only_place_is_said_in_one_line(tmp_path, monkeypatch):
    def read_only(self, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(StorageError, match="Read-only file system; nothing was half-written$"):
        write_atomically(tmp_path / "result.json", b"new")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_said_in_one_line(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied; nothing was half-written$"):
            write_atomically(tmp_path / "result.json", b"new")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("times", [2, 10_000])
def test_a_file_that_windows_holds_for_a_moment_is_replaced_all_the_same(tmp_path, monkeypatch, times):
    file, replace, refused = tmp_path / "kept", os.replace, []
    write_atomically(file, b"old")

    def held(source, target):
        refused.append(target)
        if len(refused) <= times:
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(files, "_PATIENCE", 0.2)
    if times == 2:
        write_atomically(file, b"new")
        assert (file.read_bytes(), len(refused)) == (b"new", 3)
        return
    with pytest.raises(StorageError, match="Permission denied; nothing was half-written"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old" and len(refused) > 2
    refused.clear()
    monkeypatch.setattr(files, "_WINDOWS", False)
    with pytest.raises(StorageError):
        write_atomically(file, b"new")
    assert len(refused) == 1  # elsewhere it means what it says


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells of maps on Linux alone")
def test_what_is_read_of_a_run_leaves_its_file_alone(tmp_path):
    write_tensors(tmp_path / "network.safetensors", {"a": torch.ones(3)})
    tensors = read_tensors(tmp_path / "network.safetensors")
    assert tensors["a"].tolist() == [1.0, 1.0, 1.0]
    assert "network.safetensors" not in Path("/proc/self/maps").read_text()
