"""The convergence study: its verdict follows the data, and a seed that never gets there is not forgotten."""

import math

import pandas
import pytest

import resprobe as rp
from studies.convergence import Options, judge, plan, study

# Running training error (%) at 10, 20, … iterations, one seed each; the test error is two points above, at 20, 40, …
FAST = [60.0, 35.0, 25.0, 15.0, 8.0, 5.0, 4.0, 3.0]
SLOW = [80.0, 70.0, 60.0, 45.0, 40.0, 29.0, 25.0, 15.0]
NEVER = [80.0, 70.0, 60.0, 45.0, 40.0, 38.0, 36.0, 35.0]
PAPER_LIKE = {"plain": [SLOW] * 3, "residual": [FAST] * 3}


def results(curves: dict[str, list[list[float]]], errors=(50, 30, 20)) -> rp.Results:
    rows, histories = [], []
    for kind, seeds in curves.items():
        for seed, curve in enumerate(seeds):
            labels = {"kind": kind, "seed": seed}
            rows.append(labels | {"train_error": curve[-1], "test_error": curve[-1] + 2})
            for point, error in enumerate(curve, start=1):
                test_error = error + 2 if point % 2 == 0 else math.nan
                histories.append(labels | {"iteration": 10 * point, "train_error": error, "test_error": test_error})
    options = Options(errors=errors, seeds=tuple(range(len(curves["plain"]))))
    found = rp.Results(options, pandas.DataFrame(rows), pandas.DataFrame(histories), [])
    return rp.Results(options, found.table, found.histories, [], measurements=study.measure(found))


def verdict(curves, errors=(50, 30, 20)) -> rp.Verdict:
    (only,) = judge(results(curves, errors))
    return only


def test_a_residual_network_that_gets_there_sooner_confirms_the_claim():
    found = verdict(PAPER_LIKE)
    assert found.verdict == "holds"
    assert found.measured == (
        "iterations to a training error of 50 %: 40 ± 0 (plain) and 20 ± 0 (residual); "
        "30 %: 60 ± 0 (plain) and 30 ± 0 (residual); 20 %: 80 ± 0 (plain) and 40 ± 0 (residual)"
    )
    assert "30 %, plain against residual: difference +30.0 iterations" in found.evidence
    assert "log points are 10 iterations apart" in found.evidence
    assert "final test error 17.00 ± 0.00 % (plain), 5.00 ± 0.00 % (residual)" in found.evidence


def test_a_plain_network_that_is_no_later_refutes_it():
    assert verdict({"plain": [FAST] * 3, "residual": [FAST] * 3}).verdict == "fails"
    assert verdict({"plain": [FAST] * 3, "residual": [SLOW] * 3}).verdict == "fails"
    # At one of the levels is enough.
    soon_slow = [*FAST[:3], 24.0, 23.0, 22.0, 21.0, 19.0]
    assert verdict({"plain": [SLOW] * 3, "residual": [soon_slow] * 3}).verdict == "fails"


def test_how_late_a_residual_network_is_that_never_arrives_is_not_known():
    """It counts as a window after the end, which is the least that it can be."""
    found = verdict({"plain": [NEVER] * 5, "residual": [FAST] * 4 + [NEVER]}, errors=(50, 20))
    assert found.verdict == "inconclusive"
    assert "residual networks that do not reach 20 %: 1" in found.evidence
    assert verdict({"plain": [FAST] * 3, "residual": [NEVER] * 3}).verdict == "fails"


def test_noise_and_one_seed_are_inconclusive():
    assert verdict({"plain": [SLOW, FAST, SLOW], "residual": [FAST, SLOW, FAST]}).verdict == "inconclusive"
    assert verdict({kind: seeds[:1] for kind, seeds in PAPER_LIKE.items()}).verdict == "inconclusive"


def test_a_seed_that_never_gets_there_counts_as_later_than_the_end():
    ours = results(PAPER_LIKE | {"plain": [SLOW, NEVER, NEVER]})
    row = ours.measurements.query("kind == 'plain' and seed == 1 and curve == 'training' and error == 30").iloc[0]
    assert (row["iterations"], row["reached"], row["window"]) == (90, False, 10)
    row = ours.measurements.query("kind == 'plain' and seed == 1 and curve == 'test' and error == 30").iloc[0]
    assert (row["iterations"], row["reached"], row["window"]) == (100, False, 20)
    (found,) = judge(ours)
    assert "30 %: ≥ 80 ± 17, 2 of 3 seeds never (plain) and 30 ± 0 (residual)" in found.measured
    assert found.verdict == "holds"
    drawing = study.draw(ours)["figure"]
    assert "Open triangles" in drawing.caption
    triangles = [line for line in drawing.figure.axes[1].lines if line.get_marker() == "^"]
    assert sorted(triangles[0].get_ydata()) == [90, 90, 90, 90]  # two seeds, at 30 and at 20 %


def test_levels_that_neither_reaches_are_not_tested():
    found = verdict({"plain": [SLOW] * 3, "residual": [FAST] * 3}, errors=(50, 1))
    assert found.verdict == "holds"
    assert "1 %: reached by neither, so not tested" in found.evidence
    assert "1 %: never (plain) and never (residual)" in found.measured
    assert verdict(PAPER_LIKE, errors=(1,)).verdict == "not tested"


def test_a_level_is_reached_at_or_below_it():
    measured = results(PAPER_LIKE, errors=(35,)).measurements
    assert measured.query("kind == 'residual' and curve == 'training'")["iterations"].unique().tolist() == [20]


def test_the_plan_is_a_network_and_its_twin():
    planned = plan(Options(depth=32, shortcut="B"))
    assert [(one.labels, one.network, dict(one.options)) for one in planned] == [
        ({"kind": "plain"}, "cifar/plain-32", {"block": "basic"}),
        ({"kind": "residual"}, "cifar/resnet-32", {"block": "basic", "shortcut": "B"}),
    ]
    assert all(one.recipe is None for one in planned)  # shared with the other studies


def test_figure_and_table_from_the_results():
    ours = results(PAPER_LIKE)
    drawing = study.draw(ours)["figure"]
    early, taken = drawing.figure.axes
    dashed = [line for line in early.lines if line.get_linestyle() == "--" and len(line.get_xdata()) > 2]
    assert [line.get_ydata().tolist() for line in dashed] == [SLOW, FAST]
    assert [text.get_text() for text in taken.get_xticklabels()] == ["50", "30", "20"]
    plain, residual = (container.lines[0].get_ydata().tolist() for container in taken.containers)
    assert (plain, residual) == ([40, 60, 80], [20, 30, 40])
    assert "20 %: 80 ± 0 and 40 ± 0" in drawing.alt
    table = study.tabulate(ours)
    assert table["network"].tolist() == ["plain-20"] * 3 + ["ResNet-20"] * 3
    assert table["error (%)"].tolist() == ["50", "30", "20"] * 2
    training = ["40 ± 0", "60 ± 0", "80 ± 0", "20 ± 0", "30 ± 0", "40 ± 0"]
    assert table["iterations, training error"].tolist() == training
    assert table["iterations, test error"].tolist() == ["40 ± 0", "80 ± 0", "80 ± 0", "20 ± 0", "40 ± 0", "40 ± 0"]
    assert table["paper, ImageNet, 18 layers (%)"].unique().tolist() == ["27.94", "27.88"]


def test_a_small_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--depth", "8", "--seeds", "0", "--iterations", "8", "--concurrency", "1", "--device", "cpu"]
    assert study.main([*arguments, "--errors", "80", "0.5"]) == 0
    measured = pandas.read_csv(tmp_path / "results/convergence/measurements.csv")
    history = pandas.read_csv(next((tmp_path / "runs").glob("cifar-resnet-8*")) / "history.csv")
    expected = history["iteration"][history["train_error"] <= 80].min()
    row = measured.query("kind == 'residual' and curve == 'training' and error == 80").iloc[0]
    assert row["iterations"] == (expected if row["reached"] else 9)
    assert not measured.query("error == 0.5")["reached"].any()


MISTAKES = [
    (("--errors", "30", "30"), "errors (=30 30) must be ≥ 0 and < 100, each once"),
    (("--errors", "120"), "errors (=120) must be ≥ 0 and < 100, each once"),
    (("--errors", "-1"), "errors"),
    (("--errors", "low"), "--errors (='low') cannot be read"),
    (("--depth", "21"), "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES)
def test_a_mistake_gets_one_line(arguments, text, refused):
    refused(study, arguments, text)
