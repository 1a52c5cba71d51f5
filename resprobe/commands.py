"""What all command lines have in common: exit codes, a mistake in one line, notes. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resprobe.errors import ProcessFailed, StorageError, SweepFailed, TrainingDiverged, UsageError, not_accepted

EXPECTED = (UsageError, SweepFailed, ProcessFailed, StorageError, TrainingDiverged)
"""Errors whose text says all that a user needs. Any other is a bug, and a bug's traceback is wanted."""


def answer(work: Callable[[], int | None], *, kept: str = "") -> int:
    """Does `work` and gives the command's exit code: 0 done, or what `work` returns, 2 unusable arguments, 1 otherwise.

    `kept`: what is said to be there of a work that is interrupted, or whose output nobody reads any more. Without it, a
    reader who leaves (`head`, say) has what he wanted.
    """
    readable_output()
    kept = kept and f"; {kept}"
    with notes_on_one_line(), ended_like_interrupted():
        try:
            code = work() or 0
            sys.stdout.flush()
        except EXPECTED as error:
            return _say(str(error), 2 if isinstance(error, UsageError) else 1, isinstance(error, ProcessFailed))
        except KeyboardInterrupt:
            return _say(f"interrupted{kept}", 1)
        except BrokenPipeError:
            # What is still to be printed, at the end of the process too, goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _say(f"nobody reads the output any more{kept}", 1) if kept else 0
    return code


def readable_output() -> None:
    """Has a terminal, or a file, that has no "→" show "?" rather than fail at the end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def ended_like_interrupted() -> Iterator[None]:
    """Told to end (by `kill`, `timeout`, a cluster's queue), the process keeps what it has, as after Ctrl-C. Not one of
    torchrun's, which would wait for the others meanwhile."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told once more, it must not leave that half-done
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _say(text: str, code: int, alone: bool = False) -> int:
    # What all of torchrun's processes meet, the first says; what one is alone with, that one.
    if alone or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(BrokenPipeError):  # of a reader of both streams who has left
            print(f"error: {text}", file=sys.stderr)
    return code


@contextlib.contextmanager
def notes_on_one_line() -> Iterator[None]:
    """Shows warnings as notes: where in our code they arise is nothing to a user."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print("note:", *str(message).split(), file=sys.stderr, flush=True)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def called_as(study: str = "") -> str:
    """How a study, or the list of them, is called: by the console command or as the script that was used, else by
    `python -m`."""
    if Path(sys.argv[0]).stem == "resprobe":
        return f"resprobe {study}".rstrip()
    main = sys.modules["__main__"]
    script = getattr(main, "__spec__", None) is None and hasattr(main, "__file__")  # a notebook has none
    theirs = getattr(main, "study", None)
    # A script that has the study from elsewhere does not take its arguments.
    if script and getattr(theirs, "name", "") == study != "" and theirs.judge.__module__ == "__main__":
        return f"python {sys.argv[0]}"
    return f"python -m studies.{study}".rstrip(".")


class Parser(argparse.ArgumentParser):
    """One whose errors are `UsageError`s, and whose options have no short forms."""

    def __init__(self, **settings: Any):
        super().__init__(**settings, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """`arguments`, by default those of the process."""
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            raise not_accepted("option", unknown[0], known)
        for name, value in vars(options).items():
            if isinstance(value, Path):  # a shell leaves alone the ~ of --out=~/mine
                setattr(options, name, value.expanduser())
        return options

    def error(self, message: str) -> None:
        raise UsageError(message)
