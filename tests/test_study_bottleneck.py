"""The bottleneck study: weights and measured time turn one verdict, training errors the other."""

import dataclasses

import pandas
import pytest
import torch
from torch import nn

import resprobe as rp
from studies import bottleneck
from studies.bottleneck import Options, plan, study

ROLES = ("basic", "bottleneck", "projection")


def results(
    errors=None, step=(10.0, 20.0, 40.0), weights=(73_728, 69_632, 135_168), noise=0.1, **options
) -> rp.Results:
    """Training errors of bottleneck networks, test errors a point above; costs of the three candidates in four rounds."""
    rows = []
    for (kind, depth), seeds in (PAPER_LIKE if errors is None else errors).items():
        for seed, error in enumerate(seeds):
            labels = {"block": "bottleneck", "kind": kind, "depth": depth, "seed": seed}
            rows.append(labels | {"train_error": error, "test_error": error + 1})
            if kind == "residual":
                basic = labels | {"block": "basic", "depth": (depth - 2) // 3 * 2 + 2}
                rows.append(basic | {"train_error": error + 2, "test_error": error + 3})
    depths = tuple(sorted({row["depth"] for row in rows if row["block"] == "bottleneck"}))
    costs = []
    for number in range(4):
        for depth in (0, *depths):
            for role, milliseconds, count in zip(ROLES, step, weights, strict=True):
                labels = {"depth": depth, "role": role, "candidate": f"{role} at {depth}", "round": number}
                slowed = milliseconds + (noise * number if role == "projection" else 0)
                costs.append(
                    labels
                    | {"weights": count, "macs": 10 * count, "kept_mib": milliseconds}
                    | {"forward_ms": slowed / 2, "step_ms": slowed}
                )
    given = Options(depths=depths, **options)
    return rp.Results(given, pandas.DataFrame(rows), pandas.DataFrame(), [], measurements=pandas.DataFrame(costs))


PAPER_LIKE = {
    ("plain", 20): [9.4, 9.6, 9.5],
    ("plain", 56): [13.4, 13.6, 13.5],
    ("residual", 20): [1.0, 1.1, 0.9],
    ("residual", 56): [0.5, 0.6, 0.4],
}


def verdicts(given: rp.Results) -> dict[str, str]:
    return {verdict.claim.id: verdict.verdict for verdict in study.judge(given)}


def test_the_paper_is_confirmed():
    assert verdicts(results()) == {"C12": "holds", "C23": "holds"}


def test_a_projection_without_weights_refutes_the_doubling():
    assert verdicts(results(weights=(73_728, 69_632, 90_000)))["C12"] == "fails"


def test_a_projection_without_multiply_adds_refutes_the_doubling():
    given = results()
    given.measurements.loc[given.measurements["role"] == "projection", "macs"] = 10 * 69_632
    assert verdicts(given)["C12"] == "fails"


def test_a_projection_without_time_refutes_the_doubling():
    assert verdicts(results(step=(10.0, 20.0, 20.2)))["C12"] == "fails"


def test_times_that_vary_more_than_they_differ_are_inconclusive():
    assert verdicts(results(step=(10.0, 20.0, 15.0), noise=10.0))["C12"] == "inconclusive"


def test_plain_bottlenecks_that_do_not_degrade_refute_the_footnote():
    assert verdicts(results(PAPER_LIKE | {("plain", 56): [9.3, 9.5, 9.4]}))["C23"] == "fails"


def test_noise_and_single_seeds_are_inconclusive():
    assert verdicts(results(PAPER_LIKE | {("plain", 56): [4.0, 25.0, 11.0]}))["C23"] == "inconclusive"
    assert verdicts(results({key: values[:1] for key, values in PAPER_LIKE.items()}))["C23"] == "inconclusive"


def test_one_depth_is_not_tested():
    assert verdicts(results({key: values for key, values in PAPER_LIKE.items() if key[1] == 56}))["C23"] == "not tested"


def test_the_evidence_has_the_numbers():
    cost, degradation = study.judge(results())
    assert cost.measured == (
        "a projection in the place of the block's identity: weights × 1.94, multiply-adds × 1.94, memory kept × 2.00, "
        "forward pass × 2.01 (2.00–2.01), training step × 2.01 (2.00–2.01)"
    )
    assert "n = 4 rounds (above 10 is needed)" in cost.evidence
    assert "the bottleneck block by the basic one: weights × 0.94" in cost.evidence
    assert "bottleneck-56 by basic-38: weights × 0.94" in cost.evidence
    assert "test error, basic-38 less bottleneck-56: difference +2.00 points" in cost.evidence
    assert degradation.measured == "training error of plain networks 9.50 ± 0.10 → 13.50 ± 0.10 % at 20, 56 layers"
    assert "plain-56 against plain-20: difference +4.00 points" in degradation.evidence


def test_the_plan_sets_beside_each_network_the_basic_one_with_as_many_blocks():
    planned = plan(Options(depths=(20, 56)))
    assert [(one.labels["block"], one.network, one.options.get("shortcut")) for one in planned] == [
        ("bottleneck", "cifar/plain-20", None),
        ("bottleneck", "cifar/resnet-20", "B"),
        ("basic", "cifar/resnet-14", "B"),
        ("bottleneck", "cifar/plain-56", None),
        ("bottleneck", "cifar/resnet-56", "B"),
        ("basic", "cifar/resnet-38", "B"),
    ]
    assert planned[4].labels == {"block": "bottleneck", "kind": "residual", "depth": 56}
    for one, other in ((planned[1], planned[2]), (planned[4], planned[5])):
        blocks = (len(rp.build(each.network, **each.options).blocks()) for each in (one, other))
        assert len(set(blocks)) == 1


def test_figures():
    drawings = study.draw(results())
    assert set(drawings) == {"figure", "figure-cost"}
    training, test = drawings["figure"].figure.axes
    assert training.lines[0].get_ydata() == pytest.approx([9.5, 13.5])  # plain, of bottlenecks alone
    assert {text.get_text() for text in test.texts} == {"plain", "residual"}
    for axis, name in zip(drawings["figure-cost"].figure.axes, ("at 0", "at 56"), strict=True):
        bars = [[bar.get_height() for bar in group] for group in axis.containers if hasattr(group, "patches")]
        assert bars[0] == pytest.approx([1.0] * 5)
        assert bars[1] == pytest.approx([69_632 / 73_728, 69_632 / 73_728, 2.0, 2.0, 2.0])
        assert bars[2] == pytest.approx([135_168 / 73_728, 135_168 / 73_728, 4.0, 4.015, 4.015])
        assert [text.get_text() for text in axis.get_legend().get_texts()] == [f"{role} {name}" for role in ROLES]
    assert "training step × 2.00" in drawings["figure-cost"].alt


def test_the_table_has_blocks_networks_and_the_plain_ones():
    table = study.tabulate(results()).set_index("what")
    assert table.index.tolist()[-2:] == ["bottleneck-20, plain", "bottleneck-56, plain"]
    assert table.loc["bottleneck at 0", "weights"] == "69,632"
    assert table.loc["projection at 0", "training step (ms)"] == "40.2 (40.0–40.3)"
    assert table.loc["bottleneck at 56", "training error (%)"] == "0.50 ± 0.10"
    assert table.loc["basic at 56", "test error (%)"] == "3.50 ± 0.10"
    assert table.loc["basic at 56", "paper, ImageNet (%)"] == "24.52 (34 layers)"
    assert table.loc["projection at 56", "test error (%)"] == "–"
    assert table.loc["bottleneck-56, plain", "training error (%)"] == "13.50 ± 0.10"


# -- what is measured ------------------------------------------------------------------------------------------------


def test_measured_candidates_have_the_papers_counts():
    options = Options(depths=(20,), repeats=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bottleneck, "PIXELS", 4)
        patch.setattr(bottleneck, "IMAGES", 1)
        patch.setattr(bottleneck, "NETWORK_IMAGES", 1)
        costs = study.measure(rp.Results(options, pandas.DataFrame(), pandas.DataFrame(), []))
    assert costs["candidate"].tolist() == 2 * [
        "basic 64-d, identity",
        "bottleneck 256-d, identity",
        "bottleneck 256-d, projection",
        "basic-14, B",
        "bottleneck-20, B",
        "bottleneck-20, C",
    ]
    assert costs["weights"].tolist()[:3] == [73_728, 69_632, 69_632 + 65_536]
    assert costs["macs"].tolist()[:3] == [16 * 73_728, 16 * 69_632, 16 * (69_632 + 65_536)]
    assert (costs[["forward_ms", "step_ms"]] > 0).all(axis=None)
    assert costs.groupby("candidate")["kept_mib"].nunique().max() == 1  # counted, hence the same every round


def test_memory_kept_is_what_the_backward_pass_needs():
    """A convolution keeps its input, a ReLU its output; an input that needs no gradient is kept for the weights' own."""
    passes = bottleneck._Passes(
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 1)), torch.randn(5, 2, 6, 6), "fp32"
    )
    one = 5 * 6 * 6 * 4
    assert passes.kept() == 2 * one + 3 * one  # the images, and the ReLU's output, which the second convolution shares
    assert all(parameter.grad is None for parameter in passes.module.parameters())


def test_an_own_block_takes_the_bottlenecks_place(tmp_path, monkeypatch):
    """From the command line to the report, on a few iterations."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("PIXELS", 4), ("IMAGES", 1), ("NETWORK_IMAGES", 1)):
        monkeypatch.setattr(bottleneck, name, size)
    (tmp_path / "wide.py").write_text(
        "import resprobe as rp\n\n\n"
        '@rp.register_block("wide-bottleneck")\n'
        'class Wide(rp.BLOCKS["bottleneck"]):\n'
        "    expansion = 2\n"
    )
    arguments = ["--depths", "11", "--seeds", "0", "1", "--iterations", "4", "--repeats", "2", "--concurrency", "1"]
    plugin = ["--plugin", "wide.py", "--block", "wide-bottleneck", "--device", "cpu"]
    try:
        assert study.main([*arguments, *plugin]) == 0
    finally:
        rp.BLOCKS._things.pop("wide-bottleneck", None)
    table = pandas.read_csv("results/bottleneck/results.csv")
    assert table.groupby(["block", "depth", "kind"])["seed"].count().to_dict() == {
        ("wide-bottleneck", 11, "plain"): 2,
        ("wide-bottleneck", 11, "residual"): 2,
        ("basic", 8, "residual"): 2,
    }
    measured = pandas.read_csv("results/bottleneck/measurements.csv")
    assert "wide-bottleneck 128-d, projection" in set(measured["candidate"])


MISTAKES = [
    (("--block", "basic"), "block (='basic') is what the other is compared with; accepted: bottleneck, or a plugin's"),
    (("--repeats", "1"), "repeats (=1) must be a whole number ≥ 2, to have a spread"),
    (("--depths", "32"), "depth (=32) must be 9n+2 with block 'bottleneck'; nearest are 29 and 38"),
    (("--block", "bottlneck"), "block (='bottlneck') is unknown; accepted: basic, bottleneck, single"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES, ids=[" ".join(given) for given, _ in MISTAKES])
def test_a_mistake_gets_one_line(arguments, text, refused):
    refused(study, arguments, text)


def test_the_presets_are_the_studys():
    assert study.setting(study.presets["quick"]) == "quick"
    assert study.setting(dataclasses.replace(study.presets["quick"], repeats=3)) == "custom"
