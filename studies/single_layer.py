"""Single layer: a residual function of one layer, y = W₁x + x, brings no advantage over a plain layer.

Claim C21 (§3.2).

    python -m studies.single_layer                                  # embedded digits, minutes on two cores
    python -m studies.single_layer --seeds 0 1 2 3 4 5 6 7          # a closer look at small differences
    python -m studies.single_layer --preset paper --data cifar10    # the paper's recipe, for a GPU

The paper calls the single-layer case, y = W₁x + x, similar to a linear layer and saw no advantage of it. It prints no
numbers, and says neither for which depth nor whether the ReLU that follows every addition of its blocks follows this one
too; with it, y = max(0, W₁x + x) is not linear. Both forms are trained: `single` has the ReLU and is what the verdict
rests on; `single-linear` has none. Two-layer blocks (`basic`) stand beside them as a control, where the depth is theirs
too: that one layer has no advantage says little where two have none.

A claim of no advantage turns the test round. Is the plain network's test error above the residual one's? If it is, the
claim fails; if an advantage of 0.5 points or more is excluded, where two layers certainly have one, it holds; else it is
inconclusive. The verdict is on the shallowest networks, by default of ResNet-20's size. Deeper ones are shown as beyond the
claim: there shortcuts also ease optimization, which is another matter (§4.1).

Measured (2026-11-27, two cores of an AMD EPYC, torch 2.14.1, bf16; record in docs/measurements/):
- quick, digits, n = 3: test error at 20 layers 2.13 ± 0.58 (plain) and 2.04 ± 0.64 % (residual) with the ReLU, 1.57 ± 0.80
  and 1.85 ± 0.58 % without. C21 is inconclusive: three seeds leave open up to 1.16 points, and two-layer blocks show no
  advantage either. At 56 layers a shortcut around each single layer undoes most of the degradation: 83.80 ± 3.34 (plain)
  against 6.67 ± 2.41 %;
- the paper preset: not tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

import resprobe as rp
from resprobe.tables import effort_columns, error_columns, network_name, size_column

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

BLOCKS = {"single": "one layer, then ReLU", "single-linear": "one layer, no ReLU", "basic": "two layers (control)"}
KINDS = ("plain", "residual")

NO_ADVANTAGE = rp.Claim(
    id="C21",
    statement="A shortcut around a single layer brings no advantage",
    section="§3.2",
    paper="no number: y = W₁x + x is similar to a linear layer, and no advantage was observed",
    falsifier="the residual network of single-layer blocks has a lower test error than its plain twin, over seeds",
)
_TURNED = {"holds": "fails", "fails": "holds", "inconclusive": "inconclusive"}
"""What the test of an advantage says of a claim that there is none."""


@dataclass(frozen=True)
class Options(rp.Options):
    """The blocks are the study's own."""

    block: tyro.conf.Suppress[str] = "single"


def plan(options: Options) -> list[rp.Planned]:
    """At every depth a plain and a residual network of each block; two-layer blocks need a depth of 6n+2."""
    planned = []
    for block in BLOCKS:
        for depth in options.depths:
            if block == "basic" and (depth < 8 or (depth - 2) % 6):
                continue
            labels, plain = {"block": block, "depth": depth}, {"block": block}
            residual = plain | {"shortcut": options.shortcut}
            planned.append(rp.Planned(labels | {"kind": "plain"}, f"cifar/plain-{depth}", plain))
            planned.append(rp.Planned(labels | {"kind": "residual"}, f"cifar/resnet-{depth}", residual))
    return planned


def judge(results: rp.Results) -> list[rp.Verdict]:
    claimed = min(results.options.depths)
    advantage = _advantage(results, "single", claimed)
    errors = ", ".join(f"{kind} {_error(results, 'single', kind, claimed)} %" for kind in KINDS)
    word, evidence = _TURNED[advantage.verdict], []
    if word == "holds":
        control = "basic" in _blocks(results, claimed) and _advantage(results, "basic", claimed).verdict == "holds"
        if not control:
            word = "inconclusive"
            evidence.append(
                "where two-layer blocks have no certain advantage, that single layers have none says nothing"
            )
    evidence += [
        f"test error, plain less residual: {advantage}",
        f"training error: {_advantage(results, 'single', claimed, 'train_error').difference:+.2f} points",
    ]
    for depth in sorted(results.options.depths):
        beyond = "" if depth == claimed else " (beyond the claim)"
        for block in _blocks(results, depth):
            if (block, depth) != ("single", claimed):
                found = _advantage(results, block, depth)
                evidence.append(f"{BLOCKS[block]}, {depth} layers{beyond}: {found}")
    return [
        rp.Verdict(
            NO_ADVANTAGE,
            word,
            f"test error of {claimed}-layer networks of single-layer blocks: {errors}",
            "; ".join(evidence),
        )
    ]


def _blocks(results: rp.Results, depth: int) -> list[str]:
    there = set(results.table.loc[results.table["depth"] == depth, "block"])
    return [block for block in BLOCKS if block in there]


def _advantage(results: rp.Results, block: str, depth: int, column: str = "test_error") -> rp.Comparison:
    """Whether the plain network's error is above the residual one's."""
    return rp.compare(*(results.values(column, block=block, kind=kind, depth=depth) for kind in KINDS))


def _error(results: rp.Results, block: str, kind: str, depth: int) -> str:
    return rp.mean_std(results.values("test_error", block=block, kind=kind, depth=depth))


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    on, claimed = results.options.data_name, min(results.options.depths)
    drawings = {
        "figure": rp.Drawing(
            _draw_claimed(results, claimed),
            f"Test error of {claimed}-layer networks on {on}, plain and residual, by block: mean ± std over seeds, a dot "
            "for each run. The verdict rests on the first pair.",
            "Mean final test error: "
            + ", ".join(
                f"{BLOCKS[block]}, {kind} {_error(results, block, kind, claimed)} %"
                for block in _blocks(results, claimed)
                for kind in KINDS
            ),
        )
    }
    blocks = list(dict.fromkeys(results.table["block"]))
    for name, column, title in (("figure-depth", "test_error", "test"), ("figure-train", "train_error", "training")):
        figure, panels = rp.figures.new_figure(len(blocks), width=4.4)
        for axis, block in zip(panels, blocks, strict=True):
            rp.figures.error_against_depth(axis, results.table[results.table["block"] == block], column)
            axis.set_title(BLOCKS[block])
        panels[0].set_ylabel(f"{title} error (%)")
        means = results.table.groupby(["block", "kind", "depth"], sort=False)[column].mean()
        said = ", ".join(
            f"{kind} {block} {depth} layers {error:.2f} %" for (block, kind, depth), error in means.items()
        )
        drawings[name] = rp.Drawing(
            figure,
            f"Final {title} error against depth on {on}, by block: mean ± std over seeds, a dot for each run. Depths above "
            f"{claimed} layers are beyond the claim.",
            f"Mean final {title} error: {said}.",
        )
    return drawings


def _draw_claimed(results: rp.Results, depth: int) -> Figure:
    """Plain and residual side by side for each block, on a scale on which their difference shows."""
    blocks, palette = _blocks(results, depth), rp.figures.colours(KINDS)
    table = results.table[results.table["depth"] == depth]
    figure, (axis,) = rp.figures.new_figure(1, width=6.6)
    for kind, marker, shift in zip(KINDS, "os", (-0.12, 0.12), strict=True):
        rows = table[table["kind"] == kind]
        places = rows["block"].map(blocks.index) + shift
        style = {"ls": "", "marker": marker, "ms": 8, "capsize": 4, "color": palette[kind], "label": kind}
        rp.figures.mean_and_bars(axis, rows["test_error"], places, **style)
        axis.plot(places + 0.06, rows["test_error"], ls="", marker=".", color="0.35")
    axis.set_xticks(range(len(blocks)), [BLOCKS[block] for block in blocks])
    axis.set_xlim(-0.5, len(blocks) - 0.5)
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the key above the marks
    axis.set_xlabel("block")
    axis.set_ylabel("test error (%)")
    axis.legend(frameon=False, loc="upper right", ncols=2)
    return figure


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """One row a network; the paper prints no number to put beside them."""
    import pandas

    networks = results.table[["block", "depth", "kind"]].drop_duplicates().to_dict("records")
    return pandas.DataFrame(
        {
            "block": BLOCKS[own["block"]],
            "network": network_name(own["kind"], own["depth"]),
            **size_column(results, **own),
            **error_columns(results, **own),
            "paper": "not printed",
            **effort_columns(results, **own),
        }
        for own in networks
    )


_QUICK = Options(preset="quick", data="digits", depths=(20, 56), seeds=(0, 1, 2), iterations=400)

study = rp.Study(
    name="single_layer",
    title="A shortcut around a single layer brings no advantage",
    description=(
        "Trains plain and residual networks of single-layer blocks, with and without the ReLU after the addition "
        "(claim C21; §3.2)."
    ),
    claims=(NO_ADVANTAGE,),
    presets=rp.cifar_presets(_QUICK),
    plan=plan,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    rules="C21 claims no advantage, so the test is turned round: it holds if an advantage of the margin or more is excluded, "
    "while two-layer blocks of that depth certainly have one; it fails if single layers certainly have one.",
)

if __name__ == "__main__":
    raise SystemExit(study.main())
