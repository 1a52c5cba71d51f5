"""A registry maps a name to a thing: blocks, shortcuts, networks, data sets, probes, initializations, normalizations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from resprobe.digests import origin, source_digest, source_file, typed_in
from resprobe.errors import UsageError, not_accepted

T = TypeVar("T")


class _Entry(NamedTuple, Generic[T]):
    """A registered thing, the digest of its source if it is in a file, and what was told about it."""

    thing: T
    source: str | None
    about: Any


_NAME = re.compile(r"[^\W_][\w./+-]*")
"""What stands as it is on a command line, in a name of a file, in a table of Markdown and in a figure's text."""


OF_YOURS = "one of yours comes with --plugin FILE, or rp.load_plugin(FILE)"
_registries: list[Registry[Any]] = []


class Registry(Generic[T]):
    """Names for things of one kind.

    A name is registered once: a second registration is refused rather than silently winning. A name that is not
    there is looked for in the installed plugins before it is called unknown.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._things: dict[str, _Entry[T]] = {}
        _registries.append(self)

    def register(self, name: str, about: Any = None) -> Callable[[T], T]:
        """Decorator that files a class or function under `name`, with what else belongs to that name.

        Raises `UsageError` if the name is taken, or cannot be one.
        """
        if isinstance(name, type) or inspect.isfunction(name):  # the decorator's own parentheses are forgotten
            raise UsageError(
                f'{self.kind} {name.__name__} needs a name: @rp.register_…("my-{self.kind}") in the line above it'
            )
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                f"{self.kind} name (={name!r}) must begin with a letter or digit, and be of letters, digits and _ . / + -"
            )

        def file_under_name(thing: T) -> T:
            taken_by = self._things.get(name)
            if taken_by is not None and not _same_definition(taken_by.thing, thing):
                raise UsageError(
                    f"{self.kind} (={name!r}) is already registered by {origin(taken_by.thing)}; choose another name"
                )
            # Now, while the file is what was loaded: it may be edited later, and this process not know of it.
            self._things[name] = _Entry(thing, None if typed_in(thing) else source_digest(thing), about)
            return thing

        return file_under_name

    def __repr__(self) -> str:
        return f"<{self.kind}: {', '.join(self.names())}>"

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            # A plugin that is announced under the name of what it registers is imported alone, without all others.
            _load_installed_plugins(name)
        if name not in self._things:
            _load_installed_plugins()
        if name not in self._things:
            raise not_accepted(self.kind, name, self.names(), otherwise=OF_YOURS)
        return self._things[name].thing

    def __contains__(self, name: object) -> bool:
        return self.known(name) or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def known(self, name: object) -> bool:
        """Whether `name` is registered so far. Does not import the installed plugins, which takes a moment."""
        return name in self._things

    def names(self) -> tuple[str, ...]:
        """All registered names, those of installed plugins included, in alphabetical order."""
        _load_installed_plugins()
        return tuple(sorted(self._things))

    def names_of(self, module: str) -> list[str]:
        """The names under which things of a module or package are registered so far."""
        origins = {name: f"{entry.thing.__module__}." for name, entry in self._things.items()}
        return sorted(name for name, where in origins.items() if where.startswith(f"{module}."))

    def about(self, name: str) -> Any:
        """What was told of the name when it was registered."""
        self[name]  # looked for in plugins, or refused
        return self._things[name].about

    @contextmanager
    def temporary(self, name: str, thing: T, about: Any = None) -> Iterator[T]:
        """Registers `thing` for the length of a `with` block: for tests and notebooks."""
        before = self._things.get(name)
        self.register(name, about)(thing)
        try:
            yield thing
        finally:
            del self._things[name]
            if before is not None:  # it was there already, and stays
                self._things[name] = before

    def fingerprint(self, name: str) -> str | None:
        """SHA-256 of the source file that a stranger's thing comes from, as it was loaded; None for resprobe's own.

        A run is found again by what it is, and what a stranger's block is, is its source: edit the block and its
        runs are trained anew. What was typed in has no file: there it is a digest of what that does, and what it names does, now.
        """
        thing = self[name]  # looked for in plugins, or refused
        return source_digest(thing) if typed_in(thing) else self._things[name].source


def registered() -> set[tuple[str, str]]:
    """Kind and name of all that is registered so far."""
    return {(registry.kind, name) for registry in _registries for name in registry._things}


def _same_definition(one: object, other: object) -> bool:
    """True when a module was merely imported a second time (`python -m`, reload), or a notebook's cell run again, edited or not:
    the same place, the same name."""
    return one is other or (origin(one) == origin(other) and source_file(one) == source_file(other))


def _load_installed_plugins(name: str | None = None) -> None:
    from resprobe import extensions

    extensions.load_installed(name)
