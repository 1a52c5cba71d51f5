"""The report of a study: report.html (one self-contained file), report.md, figures, results.csv, verdict.json."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resprobe.claims import LEVEL, Verdict, rule_of_order
from resprobe.errors import UsageError
from resprobe.figures import render, render_for_page
from resprobe.files import write_atomically
from resprobe.networks import NetworkSpec, resolve
from resprobe.recipes import Recipe, cifar_paper, departures, imagenet_paper
from resprobe.words import duration

if TYPE_CHECKING:
    import pandas

    from resprobe.study import Drawing, Results, Study

FIGURES = ("png", "svg", "pdf")
"""What each figure is written as, beside the page."""
SYMBOLS = {"holds": "✓", "fails": "✗", "inconclusive": "?", "not tested": "–"}
SETTINGS = {
    "quick": "quick setting: minutes on a laptop, not the paper's data or recipe",
    "paper": "the paper's setting",
    "custom": "custom setting: neither the quick nor the paper's preset",
}


def write_report(
    study: Study,
    results: Results,
    verdicts: Sequence[Verdict],
    *,
    setting: str,
    environment: dict[str, Any],
    command: str,
    seconds: float,
) -> dict[str, Any]:
    """Writes everything into `results.options.out`, prints where it is, and returns what `verdict.json` holds."""
    out = Path(results.options.out)
    drawings, table = study.part("draw", results), study.part("tabulate", results)
    tables = {"table": table, **_tables(results)}
    record = {
        "study": study.name,
        "setting": setting,
        "claims": [_judged(verdict) for verdict in verdicts],
        "config": {
            "command": command,
            "options": dataclasses.asdict(results.options),
            "recipes": [
                dataclasses.asdict(recipe) for recipe in dict.fromkeys(run.config.recipe for run in results.runs)
            ],
            "built_of": {name: ours for name, (ours, _) in study.built_of(results.options).items()},
            "departures": _departures(study, results, environment),
            "left_out": dict(results.left_out),
            "seconds_of_training": sum(run.metrics["seconds"] for run in results.runs),
            "seconds_of_study": round(seconds, 1),
        },
        "environment": environment,
        "figures": {name: drawing.alt for name, drawing in drawings.items()},
        "tables": list(tables),
    }
    page = {
        "study": study,
        "record": record,
        "verdicts": verdicts,
        "symbols": SYMBOLS,
        "setting": _setting(setting, results),
        "what": _what(study, results),
        "table": table,
        "beside": any("paper" in str(text) for text in (*table.columns, *table.to_numpy().flat)),
        "drawings": drawings,
        "images": {name: _for_page(drawing) for name, drawing in drawings.items()},
        "summary": summary(study, verdicts, setting, results),
        "followed": "the paper's data and recipe" if results.runs else "nothing was trained",
        "how_sure": " ".join(filter(None, [study.how_sure or _how_sure(results), study.rules, _left_out(results)])),
        "made": _made(record),
    }
    _remove_report(out, but=(drawings, tables))
    for name, drawing in drawings.items():
        for kind in FIGURES:
            write_atomically(out / f"{name}.{kind}", render(drawing.figure, kind))
    for name, content in tables.items():
        write_atomically(out / f"{name}.csv", content.to_csv(index=False, lineterminator="\n").encode())
    write_atomically(out / "report.md", render_template("report.md", page).encode())
    write_atomically(out / "report.html", render_template("report.html", page).encode())
    write_atomically(out / "verdict.json", (json.dumps(record, indent=1, default=str) + "\n").encode())
    print(
        f"\n{page['summary']}\n\nreport:  {out / 'report.html'}\nfigures: "
        + ", ".join(f"{out / name}.png" for name in drawings)
        + "".join(f"\nprobe:   {out}/probe-{name}.csv" for name in results.probed)
    )
    return record


def _tables(results: Results) -> dict[str, pandas.DataFrame]:
    """What is told of every run and measurement, beside the report's own table."""
    # Where nothing was trained, what was measured is the result.
    measured = {"results": results.table if len(results.table) else results.measurements}
    measured["measurements"] = results.measurements
    tables = {name: content for name, content in measured.items() if content is not None and len(content)}
    return tables | {f"probe-{name}": content for name, content in results.probed.items()}


def _judged(verdict: Verdict) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "id": claim.id,
        "statement": claim.statement,
        "section": claim.section,
        "paper": claim.paper,
        "measured": verdict.measured,
        "verdict": verdict.verdict,
        "evidence": verdict.evidence,
        "falsifier": claim.falsifier,
        "beyond": claim.beyond,
    }


def _for_page(drawing: Drawing) -> dict[str, str]:
    light, dark = map(base64.b64encode, render_for_page(drawing.figure))
    return {"light": light.decode(), "dark": dark.decode()}


def _remove_report(out: Path, *, but: tuple[Collection[str], Collection[str]]) -> None:
    """Removes what a report that is there already has beside it, but for the names of the figures and tables that are going to
    be replaced. Its verdict goes first of all, since a verdict that is there has its report beside it."""
    figures, tables = _written_before(out, "figures"), _written_before(out, "tables") | {"results", "measurements"}
    (out / "verdict.json").unlink(missing_ok=True)
    for name in figures.difference(but[0]):
        for kind in FIGURES:
            (out / f"{name}.{kind}").unlink(missing_ok=True)
    for name in tables.difference(but[1]):
        (out / f"{name}.csv").unlink(missing_ok=True)


def _written_before(out: Path, kind: str) -> set[str]:
    """Names of the "figures" or "tables" of a report that is there already."""
    try:
        return set(json.loads((out / "verdict.json").read_text())[kind])
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it cannot be read
        return set()


def summary(study: Study, verdicts: Sequence[Verdict], setting: str, results: Results) -> str:
    """The verdict in one paragraph."""
    said = " ".join(f"{verdict.claim.id} {verdict.verdict}: {verdict.measured}." for verdict in verdicts)
    return f"{study.title} ({_setting(setting, results)}{_what(study, results)}). {said}"


def _setting(setting: str, results: Results) -> str:
    """What the setting is. A count's is no recipe."""
    nothing = not results.runs and not getattr(results.options, "weights", ())
    return f"{setting} setting; nothing was trained" if nothing else SETTINGS[setting]


def _what(study: Study, results: Results) -> str:
    """What was trained on what, behind a semicolon: the data, and a block or shortcut that is not the usual one."""
    own = {"data": results.options.data_name} if results.runs else {}
    own |= {name: ours for name, (ours, _) in study.built_of(results.options).items()}
    return "".join(f"; {name}: {value}" for name, value in own.items())


def _made(record: dict[str, Any]) -> dict[str, str]:
    """How it was made, beside the command: when, in what time, on what, by which versions and commit."""
    rest = {
        name: " or ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in record["environment"].items()
        if value is not None
    }
    time = f"{duration(record['config']['seconds_of_study'])} for the command"
    if trained := record["config"]["seconds_of_training"]:
        time = f"{duration(trained)} of training, summed over all runs; {time}"
    commit = rest.pop("commit", "") + (", with local changes" if rest.pop("local_changes", False) else "")
    processes = rest.pop("processes", 1)
    threads = rest.pop("threads")
    computed = [rest.pop("precision"), "1 thread" if threads == 1 else f"{threads} threads"]
    if "step" in rest:
        computed.append(f"{rest.pop('step')} step")
    if rest.pop("deterministic", False):
        computed.append("deterministic")
    made = {
        "date": rest.pop("date"),
        "time": time,
        "device": f"{rest.pop('device')}; {', '.join(computed)}",
        "processes": f"{processes}" if processes > 1 else "",
        "probes": ", ".join(f"{name}.csv" for name in record["tables"] if name.startswith("probe-")),
        "platform": rest.pop("platform"),
        "commit": commit,
        "versions": ", ".join(f"{name} {version}" for name, version in rest.items()),
    }
    return {name: value for name, value in made.items() if value}


def _departures(study: Study, results: Results, environment: dict[str, Any]) -> list[str]:
    """What differs from the paper, a line each. A line that holds for one recipe alone begins with its name, and one that holds
    at one depth alone also with the depth."""
    from resprobe.study import is_imagenet

    found = []
    data, _, path = results.options.data.partition(":")
    if (weights := bool(getattr(results.options, "weights", ()))) or results.runs:
        if data == "folder":
            if path and not (study.paper_data == "ImageNet" and is_imagenet(results.options.data)):
                found.append(f"data: the folder {Path(path).name} instead of {study.paper_data}")
        elif data != study.paper_data.lower().replace("-", ""):
            found.append(f"data: {data} instead of {study.paper_data}")
    if not all(claim.beyond for claim in study.claims):  # else what is built is the question, and the paper has none
        found += [f"{name}: {ours} instead of {its}" for name, (ours, its) in study.built_of(results.options).items()]
    if weights:
        found.append("weights that were trained elsewhere, by a recipe that is not known here")
    trained = dict.fromkeys((run.config.recipe, run.config.network.depth) for run in results.runs)
    lines = {(recipe, depth): _of_recipe(study, recipe, depth) for recipe, depth in trained}
    for (recipe, depth), own in lines.items():
        for line in own:
            lacking = [other for other, theirs in lines.items() if line not in theirs]
            where = "" if not lacking else f"{recipe.name}: "
            if any(other == recipe for other, _ in lacking):
                where = f"{recipe.name}, {depth} layers: "
            found.append(f"{where}{line}")
    for network in dict.fromkeys(run.config.network for run in results.runs):
        width, usual = network.get("width"), _usual_width(network)
        if width != usual is not None:
            found.append(f"width: {width} filters in the first stage instead of {usual}")
    if study.departs is not None:
        found += study.departs(results.options)
    processes = environment.get("processes", 1)
    if processes > 1 and any(recipe.bn_batch is None for recipe, _ in trained):
        found.append(f"batch normalization over the images of each of {processes} processes, not over the mini-batch")
    return list(dict.fromkeys(found))


def _of_recipe(study: Study, recipe: Recipe, depth: int | None) -> list[str]:
    """How a recipe departs from the one that the paper trained networks of the study's claims by."""
    if study.paper_data == "ImageNet":
        return departures(recipe, imagenet_paper())
    if recipe.augmentation == "scale-crop":  # images from files, which the paper's recipe for CIFAR-10 says nothing of
        return [
            "recipe: that for ImageNet (§3.4) instead of that for CIFAR-10 (§4.2)",
            *departures(recipe, imagenet_paper()),
        ]
    return departures(recipe, cifar_paper(depth=depth))


def _usual_width(network: NetworkSpec) -> object:
    """The width that the network's family has by default; None for a family that is not ours, or has no width."""
    try:
        return resolve(network.name).get("width")
    except UsageError:  # it was built elsewhere
        return None


def _how_sure(results: Results) -> str:
    if not results.runs and getattr(results.options, "weights", ()):
        return (
            "weights trained elsewhere, as many a network as were given; of which iteration they are is not known here. "
            f"Where there are several of a network, one-sided Welch tests with p < {LEVEL} decide; of one there is no spread "
            "to judge by."
        )
    seeds = len(results.options.seeds)
    runs = f"{seeds} seed{'s' if seeds != 1 else ''} a network"
    if seeds < 2:
        return f"{runs}: there is no spread to judge by, so every comparison over seeds is inconclusive."
    figures = "figures are mean ± standard deviation over seeds of the last iteration, never the best one"
    return f"{runs}; {figures}. {rule_of_order()}"


def _left_out(results: Results) -> str:
    """The trainings that diverged, and are in no figure."""
    seeds = "; ".join(f"{name}, seeds {' '.join(map(str, left))}" for name, left in results.left_out.items())
    return f"Left out are trainings that diverged ({seeds}): all figures are of those that did not." if seeds else ""


def render_template(template: str, page: dict[str, Any]) -> str:
    """The text of one of resprobe's templates with what `page` holds; in those of HTML nothing is taken for markup."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("resprobe"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(page)
