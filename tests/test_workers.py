"""Processes that do tasks: what is heard of them, and that a lost one takes no other with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from typing import Any

import pytest

from resprobe.errors import UsageError
from resprobe.workers import Lost, Perform, side_by_side


def start(mistake: str = "") -> Perform:
    if mistake:
        raise UsageError(mistake)
    return do


def do(task: tuple, tell) -> Any:
    what, *given = task
    if what == "who":
        return os.getpid()
    if what == "add":
        tell("half")
        return sum(given)
    if what == "fail":
        raise ValueError(*given)
    if what == "mistake":
        raise UsageError(*given)
    if what == "lose":
        raise Lost(*given)
    if what == "leave":
        os._exit(3)
    if what == "die" or (what == "die once" and not given[0].exists()):
        if given:
            given[0].touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        try:
            tell("begun")
            time.sleep(60)
        except KeyboardInterrupt:
            given[0].write_text("kept")
            if given[1:]:
                raise ValueError("the disk is full") from None
            raise
    return what


def heard(tasks, count=1, begin=start):
    """What is said, without the line of `do` that an error names."""
    with closing(side_by_side(tasks, count, begin)) as said:
        return [
            (index, word, re.sub(r" \(test_workers.py, line \d+\)$", "", what) if isinstance(what, str) else what)
            for index, word, what in said
        ]


def test_tasks_are_done_in_order_by_processes_that_stay():
    tasks = [("add", 1, 2), ("fail", "no"), ("who",), ("mistake", "depth (=21)"), ("who",), ("fail",)]
    said = heard(tasks)
    who = said[3][2]
    assert who != os.getpid()
    assert said == [
        (0, "news", "half"),
        (0, "done", 3),
        (1, "failed", "no"),
        (2, "done", who),
        (3, "mistake", "depth (=21)"),
        (4, "done", who),
        (5, "failed", "ValueError"),
    ]


def test_there_are_no_more_processes_than_tasks_or_than_asked_for():
    assert len({what for _, _, what in heard([("who",)] * 6, count=2)}) == 2
    assert len({what for _, _, what in heard([("who",)], count=8)}) == 1
    assert heard([]) == []


def test_what_cannot_be_started_is_a_mistake_of_each_task():
    assert heard([("who",), ("who",)], begin=partial(start, "no such plugin")) == [
        (0, "mistake", "no such plugin"),
        (1, "mistake", "no such plugin"),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_task_whose_process_is_killed_is_done_again_when_the_others_are_done(tmp_path):
    said = heard([("die once", tmp_path / "was here"), ("add", 1, 2), ("add", 3, 4)], count=2)
    assert (0, "again", "its process was killed (out of memory, perhaps)") in said
    assert [(index, what) for index, word, what in said if word == "done"][:2] == [(1, 3), (2, 7)]
    assert said[-1] == (0, "done", "die once")


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (("die",), "its process was killed (out of memory, perhaps)"),
        (("leave",), "its process ended with code 3"),
        (("lose", "the device is broken"), "the device is broken"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_task_that_is_lost_twice_is_lost(task, why):
    said = heard([("who",), task, ("who",)])
    assert said[1:2] + said[3:] == [(1, "again", why), (1, "lost", why)]
    assert said[0][2] != said[2][2], "another process goes on"


@pytest.mark.parametrize("otherwise", [(), ("fails",)], ids=["interrupted", "another error in the interrupt's place"])
def test_who_asked_may_leave(tmp_path, otherwise):
    kept, never = tmp_path / "kept", tmp_path / "never"
    with closing(side_by_side([("who",), ("wait", kept, *otherwise), ("wait", never)], 1, start)) as said:
        _, _, process = next(said)
        assert next(said) == (1, "news", "begun")
    assert kept.read_text() == "kept", "what is interrupted keeps what it has"
    assert not never.exists(), "what waits for its turn is not begun"
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_the_words_for_a_killed_process_need_no_name_of_the_signal(monkeypatch):
    from resprobe.workers import _how_it_ended

    assert _how_it_ended(-9) == "was killed (out of memory, perhaps)"
    monkeypatch.delattr(signal, "SIGKILL")  # as on Windows
    assert _how_it_ended(-9) == "was killed (out of memory, perhaps)"
    assert _how_it_ended(1) == "ended with code 1"


HALF_OPEN = """
import multiprocessing, os
from multiprocessing import connection, context

kept = []


def pipe(self, duplex=True):
    ours, theirs = connection.Pipe(duplex)
    kept.append(os.dup(theirs.fileno()))
    return ours, theirs


context.SpawnContext.Pipe = pipe
if multiprocessing.current_process().name == "resprobe-worker":
    os._exit({code})
if __name__ == "__main__":
    from resprobe.errors import UsageError
    from resprobe.workers import side_by_side

    try:
        print(list(side_by_side(["task"], 1, print)))
    except UsageError as error:
        print("refused:", error)
"""
"""Keeps the other end of each connection, as Windows does until a new process takes it."""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (76, "refused: the script trains wherever it is imported"),
        (1, "[(0, 'again', 'its process ended with code 1'), (0, 'lost', 'its process ended with code 1')]"),
    ],
)
def test_a_process_that_ends_before_it_has_its_connection_is_heard_of(code, said, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(HALF_OPEN.format(code=code))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(said), done.stderr
