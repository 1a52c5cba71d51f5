"""The house: imports run one way, studies → plugins → resprobe, and what crosses a threshold is public and documented."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "resprobe": (),
    "plugins": ("resprobe",),
    "studies": ("resprobe", "plugins"),
    "benchmarks": ("resprobe", "plugins", "studies"),
}
"""What each may import beside itself."""
FILES = sorted(file for folder in BELOW for file in (ROOT / folder).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, str | None]]:
    """Modules that a file imports, wherever in it, and the names it takes from them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_run_one_way_and_take_what_is_documented(file):
    room = file.relative_to(ROOT).parts[0]
    for module, name in imports(file):
        owner = module.partition(".")[0]
        if owner not in BELOW or owner == room:
            continue
        assert owner in BELOW[room], f"{room} imports {module}"
        if name is None:
            continue
        assert not name.startswith("_"), f"{module}.{name} is private"
        thing = getattr(importlib.import_module(module), name, None)  # None: a module of a package, imported on demand
        assert not callable(thing) or thing.__doc__, f"{module}.{name} is not documented"


def test_no_study_imports_what_takes_time_before_there_is_something_to_do():
    """Else `--help` would wait for it."""
    studies = ", ".join(f"studies.{file.stem}" for file in (ROOT / "studies").glob("*.py") if file.stem[0] != "_")
    slow = "{'torch', 'pandas', 'matplotlib', 'scipy', 'captum'}"
    code = f"import sys, {studies}; assert not (there := {slow} & set(sys.modules)), there"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
