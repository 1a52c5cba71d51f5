"""A report of a study that was made up to be awkward: long words, wide tables, every verdict, characters of HTML."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas

import resprobe as rp
from resprobe.report import write_report

ENVIRONMENT = {
    "resprobe": "0.1.0",
    "python": "3.11.2",
    "torch": "2.8.0",
    "captum": None,
    "platform": "Linux-6.1-x86_64",
    "device": "cpu: a processor, 2 cores",
    "threads": 2,
    "processes": 1,
    "date": "2026-11-21T12:00:00+00:00",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "local_changes": True,
    "precision": "fp32",
}
WORDS = "supercalifragilistic" * 6


def claims() -> list[rp.Claim]:
    return [
        rp.Claim(f"C{index}", f"Deeper is <worse> & {word}", "§4.2", f"6.43 % {WORDS}", "the <opposite>")
        for index, word in enumerate(("so it is", WORDS, "perhaps", "nobody looked"), start=1)
    ]


def study() -> rp.Study:
    words = ("holds", "fails", "inconclusive", "not tested")

    def judge(results: rp.Results) -> list[rp.Verdict]:
        return [
            rp.Verdict(claim, word, "1.00 ± 0.50 → 2.00 ± 0.25 % at 20, 56 layers", f"p = 0.01, n = 3 {WORDS}")
            for claim, word in zip(claims(), words, strict=True)
        ]

    def draw(results: rp.Results) -> dict[str, rp.Drawing]:
        drawings = {}
        for name, panels in (("figure", 2), ("figure-one", 1)):
            figure, axes = rp.figures.new_figure(panels)
            for axis in axes:
                axis.plot([20, 56], [1, 2], color=rp.figures.colours(["plain"])["plain"])
            drawings[name] = rp.Drawing(figure, f"Error of {name}: <1 %", f'What "{name}" shows: 1 < 2')
        return drawings

    def tabulate(results: rp.Results) -> pandas.DataFrame:
        columns = ["network", *(f"column {index} (%)" for index in range(8)), "paper's error (%)", "seeds"]
        return pandas.DataFrame(
            [["plain-20", *range(10)], ["a network with a <long> name", *range(10)]], columns=columns
        )

    presets = {"quick": rp.Options(), "paper": rp.Options(preset="paper", data="cifar10")}
    return rp.Study("awkward", "Deeper is <worse>", tuple(claims()), presets, lambda _: [], judge, draw, tabulate)


def write(out: Path, *, setting: str = "quick", trained: bool = True, environment: dict | None = None) -> Path:
    """Writes the report into the folder `out`, and returns the path of the page."""
    options = rp.Options(out=str(out), data="digits:some/where", seeds=(0, 1, 2))
    config = SimpleNamespace(
        recipe=rp.recipes.cifar_paper(iterations=400), network=rp.networks.resolve("cifar/resnet-20", width=8)
    )
    runs = [SimpleNamespace(metrics={"seconds": 90.0}, config=config)] * 3 if trained else []
    table = pandas.DataFrame({"network": ["plain-20"], "seed": [0]}) if trained else pandas.DataFrame()
    results = rp.Results(options, table, pandas.DataFrame(), runs)
    awkward = study()
    write_report(
        awkward,
        results,
        awkward.judge(results),
        setting=setting,
        environment=ENVIRONMENT if environment is None else environment,
        command="resprobe awkward --plugin " + "/".join(["a_long_path"] * 30),
        seconds=12.0,
    )
    return out / "report.html"
