"""The frame of a study: a study states its runs, its figures and its claims, and its frame does the rest.

Options → what is to be run (`planning`) → the run store, found or trained (`session`) → one tidy table → verdicts → `report`.
This module does not import torch before there is something to do, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from resprobe.claims import Claim, Verdict, from_paper
from resprobe.commands import EXPECTED, answer, called_as
from resprobe.errors import UsageError, not_accepted, one_line, place_of, short
from resprobe.options import Options, arguments_of, as_argument, of_their_kinds, parse_options, preset_in

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from torch import nn

    from resprobe.recipes import Recipe
    from resprobe.runs import Run
    from resprobe.sweep import Outlook, Survey

Setting = Literal["quick", "paper", "custom"]


@dataclass(frozen=True)
class Planned:
    """A network that a study needs, run once for each seed, with the labels its rows carry in the table.

    `options` are the network's; `probes` name those that watch its training. `recipe` makes the recipe it is trained by
    from the one that is usual for the data and depth; None: the usual one. `network` may be a built network, to be
    trained on from the weights it has. `seeds`: some of the study's seeds; None: all.
    """

    labels: Mapping[str, Any]
    network: str | nn.Module
    options: Mapping[str, Any] = field(default_factory=dict)
    probes: tuple[str, ...] = ()
    recipe: Callable[[Recipe], Recipe] | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Results:
    """What a study's claims and figures are made from.

    `table`: one row a run: the labels, seed, the run's metrics (errors in percent), its folder. `histories`: one row a
    log point of a run, with the same labels. `runs` are in the order of `table`. `measurements`: what the study's
    `measure` gave, if it has one. `probed`: for each probe that the user asked for, by its name, one table of all runs, with
    the runs' labels. `left_out`: seeds of which a run diverged and is not among these, by network. `device` and
    `precision` are those to measure with.
    """

    options: Options
    table: pandas.DataFrame
    histories: pandas.DataFrame
    runs: Sequence[Run]
    measurements: pandas.DataFrame | None = None
    probed: Mapping[str, pandas.DataFrame] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[int]] = field(default_factory=dict)
    device: str = "cpu"
    precision: str = "fp32"

    def values(self, column: str, **labels: Any) -> list[float]:
        """A column's values over seeds for the rows with these labels, in order of seed."""
        rows = self.table
        for name, value in labels.items():
            rows = rows[rows[name] == value]
        return rows.sort_values("seed")[column].tolist()

    def over_seeds(self, *, band: bool = False) -> str:
        """For a caption: what a mark, or a line in a band, is of the seeds."""
        seeds = len(self.options.seeds)
        if seeds == 1:
            return "one seed"
        return f"mean over {seeds} seeds, band ± std" if band else f"mean ± std over {seeds} seeds"


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption and a text that says what it shows to those who cannot see it. A notebook shows the figure."""

    figure: Figure
    caption: str
    alt: str

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        from resprobe.figures import for_notebook

        return for_notebook(self.figure)


@dataclass(frozen=True)
class Study:
    """One file of `studies/`. It says what is particular to its claims, and `main` does the rest.

    - `plan`: the networks that must be trained.
    - `then`: those to be trained afterwards, from what came out of the first.
    - `measure`: looks at the trained networks, where their training is not the whole story.
    - `ahead`: what `measure` is going to train, if it trains. Its results have no runs while those are still to be trained.
    - `judge`: what the results mean for each claim.
    - `draw`, `tabulate`: show them, and put them beside the paper's numbers.
    - `how_sure`: replaces the report's words on how verdicts are come by; `rules` adds what they leave out.
    - `paper_data`: what the paper's experiment ran on, from which departures are told.
    - `departs`: departures that are neither in the data nor in the recipe.
    - `leaves_open`: what a claim lacks with these options.
    - `diverged`: "fail" for no report where a training diverges; "leave out" for one of the others, where to diverge is a result,
      as of a learning rate. `Results.left_out` then has what did.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    presets: Mapping[str, Options]
    plan: Callable[[Options], Sequence[Planned]]
    judge: Callable[[Results], Sequence[Verdict]]
    draw: Callable[[Results], Mapping[str, Drawing]]
    tabulate: Callable[[Results], pandas.DataFrame]
    description: str = ""
    then: Callable[[Results], Sequence[Planned]] | None = None
    measure: Callable[[Results], pandas.DataFrame] | None = None
    how_sure: str = ""
    rules: str = ""
    paper_data: Literal["CIFAR-10", "ImageNet"] = "CIFAR-10"
    leaves_open: Callable[[Options], Sequence[str]] | None = None
    departs: Callable[[Options], Sequence[str]] | None = None
    ahead: Callable[[Results], Outlook] | None = None
    diverged: Literal["fail", "leave out"] = "fail"

    def __post_init__(self) -> None:
        if self.diverged not in ("fail", "leave out"):
            raise not_accepted("diverged", self.diverged, ("fail", "leave out"))

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the study from a command line and returns its exit code: 0 done, 2 unusable arguments, 1 otherwise."""
        arguments = list(sys.argv[1:] if arguments is None else arguments)

        def work() -> None:
            self.run(self.parse(arguments), arguments)

        return answer(work, kept="finished runs and checkpoints are kept, the same command goes on from there")

    def parse(self, arguments: Sequence[str]) -> Options:
        """Options from a command line. Raises `UsageError` in one line."""
        preset = preset_in(arguments)
        if preset not in self.presets:
            raise not_accepted("--preset", preset, self.presets)
        return parse_options(self.presets[preset], arguments, called=called_as(self.name), description=self.description)

    def run(self, options: Options, arguments: Sequence[str] = ()) -> dict[str, Any]:
        """Does the study and writes its report. Returns what `verdict.json` holds; nothing for a dry run
        or in a process that only helped to train."""
        started = time.perf_counter()
        options = self._checked(options)
        if options.dry_run:
            ahead = self.survey(options)
            print("\n".join(map(str, ahead)) or "nothing to train")
            if self.then is not None and len(ahead) == 1 and ahead[0].missing:  # type: ignore[union-attr]
                print("a second round of training follows, from what comes out of this one")
            return {}
        from resprobe.session import open_session

        arguments = arguments or arguments_of(options, self.presets[options.preset])
        with open_session(self, self._placed(options), trains=True, reports=True) as session:
            gathered = session.gather()
        if gathered is None:  # of several processes the first alone reports
            return {}
        results, environment = gathered
        verdicts = list(self.part("judge", results))
        answered = {verdict.claim.id for verdict in verdicts}
        if missing := [claim.id for claim in self.claims if claim.id not in answered]:
            raise UsageError(f"judge of study {self.name!r} gives no verdict on {', '.join(missing)}")

        from resprobe.report import write_report

        return write_report(
            self,
            results,
            verdicts,
            setting=self.setting(options),
            environment=environment,
            command=" ".join([called_as(self.name), *map(shlex.quote, arguments)]),
            seconds=time.perf_counter() - started,
        )

    def part(self, name: str, *given: Any) -> Any:
        """What the study's `plan`, `then`, `measure`, `judge`, `draw` or `tabulate` makes of what it is given.

        Raises `UsageError`, in one line with its place, for a mistake in it if it is yours, and if it gives something else than
        it is to give.
        """
        try:
            made = getattr(self, name)(*given)
            made = list(made) if isinstance(made, Iterator) else made
        except Exception as error:
            if isinstance(error, EXPECTED) or not place_of(error):
                raise
            raise UsageError(f"{name} of study {self.name!r} fails: {one_line(error, named=True)}") from error
        wanted, fits = _PARTS[name]
        if not fits(made):
            raise UsageError(f"{name} of study {self.name!r} must return {wanted}, not {short(made)}")
        return made

    def survey(self, options: Options) -> list[Survey | Outlook]:
        """What is there and what is to be trained: a round each, and what `measure` trains. What follows a round to be
        trained is not known yet."""
        from resprobe.data.datasets import without_downloads
        from resprobe.session import open_session

        with without_downloads(), open_session(self, self._placed(self._checked(options))) as session:
            return session.survey()

    def results(self, options: Options) -> Results:
        """What a report is made from, without one: the runs, found or trained, in tables; to look at in Python."""
        from resprobe.session import open_session

        with open_session(self, self._placed(self._checked(options)), trains=True) as session:
            gathered = session.gather()
        if gathered is None:
            raise UsageError("of torchrun's processes the first alone has results")
        return gathered[0]

    def _checked(self, options: Options) -> Options:
        from resprobe.workers import end_if_imported

        end_if_imported()
        if type(options) is not (kind := type(self.presets["quick"])):
            raise UsageError(
                f"options (={short(options)}) must be the {kind.__qualname__} of {kind.__module__}; "
                "dataclasses.replace(study.presets['quick'], …) makes one"
            )
        return of_their_kinds(options)

    def _placed(self, options: Options) -> Options:
        """With paths as they are meant: a shell leaves alone the ~ of `--out=~/mine`."""
        paths: dict[str, Any] = {"out": options.out or f"results/{self.name}", "runs": options.runs}
        paths = {name: os.path.expanduser(path) for name, path in paths.items()}
        if weights := getattr(options, "weights", ()):
            paths["weights"] = tuple(map(os.path.expanduser, weights))
        return dataclasses.replace(options, **paths)

    def built_of(self, options: Options) -> dict[str, tuple[str, str]]:
        """What the networks are built of (`Options.BUILT_OF`), each with the preset's, where it is not the preset's."""
        usual = self.presets[options.preset]
        pairs = {
            name: (as_argument(getattr(options, name)), as_argument(getattr(usual, name))) for name in options.BUILT_OF
        }
        return {name: (ours, its) for name, (ours, its) in pairs.items() if ours != its}

    def beside_paper(self, options: Options) -> bool:
        """Whether figures may be held against the paper's numbers: all but depths and seeds is as in its setting."""
        paper = self.presets["paper"]
        alike = dataclasses.replace(options, preset="paper", depths=paper.depths, seeds=paper.seeds)
        return self.setting(alike) == "paper"

    def from_paper(self, options: Options, values: Sequence[float], paper: float) -> str:
        """For behind the paper's number in a table: how far the mean of `values` is from it, in parentheses; nothing where the
        two are of different settings."""
        return f" ({from_paper(values, paper)})" if self.beside_paper(options) else ""

    def setting(self, options: Options) -> Setting:
        """The preset's name if what is measured is the preset's, else "custom"."""
        preset = self.presets[options.preset]
        if options.measured() | {"data": options.data_name} != preset.measured() | {"data": preset.data_name}:
            return "custom"
        folder = options.data_name == "folder"
        return "custom" if folder and not is_imagenet(options.data) else options.preset


def _all(kind: type, things: Any) -> bool:
    return isinstance(things, Sequence) and all(isinstance(thing, kind) for thing in things)


def _is_table(thing: Any) -> bool:
    import pandas

    return isinstance(thing, pandas.DataFrame)


_PARTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "plan": ("a list of rp.Planned", lambda made: _all(Planned, made)),
    "then": ("a list of rp.Planned", lambda made: _all(Planned, made)),
    "measure": ("a pandas.DataFrame", _is_table),
    "judge": ("a list of rp.Verdict", lambda made: _all(Verdict, made)),
    "draw": (
        "a dict of names and rp.Drawing",
        lambda made: isinstance(made, Mapping) and _all(Drawing, [*made.values()]),
    ),
    "tabulate": ("a pandas.DataFrame", _is_table),
}
"""What each part of a study is to give."""


def is_imagenet(data: str) -> bool:
    """Whether a folder holds as many images and classes as ImageNet 2012's training and validation sets."""
    from resprobe.data import load_data

    try:
        there = load_data(data)
    except UsageError:
        return False
    return (len(there.train), len(there.test), there.num_classes) == (1_281_167, 50_000, 1000)
