"""How Sphinx builds these pages; `make docs` calls it."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]

import resprobe  # noqa: E402

project = "resprobe"
release = version = resprobe.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "markdown_docstrings", "source_pages"]
exclude_patterns = ["_build"]
nitpicky = True
# Signatures name types of torch, pandas and Python; their own pages are elsewhere, and the build needs no network.
nitpick_ignore_regex = [("py:.*", r"(?!resprobe\.).*"), ("py:.*", r"resprobe\.registry\.T")]

# -- pages --------------------------------------------------------------------------------------------------------------

myst_heading_anchors = 3
myst_links_external_new_tab = True
highlight_language = "none"  # commands are not coloured; Python says that it is
suppress_warnings = ["myst.header"]  # a study's report may begin a list of claims below its second heading

# -- notebooks: run once, kept beside the build until their text changes ------------------------------------------------

nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 1200  # seconds for a cell: a whole notebook has taken 309 on a busy machine of two cores
nb_merge_streams = True

# -- names from docstrings ----------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
python_maximum_signature_line_length = 96

# -- look ---------------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"resprobe {release}"
html_static_path = ["_static"]
html_css_files = ["resprobe.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def records_stand_alone(app, page, source):
    """A study's report is reached from the pages that speak of it; in the table of contents it would be one of thirty."""
    if page.startswith("measurements/") and page.endswith("/report"):
        source[0] = f"---\norphan: true\n---\n\n{source[0]}"


def say_how_long(app, error):
    """Of each notebook, how long it took when it was last executed."""
    for page, about in sorted(app.env.nb_metadata.items()):
        if seconds := about.get("exec_data", {}).get("runtime"):
            print(f"{page}: {seconds:.0f} s")


def setup(app):
    app.connect("source-read", records_stand_alone)
    app.connect("build-finished", say_how_long)
