"""Longer training: three times the iterations do not cure degradation.

Claim C7 (§4.1, footnote 3).

    python -m studies.longer_training                                    # embedded digits, minutes on two cores
    python -m studies.longer_training --times 10                         # ten times the iterations
    python -m studies.longer_training --preset paper --data cifar10      # the paper's recipe, for a GPU

Footnote 3: "We have experimented with more training iterations (3×) and still observed the degradation problem,
suggesting that this problem cannot be feasibly addressed by simply using more iterations." The paper's networks there
are plain-18 and plain-34 on ImageNet, and it prints no numbers; the analogue is plain-20 and plain-56 of §4.2. Each is
trained as usual and with the whole schedule stretched, divisions of the learning rate included.

What would refute it: the deeper network's training error after three times the iterations is no longer above the
shallower one's, neither after the usual number nor after as many. If it is above the second alone, the two readings of "still
observed" disagree, and the claim is inconclusive. Where the deeper network is not worse to begin with there is nothing to cure,
and the claim is not tested.

Measured (2026-11-21, two cores of an AMD EPYC, torch 2.15.0, bf16, n = 3; record in
docs/measurements/2026-11-21-longer-training-quick):
- quick, digits, 400 → 1,200 iterations: training error of plain-20 0.03 ± 0.03 → 0.02 ± 0.03 %, of plain-56
  83.30 ± 5.21 → 43.61 ± 6.31 %. C7 holds;
- the paper preset: not tested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import tyro

import resprobe as rp
from resprobe.claims import one_depth
from resprobe.tables import effort_columns, error_columns

if TYPE_CHECKING:
    import pandas

    from resprobe.recipes import Recipe

LONGER_DOES_NOT_CURE = rp.Claim(
    id="C7",
    statement="More training iterations do not cure the degradation of plain networks",
    section="§4.1, footnote 3",
    paper="“more training iterations (3×) and still observed the degradation problem” (ImageNet; no numbers)",
    falsifier="the deeper plain network, trained longer, no longer has a higher training error than the shallower one, neither "
    "than that trained as usual nor than that trained as long, over seeds",
)


@dataclass(frozen=True)
class Options(rp.Options):
    """Plain networks of two or more depths, trained as usual and longer."""

    times: int = 3
    """how many times the usual iterations the longer training has"""
    shortcut: tyro.conf.Suppress[str] = "none"


def longer(recipe: Recipe, times: int) -> Recipe:
    """The whole schedule stretched."""
    return replace(recipe.with_iterations(times * recipe.iterations), name=f"{recipe.name}, {times} times as long")


def plan(options: Options) -> list[rp.Planned]:
    rp.check_whole("times", options.times, 2)
    recipes = {1: None, options.times: partial(longer, times=options.times)}
    return [
        rp.Planned({"depth": depth, "times": times}, f"cifar/plain-{depth}", {"block": options.block}, recipe=recipe)
        for times, recipe in recipes.items()
        for depth in options.depths
    ]


def judge(results: rp.Results) -> list[rp.Verdict]:
    times = results.options.times
    shallow, deep = min(results.options.depths), max(results.options.depths)
    if shallow == deep:
        return one_depth(LONGER_DOES_NOT_CURE)

    def errors(depth: int, times: int, column: str = "train_error") -> list[float]:
        return results.values(column, depth=depth, times=times)

    def path(depth: int) -> str:
        return f"plain-{depth} {rp.mean_std(errors(depth, 1))} → {rp.mean_std(errors(depth, times))} %"

    degraded = rp.compare(errors(deep, 1), errors(shallow, 1))
    still = rp.compare(errors(deep, times), errors(shallow, 1))
    alike = rp.compare(errors(deep, times), errors(shallow, times))
    gained = rp.compare(errors(deep, 1), errors(deep, times))
    tested = rp.compare(errors(deep, times, "test_error"), errors(shallow, 1, "test_error"))
    word = still.verdict
    if degraded.verdict != "holds":
        word = "not tested" if degraded.verdict == "fails" else "inconclusive"
    elif word == "fails" and alike.verdict != "fails":
        word = "inconclusive"
    return [
        rp.Verdict(
            LONGER_DOES_NOT_CURE,
            word,
            f"training error at 1× → {times}× the iterations: {path(shallow)}, {path(deep)}",
            f"training error, plain-{deep} after {times}× against plain-{shallow} after 1×: {still}. "
            f"Both after {times}×: {alike}. "
            f"Both after 1×, the degradation that is to be cured: {degraded}. What plain-{deep} gains from {times}×: {gained}. "
            f"Test error, {times}× against 1×: {tested}",
        )
    ]


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    options, histories = results.options, results.histories
    parts = {}
    for factor in (1, options.times):
        trained = histories[histories["times"] == factor]
        parts[f"{factor}×: {trained['iteration'].max():,} iterations"] = trained
    top = max(rp.figures.error_limit(trained) for _, trained in histories.groupby("times"))
    means = results.table.groupby(["depth", "times"])["train_error"].mean()
    said = ", ".join(f"{depth} layers at {factor}× {error:.1f} %" for (depth, factor), error in means.items())
    over = results.over_seeds()
    return {
        "figure": rp.Drawing(
            rp.figures.curves_beside(parts, "depth", top=top, label="{} layers"),
            f"Plain networks on {options.data_name}, trained as usual (left) and with the whole schedule "
            f"stretched {options.times} times (right); {over}. Dashed: training error; bold: test error.",
            f"Error over iterations, one line a depth. Mean final training error: {said}.",
        )
    }


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """One row a network and training."""
    import pandas

    return pandas.DataFrame(
        {
            "network": f"plain-{depth}",
            "trained": f"{times}×",
            "iterations": f"{group['iterations'].iloc[0]:,.0f}",
            **error_columns(results, depth=depth, times=times),
            "paper": "not printed",
            **effort_columns(results, depth=depth, times=times),
        }
        for (depth, times), group in results.table.groupby(["depth", "times"])
    )


_QUICK = Options(preset="quick", data="digits", depths=(20, 56), seeds=(0, 1, 2), iterations=400)

study = rp.Study(
    name="longer_training",
    title="Longer training does not cure degradation",
    description=(
        "Trains plain networks as usual and with the whole schedule stretched, and compares training errors (claim C7; "
        "§4.1, footnote 3)."
    ),
    claims=(LONGER_DOES_NOT_CURE,),
    presets=rp.cifar_presets(_QUICK),
    plan=plan,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    leaves_open=rp.lacks_depths,
    rules="C7 holds if the deeper network, trained longer, has a higher training error than the shallower one trained as usual. "
    "It fails if a rise of the margin is excluded there, and also between the two after trainings of that length; if it is "
    "excluded there alone, C7 is inconclusive. Without degradation after the usual training it is not tested.",
)

if __name__ == "__main__":
    raise SystemExit(study.main())
