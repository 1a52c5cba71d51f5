"""The frame of a study: a study states its runs, its figures and its claims; everything else is here.

Options → what is to be run → the run store (found, or trained) → one tidy table → verdicts → report. This module does
not import torch before there is something to do, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resprobe.claims import Claim, Verdict, from_paper
from resprobe.commands import answer, called_as
from resprobe.errors import SweepFailed, UsageError, not_accepted, short
from resprobe.options import Options, arguments_of, of_their_kinds, offered, parse_options, preset_in

if TYPE_CHECKING:
    import pandas
    import torch
    from matplotlib.figure import Figure
    from torch import nn

    from resprobe.cluster import RayCluster
    from resprobe.data import Data
    from resprobe.networks import NetworkSpec
    from resprobe.recipes import Recipe
    from resprobe.runs import Run, RunStore
    from resprobe.sweep import Job, Outlook, Survey

    Labelled = Sequence[tuple[dict[str, Any], Job]]
    """Runs that are asked for, each behind the labels of its row."""

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
    the runs' labels. `left_out`: seeds that were not asked for, and of which a run diverged, by network. `device` and
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
    """One file of `studies/`: `plan` says which networks must be trained, `then` which of those are to be trained on from
    what came out, `measure` looks at them where their training is not the whole story, `judge` says what that means,
    `draw` shows it, and `tabulate` puts it beside the paper's numbers. `main` does the rest. `how_sure` replaces the
    report's words on how verdicts are come by, `rules` adds what they leave out of this study's. `paper_data`: what the
    paper's experiment ran on, from which departures are told; `departs` tells those that are in neither data nor recipe.
    `leaves_open` says what a claim lacks with these options. `ahead` says what `measure` is going to train, if it trains; its
    results have no runs while those are still to be trained.
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
        asked = self._checked(options)
        options = _placed(self, asked)
        arguments = arguments or arguments_of(asked, self.presets[asked.preset])
        if options.dry_run:
            ahead = self.survey(options)
            print("\n".join(map(str, ahead)) or "nothing to train")
            if self.then is not None and len(ahead) == 1 and ahead[0].missing:  # type: ignore[union-attr]
                print("a second round of training follows, from what comes out of this one")
            return {}
        with _ready(self, options, trains=True, reports=True) as ready:
            gathered = _gathered(ready)
        if gathered is None:  # of several processes the first alone reports
            return {}
        results, environment = gathered
        verdicts = list(self.judge(results))
        answered = {verdict.claim.id for verdict in verdicts}
        missing = [claim.id for claim in self.claims if claim.id not in answered]
        assert not missing, f"study {self.name} gives no verdict on {', '.join(missing)}"

        from resprobe.report import write_report

        setting = self.setting(options)
        return write_report(
            self,
            results,
            verdicts,
            setting=setting,
            environment=environment,
            command=" ".join([called_as(self.name), *map(shlex.quote, arguments)]),
            seconds=time.perf_counter() - started,
        )

    def survey(self, options: Options) -> list[Survey | Outlook]:
        """What is there and what is to be trained: a round each, and what `measure` trains. What follows a round to be
        trained is not known yet."""
        from resprobe.data.datasets import without_downloads

        with without_downloads(), _ready(self, _placed(self, self._checked(options))) as ready:
            return _surveyed(ready)

    def results(self, options: Options) -> Results:
        """What a report is made from, without one: the runs, found or trained, in tables; to look at in Python."""
        with _ready(self, _placed(self, self._checked(options)), trains=True) as ready:
            gathered = _gathered(ready)
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

    def built_of(self, options: Options) -> dict[str, tuple[str, str]]:
        """What the networks are built of (`Options.BUILT_OF`), each with the preset's, where it is not the preset's."""
        usual = self.presets[options.preset]
        pairs = {
            name: (_in_words(getattr(options, name)), _in_words(getattr(usual, name))) for name in options.BUILT_OF
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


def _in_words(value: object) -> str:
    """The value of an option as it is given on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def is_imagenet(data: str) -> bool:
    """Whether a folder holds as many images and classes as ImageNet 2012's training and validation sets."""
    from resprobe.data import load_data

    try:
        there = load_data(data)
    except UsageError:
        return False
    return (len(there.train), len(there.test), there.num_classes) == (1_281_167, 50_000, 1000)


def _placed(study: Study, options: Options) -> Options:
    """With paths as they are meant: a shell leaves alone the ~ of `--out=~/mine`."""
    paths: dict[str, Any] = {"out": options.out or f"results/{study.name}", "runs": options.runs}
    paths = {name: os.path.expanduser(path) for name, path in paths.items()}
    if weights := getattr(options, "weights", ()):
        paths["weights"] = tuple(map(os.path.expanduser, weights))
    return dataclasses.replace(options, **paths)


@contextlib.contextmanager
def _ready(study: Study, options: Options, *, trains: bool = False, reports: bool = False) -> Iterator[_Ready]:
    """Everything that a study's trainings need, for as long as the `with` block lasts. What can be wrong is said here, before
    anything is trained, if anything is going to be, or a report written."""
    from resprobe.devices import deterministic

    with contextlib.ExitStack() as held:
        cluster = None
        if options.executor == "ray":
            from resprobe.cluster import ray_cluster

            cluster = held.enter_context(ray_cluster(options.address, options.device))
        elif options.address:
            raise UsageError(f"address (={options.address!r}) is that of a Ray cluster; it needs --executor ray")
        held.enter_context(deterministic(options.deterministic))
        yield _made_ready(study, options, cluster, trains=trains, reports=reports)


def _made_ready(study: Study, options: Options, cluster: RayCluster | None, *, trains: bool, reports: bool) -> _Ready:
    from resprobe.data import load_data
    from resprobe.devices import prepare_cpu, resolve_device, resolve_precision
    from resprobe.distributed import join, team
    from resprobe.extensions import is_loaded, load_plugin
    from resprobe.files import check_writable
    from resprobe.registry import registered
    from resprobe.runs import RunStore
    from resprobe.steps import resolve_step
    from resprobe.sweep import parse_concurrency

    prepare_cpu()
    plugins = {}
    for plugin in options.plugin:
        before, again = registered(), plugin in sys.modules or is_loaded(Path(plugin).expanduser().resolve())
        plugins[plugin] = load_plugin(plugin).__name__
        if not again and registered() == before and team().first:
            # At once, since what it lacks may be what is asked for.
            text = f'{plugin} registers nothing; a block is registered by @rp.register_block("name") above its class'
            print(f"note: {text}", file=sys.stderr, flush=True)
    concurrency = parse_concurrency(options.concurrency)
    device = join(resolve_device(options.device)) if cluster is None else cluster.device
    precision = resolve_precision(options.precision, device)
    resolve_step(options.step, device, recompute=options.recompute)
    planned, changes = _planned(study, options)
    if planned and team().size > 1:
        team().broadcast(lambda: bool(load_data(options.data)))  # one of them downloads, or says why it cannot
    data = load_data(options.data) if planned else None  # what is not trained on need not be there
    jobs = _jobs(planned, options, data, precision, changes) if data else []
    _check_networks({job.config.network for _, job in jobs})
    notes = [*_not_named(options, plugins), *_too_few(study, options)]
    if reports:
        # Nothing is written before everything that was asked for is known to make sense.
        check_writable(Path(options.out), "out")
        notes += _replaced(study, options)
    if jobs and team().first:
        for note in notes:  # hours before the report is there
            print(f"note: {note}", file=sys.stderr, flush=True)
    store = RunStore(options.runs, writes=trains) if jobs else None
    here = device if cluster is None else cluster.here
    return _Ready(study, options, cluster, device, here, precision, concurrency, data, changes, jobs, store)


@dataclass(frozen=True)
class _Ready:
    """A study whose options make sense. `device`: where runs are trained; `here`: where the rest is done. `jobs`: those of the
    first round, with the labels of their rows."""

    study: Study
    options: Options
    cluster: RayCluster | None
    device: torch.device
    here: torch.device
    precision: str
    concurrency: int | None
    data: Data | None
    changes: Mapping[str, Any]
    jobs: Labelled
    store: RunStore | None

    def trained(self, labelled: Labelled) -> list[Run]:
        """The runs, found or trained."""
        from resprobe.sweep import run_all

        if self.store is None or not labelled:
            return []
        jobs, plugins = [job for _, job in labelled], self.options.plugin
        where = {"device": self.device, "concurrency": self.concurrency, "cluster": self.cluster}
        try:
            return run_all(jobs, self.store, plugins=plugins, **where)
        except SweepFailed as error:
            raise SweepFailed(f"{error}{_without(error.keys, self.options, labelled)}", error.keys) from error

    def surveyed(self, labelled: Labelled) -> tuple[list[Survey], list[Run] | None]:
        """What is there of the runs and what is to be trained, and the runs; None if some are still to be trained."""
        from resprobe.sweep import survey

        if self.store is None or not labelled:
            return [], []
        jobs = [job for _, job in labelled]
        ahead = survey(jobs, self.store, device=self.device, concurrency=self.concurrency, cluster=self.cluster)
        if ahead.missing:
            return [ahead], None
        return [ahead], [self.store.find(job.config, job.probes) for job in jobs]  # type: ignore[misc]

    def further(self, results: Results) -> Labelled:
        """The jobs of the second round, which depends on what came out of the first."""
        if self.study.then is None or self.data is None:
            return []
        planned = self.study.then(results)
        return _jobs(planned, self.options, self.data, self.precision, self.changes, later=True)

    def results(self, labelled: Labelled, runs: Sequence[Run]) -> Results:
        """The runs in tables."""
        found = _tables(self.options, labelled, runs, device=str(self.here), precision=self.precision)
        return dataclasses.replace(found, left_out=self._left_out(labelled))

    def _left_out(self, labelled: Labelled) -> dict[str, list[int]]:
        """Seeds that are not asked for and of which a run diverged, by network: without them a study tells of survivors."""
        from resprobe.board import names_of

        configs = [job.config for _, job in labelled]
        names, asked, found = names_of(configs), {config.key for config in configs}, {}
        diverged = self.store.diverged(configs) if self.store else {}
        for config in configs:
            seeds = diverged.get(config.key, ())
            if left := [seed for seed in seeds if dataclasses.replace(config, seed=seed).key not in asked]:
                found[names[config.key]] = left
        return found


def _surveyed(ready: _Ready) -> list[Survey | Outlook]:
    """What is ahead: a round each, and what `measure` trains. What follows a round to be trained is not known yet."""
    ahead, runs = ready.surveyed(ready.jobs)
    results = ready.results([], []) if runs is None else ready.results(ready.jobs, runs)
    if runs is not None and (second := ready.further(results)):
        after, others = ready.surveyed(second)
        ahead = [*ahead, *after]
        results = ready.results([], []) if others is None else ready.results([*ready.jobs, *second], [*runs, *others])
    return [*ahead, ready.study.ahead(results)] if ready.study.ahead is not None else [*ahead]


def _gathered(ready: _Ready) -> tuple[Results, dict[str, Any]] | None:
    """All results, and the environment that made them; None in a process that only helped to train."""
    from resprobe.distributed import leave, team

    study, labelled = ready.study, list(ready.jobs)
    runs = ready.trained(labelled)
    results = ready.results(labelled, runs)
    if second := ready.further(results):
        labelled, runs = [*labelled, *second], [*runs, *ready.trained(second)]
        results = ready.results(labelled, runs)
    made_with, first = _made_with(study, runs, ready.here) | {"precision": ready.precision}, team().first
    leave()
    if not first:  # what is left to do is to measure and to write
        return None
    if study.ahead is not None:
        print(study.ahead(results), flush=True)
    if study.measure is not None:
        results = dataclasses.replace(results, measurements=study.measure(results))
    return results, made_with


def _planned(study: Study, options: Options) -> tuple[Sequence[Planned], dict[str, Any]]:
    """The networks that a study asks for, and what is changed of their recipes. What can be wrong with the options is said here,
    before data are looked for."""
    from resprobe.networks import check_family, resolve
    from resprobe.probes import check_watches, make_probe
    from resprobe.recipes import parse_changes
    from resprobe.registry import OF_YOURS
    from resprobe.runs import check_seed
    from resprobe.shortcuts import SHORTCUTS

    for name in ("depths", "seeds"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{name} (={_in_words(values)}) must be given, each once")
    for seed in options.seeds:
        check_seed(seed)
    for name in options.probe:
        check_watches(make_probe(name))
    for shortcut in (options.shortcut, *getattr(options, "shortcuts", ())):
        if shortcut not in SHORTCUTS:
            residual = [name for name in SHORTCUTS.names() if name != "none"]
            raise not_accepted("shortcut", shortcut, residual, OF_YOURS)
    changes = parse_changes(options.recipe)
    planned = study.plan(options)
    if options.probe and not planned:
        raise UsageError(f"probe (={options.probe[0]!r}) watches a training, and nothing is trained here")
    if changes and not planned:
        raise UsageError(f"recipe (={options.recipe[0]!r}) is that of a training, and nothing is trained here")
    if options.shortcut == "none" and "shortcut" in study.built_of(options):
        raise UsageError(
            "shortcut (='none') makes plain networks, which are there anyway; name one of residual networks"
        )
    _check_weights(study, options)
    for one in planned:
        if isinstance(one.network, str):
            check_family(resolve(one.network, **one.options))
    return planned, changes


def _made_with(study: Study, runs: Sequence[Run], here: Any) -> dict[str, Any]:
    """The machine, versions and commit of this process, or of those that trained the runs: on another day, perhaps, and on
    another machine. What is measured is measured here."""
    from resprobe.environment import environment, pooled

    ours = environment(here)
    if not runs:
        return ours
    parts = [run.environment or ours for run in runs] + ([ours] if study.measure else [])
    return pooled(parts) | {"date": ours["date"]}


def _check_weights(study: Study, options: Options) -> None:
    """What is wrong with `--weights` is said before anything is trained, and by a dry run too."""
    from resprobe.weights import check_weights_there

    weights = [Path(path) for path in getattr(options, "weights", ())]
    for path in weights:
        check_weights_there(path, path.exists())
    for path, times in Counter(path.resolve() for path in weights).items():
        if times > 1:  # it would count as one more seed
            raise UsageError(f"weights (={str(path)!r}) are given {times} times; name each once")
    usual = study.presets[options.preset]
    trained = ("block", "shortcut", "depths", "iterations") + (("seeds",) if study.ahead is None else ())
    for name in trained if weights else ():  # a study that trains by itself has a seed for that
        given = getattr(options, name)
        if given != getattr(usual, name):
            raise UsageError(
                f"{name} (={_in_words(given)!r}) is that of a training, and with --weights nothing is trained"
            )


def _without(failed: frozenset[str], options: Options, labelled: Labelled) -> str:
    """How to have the report of what did not fail: the seeds, or else the depths, of which no run has."""
    for name, label in (("seeds", "seed"), ("depths", "depth")):
        ended = {labels.get(label) for labels, job in labelled if job.config.key in failed}
        values = getattr(options, name)
        left = [str(value) for value in values if value not in ended]
        if 0 < len(left) < len(values) and name in offered(type(options)):
            return f", or reports without the failed ones with --{name} {' '.join(left)}"
    return ""


def _too_few(study: Study, options: Options) -> Iterator[str]:
    """What cannot be told without what a claim needs, or from one seed, if the study usually has more."""
    usual = study.presets[options.preset]
    for reason in study.leaves_open(options) if study.leaves_open else ():
        yield f"{reason}: a claim will be 'not tested'"
    if len(options.seeds) == 1 < len(usual.seeds):
        yield f"one seed only (--seeds {options.seeds[0]}): without a spread, comparisons over seeds will be 'inconclusive'"


def _not_named(options: Options, plugins: Mapping[str, str]) -> Iterator[str]:
    """Says that nothing of what a plugin registers is asked for. `plugins`: where they are, and the modules they are."""
    from resprobe.blocks import BLOCKS
    from resprobe.data import DATASETS
    from resprobe.probes import PROBES
    from resprobe.shortcuts import SHORTCUTS

    asked = {options.data_name}
    asked.update(word for value in vars(options).values() for word in (value if isinstance(value, tuple) else (value,)))
    for plugin, module in plugins.items():
        there = [
            (registry.kind, name)
            for registry in (BLOCKS, SHORTCUTS, PROBES, DATASETS)
            for name in registry.names_of(module)
        ]
        flags = [f"--{kind} {name}" for kind, name in there if kind in offered(type(options))]
        if flags and asked.isdisjoint(name for _, name in there):
            yield f"nothing is asked for of what {plugin} registers ({', '.join(flags)})"


def _replaced(study: Study, options: Options) -> Iterator[str]:
    """Says that a report of something else stands where this one is going to."""
    known = {option.name for option in dataclasses.fields(options)}
    try:
        record = json.loads((Path(options.out) / "verdict.json").read_text())
        made = record["config"]
        # An option that was not there yet is as if it had not been given.
        given = {name: value for name, value in made["options"].items() if name in known}
        theirs = type(options)(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        )
        if record["study"] != study.name or theirs.measured() != options.measured():
            yield f"{options.out} holds the report of `{made['command']}`, which this one is going to replace; --out keeps both"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it cannot be read
        return


def _jobs(
    planned: Sequence[Planned],
    options: Options,
    data: Data,
    precision: str,
    changes: Mapping[str, Any],
    *,
    later: bool = False,
) -> Labelled:
    """One job for each planned network and seed, with the labels of its row. Raises `UsageError` for one of the `changes` of
    the recipe that the study sets itself, but not `later`, when something is trained already."""
    from torch import nn

    from resprobe.runs import configure, default_recipe
    from resprobe.sweep import Job

    labelled = []
    for one in planned:
        built = one.network if isinstance(one.network, nn.Module) else None
        for seed in options.seeds if one.seeds is None else one.seeds:
            config = configure(one.network, data, seed=seed, precision=precision, **one.options)
            usual = default_recipe(data, options.iterations, config.network.depth)
            recipe = dataclasses.replace(usual, **changes)
            if one.recipe is not None:
                unchanged, recipe = one.recipe(usual), one.recipe(recipe)
                for name, value in changes.items():
                    # What the study makes of it may be another value (a schedule three times as long), but not the usual one.
                    deaf = value != getattr(recipe, name) == getattr(unchanged, name) and value != getattr(usual, name)
                    if deaf and not later:
                        raise UsageError(
                            f"recipe (='{name}={value}') cannot be changed here: {name} is what the study compares or sets itself"
                        )
            config = dataclasses.replace(config, data=options.data, recipe=recipe)
            probes = tuple(dict.fromkeys((*one.probes, *options.probe)))
            job = Job(config, probes, built, options.recompute, options.step)
            labels = dict(one.labels) | {"seed": seed}
            if any(labels == other for other, _ in labelled):  # it would count as one more seed
                said = ", ".join(f"{name} {value}" for name, value in one.labels.items())
                raise UsageError(f"the network of {said} is asked for twice; name it once")
            labelled.append((labels, job))
    for name, value in changes.items() if labelled and not later else ():
        recipes = [job.config.recipe for _, job in labelled]
        if all(name in recipe.unread() for recipe in recipes):
            raise UsageError(f"recipe (='{name}={value}') does nothing with {recipes[0].unread()[name]}")
        if name == "milestones" and all(max(recipe.milestones, default=0) >= recipe.iterations for recipe in recipes):
            raise UsageError(
                f"recipe (='{name}={value}'): the training ends after {recipes[0].iterations:,} iterations"
            )
    return labelled


def _tables(
    options: Options,
    labelled: Labelled,
    runs: Sequence[Run],
    *,
    device: str,
    precision: str,
) -> Results:
    import pandas

    from resprobe.probes import make_probe

    rows, histories = [], [pandas.DataFrame()]
    probes = dict.fromkeys(make_probe(name).name for name in options.probe)
    probed: dict[str, list[pandas.DataFrame]] = {name: [] for name in probes}
    for (labels, job), run in zip(labelled, runs, strict=True):
        which = {"network": job.config.network.name, "run": job.config.folder_name}
        rows.append(labels | run.metrics | which)
        histories.append(run.history.assign(**labels))
        for name, tables in probed.items():
            tables.append(_with_labels(run.tables[name], labels | which))
    table, history = pandas.DataFrame(rows), pandas.concat(histories, ignore_index=True)
    watched = {name: pandas.concat(tables, ignore_index=True) for name, tables in probed.items() if tables}
    return Results(options, table, history, tuple(runs), probed=watched, device=device, precision=precision)


def _with_labels(table: pandas.DataFrame, labels: Mapping[str, Any]) -> pandas.DataFrame:
    """A probe's table behind its run's labels; of a name that both have, a layer's `kind` say, the run's is network_kind."""
    for column, value in reversed(labels.items()):
        own = f"network_{column}" if column in table else column
        table = table.assign(**{own: value})[[own, *table.columns]]
    return table


def _check_networks(specs: set[NetworkSpec]) -> None:
    """Builds every network once, so that a depth that is not there or a block that does not fit is found beforehand."""
    from resprobe.networks import build

    for spec in sorted(specs, key=lambda spec: (spec.depth or 0, spec.family)):
        build(spec)
