"""Scorecard: every study's last verdict on one page, with the paper's number beside ours.

    python -m studies.scorecard                             # the page, from the reports that are there
    python -m studies.scorecard --run quick                 # runs every study first; finished runs are found again
    python -m studies.scorecard --run quick --dry-run       # says how long that would take
    python -m studies.scorecard --run paper --studies degradation warm_up --data cifar10:PATH

Nothing is judged here: what stands on the page is what the studies' `verdict.json` say, and a claim that no study has
tested says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import studies
from resprobe.claims import VERDICTS, Claim
from resprobe.commands import (
    EXPECTED,
    Parser,
    answer,
    called_as,
    ended_like_interrupted,
    notes_on_one_line,
    readable_output,
)
from resprobe.errors import UsageError, not_accepted, one_line
from resprobe.options import offered
from resprobe.study import Study
from resprobe.words import duration

UNTESTED = {
    Claim(
        "C17*",
        "Six residual networks together reach the best result on ImageNet",
        "§4.1, Table 5",
        "3.57 % top-5 test error; the next best of the table 4.82 % (BN-inception)",
        "the same six networks, trained anew, with a top-5 error not below 4.82 %",
    ): "quoted only: the six ImageNet networks are not rebuilt",
    Claim(
        "C22*",
        "A 110-layer residual network has a lower error than FitNet and Highway networks",
        "§4.2, Table 6",
        "6.43 %; FitNet-19 8.39 %, Highway-19 7.54 %, Highway-32 8.80 %",
        "one of those networks, trained anew, with a test error not above that of the residual network",
    ): "the other methods' rows are quoted only; their networks are not trained here",
}
"""What the paper claims and no study states, with the reason. A study that states one of these takes its place. C17* and
C22* are the halves of C17 and C22 that their studies leave."""


@dataclass(frozen=True)
class Row:
    """A claim with what a study's last report says of it. `evidence` is the reason where it is not tested."""

    claim: Claim
    study: str = ""
    verdict: str = "not tested"
    measured: str = ""
    evidence: str = ""
    setting: str = ""
    data: str = ""
    seeds: int | None = None
    date: str = ""
    command: str = ""
    folder: Path | None = None
    alt: str = ""
    """What the study's first figure shows."""

    @property
    def anchor(self) -> str:
        """Where the claim is on the page."""
        return re.sub(r"\W+", "-", f"{self.claim.id} {self.study}").strip("-")


# -- what is there ---------------------------------------------------------------------------------------------------


def find_studies() -> tuple[list[Study], dict[str, str]]:
    """The studies of this package, in the order of their claims; and of modules that do not import, why."""
    found, broken = [], {}
    for module in pkgutil.iter_modules(studies.__path__):
        if module.name in ("__main__", "scorecard"):
            continue
        try:
            study = getattr(importlib.import_module(f"studies.{module.name}"), "study", None)
        except Exception as error:
            broken[module.name] = f"does not import: {_what_it_says(error)}"
        else:
            found += [study] if isinstance(study, Study) else []
    return sorted(found, key=lambda study: (_order(Row(study.claims[0])), study.name)), broken


def gather(known: Sequence[Study], results: Path) -> list[Row]:
    """Every claim of the studies with its last verdict in `results`, and what no study tests: by number, ours last."""
    last = _last_reports(results)
    rows = []
    for study in known:
        said = {row.claim.id: row for row in last.pop(study.name, [])}
        for claim in study.claims:
            untested = Row(claim, study.name, evidence="no run yet", command=f"python -m studies.{study.name}")
            rows.append(dataclasses.replace(said.get(claim.id, untested), claim=claim))
    for others in last.values():  # reports of studies that are not here
        rows += others
    stated = {row.claim.id for row in rows}
    rows += [Row(claim, evidence=why) for claim, why in UNTESTED.items() if claim.id not in stated]
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[bool, str, int, str, str]:
    """C2 before C10, C3a before C3b, and what is beyond the paper after it."""
    letters, number, rest = re.fullmatch(r"(\D*)(\d*)(.*)", row.claim.id).groups()
    return row.claim.beyond, letters, int(number or 0), rest, row.study


def _last_reports(results: Path) -> dict[str, list[Row]]:
    """Study → what its newest report in the folders of `results` says."""
    last: dict[str, list[Row]] = {}
    for file in sorted(results.glob("*/verdict.json")):
        try:
            rows = _read(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{file} cannot be read and is passed over: {_what_it_says(error)}")
            continue
        if rows and (rows[0].study not in last or rows[0].date >= last[rows[0].study][0].date):
            last[rows[0].study] = rows
    return last


def _read(file: Path) -> list[Row]:
    record = json.loads(file.read_text())
    config, rows = record["config"], []
    trained = config["seconds_of_training"] > 0
    # An audit rests on no data and no seeds, whatever its options hold.
    of = [config["options"]["data"].partition(":")[0]] if trained else []
    of += [f"{name} {value}" for name, value in config.get("built_of", {}).items()]
    of += config["options"].get("recipe", [])
    for said in record["claims"]:
        if said["verdict"] not in VERDICTS:
            raise not_accepted("verdict", said["verdict"], VERDICTS)
        rows.append(
            Row(
                Claim(**{field.name: said[field.name] for field in dataclasses.fields(Claim) if field.name in said}),
                record["study"],
                said["verdict"],
                said["measured"],
                said["evidence"],
                record["setting"],
                data=", ".join(of),
                seeds=len(config["options"]["seeds"]) if trained else None,
                date=record["environment"]["date"],
                command=config["command"],
                folder=file.parent,
                alt=next((record.get("figures", {})[name] for name in sorted(record.get("figures", {}))), ""),
            )
        )
    return rows


# -- the page --------------------------------------------------------------------------------------------------------


def write(rows: Sequence[Row], out: Path) -> None:
    """Writes report.html (one self-contained file), report.md and scorecard.json into `out`."""
    from resprobe.files import write_atomically
    from resprobe.report import SETTINGS, SYMBOLS, render_template

    folders = {row.folder for row in rows if row.folder is not None}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    page = {
        "sections": {
            "Claims of the paper": [row for row in rows if not row.claim.beyond],
            "Beyond the paper": [row for row in rows if row.claim.beyond],
        },
        "counts": count(rows),
        "symbols": SYMBOLS,
        "settings": SETTINGS,
        "pictures": {folder: _thumbnail(folder) for folder in folders},
        "reports": {folder: _link(folder, out) for folder in folders},
        "date": now[:10],
    }
    record = {"date": now, "counts": count(rows), "claims": [_plain(row, page["reports"]) for row in rows]}
    write_atomically(out / "report.md", render_template("scorecard.md", page).encode())
    write_atomically(out / "scorecard.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(out / "report.html", render_template("scorecard.html", page).encode())


def count(rows: Iterable[Row]) -> dict[str, int]:
    """Verdict → how many."""
    found = Counter(row.verdict for row in rows)
    return {verdict: found[verdict] for verdict in VERDICTS}


def in_words(rows: Sequence[Row]) -> str:
    """The counts in one line."""
    return f"{len(rows)} verdicts: " + ", ".join(f"{number} {verdict}" for verdict, number in count(rows).items())


def table(rows: Sequence[Row], width: int) -> str:
    """One line a claim, no longer than `width`."""
    from resprobe.report import SYMBOLS

    ids, names = max(len(row.claim.id) for row in rows), max(len(row.study) for row in rows)
    lines = []
    for row in rows:
        start = f"{SYMBOLS[row.verdict]} {row.claim.id:<{ids}}  {row.verdict:<12}  {row.setting or '–':<6}  "
        lines.append(_cut(f"{start}{row.study or '–':<{names}}  {row.claim.statement}", width))
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _plain(row: Row, reports: Mapping[Path, str | None]) -> dict[str, Any]:
    """The row as JSON."""
    values = dataclasses.asdict(row)
    folder = values.pop("folder")
    return values.pop("claim") | values | {"report": reports[folder] if folder else None}


def _link(folder: Path, out: Path) -> str | None:
    """From the page to the study's own report, so that both can be moved together."""
    report = folder / "report.html"
    return Path(os.path.relpath(report, out)).as_posix() if report.is_file() else None


def _thumbnail(folder: Path, width: int = 560) -> str | None:
    """The study's first figure, small, as base64."""
    import base64

    from PIL import Image

    figures = sorted(folder.glob("figure*.png"), key=lambda file: (file.name != "figure.png", file.name))
    if not figures:
        return None
    with Image.open(figures[0]) as figure:
        small = figure.convert("RGB").resize((width, round(width * figure.height / figure.width)), Image.LANCZOS)
    buffer = io.BytesIO()
    small.quantize(64).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


# -- running the studies ---------------------------------------------------------------------------------------------


class StudyFailed(RuntimeError):
    """A study came to no report. The text is its error in one line."""


@dataclass(frozen=True)
class Forecast:
    """Seconds of training that a study still needs, as far as is known; `whole`: nothing else will come."""

    seconds: float = 0.0
    whole: bool = True


def run_studies(commands: Mapping[str, Sequence[str]], *, dry_run: bool = False) -> dict[str, str]:
    """Runs the studies one after the other, each in its own process. Returns the error of each that failed.

    `commands`: study → its arguments.
    """
    started, failed = time.perf_counter(), {}
    print(f"looking for finished runs of {len(commands)} studies", flush=True)
    try:
        ahead = _in_a_process(_look_ahead, commands)
    except StudyFailed:  # out of memory, perhaps; running them says more
        ahead = dict.fromkeys(commands, Forecast(whole=False))
    if dry_run:
        print("\n".join(f"{name}: {_left([ahead[name]])}" for name in commands) + f"\nall: {_left(ahead.values())}")
        return {}
    for done, (name, arguments) in enumerate(commands.items()):
        left = _left(forecast for each, forecast in ahead.items() if each in list(commands)[done:])
        so_far = duration(time.perf_counter() - started)
        print(f"\n[{done + 1}/{len(commands)}] {name}: {so_far} so far, {left}", flush=True)
        try:
            _in_a_process(_run, name, arguments)
        except StudyFailed as error:
            failed[name] = f"failed: {error}"
            print(f"error: {error}", file=sys.stderr, flush=True)
    print(
        f"\n{len(commands) - len(failed)} of {len(commands)} studies done in {duration(time.perf_counter() - started)}"
    )
    return failed


def arguments_for(study: Study, preset: str, wanted: dict[str, str], data: Sequence[str] = ()) -> list[str]:
    """What the study is called with: what was asked for and is not its default, as far as it has that option."""
    defaults = study.presets[preset]
    copies = {copy.partition(":")[0]: copy for copy in data}
    wanted = wanted | {"data": copies.get(defaults.data.partition(":")[0], defaults.data)}
    taken = offered(type(defaults))
    found = [] if preset == "quick" else ["--preset", preset]
    for name, value in wanted.items():
        if name in taken and value != getattr(defaults, name):
            found += [f"--{name}", value]
    return found


def _look_ahead(commands: Mapping[str, Sequence[str]]) -> dict[str, Forecast]:
    """What each study needs. A run that several need is counted for the first of them."""
    from resprobe.sweep import Outlook

    ahead, counted = {}, set()
    for name, arguments in commands.items():
        try:
            study = _study(name)
            rounds = study.survey(study.parse(arguments))
        except Exception:  # running it says what is wrong
            ahead[name] = Forecast(whole=False)
            continue
        seconds, whole = 0.0, True
        for survey in rounds:
            if isinstance(survey, Outlook):
                seconds += survey.seconds
                continue
            timed = dict(zip(survey.missing, survey.seconds, strict=False))
            fresh = [job for job in survey.missing if job.config.key not in counted]
            own = dataclasses.replace(
                survey, missing=tuple(fresh), seconds=tuple(timed[job] for job in fresh if job in timed)
            )
            counted |= {job.config.key for job in fresh}
            seconds += own.duration or 0.0
            whole = own.duration is not None and not (survey.missing and study.then is not None and len(rounds) == 1)
        ahead[name] = Forecast(seconds, whole)
    return ahead


def _run(name: str, arguments: Sequence[str]) -> None:
    study = _study(name)
    with notes_on_one_line():
        study.run(study.parse(arguments), arguments)


def _study(name: str) -> Study:
    return importlib.import_module(f"studies.{name}").study


def _in_a_process(function: Callable, *arguments: Any) -> Any:
    """What the function returns, computed in a process of its own, of which nothing is left for the next study.

    Raises `StudyFailed`, also where the process is killed.
    """
    from resprobe.workers import hear_from

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result, error = hear_from(process, receiver)
    except (EOFError, OSError):
        process.join()
        raise StudyFailed(f"its process was ended from outside (code {process.exitcode}); out of memory?") from None
    except KeyboardInterrupt:
        process.terminate()  # which has heard of Ctrl-C itself, but not of what ended this one
        raise
    finally:
        process.join()
    if error is not None:
        raise StudyFailed(error)
    return result


def _answer(sender: Connection, function: Callable, arguments: Sequence[Any]) -> None:
    from resprobe.workers import end_with_parent

    threading.Thread(target=end_with_parent, daemon=True).start()
    readable_output()
    try:
        with ended_like_interrupted():
            sender.send((function(*arguments), None))
    except KeyboardInterrupt:  # what was begun is kept by now; the first process says so
        sys.exit(1)
    except BrokenPipeError:
        sender.send((None, "nobody reads the output any more"))
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exc()  # a bug, and a bug's traceback is wanted
        sender.send((None, _what_it_says(error)))


def _left(ahead: Iterable[Forecast]) -> str:
    ahead = list(ahead)
    seconds, whole = sum(forecast.seconds for forecast in ahead), all(forecast.whole for forecast in ahead)
    if not seconds:
        return "nothing left to train" if whole else "training of unknown length left"
    return f"{'about' if whole else 'at least'} {duration(seconds)} of training left"


def _what_it_says(error: BaseException) -> str:
    return one_line(error, named=not isinstance(error, EXPECTED))


# -- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, after running the studies if that is asked for. Exit codes as of a study."""

    def work() -> int:
        options = _parse(arguments)
        if options.run is None:  # nothing is lost that a moment does not bring back
            return _main(options)
        kept = "finished studies, runs and checkpoints are kept, the same command goes on from there"
        return answer(lambda: _main(options), kept=kept)

    return answer(work)


def _main(options: argparse.Namespace) -> int:
    known, failed = find_studies()
    if not options.dry_run:
        from resprobe.files import check_writable

        check_writable(options.out, "out")
    if commands := _commands(options, known, failed):
        failed |= run_studies(commands, dry_run=options.dry_run)
    if not options.dry_run:
        rows = gather(known, options.results)
        write(rows, options.out)
        print(f"\n{table(rows, shutil.get_terminal_size((140, 24)).columns)}\n\n{in_words(rows)}")
        print(f"report:  {options.out / 'report.html'}")
    for name, why in failed.items():
        print(f"error: studies.{name} {why}", file=sys.stderr)
    return 1 if failed else 0


def _commands(options: argparse.Namespace, known: Sequence[Study], broken: Mapping[str, str]) -> dict[str, list[str]]:
    """Study → its arguments, for those that are to be run."""
    if options.run is None:
        return {}
    for name in options.studies:
        if name not in broken and name not in [study.name for study in known]:
            raise not_accepted("studies", name, [study.name for study in known])
    chosen = [study for study in known if not options.studies or study.name in options.studies]
    chosen = [study for study in chosen if options.run in study.presets]
    used = {study.presets[options.run].data.partition(":")[0] for study in chosen}
    for copy in options.data:
        if copy.partition(":")[0] not in used:
            raise not_accepted("data", copy, sorted(used))
        if not Path(copy.partition(":")[2] or ".").expanduser().exists():
            raise UsageError(f"data (={copy!r}): there is no {copy.partition(':')[2]}")
    from resprobe.devices import resolve_device
    from resprobe.files import check_writable

    resolve_device(options.device)
    if not options.dry_run:  # which writes nothing
        check_writable(options.runs, "runs")
    commands = {}
    for study in chosen:
        # Where a study's report goes by itself need not be said, so that its command stays short.
        out = "" if options.results == Path("results") else str(options.results / study.name)
        wanted = {"device": options.device, "runs": str(options.runs), "out": out}
        commands[study.name] = arguments_for(study, options.run, wanted, options.data)
    return commands


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=called_as("scorecard"), description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="where the studies' reports are (default: results)"
    )
    parser.add_argument("--out", type=Path, help="folder for the page; by default RESULTS/scorecard")
    parser.add_argument("--run", metavar="quick|paper", help="run the studies with this preset first, reusing runs")
    parser.add_argument("--studies", nargs="+", default=[], metavar="NAME", help="run these only")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME:PATH", help="local copies of the paper's data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="folder in which finished runs are kept and found again (default: runs)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say how long --run would take; then stop")
    options = parser.parse(arguments)
    if options.run not in (None, "quick", "paper"):
        raise not_accepted("--run", options.run, ["quick", "paper"])
    for name in ("studies", "data", "dry_run"):
        if getattr(options, name) and options.run is None:
            raise UsageError(f"--{name.replace('_', '-')} says what to run; it needs --run quick or --run paper")
    if options.data and options.run == "quick":
        raise UsageError("--data is for --run paper; the quick presets run on embedded data")
    if options.run is None and options.results != Path("results") and not options.results.is_dir():
        raise UsageError(f"--results (={str(options.results)!r}) is not a folder")
    if options.run is None and options.runs != Path("runs"):
        raise UsageError("--runs says where runs are kept; it needs --run quick or --run paper")
    options.out = options.out or options.results / "scorecard"
    return options


if __name__ == "__main__":
    raise SystemExit(main())
