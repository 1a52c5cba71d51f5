"""Reports: one file that says all there is, to everybody."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pages
import pandas
import pytest

import resprobe as rp
from resprobe.claims import VERDICTS
from resprobe.environment import pooled
from resprobe.figures import DARK_PAGE, TEXT_CONTRAST, contrast
from resprobe.report import _of_recipe

STYLE = (Path(__file__).parent.parent / "resprobe" / "templates" / "_style.html").read_text()


class Page(HTMLParser):
    """A page's elements in order, as (tag, attributes, text in it up to the next tag)."""

    VOID = ("meta", "link", "img")

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, "elements that are never closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.elements:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = (tag, attributes, text + data)

    def all(self, *tags: str) -> list[tuple[str, dict[str, str], str]]:
        return [(tag, attributes, text.strip()) for tag, attributes, text in self.elements if tag in tags]


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return pages.write(tmp_path_factory.mktemp("report")).read_text()


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_the_page_is_one_file(page, html):
    links = [
        value for _, attributes, _ in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert links and all(link.startswith("data:") for link in links)
    assert "url(" not in html and "@import" not in html and not page.all("script", "iframe", "object")


def test_the_page_has_its_language_its_landmarks_and_its_headings_in_order(page):
    (language,) = page.all("html")
    assert language[1] == {"lang": "en"}
    assert [tag for tag, _, _ in page.all("header", "main", "footer")] == ["header", "main", "footer"]
    headings = [(int(tag[1]), text) for tag, _, text in page.all("h1", "h2", "h3", "h4")]
    assert headings[0] == (1, "Deeper is <worse>")
    assert all(level == 2 for level, _ in headings[1:])
    sections = ["Beside the paper", "How sure", "Departures from the paper", "How it was made"]
    assert [text for _, text in headings[-4:]] == sections
    assert [text for _, _, text in page.all("title")] == [
        "Deeper is <worse>: C1 holds, C2 fails, C3 inconclusive, C4 not tested – resprobe"
    ]


def test_every_image_says_what_it_shows(page):
    images = [(attributes["class"], attributes["alt"]) for _, attributes, _ in page.all("img")]
    shown = ('What "figure" shows: 1 < 2', 'What "figure-one" shows: 1 < 2')
    assert images == [(kind, alt) for alt in shown for kind in ("light", "dark")]


def test_every_cell_belongs_to_a_column_and_a_row(page):
    scopes = [attributes["scope"] for _, attributes, _ in page.all("th")]
    assert scopes == ["col"] * 11 + ["row"] * 2
    columns = [text for _, attributes, text in page.all("th") if attributes["scope"] == "col"]
    tinted = [attributes.get("class") == "paper" for _, attributes, _ in page.all("th", "td")]
    assert columns[9] == "paper's error (%)"
    assert tinted == ([False] * 9 + [True, False]) * 3


def test_what_scrolls_can_be_reached_by_keyboard_and_has_a_name(page):
    boxes = [attributes for _, attributes, _ in page.elements if attributes.get("class") == "scroll"]
    ids = {attributes["id"] for _, attributes, _ in page.elements if "id" in attributes}
    assert len(boxes) == 3
    for box in boxes:
        assert box["tabindex"] == "0" and box["role"] == "group"
        assert box.get("aria-label") or box["aria-labelledby"] in ids


def test_a_verdict_is_a_word_and_a_sign_beside_its_colour(html):
    for number, (verdict, sign) in enumerate(zip(VERDICTS, "✓✗?–", strict=True), start=1):
        assert f'<span aria-hidden="true">{sign}</span> C{number} {verdict} <small>(quick setting)</small>' in html


def test_the_papers_setting_needs_no_remark(tmp_path):
    html = pages.write(tmp_path, setting="paper").read_text()
    assert "C1 holds</p>" in html
    assert "The paper&#39;s setting; data: digits." in html


def test_figures_are_there_for_either_page(page):
    figures = [base64.b64decode(attributes["src"].partition(",")[2]) for _, attributes, _ in page.all("img")]
    assert len(set(figures)) == 4
    assert all(ElementTree.fromstring(figure).tag.endswith("svg") for figure in figures)
    widths = [attributes["style"] for _, attributes, _ in page.all("img")]
    assert widths == ["--inches: 10.4"] * 2 + ["--inches: 5.2"] * 2


def test_it_is_printed_as_on_a_light_page(html):
    dark = re.findall(r"@media ([^{]*prefers-color-scheme: dark[^{]*)", html)
    assert len(dark) == 2 and all(medium.startswith("screen and") for medium in dark)


def variables(scheme: str) -> dict[str, str]:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{([^}]*)\}", STYLE)[:2]
    )
    return light if scheme == "light" else light | dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme):
    found = variables(scheme)
    for text in ("text", "soft", "holds", "fails", "inconclusive", "not-tested", "link"):
        for background in ("page", "card"):
            assert contrast(found[text], found[background]) >= TEXT_CONTRAST, (text, background)


def test_dark_figures_are_made_for_the_dark_page():
    assert variables("dark")["page"] == DARK_PAGE
    assert variables("light")["page"] == "#ffffff"


def test_how_it_was_made(page, html):
    assert "<pre><code>resprobe awkward --plugin a_long_path/" in html
    names = [text for tag, _, text in page.all("dt", "dd")]
    made = dict(zip(names[::2], names[1::2], strict=True))
    assert made["time"] == "4 min of training, summed over all runs; 12 s for the command"
    assert made["device"] == "cpu: a processor, 2 cores; fp32, 2 threads"
    assert made["commit"] == "0123456789abcdef0123456789abcdef01234567, with local changes"
    assert made["versions"] == "resprobe 0.1.0, python 3.11.2, torch 2.8.0"  # not of what is not installed
    assert "processes" not in made


def test_how_it_was_made_by_several_processes_outside_a_checkout(tmp_path):
    environment = pages.ENVIRONMENT | {"processes": 2}
    del environment["commit"], environment["local_changes"]
    pages.write(tmp_path, environment=environment)
    said = (tmp_path / "report.md").read_text()
    assert "\n- processes: 2\n" in said
    assert "commit" not in said


def test_how_it_was_made_on_several_machines(tmp_path):
    one = {"device": "a card", "threads": 1, "step": "graph", "processes": 1, "local_changes": False, "torch": "2.11.0"}
    one["deterministic"] = True
    other = one | {"deterministic": False, "threads": 2, "processes": 2, "local_changes": True, "commit": "def"}
    pages.write(tmp_path, environment=pages.ENVIRONMENT | pooled([one, other, one]))
    said = (tmp_path / "report.md").read_text()
    assert "\n- device: a card; fp32, 1 or 2 threads, graph step\n" in said
    assert "\n- processes: 2\n" in said
    assert "\n- commit: def, with local changes\n" in said
    assert "torch 2.11.0\n" in said
    pages.write(tmp_path, environment=pages.ENVIRONMENT | pooled([one, one]))
    assert "\n- device: a card; fp32, 1 thread, graph step, deterministic\n" in (tmp_path / "report.md").read_text()


def test_departures_and_evidence_are_said(html):
    assert "<li>data: digits instead of CIFAR-10</li>" in html
    assert "<li>iterations: 400 instead of 64,000 (the whole schedule scaled)</li>" in html
    assert "<li>width: 8 filters in the first stage instead of 16</li>" in html
    assert html.count("<dt>would refute it</dt><dd>the &lt;opposite&gt;</dd>") == 4
    assert "3 seeds a network" in html
    assert html.count("<dt>why</dt>") == 1  # of what was not tested, at once; of the rest further down


def test_a_table_without_a_number_of_the_papers_is_not_said_to_stand_beside_it(tmp_path, monkeypatch):
    own = dataclasses.replace(pages.study(), tabulate=lambda _: pandas.DataFrame({"error (%)": [1.0]}))
    monkeypatch.setattr(pages, "study", lambda: own)
    headings = [text for _, _, text in Page(pages.write(tmp_path).read_text()).all("h2")]
    assert "In numbers" in headings and "Beside the paper" not in headings
    said = (tmp_path / "report.md").read_text()
    assert "\n## In numbers\n" in said and "Beside the paper" not in said


@pytest.mark.parametrize(
    ("paper_data", "recipe", "expected"),
    [
        (
            "CIFAR-10",
            rp.recipes.imagenet_paper(600),
            [
                "recipe: that for ImageNet (§3.4) instead of that for CIFAR-10 (§4.2)",
                "iterations: 600 instead of 600,000",
            ],
        ),
        ("ImageNet", rp.recipes.imagenet_paper(600), ["iterations: 600 instead of 600,000"]),
        ("CIFAR-10", rp.recipes.cifar_paper(), []),
    ],
)
def test_a_recipe_is_held_against_that_of_its_kind_of_images(paper_data, recipe, expected):
    found = _of_recipe(dataclasses.replace(pages.study(), paper_data=paper_data), recipe, 20)
    assert [line.partition(" (the whole")[0] for line in found] == expected


def test_figures_of_the_report_before_do_not_stay(tmp_path):
    page = pages.write(tmp_path)
    record = json.loads((tmp_path / "verdict.json").read_text())
    record["figures"]["figure-old"] = "of other options"
    (tmp_path / "verdict.json").write_text(json.dumps(record))
    for name in ("figure-old.png", "figure-old.svg", "figure-old.pdf", "figure-mine.png"):
        (tmp_path / name).touch()
    assert pages.write(tmp_path) == page
    there = {file.name for file in tmp_path.glob("figure*")}
    ours = {f"{name}.{kind}" for name in ("figure", "figure-one") for kind in ("png", "svg", "pdf")}
    assert there == {*ours, "figure-mine.png"}


def test_a_study_that_trains_nothing_says_so(tmp_path):
    html = pages.write(tmp_path, trained=False).read_text()
    assert "None: nothing was trained." in html
    assert "<dd>12 s for the command</dd>" in html
    assert not (tmp_path / "results.csv").exists()
    assert "; data:" not in html
