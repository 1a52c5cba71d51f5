"""Figures in one style: the paper's line conventions (training dashed, test bold), labels on the lines, bands over seeds."""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import pandas
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

PALETTE = {
    "#016aa5": "#5186ba",
    "#cd8404": "#de8f05",
    "#029e73": "#74b498",
    "#9c4300": "#d6662a",
    "#cc78bc": "#e4c3dd",
    "#745135": "#ca9161",
    "#9b6b8d": "#a67296",
    "#224f68": "#66b8ea",
}
"""Each colour on white → its twin on a dark page. The hues are those of seaborn's palette "colorblind"; the luminances are
such that every line stands out from its page, and any two from each other in every kind of colour vision. Still no figure
uses colour as its only sign."""
LINE_CONTRAST, TEXT_CONTRAST = 3.0, 4.5
"""Least contrast of a line and of a text with the page (WCAG 2.2, 1.4.11 and 1.4.3, level AA)."""
DARK_PAGE = "#16181b"
"""The page that a dark figure is made for."""

Colour = tuple[float, float, float]


class Shown(Figure):
    """A figure that a notebook shows where a cell ends with it, also without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return for_notebook(self)


def for_notebook(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """The figure as PNG, and at which size a notebook is to show it, in pixels."""
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return render(figure, "png"), {"width": width, "height": height}


def new_figure(
    panels: int = 1, *, width: float = 5.2, height: float = 4.2, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side. Made without pyplot, so that nothing is left open behind it."""
    with seaborn.axes_style("ticks"), seaborn.plotting_context("notebook"):
        figure = Shown(figsize=(width * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False, sharey=share_y)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
    return figure, list(axes)


def colours(names: Sequence[object]) -> dict[object, Colour]:
    """One colour a name, in order; from the ninth on they come again."""
    return dict(zip(names, itertools.cycle(map(to_rgb, PALETTE)), strict=False))


# -- error over iterations, error over depth -------------------------------------------------------------------------

_LINES = {"train_error": {"ls": (0, (4, 2)), "lw": 1.1}, "test_error": {"ls": "-", "lw": 2.4}}
"""The paper's convention: training dashed, test bold."""
_ROUND = (1, 2, 2.5, 5, 10)
"""Steps between ticks, at any power of ten."""
_ROOM = 26
"""Letters of a line's name; those of a stranger's block may be many more."""


def mean_and_band(axis: Axes, values: pandas.Series, at: pandas.Series | pandas.Index, **style: Any) -> pandas.Series:
    """A line through the mean over seeds of the `values` that are `at` one place of the x axis, with a band of a standard
    deviation. `style` is the line's. Gives the mean."""
    mean, spread = _mean_and_std(values.groupby(at))
    axis.plot(mean.index, mean, **style)
    axis.fill_between(mean.index, mean - spread, mean + spread, color=style["color"], alpha=0.15, lw=0)
    return mean


def mean_and_bars(axis: Axes, values: pandas.Series, at: pandas.Series | pandas.Index, **style: Any) -> pandas.Series:
    """Marks at the means over seeds, grouped as by `mean_and_band`, with bars of a standard deviation. `style` is the marks'.
    Gives the mean."""
    mean, spread = _mean_and_std(values.groupby(at))
    axis.errorbar(mean.index, mean, yerr=spread, **({"capsize": 3, "lw": 2} | style))
    return mean


def _mean_and_std(seeds: Any) -> tuple[pandas.Series, pandas.Series]:
    """The mean of each group of seeds, and their standard deviation: 0 where there is one seed."""
    return seeds.mean(), seeds.std().fillna(0.0)


def curves(
    axis: Axes,
    histories: pandas.DataFrame,
    by: str,
    *,
    top: float,
    columns: Sequence[str] = ("train_error", "test_error"),
    label: str = "{}",
    order: Sequence[object] = (),
) -> None:
    """Error over iterations, one colour a value of `by` (in `order`, or ascending): dashed training error, bold test error,
    mean ± std over seeds.

    `histories`: columns `by`, seed, iteration, train_error, test_error (percent), as `Results.histories` has them.
    `top` is the end of the error axis (see `error_limit`), one for all panels that are to be compared.
    """
    palette = colours(order or sorted(histories[by].unique()))
    ends = []
    for value, group in histories.groupby(by):
        drawn = [column for column in columns if group[column].notna().any()]  # few tests may fall within a part
        for column in drawn:
            there = group.dropna(subset=[column])
            mean = mean_and_band(axis, there[column], there["iteration"], color=palette[value], **_LINES[column])
        if drawn:
            ends.append((float(mean.iloc[-1]), label.format(value), palette[value]))
    axis.set_xlabel("iterations")
    axis.set_xlim(0, histories["iteration"].max())  # lines end at the edge, where their names are
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_ROUND, integer=True))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_ylim(0, top)
    _error_ticks(axis)
    label_ends(axis, ends)


def curves_beside(
    parts: Mapping[str, pandas.DataFrame], by: str, *, top: float, tested: str = "test error", **chosen: Any
) -> Figure:
    """`curves` of several parts of the histories, a panel each, on one scale. `parts`: by the panels' titles. `tested`: what the
    key calls the test error. `chosen`: further arguments of `curves`."""
    figure, panels = new_figure(len(parts))
    for axis, (title, histories) in zip(panels, parts.items(), strict=True):
        curves(axis, histories, by, top=top, **chosen)
        axis.set_title(title)
    panels[0].set_ylabel("error (%)")
    line_key(panels[-1], tested)
    return figure


def curves_apart(histories: pandas.DataFrame, by: str, *, top: float, **chosen: Any) -> Figure:
    """Training error on the left and test error on the right, on one scale. `chosen`: further arguments of `curves`."""
    figure, panels = new_figure(2)
    for axis, column, title in zip(panels, ("train_error", "test_error"), ("training", "test"), strict=True):
        curves(axis, histories, by, top=top, columns=(column,), **chosen)
        axis.set_title(f"{title} error")
    panels[0].set_ylabel("error (%)")
    return figure


def error_limit(histories: pandas.DataFrame) -> float:
    """The end of an error axis: what the last quarter of training needs, since every network begins near chance."""
    late = histories[histories["iteration"] >= 0.75 * histories["iteration"].max()]
    return min(100.0, max(20.0, 1.1 * float(late[["train_error", "test_error"]].max().max())))


def line_key(axis: Axes, tested: str = "test error") -> None:
    """Says what dashed and bold mean; drawn in grey since it holds for every colour."""
    for column, text in (("train_error", "training error"), ("test_error", tested)):
        axis.plot([], [], color="0.3", label=text, **_LINES[column])
    axis.legend(frameon=False, loc="upper right")


def error_against_depth(
    axis: Axes, table: pandas.DataFrame, column: str, *, by: str = "kind", top: float | None = None
) -> None:
    """Final error over depth, one line a value of `by`, mean ± std over seeds with each seed as a dot beside it.

    `top` is the end of the error axis, where some errors are so much larger that they would hide how the others differ.
    """
    ends = _error_against(axis, "depth", table, column, by, top)
    axis.set_xticks(sorted(table["depth"].unique()))
    axis.set_xlabel("depth (weighted layers)")
    label_ends(axis, ends)


def errors_against_depth(table: pandas.DataFrame, *, top: float | None = None) -> Figure:
    """`error_against_depth` of plain and residual networks: training error on the left, test error on the right."""
    figure, panels = new_figure(2)
    for axis, column, title in zip(panels, ("train_error", "test_error"), ("training", "test"), strict=True):
        error_against_depth(axis, table, column, top=top)
        axis.set_title(f"final {title} error")
    panels[0].set_ylabel("error (%)")
    return figure


def error_against_cost(axis: Axes, table: pandas.DataFrame, column: str, *, by: str) -> None:
    """Final error over multiply-adds for one image (column `macs`), drawn as by `error_against_depth`. Where one line lies below
    another, it errs less for as much work."""
    table = table.assign(macs=table["macs"] / 1e6)
    _error_against(axis, "macs", table, column, by, None)
    axis.set_xlim(0, 1.08 * float(table["macs"].max()))  # the dots aside have room
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_ROUND))
    axis.set_xlabel("multiply-adds for one image (millions)")
    axis.legend(frameon=False)  # lines end where the network's cost does, far from the edge perhaps


def _error_against(
    axis: Axes, at: str, table: pandas.DataFrame, column: str, by: str, top: float | None
) -> list[tuple[float, str, Colour]]:
    """Draws a column of `table` over its column `at`, and gives where each line ends, its name and its colour."""
    palette, markers = colours(list(table[by].unique())), itertools.cycle("os^DvPX*")
    aside = axis.transData + ScaledTranslation(7 / 72, 0, axis.get_figure().dpi_scale_trans)
    ends = []
    for (value, group), marker in zip(table.groupby(by, sort=False), markers, strict=False):
        # By network: those of two depths may cost the same.
        networks, colour = group.groupby("depth"), palette[value]
        mean, spread = _mean_and_std(networks[column])
        style = {"color": colour, "marker": marker, "capsize": 3, "lw": 2, "elinewidth": 1.2}
        axis.errorbar(networks[at].first(), mean, yerr=spread, label=_shortened(value), **style)
        axis.plot(group[at], group[column], ls="", marker=".", ms=5, color=_text(colour), transform=aside)
        ends.append((float(mean.iloc[-1]), str(value), colour))
    # Over all panels that share the axis, since the next one's errors may be larger; room for the marker of an error of 0.
    axis.autoscale(axis="y")
    # Dots aside are not seen by autoscale.
    top = top or max(1.0, axis.get_ylim()[1], 1.04 * float(table[column].max()))
    axis.set_ylim(-0.02 * top, top)
    _error_ticks(axis)
    return ends


def _error_ticks(axis: Axes) -> None:
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_ROUND))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


# -- names at the ends of lines --------------------------------------------------------------------------------------


def label_ends(axis: Axes, ends: Sequence[tuple[float, str, Colour]]) -> None:
    """Writes each line's name at its right end, and with it the error of one that ends beyond the axis. Where lines end
    close together names are moved apart, and a thin line leads from each to its own. `ends`: where the line ends on the y
    axis, name, colour."""
    ordered = sorted(ends, key=lambda end: end[0])
    edge = axis.get_yaxis_transform()  # x as a fraction of the axis, y in data
    beside = edge + ScaledTranslation(14 / 72, 0, axis.get_figure().dpi_scale_trans)
    written: list[Annotation] = []

    def write(axis: Axes) -> None:
        while written:
            written.pop().remove()
        low, high = axis.get_ylim()
        gap = 0.065 * (high - low)
        shown = [min(max(y, low), high) for y, _, _ in ordered]
        for place, y, (end, text, colour) in zip(_apart(shown, gap, low, high), shown, ordered, strict=True):
            leader = {"arrowstyle": "-", "color": colour, "lw": 0.9, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 1}
            name = axis.annotate(
                f"{_shortened(text)} ↑ {end:.0f} %" if end > high else _shortened(text),
                (1, y),
                xycoords=edge,
                xytext=(1, place),
                textcoords=beside,
                va="center",
                color=_text(colour),
                fontsize=10,
                fontweight="bold",
                arrowprops=leader if abs(place - y) > 0.1 * gap else None,
            )
            written.append(name)

    write(axis)
    axis.callbacks.connect("ylim_changed", write)  # by another panel of the same scale, perhaps


def _shortened(name: object) -> str:
    """A name of any length as what a figure has room for."""
    text = str(name)
    return text if len(text) <= _ROOM else f"{text[: _ROOM - 1]}…"


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places moved by as little as makes them `gap` apart, within `low` and `high` where there is room."""
    groups: list[list[float]] = []

    def first(group: list[float]) -> float:
        reach = (len(group) - 1) * gap
        return max(low, min(sum(group) / len(group) - reach / 2, high - reach))

    for place in places:
        groups.append([place])
        while len(groups) > 1 and first(groups[-1]) - first(groups[-2]) < gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [first(group) + gap * index for group in groups for index in range(len(group))]


# -- files -----------------------------------------------------------------------------------------------------------


def render(figure: Figure, kind: str) -> bytes:
    """The figure as "png", "svg" or "pdf" bytes, the same for the same numbers."""
    return _save(figure, kind, "none", dpi=160)


def render_for_page(figure: Figure) -> tuple[bytes, bytes]:
    """The figure as SVG for a light and for a dark page: without a background, and looking alike whatever fonts there are."""
    light = _save(figure, "svg", "path", transparent=True)
    return light, for_dark_page(light)


def for_dark_page(svg: bytes) -> bytes:
    """A figure that was drawn for a white page, in colours that contrast as much with `DARK_PAGE`. Images in it stay."""

    def replace(match: re.Match[bytes]) -> bytes:
        return match[1] + _on_dark(match[2].decode()).encode()

    svg = re.sub(rb'((?:fill|stroke)(?:: |="))(#[0-9a-f]{6})', replace, svg)
    return svg.replace(b"<svg ", f'<svg fill="{_on_dark("#000000")}" '.encode(), 1)  # what has no colour is black


def _save(figure: Figure, kind: str, text: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    # Type 42 fonts: letters stay letters in a PDF, and publishers take them.
    with matplotlib.rc_context({"svg.hashsalt": "resprobe", "svg.fonttype": text, "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, metadata=undated.get(kind), **options)
    return buffer.getvalue()


# -- contrast --------------------------------------------------------------------------------------------------------


def contrast(one: str | Colour, other: str | Colour) -> float:
    """From 1 (the same) to 21 (black and white), as WCAG 2.2 defines it."""
    brighter, darker = sorted((_luminance(_linear(one)), _luminance(_linear(other))), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _text(colour: Colour) -> Colour:
    """The colour, made darker as far as text on white needs."""
    # A hundredth more than is asked for, since colours are rounded when they are written.
    linear, most = _linear(colour), 1.05 / (1.01 * TEXT_CONTRAST) - 0.05
    return _encoded([channel * min(1.0, most / max(_luminance(linear), most)) for channel in linear])


@functools.cache
def _twins() -> dict[str, str]:
    """A line and its name are of one colour on a dark page, where all of the palette can be read."""
    return PALETTE | {to_hex(_text(to_rgb(colour))): twin for colour, twin in PALETTE.items()}


def _on_dark(colour: str) -> str:
    """A colour for a dark page. One of the palette has its twin. Greys are turned round, so that they contrast as much with
    `DARK_PAGE` as with white. Other colours are made lighter where they need it for that."""
    if colour in _twins():
        return _twins()[colour]
    linear, page = _linear(colour), _luminance(_linear(DARK_PAGE))
    luminance = _luminance(linear)
    wanted = 1.05 / (luminance + 0.05) * (page + 0.05) - 0.05
    if max(to_rgb(colour)) - min(to_rgb(colour)) < 0.05:
        return to_hex(_encoded([min(wanted, 0.82)] * 3))  # a little under white, which glares
    share = max(0.0, (wanted - luminance) / (1 - luminance))  # of white
    return to_hex(_encoded([channel + min(share, 0.8) * (1 - channel) for channel in linear]))


def _luminance(linear: Sequence[float]) -> float:
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _linear(colour: str | Colour) -> list[float]:
    """Channels in proportion to light, from those of sRGB."""
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]


def _encoded(linear: Sequence[float]) -> Colour:
    red, green, blue = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear)
    return red, green, blue
