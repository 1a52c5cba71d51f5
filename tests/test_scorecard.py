"""The scorecard: it says what the reports say, says what is not tested, and a study that fails does not stop the others."""

import base64
import dataclasses
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas
import pytest
import torch
from PIL import Image

import resprobe as rp
from resprobe import sweep
from resprobe.estimates import Cost
from studies import scorecard
from studies.scorecard import UNTESTED, Forecast, Row, find_studies, gather, run_studies, table, write

ROOT = Path(__file__).parent.parent


def claim(id: str, statement: str = "Deeper is <better>", *, beyond: bool = False) -> rp.Claim:
    return rp.Claim(id, statement, "§4.2", "6.43 % | 110 layers", f"{id} is refuted", beyond)


def fabricated(name: str, *claims: rp.Claim, **changes) -> rp.Study:
    """A study that trains nothing."""
    presets = {"quick": rp.Options(), "paper": rp.Options(preset="paper", data="cifar10")}
    study = rp.Study(
        name, name, claims, presets, lambda _: [], lambda _: [], lambda _: {}, lambda _: pandas.DataFrame()
    )
    return dataclasses.replace(study, **changes)


def report(
    results: Path,
    study: str,
    verdicts: dict[str, str],
    *,
    setting: str = "quick",
    date: str = "2026-11-21T10:00:00+00:00",
    seconds: float = 60.0,
    folder: str = "",
) -> Path:
    """A study's report, as far as the scorecard reads it."""
    where = results / (folder or study)
    where.mkdir(parents=True)
    Image.new("RGB", (1600, 800), (200, 30, 30)).save(where / "figure.png")
    Image.new("RGB", (900, 900), (30, 30, 200)).save(where / "figure-depth.png")
    (where / "report.html").write_text("<title>a report</title>")
    claims = [
        dataclasses.asdict(claim(id))
        | {"measured": f"{id}: 7 ± 1 %", "verdict": verdict, "evidence": f"{id}: p = 0.01"}
        for id, verdict in verdicts.items()
    ]
    record = {
        "study": study,
        "setting": setting,
        "claims": claims,
        "config": {
            "command": f"python -m studies.{study} --seeds 0 1",
            "options": {"data": "digits:some/where", "seeds": [0, 1]},
            "seconds_of_training": seconds,
        },
        "environment": {"date": date},
        "figures": {"figure-depth": "Error against depth.", "figure": "Errors, one line a depth."},
    }
    (where / "verdict.json").write_text(json.dumps(record))
    return where


def shown(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Of the studies' claims only."""
    return [(row.claim.id, row.study, row.verdict) for row in rows if row.study]


# -- what is on the page ---------------------------------------------------------------------------------------------


def test_claims_come_by_number_each_once_a_study_and_ours_last(tmp_path):
    first = fabricated("first", claim("R1", beyond=True), claim("C10"), claim("C12"))
    second = fabricated("second", claim("C2"), claim("C3b"), claim("C3a"), claim("C12"), claim("C2b", beyond=True))
    rows = gather([first, second], tmp_path)
    assert [(id, study) for id, study, _ in shown(rows)] == [
        ("C2", "second"),
        ("C3a", "second"),
        ("C3b", "second"),
        ("C10", "first"),
        ("C12", "first"),
        ("C12", "second"),
        ("C2b", "second"),
        ("R1", "first"),
    ]
    assert [row.claim.id for row in rows if row.claim.beyond] == ["C2b", "R1"]


def test_a_row_says_what_the_report_says(tmp_path):
    report(tmp_path, "depth", {"C1": "holds", "C2": "fails"})
    one, two, *_ = gather([fabricated("depth", claim("C1"), claim("C2"))], tmp_path)
    assert (one.verdict, two.verdict) == ("holds", "fails")
    assert (one.measured, one.evidence, one.setting) == ("C1: 7 ± 1 %", "C1: p = 0.01", "quick")
    assert (one.data, one.seeds, one.date[:10]) == ("digits", 2, "2026-11-21")
    assert one.command == "python -m studies.depth --seeds 0 1"


def test_an_audit_rests_on_no_data_and_no_seeds(tmp_path):
    report(tmp_path, "audit", {"C1": "holds"}, seconds=0)
    row = gather([fabricated("audit", claim("C1"))], tmp_path)[0]
    assert (row.data, row.seeds, row.verdict) == ("", None, "holds")


def test_without_a_report_a_claim_is_not_tested(tmp_path):
    row = gather([fabricated("depth", claim("C1"))], tmp_path / "nothing")[0]
    assert (row.verdict, row.measured, row.evidence) == ("not tested", "", "no run yet")
    assert row.command == "python -m studies.depth"


def test_the_newest_report_of_a_study_counts(tmp_path):
    report(tmp_path, "depth", {"C1": "holds"}, folder="a", date="2026-11-22T10:00:00+00:00", setting="paper")
    report(tmp_path, "depth", {"C1": "fails"}, folder="b", date="2026-11-21T10:00:00+00:00")
    row = gather([fabricated("depth", claim("C1"))], tmp_path)[0]
    assert (row.verdict, row.setting) == ("holds", "paper")


def test_a_claim_that_the_study_has_given_up_is_gone_and_a_new_one_not_tested(tmp_path):
    report(tmp_path, "depth", {"C1": "holds", "C2": "holds"})
    rows = gather([fabricated("depth", claim("C1"), claim("C4", "New"))], tmp_path)
    assert shown(rows) == [("C1", "depth", "holds"), ("C4", "depth", "not tested")]


def test_the_report_of_a_study_that_is_not_here_is_shown(tmp_path):
    report(tmp_path, "strangers", {"C1": "inconclusive"})
    assert shown(gather([], tmp_path)) == [("C1", "strangers", "inconclusive")]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"study": "depth", "config": {"seconds_of_training": 1}}'])
def test_a_damaged_report_is_passed_over_with_a_warning(tmp_path, content):
    report(tmp_path, "depth", {"C1": "holds"})
    report(tmp_path, "other", {"C2": "holds"})
    (tmp_path / "depth" / "verdict.json").write_text(content)
    with pytest.warns(UserWarning, match=r"depth.verdict\.json cannot be read and is passed over"):
        rows = gather([fabricated("depth", claim("C1"))], tmp_path)
    assert shown(rows) == [("C1", "depth", "not tested"), ("C2", "other", "holds")]


def test_a_verdict_that_does_not_exist_is_not_shown(tmp_path):
    report(tmp_path, "depth", {"C1": "proven"})
    with pytest.warns(UserWarning, match="verdict .='proven'. is unknown"):
        assert shown(gather([], tmp_path)) == []


def test_what_no_study_states_is_not_tested_with_the_reason():
    untested = {row.claim.id: row for row in gather([], Path("nowhere"))}
    assert list(untested) == [each.id for each in UNTESTED]
    assert all(row.verdict == "not tested" and row.evidence and not row.study for row in untested.values())


def test_a_study_takes_the_place_of_what_was_not_tested(tmp_path):
    rows = gather([fabricated("others", claim("C22*"), claim("C17"))], tmp_path)
    assert [row.study for row in rows if row.claim.id.startswith("C22")] == ["others"]
    assert "C17*" in [row.claim.id for row in rows], "the study tests the small form only"


def test_every_claim_of_the_paper_is_there():
    found, _ = find_studies()
    numbers = {
        int(re.search(r"\d+", row.claim.id)[0]) for row in gather(found, Path("nowhere")) if not row.claim.beyond
    }
    assert numbers == set(range(1, 25))


@pytest.fixture
def page(tmp_path) -> tuple[str, str, dict]:
    """The page, its Markdown and its JSON, of one claim each of the four verdicts."""
    results = tmp_path / "results"
    report(results, "depth", {"C1": "holds", "C2": "fails", "C3": "inconclusive", "C4": "not tested"}, setting="custom")
    report(results, "ours", {"R1": "holds"}, seconds=0)
    known = [fabricated("depth", *map(claim, ("C1", "C2", "C3", "C4"))), fabricated("ours", claim("R1", beyond=True))]
    out = results / "scorecard"
    write(gather(known, results), out)
    return (
        (out / "report.html").read_text(),
        (out / "report.md").read_text(),
        json.loads((out / "scorecard.json").read_text()),
    )


def test_the_json_has_every_row(page):
    record = page[2]
    assert record["counts"] == {"holds": 2, "fails": 1, "inconclusive": 1, "not tested": 1 + len(UNTESTED)}
    one = record["claims"][0]
    assert one | {"date": ""} == dataclasses.asdict(claim("C1")) | {
        "study": "depth",
        "verdict": "holds",
        "measured": "C1: 7 ± 1 %",
        "evidence": "C1: p = 0.01",
        "setting": "custom",
        "data": "digits",
        "seeds": 2,
        "date": "",
        "command": "python -m studies.depth --seeds 0 1",
        "alt": "Errors, one line a depth.",
        "report": "../depth/report.html",
    }
    assert {each["report"] for each in record["claims"]} == {"../depth/report.html", "../ours/report.html", None}


def test_the_page_shows_verdicts_by_sign_and_word_and_links_the_reports(page, tmp_path):
    text = page[0]
    cards = dict(re.findall(r'<section class="claim [a-z-]+" id="([\w-]+)">(.*?)</section>', text, re.DOTALL))
    assert list(cards)[:4] == ["C1-depth", "C2-depth", "C3-depth", "C4-depth"]
    for anchor, sign, word in (
        ("C1-depth", "✓", "holds"),
        ("C2-depth", "✗", "fails"),
        ("C3-depth", "?", "inconclusive"),
        ("C4-depth", "–", "not tested"),
    ):
        assert f'<span aria-hidden="true">{sign}</span> {word}</span>' in cards[anchor]
        assert '<span class="badge">custom</span>' in cards[anchor]
        assert f'href="#{anchor}"' in text
    one = cards["C1-depth"]
    assert "C1: 7\u00a0±\u00a01 %" in one and "6.43 % | 110 layers (§4.2)" in one and "C1 is refuted" in one
    assert "Deeper is &lt;better&gt;" in one
    assert "digits, n = 2 seeds; 2026-11-21" in one and "<code>python -m studies.depth --seeds 0 1</code>" in one
    assert "<dt>why</dt><dd>C4: p = 0.01</dd>" in cards["C4-depth"]
    assert "seed" not in re.sub(r"<dd><code>.*?</code></dd>", "", cards["R1-ours"])
    assert "their networks are not trained here" in cards["C22"]
    for link in set(re.findall(r'href="((?!data:)[^#"]+)"', text)):
        assert (tmp_path / "results/scorecard" / html.unescape(link)).is_file()
    assert text.index("Claims of the paper") < text.index('id="C22"') < text.index("Beyond the paper</h2>")


def test_the_picture_is_the_first_figure_small_and_within_the_page(page):
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page[0])
    assert len(pictures) == 5
    assert pictures[0][1] == "Errors, one line a depth."
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0][0]))).convert("RGB")
    assert picture.size == (560, 280)
    red, _, blue = picture.getpixel((100, 100))
    assert red > blue, "figure.png, not figure-depth.png"
    assert not re.search(r'(src|href)="(https?:)?//', page[0])


def test_the_page_has_the_counts_and_the_markdown_a_row_a_claim(page):
    for sign, number, word in (("✓", 2, "holds"), ("✗", 1, "fails"), ("–", 1 + len(UNTESTED), "not tested")):
        assert f'<span aria-hidden="true">{sign}</span> <strong>{number}</strong> {word}' in page[0]
    rows = [line for line in page[1].splitlines() if line.startswith(("| C", "| R"))]
    assert len(rows) == 5 + len(UNTESTED)
    assert rows[0] == (
        r"| C1 Deeper is <better> (§4.2) | 6.43 % \| 110 layers | C1: 7 ± 1 % | ✓ holds "
        "| custom, digits, n = 2; [depth](../depth/report.html) |"
    )


def test_the_table_in_the_terminal_fits_its_width(tmp_path):
    report(tmp_path, "depth", {"C1": "holds"})
    lines = table(gather([fabricated("depth", claim("C1", "word " * 40))], tmp_path), 80).splitlines()
    assert lines[0].startswith("✓ C1    holds         quick   depth  word word")
    assert len(lines) == 1 + len(UNTESTED) and max(map(len, lines)) == 80


# -- which studies there are -----------------------------------------------------------------------------------------


def package(folder: Path, **modules: str) -> Path:
    """A package of fabricated studies, with the scorecard and the list of this one."""
    (folder / "studies").mkdir()
    for name in ("__init__", "__main__", "scorecard"):
        shutil.copy(ROOT / "studies" / f"{name}.py", folder / "studies")
    for name, body in modules.items():
        (folder / "studies" / f"{name}.py").write_text(textwrap.dedent(body))
    return folder


GOOD = """
    import resprobe as rp

    CLAIM = rp.Claim({id!r}, "It is so", "§1", "1", "it is not so")

    def judge(results):
        {act}
        return [rp.Verdict(CLAIM, "holds", "2", f"on {{results.device}}")]

    def tabulate(results):
        import pandas
        return pandas.DataFrame([{{"network": "none"}}])

    study = rp.Study({name!r}, "A title", (CLAIM,), {{"quick": rp.Options()}}, lambda _: [], judge, lambda _: {{}}, tabulate)
    """


def good(name: str, id: str, act: str = "") -> str:
    return textwrap.dedent(GOOD).format(name=name, id=id, act=act or "pass")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "COLUMNS": "100"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_study_that_does_not_import_does_not_take_the_list_down(tmp_path):
    package(tmp_path, later=good("later", "C10"), early=good("early", "C9"), half="def plan(:", helpers="x = 1")
    listed = call(tmp_path, "studies")
    assert listed.returncode == 1
    assert listed.stderr == "error: studies.half does not import: SyntaxError: invalid syntax (half.py, line 1)\n"
    assert listed.stdout.startswith(
        "python -m studies.early\n    C9   not tested             It is so (§1)\npython -m studies.later\n"
    )
    assert "(no study tests C17*, C22*)" in listed.stdout


def test_the_list_does_not_wait_for_torch(tmp_path):
    package(tmp_path, early=good("early", "C9"))
    code = "import sys, runpy; sys.argv = ['studies']\ntry: runpy.run_module('studies', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code\nassert not {'torch', 'pandas'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)


def test_the_scorecard_is_no_study_of_its_own():
    found, _ = find_studies()
    assert {"degradation", "complexity"} <= {study.name for study in found}
    assert "scorecard" not in {study.name for study in found}


# -- running them ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_studies_that_fail_do_not_stop_the_others(tmp_path):
    package(
        tmp_path,
        bug=good("bug", "C1", "raise KeyError('depth')"),
        mistake=good("mistake", "C2", "raise rp.UsageError('depth (=7) must be even')"),
        killed=good("killed", "C3", "import os; os._exit(9)"),
        fine=good("fine", "C4"),
        half="def plan(:",
    )
    done = call(tmp_path, "studies.scorecard", "--run", "quick", "--device", "cpu")
    assert done.returncode == 1
    assert re.findall(r"^\[\d/4\] \w+", done.stdout, re.MULTILINE) == [
        "[1/4] bug",
        "[2/4] mistake",
        "[3/4] killed",
        "[4/4] fine",
    ]
    assert re.search(r"^\[4/4\] fine: \d+ s so far, nothing left to train$", done.stdout, re.MULTILINE)
    assert "1 of 4 studies done in " in done.stdout
    assert done.stderr.splitlines()[-4:] == [
        "error: studies.half does not import: SyntaxError: invalid syntax (half.py, line 1)",
        "error: studies.bug failed: judge of study 'bug' fails: KeyError: 'depth' (bug.py, line 7)",
        "error: studies.mistake failed: depth (=7) must be even",
        "error: studies.killed failed: its process was ended from outside (code 9); out of memory?",
    ]
    assert "Traceback" not in done.stderr
    record = json.loads((tmp_path / "results/scorecard/scorecard.json").read_text())
    verdicts = {each["id"]: each["verdict"] for each in record["claims"]}
    assert [verdicts[id] for id in ("C1", "C2", "C3", "C4")] == ["not tested"] * 3 + ["holds"]
    (fine,) = (each for each in record["claims"] if each["id"] == "C4")
    assert fine["command"] == "python -m studies.fine --device cpu"
    assert (tmp_path / "results/scorecard" / fine["report"]).is_file()


@pytest.fixture
def at_once(monkeypatch):
    """Studies run in this process."""
    monkeypatch.setattr(scorecard, "_in_a_process", lambda function, *arguments: function(*arguments))


def test_progress_counts_studies_and_the_training_that_is_left(at_once, monkeypatch, capsys):
    ahead = {"a": Forecast(200.0), "b": Forecast(30.0, whole=False), "c": Forecast(0.0)}
    done = []
    monkeypatch.setattr(scorecard, "_look_ahead", lambda commands: ahead)
    monkeypatch.setattr(scorecard, "_run", lambda name, arguments: done.append((name, arguments)))
    assert run_studies({"a": ["--seeds", "0"], "b": [], "c": []}) == {}
    assert done == [("a", ["--seeds", "0"]), ("b", []), ("c", [])]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines == [
        "[1/3] a: 1 s so far, at least 4 min of training left",
        "[2/3] b: 1 s so far, at least 30 s of training left",
        "[3/3] c: 1 s so far, nothing left to train",
    ]
    done.clear()
    assert run_studies({"a": [], "b": []}, dry_run=True) == {} and not done
    assert (
        "a: about 3 min of training left\nb: at least 30 s of training left\nall: at least" in capsys.readouterr().out
    )


def small(name: str, *depths: int, **changes) -> rp.Study:
    """A study that trains residual networks, one run each."""
    options = rp.Options(seeds=(0,), iterations=4, depths=depths, device="cpu", concurrency="1")

    def plan(options: rp.Options) -> list[rp.Planned]:
        return [rp.Planned({"depth": depth}, f"cifar/resnet-{depth}", {"width": 4}) for depth in options.depths]

    return fabricated(name, claim("C1"), presets={"quick": options}, plan=plan, **changes)


def test_a_run_that_two_studies_share_is_counted_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "costs", lambda needed, *_, **__: [Cost(step=1.0, test=0.0)] * len(needed))
    known = {
        "one": small("one", 8, 14),
        "two": small("two", 14, 20),
        "three": small("three", 8),
        "more": small("more", 26, then=lambda _: []),
    }
    monkeypatch.setattr(scorecard, "_study", known.__getitem__)
    ahead = scorecard._look_ahead({name: [] for name in known} | {"absent": []})
    assert ahead == {
        "one": Forecast(8.0),
        "two": Forecast(4.0),
        "three": Forecast(0.0),
        "more": Forecast(4.0, whole=False),  # its second round is not known
        "absent": Forecast(0.0, whole=False),  # running it says why
    }


def test_a_survey_looks_into_the_second_round_when_the_first_is_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def then(results: rp.Results) -> list[rp.Planned]:
        assert results.table["depth"].tolist() == [8]
        return [rp.Planned({"depth": 14}, "cifar/resnet-14", {"width": 4})]

    first, both = small("first", 8), small("both", 8, then=then)
    (ahead,) = both.survey(both.parse([]))
    assert [job.config.network.depth for job in ahead.missing] == [8]
    store = rp.RunStore("runs")
    sweep.run_all(ahead.missing, store, device=torch.device("cpu"))
    capsys.readouterr()
    assert [len(ahead.missing) for ahead in first.survey(first.parse([]))] == [0]
    done, ahead = both.survey(both.parse([]))
    assert (done.found, [job.config.network.depth for job in ahead.missing]) == (1, [14])
    assert capsys.readouterr().out == ""
    assert both.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 run: 1 finished already, nothing to train\n1 run: 0 finished already, 1 to train\n")
    assert "second round" not in said


def test_studies_are_called_with_what_was_asked_for_and_no_more():
    from studies import complexity, degradation

    asked = {"device": "auto", "runs": "runs", "out": ""}
    arguments = scorecard.arguments_for
    assert arguments(degradation.study, "quick", asked) == []
    assert arguments(degradation.study, "paper", asked, ["cifar10:here", "folder:there"]) == [
        "--preset", "paper", "--data", "cifar10:here",
    ]  # fmt: skip
    asked = {"device": "cpu", "runs": "else", "out": "r/x"}
    assert arguments(degradation.study, "quick", asked) == ["--device", "cpu", "--runs", "else", "--out", "r/x"]
    assert arguments(complexity.study, "quick", asked) == ["--device", "cpu", "--out", "r/x"], "it trains nothing"
    complexity.study.parse(arguments(complexity.study, "paper", asked))


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def three(monkeypatch, tmp_path, at_once):
    """Three studies, of which `c` has no paper preset, and what they are run with."""
    monkeypatch.chdir(tmp_path)
    known = [fabricated(name, claim(id)) for name, id in (("a", "C1"), ("b", "C2"))]
    known.append(fabricated("c", claim("C3"), presets={"quick": rp.Options()}))
    called = {}
    monkeypatch.setattr(scorecard, "find_studies", lambda: (known, {}))
    monkeypatch.setattr(scorecard, "run_studies", lambda commands, dry_run: called.update(commands) or {})
    return called


def test_all_studies_are_run_or_those_that_are_named(three):
    assert scorecard.main(["--run", "quick"]) == 0
    assert three == {"a": [], "b": [], "c": []}
    three.clear()
    assert scorecard.main(["--run", "paper", "--results", "r", "--data", "cifar10:/", "--studies", "b", "c"]) == 0
    assert three == {"b": ["--preset", "paper", "--out", "r/b", "--data", "cifar10:/"]}
    assert Path("r/scorecard/report.html").is_file()


def test_a_dry_run_writes_nothing(three, tmp_path):
    assert scorecard.main(["--run", "quick", "--dry-run"]) == 0
    assert list(three) == ["a", "b", "c"] and not list(tmp_path.iterdir())


def test_without_run_the_page_is_written_and_nothing_is_run(three, capsys):
    assert scorecard.main([]) == 0
    assert not three
    said = capsys.readouterr().out
    assert f"{3 + len(UNTESTED)} verdicts: 0 holds, 0 fails, 0 inconclusive, {3 + len(UNTESTED)} not tested\n" in said
    assert said.endswith(f"report:  {Path('results/scorecard/report.html')}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--run quik", "--run (='quik') is unknown; accepted: quick, paper; nearest: quick"),
        ("--run quick --studies d", "studies (='d') is unknown; accepted: a, b, c"),
        ("--studies a", "--studies says what to run; it needs --run quick or --run paper"),
        ("--dry-run", "--dry-run says what to run; it needs --run quick or --run paper"),
        ("--run quick --device gpu", "device (='gpu') is unknown; accepted: auto, cpu, cuda, mps; nearest: cuda"),
        ("--run quick --runs /dev/null/runs", "runs (='/dev/null/runs') cannot be written to: Not a directory"),
        ("--run paper --data cifar10:absent --dry-run", "data (='cifar10:absent'): there is no absent"),
        ("--run quick --data cifar10:x", "--data is for --run paper; the quick presets run on embedded data"),
        ("--run paper --data cifar100:x", "data (='cifar100:x') is unknown; accepted: cifar10; nearest: cifar10"),
        ("--results nowhere", "--results (='nowhere') is not a folder"),
        ("--resluts x", "option (='--resluts') is unknown; accepted: --help, --results, --out, --run, --studies, --data, "
         "--device, --runs, --dry-run; nearest: --results"),
        ("--run", "argument --run: expected one argument"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(three, capsys, arguments, said):
    assert scorecard.main(arguments.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not three


def test_an_interruption_says_what_is_kept(three, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scorecard, "run_studies", interrupt)
    assert scorecard.main(["--run", "quick"]) == 1
    said = "error: interrupted; finished studies, runs and checkpoints are kept, the same command goes on from there\n"
    assert capsys.readouterr().err == said


def test_the_exit_code_tells_of_a_failed_study(three, monkeypatch, capsys):
    monkeypatch.setattr(scorecard, "run_studies", lambda *_, **__: {"b": "failed: no data"})
    assert scorecard.main(["--run", "quick"]) == 1
    assert capsys.readouterr().err == "error: studies.b failed: no data\n"


def test_told_to_end_it_ends_the_study_too(tmp_path):
    """`kill` tells the first process alone."""
    command = [sys.executable, "-u", "-m", "studies.scorecard", "--run", "quick", "--studies", "convergence"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    errors = tmp_path / "stderr"  # a pipe that nobody reads meanwhile may be full
    with errors.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=stream, text=True
        )
    try:
        for line in process.stdout:
            if line.startswith("time: "):  # the study is about to train
                break
        process.terminate()
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert errors.read_text().endswith(
        "interrupted; finished studies, runs and checkpoints are kept, the same command goes on from there\n"
    )
