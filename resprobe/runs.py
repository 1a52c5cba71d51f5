"""Runs: what was trained, kept in a folder, and found again by what it is.

A run's key is a hash of its network, data, recipe, seed and precision, and of a stranger's source where there is one;
not of when, where or on which card it ran. `train` looks there first, and goes on where an earlier process was killed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from filelock import FileLock, Timeout
from torch import nn

from resprobe.checkpoints import not_kept
from resprobe.data import DATASETS, Data, FolderSet, Normalization, load_data
from resprobe.devices import resolve_device, resolve_precision
from resprobe.digests import network_digest, sources_of
from resprobe.distributed import team
from resprobe.environment import environment
from resprobe.errors import StorageError, TrainingDiverged, UsageError, check_whole, nearest, plain, short
from resprobe.files import (
    check_writable,
    load_json,
    read_json,
    read_table,
    read_tensors,
    write_atomically,
    write_json,
    write_table,
    write_tensors,
)
from resprobe.keeping import (
    CHECKPOINT,
    CONFIG,
    DIVERGED,
    ENVIRONMENT,
    HISTORY,
    NETWORK,
    RESULT,
    UNFINISHED,
    RunFolder,
    RunIdentity,
    failures_kept,
)
from resprobe.networks import NetworkSpec, Option, build, check_fit, made_of, resolve
from resprobe.probes import PROBES, Probe, check_watches, make_probe, table_of
from resprobe.randomness import seeded
from resprobe.recipes import Recipe, cifar_paper, digits_quick, imagenet_paper
from resprobe.registry import Registry
from resprobe.training import Progress, Training
from resprobe.weights import pack_run, unpack_run
from resprobe.workers import end_if_imported

if TYPE_CHECKING:
    import pandas

FORMAT = 1
"""Raised when the meaning of a stored run changes, so that runs of another meaning are not found."""


@dataclass(frozen=True)
class RunConfig(RunIdentity):
    """What a run is. `data` says where the data are (`NAME:PATH`), `data_identity` what they are."""

    network: NetworkSpec
    data: str
    data_identity: str
    recipe: Recipe
    seed: int = 0
    precision: str = "fp32"
    start: str | None = None
    """Digest of the modules and initial weights, for a network that was handed over built; None: initialized from `seed`."""

    metrics: ClassVar = ("train_error", "train_loss", "test_error", "test_loss", "iterations", "seconds")

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON. What a recipe calls itself does not."""
        recipe = asdict(self.recipe)
        del recipe["name"]
        return {
            "format": FORMAT,
            "network": asdict(self.network),
            "data": self.data_identity,
            "recipe": recipe,
            "seed": self.seed,
            "precision": self.precision,
            "start": self.start,
            "sources": self._sources,
        }

    @cached_property
    def _sources(self) -> dict[str, str]:
        """Digests of the source of everything that is not resprobe's own, as it is when the run is first asked for: what was
        typed in may name what the training changes."""
        prints = {f"{registry.kind} {name}": registry.fingerprint(name) for registry, name in self.used()}
        return {what: digest for what, digest in prints.items() if digest is not None}

    def used(self) -> list[tuple[Registry, str]]:
        """What it takes from registries, and under which names."""
        data = self.data.partition(":")[0]
        return [*made_of(self.network), *([(DATASETS, data)] if data in DATASETS else [])]

    def __getstate__(self) -> dict[str, Any]:
        """Without the sources: where it is read again, they are those that are there."""
        return {name: value for name, value in vars(self).items() if name != "_sources"}

    def called(self) -> list[str]:
        """Network, block and shortcut, data, iterations and seed."""
        block, shortcut = self.network.get("block"), self.network.get("shortcut")
        parts = [self.network.name.replace("/", "-")]
        parts += [str(block)] if block not in (None, "basic", "bottleneck") else []
        parts += [str(shortcut)] if shortcut is not None else []
        return [*parts, self.data.partition(":")[0], f"{self.recipe.iterations}it", f"seed{self.seed}"]


@dataclass
class Run:
    """A finished run.

    `history`: one row a log point (iteration, epoch, learning_rate, train_loss, train_error, test_loss, test_error,
    seconds; errors in percent). `metrics`: final figures. `tables`: one DataFrame a probe. `network`: the trained
    network, read when asked for, on the CPU; one that was handed over built is where it was trained.
    """

    config: RunConfig
    metrics: dict[str, float]
    history: pandas.DataFrame
    tables: dict[str, pandas.DataFrame] = field(default_factory=dict)
    path: Path | None = None
    _network: nn.Module | None = None

    def __repr__(self) -> str:
        config, where = self.config, f", {self.path}" if self.path else ""
        what = f"{config.network.name} on {config.data}, {config.recipe.iterations} iterations, seed {config.seed}"
        return f"Run({what}: {errors_in_words(self.metrics)}{where})"

    @property
    def environment(self) -> dict[str, Any]:
        """What it was trained with: device, threads, versions. Empty for a run that is not kept."""
        return read_json(self.path / ENVIRONMENT) if self.path else {}

    @property
    def network(self) -> nn.Module:
        if self._network is None:
            assert self.path is not None
            self._network = _load_network(self.config, self.path)
        return self._network


def errors_in_words(metrics: Mapping[str, float]) -> str:
    """Both final errors of a run."""
    return f"training error {metrics['train_error']:.2f} %, test error {metrics['test_error']:.2f} %"


def check_seed(seed: int) -> int:
    """A seed is a whole number from 0 on, of 32 bits: more torch's generator on a CPU does not take in."""
    check_whole("seed", seed, 0)
    if seed >= 2**32:
        raise UsageError(f"seed (={seed}) must be below 2³²")
    return seed


class RunStore:
    """A folder of runs. `writes`: whether any are to be kept there, or those that are there looked for alone."""

    def __init__(self, root: str | Path, *, writes: bool = True):
        if not str(root):
            raise UsageError("runs (='') must name a folder")
        self.root, self._told = Path(root).expanduser(), set[Path]()
        if writes:
            check_writable(self.root, "runs")
        elif any(os.path.isfile(part) for part in (self.root, *self.root.absolute().parents)):
            raise UsageError(f"runs (={str(root)!r}) cannot be a folder: it is, or would be in, a file")

    def folder(self, config: RunIdentity) -> Path:
        """Where a run is, or would be."""
        return self.root / config.folder_name

    def find(self, config: RunIdentity, probes: Sequence[str | Probe] = ()) -> Run | None:
        """The finished run, if it is there with the tables of these probes, given as objects or by their names.

        A table counts if it is that of a probe of the same identity; for a name that is not registered, any counts.
        """
        path = self.folder(config)
        asked: dict[str, str | None] = {}
        for probe in probes:
            made = None if isinstance(probe, str) and probe not in PROBES else make_probe(probe)
            asked |= {made.name: made.identity()} if made else {probe: None}
        try:
            metrics = json.loads((path / RESULT).read_text())["metrics"]
            history = read_table(path / HISTORY)
            tables = {}
            for name, identity in asked.items():
                about = _about_table(path, name)
                if identity and about.get("identity", identity) != identity:
                    return None  # the table is that of a probe with other settings, or another source
                tables[name] = read_table(path / "probes" / f"{name}.csv", about.get("columns", {}))
            if missing := [name for name in config.metrics if name not in metrics]:
                raise ValueError(f"{', '.join(missing)} not there")
            if int(history["iteration"].max()) != config.recipe.iterations:
                raise ValueError("its history ends early")
        except FileNotFoundError:
            return None
        except OSError as error:  # of a disk that is away for a moment: no reason to train a finished run again
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            if path not in self._told:  # a command asks for it more than once
                self._told.add(path)
                warnings.warn(f"the result in {path} is damaged ({error}); the run is made again")
            return None
        return Run(config, metrics, history, tables, path)

    def iterations_done(self, config: RunIdentity) -> int:
        """How far an unfinished run has come: iterations at its last checkpoint."""
        path = self.folder(config)
        if not (path / CHECKPOINT).is_file():
            return 0
        try:
            return int(read_table(path / UNFINISHED)["iteration"].max())
        except (OSError, ValueError, KeyError):
            return 0

    def diverged(self, configs: Sequence[RunConfig]) -> dict[str, list[int]]:
        """A run's key → the seeds with which the same run has diverged, for each of `configs`."""
        files = self.root.glob(f"*/{DIVERGED}")
        # A finished run that was trained anew, for a probe's table, is finished all the same.
        diverged = [read_json(file.with_name(CONFIG)) for file in files if not file.with_name(RESULT).exists()]
        seeds = {}
        for config in configs if diverged else ():
            seeds[config.key] = sorted(each["seed"] for each in filter(_same_but_for("seed", config), diverged))
        return seeds

    def edited(self, configs: Sequence[RunConfig]) -> dict[str, int]:
        """How many of these runs are finished but for another source of yours, by what was edited since ("block mine")."""
        counts: Counter[str] = Counter()
        for config in configs:
            if not (ours := config.identity()["sources"]):
                continue
            name, same = self.folder(config).name.removesuffix(config.key), _same_but_for("sources", config)
            for file in self.root.glob(f"{name}*/{RESULT}"):
                there = read_json(file.with_name(CONFIG))
                theirs = there.get("sources")
                if same(there) and isinstance(theirs, dict) and theirs.keys() == ours.keys():
                    counts.update(what for what, digest in ours.items() if theirs[what] != digest)
                    break
        return dict(counts)

    @contextlib.contextmanager
    def lock(self, config: RunIdentity, tell: Callable[[str], None]) -> Iterator[None]:
        """One writer a run. A second process waits; a lock whose holder was killed is free."""
        path = self.folder(config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                end_if_imported(whoever=True)
                tell(f"another process trains {path.name}; waiting for it")
                lock.acquire(poll_interval=0.2)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}; nothing was half-written") from error
        try:
            yield
        finally:
            lock.release()


def _same_but_for(part: str, config: RunConfig) -> Callable[[Mapping[str, Any]], bool]:
    """Whether what a run's `CONFIG` says is this identity, whatever it says of `part`."""
    wanted = json.loads(json.dumps(config.identity()))
    del wanted[part]
    return lambda there: all(there.get(name) == value for name, value in wanted.items())


def configure(
    network: str | NetworkSpec | nn.Module,
    data: str | Data,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    precision: str = "fp32",
    **options: Option,
) -> RunConfig:
    """The complete description of a run, defaults filled in.

    A network given by name (with `options`, as for `build`) is fitted to the data's channels and classes; one given as
    a specification or built must fit, else `UsageError`.
    """
    if recipe is not None and not isinstance(recipe, Recipe):
        raise UsageError(f"recipe (={short(recipe)}) must be a Recipe, such as rp.recipes.cifar_paper()")
    loaded = load_data(data)
    for part in ("train", "test"):
        if not len(getattr(loaded, part)):
            raise UsageError(f"data {loaded.name!r} has no images in {part}")
    start = None
    if isinstance(network, nn.Module):
        if options:
            raise UsageError(f"option (={next(iter(options))!r}) is for a network that is to be built; this one is")
        spec = getattr(network, "spec", None)
        if not isinstance(spec, NetworkSpec):  # a stranger's may be anything
            spec = NetworkSpec(f"module/{type(network).__qualname__}", None)
        start = network_digest(network)
    else:
        spec = resolve(network, **options)
        if isinstance(network, str):
            fit = {"in_channels": loaded.in_channels, "num_classes": loaded.num_classes}
            spec = resolve(
                spec, **{name: fit[name] for name in fit if name in dict(spec.options) and name not in options}
            )
    check_fit(spec, loaded)
    recipe = recipe or default_recipe(loaded, depth=spec.depth)
    name = data if isinstance(data, str) else data.name
    return RunConfig(spec, name, loaded.identity, recipe, check_seed(plain(seed)), precision, start)


def default_recipe(data: str | Data, iterations: int | None = None, depth: int | None = None) -> Recipe:
    """The recipe for a data set when none is named: ours for the digits, the paper's for all else."""
    data = load_data(data)
    if data.name in ("digits", "digits-64"):
        recipe = digits_quick()
    elif isinstance(data.train, FolderSet):
        recipe = imagenet_paper()
    else:
        recipe = cifar_paper(depth=depth)
    return recipe if iterations is None else recipe.with_iterations(iterations)


def train(
    network: str | NetworkSpec | nn.Module,
    data: str | Data,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    runs: str | Path | RunStore | None = None,
    probes: Sequence[str | Probe] = (),
    device: str | torch.device = "auto",
    precision: str = "auto",
    recompute: bool = False,
    step: str = "auto",
    progress: bool | Callable[[Progress], None] = True,
    **options: Option,
) -> Run:
    """Trains `network` on `data`, or finds that this has been done.

    `network`: a name, a specification (initialized from `seed`), with `options` as for `build`, or a built network (trained
    in place). `data`: a name, `NAME:PATH`, or a `Data`. `recipe`: by default the paper's (`default_recipe`). `runs`: the
    folder runs are kept in; None keeps nothing on disk. `probes` are attached on their schedules and their tables saved
    with the run. `recompute`: compute activations again in the backward pass instead of keeping them (see
    `resprobe.recompute`): the same numbers with less memory. `step`: how steps are executed, "eager", "graph", "compile" or
    "compile-blocks" (see `resprobe.steps`). `progress`: a bar, or a function that is told at every log point.

    Raises `UsageError` for what cannot be done as asked, `TrainingDiverged` when the loss stops being finite, and
    `StorageError` when the disk is full; what is done so far is kept.
    """
    end_if_imported()
    chosen_device = resolve_device(device)
    chosen_precision = resolve_precision(precision, chosen_device)
    loaded = load_data(data)
    try:
        config = configure(network, loaded, recipe, seed=seed, precision=chosen_precision, **options)
    except UsageError as error:
        raise _meant(network, options) or error from error.__cause__
    if isinstance(data, str):  # how it is read again, in another process too
        config = replace(config, data=data)
    if isinstance(probes, str | Probe) or not isinstance(probes, Iterable):
        raise UsageError(f"probes (={probes!r}) must be a list of names or probes")
    made = _made(probes)
    if runs is None:
        training = _prepare(config, network, loaded, chosen_device, made, recompute, step)
        with _watching(progress, config) as watch:
            training.run(lambda _, news: watch(news))
        run, _ = _finish(training, config, None)
        run.tables |= {probe.name: table_of(probe) for probe in made}
        return run

    if not isinstance(runs, str | Path | RunStore):
        raise UsageError(f"runs (={short(runs)}) must be a folder, or None to keep nothing")
    store = runs if isinstance(runs, RunStore) else RunStore(runs)
    # A registered set's own function says what it is, and its source counts; data handed over may be anything.
    digest = loaded.digest() if isinstance(data, Data) else None
    run = train_as(
        config,
        network,
        store,
        data=loaded,
        data_digest=digest,
        probes=made,
        device=chosen_device,
        recompute=recompute,
        step=step,
        progress=progress,
    )
    if isinstance(network, nn.Module):  # trained in place, also when it was trained before
        if run._network is None:
            assert run.path is not None
            run._network = _read_weights(network, run.path)
    return run


def train_as(
    config: RunConfig,
    network: str | NetworkSpec | nn.Module | None,
    store: RunStore,
    *,
    data: Data | None = None,
    data_digest: str | None = None,
    probes: Sequence[str | Probe] = (),
    device: torch.device,
    recompute: bool = False,
    step: str = "auto",
    progress: bool | Callable[[Progress], None] = True,
) -> Run:
    """Trains the run of a `config`, or finds it in the store, under the key that it has there: what was typed in may have become
    something else by now. `network`: one that was handed over built is trained in place; else `config` says how it is built.
    `data`: by default those that `config` names; `data_digest`: of data that were handed over."""
    data, made, together = data or load_data(config.data), _made(probes), team()
    together.broadcast(lambda: _check_same_data(store.folder(config), config, data, data_digest))
    run = together.broadcast(lambda: store.find(config, made))
    if run is not None:
        return run
    with store.lock(config, tell=warnings.warn) if together.first else contextlib.nullcontext():
        # It may have been finished while another command held the lock.
        run = together.broadcast(lambda: store.find(config, made))
        if run is not None:
            return run
        with failures_kept(store.folder(config)):
            training = _prepare(config, network, data, device, made, recompute, step)
            return _KeptTraining(store, config, training, data_digest).run(progress)


def _made(probes: Sequence[str | Probe]) -> list[Probe]:
    """The probes, made where they are given by name. Raises `UsageError` unless each has a name of its own."""
    made = [make_probe(probe) for probe in probes]
    names = [probe.name for probe in made]
    if len(set(names)) < len(names) or "" in names:
        raise UsageError(f"probes ({', '.join(map(repr, names))}) must have a name each, and each its own")
    return [check_watches(probe) for probe in made]


def _meant(network: object, options: Mapping[str, Option]) -> UsageError | None:
    """What is wrong with options that the network does not take, if they are the recipe's, or almost `train`'s own."""
    try:
        taken = dict(resolve(network).options)  # type: ignore[arg-type]
    except UsageError:  # there is no such network
        return None
    own = [name for name, each in inspect.signature(train).parameters.items() if each.kind is each.KEYWORD_ONLY]
    for name in (name for name in options if name not in taken):
        field = nearest(name, [each.name for each in fields(Recipe)])
        if field == "iterations":
            return UsageError(
                f"{name} is the recipe's: recipe=rp.default_recipe(data, iterations=…), or one of rp.recipes"
            )
        if field:
            return UsageError(f"{name} is the recipe's: recipe=dataclasses.replace(rp.default_recipe(data), {field}=…)")
        if near := nearest(name, own):
            return UsageError(f"{name} is no option of train; nearest: {near}")
    return None


def _check_same_data(path: Path, config: RunConfig, data: Data, digest: str | None) -> None:
    """Raises `UsageError` if the run in this folder is, or was begun, on other data that go by the same identity."""
    known = read_json(path / CONFIG).get("data_digest")
    images, metrics = len(data.train), read_json(path / RESULT).get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    before = metrics.get("train_images", images)
    if config.recipe.validation_fraction > 0:  # else the data's own part, if any, is no part of these
        before += metrics.get("validation_images", 0)
    if known == digest is not None or (before == images and None in (known, digest)):
        return
    what = f"{before} training images, not {images}" if before != images else "other images or labels"
    raise UsageError(
        f"data of identity {data.identity!r} with {what}, are those of {path}; give yours an identity of its own: "
        "dataclasses.replace(data, identity=…)"
    )


class _KeptTraining:
    """A training whose run is kept in a store: from where an earlier process has left it, to the finished run. Whoever makes it
    holds the run's lock."""

    def __init__(self, store: RunStore, config: RunConfig, training: Training, data_digest: str | None):
        self.store, self.config, self.training, self.data_digest = store, config, training, data_digest
        self.team, self.path = team(), store.folder(config)
        self.folder = RunFolder(self.path)
        self.odd: set[str] = set()
        """Names of the probes of whose state it was said that no checkpoint keeps it."""

    def run(self, progress: bool | Callable[[Progress], None]) -> Run:
        """Trains to the end, and keeps what came of it. Whatever breaks the training off, a checkpoint is left."""
        self._resume()
        self.began = self.training.iteration
        # A finished run is trained anew for a probe's table alone, and keeps its figures.
        self.finished: Run | None = self.team.broadcast(lambda: self.store.find(self.config))
        if self.team.first and self.finished is None:
            self._begin()
        with _watching(progress if self.team.first else False, self.config) as watch:

            def at_log_point(training: Training, news: Progress) -> None:
                if self.team.first and self.folder.due:
                    self._save(training.state())
                watch(news)

            try:
                self.training.run(at_log_point)
            except StorageError:
                raise
            except BaseException as error:  # an interrupt above all: what is done must not be lost
                self._rescue()
                if isinstance(error, TrainingDiverged):
                    name = f"{self.config.network.name}, seed {self.config.seed}"
                    raise TrainingDiverged(f"{name}: {error} in {self.path}") from error
                raise
        run, running = _finish(self.training, self.config, self.path)
        broken: Exception | None = None
        for probe in self.training.probes:
            try:
                run.tables[probe.name] = table_of(probe)
            except Exception as error:  # of a stranger's probe; what it watched must not be lost with it
                broken = error
        self.team.broadcast(lambda: self._keep(run, running))
        if broken is not None:
            raise broken
        return run if self.finished is None else self._with_tables(self.finished, run)

    def _resume(self) -> None:
        """Goes on from the last checkpoint, if there is one of a training with these probes."""
        training = self.training
        kept = self.team.broadcast(self.folder.load)
        if kept is None:
            return
        known = kept.get("identities", {name: training.identities.get(name) for name in kept["probes"]})
        if not training.identities.items() <= known.items():
            warnings.warn(f"{self.path.name} was begun without the probes asked for now; it begins again")
            return
        training.load_state(kept)
        for probe in training.probes:
            seen = any(map(probe.schedule, range(training.iteration)))
            if self.team.first and seen and type(probe).state is Probe.state:
                warnings.warn(
                    f"{self.path.name} goes on from iteration {training.iteration:,}, and probe {probe.name} has no state(): its "
                    "table lacks what was seen before, unless it keeps nothing"
                )

    def _begin(self) -> None:
        """Writes down what the run is, and the sources of what is not resprobe's own."""
        config = self.config
        known = read_json(self.path / CONFIG).get("data_digest")  # of an earlier begin, with the data handed over
        asked = {
            "data_given": config.data,
            "data_digest": self.data_digest or known,
            "recipe_name": config.recipe.name,
        }
        self.environment = environment(self.training.device)
        self.folder.begin(config.identity() | asked, self.environment | {"step": self.training.how})
        for digest in config._sources.values():  # a stranger's file may be edited, or lost, tomorrow
            for name, text in sources_of(digest).items():
                write_atomically(self.path / "sources" / digest[:8] / name, text)

    def _save(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint, unless a probe's state holds what none keeps."""
        odd = {name: kind for name, kept in state["probes"].items() if (kind := not_kept(kept))}
        for name in odd.keys() - self.odd:
            warnings.warn(
                f"{self.path.name}: state() of probe {name} holds a {odd[name]}, which no checkpoint keeps; accepted: tensors, "
                "Python's numbers and texts, and lists, tuples and dicts of them; interrupted, the run would begin again"
            )
        self.odd.update(odd)
        if not odd:
            self.folder.save(state, self.training.rows)

    def _rescue(self) -> None:
        """Saves the last good state of a training that is broken off."""
        # A begin with other probes may be broken off at once: then an earlier checkpoint has more to keep.
        got_on = self.training.last_good["iteration"] > self.began
        if self.team.first and (got_on or not self.folder.checkpoint.is_file()):
            try:
                self._save(self.training.last_good)
            except StorageError as error:  # which must not take the place of what ends the training
                warnings.warn(str(error))

    def _keep(self, run: Run, running: Mapping[str, torch.Tensor]) -> None:
        """Writes the finished run; where there was one already, its new tables alone. `running` as for `pack_run`."""
        training = self.training
        if self.finished is None:
            write_tensors(self.path / NETWORK, pack_run(training.network, training.normalization, running))
            # Again: a step that could not be captured ran in another way than it was to.
            write_json(self.path / ENVIRONMENT, self.environment | {"step": training.how})
        for name, table in run.tables.items():
            file = self.path / "probes" / f"{name}.csv"
            file.unlink(missing_ok=True)  # never under what is said of another one
            write_json(
                file.with_suffix(".json"), {"identity": training.identities[name], "columns": _column_kinds(table)}
            )
            write_table(file, table)
        if self.finished is None:
            self.folder.finish(run.metrics, training.rows)
        else:
            self.folder.clear()

    def _with_tables(self, finished: Run, anew: Run) -> Run:
        """The finished run with the tables of one that was trained anew. Warns where that ended otherwise."""
        if finished.metrics["train_loss"] != anew.metrics["train_loss"] and self.team.first:
            warnings.warn(
                f"{self.path.name} was trained anew for a probe's table and ended with {errors_in_words(anew.metrics)}, not "
                f"{errors_in_words(finished.metrics)}, as with other threads or on another machine; its figures stay the "
                "earlier ones"
            )
        return replace(finished, tables=anew.tables)  # and with its weights, which are read when they are asked for


def _prepare(
    config: RunConfig, network: Any, data: Data, device: torch.device, probes: list[Probe], recompute: bool, step: str
) -> Training:
    if not isinstance(network, nn.Module):
        with seeded(config.seed):
            network = build(config.network)
    return Training(
        network,
        data,
        config.recipe,
        seed=config.seed,
        device=device,
        precision=config.precision,
        probes=probes,
        recompute=recompute,
        step=step,
    )


def _finish(training: Training, config: RunConfig, path: Path | None) -> tuple[Run, dict[str, torch.Tensor]]:
    """The finished run, without tables, and the running statistics that precise ones have replaced."""
    import pandas

    metrics, running = training.finish()
    _normalized_by(training.network, training.normalization.to(torch.device("cpu")))
    training.network.eval()  # as it is when it is read from its folder
    if config.start is None:
        training.network.cpu()
    return Run(config, metrics, pandas.DataFrame(training.rows), {}, path, training.network), running


def _about_table(path: Path, name: str) -> dict[str, Any]:
    """The identity of the probe that a table is from, and the kinds of its columns; nothing where that was not written
    down, and no identity where it is damaged."""
    try:
        about = load_json(path / "probes" / f"{name}.json")
    except FileNotFoundError:
        return {}
    return {"identity": None} if about is None else about


def _column_kinds(table: pandas.DataFrame) -> dict[str, str]:
    """Column → "string" or "boolean", which a file of text does not tell."""
    import pandas

    kinds = {str(name): pandas.api.types.infer_dtype(table[name], skipna=True) for name in table}
    return {name: kind for name, kind in kinds.items() if kind in ("string", "boolean")}


def _load_network(config: RunConfig, path: Path) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return _read_weights(build(config.network), path)


def _read_weights(network: nn.Module, path: Path) -> nn.Module:
    state, normalization = unpack_run(read_tensors(path / NETWORK))
    network.load_state_dict(state)
    _normalized_by(network, normalization)
    return network.eval()


def _normalized_by(network: nn.Module, normalization: Normalization) -> None:
    """Tells `evaluate` how the network was trained, unless that name is something else in a stranger's network."""
    if isinstance(getattr(network, "normalization", None), Normalization | None):
        network.normalization = normalization  # type: ignore[assignment]


@contextlib.contextmanager
def _watching(progress: bool | Callable[[Progress], None], config: RunConfig) -> Iterator[Callable[[Progress], None]]:
    """Who is told of the progress: the caller's function, nobody, or a bar on stderr."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda news: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=config.recipe.iterations, unit="it", desc=f"{config.network.name} seed {config.seed}") as bar:

        def show(news: Progress) -> None:
            bar.set_postfix_str(
                f"{news.images_per_second:,.0f} images/s, loss {news.loss:.3f}, training error {news.train_error:.1f} %"
            )
            bar.update(news.iteration - bar.n)

        yield show
