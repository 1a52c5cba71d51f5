"""What is kept of a run, whatever it trains: what its folder is called, what is in it while it trains, and in which order it is
finished."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from resprobe.checkpoints import (
    load_checkpoint,
    remove_checkpoints,
    remove_scratch,
    save_checkpoint,
    write_atomically,
    write_json,
)
from resprobe.distributed import team
from resprobe.environment import local_changes
from resprobe.errors import StorageError, TrainingDiverged, UsageError

if TYPE_CHECKING:
    import pandas

UNFINISHED = "history.unfinished.csv"
"""The history along a training, beside its checkpoint. A finished run that is trained anew, for a probe, keeps its own."""
TRACEBACK = "traceback.txt"
"""Where in the code a run failed, in its folder until it is begun again: what is said of it is one line."""
DIVERGED = "diverged.txt"
"""How a run diverged, in its folder until it is begun again: by it a report of other seeds knows what it leaves out."""
CHECKPOINT_SECONDS = 30.0
"""At least so much time passes between two checkpoints, and at most so much is lost."""


class Kept:
    """What a run is. Two runs of one identity are one run."""

    recipe: Any
    metrics: ClassVar[tuple[str, ...]] = ()
    """What a result has at least."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON."""
        raise NotImplementedError

    def called(self) -> list[str]:
        """What the name of its folder says, for reading."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Hash of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder_name(self) -> str:
        """For reading, with the key at its end."""
        parts = [*self.called(), self.key]
        return "_".join("".join(c if c.isalnum() or c in "-." else "-" for c in part) for part in parts)


class Keeper:
    """The folder of a run while it trains. Whoever writes there holds the run's lock."""

    def __init__(self, path: Path):
        self.path, self.checkpoint = path, path / "checkpoint.pt"
        self._saved_at = time.monotonic()

    def begin(self, told: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Writes down what the run is, and with what it is made."""
        write_json(self.path / "config.json", told)
        write_json(self.path / "environment.json", environment)
        # The commit in a run's record is its code only with what was changed since.
        patch, file = local_changes(), self.path / "local_changes.patch"
        if patch:
            write_atomically(file, patch)
        else:
            file.unlink(missing_ok=True)  # of a begin that is not gone on with

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint, if there is one. What a process that was killed has half-written is removed."""
        remove_scratch(self.path)
        return load_checkpoint(self.checkpoint)

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS

    def save(self, state: dict[str, Any], rows: Sequence[Mapping[str, float]]) -> None:
        """A checkpoint, and the history so far beside it."""
        save_checkpoint(self.checkpoint, state)
        self._write_history(UNFINISHED, rows)
        self._saved_at = time.monotonic()

    def finish(self, metrics: Mapping[str, float], rows: Sequence[Mapping[str, float]]) -> None:
        """The history and the result, last, since its presence says that all the rest is there."""
        self._write_history("history.csv", rows)
        write_json(self.path / "result.json", {"metrics": metrics})
        self.clear()

    def clear(self) -> None:
        """Removes what is there of a training under way."""
        remove_checkpoints(self.checkpoint)
        (self.path / UNFINISHED).unlink(missing_ok=True)

    def _write_history(self, name: str, rows: Sequence[Mapping[str, float]]) -> None:
        import pandas

        if rows:  # a table without columns cannot be read again
            write_table(self.path / name, pandas.DataFrame(rows))


def write_table(path: Path, table: pandas.DataFrame) -> None:
    """Writes a table that `read_table` gives back to the last bit."""
    # "nan" for what was not measured, so that it is not taken for an empty text.
    write_atomically(path, table.to_csv(index=False, na_rep="nan", lineterminator="\n").encode())


def read_table(path: Path, kinds: Mapping[str, str] = MappingProxyType({})) -> pandas.DataFrame:
    """A table as it was written, to the last bit: pandas' own parser rounds some numbers differently. `kinds`: of columns
    that are no numbers, though they may read like some."""
    import pandas

    table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    for column in table:
        if kinds.get(column) == "string":
            continue
        if kinds.get(column) == "boolean" and set(table[column]) <= {"True", "False"}:
            table[column] = table[column] == "True"
            continue
        # A gap in a column of numbers is a missing number; a column of gaps alone is one of empty texts.
        filled = table[column].where(table[column] != "", "nan") if (table[column] != "").any() else table[column]
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                table[column] = filled.map(kind)
                break
    return table


def traceback_file(path: Path) -> Path:
    """Where it is written down in a run's folder how this process failed. What ends one of several that train together ends the
    others in its wake, each with another error."""
    together = team()
    return path / (TRACEBACK if together.size == 1 else f"traceback-{together.rank}.txt")


@contextlib.contextmanager
def failures_kept(path: Path) -> Iterator[None]:
    """Writes down where in the code what fails inside has failed, unless its text says all that there is to say; and that a
    training has diverged."""
    file, diverged = traceback_file(path), path / DIVERGED
    for old in [diverged, *(path.glob("traceback*.txt") if team().size == 1 else [file])]:
        old.unlink(missing_ok=True)

    def write(file: Path, text: str) -> None:
        with contextlib.suppress(StorageError):  # which must not take the place of what went wrong
            write_atomically(file, text.encode())

    try:
        yield
    except TrainingDiverged as error:
        write(diverged, f"{error}\n")
        raise
    except (UsageError, StorageError):
        raise
    except Exception:
        write(file, traceback.format_exc())
        raise
