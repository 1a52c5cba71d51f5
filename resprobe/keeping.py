"""The folder of a run, whatever it trains: its name, its files, and the order in which they are written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from resprobe.checkpoints import load_checkpoint, remove_checkpoints, save_checkpoint
from resprobe.distributed import team
from resprobe.environment import local_changes
from resprobe.errors import StorageError, TrainingDiverged, UsageError
from resprobe.files import remove_scratch, write_atomically, write_json, write_table

CONFIG = "config.json"
"""What the run is: its identity, and how it was asked for."""
ENVIRONMENT = "environment.json"
"""What it was trained with: device, threads, versions, commit."""
CHECKPOINT = "checkpoint.pt"
"""The state of a training under way."""
NETWORK = "network.safetensors"
"""The trained weights, and the normalization of the images that they were trained on."""
HISTORY = "history.csv"
"""One row a log point."""
RESULT = "result.json"
"""The final figures. Written last: its presence says that all the rest is there."""
UNFINISHED = "history.unfinished.csv"
"""The history along a training, beside its checkpoint. A finished run that is trained anew, for a probe, keeps its own."""
TRACEBACK = "traceback.txt"
"""Where in the code a run failed, since the user sees one line alone. RunIdentity until the run is begun again."""
DIVERGED = "diverged.txt"
"""How a run diverged: so a report of other seeds knows what it leaves out. RunIdentity until the run is begun again."""
CHECKPOINT_SECONDS = 30.0
"""At least so much time passes between two checkpoints, and at most so much is lost."""


class RunIdentity:
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
        """The name of the run's folder: for reading, with the key at its end."""
        parts = [*self.called(), self.key]
        return "_".join("".join(c if c.isalnum() or c in "-." else "-" for c in part) for part in parts)


class RunFolder:
    """The folder of a run while it trains. Whoever writes there holds the run's lock."""

    def __init__(self, path: Path):
        self.path, self.checkpoint = path, path / CHECKPOINT
        self._saved_at = time.monotonic()

    def begin(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Writes down what the run is, and with what it is made."""
        write_json(self.path / CONFIG, config)
        write_json(self.path / ENVIRONMENT, environment)
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
        """Writes the history, then the result, and removes what is there of a training under way."""
        self._write_history(HISTORY, rows)
        write_json(self.path / RESULT, {"metrics": metrics})
        self.clear()

    def clear(self) -> None:
        """Removes what is there of a training under way."""
        remove_checkpoints(self.checkpoint)
        (self.path / UNFINISHED).unlink(missing_ok=True)

    def _write_history(self, name: str, rows: Sequence[Mapping[str, float]]) -> None:
        import pandas

        if rows:  # a table without columns cannot be read again
            write_table(self.path / name, pandas.DataFrame(rows))


def traceback_file(path: Path) -> Path:
    """The file in a run's folder that says where this process failed. Processes that train together have one each: what ends
    one of them ends the others in its wake, each with another error."""
    together = team()
    return path / (TRACEBACK if together.size == 1 else f"traceback-{together.rank}.txt")


@contextlib.contextmanager
def failures_kept(path: Path) -> Iterator[None]:
    """Writes down what fails within a `with` block: where in the code, unless the error's text says all, and how a training
    diverged."""
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
