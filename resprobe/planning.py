"""From a study's options to the trainings it asks for. Whatever can be wrong with the options is said here, before anything is
trained; `session` does the rest."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from resprobe.blocks import BLOCKS
from resprobe.data import DATASETS, Data
from resprobe.errors import UsageError, not_accepted, short
from resprobe.networks import build, check_family, resolve
from resprobe.options import Options, as_argument, offered
from resprobe.probes import PROBES, check_watches, make_probe
from resprobe.recipes import Recipe, parse_changes
from resprobe.registry import OF_YOURS
from resprobe.runs import check_seed, configure, default_recipe
from resprobe.shortcuts import SHORTCUTS
from resprobe.sweep import Job
from resprobe.weights import check_weights_there

if TYPE_CHECKING:
    from resprobe.study import Planned, Study

Labels = dict[str, Any]
"""What tells a run from the others in a study's table: depth, kind, seed, …"""


def plan(study: Study, options: Options) -> tuple[Sequence[Planned], dict[str, Any]]:
    """The networks that a study asks for, and what is changed of their recipes. Needs no data yet.

    Raises `UsageError` for options that make no sense, alone or together."""
    for name in ("depths", "seeds"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            given = f" (={as_argument(values)})" if values else ""
            raise UsageError(f"{name}{given} must be given, each once")
    for seed in options.seeds:
        check_seed(seed)
    for name in options.probe:
        check_watches(make_probe(name))
    for shortcut in (options.shortcut, *getattr(options, "shortcuts", ())):
        if shortcut not in SHORTCUTS:
            residual = [name for name in SHORTCUTS.names() if name != "none"]
            raise not_accepted("shortcut", shortcut, residual, OF_YOURS)
    changes = parse_changes(options.recipe)
    planned = study.part("plan", options)
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


def _check_weights(study: Study, options: Options) -> None:
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
                f"{name} (={as_argument(given)!r}) is that of a training, and with --weights nothing is trained"
            )


def jobs_of(
    planned: Sequence[Planned],
    options: Options,
    data: Data,
    precision: str,
    changes: Mapping[str, Any],
    *,
    later: bool = False,
) -> list[tuple[Labels, Job]]:
    """One job for each planned network and seed, behind the labels of its row.

    Raises `UsageError` for `changes` of the recipe that the study would not heed, but not `later`, when something is trained
    already; and where one network is asked for twice, or one run has two labels.
    """
    jobs: list[tuple[Labels, Job]] = []
    known: dict[str, Labels] = {}
    for one in planned:
        _check_planned(one)
        built = one.network if isinstance(one.network, nn.Module) else None
        probes = tuple(dict.fromkeys((*one.probes, *options.probe)))
        for seed in options.seeds if one.seeds is None else one.seeds:
            config = configure(one.network, data, seed=seed, precision=precision, **one.options)
            usual = default_recipe(data, options.iterations, config.network.depth)
            recipe = _recipe(one, usual, changes, check=not later)
            config = dataclasses.replace(config, data=options.data, recipe=recipe)
            labels = dict(one.labels) | {"seed": seed}
            if any(labels == other for other, _ in jobs):  # it would count as one more seed
                raise UsageError(f"the network of {_told(one.labels)} is asked for twice; name it once")
            other = known.setdefault(config.key, labels)
            if other is not labels and not later:
                raise UsageError(
                    f"{_told(labels)} and {_told(other)} are one and the same run, which says nothing of a difference"
                )
            jobs.append((labels, Job(config, probes, built, options.recompute, options.step)))
    if jobs and not later:
        _check_changes([job.config.recipe for _, job in jobs], changes)
    return jobs


_COLUMNS = frozenset(
    (
        *("seed", "network", "run", "parameters", "train_images", "test_images", "validation_images"),
        *("train_error", "train_loss", "train_error_single_view", "validation_error"),
        *("test_error", "test_loss", "test_error_running"),
        *("iteration", "iterations", "epoch", "learning_rate", "seconds", "images_per_second"),
    )
)
"""Columns that results and histories have in any case."""


def _check_planned(one: Planned) -> None:
    if taken := sorted(_COLUMNS.intersection(one.labels)):
        raise UsageError(f"label (={taken[0]!r}) is the name of a column that every study has; call it something else")
    if one.recipe is not None and not callable(one.recipe):
        raise UsageError(
            f"recipe (={short(one.recipe)}) of a Planned must be a function of the usual recipe, such as "
            "lambda usual: dataclasses.replace(usual, learning_rate=0.05)"
        )


def _told(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in labels.items())


def _recipe(one: Planned, usual: Recipe, changes: Mapping[str, Any], *, check: bool) -> Recipe:
    """The recipe of a planned network: the usual one, changed as the user says, then as the study needs it."""
    changed = dataclasses.replace(usual, **changes)
    if one.recipe is None:
        return changed
    unchanged, recipe = one.recipe(usual), one.recipe(changed)
    for name, value in changes.items() if check else ():
        # What the study makes of it may be another value (a schedule three times as long), but not the usual one.
        if value != getattr(recipe, name) == getattr(unchanged, name) and value != getattr(usual, name):
            raise UsageError(
                f"recipe (='{name}={value}') cannot be changed here: {name} is what the study compares or sets itself"
            )
    return recipe


def _check_changes(recipes: Sequence[Recipe], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if all(name in recipe.unread() for recipe in recipes):
            raise UsageError(f"recipe (='{name}={value}') does nothing with {recipes[0].unread()[name]}")
        if name == "milestones" and all(max(recipe.milestones, default=0) >= recipe.iterations for recipe in recipes):
            raise UsageError(
                f"recipe (='{name}={value}'): the training ends after {recipes[0].iterations:,} iterations"
            )


def check_networks(jobs: Sequence[Job]) -> None:
    """Builds every network once, so that a depth that is not there or a block that does not fit is found beforehand."""
    for spec in sorted({job.config.network for job in jobs}, key=lambda spec: (spec.depth or 0, spec.family)):
        build(spec)


def doubts(study: Study, options: Options, plugins: Mapping[str, str]) -> Iterator[str]:
    """What makes sense, but may not be what was meant. `plugins`: where they are, and the modules they are."""
    yield from _not_asked_for(options, plugins)
    for reason in study.leaves_open(options) if study.leaves_open else ():
        yield f"{reason}: a claim will be 'not tested'"
    if len(options.seeds) == 1 < len(study.presets[options.preset].seeds):
        yield f"one seed only (--seeds {options.seeds[0]}): without a spread, comparisons over seeds will be 'inconclusive'"


def _not_asked_for(options: Options, plugins: Mapping[str, str]) -> Iterator[str]:
    asked = {options.data_name}
    given = (value if isinstance(value, tuple) else (value,) for value in vars(options).values())
    asked.update(part for word in itertools.chain(*given) for part in str(word).split(":"))
    for plugin, module in plugins.items():
        there = [
            (registry.kind, name)
            for registry in (BLOCKS, SHORTCUTS, PROBES, DATASETS)
            for name in registry.names_of(module)
        ]
        flags = [f"--{kind} {name}" for kind, name in there if kind in offered(type(options))]
        if flags and asked.isdisjoint(name for _, name in there):
            yield f"nothing is asked for of what {plugin} registers ({', '.join(flags)})"


def replaced_report(study: Study, options: Options) -> Iterator[str]:
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


def left_without(failed: frozenset[str], options: Options, labelled: Sequence[tuple[Labels, Job]]) -> str:
    """How to have the report of what did not fail: the seeds, or else the depths, of which no run has."""
    for name, label in (("seeds", "seed"), ("depths", "depth")):
        ended = {labels.get(label) for labels, job in labelled if job.config.key in failed}
        values = getattr(options, name)
        left = [str(value) for value in values if value not in ended]
        if 0 < len(left) < len(values) and name in offered(type(options)):
            return f", or reports without the failed ones with --{name} {' '.join(left)}"
    return ""
