"""Processes that do tasks side by side. A task that takes its process with it takes no other task with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from resprobe.commands import notes_on_one_line
from resprobe.errors import UsageError, one_line

Perform = Callable[[Any, Callable[[Any], None]], Any]
"""A task, and whom to tell how it goes → what comes of it."""
Word = Literal["news", "done", "failed", "mistake", "lost", "again"]
"""What is heard of a task, and what comes with it: "news", how it goes; "done", what came of it; "failed", the text of its error;
"mistake", the text of a `UsageError`; "lost", why its process is no more; "again", the same where the task is done again."""


def side_by_side(tasks: Sequence[Any], count: int, start: Callable[[], Perform]) -> Iterator[tuple[int, Word, Any]]:
    """Does tasks in order, `count` at a time, and yields what is heard of them: index, word, and what belongs to it.

    `start` is called in each process once; what it returns does the tasks. A task whose process is lost is done again,
    alone, when the others are done: they may have taken what it needed. Closing the iterator, or an error where it waits,
    interrupts what is under way, and waits until that has ended.
    """
    if sys.platform == "win32":
        count = min(count, 31)  # it waits for 63 things at most, and each process has two
    waiting, again = deque(range(len(tasks))), deque[int]()
    idle: list[_Worker] = []
    running: dict[Connection, tuple[_Worker, int]] = {}
    lost: set[int] = set()
    try:
        while waiting or again or running:
            while (waiting and len(running) < count) or (again and not waiting and not running):
                if not waiting:  # alone: those without a task hold memory, and a card that may have to recover
                    while idle:
                        idle.pop().end()
                index = (waiting or again).popleft()
                worker = idle.pop() if idle else _Worker(start)
                running[worker.connection] = worker, index
                worker.begin(tasks[index])
            ready = wait([end for worker, _ in running.values() for end in worker.ends])
            for connection, (worker, index) in list(running.items()):
                if not any(end in ready for end in worker.ends):
                    continue
                word, what = worker.hear()
                if word == "lost":
                    worker.end()
                    word = "lost" if index in lost else "again"
                    lost.add(index)
                if word == "again":
                    again.append(index)
                if word != "news":
                    del running[connection]
                if word in ("done", "failed", "mistake"):
                    idle.append(worker)
                yield index, word, what
    except BaseException:
        for worker, _ in running.values():
            worker.interrupt()
        raise
    finally:
        for worker in (*idle, *(worker for worker, _ in running.values())):
            worker.end()


class Lost(RuntimeError):
    """Raised by a task that leaves its process unable to do others. The text says why."""


class _Worker:
    """A process in which `start` is called, and what that returns for each task. It ends with this process."""

    def __init__(self, start: Callable[[], Perform]):
        # Spawned, not forked: torch's threads and CUDA do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, start), name=_NAME)
        with _deaf_to_interrupts():
            self._process.start()
        self._interrupted = False
        theirs.close()

    def begin(self, task: Any) -> None:
        """Hands the process a task. It must have none."""
        with suppress(OSError):  # it is gone already, as will be heard
            self.connection.send(task)

    @property
    def ends(self) -> tuple[Connection, int]:
        """What to wait for, as `hear_from` does: that it says something, and that it has ended."""
        return self.connection, self._process.sentinel

    def hear(self) -> tuple[Word, Any]:
        """What the process says next of its task, or what has become of it."""
        try:
            return hear_from(self._process, self.connection)
        except (EOFError, OSError):
            self._process.join()
            if self._process.exitcode == _IMPORTED:
                raise UsageError(f"{_UNGUARDED}, or ask for concurrency '1'") from None
            return "lost", f"its process {_how_it_ended(self._process.exitcode)}"

    def interrupt(self) -> None:
        """Has the process leave its task, as after Ctrl-C, and end."""
        self._process.terminate()
        self._interrupted = True

    def end(self) -> None:
        """Waits until the process has ended, which one without a task does now."""
        if not self._interrupted:  # what is still said must not fail for want of a listener
            self.connection.close()
        self._process.join()
        self.connection.close()


def hear_from(process: BaseProcess, connection: Connection) -> Any:
    """What a process says next. Raises `EOFError`, or an `OSError`, if it has ended without a word.

    On Windows the process that started it holds the other end of the connection too, until it is taken: of one that ends before
    that nothing is ever heard, and a word alone must not be waited for.
    """
    wait([connection, process.sentinel])
    if not connection.poll():
        raise EOFError
    return connection.recv()


def _how_it_ended(code: int | None) -> str:
    if code == -getattr(signal, "SIGKILL", 9):  # which Windows has not
        return "was killed (out of memory, perhaps)"
    return f"ended with {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started here never hear of Ctrl-C, which reaches all of a terminal's: this one acts on it, after
    the block, and tells them once."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_NAME = "resprobe-worker"
_IMPORTED = 76
"""Exit code of a process that found itself training while it was being started."""


_UNGUARDED = (
    "the script trains wherever it is imported, as by processes that are to train side by side or to read images; put what "
    "trains under if __name__ == '__main__':"
)


def end_if_imported(*, whoever: bool = False) -> None:
    """Ends a process that is being started, and imports the script that starts it for what tasks may need of that, where the
    script would train.

    Its own alone, since others' (a pool's) import the script too, and may need what it trains. `whoever`: any such process,
    where it would have to wait for what the one that starts it is doing: one that reads images for a training, say.
    """
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):
        if process.name == _NAME:
            os._exit(_IMPORTED)
        if whoever:
            raise UsageError(_UNGUARDED)


# -- in the process --------------------------------------------------------------------------------------------------


def _serve(connection: Connection, start: Callable[[], Perform]) -> None:
    busy = stopping = False

    def stop(*_: object) -> None:
        """A task is interrupted, and keeps what it has; without one there is nothing to keep."""
        nonlocal stopping
        stopping = True
        if busy:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told once more, it must not leave that half-done
            raise KeyboardInterrupt
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where that is not inherited
    signal.signal(signal.SIGTERM, stop)
    with notes_on_one_line():
        perform: Perform | None = None
        while True:
            try:
                task = connection.recv()
            except EOFError:  # there are no more
                return
            busy = True
            try:
                perform = perform or start()
                answer: tuple[Word, Any] = ("done", perform(task, lambda news: connection.send(("news", news))))
            except KeyboardInterrupt:
                os._exit(0)
            except UsageError as error:
                answer = ("mistake", str(error))
            except Lost as error:
                answer = ("lost", one_line(error))
            except Exception as error:
                answer = ("failed", one_line(error))
            busy = False
            if stopping:  # whatever has become of the interrupt in the task, nobody waits for what it came to
                os._exit(0)
            connection.send(answer)
            if answer[0] == "lost":
                return


def end_with_parent() -> None:
    """A process whose parent was killed must not work on for nobody. Never returns but in a process without a parent."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
