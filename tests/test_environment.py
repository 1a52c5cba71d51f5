"""What a number was measured with: the commit, and what was changed since."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from resprobe import environment
from resprobe.environment import git_commit, local_changes


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A file of code in a folder of its own."""
    (tmp_path / "resprobe").mkdir()
    file = Path(shutil.copy(environment.__file__, tmp_path / "resprobe"))
    monkeypatch.setattr(environment, "__file__", str(file))
    forget()
    yield file
    forget()


def forget() -> None:
    git_commit.cache_clear()
    local_changes.cache_clear()


def git(code: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org", *arguments]
    return subprocess.run(command, cwd=code.parent.parent, check=True, capture_output=True, text=True).stdout


def test_a_checkout_has_its_commit_and_what_was_changed_since(code):
    git(code, "init")
    git(code, "add", "resprobe")
    git(code, "commit", "-m", "begun")
    assert git_commit() == {"commit": git(code, "rev-parse", "HEAD").strip(), "local_changes": False}
    assert local_changes() == b""
    edited = "x = 'é'\n"
    code.write_text(edited, encoding="utf-8")
    forget()
    assert git_commit()["local_changes"]
    patch = code.parent.parent / "kept.patch"
    patch.write_bytes(local_changes())
    git(code, "checkout", "resprobe")
    assert code.read_text(encoding="utf-8") != edited
    git(code, "apply", patch.name)
    assert code.read_text(encoding="utf-8") == edited


def test_without_a_checkout_there_is_neither(code):
    assert git_commit() == {}
    assert local_changes() == b""


def test_a_checkout_of_something_else_is_not_that_of_the_code(code):
    git(code, "init")
    git(code, "commit", "--allow-empty", "-m", "something else")
    assert git_commit() == {}
    assert local_changes() == b""
