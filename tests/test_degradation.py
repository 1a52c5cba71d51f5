"""The degradation study: its verdicts follow the data, and its command line does what it says."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pandas
import pytest
import torch

import resprobe as rp
from resprobe.errors import StorageError, TrainingDiverged
from resprobe.planning import replaced_report
from studies import convergence, ensemble
from studies.degradation import judge, plan, study

ROOT = Path(__file__).parent.parent


def results(errors: dict[tuple[str, int], list[float]], **changed) -> rp.Results:
    """A study's results with given training errors; test errors a point above."""
    rows, histories = [], []
    for (kind, depth), seeds in errors.items():
        for seed, error in enumerate(seeds):
            labels = {"kind": kind, "depth": depth, "seed": seed}
            figures = {"train_error": error, "train_error_single_view": error, "test_error": error + 1}
            rows.append(labels | figures | {"parameters": 10, "seconds": 1.0})
            for iteration in (1, 2):
                histories.append(
                    labels | {"iteration": iteration, "train_error": error, "test_error": error + 1 + 9 / iteration}
                )
    depths = tuple(sorted({depth for _, depth in errors}))
    seeds = tuple(range(len(next(iter(errors.values())))))
    options = rp.Options(**({"data": "digits", "depths": depths, "seeds": seeds} | changed))
    return rp.Results(options, pandas.DataFrame(rows), pandas.DataFrame(histories), [])


PAPER_LIKE = {
    ("plain", 20): [9.4, 9.6, 9.5],
    ("plain", 56): [13.4, 13.6, 13.5],
    ("residual", 20): [8.7, 8.8, 8.6],
    ("residual", 56): [6.9, 7.0, 6.8],
}


def verdicts(errors) -> dict[str, str]:
    return {verdict.claim.id: verdict.verdict for verdict in judge(results(errors))}


def test_errors_as_in_the_paper_confirm_both_claims():
    assert verdicts(PAPER_LIKE) == {"C1": "holds", "C2": "holds"}


def test_plain_networks_that_do_not_degrade_refute_the_first_claim():
    assert verdicts(PAPER_LIKE | {("plain", 56): [9.3, 9.5, 9.4]})["C1"] == "fails"


def test_residual_networks_that_do_not_gain_refute_the_second_claim():
    assert verdicts(PAPER_LIKE | {("residual", 56): [9.9, 9.8, 10.0]})["C2"] == "fails"


def test_residual_networks_that_fit_every_training_image_do_not_refute_the_second_claim():
    """As on the embedded digits, where all depths err on about 2 % of the test images."""
    fitted = {("residual", 20): [0.0, 0.0, 0.0], ("residual", 56): [0.0, 0.0, 0.0]}
    _, second = judge(results(PAPER_LIKE | fitted))
    assert second.verdict == "not tested"
    assert "fits every training image" in second.evidence
    assert judge(results(PAPER_LIKE | fitted | {("residual", 56): [0.0, 0.0, 0.1]}))[1].verdict == "not tested"
    for unfitted in ({("residual", 20): [0.0, 0.0, 0.1]}, {("residual", 56): [3.0, 3.1, 2.9]}):
        _, second = judge(results(PAPER_LIKE | fitted | unfitted))
        assert second.verdict == "fails"
        assert "fits every training image" not in second.evidence


DEEPEST = {("plain", 110): [65.0, 66.0, 64.0], ("residual", 110): [6.4, 6.5, 6.3]}


def test_plain_networks_are_compared_up_to_56_layers():
    flat = {("plain", 56): [9.3, 9.5, 9.4]}
    assert verdicts(PAPER_LIKE | DEEPEST) == {"C1": "holds", "C2": "holds"}
    assert verdicts(PAPER_LIKE | DEEPEST | flat)["C1"] == "fails"  # however bad the 110-layer network is
    first = judge(results(PAPER_LIKE | DEEPEST))[0]
    assert "→ 65.00 ± 1.00 % at 20, 56, 110 layers" in first.measured
    without_56 = {key: errors for key, errors in (PAPER_LIKE | DEEPEST).items() if key[1] != 56}
    assert verdicts(without_56) == {"C1": "holds", "C2": "holds"}
    drawings = study.draw(results(PAPER_LIKE | DEEPEST))
    for name, edge in (("figure", "110 layers ↑ 70 %"), ("figure-depth", "plain ↑ 66 %")):
        assert "named at its edge" in drawings[name].caption
        axes = drawings[name].figure.axes
        assert edge in [text.get_text() for axis in axes for text in axis.texts]
        assert all(20 <= axis.get_ylim()[1] < 22 for axis in axes)
    drawn = drawings["figure-1"]
    assert drawn.caption.startswith("Plain networks of 20 and 56 layers")
    assert "110" not in drawn.alt


@pytest.mark.parametrize("depth", [56, 110])
def test_residual_networks_must_gain_at_56_layers_and_at_the_deepest(depth):
    worse = {("residual", depth): [9.9, 9.8, 10.0]}
    assert verdicts(PAPER_LIKE | DEEPEST | worse)["C2"] == "fails"


def test_in_the_papers_setting_errors_stand_beside_table_6():
    close = PAPER_LIKE | {("residual", 20): [7.75, 7.85, 7.65], ("residual", 56): [6.6, 6.7, 6.5]}  # test errors + 1
    ours = results(close, data="cifar10:somewhere")
    beside = study.tabulate(ours)["paper's test error (%)"].tolist()
    assert beside[2:4] == ["8.75 (+0.00, within ±0.50)", "6.97 (+0.63, beyond ±0.50)"]
    mean_of_five = {("residual", 110): [5.6, 5.7, 5.53], ("plain", 110): [60.0, 61.0, 62.0]}
    assert (
        study.tabulate(results(close | mean_of_five, data="cifar10"))["paper's test error (%)"][5]
        == "6.61 (+0.00, within ±0.50)"
    )
    evidence = "1 of 2 test errors are within max(0.5 points, 2 std) of Table 6's"
    assert evidence in judge(ours)[1].evidence
    spread = close | {("residual", 56): [6.6, 7.1, 6.1]}
    assert "2 of 2 test errors" in judge(results(spread, data="cifar10"))[1].evidence
    for other in ({"data": "digits"}, {"iterations": 2_000}, {"shortcut": "B"}):
        ours = results(close, **({"data": "cifar10"} | other))
        assert "Table 6" not in judge(ours)[1].evidence
        assert "within" not in study.tabulate(ours).to_string()


def test_other_methods_are_quoted_beside_those_on_cifar_10_alone():
    table = study.tabulate(results(PAPER_LIKE, data="cifar10"))
    quoted = table[table["network"].str.endswith("(quoted)")].set_index("network")
    assert quoted["paper's test error (%)"].to_dict() == {
        "Maxout (quoted)": "9.38",
        "NIN (quoted)": "8.81",
        "DSN (quoted)": "8.22",
        "FitNet-19 (quoted)": "8.39",
        "Highway-19 (quoted)": "7.72",
        "Highway-32 (quoted)": "8.80",
    }
    assert set(quoted["test error (%)"]) == {"–"}
    assert "quoted" not in study.tabulate(results(PAPER_LIKE)).to_string()


def test_one_seed_is_inconclusive():
    assert set(verdicts({key: values[:1] for key, values in PAPER_LIKE.items()}).values()) == {"inconclusive"}


def test_one_depth_is_not_tested():
    shallow = {key: values for key, values in PAPER_LIKE.items() if key[1] == 20}
    assert set(verdicts(shallow).values()) == {"not tested"}


def test_the_evidence_has_the_numbers():
    first, second = judge(results(PAPER_LIKE))
    assert first.measured == "training error of plain networks 9.50 ± 0.10 → 13.50 ± 0.10 % at 20, 56 layers"
    assert "plain-56 against plain-20: difference +4.00 points" in first.evidence
    assert "ResNet-20 against ResNet-56: difference +1.80 points" in second.evidence


def test_the_plan_pairs_every_network_with_its_twin():
    planned = plan(rp.Options(depths=(20, 32), block="basic", shortcut="B"))
    assert [(one.labels["kind"], one.network) for one in planned] == [
        ("plain", "cifar/plain-20"),
        ("residual", "cifar/resnet-20"),
        ("plain", "cifar/plain-32"),
        ("residual", "cifar/resnet-32"),
    ]
    assert planned[1].options == {"block": "basic", "shortcut": "B"}


def test_figures_and_table_from_the_results():
    ours = results(PAPER_LIKE)
    drawings = study.draw(ours)
    assert set(drawings) == {"figure", "figure-depth", "figure-1"}
    for drawing in drawings.values():
        assert "plain 56 layers 13.5 %" in drawing.alt
    left, right = drawings["figure"].figure.axes
    assert left.get_ylim() == right.get_ylim()  # one scale, or the panels cannot be compared
    dashed = [line for line in left.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[-1] for line in dashed] == pytest.approx([9.5, 13.5])
    bold = [line for line in left.lines if line.get_linewidth() > 2]
    assert [line.get_ydata()[-1] for line in bold] == pytest.approx([15.0, 19.0])
    table = study.tabulate(ours)
    assert table["network"].tolist() == ["plain-20", "plain-56", "ResNet-20", "ResNet-56"]
    assert table["paper's test error (%)"].tolist() == [
        "not printed",
        "not printed",
        "8.75 (CIFAR-10)",
        "6.97 (CIFAR-10)",
    ]
    alone = results({("plain", 20): [9.4, 9.6], ("residual", 20): [8.7, 8.8]})
    assert set(study.draw(alone)) == {"figure", "figure-depth"}  # no plain network is the deeper one


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "studies.degradation", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=480,
    )


SMALL = ("--depths", "8", "14", "--seeds", "0", "1", "--iterations", "20")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A small study, run once as a user would."""
    folder = tmp_path_factory.mktemp("study")
    return folder, run(*SMALL, cwd=folder)


def test_one_depth_or_one_seed_is_said_before_the_training(tmp_path):
    few = run("--depths", "8", "--seeds", "0", "--iterations", "20", "--dry-run", cwd=tmp_path)
    assert few.stderr == (
        "note: one depth only (--depths 8), and two are needed to compare: a claim will be 'not tested'\n"
        "note: one seed only (--seeds 0): without a spread, comparisons over seeds will be 'inconclusive'\n"
    )
    assert run(*SMALL, "--dry-run", cwd=tmp_path).stderr == ""


def test_a_plugin_of_which_nothing_is_asked_for_is_said_before_the_training(tmp_path):
    (tmp_path / "mine.py").write_text(STRANGER)
    (tmp_path / "forgotten.py").write_text(STRANGER.replace("@rp.register_block", "# @rp.register_block"))
    given = ("--plugin", "mine.py", "--plugin", "forgotten.py", "--dry-run")
    unused = run(*SMALL, *given, cwd=tmp_path)
    assert unused.returncode == 0
    assert unused.stderr == (
        'note: forgotten.py registers nothing; a block is registered by @rp.register_block("name") above its class\n'
        "note: nothing is asked for of what mine.py registers (--block wide-middle)\n"
    )
    assert run(*SMALL, *given[:2], "--dry-run", "--block", "wide-middle", cwd=tmp_path).stderr == ""


def test_plain_networks_are_no_residual_ones(tmp_path):
    asked = run("--shortcut", "none", "--dry-run", cwd=tmp_path)
    assert asked.returncode == 2
    assert asked.stderr == (
        "error: shortcut (='none') makes plain networks, which are there anyway; name one of residual networks\n"
    )


def test_a_study_ends_with_its_verdict_and_the_paths(done):
    folder, process = done
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "8 runs: 0 finished already, 8 to train" in process.stdout
    assert "[8/8]" in process.stdout
    assert "report:  results/degradation/report.html" in process.stdout
    out = folder / "results" / "degradation"
    assert {path.name for path in out.iterdir()} >= {
        "report.html",
        "report.md",
        "results.csv",
        "verdict.json",
        "table.csv",
        "figure.png",
        "figure.svg",
        "figure.pdf",
    }
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_verdict_json_has_what_is_promised(done):
    folder, _ = done
    record = json.loads((folder / "results/degradation/verdict.json").read_text())
    assert record["study"] == "degradation"
    assert record["setting"] == "custom"
    assert [claim["id"] for claim in record["claims"]] == ["C1", "C2"]
    for claim in record["claims"]:
        assert set(claim) >= {"id", "statement", "paper", "measured", "verdict", "evidence"}
        assert claim["verdict"] in ("holds", "fails", "inconclusive", "not tested")
    assert record["config"]["options"]["depths"] == [8, 14]
    assert any(line.startswith("iterations: 20 instead of 64,000") for line in record["config"]["departures"])
    assert record["environment"]["torch"]


def test_results_csv_is_tidy(done):
    folder, _ = done
    table = pandas.read_csv(folder / "results/degradation/results.csv")
    assert len(table) == 8
    assert set(table.columns) >= {"kind", "depth", "seed", "train_error", "test_error", "parameters", "run"}
    # Plain and option A have the same parameters (§4.2).
    assert table.groupby("depth")["parameters"].nunique().tolist() == [1, 1]


def test_the_report_is_one_self_contained_file(done):
    folder, _ = done
    html = (folder / "results/degradation/report.html").read_text()
    assert 'src="data:image/svg+xml;base64,' in html
    for outside in ('src="http', 'href="http', "<script"):
        assert outside not in html
    assert html.count('alt="') == 2 * 3  # three figures, for a light and for a dark page
    assert "custom setting" in html
    assert "would refute it" in html


def test_a_second_time_nothing_is_trained(done):
    folder, _ = done
    again = run(*SMALL, cwd=folder)
    assert again.returncode == 0
    assert "8 runs: 8 finished already, nothing to train" in again.stdout


def test_a_wider_study_trains_what_is_missing_alone(done):
    folder, _ = done
    wider = run("--depths", "8", "14", "--seeds", "0", "1", "2", "--iterations", "20", cwd=folder)
    assert "12 runs: 8 finished already, 4 to train" in wider.stdout
    command = f"python -m studies.degradation {' '.join(SMALL)}"
    assert (
        f"note: results/degradation holds the report of `{command}`, which this one is going to replace;"
        in wider.stderr
    )
    (folder / "results/degradation/measurements.csv").write_text("of another study")
    run("--depths", "8", "14", "--seeds", "0", "1", "2", "--iterations", "20", cwd=folder)
    assert not (folder / "results/degradation/measurements.csv").exists(), "it has none"
    environment = json.loads((folder / "results/degradation/verdict.json").read_text())["environment"]
    assert environment["threads"] == 1, "of the runs, not of the process that asked"


def test_only_a_report_of_something_else_is_said_to_be_replaced(tmp_path):
    def said(of, **options) -> list[str]:
        return list(replaced_report(of, rp.Options(out=str(tmp_path), **options)))

    record = {
        "study": "degradation",
        "config": {"command": "ours", "options": {"data": "cifar10:here", "seeds": [0, 1, 2]}},
    }
    (tmp_path / "verdict.json").write_text(json.dumps(record))
    assert said(study, data="cifar10:there") == []
    assert "holds the report of `ours`" in said(study, data="cifar100:here")[0]
    assert "holds the report of `ours`" in said(study, data="cifar10:here", seeds=(0, 1))[0]
    assert "holds the report of `ours`" in said(ensemble.study, data="cifar10:here")[0]
    record["config"]["options"]["data"] = "folder:here"  # which may hold anything
    (tmp_path / "verdict.json").write_text(json.dumps(record))
    assert said(study, data="folder:here") == []
    assert "holds the report of `ours`" in said(study, data="folder:there")[0]


def test_a_report_names_the_machines_that_trained_its_runs(done, tmp_path):
    shutil.copytree(done[0] / "runs", tmp_path / "runs")
    for index, path in enumerate(sorted(tmp_path.glob("runs/*/environment.json"))):
        trained = json.loads(path.read_text()) | {
            "device": "a card",
            "torch": f"2.{11 + (index > 0)}.0",
            "commit": "abc",
        }
        path.write_text(json.dumps(trained))
    assert run(*SMALL, cwd=tmp_path).returncode == 0
    said = (tmp_path / "results/degradation/report.md").read_text()
    assert "- device: a card; " in said
    assert "- commit: abc" in said
    assert {"torch 2.11.0 or 2.12.0", "torch 2.12.0 or 2.11.0"} & set(said.split("versions: ")[1].split(", "))


def test_what_the_paper_leaves_open_can_be_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["--depths", "8", "--seeds", "0", "--iterations", "4", "--concurrency", "1"]
    assert study.main([*asked, "--recipe", "bn_batch=32", "weight-decay-on=weights"]) == 0
    record = json.loads((tmp_path / "results/degradation/verdict.json").read_text())
    (recipe,) = record["config"]["recipes"]
    assert (recipe["bn_batch"], recipe["weight_decay_on"], recipe["iterations"]) == (32, "weights", 4)
    assert {"bn batch: 32 instead of none", "weight decay on: weights instead of all"} <= set(
        record["config"]["departures"]
    )
    assert record["setting"] == "custom"
    assert "Table 6" not in judge(results(PAPER_LIKE, data="cifar10", recipe=("nesterov=True",)))[1].evidence


def test_what_cannot_repeat_its_last_digits_is_refused_where_that_is_asked(
    tmp_path, monkeypatch, capsys, clean_registries
):
    monkeypatch.chdir(tmp_path)
    Path("unpools.py").write_text(UNPOOLS)
    asked = ["--depths", "8", "--seeds", "0", "--iterations", "4", "--concurrency", "1"]
    assert study.main([*asked, "--deterministic"]) == 0
    record = json.loads(Path("results/degradation/verdict.json").read_text())
    assert record["environment"]["deterministic"] and record["setting"] == "custom"
    assert study.main([*asked, "--plugin", "unpools.py", "--block", "unpools"]) == 0
    assert study.main([*asked, "--plugin", "unpools.py", "--block", "unpools", "--deterministic"]) == 2
    said = capsys.readouterr().err
    fails = r"^error: cifar/plain-8, stage1.0: Block fails on .*does not have a deterministic implementation"
    assert re.search(fails, said, re.M), said
    assert not torch.are_deterministic_algorithms_enabled()


UNPOOLS = """
import resprobe as rp
from torch import nn

class Unpools(nn.Module):
    def forward(self, x):
        pooled, places = nn.functional.max_pool2d(x, 2, return_indices=True)
        return nn.functional.max_unpool2d(pooled, places, 2)

@rp.register_block("unpools")
class Block(rp.Block):
    weighted_layers = 2

    def make_branch(self, in_channels, width, stride, layers):
        second = layers.conv(width, width)
        return nn.Sequential(Unpools(), layers.conv(in_channels, width, stride=stride), nn.ReLU(), second)
"""

STRANGER = """
import resprobe as rp
from torch import nn

@rp.register_block("wide-middle")
class WideMiddle(rp.Block):
    weighted_layers = 2

    def make_branch(self, in_channels, width, stride, layers):
        return nn.Sequential(
            layers.conv(in_channels, 2 * width, kernel=3, stride=stride), layers.norm(2 * width), nn.ReLU(),
            layers.conv(2 * width, width, kernel=3), layers.norm(width),
        )
"""


def test_a_strangers_block_gets_the_same_study(tmp_path):
    (tmp_path / "my_block.py").write_text(STRANGER)
    arguments = (
        "--plugin",
        "my_block.py",
        "--block",
        "wide-middle",
        "--depths",
        "8",
        "--seeds",
        "0",
        "--iterations",
        "4",
    )
    process = run(*arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "[2/2]" in process.stdout
    assert "holds the report of" not in process.stderr
    report = (tmp_path / "results/degradation/report.md").read_text()
    assert "| ResNet-8 |" in report
    assert "- block: wide-middle instead of basic" in report and "; data: digits; block: wide-middle. After" in report
    # An edited block is another block: its runs are not taken for the old one's.
    (tmp_path / "my_block.py").write_text(STRANGER.replace("nn.ReLU()", "nn.ELU()"))
    assert "2 runs: 0 finished already, 2 to train" in run(*arguments, cwd=tmp_path).stdout


def test_the_example_plugins_shortcut_is_accepted(tmp_path):
    process = run("--shortcut", "highway", "--depths", "8", "--seeds", "0", "--iterations", "4", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    table = pandas.read_csv(tmp_path / "results/degradation/results.csv").set_index("kind")
    assert table.loc["residual", "parameters"] > table.loc["plain", "parameters"]


WRONG_SHAPE = STRANGER.replace("layers.conv(2 * width, width, kernel=3), layers.norm(width)", "nn.MaxPool2d(2)")

MISTAKES = [
    (("--depths", "21"), "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26"),
    (
        ("--block", "basci"),
        "block (='basci') is unknown; accepted: basic, bottleneck, single, single-linear; nearest: basic",
    ),
    (("--shortcut", "D"), "shortcut (='D') is unknown; accepted: A, A-centred, B, C, highway; one of yours"),
    (("--plugin", "absent.py"), "plugin (='absent.py') is not there: no file"),
    (("--plugin", "broken.py"), "plugin (='broken.py') does not import: ZeroDivisionError: division by zero"),
    (("--plugin", "no.such.module"), "plugin (='no.such.module') does not import: ModuleNotFoundError"),
    (
        ("--plugin", "wrong_shape.py", "--block", "wide-middle", "--depths", "8"),
        "WideMiddle turns an input of (2, 16, 4, 4) into (2, 32, 2, 2); expected (2, 16, 4, 4)",
    ),
    (
        ("--data", "folder:absent"),
        "data folder (='absent') is not there; expected train/ and val/ with a folder a class",
    ),
    (("--data", "cifar10:broken.tar.gz"), "archive broken.tar.gz is damaged or not cifar-10-python.tar.gz: its MD5 is"),
    (
        ("--data", "digit"),
        "data (='digit') is unknown; accepted: cifar10, cifar100, digits, digits-64, folder, ",
    ),
    (("--runs", "a_file/runs"), "runs (='a_file/runs') cannot be written to: Not a directory"),
    (("--out", "a_file/out"), "out (='a_file/out') cannot be written to: Not a directory"),
    (("--seeds", "-1"), "seed (=-1) must be a whole number ≥ 0"),
    (("--seeds", "0", "0"), "seeds (=0 0) must be given, each once"),
    (("--iterations", "0"), "iterations (=0) must be a whole number ≥ 1"),
    (("--iterations", "many"), "--iterations (='many') cannot be read; accepted: a whole number"),
    (("--depths", "deep"), "--depths (='deep') cannot be read; accepted: whole numbers"),
    (("--preset", "qick"), "--preset (='qick') is unknown; accepted: quick, paper; nearest: quick"),
    (("--precision", "fp16"), "--precision (='fp16') is unknown; accepted: auto, fp32, bf16"),
    (("--dephts", "20"), "option (='--dephts') is unknown; accepted: --preset"),
    (("--concurrency", "0"), "concurrency (='0') must be 'auto' or a whole number ≥ 1"),
    (("--device", "gpu"), "device (='gpu') is unknown; accepted: auto, cpu, cuda, mps"),
    (("--recipe", "bn_bach=64"), "recipe (='bn_bach') is unknown; accepted: batch_size, learning_rate, "),
    (("--recipe", "bn_batch=0"), "bn_batch (=0) must be a whole number ≥ 1"),
    (("--recipe",), "--recipe needs a value after it, or several"),
    (("--recipe", "bn_batch=64", "bn-batch=32"), "recipe (='bn-batch=32'): bn_batch is given twice"),
    (
        ("--recipe", "bn_batch=64", "--recipe", "nesterov=true"),
        "--recipe is given 2 times; accepted: once, with all its values",
    ),
    (("--depths", "8", "--depths=14"), "--depths is given 2 times; accepted: once, with all its values"),
    (("--device", "cpu", "--device", "cpu"), "--device is given 2 times; accepted: once\n"),
    (("--recipe", "pad=7"), "recipe (='pad=7') does nothing with augmentation 'none'"),
    (("--recipe", "warm_up_until=70"), "recipe (='warm_up_until=70.0') does nothing with warm_up_rate None"),
    (
        ("--recipe", "milestones=32000,48000"),
        "recipe (='milestones=(32000, 48000)'): the training ends after 400 iterations",
    ),
    (("--recipe", "lr=0.1"), "nearest: learning_rate"),
]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"depths": 8}, "depths (=8) must be a tuple of whole numbers, such as (20, 56)"),
        ({"depths": ("8", "14")}, "depths (=('8', '14')) must be a tuple of whole numbers, such as (20, 56)"),
        ({"seeds": {0, 1}}, "seeds (={0, 1}) must be a tuple of whole numbers, such as (0, 1, 2)"),
        ({"depths": numpy.array(20)}, "depths (=20) must be a tuple of whole numbers"),
        ({"seeds": b"ab"}, "seeds (=b'ab') must be a tuple of whole numbers"),
        ({"step": numpy.array(["eager"])}, "step (=\"['eager']\") is unknown; accepted: auto, eager"),
        ({"seeds": (True,)}, "seeds (=(True,)) must be a tuple"),
        ({"iterations": 4.0}, "iterations (=4.0) must be a whole number, such as 64000"),
        ({"concurrency": 1}, "concurrency (=1) must be a text, such as 'auto'"),
        ({"preset": "slow"}, "preset (='slow') is unknown; accepted: quick, paper"),
        (
            {"plugin": "my_block.py"},
            "plugin (='my_block.py') must be a tuple of texts, such as ('my_block.py',)",
        ),
        ({"recipe": (("momentum", 0),)}, "recipe (=(('momentum', 0),)) must be a tuple of texts"),
        ({"recompute": 1}, "recompute (=1) must be True or False, such as False"),
    ],
)
def test_options_of_another_kind_are_one_line_in_python_too(options, text):
    for call in (study.run, study.survey):
        with pytest.raises(rp.UsageError) as caught:
            call(rp.Options(**options))
        assert str(caught.value).startswith(text)


def test_what_is_asked_in_python_is_told_as_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = dataclasses.replace(
        study.presets["quick"], depths=(8,), seeds=(0,), iterations=4, concurrency="1", recompute=True, probe=("flops",)
    )
    with pytest.raises(
        rp.UsageError, match=r"^options \(=.*\) must be the Options of studies.convergence; dataclasses.replace"
    ):
        convergence.study.run(asked)
    with pytest.raises(rp.UsageError, match=r"^options \(=.*\) must be the Options of resprobe.options"):
        study.run(convergence.study.presets["quick"])
    found = study.results(asked)
    assert [len(found.table), len(found.runs)] == [2, 2] and {8} == set(found.histories["depth"])
    assert not Path("results").exists() and set(found.probed) == {"flops"}
    asked = dataclasses.replace(
        asked, depths=numpy.array([8]), seeds=[numpy.int64(0)], runs=Path("runs"), out=Path("results/degradation")
    )
    command = study.run(asked)["config"]["command"]
    assert command == (
        "python -m studies.degradation --depths 8 --seeds 0 --iterations 4 --recompute --concurrency 1 --probe flops "
        "--out results/degradation"
    )
    parsed = study.parse(command.split()[3:])
    assert (parsed.depths, parsed.seeds, parsed.out) == ((8,), (0,), "results/degradation")


@pytest.mark.parametrize(
    ("arguments", "text"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
@pytest.mark.usefixtures("clean_registries")
def test_a_mistake_gets_one_line_and_leaves_nothing(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "wrong_shape.py").write_text(WRONG_SHAPE)
    (tmp_path / "broken.tar.gz").write_bytes(b"not an archive")
    (tmp_path / "a_file").write_text("")
    before = {path.name for path in tmp_path.iterdir()}
    assert study.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert text in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    made = {path.name for path in tmp_path.iterdir()} - before
    assert made <= {"results"}
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_cuda_without_cuda(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert study.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: device (='cuda') is not available on this machine; accepted here: auto"
    )


def test_mistakes_exit_with_2_and_help_with_0(tmp_path):
    wrong = run("--depths", "21", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26\n"
    helped = run("--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert "--depths" in helped.stdout
    assert "20 32 44 56" in helped.stdout  # the preset's own values
    assert "64000" in run("--preset", "paper", "--help", cwd=tmp_path).stdout


def test_a_home_that_the_shell_left_alone_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert study.main([*SMALL[:5], "--iterations", "2", "--out=~/report", "--runs=~/runs", "--concurrency", "1"]) == 0
    assert {file.name for file in (tmp_path / "home").iterdir()} == {"report", "runs"}
    assert not (tmp_path / "~").exists()


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main([*SMALL, "--dry-run", "--out", "new/report"]) == 0
    assert "8 to train" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default:cifar10 is not here yet")
def test_a_dry_run_downloads_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("resprobe.data.datasets._download", lambda name: pytest.fail("it downloads"))
    asked = [
        "--preset",
        "paper",
        "--data",
        "cifar10",
        "--depths",
        "8",
        "--seeds",
        "0",
        "--iterations",
        "2",
        "--dry-run",
    ]
    assert study.main(asked) == 0
    said = capsys.readouterr()
    assert "2 runs: 0 finished already, 2 to train\n" in said.out and "\ntime: about " in said.out
    assert said.err.startswith(
        "note: cifar10 is not here yet: it is downloaded (170 MB) when the training begins, or named with"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "why", "ends"),
    [
        (TrainingDiverged, "the loss is not finite at iteration 3", "such as a lower learning_rate"),
        (StorageError, "cannot write there: no space left", "the same command tries it again from there"),
    ],
)
def test_a_run_that_fails_exits_with_1_and_the_others_go_on(tmp_path, monkeypatch, capsys, error, why, ends):
    """One network of the sweep has weights that overflow, or comes when the disk is full; the other is trained to its end."""
    from resprobe import sweep

    monkeypatch.chdir(tmp_path)
    trained = sweep.train_job

    def diverge(job, *others):
        if "plain" in job.config.network.family:
            raise error(f"cifar/plain-8, seed 0: {why}")
        return trained(job, *others)

    monkeypatch.setattr(sweep, "train_job", diverge)
    arguments = ["--depths", "8", "--seeds", "0", "--iterations", "4", "--concurrency", "1"]
    assert study.main(arguments) == 1
    said = capsys.readouterr()
    assert f"error: 1 of 2 runs failed: cifar/plain-8, seed 0: {why}" in said.err
    assert said.err.endswith(f"{ends}\n")
    assert "[2/2] cifar/resnet-8, seed 0: training error" in said.out
    assert not (tmp_path / "results/degradation/verdict.json").exists()
    monkeypatch.setattr(sweep, "train_job", trained)
    assert study.main(arguments) == 0
    assert "2 runs: 1 finished already, 1 to train" in capsys.readouterr().out


PROBE = """
import pandas
import resprobe as rp

@rp.register_probe("iterations-seen")
class IterationsSeen(rp.Probe):
    name = "seen"
    schedule = staticmethod(rp.probes.at([0, 2]))

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_backward(self, network, iteration):
        self.seen.append(iteration)

    def table(self):
        return pandas.DataFrame({"iteration": self.seen, "kind": "seen"})

    def state(self):
        return list(self.seen)

    def load_state(self, state):
        self.seen = list(state)
"""


def test_any_probe_watches_any_study(tmp_path, monkeypatch, capsys, clean_registries):
    """Its tables of all runs lie beside the report; runs that had been finished without it are trained again, and told so."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PROBE)
    arguments = ["--depths", "8", "--seeds", "0", "1", "--iterations", "4", "--concurrency", "1"]
    assert study.main(arguments) == 0
    before = pandas.read_csv("results/degradation/results.csv")
    capsys.readouterr()
    assert study.main([*arguments, "--plugin", "mine.py", "--probe", "iterations-seen", "--dry-run"]) == 0
    assert "0 finished already, 4 to train (4 of them anew, for a probe's table)" in capsys.readouterr().out
    assert study.main([*arguments, "--plugin", "mine.py", "--probe", "iterations-seen"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("probe:   results/degradation/probe-seen.csv\n")
    table = pandas.read_csv("results/degradation/probe-seen.csv")
    assert list(table) == ["network_kind", "depth", "seed", "network", "run", "iteration", "kind"]
    assert set(table["network_kind"]) == {"plain", "residual"}
    assert set(table["kind"]) == {"seen"}
    assert table.groupby("run")["iteration"].apply(list).tolist() == [[0, 2]] * 4
    after = pandas.read_csv("results/degradation/results.csv")
    assert set(after["run"]) == set(table["run"]) == set(before["run"])
    pandas.testing.assert_series_equal(after["train_loss"], before["train_loss"])
    assert "probe-seen.csv" in Path("results/degradation/report.md").read_text()
    record = json.loads(Path("results/degradation/verdict.json").read_text())
    assert record["tables"] == ["table", "results", "probe-seen"]
    assert record["setting"] == "custom"  # for the depths, not for the probe

    assert study.main(arguments) == 0
    assert "4 finished already, nothing to train" in capsys.readouterr().out
    assert not Path("results/degradation/probe-seen.csv").exists()  # this report has none


def test_a_probe_that_is_not_there_is_said_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(["--probe", "gradient-norm"]) == 2
    assert "probe (='gradient-norm') is unknown; accepted: " in (said := capsys.readouterr().err)
    assert said.endswith("; nearest: gradient-norms\n")
    assert list(tmp_path.iterdir()) == []
    assert study.setting(study.parse(["--probe", "flops", "--probe", "gradient-norms"])) == "quick"


@pytest.mark.parametrize(
    ("failing", "hint"),
    [
        (lambda config: config.seed == 1, ", or reports without the failed ones with --seeds 0 2\n"),
        (
            lambda config: config.network.depth == 8,
            ", or reports without the failed ones with --depths 14\n",
        ),
        (lambda config: config.network.depth == 8 + 6 * config.seed, "tries them again from there\n"),
    ],
    ids=["seed", "depth", "neither"],
)
def test_after_failures_the_line_says_how_to_have_the_rest(failing, hint, tmp_path, monkeypatch, capsys):
    from resprobe import sweep

    def fail(job, *_):
        if failing(job.config):
            raise RuntimeError("no")
        return dict.fromkeys(job.config.metrics, 0.0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "train_job", fail)
    seeds = ["0", "1", "2"] if "seeds" in hint or "depths" in hint else ["0", "1"]
    assert study.main(["--depths", "8", "14", "--seeds", *seeds, "--iterations", "4", "--concurrency", "1"]) == 1
    assert capsys.readouterr().err.endswith(hint)


def test_a_report_says_of_which_seeds_a_training_diverged(tmp_path, monkeypatch, capsys):
    from resprobe.training import Training

    monkeypatch.chdir(tmp_path)
    small = ["--depths", "8", "14", "--iterations", "4", "--concurrency", "1", "--device", "cpu", "--precision", "fp32"]
    run = Training.run

    def diverges(training, *rest):
        if training.seed == 1 and training.network.depth == 8:
            raise TrainingDiverged("the loss is not finite at iteration 3")
        run(training, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "run", diverges)
        assert study.main([*small, "--seeds", "0", "1"]) == 1
    assert ", or reports without the failed ones with --seeds 0\n" in capsys.readouterr().err
    assert sum(1 for _ in Path("runs").glob("*/diverged.txt")) == 2
    assert study.main([*small, "--seeds", "0", "2"]) == 0
    record = json.loads(Path("results/degradation/verdict.json").read_text())
    assert record["config"]["left_out"] == {"cifar/plain-8": [1], "cifar/resnet-8": [1]}
    said = "Left out are trainings that diverged (cifar/plain-8, seeds 1; cifar/resnet-8, seeds 1)"
    assert said in Path("results/degradation/report.md").read_text()
    assert (
        study.main([*small, "--seeds", "0", "2", "--recipe", "momentum=0"]) == 0
    )  # of another recipe nothing diverged
    assert json.loads(Path("results/degradation/verdict.json").read_text())["config"]["left_out"] == {}
    assert study.main([*small, "--seeds", "0", "1"]) == 0  # and now it comes through
    assert json.loads(Path("results/degradation/verdict.json").read_text())["config"]["left_out"] == {}
    assert not list(Path("runs").glob("*/diverged.txt"))


def test_networks_that_learn_nothing_refute_nothing():
    guessing = {(kind, depth): [89.9, 90.0, 90.1] for kind in ("plain", "residual") for depth in (20, 56)}
    assert {verdict.verdict for verdict in judge(results(guessing))} == {"inconclusive"}


def test_the_setting_is_the_presets_only_if_what_is_measured_is():
    quick, paper = study.presets["quick"], study.presets["paper"]
    assert study.setting(quick) == "quick"
    assert study.setting(paper) == "paper"
    assert (
        study.setting(study.parse(["--preset", "paper", "--data", "cifar10:some/where", "--device", "cpu"])) == "paper"
    )
    assert study.parse([]) == quick
    assert study.setting(study.parse(["--seeds", "0"])) == "custom"
    assert study.setting(study.parse(["--preset", "paper", "--iterations", "2000"])) == "custom"


def test_plugins_can_be_given_several_times():
    assert study.parse(["--plugin", "a.py", "--plugin", "b"]).plugin == ("a.py", "b")


def test_the_list_of_studies_shows_claims_and_last_verdicts(done):
    folder, _ = done
    listed = subprocess.run(
        [sys.executable, "-m", "studies"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    record = json.loads((folder / "results/degradation/verdict.json").read_text())
    assert "python -m studies.degradation" in listed
    for claim in record["claims"]:
        assert f"{claim['id']}   {claim['verdict']} (custom)" in listed


@pytest.mark.gpu
def test_on_a_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--depths", "8", "--seeds", "0", "--iterations", "4", "--device", "cuda"]
    assert study.main(arguments) == 0
    first = capsys.readouterr().out
    assert "2 to train" in first and (tmp_path / "results/degradation/report.html").is_file()
    assert study.main(arguments) == 0
    assert "2 finished already" in capsys.readouterr().out
