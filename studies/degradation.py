"""Degradation: deeper plain networks have higher training error; deeper residual networks do not.

Claims C1 and C2 (§1, §4.2; Fig. 1, Fig. 6 left and middle, Table 6).

    python -m studies.degradation                                    # embedded digits, a few minutes on two cores
    python -m studies.degradation --preset paper --data cifar10      # the paper's recipe, for a GPU
    python -m studies.degradation --plugin my_block.py --block my-block

The paper trains plain and residual networks of 6n+2 layers on CIFAR-10, for 64k iterations. Plain networks' training
error grows with depth (the 110-layer one's is over 60 %), so this is not overfitting; the residual networks' test
errors fall from 8.75 % at 20 layers to 6.43 % at 110. What would refute it stands with the claims below.

Measured (2026-11-21 and -22, two cores of an AMD EPYC, torch 2.15.0, bf16; records in docs/measurements/):
- quick, digits, n = 3, 2.0 minutes in all (2026-11-27, torch 2.14.1): training error of plain-20/32/44/56 0.03 ± 0.03,
  4.97 ± 7.05, 35.90 ± 25.50, 83.30 ± 5.21 %, of their residual twins 0.00 ± 0.00 % at every depth. C1 holds; C2 is not
  tested, digits leaving nothing to gain;
- CIFAR-10, schedule scaled to 2,000 iterations, n = 3: training error of plain-20/56 27.55 ± 1.67, 71.46 ± 3.18 %, of
  ResNet-20/56 25.45 ± 2.52, 43.61 ± 1.27 %. C1 holds; C2 fails, after a thirty-second part of the training;
- the same with 8,000 iterations, n = 3 (2026-11-28, torch 2.14.1): 12.17 ± 0.62, 53.87 ± 2.54 %, and 10.29 ± 0.25,
  14.78 ± 1.66 %; test error of ResNet-20/56 12.66 ± 0.32, 17.31 ± 1.47 %. C1 holds; C2 fails, after an eighth of it;
- CIFAR-10, the paper's 64,000 iterations, n = 1 (2026-11-27, torch 2.14.1): test error of ResNet-20 8.61 %, the paper 8.75 %; of
  plain-20 9.08 %. Half the schedule, n = 1: 9.14 % (2026-11-25) and 10.44 % (2026-11-27);
- the rest of the paper preset: not tested.
"""

from __future__ import annotations

import itertools
from statistics import fmean
from typing import TYPE_CHECKING

import resprobe as rp
from resprobe.claims import NO_GAIN_FROM_DEPTH, one_depth
from resprobe.tables import effort_columns, error_columns, network_name, size_column

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas

KINDS = ("plain", "residual")
PAPER_TEST_ERROR = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61}
"""Residual networks on CIFAR-10, Table 6. At 110 layers: the mean of five runs; the best of them is the 6.43 of the text."""
OTHERS = {
    "Maxout": ("–", 9.38),
    "NIN": ("–", 8.81),
    "DSN": ("–", 8.22),
    "FitNet-19": ("2.5 M", 8.39),
    "Highway-19": ("2.3 M", 7.72),
    "Highway-32": ("1.25 M", 8.80),
}
"""Parameters and test errors of other methods' networks on CIFAR-10, as Table 6 quotes them. For Highway-19: the mean
of several runs; the best of them is 7.54."""

DRAWN = 56
"""Layers of the deepest plain network in Fig. 6, of which C1 speaks; the 110-layer one's error is told beside it."""

DEEPER_PLAIN_IS_WORSE = rp.Claim(
    id="C1",
    statement="Deeper plain networks have higher training error",
    section="§1, §4.2; Fig. 1, Fig. 6 left",
    paper="training and test error of plain-20 < 32 < 44 < 56; plain-110 over 60 %",
    falsifier=f"the training error of the deepest plain network, up to {DRAWN} layers, is not above the shallowest's",
)
RESIDUAL_GAINS = rp.Claim(
    id="C2",
    statement="Residual networks gain accuracy from depth",
    section="§4.2; Fig. 6 middle, Table 6",
    paper="test error 8.75 → 7.51 → 7.17 → 6.97 → 6.43 % at 20, 32, 44, 56, 110 layers (of 110 the best of "
    "five; compared is their mean, 6.61)",
    falsifier=f"the test error of the residual network of {DRAWN} layers, or of the deepest, is not below the shallowest's, "
    "(not judged where the shallowest fits every training image and the deeper nearly all)",
)


def plan(options: rp.Options) -> list[rp.Planned]:
    """At every depth the plain network and its residual twin: the same layers, with shortcuts."""
    planned = []
    for depth in options.depths:
        plain = {"block": options.block}
        residual = plain | {"shortcut": options.shortcut}
        planned.append(rp.Planned({"kind": "plain", "depth": depth}, f"cifar/plain-{depth}", plain))
        planned.append(rp.Planned({"kind": "residual", "depth": depth}, f"cifar/resnet-{depth}", residual))
    return planned


def judge(results: rp.Results) -> list[rp.Verdict]:
    every = sorted(results.options.depths)
    shallow, deep = every[0], every[-1]
    if shallow == deep:
        return one_depth(DEEPER_PLAIN_IS_WORSE, RESIDUAL_GAINS)

    def path(kind: str, column: str) -> str:
        means = (rp.mean_std(results.values(column, kind=kind, depth=depth)) for depth in every)
        return " → ".join(means) + " %"

    def compare(kind: str, column: str, *, higher: int, lower: int) -> rp.Comparison:
        return rp.compare(
            results.values(column, kind=kind, depth=higher), results.values(column, kind=kind, depth=lower)
        )

    def trained(kind: str) -> list[list[float]]:
        return [results.values("train_error", kind=kind, depth=depth) for depth in every]

    def unfitted(depth: int) -> list[float]:
        return results.values("train_error_single_view", kind="residual", depth=depth)

    depths = ", ".join(map(str, every))
    deep_plain = _deep_plain(every)
    rise = compare("plain", "train_error", higher=deep_plain, lower=shallow)
    test_rise = compare("plain", "test_error", higher=deep_plain, lower=shallow)
    residual_rise = compare("residual", "train_error", higher=deep_plain, lower=shallow)
    falls = {
        depth: compare("residual", "test_error", higher=shallow, lower=depth)
        for depth in every[1:]
        if depth in (DRAWN, deep)
    }
    words, reasons = zip(*(fall.gain(unfitted(shallow), unfitted(depth)) for depth, fall in falls.items()), strict=True)
    evidence = list(dict.fromkeys(filter(None, reasons)))
    evidence += [f"test error, ResNet-{shallow} against ResNet-{depth}: {fall}" for depth, fall in falls.items()]
    if study.beside_paper(results.options) and (printed := [depth for depth in every if depth in PAPER_TEST_ERROR]):
        errors = {depth: results.values("test_error", kind="residual", depth=depth) for depth in printed}
        near = sum(abs(fmean(each) - PAPER_TEST_ERROR[depth]) <= rp.band(each) for depth, each in errors.items())
        evidence.append(f"{near} of {len(errors)} test errors are within max(0.5 points, 2 std) of Table 6's")
    plain = rp.Verdict(
        DEEPER_PLAIN_IS_WORSE,
        rise.verdict,
        f"training error of plain networks {path('plain', 'train_error')} at {depths} layers",
        f"training error, plain-{deep_plain} against plain-{shallow}: {rise}. Test error: {test_rise}. "
        f"The residual twins' training error: {path('residual', 'train_error')} ({residual_rise})",
    )
    residual = rp.Verdict(
        RESIDUAL_GAINS,
        rp.all_of(words),
        f"test error of residual networks {path('residual', 'test_error')} at {depths} layers",
        ". ".join(evidence),
    )
    return [
        rp.if_learned(plain, *trained("plain"), opposite=rise.reversed),
        rp.if_learned(residual, *trained("residual"), opposite=any(fall.reversed for fall in falls.values())),
    ]


def _deep_plain(depths: Sequence[int]) -> int:
    """Layers of the plain network that is compared with the shallowest."""
    return max(set(depths) - set(_beyond_fig_6(depths)))


def _beyond_fig_6(depths: Sequence[int]) -> list[int]:
    """Depths beyond the plain networks that Fig. 6 shows, if at least two are not beyond them."""
    beyond = [depth for depth in depths if depth > DRAWN]
    return beyond if len(depths) - len(beyond) > 1 else []


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    options, histories = results.options, results.histories
    over = results.over_seeds(band=True)
    on, beyond = options.data_name, _beyond_fig_6(options.depths)
    top = rp.figures.error_limit(histories[~histories["depth"].isin(beyond)])
    at_the_edge = "; what ends beyond the axis, as Fig. 6's plain-110, is named at its edge" if beyond else ""

    parts = {f"{kind} networks": histories[histories["kind"] == kind] for kind in KINDS}
    drawings = {
        "figure": rp.Drawing(
            rp.figures.curves_beside(parts, "depth", top=top, label="{} layers"),
            f"Training on {on}, in the manner of Fig. 6: plain networks (left) and residual networks (right) of each "
            f"depth; {over}. Dashed: training error; bold: test error{at_the_edge}.",
            "Error over iterations, one line a depth. " + _final_errors_said(results.table),
        )
    }

    drawings["figure-depth"] = rp.Drawing(
        rp.figures.errors_against_depth(results.table, top=top if beyond else None),
        f"Error after the last iteration against depth on {on}: mean ± std over seeds, a dot for each run{at_the_edge}.",
        "Final error against depth for plain and residual networks. " + _final_errors_said(results.table),
    )

    extremes = [min(options.depths), _deep_plain(options.depths)]
    if extremes[0] == extremes[1]:  # none is the deeper one
        return drawings
    chosen, ends = (
        each[(each["kind"] == "plain") & each["depth"].isin(extremes)] for each in (histories, results.table)
    )
    drawings["figure-1"] = rp.Drawing(
        rp.figures.curves_apart(chosen, "depth", top=top, label="{} layers"),
        f"Plain networks of {extremes[0]} and {extremes[1]} layers on {on}, in the manner of Fig. 1: the deeper one is to be "
        f"worse on the training set (left) and so on the test set (right); {over}.",
        f"Error over iterations of the plain networks of {extremes[0]} and {extremes[1]} layers. "
        + _final_errors_said(ends),
    )
    return drawings


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """One row a network, in the manner of Table 6; on CIFAR-10 also the other methods that it quotes."""
    import pandas

    rows = []
    on_cifar10 = results.options.data_name == "cifar10"
    for kind, depth in itertools.product(KINDS, sorted(results.options.depths)):
        own = {"kind": kind, "depth": depth}
        of_the_paper = kind == "residual" and not study.built_of(results.options)
        paper = PAPER_TEST_ERROR.get(depth) if of_the_paper else None
        away = study.from_paper(results.options, results.values("test_error", **own), paper) if paper else ""
        note = away or ("" if on_cifar10 else " (CIFAR-10)")
        beside = f"{paper:.2f}{note}" if paper else "not printed" if kind == "plain" else "–"
        rows.append(
            {
                "network": network_name(kind, depth),
                **size_column(results, **own),
                **error_columns(results, **own),
                "paper's test error (%)": beside,
                **effort_columns(results, **own),
            }
        )
    table = pandas.DataFrame(rows)
    quoted = [
        dict.fromkeys(table, "–")
        | {"network": f"{name} (quoted)", "parameters": size, "paper's test error (%)": f"{error:.2f}"}
        for name, (size, error) in OTHERS.items()
    ]
    return pandas.concat([table, pandas.DataFrame(quoted)], ignore_index=True) if on_cifar10 else table


def _final_errors_said(table: pandas.DataFrame) -> str:
    """Final training errors, for those who cannot see a figure."""
    errors = table.groupby(["kind", "depth"])["train_error"].mean()
    said = [f"{kind} {depth} layers {error:.1f} %" for (kind, depth), error in errors.items()]
    return "Mean final training error: " + ", ".join(said) + "."


study = rp.Study(
    name="degradation",
    title="Deeper plain networks degrade; residual networks do not",
    description=(
        "Trains plain networks and their residual twins over depth and compares training and test error "
        "(claims C1 and C2; §4.2, Fig. 1 and 6, Table 6)."
    ),
    claims=(DEEPER_PLAIN_IS_WORSE, RESIDUAL_GAINS),
    presets=rp.cifar_presets(
        rp.Options(preset="quick", data="digits", depths=(20, 32, 44, 56), seeds=(0, 1, 2), iterations=400),
        depths=(20, 32, 44, 56, 110),
    ),
    plan=plan,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    leaves_open=rp.lacks_depths,
    rules=NO_GAIN_FROM_DEPTH,
)

if __name__ == "__main__":
    raise SystemExit(study.main())
