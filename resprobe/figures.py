"""Figures in one style: the paper's line conventions (training dashed, test bold), labels on the lines, bands over seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import pandas
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PALETTE = "colorblind"
"""Distinguishable without colour vision; no figure uses colour as its only sign."""


def new_figure(
    panels: int = 1, *, width: float = 5.2, height: float = 4.2, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side. Made without pyplot, so that nothing is left open behind it."""
    with seaborn.axes_style("ticks"), seaborn.plotting_context("notebook"):
        figure = Figure(figsize=(width * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False, sharey=share_y)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
    return figure, list(axes)


def colours(names: Sequence[object]) -> dict[object, tuple[float, float, float]]:
    """One colour a name, in order."""
    return dict(zip(names, seaborn.color_palette(PALETTE, max(3, len(names))), strict=False))


_LINES = {"train_error": {"ls": (0, (4, 2)), "lw": 1.1}, "test_error": {"ls": "-", "lw": 2.4}}
"""The paper's convention: training dashed, test bold."""


def curves(
    axis: Axes,
    histories: pandas.DataFrame,
    by: str,
    *,
    top: float,
    columns: Sequence[str] = ("train_error", "test_error"),
    label: str = "{}",
) -> None:
    """Error over iterations, one colour a value of `by`: dashed training error, bold test error, mean ± std over seeds.

    `histories`: columns `by`, seed, iteration, train_error, test_error (percent), as `Results.histories` has them.
    `top` is the end of the error axis (see `error_limit`), one for all panels that are to be compared.
    """
    palette = colours(sorted(histories[by].unique()))
    ends = []
    for value, group in histories.groupby(by):
        for column in columns:
            seeds = group.dropna(subset=[column]).groupby("iteration")[column]
            mean, spread = seeds.mean(), seeds.std().fillna(0.0)
            axis.plot(mean.index, mean, color=palette[value], **_LINES[column])
            axis.fill_between(mean.index, mean - spread, mean + spread, color=palette[value], alpha=0.15, lw=0)
        ends.append((float(mean.iloc[-1]), label.format(value), palette[value]))
    axis.set_xlabel("iterations")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_ylim(0, top)
    label_ends(axis, ends)


def error_limit(histories: pandas.DataFrame) -> float:
    """The end of an error axis: what the last quarter of training needs, since every network begins near chance."""
    late = histories[histories["iteration"] >= 0.75 * histories["iteration"].max()]
    return min(100.0, max(20.0, 1.1 * float(late[["train_error", "test_error"]].max().max())))


def line_key(axis: Axes) -> None:
    """Says what dashed and bold mean; drawn in grey since it holds for every colour."""
    for column, text in (("train_error", "training error"), ("test_error", "test error")):
        axis.plot([], [], color="0.3", label=text, **_LINES[column])
    axis.legend(frameon=False, loc="upper right")


def label_ends(axis: Axes, ends: Sequence[tuple[float, str, tuple]]) -> None:
    """Writes each line's name at its right end, names moved apart where lines end close together."""
    low, high = axis.get_ylim()
    gap, placed = (high - low) * 0.055, -float("inf")
    ordered = sorted(ends, key=lambda end: end[0])
    positions = []
    for y, _, _ in ordered:
        placed = max(min(max(y, low), high), placed + gap)
        positions.append(placed)
    overflow = max(0.0, positions[-1] - high) if positions else 0.0
    for position, (_, text, colour) in zip(positions, ordered, strict=True):
        axis.annotate(
            text,
            (1, position - overflow),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=_dark(colour),
            fontsize=10,
            fontweight="bold",
        )


def error_against_depth(axis: Axes, table: pandas.DataFrame, column: str, *, by: str = "kind") -> None:
    """Final error over depth, one line a value of `by`, mean ± std over seeds with each seed as a dot."""
    palette, markers = colours(list(table[by].unique())), ["o", "s", "^", "D", "v", "P"]
    ends = []
    for (value, group), marker in zip(table.groupby(by, sort=False), markers, strict=False):
        seeds = group.groupby("depth")[column]
        mean, spread = seeds.mean(), seeds.std().fillna(0.0)
        axis.errorbar(mean.index, mean, yerr=spread, color=palette[value], marker=marker, capsize=3, lw=2)
        axis.plot(group["depth"], group[column], ls="", marker=".", ms=4, color=_dark(palette[value]), alpha=0.6)
        ends.append((float(mean.iloc[-1]), str(value), palette[value]))
    axis.set_xticks(sorted(table["depth"].unique()))
    axis.set_xlabel("depth (weighted layers)")
    axis.set_ylim(bottom=-0.02 * axis.get_ylim()[1])  # room for the marker of an error of 0
    label_ends(axis, ends)


def render(figure: Figure, kind: str) -> bytes:
    """The figure as "png" or "svg" bytes, the same for the same numbers."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "resprobe", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _dark(colour: tuple) -> tuple:
    """The colour, dark enough to be read as text on white."""
    return tuple(0.7 * channel for channel in colour[:3])
