"""The block-comparison study: its verdict follows the deepest networks' errors, and its costs are those of the networks."""

import pandas
import pytest
import torch

import resprobe as rp
from plugins import flops
from studies.block_comparison import Options, plan, study

BETTER = {
    ("mine", 20): [9.0, 9.1, 8.9],
    ("basic", 20): [8.0, 8.1, 7.9],
    ("mine", 56): [6.0, 6.1, 5.9],
    ("basic", 56): [7.0, 7.1, 6.9],
}
"""Test errors in percent, one a seed: worse at 20 layers, better at 56."""
UNCOUNTED = {"mine": "aten::_fft_c2c aten::add", "basic": "aten::add aten::relu", "other": "aten::add aten::relu"}
THIRD = {("other", 20): [9.0, 9.2, 8.8], ("other", 56): [6.2, 6.8, 5.6]}
"""Of a third block, which at 56 layers errs about as `mine` does."""


def results(errors: dict[tuple[str, int], list[float]], **changed) -> rp.Results:
    """Given test errors; training errors a point below. `mine` costs twice what others do in weights, and half in work."""
    rows, costs, histories = [], [], []
    for (block, depth), seeds in errors.items():
        cost = {"parameters": 1000, "macs": 4_000_000, "activations": 300}
        if block == "mine":
            cost = {"parameters": 2000, "macs": 2_000_000, "activations": 300}
        cost = {name: depth * value for name, value in cost.items()} | {"uncounted": UNCOUNTED[block]}
        costs.append({"block": block, "depth": depth} | cost)
        for seed, error in enumerate(seeds):
            labels = {"block": block, "depth": depth, "width": 19 if block == "mine" else 16, "seed": seed}
            rows.append(labels | {"test_error": error, "train_error": error - 1, "seconds": 2.0})
            for iteration, above in (50, 20.0), (100, 0.0):
                row = {"iteration": iteration, "test_error": error + above, "train_error": error - 1 + above}
                histories.append(labels | row)
    depths = tuple(dict.fromkeys(depth for _, depth in errors))
    against = tuple(dict.fromkeys(block for block, _ in errors if block != "mine"))
    options = Options(block="mine", against=against, depths=depths, seeds=tuple(range(len(seeds))), **changed)
    tables = pandas.DataFrame(rows), pandas.DataFrame(histories)
    return rp.Results(options, *tables, [], measurements=pandas.DataFrame(costs))


def verdict(errors) -> rp.Verdict:
    (only,) = study.judge(results(errors))
    return only


def test_a_block_that_errs_less_where_it_is_deepest_holds():
    found = verdict(BETTER)
    assert found.verdict == "holds"
    assert found.measured == "test error at 56 layers: mine 6.00 ± 0.10 %, basic 7.00 ± 0.10 %"
    first, training, cost, shallow = found.evidence.splitlines()
    left_out = "(multiply-adds leave out of mine: aten::_fft_c2c) (multiply-adds leave out of basic: aten::relu)"
    assert first.startswith("test error, basic less mine: difference +1.00 points")
    assert training.startswith("training error, basic less mine: difference +1.00 points")
    assert cost == f"mine by basic: parameters × 2.00, multiply-adds × 0.50, activations × 1.00 {left_out}"
    assert shallow.startswith("test error at 20 layers, basic less mine: difference -1.00 points")


def test_turned_round_it_fails():
    turned = {("mine" if block == "basic" else "basic", depth): errors for (block, depth), errors in BETTER.items()}
    errors = {key: turned[key] for key in BETTER}
    found = verdict(errors)
    assert found.verdict == "fails"
    assert found.evidence.splitlines()[1] == "mine certainly errs more than basic"


def test_an_advantage_too_small_to_count_is_excluded_or_left_open():
    alike = verdict(BETTER | {("mine", 56): [7.0, 7.1, 6.9]})
    assert alike.verdict == "fails"
    assert alike.evidence.splitlines()[1] == "that mine errs by 0.5 points less than basic is excluded"
    assert verdict(BETTER | {("mine", 56): [5.0, 9.0, 6.5]}).verdict == "inconclusive"
    assert verdict({key: errors[:1] for key, errors in BETTER.items()}).verdict == "inconclusive"


def test_where_the_other_hardly_errs_there_is_nothing_to_gain():
    hardly = {key: [error / 100 for error in seeds] for key, seeds in BETTER.items()} | {
        ("basic", 56): [0.06, 0.07, 0.05]
    }
    found = verdict(hardly | {("mine", 20): [1.1, 1.2, 1.3], ("basic", 20): [1.1, 1.2, 1.3]})
    assert found.verdict == "not tested" and found.evidence.startswith("test error, basic less mine")
    assert (
        found.evidence.splitlines()[1]
        == "the error to improve on is 0.06 points: a gain of 0.5 is impossible, and its absence refutes nothing"
    )


def test_networks_that_have_not_learned_refute_nothing_unless_one_is_certainly_worse():
    guessing = {key: [90.0, 90.1, 89.9] for key in BETTER}
    found = verdict(guessing)
    assert found.verdict == "inconclusive" and found.evidence.startswith("none of these networks has learned")
    worse = verdict(guessing | {("basic", 56): [50.0, 50.1, 49.9]})
    assert worse.verdict == "fails" and "mine certainly errs more than basic" in worse.evidence


def test_beside_several_blocks_it_must_err_less_than_each():
    found = verdict(BETTER | THIRD)
    assert (
        found.claim.statement
        == "Residual networks of one block err less than those of each of several others, at the same depth"
    )
    assert found.measured.endswith(
        "mine 6.00 ± 0.10 %, basic 7.00 ± 0.10 % (holds), other 6.20 ± 0.60 % (inconclusive)"
    )
    assert found.verdict == "inconclusive"
    told = found.evidence.splitlines()
    for other in "basic", "other":
        assert [line.split(":")[0] for line in told if other in line] == [
            f"test error, {other} less mine",
            f"training error, {other} less mine",
            f"mine by {other}",
            f"test error at 20 layers, {other} less mine",
        ]
    assert verdict(BETTER | {("other", 56): [8.0, 8.1, 7.9], ("other", 20): [9.0, 9.2, 8.8]}).verdict == "holds"
    worse = verdict(BETTER | {("other", 56): [5.0, 5.1, 4.9], ("other", 20): [9.0, 9.2, 8.8]})
    assert worse.verdict == "fails" and "mine certainly errs more than other" in worse.evidence


def test_of_several_blocks_the_first_is_the_one_that_is_matched():
    planned = plan(Options(block="bottleneck", against=("basic", "single"), match="macs", depths=(20,)))
    widths = {one.labels["block"]: one.labels["width"] for one in planned}
    assert list(widths) == ["bottleneck", "basic", "single"]
    assert widths["bottleneck"] > widths["basic"] == widths["single"] == 16
    turned = plan(Options(block="basic", against=("bottleneck", "single"), match="macs", depths=(20,)))
    narrower = {one.labels["block"]: one.labels["width"] for one in turned}
    assert narrower["bottleneck"] == 16 > narrower["basic"] == narrower["single"]


def test_the_claim_is_marked_as_ours():
    assert "Beyond the paper" in study.title
    assert all(claim.beyond and claim.paper.startswith("not in the paper") for claim in study.claims)


def test_the_plan_has_residual_networks_of_both_blocks():
    planned = plan(Options(block="single", against=("bottleneck",), depths=(20, 56), shortcut="B"))
    assert [(one.labels, one.network, one.options) for one in planned] == [
        (
            {"block": block, "depth": depth, "width": 16},
            f"cifar/resnet-{depth}",
            {"block": block, "shortcut": "B", "width": 16},
        )
        for depth in (20, 56)
        for block in ("single", "bottleneck")
    ]


@pytest.mark.parametrize(
    ("match", "block", "against"), [("macs", "bottleneck", "basic"), ("parameters", "basic", "bottleneck")]
)
def test_matched_networks_are_as_wide_as_brings_them_nearest(match, block, against):
    def cost(one: rp.Planned, **changed) -> float:
        return flops.of_named(one.network, (3, 32, 32), **(one.options | changed))[match]

    ours, theirs = plan(Options(block=block, against=(against,), match=match, depths=(20,), shortcut="B"))
    assert (theirs.options["block"], theirs.labels["width"], ours.options["block"]) == (against, 16, block)
    width = ours.labels["width"]
    assert width == ours.options["width"] and (width > 16) == (block == "bottleneck")
    away = {other: abs(cost(ours, width=other) - cost(theirs)) for other in range(width - 3, width + 4)}
    assert min(away, key=away.get) == width


@pytest.mark.parametrize("match", ["macs", "parameters"])
def test_a_block_that_cannot_be_of_every_width_is_of_the_nearest_that_it_can(match, clean_registries):
    """Channels in eight groups, and a number that is computed from weights where the block is made."""

    @rp.register_block("grouped")
    class Grouped(rp.blocks.BasicBlock):
        weighted_layers = 3

        def make_branch(self, in_channels, width, stride, layers):
            branch = super().make_branch(in_channels, width, stride, layers)
            branch.append(torch.nn.Conv2d(width, width, 1, groups=8))
            self.scale = float(branch[-1].weight.detach().abs().max())
            return branch

    ours, theirs = plan(Options(block="grouped", match=match, depths=(20,), against=("bottleneck",)))
    wanted = flops.of_named(theirs.network, (3, 32, 32), **theirs.options)[match]
    costs = {
        width: flops.of_named(ours.network, (3, 32, 32), **(ours.options | {"width": width}))[match]
        for width in (8, 16, 24, 32)
    }
    assert min(costs, key=lambda width: abs(costs[width] - wanted)) == ours.labels["width"]


def test_a_block_that_costs_the_same_keeps_its_width():
    assert {one.labels["width"] for one in plan(Options(block="single", match="macs", depths=(20, 56)))} == {16}


def test_a_matched_comparison_says_so_and_how_wide_networks_are():
    matched = results(BETTER, match="macs")
    (found,) = study.judge(matched)
    assert found.claim.id == "R3" and found.claim.statement.endswith("at the same depth, for as many multiply-adds")
    assert (
        found.measured == "test error at 56 layers: mine (19 filters) 6.00 ± 0.10 %, basic (16 filters) 7.00 ± 0.10 %"
    )
    assert study.tabulate(matched)["network"].tolist()[2:] == [
        "ResNet-56, mine (19 filters)",
        "ResNet-56, basic (16 filters)",
    ]


def test_shortcuts_stand_beside_each_other_too():
    planned = plan(Options(block="basic:highway", against=("basic", "bottleneck:C"), depths=(20,)))
    assert [(one.labels["block"], one.options["block"], one.options["shortcut"]) for one in planned] == [
        ("basic:highway", "basic", "highway"),
        ("basic", "basic", "A"),
        ("bottleneck:C", "bottleneck", "C"),
    ]


def test_figures_have_one_colour_a_block_and_the_cost_of_each_network():
    drawings = study.draw(results(BETTER))
    assert set(drawings) == {"figure", "figure-curves"}
    over_depth, over_cost = drawings["figure"].figure.axes
    lines = [
        {line.get_marker(): line for line in axis.lines if len(line.get_ydata()) == 2}
        for axis in (over_depth, over_cost)
    ]
    for marker, block in ("o", "basic"), ("s", "mine"):
        deep, dear = (each[marker] for each in lines)
        means = [sum(BETTER[block, depth]) / 3 for depth in (20, 56)]
        assert deep.get_ydata() == pytest.approx(means)
        assert dear.get_ydata() == pytest.approx(means)
        assert deep.get_xdata().tolist() == [20, 56]
        assert dear.get_xdata().tolist() == ([80, 224] if block == "basic" else [40, 112])
    names = [text.get_text() for text in over_cost.get_legend().get_texts()]
    assert names == ["basic", "mine"]
    for axis, last in zip(drawings["figure-curves"].figure.axes, (5.0, 6.0), strict=True):
        colours = {text.get_text(): text.get_color() for text in axis.texts}
        assert colours == {text.get_text(): text.get_color() for text in over_depth.texts}
        assert sorted(line.get_ydata()[-1] for line in axis.lines) == pytest.approx([last, last + 1])
    assert "mine 56 layers, 112.0 million multiply-adds: 6.00 %" in drawings["figure"].alt
    assert drawings["figure-curves"].alt.endswith("mine 5.00 ± 0.10 %, basic 6.00 ± 0.10 %.")


def test_figures_and_table_have_every_block():
    three = results(BETTER | THIRD)
    drawings = study.draw(three)
    _, over_cost = drawings["figure"].figure.axes
    assert [text.get_text() for text in over_cost.get_legend().get_texts()] == ["basic", "other", "mine"]
    for axis in drawings["figure-curves"].figure.axes:
        assert {text.get_text() for text in axis.texts} == {"basic", "other", "mine"}
    assert study.tabulate(three)["network"].tolist() == [
        f"ResNet-{depth}, {block}" for depth in (20, 56) for block in ("mine", "basic", "other")
    ]


def test_the_table_has_errors_beside_costs():
    table = study.tabulate(results(BETTER))
    assert table["network"].tolist() == ["ResNet-20, mine", "ResNet-20, basic", "ResNet-56, mine", "ResNet-56, basic"]
    assert table.iloc[2].to_dict() == {
        "network": "ResNet-56, mine",
        "parameters": "112,000",
        "multiply-adds": "112,000,000",
        "activations": "16,800",
        "training error (%)": "5.00 ± 0.10",
        "test error (%)": "6.00 ± 0.10",
        "test error above mine's (points)": "–",
        "seeds": 3,
    }
    assert table.iloc[3]["test error above mine's (points)"] == "+1.00 (+0.83 to +1.17): holds"


# -- as a user ------------------------------------------------------------------------------------------------------


MISTAKES = [
    (("--block", "basic"), "block (='basic') is the one it is set against; accepted: bottleneck, single"),
    (("--against", "bottleneck"), "block (='bottleneck') is the one it is set against; accepted: basic, single"),
    (("--against", "botleneck"), "block (='botleneck') is unknown; accepted: basic, bottleneck"),
    (
        ("--depths", "32"),
        "depths (=32) must be 18n+2, which both bottleneck and basic can make up: 20, 38, 56, 74, 92, …",
    ),
    (("--depths", "2"), "depths (=2) must be 18n+2"),
    (("--against", "basic", "bottleneck"), "block (='bottleneck') is the one it is set against; accepted: single"),
    (("--against", "basic", "basic"), "against (='basic basic') must name each block once"),
    (
        ("--against", "basic", "single", "--depths", "32"),
        "depths (=32) must be 18n+2, which all of bottleneck, basic and single can make up: 20, 38",
    ),
    (
        ("--block", "basic:C", "--against", "basic:A", "basic"),
        "block basic, depth 20, width 16, seed 0 and block basic:A, ",
    ),
    (("--against", "basic:a"), "shortcut (='a') is unknown; accepted: A, A-centred, B, C, "),
    (("--against",), "against (='') must name a block, or several"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES, ids=[" ".join(given) for given, _ in MISTAKES])
def test_a_mistake_gets_one_line(arguments, text, refused):
    refused(study, arguments, text)


MINE = """
import resprobe as rp
from torch import nn


@rp.register_block("one-by-one")
class OneByOne(rp.Block):
    def make_branch(self, in_channels, width, stride, layers):
        return nn.Sequential(
            layers.conv(in_channels, width, kernel=1, stride=stride), layers.norm(width), layers.conv(width, width, kernel=1)
        )
"""


def test_a_strangers_block_beside_the_papers(tmp_path, monkeypatch, clean_registries):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    small = ["--depths", "8", "14", "--seeds", "0", "1", "--iterations", "4", "--concurrency", "1", "--device", "cpu"]
    assert study.main([*small, "--plugin", "mine.py", "--block", "one-by-one", "--against", "single"]) == 0
    measured = pandas.read_csv("results/block_comparison/measurements.csv").set_index(["block", "depth"])
    for block in "one-by-one", "single":
        for depth in 8, 14:
            cost = flops.total(rp.build(f"cifar/resnet-{depth}", block=block, in_channels=1), (1, 8, 8))
            found = measured.loc[(block, depth)].to_dict()
            assert "aten::relu" in found.pop("uncounted").split()
            assert found == cost.to_dict()
    report = (tmp_path / "results/block_comparison/report.md").read_text()
    assert "; block: one-by-one; against: single. After" in report
    assert "- data: digits instead of CIFAR-10" in report
    assert "- block:" not in report  # no departure of the paper's, which has no such experiment
    table = pandas.read_csv("results/block_comparison/results.csv")
    assert table.groupby(["block", "depth"])["seed"].count().tolist() == [2, 2, 2, 2]
    assert (tmp_path / "results/block_comparison/figure-curves.png").stat().st_size > 10_000
