"""The frame of a study: a study states its runs, its figures and its claims; everything else is here.

Options → what is to be run → the run store (found, or trained) → one tidy table → verdicts → report. This module does
not import torch before there is something to do, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from resprobe.claims import Claim, Verdict
from resprobe.commands import answer, called_as
from resprobe.errors import SweepFailed, UsageError, not_accepted, short

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from torch import nn

    from resprobe.cluster import RayCluster
    from resprobe.data import Data
    from resprobe.networks import NetworkSpec
    from resprobe.recipes import Recipe
    from resprobe.runs import Run
    from resprobe.sweep import Job, Outlook, Survey

Setting = Literal["quick", "paper", "custom"]


@dataclass(frozen=True)
class Options:
    """What every study can be asked. A study's presets are instances; what is not given is the preset's."""

    preset: Literal["quick", "paper"] = "quick"
    """quick: minutes on a laptop, on embedded data. paper: the paper's recipe."""
    data: str = "digits"
    """data set: digits, digits-64, cifar10, cifar100, or NAME:PATH to read a local copy; folder:PATH for class folders"""
    depths: tuple[int, ...] = (20, 56)
    """depths in weighted layers, as the paper counts them"""
    block: str = "basic"
    """block of the networks: basic, bottleneck, single, or one that a plugin registers"""
    shortcut: str = "A"
    """shortcuts of the residual networks: A, A-centred, B, C, or one that a plugin registers (highway)"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one run for each; verdicts rest on the spread over them"""
    iterations: int = 64_000
    """training iterations (mini-batches); the whole schedule is scaled, and printed as a departure"""
    recipe: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """fields of the recipe to be trained by instead, as bn_batch=64 learning_rate=0.05; printed as departures"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the processor computes in it, else fp32; weights stay in fp32"""
    recompute: bool = False
    """compute activations again in the backward pass instead of keeping them: same numbers, less memory, more time"""
    step: Literal["auto", "eager", "graph", "compile", "compile-blocks"] = "auto"
    """training steps operation by operation, as one captured CUDA graph (auto on CUDA), or compiled, whole or by blocks"""
    deterministic: bool = False
    """compute the same last digits each time on the same machine, also on a GPU, where it takes more time"""
    concurrency: str = "auto"
    """runs at a time; auto: one a core on a CPU (one in all if they are short), one on a GPU"""
    executor: Literal["local", "ray"] = "local"
    """where runs are trained: on this machine, or on the nodes of a Ray cluster, which share the folder of runs"""
    address: str = ""
    """Ray cluster, HOST:PORT; by default RAY_ADDRESS, the cluster that runs on this machine, or a new one of it alone"""
    plugin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE|MODULE")] = ()
    """plugin to load first: a file (my_block.py) or a module (package.module)"""
    probe: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """probe to watch every training with: gradient-norms, or one that a plugin registers; its table is put beside the report"""
    dry_run: bool = False
    """say what would be trained, how much of it is there, and how long the rest will take; then stop"""
    out: str = ""
    """folder for the report, figures and tables; by default results/STUDY"""
    runs: str = "runs"
    """folder in which finished runs are kept and found again"""

    @property
    def data_name(self) -> str:
        """The data set's name, without the place of a copy."""
        return self.data.partition(":")[0]

    def measured(self) -> dict[str, Any]:
        """The options on which it depends what is measured. Where a copy of CIFAR lies is no matter; a folder may hold any."""
        found = {name: value for name, value in vars(self).items() if name not in _NOT_THE_SETTING}
        return found | ({"data": self.data_name} if self.data_name in ("cifar10", "cifar100") else {})


def cifar_presets(quick: Options, **paper: Any) -> dict[str, Options]:
    """The presets of a study of CIFAR networks: `quick`, and the same in the paper's setting, 64,000 iterations on CIFAR-10
    (§4.2). `paper`: further options that differ there, such as depths."""
    return {
        "quick": quick,
        "paper": dataclasses.replace(quick, preset="paper", data="cifar10", iterations=64_000, **paper),
    }


# What does not change what is measured: where it is computed and where it is put. See `Options.measured`.
_NOT_THE_SETTING = {
    "preset",
    "device",
    "precision",
    "recompute",
    "step",
    "deterministic",
    "concurrency",
    "executor",
    "address",
    "dry_run",
    "plugin",
    "probe",
    "out",
    "runs",
}


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
    the runs' labels. `device` and `precision` are those to measure with.
    """

    options: Options
    table: pandas.DataFrame
    histories: pandas.DataFrame
    runs: Sequence[Run]
    measurements: pandas.DataFrame | None = None
    probed: Mapping[str, pandas.DataFrame] = field(default_factory=dict)
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
    """A figure with its caption and a text that says what it shows to those who cannot see it."""

    figure: Figure
    caption: str
    alt: str


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
        preset = _preset(arguments)
        if preset not in self.presets:
            raise not_accepted("--preset", preset, self.presets)
        return _parse_with_tyro(self, self.presets[preset], arguments)

    def run(self, options: Options, arguments: Sequence[str] = ()) -> dict[str, Any]:
        """Does the study and writes its report. Returns what `verdict.json` holds; nothing for a dry run
        or in a process that only helped to train."""
        started = time.perf_counter()
        asked, options = options, self._placed(options)
        arguments = arguments or self._arguments(asked)
        if options.dry_run:
            ahead = self.survey(options)
            print("\n".join(map(str, ahead)) or "nothing to train")
            if self.then is not None and len(ahead) == 1 and ahead[0].missing:  # type: ignore[union-attr]
                print("a second round of training follows, from what comes out of this one")
            return {}
        gathered = _gather(self, options)
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

        ahead: list[Survey | Outlook] = []
        with without_downloads():
            _gather(self, self._placed(options), ahead)
        return ahead

    def _placed(self, options: Options) -> Options:
        """Checked, and with paths as they are meant: a shell leaves alone the ~ of `--out=~/mine`."""
        _check_kinds(options)
        paths: dict[str, Any] = {"out": options.out or f"results/{self.name}", "runs": options.runs}
        paths = {name: os.path.expanduser(path) for name, path in paths.items()}
        if weights := getattr(options, "weights", ()):
            paths["weights"] = tuple(map(os.path.expanduser, weights))
        return dataclasses.replace(options, **paths)

    def _arguments(self, options: Options) -> list[str]:
        """The command line that asks for `options`, as given in Python."""
        asked = ["--preset", options.preset] if options.preset != "quick" else []
        told = get_type_hints(type(options), include_extras=True)
        for name, value in vars(options).items():
            if name == "preset" or value == getattr(self.presets[options.preset], name):
                continue
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, tuple):
                one_by_one = tyro.conf.UseAppendAction in get_args(told[name])
                asked += (
                    [word for each in value for word in (flag, str(each))] if one_by_one else [flag, *map(str, value)]
                )
            elif isinstance(value, bool):
                asked.append(flag if value else f"--no-{flag[2:]}")
            else:
                asked += [flag, str(value)]
        return asked

    def built_of(self, options: Options) -> dict[str, tuple[str, str]]:
        """Block and shortcut, and the preset's, where they are not the preset's."""
        usual = self.presets[options.preset]
        pairs = {"block": (options.block, usual.block), "shortcut": (options.shortcut, usual.shortcut)}
        return {name: (ours, its) for name, (ours, its) in pairs.items() if ours != its}

    def beside_paper(self, options: Options) -> bool:
        """Whether figures may be held against the paper's numbers: all but depths and seeds is as in its setting."""
        paper = self.presets["paper"]
        alike = dataclasses.replace(options, preset="paper", depths=paper.depths, seeds=paper.seeds)
        return self.setting(alike) == "paper"

    def setting(self, options: Options) -> Setting:
        """The preset's name if what is measured is the preset's, else "custom"."""
        preset = self.presets[options.preset]
        if options.measured() | {"data": options.data_name} != preset.measured() | {"data": preset.data_name}:
            return "custom"
        folder = options.data_name == "folder"
        return "custom" if folder and not is_imagenet(options.data) else options.preset


def is_imagenet(data: str) -> bool:
    """Whether a folder holds as many images and classes as ImageNet 2012's training and validation sets."""
    from resprobe.data import load_data

    try:
        there = load_data(data)
    except UsageError:
        return False
    return (len(there.train), len(there.test), there.num_classes) == (1_281_167, 50_000, 1000)


def _gather(
    study: Study, options: Options, ahead: list[Survey | Outlook] | None = None
) -> tuple[Results, dict[str, Any]] | None:
    """Finds or trains the runs and puts them into tables. With `ahead`, only surveys are made, and put there."""
    from resprobe.devices import deterministic

    if options.executor == "ray":
        from resprobe.cluster import ray_cluster

        with ray_cluster(options.address, options.device) as cluster, deterministic(options.deterministic):
            return _gather_on(cluster, study, options, ahead)
    if options.address:
        raise UsageError(f"address (={options.address!r}) is that of a Ray cluster; it needs --executor ray")
    with deterministic(options.deterministic):
        return _gather_on(None, study, options, ahead)


def _gather_on(
    cluster: RayCluster | None, study: Study, options: Options, ahead: list[Survey | Outlook] | None
) -> tuple[Results, dict[str, Any]] | None:
    """Does what `_gather` says, with the runs trained on a cluster or on this machine."""
    from resprobe.checkpoints import check_writable
    from resprobe.data import load_data
    from resprobe.devices import prepare_cpu, resolve_device, resolve_precision
    from resprobe.distributed import join, leave, team
    from resprobe.extensions import load_plugin
    from resprobe.runs import RunStore
    from resprobe.steps import resolve_step
    from resprobe.sweep import parse_concurrency, run_all, survey

    prepare_cpu()
    for plugin in options.plugin:
        load_plugin(plugin)
    concurrency = parse_concurrency(options.concurrency)
    device = join(resolve_device(options.device)) if cluster is None else cluster.device
    here = device if cluster is None else cluster.here
    precision = resolve_precision(options.precision, device)
    resolve_step(options.step, device, recompute=options.recompute)
    planned, changes = _planned(study, options)
    if planned and team().size > 1:
        team().told(lambda: bool(load_data(options.data)))  # one of them downloads
    data = load_data(options.data) if planned else None  # what is not trained on need not be there
    fresh = _jobs(planned, options, data, precision, changes) if data else []
    _check_networks({job.config.network for _, job in fresh})
    notes = list(_too_few(study, options))
    if ahead is None:
        # Nothing is written before everything that was asked for is known to make sense.
        check_writable(Path(options.out), "out")
        notes += _replaced(study, options)
    if fresh and team().first:
        for note in notes:  # hours before the report is there
            print(f"note: {note}", file=sys.stderr, flush=True)
    store = RunStore(options.runs, writes=ahead is None) if fresh else None
    labelled, runs = [], []
    for then in (study.then, None):
        jobs = [job for _, job in fresh]
        if ahead is not None:
            ahead += [survey(jobs, store, device=device, concurrency=concurrency, cluster=cluster)] if jobs else []
            if jobs and ahead[-1].missing:  # type: ignore[union-attr]
                labelled, fresh, runs, then = [], [], [], None  # what they end with is not known yet
            runs += [store.find(job.config, job.probes) for _, job in fresh]
        elif jobs:
            try:
                runs += run_all(
                    jobs, store, device=device, concurrency=concurrency, plugins=options.plugin, cluster=cluster
                )
            except SweepFailed as error:
                raise SweepFailed(f"{error}{_without(error.keys, options, fresh)}", error.keys) from error
        labelled += fresh
        results = _tables(options, labelled, runs, device=str(here), precision=precision)
        if then is None:
            break
        fresh = _jobs(then(results), options, data, precision, changes, later=True) if data else []
    if ahead is not None:
        ahead += [] if study.ahead is None else [study.ahead(results)]
        return None
    made_with, first = _made_with(study, runs, here) | {"precision": precision}, team().first
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
    from resprobe.probes import make_probe
    from resprobe.recipes import parse_changes
    from resprobe.runs import check_seed

    for name in ("depths", "seeds"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{name} (={' '.join(map(str, values))}) must be given, each once")
    for seed in options.seeds:
        check_seed(seed)
    for name in options.probe:
        make_probe(name)
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
            text = " ".join(map(str, given)) if isinstance(given, tuple) else str(given)
            raise UsageError(f"{name} (={text!r}) is that of a training, and with --weights nothing is trained")


def _check_kinds(options: Options) -> None:
    """Raises `UsageError` for a value of another kind than its option has, as may be given in Python."""
    hints = get_type_hints(type(options))
    for option in dataclasses.fields(options):
        value, hint = getattr(options, option.name), hints[option.name]
        kind = get_origin(hint) or hint
        fits = isinstance(value, kind) if kind in (tuple, str, bool) else type(value) in (int, kind)
        if kind is Literal and value not in get_args(hint):
            raise not_accepted(option.name, value, get_args(hint))
        if kind is not Literal and not fits:
            raise UsageError(
                f"{option.name} (={short(value)}) must be of type {kind.__name__}, such as {option.default!r}"
            )


def _without(failed: frozenset[str], options: Options, labelled: Sequence[tuple[dict[str, Any], Job]]) -> str:
    """How to have the report of what did not fail: the seeds, or else the depths, of which no run has."""
    for name, label in (("seeds", "seed"), ("depths", "depth")):
        ended = {labels.get(label) for labels, job in labelled if job.config.key in failed}
        values = getattr(options, name)
        left = [str(value) for value in values if value not in ended]
        if 0 < len(left) < len(values) and name in offered(type(options)):
            return f", or reports without the failed ones with --{name} {' '.join(left)}"
    return ""


def _too_few(study: Study, options: Options) -> Iterator[str]:
    """What cannot be told from one depth or one seed, if the study usually has more, or without what a claim needs."""
    usual = study.presets[options.preset]
    if len(options.depths) == 1 < len(usual.depths):
        yield f"one depth only (--depths {options.depths[0]}): what compares depths will be 'not tested'"
    for reason in study.leaves_open(options) if study.leaves_open else ():
        yield f"{reason}: a claim will be 'not tested'"
    if len(options.seeds) == 1 < len(usual.seeds):
        yield f"one seed only (--seeds {options.seeds[0]}): without a spread, comparisons over seeds will be 'inconclusive'"


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
            yield f"{options.out} holds the report of `{made['command']}`, which this one replaces; --out keeps both"
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
) -> list[tuple[dict[str, Any], Job]]:
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
            why = f"augmentation {recipes[0].augmentation!r}" if name not in _OF_THE_RATE else "the others as they are"
            raise UsageError(f"recipe (='{name}={value}') does nothing with {why}")
        if name == "milestones" and all(max(recipe.milestones, default=0) >= recipe.iterations for recipe in recipes):
            raise UsageError(
                f"recipe (='{name}={value}'): the training ends after {recipes[0].iterations:,} iterations"
            )
    return labelled


_OF_THE_RATE = ("warm_up_until", "momentum_form")
"""Fields of a recipe that others than its augmentation may make idle."""


def _tables(
    options: Options,
    labelled: Sequence[tuple[dict[str, Any], Job]],
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


# -- the command line ------------------------------------------------------------------------------------------------


def offered(options: type[Options]) -> list[str]:
    """Names of the options that a command line takes: those that the study does not put away."""
    hints = get_type_hints(options, include_extras=True)
    return [name for name, hint in hints.items() if tyro.conf.Suppress not in get_args(hint)]


def _preset(arguments: Sequence[str]) -> str:
    """The preset is needed before the rest, since it holds the defaults that `--help` shows."""
    preset = "quick"
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == "--preset":
            preset = following
        elif argument.startswith("--preset="):
            preset = argument.partition("=")[2]
    return preset


def _parse_with_tyro(study: Study, defaults: Options, arguments: Sequence[str]) -> Options:
    said = io.StringIO()
    try:
        # Its errors are boxes of several lines; what is in them is said in one.
        with contextlib.redirect_stderr(said):
            options = tyro.cli(
                type(defaults),
                prog=called_as(study.name),
                description=study.description,
                default=defaults,
                args=list(arguments),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(said.getvalue(), defaults)) from None
    _check_repeated(type(defaults), arguments)
    for argument, following in itertools.pairwise([*arguments, "--"]):
        if argument.startswith("--") and following.startswith("--"):
            name = argument[2:].replace("-", "_")
            if getattr(defaults, name, None) == getattr(options, name, None) == ():  # else it would count as not given
                raise UsageError(f"{argument} needs a value after it, or several")
    return options


def _check_repeated(kind: type[Options], arguments: Sequence[str]) -> None:
    """Raises `UsageError` for an option that is given twice, of which the first would be lost."""
    hints, told = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    given = Counter(
        argument.partition("=")[0][2:].replace("-", "_") for argument in arguments if argument.startswith("--")
    )
    for name, times in given.items():
        if times > 1 and tyro.conf.UseAppendAction not in get_args(told.get(name)):
            several = ", with all its values" if get_origin(hints.get(name)) is tuple else ""
            raise UsageError(f"--{name.replace('_', '-')} is given {times} times; accepted: once{several}")


def _one_line(box: str, defaults: Options) -> str:
    """What a box says of an error: value, what is accepted, nearest name."""
    lines = [line.strip(" │").strip() for line in box.splitlines()]
    paragraphs = " ".join("\n" if set(line) <= set("─╭╮╰╯- ") else line for line in lines[1:]).split("\n")
    text = next((paragraph.strip() for paragraph in paragraphs if paragraph.strip()), "unusable arguments")
    if unknown := re.search(r"^Unrecognized options: (\S+?),?(?: |$)", text):
        known = [f"--{name.replace('_', '-')}" for name in offered(type(defaults))]
        return str(not_accepted("option", unknown.group(1), known))
    if choice := re.search(r"invalid choice '(.*?)' for argument '(--\S+)'. Expected one of \((.*?)\)", text):
        return str(not_accepted(choice.group(2), choice.group(1), re.findall(r"'(.*?)'", choice.group(3))))
    if unreadable := re.search(r"^Error parsing (--\S+): .*?(\[?'[^']*'(?:, '[^']*')*\]?)$", text):
        option, value = unreadable.groups()
        accepted = re.search(rf"{option} (.*?)(?:  |$|\n)", "\n".join(lines))
        kind = {"INT": "a whole number", "[INT [INT ...]]": "whole numbers with spaces between them"}
        wanted = accepted.group(1).strip() if accepted else "another value"
        return f"{option} (={value.strip('[]')}) cannot be read; accepted: {kind.get(wanted, wanted)}"
    return text
