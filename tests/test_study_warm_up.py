"""The warm-up study: each part's verdict follows the data; the two networks differ in the warm-up alone."""

import json
import math
from dataclasses import replace

import pandas
import pytest

import resprobe as rp
from studies.warm_up import COLD, WARM, Options, judge, plan, study, without_warm_up

# Running training error (%) at 100, 200, … iterations, and the final test error, one seed each.
SOON = [84.0, 83.0, 82.0, 79.0, 60.0, 40.0, 20.0, 10.0]
LATE = [90.1, 89.5, 89.8, 89.8, 89.1, 89.6, 70.0, 10.0]  # a hair below guessing, as on CIFAR-10, and then away from it
STUCK = [90.1, 89.9, 90.2, 90.0, 90.1, 89.9, 90.1, 89.9]
PAPER_LIKE = {WARM: [(SOON, 6.6), (SOON, 6.7), (SOON, 6.5)], COLD: [(LATE, 6.6), (LATE, 6.7), (LATE, 6.6)]}


def results(runs: dict[str, list[tuple[list[float], float]]], data: str = "cifar10") -> rp.Results:
    rows, histories = [], []
    for start, seeds in runs.items():
        for seed, (errors, tested) in enumerate(seeds):
            labels = {"start": start, "seed": seed}
            rows.append(labels | {"train_error": errors[-1], "test_error": tested})
            for point, error in enumerate(errors, start=1):
                row = {"iteration": 100 * point, "epoch": 100 * point * 128 / 50_000}
                test_error = error + 1 if point % 2 == 0 else math.nan
                histories.append(labels | row | {"train_error": error, "test_error": test_error})
    options = Options(data=data, seeds=tuple(range(len(runs[WARM]))))
    found = rp.Results(options, pandas.DataFrame(rows), pandas.DataFrame(histories), [])
    return rp.Results(options, found.table, found.histories, [], measurements=study.measure(found))


def verdicts(runs, data: str = "cifar10") -> dict[str, rp.Verdict]:
    return {verdict.claim.id: verdict for verdict in judge(results(runs, data))}


def words(runs, data: str = "cifar10") -> list[str]:
    return [verdict.verdict for verdict in verdicts(runs, data).values()]


def test_trainings_as_in_the_paper_confirm_all_three_parts():
    found = verdicts(PAPER_LIKE)
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "C3a": "holds",
        "C3b": "holds",
        "C3c": "holds",
    }
    assert found["C3a"].measured == (
        "ResNet-110, iterations until below 85 % for good: 700 ± 0 without warm-up, 100 ± 0 with warm-up"
    )
    assert "difference +1.54 epochs" in found["C3a"].evidence
    assert found["C3b"].measured == "ResNet-110, iterations until below 80 %: 400 ± 0"
    assert "Training error: 10.00 ± 0.00 % without warm-up" in found["C3c"].evidence


def test_what_is_measured_is_a_start_and_not_chance():
    measured = results(PAPER_LIKE | {COLD: [(LATE, 6.6), (STUCK, 90.0)]}).measurements.set_index(["start", "seed"])
    late, stuck = measured.loc[(COLD, 0)], measured.loc[(COLD, 1)]
    assert late[["below_90", "below_80", "for_good"]].tolist() == [200, 700, 700]
    assert stuck["below_90"] == 200  # by chance, as its last log point, 89.9 %
    assert math.isnan(stuck["below_80"])
    assert math.isnan(stuck["for_good"])


def test_a_network_that_never_starts_refutes_the_first_part():
    found = verdicts(PAPER_LIKE | {COLD: [(STUCK, 90.0)] * 3})
    assert found["C3a"].verdict == "fails"
    assert "3 of 3 without warm-up" in found["C3a"].evidence
    assert "never without warm-up, 100 ± 0 with warm-up" in found["C3a"].measured
    assert found["C3c"].verdict == "fails"  # and it ends worse


def test_a_start_that_is_no_later_refutes_the_first_part():
    assert words(PAPER_LIKE | {COLD: [(SOON, 6.6), (SOON, 6.7), (SOON, 6.5)]})[0] == "fails"
    within_an_epoch = [95.0, 95.0, *SOON]  # 256 images later at every seed
    assert words(PAPER_LIKE | {COLD: [(within_an_epoch, 6.6)] * 3})[0] == "fails"


def test_seeds_that_disagree_are_inconclusive():
    mixed = verdicts(PAPER_LIKE | {COLD: [(STUCK, 90.0), (LATE, 6.6), (LATE, 6.6)]})
    assert mixed["C3a"].verdict == "inconclusive"
    assert "700 ± 0 (never in 1 of 3 seeds) without warm-up" in mixed["C3a"].measured
    assert mixed["C3c"].verdict == "inconclusive"


def test_a_long_warm_up_refutes_the_second_part():
    long = [85.0] * 12 + [79.0]
    assert words(PAPER_LIKE | {WARM: [(long, 6.6), (long, 6.7), (long, 6.5)]})[1] == "fails"
    assert words(PAPER_LIKE | {WARM: [(STUCK, 90.0)] * 3})[1] == "fails"
    assert words(PAPER_LIKE | {WARM: [(STUCK, 90.0), (SOON, 6.6), (SOON, 6.6)]})[1] == "inconclusive"


def test_the_papers_400_iterations_are_not_tested_on_other_data():
    assert verdicts(PAPER_LIKE, "digits")["C3b"].verdict == "not tested"
    assert verdicts(PAPER_LIKE, "cifar10:some/where")["C3b"].verdict == "holds"


@pytest.mark.parametrize("tested", [(8.0, 8.1, 7.9), (5.0, 5.1, 4.9)])
def test_other_accuracy_in_either_direction_refutes_the_third_part(tested):
    assert words(PAPER_LIKE | {COLD: [(LATE, error) for error in tested]})[2] == "fails"


def test_a_difference_that_may_be_too_small_to_count_is_left_open():
    assert words(PAPER_LIKE | {COLD: [(LATE, error) for error in (6.95, 7.05, 6.85)]})[2] == "inconclusive"


def test_two_networks_that_guess_are_not_similar_in_accuracy():
    guessing = {start: [(STUCK, 89.9), (STUCK, 90.0), (STUCK, 90.1)] for start in (WARM, COLD)}
    assert words(guessing)[2] == "inconclusive"


def test_one_seed_is_inconclusive():
    assert words({start: seeds[:1] for start, seeds in PAPER_LIKE.items()}) == ["inconclusive"] * 3


def test_the_recipes_differ_in_the_warm_up_alone():
    first, second = plan(study.presets["paper"])
    assert (
        (first.network, first.options)
        == (second.network, second.options)
        == (
            "cifar/resnet-110",
            {"block": "basic", "shortcut": "A"},
        )
    )
    paper = rp.recipes.cifar_paper(depth=110)
    with_it, without = first.recipe(paper), second.recipe(paper)
    assert (with_it.warm_up_rate, with_it.warm_up_until) == (0.01, 80.0)
    assert rp.recipes.departures(with_it) == rp.recipes.departures(without) == []
    assert without.warm_up_rate is None
    assert rp.recipes.with_warm_up(rp.recipes.digits_quick()).warm_up_rate == pytest.approx(0.005)
    assert without_warm_up(with_it).name == "cifar-paper, with warm-up, without warm-up"


def test_figure_and_table_from_the_results():
    ours = results(PAPER_LIKE)
    whole, early = study.draw(ours)["figure"].figure.axes
    assert whole.lines[0].get_ydata() == pytest.approx([84.0, 80.0, 41.0, 11.0])  # where it was tested
    assert early.lines[0].get_ydata() == pytest.approx(SOON)
    assert [text.get_text() for text in early.get_legend().get_texts()] == [WARM, COLD]
    assert len({line.get_linestyle() for line in whole.lines}) == 2
    assert "iterations until below 80 %: 400 ± 0" in study.draw(ours)["figure"].alt
    table = study.tabulate(ours).set_index("ResNet-110")
    assert table["iterations to 90 %"].tolist() == ["100 ± 0", "200 ± 0"]
    assert table["to 85 % for good"].tolist() == ["100 ± 0", "700 ± 0"]
    with_it, without = table["paper (%)"]
    assert (with_it, without) == ("6.61 ± 0.16 (-0.01, within ±0.50)", "“similar”")
    elsewhere = replace(ours, options=replace(ours.options, data="digits"))
    assert study.tabulate(elsewhere)["paper (%)"].tolist() == ["6.61 ± 0.16", "“similar”"]


def test_a_small_study_warms_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--depth", "8", "--seeds", "0", "--iterations", "12", "--concurrency", "1", "--device", "cpu"]
    assert study.main(arguments) == 0
    record = json.loads((tmp_path / "results/warm_up/verdict.json").read_text())
    assert [claim["id"] for claim in record["claims"]] == ["C3a", "C3b", "C3c"]
    histories = {}
    for folder in (tmp_path / "runs").iterdir():
        rate = json.loads((folder / "config.json").read_text())["recipe"]["warm_up_rate"]
        histories[rate] = pandas.read_csv(folder / "history.csv")
    assert histories[0.005]["learning_rate"][0] == pytest.approx(0.005)
    assert histories[None]["learning_rate"][0] == pytest.approx(0.05)


MISTAKES = [
    (("--depth", "111"), "depth (=111) must be 6n+2 with block 'basic'; nearest are 110 and 116"),
    (("--depths", "110"), "option (='--depths') is unknown"),
    (("--seeds", "0", "0"), "seeds (=0 0) must be given, each once"),
]


def test_what_the_study_compares_cannot_be_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(["--dry-run", "--recipe", "warm_up_rate=0.02"]) == 2
    assert capsys.readouterr().err == (
        "error: recipe (='warm_up_rate=0.02') cannot be changed here: warm_up_rate is what the study compares or sets itself\n"
    )


@pytest.mark.parametrize(("arguments", "text"), MISTAKES)
def test_a_mistake_gets_one_line(arguments, text, refused):
    refused(study, arguments, text)
