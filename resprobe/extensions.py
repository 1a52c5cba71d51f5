"""Finding plugins: a plugin is a Python module, and importing it registers what it offers.

Three ways in: installed packages announce theirs under the entry-point group `resprobe.plugins`; `--plugin
package.module` imports a module; `--plugin path/to/file.py` loads a single file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from resprobe.digests import files_digest, sources_of
from resprobe.errors import UsageError, blamed

GROUP = "resprobe.plugins"
_loaded: set[str] = set()
_files: dict[Path, str] = {}
"""Plugin files that were loaded, and the digests of what was."""


def load_installed(name: str | None = None) -> None:
    """Imports the plugins that installed packages announce: those announced as `name`, or all; each once a process.

    A plugin that does not import is passed over with a warning: a broken stranger must not take the house down.
    """
    for entry_point in entry_points(group=GROUP):
        if entry_point.value in _loaded or name not in (None, entry_point.name):
            continue
        _loaded.add(entry_point.value)  # first, since plugins look names up while they register their own
        try:
            entry_point.load()
        except Exception as error:
            warnings.warn(f"installed plugin {entry_point.name!r} ({entry_point.value}) does not import: {error!r}")


def load_plugin(where: str) -> ModuleType:
    """Imports the plugin at `where`: a file (`my_block.py`) or a module (`package.module`). A file that was edited since is
    loaded anew, with those beside it that it imports.

    Raises `UsageError` with the cause in one line if it is not there or does not import.
    """
    path = Path(where).expanduser()
    looks_like_file = path.suffix == ".py" or "/" in where or "\\" in where or path.is_file()
    if looks_like_file and not path.is_file():
        raise UsageError(f"plugin (={where!r}) is not there: no file {path.absolute()}")
    if looks_like_file and path.suffix != ".py":
        raise UsageError(f"plugin (={where!r}) must be a Python file (my_block.py) or a module (package.module)")
    try:
        with blamed(f"plugin (={where!r}) does not import"):
            module = _load_file(path.resolve()) if looks_like_file else importlib.import_module(where)
    except SystemExit as error:
        raise UsageError(
            f"plugin (={where!r}) does not import: it ends the program (sys.exit({error.code!r}))"
        ) from error
    if module.__file__ is None:
        raise UsageError(f"plugin (={where!r}) is a folder without code: name a file in it, or give it an __init__.py")
    return module


def is_loaded(path: Path | None) -> bool:
    """Whether this is a plugin's file that this process has loaded."""
    return path in _files


def _load_file(path: Path) -> ModuleType:
    # The folder is part of the name, so that two files of one name in two folders stay two modules.
    name = f"resprobe_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    before = sys.modules.get(name)
    if before is not None and path in _files:
        now = files_digest(name, path)
        if now == _files[path]:
            return before
        _forget_helpers(_files[path], now, path)
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # before execution: dataclasses and pickling look the module up by name
    text = path.read_bytes()
    try:
        # Not by way of Python's cache of compiled files, which takes two edits within a second for one.
        exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    _files[path] = files_digest(name, path)
    return module


def _forget_helpers(before: str, now: str, path: Path) -> None:
    """Forgets the modules beside a plugin that it imports, so that they are imported anew. All of them: one that was not edited
    may hold what is in one that was."""
    helpers = {(path.parent / name).resolve() for name in sources_of(before) | sources_of(now)} - {path}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or Path(file).resolve() not in helpers:
            continue
        del sys.modules[name]
        package, _, own = name.rpartition(".")
        vars(sys.modules.get(package, module)).pop(own, None)  # which "from package import own" would find
        # Python's cache of compiled files takes two edits within a second for one.
        with contextlib.suppress(OSError, NotImplementedError):
            Path(importlib.util.cache_from_source(file)).unlink()
