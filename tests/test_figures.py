"""Figures: the paper's lines, names that can be told apart from each other, and colours that everybody can see."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb

import resprobe as rp
from resprobe import figures
from resprobe.figures import DARK_PAGE, LINE_CONTRAST, PALETTE, TEXT_CONTRAST, contrast


def test_a_notebook_shows_figures_and_drawings_without_pyplot():
    figure, _ = figures.new_figure(2)
    for shown in figure, rp.Drawing(figure, "a caption", "a text"):
        picture, size = shown._repr_png_()
        assert picture == figures.render(figure, "png") and picture.startswith(b"\x89PNG")
        assert size == {"width": 1040, "height": 420}  # of 160 pixels an inch, for sharp screens


SEEN_BY = {
    "full colour vision": np.eye(3),
    # Machado, Oliveira, Fernandes (2009), severity 1; for linear RGB.
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of a colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(vision) @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    x, y, z = np.where(
        (ratio := to_xyz @ seen / [0.95047, 1, 1.08883]) > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == contrast("white", "black") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the grey that just fails as text
    assert contrast((0.5, 0.1, 0.2), (0.5, 0.1, 0.2)) == 1


@pytest.mark.parametrize("vision", SEEN_BY)
@pytest.mark.parametrize("page", ["white", "dark"])
def test_any_two_lines_can_be_told_apart_by_everybody(vision, page):
    palette = list(PALETTE if page == "white" else PALETTE.values())
    distances = {
        (one, other): float(np.linalg.norm(lab(one, SEEN_BY[vision]) - lab(other, SEEN_BY[vision])))
        for one, other in itertools.combinations(palette, 2)
    }
    closest = min(distances, key=distances.get)
    assert distances[closest] > 14, closest  # 2.3 is just noticeable


def test_lines_and_their_names_stand_out_from_either_page():
    for line, twin in PALETTE.items():
        name = to_hex(figures._text(to_rgb(line)))
        assert contrast(line, "white") >= LINE_CONTRAST
        assert contrast(name, "white") >= TEXT_CONTRAST
        assert contrast(twin, DARK_PAGE) >= TEXT_CONTRAST
        assert figures._on_dark(line) == figures._on_dark(name) == twin


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_every_other_colour_keeps_its_contrast_on_a_dark_page(channels):
    colour = to_hex([channel / 255 for channel in channels])
    on_dark = contrast(figures._on_dark(colour), DARK_PAGE)
    assert on_dark >= min(contrast(colour, "white") * 0.97, 10) or colour in figures._twins()


def test_white_becomes_the_dark_page():
    assert contrast(figures._on_dark("#ffffff"), DARK_PAGE) < 1.03


def test_nine_names_have_nine_colours_only_eight_of_them_different():
    found = figures.colours(range(9))
    assert len(set(found.values())) == 8
    assert found[8] == found[0]
    assert to_hex(found[0]) == next(iter(PALETTE))


# -- names at the ends of lines --------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=12).map(sorted))
def test_names_are_apart_in_order_and_on_the_axis(places):
    moved = figures._apart(places, 6.5, 0, 100)
    assert len(moved) == len(places)
    assert all(after - before > 6.5 - 1e-9 for before, after in itertools.pairwise(moved))
    assert moved[0] >= -1e-9 and moved[-1] <= 100 + 1e-9
    if all(after - before >= 6.5 for before, after in itertools.pairwise(places)):
        assert moved == pytest.approx(places)


def test_a_name_that_was_moved_is_led_to_its_line():
    figure, (axis,) = figures.new_figure()
    axis.set_ylim(0, 100)
    grey = (0.5, 0.5, 0.5)
    figures.label_ends(axis, [(50.0, "alone", grey), (1.0, "low", grey), (2.0, "crowded", grey)])
    led = {text.get_text(): text.arrow_patch is not None for text in axis.texts}
    assert led == {"low": True, "crowded": True, "alone": False}
    heights = [text.get_position()[1] for text in axis.texts]
    assert heights == sorted(heights)  # in the order of the lines


# -- curves ----------------------------------------------------------------------------------------------------------


def histories(**errors: list[float]) -> pandas.DataFrame:
    """Two seeds a value of `kind`, one point above and one below the errors given; test errors 5 points higher."""
    rows = []
    for kind, points in errors.items():
        for seed, shift in enumerate((-1, 1)):
            for step, error in enumerate(points, start=1):
                error += shift
                rows.append((kind, seed, 100 * step, error, error + 5 if step % 2 == 0 else float("nan")))
    return pandas.DataFrame(rows, columns=["kind", "seed", "iteration", "train_error", "test_error"])


def test_training_is_dashed_and_test_is_bold_and_both_end_at_the_edge():
    figure, (axis,) = figures.new_figure()
    figures.curves(axis, histories(plain=[60, 40, 30, 20]), "kind", top=70)
    training, test = axis.lines
    assert training.get_linestyle() == "--" and test.get_linestyle() == "-"
    assert test.get_linewidth() > 2 * training.get_linewidth()
    assert training.get_ydata().tolist() == [60, 40, 30, 20]
    assert test.get_ydata().tolist() == [45, 25]  # where it was evaluated
    assert axis.get_xlim() == (0, 400)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(60 + 2**0.5)  # of seeds at 59 and 61
    assert axis.texts[0].get_text() == "plain"


def test_a_part_without_any_test_is_drawn_without_one():
    early = histories(plain=[60, 40], residual=[50, 30]).query("iteration == 100")
    figure, (axis,) = figures.new_figure()
    figures.curves(axis, early, "kind", top=70)
    assert [line.get_linestyle() for line in axis.lines] == ["--", "--"]
    assert sorted(text.get_text() for text in axis.texts) == ["plain", "residual"]


def depths(column: str, *errors: float) -> pandas.DataFrame:
    return pandas.DataFrame(
        [
            {"kind": "plain", "depth": depth, "seed": 0, column: error}
            for depth, error in zip((20, 56), errors, strict=True)
        ]
    )


def test_panels_that_share_an_axis_show_all_of_the_larger_errors():
    """The panel that is drawn first must not fix the end of the axis for the second."""
    figure, (left, right) = figures.new_figure(2)
    figures.error_against_depth(left, depths("error", 1.0, 40.0), "error")
    figures.error_against_depth(right, depths("error", 3.0, 90.0), "error")
    assert left.get_ylim() == right.get_ylim()
    assert right.get_ylim()[1] > 90
    assert right.get_ylim()[0] < 0  # room for the marker of 0 %


def test_a_seed_far_from_the_others_is_on_the_axis():
    table = pandas.DataFrame({"kind": "plain", "depth": 20, "error": [1.0] * 20 + [50.0]})
    figure, (axis,) = figures.new_figure()
    figures.error_against_depth(axis, table, "error")
    assert axis.get_ylim()[1] > 51


def test_every_kind_has_its_line_however_many_there_are():
    kinds = [f"kind {number}" for number in range(10)]
    rows = [{"kind": kind, "depth": depth, "seed": 0, "error": 10.0} for kind in kinds for depth in (20, 56)]
    figure, (axis,) = figures.new_figure()
    figures.error_against_depth(axis, pandas.DataFrame(rows), "error")
    assert [text.get_text() for text in axis.texts] == kinds


def test_an_error_beyond_the_axis_is_named_at_its_edge():
    rows = [
        {"kind": kind, "depth": depth, "seed": 0, "error": error}
        for kind, errors in {"plain": (9.0, 65.2), "residual": (8.0, 6.0)}.items()
        for depth, error in zip((20, 110), errors, strict=True)
    ]
    figure, (axis,) = figures.new_figure()
    figures.error_against_depth(axis, pandas.DataFrame(rows), "error", top=20.0)
    assert axis.get_ylim()[1] == 20.0
    assert {text.get_text() for text in axis.texts} == {"plain ↑ 65 %", "residual"}


def test_errors_of_nothing_have_an_axis_too():
    figure, (axis,) = figures.new_figure()
    figures.error_against_depth(axis, depths("error", 0.0, 0.0), "error")
    assert axis.get_ylim() == (-0.02, 1.0)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn():
    figure, (left, right) = figures.new_figure(2)
    figures.curves(left, histories(plain=[60, 40, 30, 20], residual=[50, 30, 20, 19]), "kind", top=70)
    figures.line_key(left)
    right.imshow([[0.0, 1.0], [1.0, 0.0]], cmap="gray")
    right.bar([0], [1], hatch="//", edgecolor="white", color="#016aa5")
    return figure


def test_a_figure_is_the_same_for_the_same_numbers(drawn):
    assert figures.render(drawn, "png").startswith(b"\x89PNG")
    assert figures.render(drawn, "svg") == figures.render(drawn, "svg")
    assert "error" in figures.render(drawn, "svg").decode()  # text stays text in the file that may be edited


def test_a_figure_for_a_dark_page_differs_in_nothing_but_colours(drawn):
    light, dark = figures.render_for_page(drawn)
    colour = rb'((?:fill|stroke)(?:: |="))#[0-9a-f]{6}'
    rest = dark.replace(b"<svg fill=", b"<svg ", 1)
    rest = re.sub(rb'<svg "#[0-9a-f]{6}" ', b"<svg ", rest)
    assert re.sub(colour, rb"\1", light) == re.sub(colour, rb"\1", rest)
    assert light.count(b"data:image/png") == dark.count(b"data:image/png") == 1  # an image keeps its own colours
    for svg in (light, dark):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert b"<text" not in svg  # drawn as outlines: it looks alike whatever fonts there are


def test_all_of_a_dark_figure_can_be_seen(drawn):
    dark = figures.render_for_page(drawn)[1]
    assert dark.count(b'<svg fill="#') == 1  # what has no colour of its own is not black
    written = {colour.decode() for colour in re.findall(rb'(?:fill|stroke)(?:: |=")(#[0-9a-f]{6})', dark)}
    faint = {colour for colour in written if contrast(colour, DARK_PAGE) < LINE_CONTRAST}
    # The grid, and the white of hatches, are to recede.
    assert faint == {figures._on_dark("#e5e5e5"), figures._on_dark("#ffffff")}


def test_names_stay_apart_where_a_later_panel_has_larger_errors():
    rows = [
        {"kind": kind, "depth": depth, "seed": 0, "train_error": 0.0, "test_error": 40.0}
        for kind in ("plain", "residual")
        for depth in (20, 56)
    ]
    _, panels = figures.new_figure(2)
    for axis, column in zip(panels, ("train_error", "test_error"), strict=True):
        figures.error_against_depth(axis, pandas.DataFrame(rows), column)
    low, high = panels[0].get_ylim()
    assert high > 40
    for axis in panels:
        lower, upper = sorted(text.xyann[1] for text in axis.texts)
        assert upper - lower >= 0.064 * (high - low)


def test_over_cost_each_network_has_its_place_also_beside_one_that_costs_the_same():
    rows = [
        {"block": block, "depth": depth, "macs": macs, "error": error + seed, "seed": seed}
        for block, depth, macs, error in (
            ("a", 8, 1e6, 80.0),
            ("a", 14, 1e6, 60.0),
            ("b", 8, 2e6, 50.0),
            ("b", 14, 3e6, 40.0),
        )
        for seed in (0, 1)
    ]
    _, (axis,) = figures.new_figure()
    figures.error_against_cost(axis, pandas.DataFrame(rows), "error", by="block")
    means = [line for line in axis.lines if line.get_marker() in ("o", "s")]
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in means] == [
        ([1.0, 1.0], [80.5, 60.5]),
        ([2.0, 3.0], [50.5, 40.5]),
    ]
    low, high = axis.get_xlim()
    assert low == 0 and high > 3.1, "the dots beside the dearest network have room"


def test_a_name_of_any_length_leaves_room_for_the_figure():
    _, (axis,) = figures.new_figure()
    table = depths("error", 1.0, 40.0).assign(kind="squeeze-and-excitation-with-a-normalization-and-more", macs=1e6)
    figures.error_against_depth(axis, table, "error")
    assert [text.get_text() for text in axis.texts] == ["squeeze-and-excitation-wi…"]
    figures.error_against_cost(axis, table, "error", by="kind")
    assert axis.get_legend().get_texts()[0].get_text() == "squeeze-and-excitation-wi…"
