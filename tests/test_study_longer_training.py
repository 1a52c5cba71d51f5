"""The longer-training study: its verdict follows the data, and its long schedule is the short one stretched."""

import pandas
import pytest

import resprobe as rp
from studies.longer_training import Options, judge, plan, study


def results(errors: dict[tuple[int, int], list[float]]) -> rp.Results:
    """Given training errors by depth and times; test errors a point above."""
    rows, histories = [], []
    for (depth, times), seeds in errors.items():
        for seed, error in enumerate(seeds):
            labels = {"depth": depth, "times": times, "seed": seed}
            final = {"train_error": error, "test_error": error + 1}
            rows.append(labels | final | {"iterations": 400 * times, "seconds": 6.0 * times})
            for part in (1, 2):
                early = {name: value + 9 / part for name, value in final.items()}
                histories.append(labels | {"iteration": 200 * times * part} | early)
    depths = tuple(sorted({depth for depth, _ in errors}))
    options = Options(data="digits", depths=depths, seeds=tuple(range(len(next(iter(errors.values()))))))
    return rp.Results(options, pandas.DataFrame(rows), pandas.DataFrame(histories), [])


PAPER_LIKE = {
    (20, 1): [9.4, 9.6, 9.5],
    (20, 3): [8.4, 8.6, 8.5],
    (56, 1): [13.4, 13.6, 13.5],
    (56, 3): [12.0, 12.2, 12.1],
}


def word(errors) -> str:
    (only,) = judge(results(errors))
    return only.verdict


def test_degradation_after_longer_training_confirms_the_claim():
    (found,) = judge(results(PAPER_LIKE))
    assert found.verdict == "holds"
    assert found.measured == (
        "training error at 1× → 3× the iterations: plain-20 9.50 ± 0.10 → 8.50 ± 0.10 %, "
        "plain-56 13.50 ± 0.10 → 12.10 ± 0.10 %"
    )
    assert "plain-56 after 3× against plain-20 after 1×: difference +2.60 points" in found.evidence
    assert "Both after 3×: difference +3.60 points" in found.evidence
    assert "What plain-56 gains from 3×: difference +1.40 points" in found.evidence


def test_a_deep_network_that_longer_training_cures_refutes_it():
    assert word(PAPER_LIKE | {(56, 3): [8.4, 8.6, 8.5]}) == "fails"
    assert word(PAPER_LIKE | {(56, 3): [6.0, 6.1, 5.9]}) == "fails"


def test_degradation_that_is_still_there_after_as_long_a_training_is_not_cured():
    """Below the shallower network's error after the usual training, and far above its own after three times as much."""
    assert word(PAPER_LIKE | {(56, 3): [9.3, 9.5, 9.4]}) == "inconclusive"


def test_without_degradation_there_is_nothing_to_cure():
    none = {(depth, times): [0.0, 0.1, 0.0] for depth in (20, 56) for times in (1, 3)}
    assert word(none) == "not tested"
    assert word({key: [89.9, 90.0, 90.1] for key in none}) == "not tested"
    assert word(PAPER_LIKE | {(56, 1): [9.4, 19.6, 9.5]}) == "inconclusive"


def test_noise_and_one_seed_are_inconclusive():
    assert word(PAPER_LIKE | {(56, 3): [6.0, 20.0, 10.0]}) == "inconclusive"
    assert word({key: values[:1] for key, values in PAPER_LIKE.items()}) == "inconclusive"


def test_one_depth_is_not_tested():
    assert word({key: values for key, values in PAPER_LIKE.items() if key[0] == 56}) == "not tested"


def test_the_plan_stretches_the_whole_schedule():
    planned = plan(Options(depths=(20, 56), times=3))
    assert [(one.network, one.labels["times"]) for one in planned] == [
        ("cifar/plain-20", 1),
        ("cifar/plain-56", 1),
        ("cifar/plain-20", 3),
        ("cifar/plain-56", 3),
    ]
    assert planned[0].recipe is None  # the usual training, which other studies share
    recipe = planned[2].recipe(rp.recipes.cifar_paper())
    assert (recipe.iterations, recipe.milestones) == (192_000, (96_000, 144_000))
    assert recipe.name == "cifar-paper, 3 times as long"


def test_a_schedule_of_ones_own_is_stretched_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--dry-run", "--depths", "8", "14", "--seeds", "0", "--iterations", "80"]
    assert study.main([*asked, "--recipe", "milestones=30,60", "bn_batch=32"]) == 0, capsys.readouterr().err


def test_figure_and_table_from_the_results():
    ours = results(PAPER_LIKE)
    drawing = study.draw(ours)["figure"]
    usual, long = drawing.figure.axes
    assert usual.get_ylim() == long.get_ylim()
    assert [usual.get_title(), long.get_title()] == ["1×: 400 iterations", "3×: 1,200 iterations"]
    dashed = [line for line in long.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert [line.get_ydata()[-1] for line in dashed] == pytest.approx([13.0, 16.6])
    assert "56 layers at 3× 12.1 %" in drawing.alt
    table = study.tabulate(ours)
    assert table[["network", "trained", "iterations"]].to_numpy().tolist() == [
        ["plain-20", "1×", "400"],
        ["plain-20", "3×", "1,200"],
        ["plain-56", "1×", "400"],
        ["plain-56", "3×", "1,200"],
    ]
    assert table["training error (%)"].tolist()[-1] == "12.10 ± 0.10"


def test_both_panels_have_room_for_what_is_drawn():
    stuck = PAPER_LIKE | {(56, 1): [80.0, 81.0, 82.0]}
    usual, _ = study.draw(results(stuck))["figure"].figure.axes
    assert usual.get_ylim()[1] > 82


def test_a_small_study_trains_three_times_as_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--depths", "8", "14", "--seeds", "0", "--iterations", "4", "--concurrency", "1", "--device", "cpu"]
    assert study.main(arguments) == 0
    table = pandas.read_csv(tmp_path / "results/longer_training/results.csv")
    assert table.groupby("times")["iterations"].unique().map(list).to_dict() == {1: [4], 3: [12]}
    assert "digits-quick, 3 times as long" in (tmp_path / "results/longer_training/verdict.json").read_text()


MISTAKES = [
    (("--times", "1"), "times (=1) must be a whole number ≥ 2"),
    (("--times", "2.5"), "--times (='2.5') cannot be read; accepted: a whole number"),
    (("--depths", "57"), "depth (=57) must be 6n+2 with block 'basic'; nearest are 56 and 62"),
    (("--shortcut", "B"), "option (='--shortcut') is unknown"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES)
def test_a_mistake_gets_one_line(arguments, text, refused):
    refused(study, arguments, text)
