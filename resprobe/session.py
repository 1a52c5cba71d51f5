"""A study at work: its options made ready, its runs found or trained, and everything it is judged by gathered in tables."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
import torch

from resprobe import sweep
from resprobe.board import names_of
from resprobe.data import Data, load_data
from resprobe.devices import deterministic, prepare_cpu, resolve_device, resolve_precision
from resprobe.distributed import join, leave, team
from resprobe.environment import environment, pooled
from resprobe.errors import SweepFailed, UsageError
from resprobe.extensions import is_loaded, load_plugin
from resprobe.files import check_writable
from resprobe.planning import Labels, check_networks, doubts, jobs_of, left_without, plan, replaced_report
from resprobe.probes import make_probe
from resprobe.registry import registered
from resprobe.runs import Run, RunStore
from resprobe.steps import resolve_step
from resprobe.study import Results
from resprobe.sweep import Job

if TYPE_CHECKING:
    from resprobe.cluster import RayCluster
    from resprobe.options import Options
    from resprobe.study import Study
    from resprobe.sweep import Outlook, Survey

Labelled = Sequence[tuple[Labels, Job]]
"""Runs that are asked for, each behind the labels of its row."""


@contextlib.contextmanager
def open_session(study: Study, options: Options, *, trains: bool = False, reports: bool = False) -> Iterator[Session]:
    """Everything that a study's trainings need, for as long as the `with` block lasts. What can be wrong is said here, before
    anything is trained, if anything is going to be, or a report written."""
    with contextlib.ExitStack() as held:
        cluster = None
        if options.executor == "ray":
            from resprobe.cluster import ray_cluster

            cluster = held.enter_context(ray_cluster(options.address, options.device))
        elif options.address:
            raise UsageError(f"address (={options.address!r}) is that of a Ray cluster; it needs --executor ray")
        held.enter_context(deterministic(options.deterministic))
        yield _made_ready(study, options, cluster, trains=trains, reports=reports)


def _made_ready(study: Study, options: Options, cluster: RayCluster | None, *, trains: bool, reports: bool) -> Session:
    prepare_cpu()
    plugins = _loaded(options.plugin)
    concurrency = sweep.parse_concurrency(options.concurrency)
    device = join(resolve_device(options.device)) if cluster is None else cluster.device
    precision = resolve_precision(options.precision, device)
    resolve_step(options.step, device, recompute=options.recompute)
    planned, changes = plan(study, options)
    if planned and team().size > 1:
        team().broadcast(lambda: bool(load_data(options.data)))  # one of them downloads, or says why it cannot
    data = load_data(options.data) if planned else None  # what is not trained on need not be there
    jobs = jobs_of(planned, options, data, precision, changes) if data else []
    check_networks([job for _, job in jobs])
    notes = [*doubts(study, options, plugins)]
    if reports:
        # Nothing is written before everything that was asked for is known to make sense.
        check_writable(Path(options.out), "out")
        notes += replaced_report(study, options)
    for note in notes if jobs else ():  # hours before the report is there
        _note(note)
    store = RunStore(options.runs, writes=trains) if jobs else None
    here = device if cluster is None else cluster.here
    return Session(study, options, cluster, device, here, precision, concurrency, data, changes, jobs, store)


def _loaded(plugins: Sequence[str]) -> dict[str, str]:
    """Loads plugins. Gives the module of each."""
    modules = {}
    for plugin in plugins:
        before, again = registered(), plugin in sys.modules or is_loaded(Path(plugin).expanduser().resolve())
        modules[plugin] = load_plugin(plugin).__name__
        if not again and registered() == before:
            # At once, since what it lacks may be what is asked for.
            _note(f'{plugin} registers nothing; a block is registered by @rp.register_block("name") above its class')
    return modules


def _note(text: str) -> None:
    if team().first:
        print(f"note: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Session:
    """A study whose options make sense. `device`: where runs are trained; `here`: where the rest is done. `jobs`: those of the
    first round."""

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

    def survey(self) -> list[Survey | Outlook]:
        """What is there and what is to be trained: a round each, and what the study's `measure` trains. What follows a round
        that is still to be trained is not known yet."""
        jobs, asked = self._not_diverged(self.jobs), self.jobs
        ahead, runs = self._surveyed(jobs)
        results = self._results([], []) if runs is None else self._results(jobs, runs, asked)
        if runs is not None and (second := self._second(results)):
            jobs, asked = [*jobs, *(further := self._not_diverged(second))], [*asked, *second]
            after, others = self._surveyed(further)
            ahead = [*ahead, *after]
            results = self._results([], []) if others is None else self._results(jobs, [*runs, *others], asked)
        return [*ahead, self.study.ahead(results)] if self.study.ahead is not None else [*ahead]

    def gather(self) -> tuple[Results, dict[str, Any]] | None:
        """All results, and the environment that made them; None in a process that only helped to train."""
        study = self.study
        labelled, runs = self._trained(self.jobs)
        results = self._results(labelled, runs, self.jobs)
        if second := self._second(results):
            further, others = self._trained(second)
            labelled, runs = [*labelled, *further], [*runs, *others]
            results = self._results(labelled, runs, [*self.jobs, *second])
        made_with, first = self._made_with(runs), team().first
        leave()
        if not first:  # what is left to do is to measure and to write
            return None
        if study.ahead is not None:
            print(study.ahead(results), flush=True)
        if study.measure is not None:
            results = dataclasses.replace(results, measurements=study.part("measure", results))
        return results, made_with

    def _trained(self, labelled: Labelled) -> tuple[Labelled, list[Run]]:
        """The runs, found or trained, and their jobs: all, but for those that diverged where the study leaves such out."""
        labelled = self._not_diverged(labelled)
        if self.store is None or not labelled:
            return labelled, []
        jobs, plugins = [job for _, job in labelled], self.options.plugin
        where = {"device": self.device, "concurrency": self.concurrency, "cluster": self.cluster}
        try:
            return labelled, sweep.run_all(jobs, self.store, plugins=plugins, **where)
        except SweepFailed as error:
            if error.keys <= self._diverged(labelled) < set(_keys(labelled)):
                return self._trained(labelled)
            raise SweepFailed(f"{error}{left_without(error.keys, self.options, labelled)}", error.keys) from error

    def _not_diverged(self, labelled: Labelled) -> Labelled:
        """The jobs without those that are left out. Raises `SweepFailed` where that would be all."""
        diverged = self._diverged(labelled)
        if diverged and diverged == set(_keys(labelled)):
            raise SweepFailed(
                "all of these trainings have diverged, and would again, but not by another --recipe", diverged
            )
        return [(labels, job) for labels, job in labelled if job.config.key not in diverged]

    def _diverged(self, labelled: Labelled) -> set[str]:
        """The keys of the jobs whose training has diverged, if the study leaves such out."""
        if self.study.diverged == "fail" or self.store is None:
            return set()
        configs, store = [job.config for _, job in labelled], self.store
        # Asked by the first: on another machine the folders need not be there.
        seeds = team().broadcast(lambda: store.diverged(configs))
        return {config.key for config in configs if config.seed in seeds.get(config.key, ())}

    def _surveyed(self, labelled: Labelled) -> tuple[list[Survey], list[Run] | None]:
        """What is there of the runs and what is to be trained, and the runs; None if some are still to be trained."""
        if self.store is None or not labelled:
            return [], []
        jobs = [job for _, job in labelled]
        ahead = sweep.survey(jobs, self.store, device=self.device, concurrency=self.concurrency, cluster=self.cluster)
        if ahead.missing:
            return [ahead], None
        return [ahead], [self.store.find(job.config, job.probes) for job in jobs]  # type: ignore[misc]

    def _second(self, results: Results) -> Labelled:
        """The jobs of the second round, which depends on what came out of the first."""
        if self.study.then is None or self.data is None:
            return []
        planned = self.study.part("then", results)
        return jobs_of(planned, self.options, self.data, self.precision, self.changes, later=True)

    def _results(self, labelled: Labelled, runs: Sequence[Run], asked: Labelled = ()) -> Results:
        """The runs in tables. `asked`: their jobs, and those of the runs that are left out."""
        rows, histories = [], [pandas.DataFrame()]
        probes = dict.fromkeys(make_probe(name).name for name in self.options.probe)
        probed: dict[str, list[pandas.DataFrame]] = {name: [] for name in probes}
        for (labels, job), run in zip(labelled, runs, strict=True):
            which = {"network": job.config.network.name, "run": job.config.folder_name}
            rows.append(labels | run.metrics | which)
            histories.append(run.history.assign(**labels))
            for name, tables in probed.items():
                tables.append(_with_labels(run.tables[name], labels | which))
        return Results(
            self.options,
            pandas.DataFrame(rows),
            pandas.concat(histories, ignore_index=True),
            tuple(runs),
            probed={name: pandas.concat(tables, ignore_index=True) for name, tables in probed.items() if tables},
            left_out=self._left_out(labelled, asked),
            device=str(self.here),
            precision=self.precision,
        )

    def _left_out(self, labelled: Labelled, asked: Labelled) -> dict[str, list[int]]:
        """Seeds of which a run diverged that is not among these, by network: without them a study tells of survivors."""
        configs = [job.config for _, job in asked]
        names, there, left_out = names_of(configs), set(_keys(labelled)), {}
        diverged = self.store.diverged(configs) if self.store else {}
        for config in configs:
            seeds = diverged.get(config.key, ())
            if left := [seed for seed in seeds if dataclasses.replace(config, seed=seed).key not in there]:
                left_out[names[config.key]] = left
        return left_out

    def _made_with(self, runs: Sequence[Run]) -> dict[str, Any]:
        """The machine, versions and commit of this process, or of those that trained the runs: on another day, perhaps, and on
        another machine. What is measured is measured here."""
        ours = environment(self.here)
        if runs:
            parts = [run.environment or ours for run in runs] + ([ours] if self.study.measure else [])
            ours = pooled(parts) | {"date": ours["date"]}
        return ours | {"precision": self.precision}


def _keys(labelled: Labelled) -> list[str]:
    return [job.config.key for _, job in labelled]


def _with_labels(table: pandas.DataFrame, labels: Mapping[str, Any]) -> pandas.DataFrame:
    """A probe's table behind its run's labels; of a name that both have, a layer's `kind` say, the run's is network_kind."""
    for column, value in reversed(labels.items()):
        own = f"network_{column}" if column in table else column
        table = table.assign(**{own: value})[[own, *table.columns]]
    return table
