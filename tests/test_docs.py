"""The pages of docs/: their code runs, their commands are understood, and what they name is there.

How a page says what is to be run:

- a ```python block is executed; all of a page share their names. One that begins with `# name.py` is a file: it is written
  and loaded as a plugin;
- a ```pycon block must print what it shows;
- `<!-- run -->` before a block of commands runs each line that begins with `python`; `<!-- run with: ARGUMENTS -->` adds
  arguments that make them short, `exit 2` says how they end. `<!-- prints -->` before the block after them says that they
  print its lines, "…" standing for anything.

The notebooks of docs/tutorials/ are executed by `make docs`.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import resprobe as rp
from studies.scorecard import UNTESTED, find_studies

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Not what may be being built meanwhile.
PAGES = sorted(
    page
    for part in DOCS.iterdir()
    if part.name != "_build"
    for page in (part, *part.rglob("*.md"))
    if page.suffix == ".md"
)
OURS = [page for page in PAGES if page.name != "report.md"]  # a report is what a study wrote, once
NOTEBOOKS = [page for page in OURS if page.read_text().startswith("---\njupytext")]
CODE = re.compile(r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Code:
    """A fenced block and the remark before it."""

    language: str
    mark: str
    text: str


def blocks(page: Path) -> list[Code]:
    return [Code(found["language"], found["mark"] or "", found["text"]) for found in CODE.finditer(page.read_text())]


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `python …` in a text, whether in a fenced, an indented, or an inline piece of code."""
    for found in re.finditer(r"(?:^[ \t]*!?|`)(python [^`\n]*|torchrun [^`\n]*)", text, re.M):
        words = shlex.split(found[1].replace("…", "..."), comments=True)
        yield words[words.index("-m") - 1 :] if words[0] == "torchrun" else words


# -- code ------------------------------------------------------------------------------------------------------------

RUNNABLE = [
    page
    for page in OURS
    if page not in NOTEBOOKS
    and any(block.language in ("python", "pycon") or block.mark.startswith("run") for block in blocks(page))
]


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_code_runs(page, tmp_path, monkeypatch, capsys, clean_registries):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    printed = ""
    for block in blocks(page):
        if block.language == "python" and (file := re.match(r"# (\w+\.py)\n", block.text)):
            Path(file[1]).write_text(block.text)
            rp.load_plugin(file[1])
        elif block.language == "python":
            exec(compile(block.text, name(page), "exec"), names)
        elif block.language == "pycon":
            check_session(block.text, names, page)
        elif block.mark.startswith("run"):
            capsys.readouterr()
            _, _, arguments = block.mark.partition("with: ")
            code = int(found[1]) if (found := re.search(r"exit (\d)", block.mark)) else 0
            for words in commands(block.text):
                assert run(words, shlex.split(arguments), monkeypatch) == code, words
            printed = "".join(capsys.readouterr())
        elif block.mark == "prints":
            for line in block.text.splitlines():
                pattern = ".*".join(map(re.escape, line.split("…")))
                assert re.search(f"^{pattern}$", printed, re.M), f"{line!r} is not in what was printed:\n{printed}"


def check_session(text: str, names: dict[str, object], page: Path) -> None:
    session = doctest.DocTestParser().get_doctest(text, names, name(page), str(page), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(session, out=said.append, clear_globs=False)
    names.update(session.globs)
    assert not runner.failures, "".join(said)


def run(words: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs `python …` in this process, in which everything is imported already; gives its exit code."""
    file = importlib.util.find_spec(words[2]).origin if words[1] == "-m" else words[1]
    given = words[3 if words[1] == "-m" else 2 :]
    for option in [each for each in arguments if each.startswith("--")]:  # in the place of the page's own
        if option in given:
            start = given.index(option)
            end = next((at for at in range(start + 1, len(given)) if given[at].startswith("--")), len(given))
            del given[start:end]
    monkeypatch.setattr(sys, "argv", [file, *given, *arguments])
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# -- commands --------------------------------------------------------------------------------------------------------

STUDIES = {study.name: study for study in find_studies()[0]}
MISTAKES = {"--depths 21", "--block bottlneck", "--shortcuts B"}
"""That a page shows on purpose."""
COMMANDS = sorted(
    {shlex.join(words) for page in [*OURS, ROOT / "README.md"] for words in commands(page.read_text())}
    - {f"python -m studies.degradation {mistake}" for mistake in MISTAKES}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch):
    words = shlex.split(command)
    if words[1] != "-m":
        return  # a file that a page has written; it is run there
    assert importlib.util.find_spec(words[2]) is not None, words[2]
    package, _, study = words[2].partition(".")
    if package == "studies" and study in STUDIES and not {"--help", "...", "{options}"} & set(words):
        STUDIES[study].parse(words[3:])
    elif package == "benchmarks" or study == "scorecard":

        class Understood(Exception):
            pass

        def parse(*arguments):
            _, unknown = taken(*arguments)
            assert not unknown
            raise Understood

        taken = argparse.ArgumentParser.parse_known_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        with pytest.raises(Understood):
            importlib.import_module(words[2]).main(words[3:])


@pytest.mark.parametrize("page", OURS, ids=name)
def test_make_knows_its_targets(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    wanted = re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.M)
    assert set(wanted) <= set(targets)


# -- what is named -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", OURS, ids=name)
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text())
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", OURS, ids=name)
def test_named_things_are_there(page):
    """`rp.build`, `resprobe.recipes.cifar_paper`, `plugins/highway.py`: in running text."""
    text = CODE.sub("", page.read_text())
    for dotted in re.findall(r"`((?:rp|resprobe|plugins|studies)(?:\.\w+)+)(?=[`(\[])", text):
        if not dotted.endswith((".py", ".html", ".plugins")):  # a file; an entry-point group
            resolve(dotted)
    for file in re.findall(r"`((?:resprobe|plugins|studies|tests|benchmarks|docs)/[\w/]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file


def resolve(dotted: str) -> object:
    parts = dotted.split(".")
    parts[0] = {"rp": "resprobe"}.get(parts[0], parts[0])
    thing: object = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], start=2):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            thing = importlib.import_module(".".join(parts[:at]))
    return thing


def test_every_public_name_is_in_the_api_pages():
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    missing = [public for public in rp.__all__ if not re.search(rf"\b(?:rp|resprobe)\.{public}\b", pages)]
    assert not missing
    detection = importlib.import_module("plugins.detection")
    assert not [public for public in detection.__all__ if f"plugins.detection.{public}\n" not in pages]


def test_every_claim_is_on_the_list_and_every_study_beside_the_paper():
    claims = (DOCS / "claims" / "index.md").read_text()
    paper = (DOCS / "paper.md").read_text()
    for study in STUDIES.values():
        for claim in study.claims:
            assert re.search(rf"\b{re.match('[A-Z][0-9]+', claim.id)[0]}\b", claims), claim.id
        if not all(claim.beyond for claim in study.claims):
            assert f"python -m studies.{study.name}" in paper
    for claim in UNTESTED:
        assert re.search(rf"\b{claim.id.rstrip('*')}\b", claims), claim.id


@pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))
def test_the_page_of_a_claim_states_what_is_judged(study):
    """In the words of the report; what the paper says beyond them is told in others."""
    page = (DOCS / "claims" / f"{study.name}.md").read_text()
    text = " ".join(re.sub(r"^> ?", "", page, flags=re.M).split())
    for claim in study.claims:
        assert f"**{claim.id}** {claim.statement}" in text, claim.id


def test_every_table_and_figure_of_the_paper_has_a_row():
    paper = (DOCS / "paper.md").read_text()
    _, tables, figures = re.split(r"^## (?:Tables|Figures)$", paper, flags=re.M)
    named = {int(number) for row in re.findall(r"^\| \*\*([\d, ]+)\*\*", tables, re.M) for number in row.split(",")}
    assert named == set(range(1, 15))
    drawn = {int(number) for number in re.findall(r"^\| \*\*(\d)", figures, re.M)}
    assert drawn == set(range(1, 8))


def test_every_page_is_in_the_table_of_contents():
    """A page that no `toctree` names is not found by those who browse; Sphinx only warns of it."""
    listed = set()
    for page in OURS:
        for block in blocks(page):
            if block.language == "{toctree}":
                for entry in block.text.split("\n\n", 1)[-1].split():
                    listed |= {found.resolve() for found in page.parent.glob(f"{entry}.md")}
    assert {page for page in OURS if page not in listed} == {DOCS / "index.md"}
