"""`python -m studies` lists the studies, the claims they test, and their last verdicts."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from pathlib import Path

from resprobe.study import notes_on_one_line
from studies.scorecard import find_studies, gather, in_words


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="where reports are (default: results)")
    results = parser.parse_args().results
    studies, broken = find_studies()
    with notes_on_one_line():
        rows = gather(studies, results)
    width = max(60, shutil.get_terminal_size((140, 24)).columns)
    for study in studies:
        print(f"python -m studies.{study.name}")
        for row in rows:
            if row.study == study.name:
                verdict = f"{row.verdict} ({row.setting})" if row.setting else row.verdict
                start = f"    {row.claim.id:<4} {verdict:<22} "
                text = f"{row.claim.statement} ({row.claim.section})"
                print(textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * len(start)))
    without = [row.claim.id for row in rows if not row.study]
    print(f"\n{in_words(rows)} (no study tests {', '.join(without)})" if without else f"\n{in_words(rows)}")
    print("python -m studies.scorecard puts them on one page; with --run quick it runs every study first")
    for name, why in broken.items():
        print(f"error: studies.{name} {why}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
