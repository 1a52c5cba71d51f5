"""The single-layer study: an advantage refutes the claim, its exclusion confirms it; and what a linear block is."""

import pandas
import pytest
import torch
from torch import nn

import resprobe as rp
from plugins.single_linear import SingleLinearBlock
from studies.single_layer import Options, plan, study


def results(errors: dict[tuple[str, str, int], list[float]]) -> rp.Results:
    """Given test errors; training errors a point below."""
    rows = []
    for (block, kind, depth), seeds in errors.items():
        for seed, error in enumerate(seeds):
            labels = {"block": block, "kind": kind, "depth": depth, "seed": seed}
            rows.append(labels | {"test_error": error, "train_error": error - 1, "parameters": 10, "seconds": 1.0})
    depths = tuple(sorted({depth for _, _, depth in errors}))
    return rp.Results(Options(depths=depths), pandas.DataFrame(rows), pandas.DataFrame(), [])


NO_ADVANTAGE = {
    ("single", "plain", 20): [9.0, 9.1, 8.9],
    ("single", "residual", 20): [9.0, 9.1, 9.1],
    ("single", "plain", 56): [30.0, 31.0, 29.0],
    ("single", "residual", 56): [9.0, 9.1, 8.9],
    ("single-linear", "plain", 20): [20.0, 20.1, 19.9],
    ("single-linear", "residual", 20): [18.0, 18.1, 17.9],
    ("basic", "plain", 20): [9.0, 9.1, 8.9],
    ("basic", "residual", 20): [8.0, 8.1, 7.9],
}


def verdict(errors) -> rp.Verdict:
    (only,) = study.judge(results(errors))
    return only


def test_an_advantage_that_is_excluded_confirms_the_claim():
    found = verdict(NO_ADVANTAGE)
    assert found.verdict == "holds"
    assert found.measured == (
        "test error of 20-layer networks of single-layer blocks: plain 9.00 ± 0.10 %, residual 9.07 ± 0.06 %"
    )


@pytest.mark.parametrize("control", [[9.0, 9.1, 8.9], [5.0, 9.5, 8.0], None], ids=["none", "uncertain", "not there"])
def test_without_an_advantage_of_two_layers_that_of_one_says_nothing(control):
    errors = NO_ADVANTAGE | {("basic", "residual", 20): control}
    if control is None:
        errors = {key: seeds for key, seeds in NO_ADVANTAGE.items() if key[0] != "basic"}
    found = verdict(errors)
    assert found.verdict == "inconclusive"
    assert found.evidence.startswith("where two-layer blocks have no certain advantage")
    assert verdict(errors | {("single", "residual", 20): [8.0, 8.1, 7.9]}).verdict == "fails"


def test_an_advantage_refutes_it():
    assert verdict(NO_ADVANTAGE | {("single", "residual", 20): [8.0, 8.1, 7.9]}).verdict == "fails"


def test_a_disadvantage_is_no_advantage():
    assert verdict(NO_ADVANTAGE | {("single", "residual", 20): [12.0, 12.1, 11.9]}).verdict == "holds"


def test_what_noise_cannot_exclude_and_single_seeds_are_inconclusive():
    assert verdict(NO_ADVANTAGE | {("single", "residual", 20): [8.0, 10.0, 9.0]}).verdict == "inconclusive"
    assert verdict({key: values[:1] for key, values in NO_ADVANTAGE.items()}).verdict == "inconclusive"


def test_neither_deeper_networks_nor_other_blocks_decide_but_they_are_said():
    found = verdict(NO_ADVANTAGE)
    assert "one layer, then ReLU, 56 layers (beyond the claim): difference +21.00 points" in found.evidence
    assert "one layer, no ReLU, 20 layers: difference +2.00 points" in found.evidence
    assert "two layers (control), 20 layers: difference +1.00 points" in found.evidence
    assert "training error: -0.07 points" in found.evidence


def test_the_plan_pairs_each_block_and_adds_the_control_where_the_depth_is_its():
    planned = plan(Options(depths=(20, 23)))
    assert [(one.labels["block"], one.network) for one in planned] == [
        ("single", "cifar/plain-20"),
        ("single", "cifar/resnet-20"),
        ("single", "cifar/plain-23"),
        ("single", "cifar/resnet-23"),
        ("single-linear", "cifar/plain-20"),
        ("single-linear", "cifar/resnet-20"),
        ("single-linear", "cifar/plain-23"),
        ("single-linear", "cifar/resnet-23"),
        ("basic", "cifar/plain-20"),
        ("basic", "cifar/resnet-20"),
    ]
    assert planned[1].options == {"block": "single", "shortcut": "A"}
    assert planned[0].options == {"block": "single"}


def test_figures():
    drawings = study.draw(results(NO_ADVANTAGE))
    assert set(drawings) == {"figure", "figure-depth", "figure-train"}
    (axis,) = drawings["figure"].figure.axes
    plain, residual = (container.lines[0].get_ydata().tolist() for container in axis.containers)
    assert plain == pytest.approx([9.0, 20.0, 9.0])
    assert residual == pytest.approx([9.066667, 18.0, 8.0])
    blocks = ["one layer, then ReLU", "one layer, no ReLU", "two layers (control)"]
    assert [label.get_text() for label in axis.get_xticklabels()] == blocks
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["plain", "residual"]
    for name, less in (("figure-depth", 0), ("figure-train", 1)):
        panels = drawings[name].figure.axes
        assert [panel.get_title() for panel in panels] == blocks
        assert panels[0].lines[0].get_ydata() == pytest.approx([9.0 - less, 30.0 - less])
    assert "one layer, no ReLU, residual 18.00 ± 0.10 %" in drawings["figure"].alt
    assert "plain single 56 layers 30.00 %" in drawings["figure-depth"].alt


def test_the_table_has_every_network():
    table = study.tabulate(results(NO_ADVANTAGE))
    assert table["network"].tolist() == ["plain-20", "ResNet-20", "plain-56", "ResNet-56"] + 2 * [
        "plain-20",
        "ResNet-20",
    ]
    assert table["test error (%)"].tolist()[:2] == ["9.00 ± 0.10", "9.07 ± 0.06"]
    assert table["training error (%)"].tolist()[0] == "8.00 ± 0.10"
    assert set(table["paper"]) == {"not printed"}


# -- the block -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_channels", "width", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_a_linear_residual_block_is_a_plain_one_of_other_weights(in_channels, width, stride):
    """W₁x + x = (W₁ + I)x: the shortcut, option A's subsampling and padding too, adds no function to the plain block's."""
    layers = rp.Layers("none")
    residual = SingleLinearBlock(in_channels, width, stride, shortcut="A", layers=layers)
    plain = SingleLinearBlock(in_channels, width, stride, layers=layers)
    with torch.no_grad():
        plain.branch.conv1.weight.copy_(residual.branch.conv1.weight)
        plain.branch.conv1.weight[:, :, 1, 1] += torch.eye(width, in_channels)
        plain.branch.conv1.bias.copy_(residual.branch.conv1.bias)
        images = torch.randn(2, in_channels, 8, 8)
        torch.testing.assert_close(residual(images), plain(images))


def test_a_plain_network_is_the_same_whether_its_layers_are_grouped_by_one_or_by_two():
    """So that the control's plain network is the single-layer one's, and their figures must be equal."""
    networks = []
    for block in ("single", "basic"):
        torch.manual_seed(0)
        networks.append(rp.build("cifar/plain-20", block=block, width=4))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        one, other = (network(images) for network in networks)
    assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["cifar/plain-20", "cifar/resnet-20"])
def test_between_stem_and_classifier_the_network_without_relu_is_linear(family):
    """Affine, that is: normalization in evaluation mode adds a constant."""
    network = rp.build(family, block="single-linear", width=4).double().eval()
    stages = nn.Sequential(network.stage1, network.stage2, network.stage3)
    one, other = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        at_zero = stages(torch.zeros_like(one))
        both = stages(one) + stages(other) - at_zero
        torch.testing.assert_close(stages(one + other), both)
    with_relu = rp.build(family, block="single", width=4).double().eval()
    stages = nn.Sequential(with_relu.stage1, with_relu.stage2, with_relu.stage3)
    with torch.no_grad():
        both = stages(one) + stages(other) - stages(torch.zeros_like(one))
        assert not torch.allclose(stages(one + other), both)


# -- as a user ------------------------------------------------------------------------------------------------------


MISTAKES = [
    (("--depths", "21"), "depth (=21) must be 3n+2 with block 'single"),
    (("--block", "single"), "option (='--block') is unknown"),
    (("--shortcut", "D"), "shortcut (='D') is unknown; accepted: A, A-centred, B, C"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES, ids=[" ".join(given) for given, _ in MISTAKES])
def test_a_mistake_gets_one_line(arguments, text, refused):
    refused(study, arguments, text)


def test_a_small_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--depths", "8", "--seeds", "0", "1", "--iterations", "4", "--concurrency", "1", "--device", "cpu"]
    assert study.main(arguments) == 0
    table = pandas.read_csv("results/single_layer/results.csv")
    assert table.groupby(["block", "kind"])["seed"].count().to_dict() == {
        (block, kind): 2 for block in ("single", "single-linear", "basic") for kind in ("plain", "residual")
    }
    # The activation has no weights, and neither has option A.
    assert table[table["block"] != "basic"]["parameters"].nunique() == 1
    assert (tmp_path / "results/single_layer/figure-depth.png").stat().st_size > 10_000
