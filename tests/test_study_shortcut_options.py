"""The shortcut-options study: both halves of the claim turn its verdict, and any registered shortcut can take part."""

import numpy
import pandas
import pytest

import resprobe as rp
from studies.shortcut_options import Options, _compare_spread, plan, study


def results(errors: dict[tuple[str, int], list[float]], **options) -> rp.Results:
    """Given test errors; training errors a point below."""
    rows, macs = [], []
    for (shortcut, depth), seeds in errors.items():
        macs.append({"shortcut": shortcut, "depth": depth, "macs": 1000 * depth})
        for seed, error in enumerate(seeds):
            labels = {"shortcut": shortcut, "depth": depth, "seed": seed}
            rows.append(labels | {"test_error": error, "train_error": error - 1, "parameters": 10, "seconds": 1.0})
    depths = tuple(sorted({depth for _, depth in errors}))
    shortcuts = tuple(dict.fromkeys(shortcut for shortcut, _ in errors if shortcut != "plain"))
    given = Options(depths=depths, shortcuts=shortcuts, **options)
    return rp.Results(given, pandas.DataFrame(rows), pandas.DataFrame(), [], measurements=pandas.DataFrame(macs))


TABLE_3 = {
    ("A", 20): [9.1, 9.0, 8.9],
    ("B", 20): [9.0, 9.0, 8.9],
    ("C", 20): [9.0, 8.9, 8.9],
    ("plain", 20): [9.2, 9.1, 9.0],
    ("A", 56): [25.03, 25.13, 24.93],
    ("B", 56): [24.52, 24.62, 24.42],
    ("C", 56): [24.19, 24.29, 24.09],
    ("plain", 56): [28.54, 28.64, 28.44],
}


def verdict(errors) -> rp.Verdict:
    (only,) = study.judge(results(errors))
    return only


def test_errors_as_in_table_3_confirm_the_claim():
    found = verdict(TABLE_3)
    assert found.verdict == "holds"
    assert found.measured == (
        "test error at 56 layers: plain 28.54 ± 0.10, A 25.03 ± 0.10, B 24.52 ± 0.10, C 24.19 ± 0.10 %"
    )
    assert "plain-56 against option A: difference +3.51 points" in found.evidence
    # Half of 28.54 − 25.03, less 25.03 − 24.19.
    assert "half the gap to plain less the spread: difference +0.9" in found.evidence
    assert "test error at 56 layers: spread 0.84, gap to plain 3.51 points" in found.evidence
    assert "A less B at 56 layers: difference +0.51 points" in found.evidence
    assert "B less C at 56 layers: difference +0.33 points" in found.evidence


def test_an_option_a_that_is_no_better_than_plain_refutes_it():
    assert verdict(TABLE_3 | {("A", 56): [28.6, 28.7, 28.5]}).verdict == "fails"


def test_options_that_differ_as_much_as_they_gain_refute_it():
    """A is much better than plain here, but C is as much better than A: projections would be essential."""
    found = verdict(TABLE_3 | {("C", 56): [21.5, 21.6, 21.4]})
    assert rp.compare([28.54, 28.64, 28.44], [25.03, 25.13, 24.93]).verdict == "holds"
    assert found.verdict == "fails"


def test_alike_options_and_a_small_gap_are_left_open():
    """Half the gap, 0.25 points, is not larger than the spread by half a point, nor is it smaller."""
    alike = {("A", 56): [25.1, 25.0, 24.9], ("B", 56): [25.0, 25.1, 24.9], ("C", 56): [24.9, 25.0, 25.1]}
    found = verdict(TABLE_3 | alike | {("plain", 56): [25.5, 25.6, 25.4]})
    assert found.verdict == "inconclusive"
    assert "paired t test" in found.evidence and "n = 3 pairs" in found.evidence


def test_where_plain_networks_hardly_err_there_is_nothing_to_gain():
    found = verdict(
        {key: [error / 100 for error in seeds] for key, seeds in TABLE_3.items()} | {("plain", 56): [0.3, 0.2, 0.3]}
    )
    assert found.verdict == "not tested"
    assert found.evidence.startswith(
        "the error to improve on is 0.27 points: a gain of 0.5 is impossible, and its absence refutes nothing"
    )


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.3, 0.6])
def test_options_that_are_alike_are_seldom_said_to_differ(seeds, spread):
    """The figure of docs/claims/shortcut_options.md: best and worst are chosen by the same errors that are then compared."""
    random = numpy.random.default_rng(0)

    def study_says() -> str:
        means = {"A": 2.0, "B": 2.0, "C": 2.0, "plain": 3.0}
        return _compare_spread(
            {name: random.normal(mean, spread, seeds).tolist() for name, mean in means.items()}
        ).verdict

    assert sum(study_says() == "fails" for _ in range(1000)) < 90


def test_a_worse_projection_counts_as_a_spread_too():
    assert verdict(TABLE_3 | {("C", 56): [28.0, 28.1, 27.9]}).verdict == "fails"


def test_shallow_networks_do_not_decide():
    assert verdict(TABLE_3 | {("C", 20): [5.0, 5.1, 4.9]}).verdict == "holds"


def test_noise_and_single_seeds_are_inconclusive():
    assert verdict(TABLE_3 | {("plain", 56): [21.0, 35.0, 29.6]}).verdict == "inconclusive"
    assert verdict({key: values[:1] for key, values in TABLE_3.items()}).verdict == "inconclusive"


def test_without_option_a_or_a_second_one_it_is_not_tested():
    for missing in ("A",), ("B", "C"):
        found = verdict({key: values for key, values in TABLE_3.items() if key[0] not in missing})
        assert found.verdict == "not tested"
        assert found.evidence == "option A and one of B and C are needed to compare"


def test_it_is_said_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for shortcuts, said in (["B", "C"], True), (["A", "highway"], True), (["A", "C"], False):
        assert study.main(["--shortcuts", *shortcuts, "--depths", "8", "14", "--iterations", "4", "--dry-run"]) == 0
        note = "note: option A and one of B and C are needed to compare: a claim will be 'not tested'\n"
        assert (note in capsys.readouterr().err) == said


def test_a_strangers_shortcut_is_shown_but_does_not_decide():
    found = verdict(TABLE_3 | {("highway", 20): [9.0, 9.0, 9.0], ("highway", 56): [40.0, 41.0, 42.0]})
    assert found.verdict == "holds"
    assert "highway 41.00 ± 1.00 %" in found.measured


def test_the_plan_has_every_shortcut_and_the_plain_network():
    planned = plan(Options(depths=(20,), shortcuts=("A", "C", "highway"), block="bottleneck"))
    assert [(one.labels["shortcut"], one.network, one.options.get("shortcut")) for one in planned] == [
        ("A", "cifar/resnet-20", "A"),
        ("C", "cifar/resnet-20", "C"),
        ("highway", "cifar/resnet-20", "highway"),
        ("plain", "cifar/plain-20", None),
    ]
    assert {one.options["block"] for one in planned} == {"bottleneck"}


def test_figures_show_the_options_on_a_scale_of_their_own():
    drawings = study.draw(results(TABLE_3))
    assert set(drawings) == {"figure", "figure-train"}
    for name, less in (("figure", 0), ("figure-train", 1)):
        everything, alone = drawings[name].figure.axes
        lines = [line.get_ydata().tolist() for line in everything.lines if line.get_marker() in ("o", "s", "^", "D")]
        expected = [[9.0, 25.03], [8.966667, 24.52], [8.933333, 24.19], [9.1, 28.54]]
        for line, means in zip(lines, expected, strict=True):
            assert line == pytest.approx([mean - less for mean in means])
        assert [text.get_text() for text in alone.texts] == ["C", "B", "A"]
        assert {text.get_text() for text in everything.texts} == {"A", "B", "C", "plain"}
        assert alone.get_ylim()[1] < everything.get_ylim()[1]
    assert "plain at 56 layers 28.54 %" in drawings["figure"].alt


def test_the_table_is_in_the_manner_of_table_3():
    table = study.tabulate(results(TABLE_3 | {("highway", 56): [25.0, 25.0, 25.0], ("highway", 20): [9.0, 9.0, 9.0]}))
    assert table["network"].tolist()[5:] == [
        "plain-56",
        "ResNet-56, A",
        "ResNet-56, B",
        "ResNet-56, C",
        "ResNet-56, highway",
    ]
    assert table["paper, 34 layers on ImageNet (%)"].tolist()[5:] == [28.54, 25.03, 24.52, 24.19, "–"]
    assert table["multiply-adds"].tolist()[5] == "56,000"
    assert table["test error (%)"].tolist()[6] == "25.03 ± 0.10"
    assert table["training error (%)"].tolist()[6] == "24.03 ± 0.10"


MISTAKES = [
    (
        ("--shortcuts", "A", "none"),
        "shortcuts (=A none) must be given, each once; accepted: A, A-centred, B, C, highway (plain networks are always there)",
    ),
    (("--shortcuts", "A", "A"), "shortcuts (=A A) must be given, each once; accepted: A"),
    (("--shortcuts",), "shortcuts (=) must be given, each once; accepted: A"),
    (("--shortcuts", "A", "D"), "shortcut (='D') is unknown; accepted: A, A-centred, B, C, highway"),
    (("--shortcut", "B"), "option (='--shortcut') is unknown"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES, ids=[" ".join(given) for given, _ in MISTAKES])
def test_a_mistake_gets_one_line(arguments, text, refused):
    refused(study, arguments, text)


def test_a_small_study_counts_what_each_option_costs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--depths", "8", "--seeds", "0", "1", "--iterations", "4", "--concurrency", "1", "--device", "cpu"]
    assert study.main([*arguments, "--shortcuts", "A", "B", "C", "highway"]) == 0
    measured = pandas.read_csv("results/shortcut_options/measurements.csv").set_index("shortcut")["macs"]
    # Eight-pixel digits: projections of 1×1 at 4×4 (16→32) and 2×2 (32→64), and C's at 8×8 (16→16) beside them.
    assert measured["plain"] == measured["A"]
    assert measured["B"] - measured["A"] == 16 * 32 * 16 + 32 * 64 * 4
    assert measured["C"] - measured["B"] == 16 * 16 * 64
    assert measured["highway"] > measured["C"]
    table = pandas.read_csv("results/shortcut_options/results.csv")
    assert table.groupby("shortcut")["seed"].count().to_dict() == {"A": 2, "B": 2, "C": 2, "highway": 2, "plain": 2}
