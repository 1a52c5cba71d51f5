"""Docstrings are Markdown prose; autodoc takes them for reStructuredText. Here they are read as what they are."""

from __future__ import annotations

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Markdown(SphinxDirective):
    """A piece of Markdown inside reStructuredText."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def as_markdown(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    if any(lines):
        lines[:] = [".. markdown::", "", *(f"   {line}" for line in lines), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", as_markdown)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
