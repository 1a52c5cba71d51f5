"""The errors that users see: one line each, with the value, what is accepted, and the nearest name."""

from __future__ import annotations

import difflib
import math
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_OURS = (_ROOT / "resprobe", _ROOT / "plugins", _ROOT / "studies")
_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_INSTALLED = {"site-packages", "dist-packages"}


_ALSO = {"gpu": "cuda", "lr": "learning_rate", "wd": "weight_decay", "epochs": "iterations", "--epochs": "--iterations"}
"""What else things are called, where no likeness of letters tells."""


class _Said:
    """An error whose text says all that a user needs."""

    def _render_traceback_(self) -> list[str]:
        """What IPython, and with it a notebook, shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(_Said, ValueError):
    """Something the user asked for cannot be done as asked. Studies print it as one line and exit with code 2."""


class DamagedFile(UsageError):
    """A file of the data cannot be read."""


class StorageError(_Said, RuntimeError):
    """What was to be kept could not be written, or what is kept not be read: the disk is full, read-only, or gone."""


class TrainingDiverged(_Said, RuntimeError):
    """The loss, or a weight, stopped being finite. Names the iteration, the learning rate and the first layer concerned."""


class SweepFailed(_Said, RuntimeError):
    """Some runs of a sweep failed; the others went on. The text names each failure and what is kept, `keys` the runs."""

    def __init__(self, text: str, keys: Iterable[str] = ()):
        super().__init__(text)
        self.keys = frozenset(keys)


class ProcessFailed(_Said, RuntimeError):
    """A training of several processes ends by what one of them met, which the others cannot know."""


def one_line(error: BaseException, named: bool = False) -> str:
    """An error's text on one line: after its type if `named` or if the text is just a key; the type alone if there is no text.

    The line of a user's own file that it arose in or below comes last, if there is one and it is no mistake of use. A fault on
    a card is told by its first line: torch goes on with advice on how to look for it.
    """
    text = str(error)
    if text.startswith("CUDA error"):
        text = text.splitlines()[0]
    text, kind = " ".join(text.split()), type(error).__name__
    named = named or isinstance(error, KeyError)
    return (f"{kind}: {text}" if named and text else text or kind) + place_of(error)


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Raises what goes wrong in the `with` block as a `UsageError` in one line that begins with `what` ("… cannot be built").

    For a stranger's code, which may raise anything. A `UsageError` of its own says what is wrong, and passes as it is.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{what}: {one_line(error, named=True)}") from error


def place_of(error: BaseException) -> str:
    """The line of a user's file that an error arose in, as Python writes it behind mistakes of syntax; else nothing."""
    if isinstance(error, UsageError | SyntaxError):
        return ""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    theirs = next((frame for frame in frames if _is_a_users(Path(frame.filename))), None)
    return f" ({Path(theirs.filename).name}, line {theirs.lineno})" if theirs else ""


def _is_a_users(file: Path) -> bool:
    """Whether a file is neither resprobe's, nor an installed package's, nor Python's own. A cell of a notebook is none."""
    file = file.resolve()
    return file.is_file() and not is_installed(file) and not any(map(file.is_relative_to, _OURS))


def is_installed(file: Path) -> bool:
    """Whether a file is of an installed package or Python's own, whose version says what is in it."""
    return bool(_INSTALLED.intersection(file.parts)) or is_pythons(file)


def is_pythons(file: Path) -> bool:
    """Whether a file is of Python's own library."""
    return file.resolve().is_relative_to(_LIBRARY)


def last_words(stderr: str) -> str:
    """The line that says why a process ended, if it wrote any: its error's, where it is one of Python's with a traceback."""
    lines = [line.rstrip() for line in stderr.splitlines() if line.strip()]
    traceback = max((at for at, line in enumerate(lines) if line.startswith("Traceback (most recent")), default=None)
    if traceback is not None:
        lines = [line for line in lines[traceback + 1 :] if not line.startswith(" ")][:1] or lines
    return lines[-1].strip() if lines else ""


def nearest(value: object, accepted: Iterable[object]) -> str | None:
    """The accepted name that `value` most likely meant, or None where nothing comes close."""
    names = {str(name).lower(): str(name) for name in accepted}
    wanted = str(value).lower()
    if _ALSO.get(wanted) in names:
        return names[_ALSO[wanted]]
    close = difflib.get_close_matches(wanted, names, n=1)
    return names[close[0]] if close else None


def plain(value: Any) -> Any:
    """A number of numpy's, or of one of its arrays or a tensor without dimensions, as Python's; else the value itself."""
    return value.item() if getattr(value, "shape", None) == () else value


def is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(what: str, value: object, least: int, why: str = "") -> None:
    """Raises `UsageError` unless `value` is a whole number, `least` or more; `why` ends the line."""
    if not is_whole(value, least):
        raise UsageError(f"{what} (={value!r}) must be a whole number ≥ {least}{why}")


def check_number(
    what: str, value: object, least: float, most: float = math.inf, *, above: bool = False, why: str = ""
) -> None:
    """Raises `UsageError` unless `value` is a finite number from `least` (`above`: above it) to `most`; `why` ends the line."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and least <= value <= most) or (above and value == least):
        upper = f" and ≤ {most}" if most < math.inf else ""
        raise UsageError(f"{what} (={value!r}) must be a number {'>' if above else '≥'} {least}{upper}{why}")


def short(value: object) -> str:
    """The value as Python writes it; its type, where that would be more than a line."""
    text = repr(value)
    return text if len(text) < 80 and "\n" not in text else f"a {type(value).__name__}"


def not_accepted(what: str, value: object, accepted: Iterable[object], otherwise: str = "") -> UsageError:
    """The `UsageError` for a value that is none of those accepted, to be raised: value, accepted values, and the nearest of them.

    `what` is the argument's name. `otherwise` ends the line where nothing accepted is near.
    """
    accepted = [str(name) for name in accepted]
    near = nearest(value, accepted)
    hint = f"nearest: {near}" if near else otherwise  # what is near nothing is hardly a slip of the finger
    text = f"{what} (={str(value)!r}) is unknown; accepted: {', '.join(accepted) or 'none are registered'}"
    return UsageError(f"{text}; {hint}" if hint else text)
