"""The extreme-depth study: verdicts follow the data, overfitting is told from degradation, 110 layers are shared."""

import dataclasses

import pandas
import pytest

import resprobe as rp
from studies import warm_up
from studies.extreme_depth import judge, plan, study


def results(errors: dict[int, list[tuple[float, float]]]) -> rp.Results:
    """Given (training error, test error) by depth, one pair a seed."""
    rows, histories = [], []
    for depth, seeds in errors.items():
        for seed, (train, test) in enumerate(seeds):
            labels = {"depth": depth, "seed": seed}
            rows.append(labels | {"train_error": train, "test_error": test, "parameters": 10, "seconds": 1.0})
            for part in (1, 2):
                error = {"train_error": train + 20 / part, "test_error": test + 20 / part}
                histories.append(labels | {"iteration": 200 * part} | error)
    options = rp.Options(data="cifar10", depths=tuple(errors), seeds=tuple(range(len(next(iter(errors.values()))))))
    return rp.Results(options, pandas.DataFrame(rows), pandas.DataFrame(histories), [])


PAPER_LIKE = {110: [(0.10, 6.6), (0.12, 6.4), (0.11, 6.8)], 1202: [(0.04, 7.9), (0.05, 7.8), (0.03, 8.0)]}


def verdicts(errors) -> dict[str, rp.Verdict]:
    return {verdict.claim.id: verdict for verdict in judge(results(errors))}


def words(errors) -> dict[str, str]:
    return {name: verdict.verdict for name, verdict in verdicts(errors).items()}


def test_errors_as_in_the_paper_confirm_both_parts():
    found = verdicts(PAPER_LIKE)
    assert words(PAPER_LIKE) == {"C4a": "holds", "C4b": "holds"}
    assert found["C4a"].measured == "training error 0.04 ± 0.01 % at 1202 layers"
    assert found["C4b"].measured == "test error 7.90 ± 0.10 % at 1202 layers, 6.60 ± 0.20 % at 110"
    assert "ResNet-1202 against ResNet-110: difference +1.30 points" in found["C4b"].evidence


def test_that_the_claim_is_contested_is_always_said():
    said = "akamaster and fb.resnet.torch (issue 20) report 6.18, 7.3 at epoch 85"
    assert said in verdicts(PAPER_LIKE)["C4b"].evidence
    assert said in verdicts(PAPER_LIKE | {1202: [(0.04, 6.1), (0.05, 6.2), (0.03, 6.2)]})["C4b"].evidence


def test_a_network_that_does_not_fit_its_training_set_refutes_the_first_part():
    assert words(PAPER_LIKE | {1202: [(2.0, 7.9), (2.1, 7.8), (1.9, 8.0)]})["C4a"] == "fails"
    assert words(PAPER_LIKE | {1202: [(0.01, 7.9), (0.3, 7.8), (0.05, 8.0)]})["C4a"] == "inconclusive"


def test_a_better_test_error_refutes_the_second_part():
    better = verdicts(PAPER_LIKE | {1202: [(0.04, 6.1), (0.05, 6.2), (0.03, 6.2)]})["C4b"]
    assert better.verdict == "fails"


def test_chance_among_two_seeds_does_not_refute_the_second_part():
    """Of two equal figures the standard deviation is 0, and any lower mean below it."""
    found = verdicts({110: [(0.0, 2.22), (0.0, 2.22)], 302: [(0.0, 1.94), (0.0, 2.22)]})["C4b"]
    assert found.verdict == "inconclusive"


def test_where_nothing_is_fitted_a_higher_test_error_is_no_overfitting():
    short = {110: [(40.0, 41.0), (40.1, 41.1), (39.9, 40.9)], 302: [(40.1, 43.1), (40.0, 43.0), (40.2, 43.2)]}
    assert words(short)["C4b"] == "inconclusive"


def test_that_some_seeds_diverged_leaves_it_open_whether_it_trains():
    survivors = dataclasses.replace(results(PAPER_LIKE), left_out={"cifar/resnet-1202": [3, 4]})
    first, _ = judge(survivors)
    assert first.verdict == "inconclusive" and "It diverged from 2 further seeds" in first.evidence


def test_a_lower_mean_of_seeds_that_differ_widely_refutes_nothing():
    assert words(PAPER_LIKE | {1202: [(0.04, 2.0), (0.05, 8.0), (0.03, 8.4)]})["C4b"] == "inconclusive"


def test_an_equal_test_error_refutes_the_second_part():
    assert words(PAPER_LIKE | {1202: [(0.04, 6.6), (0.05, 6.5), (0.03, 6.7)]})["C4b"] == "fails"


def test_a_training_too_short_for_the_shallower_network_refutes_nothing():
    found = verdicts({110: [(4.5, 8.1), (4.6, 8.2), (4.7, 8.0)], 1202: [(60.0, 60.1), (61.0, 61.2), (59.0, 58.8)]})
    assert [found[part].verdict for part in ("C4a", "C4b")] == ["inconclusive", "inconclusive"]
    for part in ("C4a", "C4b"):
        assert "ResNet-110 is not trained either (4.60 ± 0.10 %): the training is too short" in found[part].evidence


def test_nor_does_a_better_test_error_after_such_a_training():
    for tested in ((7.0, 7.1, 6.9), (4.0, 4.1, 3.9)):  # alike, and far below
        errors = {110: [(31.0, 7.1), (30.0, 7.0), (32.0, 6.9)], 1202: [(30.0, error) for error in tested]}
        found = verdicts(errors)["C4b"]
        assert found.verdict == "inconclusive"
        assert "But ResNet-110 is not trained either" in found.evidence


def test_a_higher_training_error_is_no_overfitting():
    degraded = verdicts(PAPER_LIKE | {1202: [(3.0, 9.9), (3.1, 9.8), (2.9, 10.0)]})["C4b"]
    assert degraded.verdict == "fails"
    assert "The training error is higher too, so this is not overfitting" in degraded.evidence
    uncertain = verdicts(PAPER_LIKE | {1202: [(0.1, 7.9), (3.0, 7.8), (1.5, 8.0)]})["C4b"]
    assert uncertain.verdict == "inconclusive"
    assert "That the training error is similar is not certain" in uncertain.evidence
    # A difference that does not matter is "similar training error".
    assert words(PAPER_LIKE | {1202: [(0.21, 7.9), (0.22, 7.8), (0.20, 8.0)]})["C4b"] == "holds"


def test_noise_and_one_seed_are_inconclusive_and_one_depth_is_not_tested():
    assert words(PAPER_LIKE | {1202: [(0.04, 7.9), (0.05, 6.0), (0.03, 7.5)]})["C4b"] == "inconclusive"
    assert set(words({depth: seeds[:1] for depth, seeds in PAPER_LIKE.items()}).values()) == {"inconclusive"}
    assert words({1202: PAPER_LIKE[1202]}) == {"C4a": "holds", "C4b": "not tested"}


def test_the_plan_warms_up_as_the_warm_up_study_does():
    shallow, deep = plan(study.presets["paper"])
    assert (shallow.network, deep.network) == ("cifar/resnet-110", "cifar/resnet-1202")
    theirs = warm_up.plan(warm_up.study.presets["quick"])[0]
    recipe = rp.recipes.digits_quick()
    assert shallow.network == theirs.network
    assert shallow.options == theirs.options
    assert shallow.recipe(recipe) == deep.recipe(recipe) == theirs.recipe(recipe)
    assert plan(rp.Options(depths=(56,)))[0].recipe is None  # §4.2: the shallower networks need none


def test_memory_is_saved_where_it_is_asked_for():
    assert not study.presets["paper"].recompute, "its step is captured, on a card that has the memory"
    assert study.parse(["--recompute"]).recompute
    assert study.setting(study.parse(["--recompute"])) == "quick"  # the numbers are the same


def test_figure_and_table_from_the_results():
    drawing = study.draw(results(PAPER_LIKE))["figure"]
    train, test = drawing.figure.axes
    assert train.get_ylim() == test.get_ylim()
    assert [line.get_ydata()[-1] for line in train.lines] == pytest.approx([10.11, 10.04])
    assert [line.get_ydata()[-1] for line in test.lines] == pytest.approx([16.6, 17.9])
    assert {text.get_text() for text in train.texts} == {"110 layers", "1202 layers"}
    assert "1202 layers 0.0 and 7.9 %" in drawing.alt
    ours = results(PAPER_LIKE)
    table = study.tabulate(ours)
    assert table["network"].tolist() == ["ResNet-110", "ResNet-1202"]
    assert table["paper, CIFAR-10 (%)"].tolist() == ["6.61 (-0.01, within ±0.50)", "7.93 (-0.03, within ±0.50)"]
    elsewhere = dataclasses.replace(ours, options=dataclasses.replace(ours.options, data="digits"))
    assert study.tabulate(elsewhere)["paper, CIFAR-10 (%)"].tolist() == ["6.61", "7.93"]
    assert table["others, CIFAR-10 (%)"].tolist() == ["6.32, 6.73", "6.18, 7.3 at epoch 85"]


def test_a_small_study_with_and_without_recomputation_agrees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--depths", "8", "--seeds", "0", "--iterations", "4", "--concurrency", "1", "--device", "cpu"]
    errors = []
    for more in ([], ["--recompute", "--runs", "again"]):
        assert study.main([*arguments, *more]) == 0
        errors.append(pandas.read_csv(tmp_path / "results/extreme_depth/results.csv")["train_loss"].tolist())
    assert errors[0] == errors[1]


MISTAKES = [
    (("--depths", "1200"), "depth (=1200) must be 6n+2 with block 'basic'; nearest are 1196 and 1202"),
    (("--depths", "110", "110"), "depths (=110 110) must be given, each once"),
    (("--recomputed",), "option (='--recomputed') is unknown"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES)
def test_a_mistake_gets_one_line(arguments, text, refused):
    refused(study, arguments, text)
