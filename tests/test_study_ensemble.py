"""The ensemble study: every choice of members is evaluated, and verdicts follow the data."""

import math

import pandas
import pytest
import torch

import resprobe as rp
from studies import ensemble
from studies.ensemble import groups, judge, plan, study


def results(ensembles: list[float], singles=(8.75, 7.51, 6.97), depths=(20, 32, 56), noise=0.05) -> rp.Results:
    """Single networks around given errors, one a depth, and one ensemble over depths for each seed."""
    rows = []

    def row(over, chosen, seeds, error, members):
        means = {"mean_of_members": sum(members) / len(members), "best_member": min(members)}
        places = {"depths": " ".join(map(str, chosen)), "seeds": " ".join(map(str, seeds))}
        rows.append({"over": over} | places | {"members": len(members), "test_error": error, "top5_error": 0.1} | means)

    per_seed = {seed: [error + noise * (seed - 1) for error in singles] for seed in range(len(ensembles))}
    for seed, errors in per_seed.items():
        for depth, error in zip(depths, errors, strict=True):
            row("single", [depth], [seed], error, [error])
    for seed, error in enumerate(ensembles):
        members = per_seed[seed]
        if len(depths) > 2:
            row("depths", depths[:2], [seed], error + 1, members[:2])
        if len(depths) > 1:
            row("depths", depths, [seed], error, members)
    seeds = range(len(ensembles))
    if len(seeds) > 1:
        for depth, error in zip(depths, singles, strict=True):
            row("seeds", [depth], seeds, error - 0.5, [error] * len(seeds))
        if len(depths) > 1:
            row("all", depths, seeds, min(ensembles) - 0.2, [sum(singles) / len(singles)] * len(seeds) * len(depths))
    options = rp.Options(depths=depths, seeds=tuple(seeds))
    trained = pandas.DataFrame(
        [{"depth": depth, "seed": seed, "train_error": 1.0} for depth in depths for seed in seeds]
    )
    return rp.Results(options, trained, pandas.DataFrame(), [], measurements=pandas.DataFrame(rows))


def verdict(*arguments, **changes) -> rp.Verdict:
    (only,) = judge(results(*arguments, **changes))
    return only


def test_ensembles_better_than_their_members_confirm_the_claim():
    found = verdict([6.1, 6.0, 6.2])
    assert found.verdict == "holds"
    assert found.measured == (
        "test error of ensembles of 3 depths 6.10 ± 0.10 %, of their members on average 7.74 ± 0.05 %"
    )
    assert "difference +1.64 points" in found.evidence
    assert "The member best on the test set: +0.87 points above the ensemble" in found.evidence
    assert "over seeds, one depth: 7.24 ± 0.91 %" in found.evidence


def test_ensembles_no_better_than_their_members_refute_it():
    assert verdict([7.8, 7.7, 7.9]).verdict == "fails"


def test_where_members_hardly_err_no_gain_is_no_refutation():
    found = verdict([0.28, 0.28, 0.27], singles=(0.3, 0.28, 0.26), noise=0.01)
    assert found.verdict == "not tested"
    assert found.evidence.startswith(
        "the error to improve on is 0.28 points: a gain of 0.5 is impossible, and its absence refutes nothing"
    )


def test_a_gain_below_half_a_point_is_not_denied_for_want_of_size():
    assert verdict([7.6, 7.3, 7.5]).verdict == "holds"


def test_noise_and_single_seeds_are_inconclusive():
    assert verdict([4.0, 9.5, 7.0]).verdict == "inconclusive"
    assert verdict([6.1]).verdict == "inconclusive"


def test_one_depth_is_not_tested():
    ours = results([6.1, 6.0, 6.2], singles=(8.75,), depths=(20,))
    (only,) = judge(ours)
    assert only.verdict == "not tested"
    assert study.tabulate(ours)["networks"].tolist()[:2] == ["ResNet-20", "ensemble over seeds, one depth"]
    assert study.draw(ours)["figure"].figure.axes[0].lines[0].get_label() == "single networks"


def test_the_plan_is_the_residual_networks():
    planned = plan(rp.Options(depths=(20, 32), shortcut="B"))
    assert [(one.network, one.options) for one in planned] == [
        (f"cifar/resnet-{depth}", {"block": "basic", "shortcut": "B"}) for depth in (20, 32)
    ]


def test_every_choice_of_members_is_there_once():
    members = [(depth, seed) for depth in (20, 32, 44) for seed in (0, 1)]
    chosen = list(groups(members))
    assert len(set(chosen)) == len(chosen) == 2 * (math.comb(3, 2) + 1) + 3 + 1
    assert ("depths", ((20, 1), (44, 1))) in chosen
    assert ("seeds", ((32, 0), (32, 1))) in chosen
    assert ("all", tuple(members)) in chosen
    for over, group in chosen:
        assert len({seed for _, seed in group}) == (1 if over == "depths" else 2)
        assert (len({depth for depth, _ in group}) == 1) == (over == "seeds")
    assert list(groups(members[:1])) == []
    assert [over for over, _ in groups(members[:2])] == ["seeds"]


def test_of_very_many_ensembles_so_many_are_looked_at():
    members = [(20, seed) for seed in range(30)]
    chosen = list(groups(members))
    assert len(set(chosen)) == len(chosen) <= 29 * ensemble.MOST
    assert chosen == list(groups(members))
    sizes = {size: sum(len(group) == size for _, group in chosen) for size in range(2, 31)}
    assert sizes[30] == 1 and sizes[29] == 30 and sizes[15] > 0.9 * ensemble.MOST
    assert all(list(group) == sorted(group) for _, group in chosen)


def test_the_figure_is_error_against_members():
    axis = study.draw(results([6.1, 6.0, 6.2]))["figure"].figure.axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert sorted(lines["single networks"].get_ydata()) == pytest.approx(
        [6.92, 6.97, 7.02, 7.46, 7.51, 7.56, 8.70, 8.75, 8.80]
    )
    over_depths = lines["over depths, one seed"]
    assert list(over_depths.get_xdata()) == [1, 2, 3]
    assert over_depths.get_ydata() == pytest.approx([7.7433, 7.1, 6.1], abs=1e-3)
    assert lines["over seeds, one depth"].get_ydata() == pytest.approx([7.7433, 7.2433], abs=1e-3)
    assert (list(lines["over depths and seeds"].get_xdata()), lines["over depths and seeds"].get_ydata()) == (
        [9],
        [5.8],
    )


def test_dots_of_equal_error_are_drawn_apart():
    axis = study.draw(results([1.0, 1.0, 1.0], singles=(2.0, 2.0, 3.0), noise=0.0))["figure"].figure.axes[0]
    dots = axis.lines[0]
    assert len({*zip(dots.get_xdata(), dots.get_ydata(), strict=True)}) == 9


def test_the_table_ends_with_the_papers_line():
    table = study.tabulate(results([6.1, 6.0, 6.2]))
    assert table["networks"].tolist()[:4] == ["ResNet-20", "ResNet-32", "ResNet-56", "ensemble over depths, one seed"]
    assert table["test error (%)"].tolist()[3] == "6.10 ± 0.10"
    assert table["members' mean (%)"].tolist()[3] == "7.74 ± 0.05"
    last = table.iloc[-1]
    assert (last["members"], last["top-5 error (%)"], last["test error (%)"]) == ("6", "3.57", "–")
    assert "quoted only" in last["networks"]


def test_a_small_study_averages_softmax_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smallest = ["--depths", "8", "14", "--seeds", "0", "1", "--iterations", "6"]
    assert study.main([*smallest, "--concurrency", "1", "--device", "cpu", "--precision", "fp32"]) == 0
    table = pandas.read_csv("results/ensemble/results.csv")
    measured = pandas.read_csv("results/ensemble/measurements.csv", dtype={"depths": str, "seeds": str})
    assert measured["over"].value_counts().to_dict() == {"single": 4, "depths": 2, "seeds": 2, "all": 1}
    singles = measured[measured["over"] == "single"].sort_values(["depths", "seeds"])
    by_depth = table.assign(name=table["depth"].astype(str)).sort_values(["name", "seed"])
    assert singles["test_error"].tolist() == pytest.approx(by_depth["test_error"].tolist())
    test, total = rp.load_data("digits").test, 0
    for row in table[table["seed"] == 1].itertuples():
        network = rp.load_weights(
            rp.build(f"cifar/resnet-{row.depth}", in_channels=1), tmp_path / "runs" / row.run
        ).eval()
        with torch.no_grad():
            total = total + network(network.normalization(test.images)).softmax(1)
    naive = 100 * (total.argmax(1) != test.labels).double().mean().item()
    ours = measured.query("over == 'depths' and seeds == '1'").iloc[0]
    assert ours["test_error"] == pytest.approx(naive)
    assert (ours["depths"], ours["members"]) == ("8 14", 2)
