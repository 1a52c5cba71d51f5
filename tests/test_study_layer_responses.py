"""The layer-responses study: verdicts follow the data; trained networks can be looked at without training."""

import dataclasses
import json
import math
import shutil

import numpy
import pandas
import pytest
import torch

import resprobe as rp
from studies import layer_responses
from studies.layer_responses import Options, judge, study


def results(stds: dict[tuple[str, int], list[float]], readings=("test", "train", "closed")) -> rp.Results:
    """Measurements of four layers around a given mean std, one value a seed."""
    rows = []
    for (kind, depth), seeds in stds.items():
        for seed, std in enumerate(seeds):
            for reading in readings:
                for order, factor in enumerate((0.8, 1.2, 0.9, 1.1), start=1):
                    labels = {"kind": kind, "depth": depth, "seed": seed, "reading": reading}
                    rows.append(labels | {"layer": f"layer{order}", "order": order, "mean": 0.0, "std": std * factor})
    depths = tuple(sorted({depth for _, depth in stds}))
    options = Options(depths=depths, depth=max(depths), seeds=(0, 1, 2))
    return rp.Results(options, pandas.DataFrame(), pandas.DataFrame(), [], measurements=pandas.DataFrame(rows))


FIG_7 = {
    ("plain", 20): [1.00, 1.01, 0.99],
    ("plain", 56): [0.95, 0.96, 0.94],
    ("residual", 20): [0.70, 0.71, 0.69],
    ("residual", 56): [0.50, 0.51, 0.49],
    ("residual", 110): [0.40, 0.41, 0.39],
}


def verdict(stds) -> rp.Verdict:
    (only,) = judge(results(stds))
    return only


@pytest.mark.parametrize(
    ("built_of", "told"),
    [
        ({}, 0),
        ({"block": "bottleneck", "depth": 29}, 0),
        ({"block": "single", "depth": 8}, 0),
        ({"shortcut": "C"}, 0),
        ({"shortcut": "highway"}, 1),
        ({"block": "ends-in-elu"}, 1),
        ({"block": "ends-in-elu", "weights": ("resnet20.th",)}, 0),
    ],
)
def test_what_no_layers_response_shows_is_told(built_of, told, clean_registries):
    """A gate scales what the branch adds, behind the last normalization."""

    @rp.register_block("ends-in-elu")
    class EndsInElu(rp.BLOCKS["basic"]):
        def make_branch(self, in_channels, width, stride, layers):
            return torch.nn.Sequential(super().make_branch(in_channels, width, stride, layers), torch.nn.ELU())

    options = dataclasses.replace(study.presets["quick"], **built_of)
    assert len(said := study.departs(options)) == told
    assert all("studies.branch_contribution" in line for line in said)


def test_curves_as_in_the_paper_confirm_the_claim():
    found = verdict(FIG_7)
    assert found.verdict == "holds"
    assert "ResNet-110 0.400 ± 0.010" in found.measured
    assert "ResNet-56 is smaller in 100% of the layers" in found.evidence
    assert "plain-20 above ResNet-20: difference +0.300 in mean std" in found.evidence


def test_responses_as_large_as_the_plain_ones_refute_it():
    assert verdict(FIG_7 | {("residual", 56): [0.95, 0.97, 0.95]}).verdict == "fails"


def test_deeper_networks_with_larger_responses_refute_it():
    assert verdict(FIG_7 | {("residual", 110): [0.80, 0.81, 0.79]}).verdict == "fails"


@pytest.mark.parametrize(("error", "word"), [(2.0, "fails"), (70.0, "inconclusive")])
def test_networks_that_have_learned_little_refute_nothing(error, word):
    ours = results(FIG_7 | {("residual", 110): [0.80, 0.81, 0.79]})
    runs = [
        {
            "kind": kind,
            "depth": depth,
            "seed": seed,
            "train_error": error if (kind, depth) == ("residual", 110) else 1.0,
        }
        for kind, depth in FIG_7
        for seed in range(3)
    ]
    (found,) = judge(dataclasses.replace(ours, table=pandas.DataFrame(runs)))
    assert found.verdict == word
    said = "ResNet-110 ends at 70.0 % training error: it learned too little to tell"
    assert (said in found.evidence) == (error > 20)


def test_a_plain_network_that_has_not_learned_decides_nothing():
    ours = results(FIG_7)
    labels = [{"kind": kind, "depth": depth, "seed": seed} for kind, depth in FIG_7 for seed in range(3)]
    for depth, word in ((56, "inconclusive"), (20, "holds")):  # Fig. 7's pair; a shallower one is evidence beside it
        runs = [
            one | {"train_error": 80.0 if (one["kind"], one["depth"]) == ("plain", depth) else 1.0} for one in labels
        ]
        (found,) = judge(dataclasses.replace(ours, table=pandas.DataFrame(runs)))
        assert found.verdict == word
    assert "ends at" not in found.evidence


def test_the_closed_form_needs_both_of_its_parts():
    assert layer_responses._closed_form(torch.nn.BatchNorm2d(4)) == (0.0, 1.0)
    for norm in (torch.nn.RMSNorm(4), torch.nn.BatchNorm2d(4, affine=False), torch.nn.Identity()):
        assert all(map(math.isnan, layer_responses._closed_form(norm)))


@pytest.mark.parametrize(("count", "batches"), [(100, [100]), (300, [128, 128])])
def test_batches_for_training_mode_are_of_one_size(count, batches):
    images = rp.ImageSet(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.long))
    assert [len(labels) for _, labels in layer_responses._whole_batches(images)] == batches


def test_without_a_closed_form_both_modes_decide():
    ours = results(FIG_7)
    ours.measurements.loc[ours.measurements["reading"] == "closed", "std"] = float("nan")
    (found,) = judge(ours)
    assert found.verdict == "holds"
    assert "closed form" not in found.evidence


def test_noise_and_single_seeds_are_inconclusive():
    assert verdict(FIG_7 | {("residual", 56): [0.2, 1.5, 0.6]}).verdict == "inconclusive"
    assert verdict({key: values[:1] for key, values in FIG_7.items()}).verdict == "inconclusive"


def test_a_difference_counts_in_proportion_to_the_responses():
    """Where weight decay has made all responses small, small differences are effects, and their absence is none."""
    tenth = {key: [value / 10 for value in values] for key, values in FIG_7.items()}
    assert verdict(tenth).verdict == "holds"
    assert verdict(tenth | {("residual", 110): [0.070, 0.071, 0.069]}).verdict == "fails"
    assert verdict(tenth | {("residual", 110): [0.060, 0.071, 0.069]}).verdict == "inconclusive"


@pytest.mark.parametrize("reading", ["test", "train"])
def test_modes_that_disagree_are_inconclusive(reading):
    ours, other = results(FIG_7), results(FIG_7 | {("residual", 110): [0.80, 0.81, 0.79]})
    rows = ours.measurements["reading"] == reading
    ours.measurements.loc[rows, "std"] = other.measurements.loc[rows, "std"]
    (found,) = judge(ours)
    assert found.verdict == "inconclusive"
    # The closed form is training mode's, and has no say of its own.
    rows = ours.measurements["reading"] == "closed"
    same = results(FIG_7)
    same.measurements.loc[rows, "std"] = other.measurements.loc[rows, "std"]
    assert judge(same)[0].verdict == "holds"


def test_half_the_networks_are_half_a_test():
    residual = {key: values for key, values in FIG_7.items() if key[0] == "residual"}
    found = verdict(residual)
    assert found.verdict == "inconclusive"
    assert "there are no plain networks to compare with" in found.evidence
    assert verdict({("residual", 20): [0.7, 0.7, 0.7]}).verdict == "not tested"


def test_both_panels_of_figure_7():
    ordered, by_size = study.draw(results(FIG_7))["figure"].figure.axes
    line = next(line for line in ordered.lines if line.get_label() == "ResNet-110")
    assert line.get_ydata() == pytest.approx([0.32, 0.48, 0.36, 0.44])
    line = next(line for line in by_size.lines if line.get_label() == "ResNet-110")
    assert line.get_ydata() == pytest.approx([0.48, 0.44, 0.36, 0.32])
    assert {line.get_linestyle() for line in ordered.lines if line.get_label().startswith("plain")} == {"--"}
    # One network that has not trained may not squash all others.
    assert {axis.get_yscale() for axis in (ordered, by_size)} == {"log"}
    (legend,) = study.draw(results(FIG_7))["figure"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "plain-20",
        "plain-56",
        "ResNet-20",
        "ResNet-56",
        "ResNet-110",
    ]


def test_the_table_says_which_networks_have_trained():
    ours = results({key: FIG_7[key] for key in [("plain", 20), ("residual", 20)]})
    assert study.tabulate(ours).columns.tolist()[-1] == "mean std, closed form"  # of published weights it is not known
    rows = [("plain", 81.5), ("plain", 80.5), ("residual", 0.1), ("residual", 0.3)]
    runs = pandas.DataFrame(
        [{"kind": kind, "depth": 20, "seed": i % 2, "train_error": error} for i, (kind, error) in enumerate(rows)]
    )
    table = study.tabulate(dataclasses.replace(ours, table=runs)).set_index("network")
    assert table["training error (%)"].to_dict() == {"plain-20": "81.00 ± 0.71", "ResNet-20": "0.20 ± 0.14"}
    assert table.loc["ResNet-20", "mean std, test images"] == "0.700 ± 0.010"


def test_the_plan_is_figure_7s():
    planned = layer_responses.plan(study.presets["quick"])
    assert [(one.labels["kind"], one.labels["depth"]) for one in planned] == [
        ("plain", 20),
        ("plain", 56),
        ("residual", 20),
        ("residual", 56),
        ("residual", 110),
    ]


def test_weight_decay_has_the_effect_of_the_papers_64k_iterations():
    *_, deep = layer_responses.plan(study.presets["quick"])
    plain, *_ = layer_responses.plan(study.presets["quick"])
    digits, paper = rp.recipes.digits_quick(), rp.recipes.cifar_paper()
    # 32,000 · 0.1 + 16,000 · 0.01 + 16,000 · 0.001 = 3376, and 200 · 0.05 + 100 · 0.005 + 100 · 0.0005 = 10.55.
    assert plain.recipe(digits).weight_decay == pytest.approx(1e-4 * 3376 / 10.55)
    assert plain.recipe(digits).warm_up_rate is None
    assert (deep.recipe(digits).warm_up_rate, deep.recipe(digits).warm_up_until) == (0.005, 80.0)
    # The paper's own recipe is left as it is, and its runs are those of other studies.
    assert dataclasses.replace(plain.recipe(paper), name=paper.name) == paper
    with_warm_up = rp.recipes.cifar_paper(depth=110)
    assert dataclasses.replace(deep.recipe(with_warm_up), name=paper.name) == with_warm_up
    # A longer training has more of it already; it is never lowered.
    longer = rp.recipes.cifar_paper(128_000)
    assert plain.recipe(longer).weight_decay == 1e-4


def test_a_small_study_measures_what_a_naive_twin_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--depths",
        "8",
        "--depth",
        "14",
        "--seeds",
        "0",
        "--iterations",
        "8",
        "--concurrency",
        "1",
        "--device",
        "cpu",
    ]
    assert study.main([*arguments, "--precision", "fp32"]) == 0
    measured = pandas.read_csv("results/layer_responses/measurements.csv")
    assert measured.groupby(["kind", "depth"])["order"].max().to_dict() == {
        ("plain", 8): 7,
        ("residual", 8): 7,
        ("residual", 14): 13,
    }
    run = next(iter((tmp_path / "runs").glob("cifar-resnet-14*")))
    network = rp.load_weights(rp.build(rp.NetworkSpec(**json.loads((run / "config.json").read_text())["network"])), run)
    data, seen = rp.load_data("digits"), []
    layer = network.stage2[0].branch.norm1
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network.eval()(network.normalization(data.test.images))
    handle.remove()
    ours = measured.query(
        "kind == 'residual' and depth == 14 and reading == 'test' and layer == 'stage2.0.branch.conv1'"
    )
    assert ours["std"].item() == pytest.approx(seen[0].std().item(), rel=1e-4)
    closed = measured.query(
        "kind == 'residual' and depth == 14 and reading == 'closed' and layer == 'stage2.0.branch.conv1'"
    )
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    assert closed["std"].item() == pytest.approx(float(numpy.sqrt((gamma**2).mean() + beta.var())), rel=1e-5)
    # Several runs of one network are told apart, as seeds are.
    shutil.copytree(run, "another")
    assert study.main(["--weights", str(run), "another", "--device", "cpu", "--out", "twice"]) == 0
    twice = pandas.read_csv("twice/measurements.csv")
    assert sorted(twice["seed"].unique()) == [0, 1]
    assert study.main(["--weights", str(run), f"{run}/../{run.name}", "--device", "cpu"]) == 2
    assert f"weights (='{run}') are given 2 times; name each once" in capsys.readouterr().err
    # The same network again, from its folder, without training.
    assert study.main(["--weights", str(run), "--device", "cpu", "--out", "again"]) == 0
    again = pandas.read_csv("again/measurements.csv").query("reading == 'test'")["std"].tolist()
    first = measured.query("kind == 'residual' and depth == 14 and reading == 'test'")["std"].tolist()
    assert again == pytest.approx(first, rel=1e-4)


def test_weights_that_do_not_say_how_images_are_normalized(tmp_path, monkeypatch, capsys):
    """A file in our own layout: the data's mean is subtracted. And one network alone can be compared with none."""
    monkeypatch.chdir(tmp_path)
    network = rp.build("cifar/plain-8", width=4, in_channels=1)
    torch.save(network.state_dict(), "plain-8.pth")
    assert study.main(["--weights", "plain-8.pth", "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "results/layer_responses/verdict.json").read_text())
    (claim,) = record["claims"]
    assert claim["verdict"] == "not tested"
    assert claim["evidence"] == (
        "there are no plain networks and no residual networks of two depths to compare with, so the claim was not tested"
    )


def test_weights_that_may_be_two_networks_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = rp.build("cifar/plain-8", width=4, in_channels=1)
    torch.save(network.state_dict(), "mine.pth")
    assert study.main(["--weights", "mine.pth"]) == 2
    assert capsys.readouterr().err == (
        "error: weights (='mine.pth') may be a plain or a residual network's; give the file its network's name, as "
        "plain-56.pth or resnet-56.pth\n"
    )


def test_a_run_on_other_data_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = rp.train("cifar/resnet-8", "digits", rp.recipes.digits_quick(2), runs="runs", device="cpu", progress=False)
    monkeypatch.setattr(rp, "load_data", lambda name: tiny_colours())
    assert study.main(["--weights", str(run.path), "--device", "cpu"]) == 2
    assert "in_channels (=1) of cifar/resnet-8 does not fit data 'colours', which has 3" in capsys.readouterr().err


def tiny_colours() -> rp.Data:
    images = rp.ImageSet(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    return rp.Data("colours", "colours 8", images, images, tuple("0123456789"))


def test_weights_that_are_not_there_are_missed_by_a_dry_run_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(["--weights", "resnet20.th", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("error: weights (='resnet20.th') are not there; accepted: .pth, ")


@pytest.mark.slow
def test_published_networks_on_the_real_test_images(shared_data, cifar10_folder, tmp_path, monkeypatch):
    """Deeper residual networks have smaller responses, in weights that others trained (their order is Fig. 7's)."""
    monkeypatch.chdir(tmp_path)
    data = rp.load_data(f"cifar10:{cifar10_folder}")
    some = torch.arange(1000)
    fewer = dataclasses.replace(data, train=data.train.select(some), test=data.test.select(some))
    monkeypatch.setattr(rp, "load_data", lambda name: fewer)
    weights = sorted(map(str, (shared_data / "weights" / "akamaster").glob("resnet*.th")))
    assert len(weights) == 4
    assert study.main(["--data", f"cifar10:{cifar10_folder}", "--weights", *weights]) == 0
    measured = pandas.read_csv("results/layer_responses/measurements.csv").query("reading == 'test'")
    means = measured.groupby("depth")["std"].mean()
    assert means.index.tolist() == [20, 32, 44, 56]
    assert means.is_monotonic_decreasing
