"""resprobe: a research analysis toolkit for residual networks (He et al. 2015, arXiv:1512.03385).

Public names are imported when first used, so that a command's `--help` need not wait for torch. They are listed in
`__init__.pyi` alone, where type checkers and editors look for them.
"""

import ast
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_LIST = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {alias.name: node.module for node in _LIST.body if isinstance(node, ast.ImportFrom) for alias in node.names}
"""Public name → the module it comes from; None where it is a module itself."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'resprobe' has no attribute {name!r}")
    home = _HOME[name]
    if home is None:
        return import_module(f"resprobe.{name}")
    value = getattr(import_module(f"resprobe.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
