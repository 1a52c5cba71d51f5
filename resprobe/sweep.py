"""Many runs: what is finished is found, the rest is trained, several at a time where the machine has the cores.

The small networks of §4.2 do not fill even two cores. Independent runs side by side, each on its own share of the
threads, finish sooner than one after the other on all of them.
"""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resprobe.board import ProgressBoard
from resprobe.data import load_data
from resprobe.devices import cores, cpu_threads, deterministic, prepare_cpu, usable
from resprobe.digests import is_known, module_of, source_file, typed_in
from resprobe.distributed import team
from resprobe.environment import device_name
from resprobe.errors import (
    DamagedFile,
    ProcessFailed,
    SweepFailed,
    TrainingDiverged,
    UsageError,
    is_installed,
    one_line,
)
from resprobe.estimates import costs
from resprobe.extensions import is_loaded, load_plugin
from resprobe.keeping import traceback_file
from resprobe.probes import PROBES
from resprobe.runs import Run, RunConfig, RunStore, train_as
from resprobe.sharing import sharing
from resprobe.training import Progress
from resprobe.words import duration
from resprobe.workers import Lost, Perform, side_by_side

if TYPE_CHECKING:
    from resprobe.cluster import RayCluster


_STARTING = 6.0
"""Seconds that processes take to start: a study of a few steps took so much longer with them, on two cores."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep, with the names of the probes whose tables it must have.

    `network`: a built network to be trained on from its weights; None: one initialized from the run's seed. `recompute`
    saves memory in training (see `resprobe.recompute`); `step` is how steps are executed (see `resprobe.steps`).
    """

    config: RunConfig
    probes: tuple[str, ...] = ()
    network: nn.Module | None = None
    recompute: bool = False
    step: str = "auto"

    @property
    def work(self) -> int:
        """A measure of cost for shares of progress: layers times images."""
        return max(1, self.config.network.depth or 1) * self.config.recipe.iterations * self.config.recipe.batch_size

    def made_of(self) -> dict[str, object]:
        """What another process must have to train it, beside resprobe, and what that is called."""
        probes = [(PROBES, name) for name in self.probes if name in PROBES]
        things = {f"{registry.kind} {name!r}": registry[name] for registry, name in (*self.config.used(), *probes)}
        modules = () if self.network is None else map(type, self.network.modules())
        return things | {f"module {kind.__name__!r}": kind for kind in modules}


def parse_concurrency(text: str) -> int | None:
    """How many runs at a time: None for "auto"."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"concurrency (={text!r}) must be 'auto' or a whole number ≥ 1")
    return int(text)


@dataclass(frozen=True)
class Survey:
    """What is there of a sweep's runs, and what is not: how it will be trained, and about how long that takes.

    `missing` is in the order of training, `seconds` in that of `missing`, each as if it had its device for itself.
    `reason` says why they are not known. `one_card`: all workers train on one. `unwatched`: how many are missing for the
    table of a probe alone. `edited`: how many were trained with another source, by what was edited since ("block mine").
    """

    total: int
    missing: tuple[Job, ...]
    begun: int
    workers: int
    threads: int
    device: str
    seconds: tuple[float, ...]
    reason: str = ""
    one_card: bool = False
    unwatched: int = 0
    edited: Mapping[str, int] = field(default_factory=dict)

    @property
    def found(self) -> int:
        return self.total - len(self.missing)

    @property
    def duration(self) -> float | None:
        """Seconds until the last run is finished, each worker taking the next run when it is free. On one card, where
        what is gained together depends on the runs, as if they took turns."""
        if len(self.seconds) < len(self.missing):
            return None
        if self.one_card:
            return sum(self.seconds)
        busy = [0.0] * max(1, self.workers)
        for seconds in self.seconds:
            busy[busy.index(min(busy))] += seconds
        return max(busy)

    def __str__(self) -> str:
        of_them = [f"{self.begun} of them begun"] if self.begun else []
        of_them += [f"{self.unwatched} of them anew, for a probe's table"] if self.unwatched else []
        of_them += [f"{count} of them anew, as {what} was edited" for what, count in self.edited.items()]
        aside = f" ({', '.join(of_them)})" if of_them else ""
        todo = f"{len(self.missing)} to train{aside}" if self.missing else "nothing to train"
        lines = [f"{self.total} run{'s' if self.total != 1 else ''}: {self.found} finished already, {todo}"]
        if self.missing:
            names = Counter(job.config.network.name for job in self.missing)
            listed = ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in names.items())
            how = f"on {self.device}, {self.workers} at a time" if self.workers > 1 else f"on {self.device}"
            about = "at most about" if self.one_card and self.workers > 1 else "about"
            length = f"not known: {self.reason}" if self.duration is None else f"{about} {duration(self.duration)}"
            lines += [f"to train: {listed}", f"time: {length} {how}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Outlook:
    """What a study trains by itself while it measures: how much in all, how much is there, and how long the rest takes.

    `what`: in the plural. They are trained one after the other, in the study's own process.
    """

    what: str
    total: int
    found: int
    seconds: float
    device: str

    def __str__(self) -> str:
        left = self.total - self.found
        line = f"{self.total} {self.what}: {self.found} finished already, "
        if not left:
            return line + "nothing to train"
        return line + f"{left} to train\ntime: about {duration(self.seconds)} on {self.device}, one after the other"


def survey(
    jobs: Sequence[Job],
    store: RunStore,
    *,
    device: torch.device,
    concurrency: int | None = None,
    cluster: RayCluster | None = None,
) -> Survey:
    """Looks for the runs of `jobs` in `store`, and times a few training steps of what is missing.

    `concurrency` None takes one run at a time on a GPU, and on a CPU one a core, unless that saves less time than starting
    the processes takes. `cluster` trains in place of this machine.
    """
    asked: dict[str, Job] = {}
    for job in jobs:  # a run that is asked for several times is trained once, with all probes that watch it
        before = asked.get(job.config.key, job)
        asked[job.config.key] = replace(job, probes=tuple(dict.fromkeys((*before.probes, *job.probes))))
    missing = {key: job for key, job in asked.items() if store.find(job.config, job.probes) is None}
    # The longest first, so that no worker is left alone with one at the end.
    ordered = tuple(sorted(missing.values(), key=lambda job: -job.work))
    typed = [what for job in ordered for what, thing in job.made_of().items() if typed_in(thing)]
    if typed and (cluster is not None or min(concurrency or 1, len(ordered)) > 1):
        raise UsageError(
            f"{typed[0]} was typed in, and other processes cannot have it; put it into a file and load that plugin"
        )
    if cluster is None:
        wanted = concurrency or (cores() if device.type == "cpu" else 1)
        workers = min(wanted, len(ordered))
        # Counted over all runs, not over the missing ones: the last digits of a run's figures depend on its threads, and must
        # not depend on what was there before.
        threads = max(1, min(cores() // max(1, min(wanted, len(asked))), torch.get_num_threads()))
    else:
        workers, threads, _ = cluster.share(len(ordered), concurrency)
    done = [store.iterations_done(job.config) for job in ordered]
    name = device_name(device) if cluster is None else cluster.name  # before a step may leave a card unable to tell
    seconds: tuple[float, ...] = ()
    reason = ""
    try:
        seconds = tuple(_seconds(ordered, done, device, threads))
    except Exception as error:  # whatever is wrong with a network, its training says it better
        reason = one_line(error)
    if device.type == "cuda":
        with suppress(RuntimeError):  # of a card that a step has left unable
            torch.cuda.empty_cache()  # what was timed here must not take memory from processes that train
    begun = sum(count > 0 for count in done)
    unfinished = [job.config for job in ordered if store.find(job.config) is None]
    ahead = Survey(
        len(asked),
        ordered,
        begun,
        workers,
        threads,
        name,
        seconds,
        reason,
        one_card=cluster is None and device.type != "cpu",
        unwatched=len(ordered) - len(unfinished),
        edited=store.edited(unfinished),
    )
    automatic = cluster is None and concurrency is None and workers > 1
    if automatic and ahead.duration is not None and sum(seconds) - ahead.duration < _STARTING:
        return replace(ahead, workers=1)
    if automatic and typed:
        warnings.warn(
            f"{typed[0]} was typed in, so runs take turns in this process; from a plugin's file they train side by side"
        )
        return replace(ahead, workers=1)
    return ahead


def _seconds(jobs: Sequence[Job], done: Sequence[int], device: torch.device, threads: int) -> Iterator[float]:
    for where, one in itertools.groupby(zip(jobs, done, strict=True), key=lambda each: each[0].config.data):
        some = list(one)
        data, first = load_data(where), some[0][0]
        timed = costs(
            [(job.config.network, job.config.recipe) for job, _ in some],
            data,
            device=device,
            precision=first.config.precision,
            threads=threads,
            recompute=first.recompute,
        )
        for (job, iterations), cost in zip(some, timed, strict=True):
            yield cost.of_training(data, job.config.recipe, iterations)


def run_all(
    jobs: Sequence[Job],
    store: RunStore,
    *,
    device: torch.device,
    concurrency: int | None = None,
    plugins: Sequence[str] = (),
    cluster: RayCluster | None = None,
) -> list[Run]:
    """The runs for `jobs`, in their order: found in `store`, or trained and kept there.

    `concurrency` and `cluster` as for `survey`. `plugins` are loaded in every process. Raises `SweepFailed` at the end
    if any run failed, and `UsageError` at once if one cannot be begun.
    """
    together = team()
    if together.size > 1:  # they train one run together, one run after the other
        concurrency = 1
    ahead = together.broadcast(lambda: survey(jobs, store, device=device, concurrency=concurrency, cluster=cluster))
    if together.first:
        print(ahead, flush=True)
    with ProgressBoard(ahead, store, jobs) as board:
        ordered, workers = ahead.missing, ahead.workers
        if ordered and cluster is not None:
            cluster.train(ordered, store, concurrency, _needed(ordered, plugins), board)
        elif ordered:
            one_process = workers <= 1 and usable(device)  # the survey may have left it unable
            left = _train_here(ordered, store, device, ahead.threads, board) if one_process else ordered
            if left and together.size > 1:
                raise ProcessFailed(f"process {together.rank} cannot compute on {device} any more; begin again")
            if left:
                _train_in_processes(left, store, device, workers, ahead.threads, _needed(left, plugins), board)
    if failures := board.failures:
        together.broadcast(lambda: None)  # the first has spoken; torchrun ends it when another one has ended
        kept = ahead.total - len(failures)
        counts = Counter(failures.values())
        lines = dict.fromkeys(
            f"{board.names[key]}: {why}" if counts[why] == 1 else f"{why} ({counts[why]} runs)"
            for key, why in failures.items()
        )
        raise SweepFailed(
            f"{len(failures)} of {ahead.total} runs failed: "
            + "; ".join(lines)
            + f"; {kept} finished runs and the failed ones' last checkpoints are kept in {store.root}; {_what_next(failures)}",
            failures,
        )
    runs = []
    for job in jobs:
        # Asked by the first: on another machine it need not be there.
        run = together.broadcast(lambda job=job: store.find(job.config, job.probes))
        if run is None:  # its probes are others in the processes that trained
            raise _edited(job)
        runs.append(run)
    return runs


def _what_next(failures: Mapping[str, str]) -> str:
    """What is to be done about failed runs, by why each failed."""
    diverged = sum(
        why.startswith(("the loss is not finite at ", "the weights are not finite after ")) for why in failures.values()
    )
    again = len(failures) - diverged
    lines = [f"the same command tries {'it' if again == 1 else 'them'} again from there"] if again else []
    if diverged:
        lines.append("what diverged would diverge again, but not by another --recipe, such as a lower learning_rate")
    return "; ".join(lines)


def _edited(job: Job) -> UsageError:
    return UsageError(f"{job.config.folder_name}: a plugin's file was edited since this was begun; begin it again")


def train_job(job: Job, store: RunStore, device: torch.device, watch: Callable[[Progress], None]) -> dict[str, float]:
    """Trains one run in this process and keeps it in `store`. `watch` is told of its progress. Gives its metrics."""
    run = train_as(
        job.config,
        # A copy: the network is trained in place, and is where the run begins for whoever holds it.
        copy.deepcopy(job.network),
        store,
        probes=job.probes,
        device=device,
        recompute=job.recompute,
        step=job.step,
        progress=watch,
    )
    return run.metrics


def _train_here(
    jobs: Sequence[Job],
    store: RunStore,
    device: torch.device,
    threads: int,
    board: ProgressBoard,
) -> Sequence[Job]:
    """Trains jobs one after the other. Gives those that are left where one leaves the device unable to go on."""
    with cpu_threads(threads):  # as each process of several would have: runs come out the same here and there
        for done, job in enumerate(jobs):
            try:
                metrics = train_job(job, store, device, lambda news, job=job: board.tell(job.config.key, news))
                board.finished(job, metrics)
            except Exception as error:
                if team().size > 1 and not _known_to_all(error):
                    # The others may wait for this process in the middle of a step. When it ends, torchrun ends them.
                    name, where = board.names[job.config.key], traceback_file(store.folder(job.config))
                    aside = f"; {where}" if where.is_file() else ""
                    raise ProcessFailed(
                        f"{name}, in process {team().rank}: {one_line(error)}{aside}; finished runs and the last checkpoint are "
                        f"kept in {store.root}; the same command goes on from there"
                    ) from error
                if isinstance(error, UsageError):
                    raise
                board.failed(job, one_line(error))
                if not usable(device):
                    return jobs[done + 1 :]
    return []


def _known_to_all(error: Exception) -> bool:
    """Whether all processes that train together have met this."""
    # A mistake of use all find, but for a file that one of them reads.
    everywhere = isinstance(error, UsageError | TrainingDiverged) and not isinstance(error, DamagedFile)
    if everywhere or hasattr(error, "known_to_all"):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return team().all_met(f"{one_line(error, named=True)} at {last.filename}:{last.lineno}")


# -- several processes ---------------------------------------------------------------------------------------------


def _train_in_processes(
    jobs: Sequence[Job],
    store: RunStore,
    device: torch.device,
    workers: int,
    threads: int,
    plugins: Sequence[str],
    board: ProgressBoard,
) -> None:
    with sharing(device) as variables:
        determinism_mode = torch.get_deterministic_debug_mode()
        start = partial(_start, variables, threads, plugins, store.root, device, determinism_mode)
        # Pickled here: a process's own way shares each tensor of a built network by an open file, of which there are few.
        packed = [(job.config.key, pickle.dumps(job)) for job in jobs]
        with closing(side_by_side(packed, workers, start)) as heard:
            for index, word, what in heard:
                job = jobs[index]
                if word == "news":
                    board.tell(job.config.key, what)
                elif word == "done":
                    board.finished(job, what)
                elif word == "mistake":
                    raise UsageError(what)
                elif word == "again":
                    warnings.warn(
                        f"{board.names[job.config.key]}: {what}; it goes on from its last checkpoint, alone, when the others "
                        "are done"
                    )
                else:
                    board.failed(job, f"{what}, twice" if word == "lost" else what)


def _needed(jobs: Sequence[Job], plugins: Sequence[str]) -> tuple[str, ...]:
    """The plugins that were named, and those that another process must load beside them to have what the jobs are made of."""
    things = [thing for job in jobs for thing in job.made_of().values()]
    return (*plugins, *dict.fromkeys(filter(None, map(_where, things))))


def _where(thing: Any) -> str:
    """The plugin that another process must load to have this; nothing for what it has anyway."""
    file, module = source_file(thing), module_of(thing)
    # A script's own, of the module __main__, is imported with it.
    if file is None or is_installed(file) or is_known(thing) or module in ("", "__main__"):
        return ""
    return str(file) if is_loaded(file) else module


def _start(
    variables: Mapping[str, str],
    threads: int,
    plugins: Sequence[str],
    root: Path,
    device: torch.device,
    determinism_mode: int,
) -> Perform:
    """Readies a process, and gives what trains a job there. `determinism_mode`: whether runs come to the same last digits each
    time, in torch's numbers: 0 no, 1 with warnings, 2 yes."""
    os.environ.update(variables)
    prepare_cpu()
    torch.set_num_threads(threads)
    for plugin in plugins:
        load_plugin(plugin)
    store = RunStore(root)

    def perform(task: tuple[str, bytes], tell: Callable[[Progress], None]) -> dict[str, float]:
        key, packed = task
        job: Job = pickle.loads(packed)
        if job.config.key != key:
            raise _edited(job)
        try:
            with deterministic(determinism_mode > 0, warn_only=determinism_mode == 1):
                return train_job(job, store, device, tell)
        except UsageError:
            raise
        except Exception as error:
            # Without others beside it, it may find the memory that it needs.
            if isinstance(error, torch.OutOfMemoryError) or not usable(device):
                raise Lost(one_line(error)) from error
            raise
        finally:
            if device.type == "cuda":
                with suppress(RuntimeError):
                    torch.cuda.empty_cache()  # which the other processes may need

    return perform
