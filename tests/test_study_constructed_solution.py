"""The constructed solution: deepened networks compute what they were made from; verdicts follow the data."""

import copy
import json

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_same
from torch import nn

import resprobe as rp
from studies.constructed_solution import LAST_RATE, SCRATCH, TRAINED_ON, deepen, judge, plan, study


def random_network(family: str, depth: int, seed: int, **options) -> rp.Network:
    """Weights and statistics as no initialization leaves them, negative γ included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = rp.build(f"{family}-{depth}", **{"in_channels": 1, "width": 4} | options)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def inputs(seed: int, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def assert_equal_to_rounding(ours: torch.Tensor, expected: torch.Tensor) -> None:
    # A dead network's logits are all zero, and rounding is then that of its layers, whose values are near 1.
    assert float((ours - expected).abs().max()) <= 1e-4 * max(1e-2, float(expected.abs().max()))


networks = st.builds(
    random_network,
    st.sampled_from(["cifar/plain", "cifar/resnet"]),
    st.sampled_from([8, 14]),
    st.integers(0, 2**31),
    width=st.integers(1, 6),
)


@given(networks, st.integers(0, 2**31), st.sampled_from([6, 12, 24]))
def test_identity_layers_leave_outputs_in_testing_mode_unchanged(network, seed, added):
    deeper = deepen(network, network.depth + added, inputs(seed))
    assert deeper.depth == network.depth + added
    others = inputs(seed + 1)  # not those that were measured
    with torch.no_grad():
        assert_equal_to_rounding(deeper(others), network.eval()(others))


@given(networks, st.integers(0, 2**31))
def test_and_in_training_mode_on_the_images_that_were_measured(network, seed):
    deeper = deepen(network, network.depth + 6, inputs(seed))
    with torch.no_grad():
        assert_equal_to_rounding(deeper.train()(inputs(seed)), network.train()(inputs(seed)))


def test_in_training_mode_on_other_images_only_the_residual_network_is_the_same():
    for family, same in (("cifar/plain", False), ("cifar/resnet", True)):
        network = random_network(family, 8, seed=0)
        deeper = deepen(network, 20, inputs(0))
        with torch.no_grad():
            one, other = network.train()(inputs(1)), deeper.train()(inputs(1))
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max())) is same


@pytest.mark.parametrize(
    ("family", "depth", "deeper", "options"),
    [
        ("cifar/plain", 5, 11, {"block": "single"}),
        ("cifar/resnet", 11, 20, {"block": "bottleneck"}),
        ("cifar/resnet", 8, 14, {"shortcut": "B"}),
        ("cifar/resnet", 8, 14, {"shortcut": "A-centred"}),
        ("imagenet/plain", 18, 34, {}),
    ],
)
def test_other_blocks_shortcuts_and_families(family, depth, deeper, options):
    network = random_network(family, depth, seed=3, **options)
    images = torch.randn(4, 1, 64, 64) if family.startswith("imagenet") else inputs(3)
    with torch.no_grad():
        assert_equal_to_rounding(deepen(network, deeper, images)(images), network.eval()(images))


@pytest.mark.parametrize(
    ("family", "depths", "options"),
    [
        ("cifar/plain", (11, 20), {"block": "bottleneck"}),  # 64 of 256 channels cannot carry the identity
        ("cifar/resnet", (8, 14), {"shortcut": "C"}),
        ("cifar/resnet", (8, 14), {"norm": "group"}),
    ],
)
def test_blocks_that_cannot_be_identities_are_refused(family, depths, options):
    network = random_network(family, depths[0], seed=0, **options)
    with pytest.raises(rp.UsageError, match="cannot be made an identity mapping; accepted: plain blocks"):
        deepen(network, depths[1], inputs(0))


def test_a_network_is_not_deepened_to_fewer_layers():
    with pytest.raises(
        rp.UsageError, match=r"depth \(=8\) must be above that of the network to deepen \(cifar/plain-8\)"
    ):
        deepen(random_network("cifar/plain", 8, seed=0), 8, inputs(0))


def test_deepening_says_what_it_made_and_touches_nothing_else():
    network = random_network("cifar/resnet", 8, seed=0)
    network.normalization = rp.Normalization.channels((0.5,), (1.0,))
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    deeper, again = (deepen(network, 14, inputs(0), seed=5) for _ in range(2))
    assert_same(network.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(deeper.state_dict(), again.state_dict())
    assert deeper.spec == rp.build("cifar/resnet-14", in_channels=1, width=4).spec
    assert deeper.normalization is network.normalization
    other = deepen(network, 14, inputs(0), seed=6).state_dict()
    assert not torch.equal(deeper.state_dict()["stage1.1.branch.conv1.weight"], other["stage1.1.branch.conv1.weight"])


# -- verdicts --------------------------------------------------------------------------------------------------------

LIKE_THE_PAPER = {
    ("plain", 20, SCRATCH): [9.4, 9.6, 9.5],
    ("plain", 56, SCRATCH): [13.4, 13.6, 13.5],
    ("plain", 56, TRAINED_ON): [9.4, 9.5, 9.6],
    ("plain", 56, LAST_RATE): [9.2, 9.3, 9.2],
    ("residual", 20, SCRATCH): [8.7, 8.8, 8.6],
    ("residual", 56, SCRATCH): [6.9, 7.0, 6.8],
    ("residual", 56, TRAINED_ON): [6.5, 6.4, 6.6],
    ("residual", 56, LAST_RATE): [8.0, 8.1, 8.0],
}


def results(errors=LIKE_THE_PAPER, **changes) -> rp.Results:
    """Given training errors; on the way a point at first, 30 in the middle. `changes` are of the measurements."""
    rows, histories, measured = [], [], []
    for (kind, depth, start), seeds in errors.items():
        for seed, error in enumerate(seeds):
            labels = {"kind": kind, "depth": depth, "start": start, "seed": seed}
            rows.append(labels | {"train_error": error, "test_error": error + 1})
            for iteration, there in ((10, 1.0), (20, 30.0), (30, error)):
                histories.append(labels | {"iteration": iteration, "train_error": there})
            if start == TRAINED_ON:
                equal = {"largest_difference": 1e-5, "largest_logit": 20.0, "images": 1797}
                equal |= {f"{part}_error_{when}": 9.0 for part in ("train", "test") for when in ("before", "after")}
                measured.append({"kind": kind, "depth": depth, "seed": seed} | equal | changes)
    depths = tuple(sorted({depth for _, depth, _ in errors}))
    options = rp.Options(depths=depths, seeds=tuple(range(len(next(iter(errors.values()))))))
    tables = (pandas.DataFrame(table) for table in (rows, histories))
    return rp.Results(options, *tables, [], measurements=pandas.DataFrame(measured))


def words(*arguments, **changes) -> dict[str, str]:
    return {verdict.claim.id: verdict.verdict for verdict in judge(results(*arguments, **changes))}


def test_equal_outputs_and_a_training_that_returns_confirm_both():
    assert words() == {"C13": "holds", "C13b": "holds"}
    outputs, training = judge(results())
    assert outputs.measured == (
        "6 of 6 constructed networks equal to rounding; largest difference 1.0e-05 of logits up to 20"
    )
    assert "trained on from the constructed solution 9.50 ± 0.10 %" in training.measured
    assert "From random weights above trained on, plain-56: difference +4.00 points" in training.evidence
    assert "plain-56 1.00 % at first, 30.00 % at most, 9.50 % at the end" in training.evidence


@pytest.mark.parametrize(
    "change", [{"largest_difference": 0.1}, {"train_error_after": 9.1}, {"largest_difference": float("nan")}]
)
def test_outputs_or_errors_that_differ_refute_the_construction(change):
    assert words(**change)["C13"] == "fails"


def test_a_training_that_leaves_for_good_refutes_that_sgd_stays():
    assert words(LIKE_THE_PAPER | {("plain", 56, TRAINED_ON): [13.0, 13.1, 13.2]})["C13b"] == "fails"


def test_a_certain_rise_that_is_too_small_to_matter_is_none():
    assert words(LIKE_THE_PAPER | {("plain", 56, TRAINED_ON): [9.7, 9.75, 9.8]})["C13b"] == "holds"


def test_noise_and_single_seeds_are_inconclusive():
    assert words(LIKE_THE_PAPER | {("plain", 56, TRAINED_ON): [5.0, 14.0, 10.0]})["C13b"] == "inconclusive"
    assert words({key: values[:1] for key, values in LIKE_THE_PAPER.items()})["C13b"] == "inconclusive"


def test_one_depth_is_not_tested():
    alone = results({key: values for key, values in LIKE_THE_PAPER.items() if key[1] == 20})
    assert {verdict.verdict for verdict in judge(alone)} == {"not tested"}
    axis = study.draw(alone)["figure"].figure.axes[0]
    assert [line.get_label() for line in axis.lines] == ["20 layers from random weights", "20 layers, learned"]
    assert study.tabulate(alone)["network"].tolist() == ["plain-20", "ResNet-20"]


# -- plan, figure, table ---------------------------------------------------------------------------------------------


def test_the_plan_is_both_kinds_at_every_depth():
    planned = plan(rp.Options(depths=(8, 14), shortcut="B"))
    assert [(one.network, one.labels["start"]) for one in planned] == [
        ("cifar/plain-8", SCRATCH),
        ("cifar/plain-14", SCRATCH),
        ("cifar/resnet-8", SCRATCH),
        ("cifar/resnet-14", SCRATCH),
    ]
    assert planned[2].options == {"block": "basic", "shortcut": "B"}


def test_the_figure_has_three_beginnings_and_the_learned_network():
    figure = study.draw(results())["figure"].figure
    plain, residual = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in plain.lines}
    assert lines["56 layers from random weights"] == pytest.approx([1, 30, 13.5])
    assert lines["56 layers from the constructed solution"] == pytest.approx([1, 30, 9.5])
    assert lines["the constructed solution, at the last learning rate"][-1] == pytest.approx(9.233, abs=1e-3)
    assert lines["20 layers, learned"] == pytest.approx([9.5, 9.5])
    assert residual.lines[-1].get_ydata() == pytest.approx([8.7, 8.7])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)


def test_the_table_has_the_constructed_networks_before_and_after():
    table = study.tabulate(results()).set_index(["network", "from"])
    training = table["training error: first → highest → end (%)"]
    assert training[("plain-56", "constructed, untrained")] == "9.00 ± 0.00 (one view)"
    assert training[("plain-56", TRAINED_ON)] == "1.00 → 30.00 → 9.50 ± 0.10"
    assert training[("ResNet-56", LAST_RATE)] == "1.00 → 30.00 → 8.03 ± 0.06"
    assert table.loc[("plain-56", "constructed, untrained"), "§1 says"] == "no higher"
    assert table.loc[("plain-56", "random weights"), "§1 says"] == "higher"
    assert table.loc[("plain-56", "random weights"), "test error (%)"] == "14.50 ± 0.10"


def test_a_small_study_trains_on_from_what_it_constructed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smallest = ["--depths", "8", "14", "--seeds", "0", "--iterations", "4"]
    assert study.main([*smallest, "--concurrency", "1", "--device", "cpu", "--precision", "fp32"]) == 0
    table = pandas.read_csv("results/constructed_solution/results.csv")
    assert table.groupby(["kind", "depth", "start"])["seed"].apply(list).to_dict() == {
        (kind, depth, start): [0]
        for kind in ("plain", "residual")
        for depth, start in ((8, SCRATCH), (14, SCRATCH), (14, TRAINED_ON), (14, LAST_RATE))
    }
    measured = pandas.read_csv("results/constructed_solution/measurements.csv")
    assert measured["kind"].tolist() == ["plain", "residual"]
    assert (measured["largest_difference"] <= 1e-4 * measured["largest_logit"]).all()
    assert (measured["train_error_before"] == measured["train_error_after"]).all()
    shallow = table[table["depth"] == 8]
    assert measured["train_error_before"].tolist() == pytest.approx(shallow["train_error_single_view"].tolist())
    assert measured["test_error_before"].tolist() == pytest.approx(shallow["test_error"].tolist())
    configs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/config.json")]
    rates = sorted(config["recipe"]["learning_rate"] for config in configs if config["start"])
    assert rates == pytest.approx([0.0005, 0.0005, 0.05, 0.05])
    record = json.loads((tmp_path / "results/constructed_solution/verdict.json").read_text())
    assert {claim["id"]: claim["verdict"] for claim in record["claims"]}["C13"] == "holds"


def test_a_block_that_cannot_is_named_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(["--block", "bottleneck"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: BottleneckBlock (plain) cannot be made an identity mapping; accepted:"
    )
    assert not (tmp_path / "runs").exists()
