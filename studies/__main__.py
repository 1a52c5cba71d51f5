"""`python -m studies` lists the studies, the claims they test, and their last verdicts."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path

import studies
from resprobe.study import Study


def all_studies() -> list[Study]:
    """Every study of this package, in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(studies.__path__) if module.name != "__main__")
    modules = (importlib.import_module(f"studies.{name}") for name in names)
    return [module.study for module in modules if isinstance(getattr(module, "study", None), Study)]


def last_verdicts(study: Study, results: Path) -> dict[str, str]:
    """Claim → what the last run of the study said of it, and in which setting."""
    try:
        record = json.loads((results / study.name / "verdict.json").read_text())
        return {claim["id"]: f"{claim['verdict']} ({record['setting']})" for claim in record["claims"]}
    except (OSError, ValueError, KeyError):
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="where reports are (default: results)")
    results = parser.parse_args().results
    for study in all_studies():
        print(f"python -m studies.{study.name}")
        verdicts = last_verdicts(study, results)
        for claim in study.claims:
            print(f"    {claim.id:<4} {verdicts.get(claim.id, 'not tested'):<22} {claim.statement} ({claim.section})")


if __name__ == "__main__":
    main()
