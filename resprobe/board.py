"""The progress of a sweep as its user sees it: one bar over all runs, and a line for each that is finished."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resprobe.distributed import team
from resprobe.keeping import traceback_file
from resprobe.recipes import Recipe
from resprobe.runs import RunConfig, RunStore, errors_in_words
from resprobe.training import Progress

if TYPE_CHECKING:
    from resprobe.sweep import Job, Survey


def names_of(configs: Sequence[RunConfig]) -> dict[str, str]:
    """A run's key → what its network is called: its name, and where networks of one name differ, how: options, recipe, and
    whether they were trained before."""
    of_one_name: dict[str, list[RunConfig]] = {}
    for config in configs:
        of_one_name.setdefault(config.network.name, []).append(config)
    names = {}
    for config in configs:
        others = of_one_name[config.network.name]
        options = [dict(other.network.options) for other in others]
        differ = [name for name, value in config.network.options if any(other.get(name) != value for other in options)]
        marks = "".join(f", {name} {config.network.get(name)}" for name in differ)
        marks += _recipe_mark(config.recipe, {other.recipe for other in others})
        if config.start is not None and any(other.start is None for other in others):
            marks += ", trained on"
        names[config.key] = f"{config.network.name}{marks}"
    return names


def _recipe_mark(recipe: Recipe, recipes: set[Recipe]) -> str:
    """What tells a recipe from the others: its name, if each has another, else the fields that differ."""
    if len({each.name for each in recipes}) == len(recipes):
        return f", {recipe.name}" if len(recipes) > 1 else ""
    names = (field.name for field in dataclasses.fields(recipe) if field.name != "name")
    differ = [name for name in names if len({getattr(each, name) for each in recipes}) > 1]
    return "".join(f", {name} {getattr(recipe, name)}" for name in differ)


class ProgressBoard:
    """One bar over all runs, and a line for each that is finished. Without a terminal, the lines alone.

    `names`: what the runs are called, by their keys. `failures`: why those failed that did. Texts: an error itself would keep
    its run in memory, and on a GPU that of all others.
    """

    def __init__(self, ahead: Survey, store: RunStore, jobs: Sequence[Job]):
        self.store, self.total, self.found = store, ahead.total, ahead.found
        self.work = {job.config.key: job.work for job in ahead.missing}
        self.share = dict.fromkeys(self.work, 0.0)
        configs = [job.config for job in jobs]  # those that are there already too: which block was it?
        networks = names_of(configs)
        self.names = {config.key: f"{networks[config.key]}, seed {config.seed}" for config in configs}
        self.latest: dict[str, Progress] = {}
        self.failures: dict[str, str] = {}
        self.done, self.lock = 0, threading.Lock()
        self.bar: Any = None

    def __enter__(self) -> ProgressBoard:
        from tqdm import tqdm

        self.bar = tqdm(
            total=1.0,
            disable=not self.work or not sys.stderr.isatty() or not team().first,
            bar_format="{percentage:3.0f} %|{bar:20}| {elapsed}, {remaining} left{postfix}",
            leave=False,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def tell(self, key: str, news: Progress) -> None:
        """Takes a run's latest figures."""
        with self.lock:
            if self.share.get(key, 1.0) == 1.0:  # late news of a finished run
                return
            self.latest[key] = news
            self._set_share(key, news.iteration / news.iterations)
            speed = sum(each.images_per_second for each in self.latest.values())
            rate = sum(each.iteration / each.seconds for each in self.latest.values() if each.seconds)
            self.bar.set_postfix_str(
                f"{len(self.latest)} running, {rate:,.1f} it/s, {speed:,.0f} images/s, loss {news.loss:.3f}, "
                f"training error {news.train_error:.1f} %"
            )

    def finished(self, job: Job, metrics: dict[str, float]) -> None:
        """Says that a run is finished and with what."""
        self._end(job, f"{errors_in_words(metrics)}, {metrics['seconds']:,.0f} s")

    def failed(self, job: Job, why: str) -> None:
        """Says that a run failed, and where to look; the others go on."""
        # A training's own error begins so.
        why = why.removeprefix(f"{job.config.network.name}, seed {job.config.seed}: ")
        self.failures[job.config.key] = why
        file = traceback_file(self.store.folder(job.config))
        self._end(job, f"failed: {why}" + (f"; {file}" if file.is_file() else ""))

    def _end(self, job: Job, outcome: str) -> None:
        with self.lock:
            self.done += 1
            self._set_share(job.config.key, 1.0)
            self.latest.pop(job.config.key, None)
            if not team().first:
                return
            name = self.names[job.config.key]
            self.bar.write(f"[{self.found + self.done}/{self.total}] {name}: {outcome}", file=sys.stdout)
            sys.stdout.flush()

    def _set_share(self, key: str, share: float) -> None:
        self.bar.update((share - self.share[key]) * self.work[key] / sum(self.work.values()))
        self.share[key] = share
