"""A page for every source file: links to `../studies/degradation.py` and "[source]" lead there.

On GitHub the same link opens the file; without this, Sphinx would offer it as a download.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("resprobe", "plugins", "studies", "benchmarks")
AT = "source"


def address(file: Path, page: str) -> str:
    """Where a file's page is, seen from another page."""
    return "../" * page.count("/") + f"{AT}/{file.relative_to(ROOT).as_posix()}.html"


def rewrite_links(app: Sphinx, doctree: nodes.document) -> None:
    page = app.env.docname
    for node in list(doctree.findall(addnodes.download_reference)):
        file = (Path(app.env.doc2path(page)).parent / node["reftarget"]).resolve()
        if file.suffix == ".py" and file.is_relative_to(ROOT):
            link = nodes.reference("", "", *node.children, internal=True, refuri=address(file, page))
            node.replace_self(link)


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    formatter = HtmlFormatter(linenos="inline", lineanchors="line", anchorlinenos=True)
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            code = highlight(file.read_text(), PythonLexer(), formatter)
            yield f"{AT}/{name}", {"title": name, "body": f"<h1>{name}</h1>\n{code}"}, "page.html"


def source_of(domain: str, info: dict[str, str]) -> str | None:
    """The page and line of a name, for `sphinx.ext.linkcode`; its pages are those of docs/api/."""
    thing = importlib.import_module(info["module"])
    try:
        for part in info["fullname"].split("."):
            thing = getattr(thing, part)
        thing = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)
        file, line = Path(inspect.getsourcefile(thing) or ""), inspect.getsourcelines(thing)[1]
    except (AttributeError, OSError, TypeError):  # data, and fields without a default
        return None
    return f"{address(file, 'api/page')}#line-{line}" if file.is_relative_to(ROOT) else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.linkcode")
    app.config.linkcode_resolve = source_of
    app.connect("doctree-read", rewrite_links, priority=400)  # before Sphinx collects downloads
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
