"""The gradient-norms study: verdicts follow the data; what is measured is what plain autograd gives."""

import math
from types import SimpleNamespace

import pandas
import pytest
import torch
from torch.nn import functional as F

import resprobe as rp
from studies.gradient_norms import (
    BELOW_FLOAT32,
    CONDITIONS,
    CONTROL,
    NETWORK,
    PAPERS,
    Options,
    _stated,
    judge,
    plan,
    ratios,
    study,
)

SEEDS = (0, 1, 2)
DEPTHS = {"trained": (20, 56), "all": (20, 56, 110)}


def results(start=None, training=None, control=(-16.0, -52.0, -107.0), forward=1.0, seeds=SEEDS, depths=DEPTHS):
    """Networks of three blocks with given ratios, in decades: at the start by depth, and along training by iteration."""
    start = {20: 1.0, 56: 1.2, 110: 1.5} if start is None else start
    training = {20: [1.0, 0.5, 0.4], 56: [1.2, 0.2, 0.1]} if training is None else training
    measured, runs, table, histories = [], [], [], []

    def gradients(decades: float, seed: int) -> list[float]:
        first = 10 ** (decades + 0.01 * seed) * 0.5 if decades > -300 else 0.0
        return [first, 0.7, 0.5]

    for kind in ("plain", "residual"):
        for condition in CONDITIONS:
            for index, depth in enumerate(depths["all"]):
                decades = {PAPERS: start[depth], CONTROL: control[index]}.get(condition, 0.0)
                labels = dict(zip(NETWORK, (kind, depth, *condition), strict=True)) | {"moment": "initialization"}
                for seed in seeds:
                    for position, rms in enumerate(gradients(decades, seed), start=1):
                        own = labels | {"seed": seed, "position": position}
                        measured.append(own | {"part": "block", "layer": f"b{position}", "output_gradient_rms": rms})
                        layer = {"forward_std": forward, "gradient_norm": 0.1 * position, "gradient_to_weight": 0.01}
                        measured.append(own | {"part": "layer", "layer": f"c{position}"} | layer)
    networks = [(kind, depth, *PAPERS) for depth in depths["trained"] for kind in ("plain", "residual")]
    for key in (*networks, ("plain", depths["trained"][0], *CONTROL)):
        labels = dict(zip(NETWORK, key, strict=True))
        for seed in seeds:
            decades = training[key[1]] if key[2:] == PAPERS else [-math.inf] * 3
            rows = [
                {"iteration": iteration, "kind": "block", "position": position, "output_gradient_rms": rms}
                for iteration, one in zip((0, 1, 10), decades, strict=True)
                for position, rms in enumerate(gradients(one, seed), start=1)
            ]
            error = 90.0 if key[2:] == CONTROL else 80.0 if key[:2] == ("plain", 56) else 1.0
            runs.append(SimpleNamespace(tables={"gradient-norms": pandas.DataFrame(rows)}))
            table.append(labels | {"seed": seed, "train_error": error + seed})
            histories += [labels | {"seed": seed, "iteration": at, "train_error": error + seed} for at in (10, 20)]
    options = Options(depths=depths["trained"], depth=depths["all"][-1], seeds=tuple(seeds))
    return rp.Results(
        options, pandas.DataFrame(table), pandas.DataFrame(histories), runs, measurements=pandas.DataFrame(measured)
    )


def verdicts(*arguments, **changes) -> dict[str, rp.Verdict]:
    return {verdict.claim.id: verdict for verdict in judge(results(*arguments, **changes))}


def words(*arguments, **changes) -> dict[str, str]:
    return {name: verdict.verdict for name, verdict in verdicts(*arguments, **changes).items()}


def test_gradients_that_keep_their_size_confirm_both_claims():
    found = verdicts()
    assert {name: verdict.verdict for name, verdict in found.items()} == {"C6": "holds", "C6b": "holds"}
    assert "at initialization 1.01 ± 0.01 → 1.21 ± 0.01 → 1.51 ± 0.01 at 20, 56, 110 layers" in found["C6"].measured
    assert "median 0.51 ± 0.01 → 0.21 ± 0.01" in found["C6"].measured
    assert "lowest single reading 0.41 ± 0.01 → 0.11 ± 0.01" in found["C6"].measured
    assert "highest single reading 1.01 ± 0.01 → 1.21 ± 0.01" in found["C6b"].measured
    assert (
        "plain-110 above a thousandth of plain-20 at initialization: difference +3.50 decades" in found["C6"].evidence
    )
    assert (
        "plain-56 above a thousandth of plain-20 along training, median: difference +2.70 decades"
        in found["C6"].evidence
    )
    assert "no BN, small normal: -15.99 ± 0.01 → -51.99 ± 0.01 → -106.99 ± 0.01" in found["C6"].evidence


def test_gradients_that_vanish_with_depth_at_initialization_refute_the_claim():
    assert words({20: 1.0, 56: -1.0, 110: -2.5}) == {"C6": "fails", "C6b": "holds"}


def test_gradients_that_vanish_along_training_refute_the_claim():
    assert words(training={20: [1.0, 0.5, 0.4], 56: [1.2, -3.0, -3.2]}) == {"C6": "fails", "C6b": "holds"}


def test_a_single_reading_is_stated_and_does_not_decide():
    found = verdicts(training={20: [1.0, 0.5, 0.4], 56: [1.2, 0.0, -5.0]})["C6"]
    assert found.verdict == "holds"
    assert "by the lowest single reading instead, along training: fails (difference -2.40 decades" in found.evidence


def test_gradients_that_explode_refute_the_other_claim():
    assert words({20: 1.0, 56: 3.3, 110: 6.8}) == {"C6": "holds", "C6b": "fails"}
    assert words(training={20: [1.0, 0.5, 0.4], 56: [4.0, 4.0, 4.0]}) == {"C6": "holds", "C6b": "fails"}


def test_a_forward_signal_without_variance_refutes_the_claim():
    assert words(forward=0.0)["C6"] == "fails"
    assert words(forward=1e-4)["C6"] == "fails"  # as good as none


def test_without_a_control_that_vanishes_nothing_is_shown():
    found = verdicts(control=(0.0, 0.0, 0.0))["C6"]
    assert found.verdict == "inconclusive"
    assert "of which vanishing cannot be said, so the test shows nothing" in found.evidence


def test_noise_and_single_seeds_are_inconclusive():
    noisy = results()
    blocks = noisy.measurements["part"] == "block"
    deep = blocks & (noisy.measurements["depth"] == 110) & (noisy.measurements["position"] == 1)
    noisy.measurements.loc[deep & (noisy.measurements["seed"] == 1), "output_gradient_rms"] *= 1e-9
    noisy.measurements.loc[deep & (noisy.measurements["seed"] == 2), "output_gradient_rms"] *= 1e9
    assert [verdict.verdict for verdict in judge(noisy)] == ["inconclusive", "inconclusive"]
    assert words(seeds=(0,)) == {"C6": "inconclusive", "C6b": "inconclusive"}


def test_where_no_gradient_arrives_in_the_shallowest_network_a_change_cannot_be_told():
    """As in a plain network of blocks whose branch begins at zero."""
    nothing = dict.fromkeys(DEPTHS["all"], -math.inf)
    found = {verdict.claim.id: verdict for verdict in judge(results(start=nothing, forward=0.0))}
    assert found["C6"].verdict == "fails"  # there is no forward signal
    assert found["C6b"].verdict == "inconclusive"
    assert found["C6b"].evidence.startswith(
        "plain-110 below a thousand times plain-20 at initialization: no gradient arrives at the first block of plain-20"
    )
    assert "at initialization ≤ -299.70 ± 0.00 → ≤ -299.70 ± 0.00 → ≤ -299.70 ± 0.00 at 20, 56" in found["C6b"].measured
    table = study.tabulate(results(start=nothing)).set_index(["network", "condition"])
    assert table["ratio at start (decades)"]["plain-56", "BN, He"] == "≤ -299.70 ± 0.00"
    # A gradient that is lost between the two is a fall, however far.
    lost = {verdict.claim.id: verdict.verdict for verdict in judge(results(start=nothing | {20: 1.0}))}
    assert lost == {"C6": "fails", "C6b": "holds"}


@pytest.mark.parametrize(
    ("values", "bounds", "expected"),
    [
        ([-5.0, -13.7, -2.0], [False, True, False], "≤ -13.70; -5.00; -2.00"),
        ([-18.0, -13.7, -12.0], [False, True, False], "≤ -18.00; ≤ -13.70; -12.00"),
        ([-18.0, -13.7, -12.0, -11.0], [False, True, True, False], "≤ -18.00; ≤ -12.85; -11.00"),
        ([-13.0, -2.0], [True, False], "≤ -13.00; ≤ -7.50; -2.00"),
        ([-5.0, -4.0, -2.0], [False] * 3, "-5.00; -4.00; -2.00"),
        ([-13.7, math.nan, -13.5], [True, False, True], "≤ -13.70; ≤ -13.60; ≤ -13.50"),
    ],
)
def test_lowest_median_and_highest_are_bounds_where_a_bound_might_lower_them(values, bounds, expected):
    readings = pandas.DataFrame({"seed": 0, "decades": values, "at_most": bounds})
    assert "; ".join(_stated(readings, reduce) for reduce in ("min", "median", "max")) == expected


def test_one_depth_is_not_tested_and_one_trained_depth_is_half_a_test():
    only = {"trained": (20,), "all": (20,)}
    assert words(depths=only) == {"C6": "not tested", "C6b": "not tested"}
    found = verdicts(depths={"trained": (20,), "all": (20, 110)})
    assert {verdict.verdict for verdict in found.values()} == {"inconclusive"}
    assert "along training one depth only, so that was not tested" in found["C6"].evidence


def test_gradients_of_zero_have_a_bound_and_no_gradient_has_no_ratio():
    ours = results()
    table = ratios(ours)
    control = table[(table["moment"] == "training") & (table["norm"] == "none")]
    assert control["decades"].tolist() == pytest.approx([math.log10(BELOW_FLOAT32 / 0.5)] * 9)
    for run in ours.runs:
        run.tables["gradient-norms"]["output_gradient_rms"] = 0.0
    table = ratios(ours)
    assert table.loc[table["moment"] == "training", "decades"].isna().all()
    assert table.loc[table["moment"] == "initialization", "decades"].notna().all()


def test_the_plan_has_the_papers_networks_and_a_control():
    planned = plan(Options(depths=(20, 56), depth=110, shortcut="B", seeds=SEEDS))
    assert [
        (one.network, one.options["norm"], one.options["init"], one.options.get("shortcut")) for one in planned
    ] == [
        ("cifar/plain-20", "batch", "he", None),
        ("cifar/resnet-20", "batch", "he", "B"),
        ("cifar/plain-56", "batch", "he", None),
        ("cifar/resnet-56", "batch", "he", "B"),
        ("cifar/plain-20", "none", "small-normal", None),
    ]
    assert {one.probes for one in planned} == {("gradient-norms",)}
    # With the paper's normalization and initialization spelt out, runs are the other studies'.
    assert rp.networks.resolve("cifar/plain-20", **planned[0].options) == rp.networks.resolve("cifar/plain-20")


def test_problem_one_shows_signals_and_gradients_along_the_deepest_network():
    drawing = study.draw(results())["figure-problem-one"]
    forward, backward = drawing.figure.axes
    lines = {line.get_label(): line for line in backward.lines}
    assert list(lines) == ["BN, He", "BN, small normal", "no BN, He", "no BN, small normal"]
    assert lines["BN, He"].get_ydata() == pytest.approx([1.51, math.log10(0.7 / 0.5), 0.0])
    assert lines["no BN, small normal"].get_ydata()[0] == pytest.approx(-106.99)
    assert [line.get_ydata().tolist() for line in forward.lines] == [[0.0] * 3] * 4
    assert backward.get_ylim()[0] == -20  # else what vanishes squashes all the rest
    assert "plain-110" in drawing.caption
    assert "no BN, small normal: forward std 10^0.0 in the last layer, gradient 10^-107.0" in drawing.alt
    assert "ResNet-110" in study.draw(results())["figure-problem-one-residual"].caption


def test_problem_two_shows_gradients_beside_the_training_error():
    drawing = study.draw(results())["figure-problem-two"]
    left, right = drawing.figure.axes
    *drawn, bounds = left.lines
    lines = {line.get_label(): line for line in drawn}
    assert list(lines) == ["plain-20", "plain-56", "ResNet-20", "ResNet-56", "plain-20, no BN, small normal"]
    # A gradient of 0 has a bound alone, which no line goes through.
    assert len(lines["plain-20, no BN, small normal"].get_xdata()) == 0 and bounds.get_linestyle() == "None"
    assert bounds.get_ydata() == pytest.approx([math.log10(BELOW_FLOAT32 / 0.5)] * 3)
    assert lines["plain-56"].get_xdata().tolist() == [1, 2, 11]  # a log axis has no 0
    assert lines["plain-56"].get_ydata() == pytest.approx([1.21, 0.21, 0.11])
    errors = {line.get_label(): line.get_ydata()[-1] for line in right.lines}
    assert errors["plain-56"] == pytest.approx(81.0)
    assert errors["plain-20, no BN, small normal"] == pytest.approx(91.0)
    assert {line.get_linestyle() for name, line in lines.items() if name in ("plain-20", "plain-56")} == {"--"}
    assert "plain-56: median 0.21 ± 0.01 decades, final training error 81.00 ± 1.00 %" in drawing.alt


def test_the_table_has_a_row_a_network():
    table = study.tabulate(results())
    assert len(table) == 2 * 4 * 3
    row = table[(table["network"] == "plain-56") & (table["condition"] == "BN, He")].iloc[0]
    assert row["ratio at start (decades)"] == "1.21 ± 0.01"
    assert row["median in training"] == "0.21 ± 0.01"
    assert row["lowest; highest"] == "0.11 ± 0.01; 1.21 ± 0.01"
    assert row["‖∇W‖, first; last layer"] == "0.1; 0.3"
    assert row["training error (%)"] == "81.00 ± 1.00"
    untrained = table[(table["network"] == "plain-110") & (table["condition"] == "BN, He")].iloc[0]
    assert untrained["training error (%)"] == "not trained"
    assert untrained["median in training"] == untrained["lowest; highest"] == "–"
    control = table[(table["network"] == "plain-20") & (table["condition"] == "no BN, small normal")].iloc[0]
    assert control["lowest; highest"] == "≤ -13.70 ± 0.00; ≤ -13.70 ± 0.00"  # 0 in float32: bounds, not figures


def test_a_small_study_measures_what_plain_autograd_gives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--depths", "8", "--depth", "14", "--seeds", "1", "--iterations", "2", "--concurrency", "1"]
    assert study.main([*arguments, "--device", "cpu", "--precision", "fp32"]) == 0
    measured = pandas.read_csv("results/gradient_norms/measurements.csv")
    blocks, layers = (measured[measured["part"] == part] for part in ("block", "layer"))
    start = layers[layers["moment"] == "initialization"]
    assert start.groupby(["kind", "depth"])["position"].max().to_dict() == {
        (kind, depth): depth - 1 for kind in ("plain", "residual") for depth in (8, 14)
    }
    assert set(zip(start["norm"], start["init"], strict=True)) == set(CONDITIONS)
    trained = layers[layers["moment"] == "trained"]
    assert set(zip(trained["kind"], trained["depth"], trained["norm"], strict=True)) == {
        ("plain", 8, "batch"),
        ("residual", 8, "batch"),
        ("plain", 8, "none"),
    }

    data = rp.load_data("digits")
    images = data.train.images.double() / 255
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:64]
    torch.manual_seed(1)
    network = rp.build("cifar/plain-14", in_channels=1, num_classes=10, norm="none", init="small-normal").double()
    first, last, seen = network.stage1[0], network.stage3[-1], {}
    for name, block in (("first", first), ("last", last)):
        block.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    first.branch.conv1.register_forward_hook(lambda module, inputs, output: seen.update(response=output))
    loss = F.cross_entropy(network(images[chosen] - images.mean(0)), data.train.labels[chosen])
    gradients = torch.autograd.grad(loss, [seen["first"], seen["last"], first.branch.conv1.weight])
    one = "kind == 'plain' and depth == 14 and norm == 'none' and init == 'small-normal' and seed == 1"
    rms = blocks.query(one).sort_values("position")["output_gradient_rms"].tolist()
    assert rms[0] == pytest.approx(8 * gradients[0].norm().item(), rel=1e-5)
    assert rms[-1] == pytest.approx(8 * gradients[1].norm().item(), rel=1e-5)
    layer = start.query(one).query("layer == 'stage1.0.branch.conv1'")
    assert layer["gradient_norm"].item() == pytest.approx(gradients[2].norm().item(), rel=1e-5)
    assert layer["forward_std"].item() == pytest.approx(seen["response"].std().item(), rel=1e-5)


MISTAKES = [
    (("--depth", "21"), "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26"),
    (("--depths", "20", "57"), "depth (=57) must be 6n+2 with block 'basic'; nearest are 56 and 62"),
    (("--shortcut", "D"), "shortcut (='D') is unknown; accepted: A, A-centred, B, C"),
]


@pytest.mark.parametrize(
    ("arguments", "text"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_mistake_gets_one_line_before_anything_is_trained(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert text in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
