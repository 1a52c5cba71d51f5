"""Curves of runs for TensorBoard (extra `tensorboard`).

    python -m plugins.tensorboard [--runs runs] [--logdir results/tensorboard]
    tensorboard --logdir results/tensorboard

Every run of the folder, finished or under way, becomes one of TensorBoard's under the same name, with each column of its
history (loss, errors in percent, learning rate) over iterations. Called again, it brings them up to date; a run under way
writes its history with each checkpoint, twice a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas

from resprobe.commands import Parser, answer
from resprobe.errors import UsageError
from resprobe.keeping import UNFINISHED

_EVENTS = "events.out.tfevents.*"
_NO_CURVES = ("iteration", "seconds")


def export(runs: Path, logdir: Path) -> list[str]:
    """Writes the histories of `runs` for TensorBoard below `logdir`; the names of those that were new or had grown.

    Raises `UsageError` where there are no runs, or no TensorBoard.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard is not installed; pip install 'resprobe[tensorboard]'") from None
    unfinished = [file for file in runs.glob(f"*/{UNFINISHED}") if not (file.parent / "history.csv").exists()]
    histories = sorted((*runs.glob("*/history.csv"), *unfinished))
    if not histories:
        raise UsageError(f"runs (={str(runs)!r}) has no runs with a history")
    written = []
    for file in histories:
        if not file.exists():  # the run has been finished meanwhile
            file = file.with_name("history.csv")
        place, changed = logdir / file.parent.name, file.stat().st_mtime
        before = list(place.glob(_EVENTS))
        if any(events.stat().st_mtime >= changed for events in before):
            continue
        table = pandas.read_csv(file)
        place.mkdir(parents=True, exist_ok=True)
        # Aside first: a file of half a run is newer than the run, and would be taken for the whole.
        with tempfile.TemporaryDirectory(dir=place) as aside:
            with SummaryWriter(aside) as writer:
                for name in table.columns.difference(_NO_CURVES, sort=False):
                    known = table.dropna(subset=name)
                    for iteration, value, seconds in zip(
                        known["iteration"], known[name], known["seconds"], strict=True
                    ):
                        at = changed - (table["seconds"].iloc[-1] - seconds)
                        writer.add_scalar(name, value, int(iteration), walltime=at)
            for events in Path(aside).iterdir():
                events.replace(place / events.name)
        for events in before:  # the same points are in the new file
            events.unlink()
        written.append(file.parent.name)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports, and says what; exit code 2 for what cannot be used."""
    parser = Parser(prog="python -m plugins.tensorboard", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--logdir", type=Path, default=Path("results/tensorboard"))

    def work() -> None:
        options = parser.parse(arguments)
        written = export(options.runs, options.logdir)
        print(f"{len(written)} runs written; tensorboard --logdir {options.logdir}")

    return answer(work)


if __name__ == "__main__":
    raise SystemExit(main())
