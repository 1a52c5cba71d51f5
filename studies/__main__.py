"""`resprobe`, or `python -m studies`, lists the studies with their claims and last verdicts, or runs the one that is named.

resprobe                                        # the list
resprobe degradation --depths 20 56             # as python -m studies.degradation --depths 20 56
resprobe degradation --help
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import resprobe
import studies
from resprobe.commands import Parser, answer, called_as
from resprobe.errors import UsageError, not_accepted
from studies.scorecard import Row, find_studies, gather, in_words


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes as of a study: 0 done, 2 unusable arguments, 1 otherwise."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:
        sys.path.append("")  # `--plugin my_blocks` finds a module of this folder, as under `python -m`
    return answer(lambda: _run(*arguments) if arguments and not arguments[0].startswith("-") else _list(arguments))


def _names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(studies.__path__) if module.name != "__main__"]


def _run(name: str, *arguments: str) -> int:
    if name not in _names():
        raise not_accepted("study", name, _names())
    module = importlib.import_module(f"studies.{name}")
    return getattr(module, "study", module).main(arguments)


def _list(arguments: Sequence[str]) -> int:
    introduction, _, examples = __doc__.partition("\n")
    names = textwrap.fill(", ".join(_names()), 100, initial_indent="studies: ", subsequent_indent=" " * 9)
    parser = Parser(
        prog=called_as(),
        usage="%(prog)s [STUDY [OPTION ...]]",
        description=introduction,
        epilog=f"{names}\n{examples}",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where reports are (default: results)")
    parser.add_argument("--version", action="version", version=f"resprobe {resprobe.__version__}")
    results = parser.parse(arguments).results
    if not results.is_dir() and (results.exists() or results != Path("results")):
        raise UsageError(f"--results (={str(results)!r}) is not a folder")
    found, broken = find_studies()
    rows = gather(found, results)
    width = max(60, shutil.get_terminal_size((140, 24)).columns)
    for study in found:
        print(called_as(study.name))
        for row in rows:
            if row.study == study.name:
                _print_row(row, width)
    listed = {study.name for study in found} | {"", *broken}
    for name in dict.fromkeys(row.study for row in rows if row.study not in listed):
        print(f"{name}, a study from elsewhere whose report is in {results}")
        for row in rows:
            if row.study == name:
                _print_row(row, width)
    without = [row.claim.id for row in rows if not row.study]
    print(f"\n{in_words(rows)} (no study tests {', '.join(without)})" if without else f"\n{in_words(rows)}")
    print(f"{called_as('scorecard')} puts them on one page; with --run quick it runs every study first")
    for name, why in broken.items():
        print(f"error: studies.{name} {why}", file=sys.stderr)
    return 1 if broken else 0


def _print_row(row: Row, width: int) -> None:
    verdict = f"{row.verdict} ({row.setting})" if row.setting else row.verdict
    start = f"    {row.claim.id:<4} {verdict:<22} "
    text = f"{row.claim.statement} ({row.claim.section})"
    print(textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * len(start)))


if __name__ == "__main__":
    raise SystemExit(main())
