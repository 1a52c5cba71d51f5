"""The branch-contribution study: verdicts follow the data, and its figures are those of the attribution plugin."""

import dataclasses
import json
from pathlib import Path

import pandas
import pytest
import torch

import resprobe as rp
from plugins.attribution import branch_and_shortcut
from studies import branch_contribution
from studies.branch_contribution import CONDUCTANCE, TRAINED, UNTRAINED, Options, judge, plan, study

ROOT = Path(__file__).parent.parent

LIKE_OURS = {
    (20, TRAINED): [33.0, 32.0, 34.0],
    (56, TRAINED): [13.0, 12.0, 14.0],
    (20, CONDUCTANCE): [38.0, 37.0, 39.0],
    (56, CONDUCTANCE): [14.0, 13.0, 15.0],
    (20, UNTRAINED): [39.0, 38.0, 40.0],
    (56, UNTRAINED): [27.0, 26.0, 28.0],
}
"""Mean branch shares in percent, one a seed."""


def results(shares: dict[tuple[int, str], list[float]]) -> rp.Results:
    """Measurements of six blocks in three stages around given mean shares."""
    rows, table = [], []
    for (depth, reading), seeds in shares.items():
        for seed, share in enumerate(seeds):
            labels = {"depth": depth, "seed": seed}
            if reading == TRAINED:
                table.append(labels | {"train_error": 0.5})
            for index, factor in enumerate((1.5, 0.9, 1.2, 0.8, 1.0, 0.6)):
                where = {"block": f"stage{index // 2 + 1}.{index % 2}", "stage": index // 2 + 1, "position": index / 5}
                figures = {"branch_share": share * factor, "branch_share_absolute": share * factor + 2}
                rows.append(labels | {"reading": reading} | where | figures)
    depths = tuple(sorted({depth for depth, _ in shares}))
    options = Options(data="digits", depths=depths, seeds=tuple(range(len(seeds))))
    return rp.Results(options, pandas.DataFrame(table), pandas.DataFrame(), [], measurements=pandas.DataFrame(rows))


def verdicts(shares) -> dict[str, str]:
    return {verdict.claim.id: verdict.verdict for verdict in judge(results(shares))}


def test_shares_that_fall_with_depth_and_training_confirm_both():
    assert verdicts(LIKE_OURS) == {"R1": "holds", "R2": "holds"}


def test_deep_branches_that_matter_as_much_refute_the_first():
    assert verdicts(LIKE_OURS | {(56, TRAINED): [33.5, 33.0, 34.5]})["R1"] == "fails"


def test_shares_that_training_leaves_as_they_were_refute_the_second():
    found = verdicts(LIKE_OURS | {(56, TRAINED): [28.5, 28.0, 29.0], (20, TRAINED): [39.0, 38.0, 40.0]})
    assert found == {"R1": "holds", "R2": "fails"}


def test_noise_and_single_seeds_are_inconclusive():
    assert verdicts(LIKE_OURS | {(56, TRAINED): [5.0, 60.0, 25.0]}) == {"R1": "inconclusive", "R2": "inconclusive"}
    one = verdicts({key: values[:1] for key, values in LIKE_OURS.items()})
    assert one == {"R1": "inconclusive", "R2": "inconclusive"}


def test_one_depth_says_nothing_of_depth_but_something_of_training():
    deep = verdicts({key: values for key, values in LIKE_OURS.items() if key[0] == 56})
    assert deep == {"R1": "not tested", "R2": "holds"}


def test_the_evidence_has_all_readings():
    first, second = judge(results(LIKE_OURS))
    assert first.measured == "mean branch share 33.0 ± 1.0 → 13.0 ± 1.0 % at 20, 56 layers"
    assert "ResNet-20 above ResNet-56: difference +20.00 points" in first.evidence
    assert (
        "absolute values +20.0, conductance +24.0 points. Before training, by construction alone: +12.0"
        in first.evidence
    )
    assert second.measured == "mean branch share of ResNet-56 27.0 ± 1.0 % before and 13.0 ± 1.0 % after training"
    assert second.evidence.endswith(". In ResNet-20: +6.0 points")


def test_the_claims_are_marked_as_ours():
    assert "Beyond the paper" in study.title
    for claim in study.claims:
        assert claim.beyond
        assert claim.section.startswith("ours, after §")
        assert claim.paper.startswith("not in the paper")


def test_the_plan_has_residual_networks_and_a_warm_up_for_the_deepest():
    planned = plan(Options(depths=(20, 110), shortcut="B"))
    assert [(one.labels, one.network, dict(one.options)) for one in planned] == [
        ({"depth": 20}, "cifar/resnet-20", {"block": "basic", "shortcut": "B"}),
        ({"depth": 110}, "cifar/resnet-110", {"block": "basic", "shortcut": "B"}),
    ]
    assert planned[0].recipe is None
    warm = planned[1].recipe(rp.recipes.digits_quick())
    assert (warm.warm_up_rate, warm.warm_up_until, warm.learning_rate) == (0.005, 80.0, 0.05)
    of_the_paper = rp.recipes.cifar_paper(depth=110)
    assert dataclasses.replace(planned[1].recipe(of_the_paper), name=of_the_paper.name) == of_the_paper


def test_figure_and_table():
    ours = results(LIKE_OURS)
    drawings = study.draw(ours)
    assert set(drawings) == {"figure"}  # without networks there are no pixels to explain
    along, against = drawings["figure"].figure.axes
    curves = [line for line in along.lines if len(line.get_ydata()) == 6]
    assert curves[0].get_ydata() == pytest.approx([33 * factor for factor in (1.5, 0.9, 1.2, 0.8, 1.0, 0.6)])
    assert curves[1].get_ydata()[0] == pytest.approx(19.5)
    assert [line.get_xdata()[0] for line in along.lines if line.get_linestyle() == ":"] == [0.4, 0.8]
    lines = {container.get_label(): container.lines[0] for container in against.containers}
    assert lines[TRAINED].get_ydata() == pytest.approx([33, 13])
    assert lines[CONDUCTANCE].get_ydata() == pytest.approx([38, 14])
    assert lines[UNTRAINED].get_ydata() == pytest.approx([39, 27])
    assert {text.get_text() for text in against.texts} == {TRAINED, CONDUCTANCE, UNTRAINED}
    table = study.tabulate(ours)
    assert table.iloc[1].to_dict() == {
        "network": "ResNet-56",
        "blocks": 6,
        "branch share (%)": "13.0 ± 1.0",
        "of absolute values (%)": "15.0 ± 1.0",
        "by conductance (%)": "14.0 ± 1.0",
        "before training (%)": "27.0 ± 1.0",
        "training error (%)": "0.50 ± 0.00",
        "seeds": 3,
    }


SMALL = ("--depths", "8", "14", "--seeds", "0", "--iterations", "8", "--concurrency", "1", "--device", "cpu")


def test_a_small_study_measures_what_the_plugin_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert study.main([*SMALL, "--precision", "fp32", "--images", "12", "--conductance-images", "2"]) == 0
    measured = pandas.read_csv("results/branch_contribution/measurements.csv")
    assert measured.groupby(["depth", "reading"])["block"].nunique().unique().tolist() == [3, 6]
    run = next(iter((tmp_path / "runs").glob("cifar-resnet-14*")))
    spec = rp.NetworkSpec(**json.loads((run / "config.json").read_text())["network"])
    data, trained = rp.load_data("digits"), rp.load_weights(rp.build(spec), run)
    images, labels = trained.normalization(data.test.images[:12]), data.test.labels[:12]

    def ours(reading: str) -> list[float]:
        return measured.query("depth == 14 and reading == @reading")["branch_share"].tolist()

    theirs = branch_and_shortcut(trained, images, labels)["branch_share"] * 100
    assert ours(TRAINED) == pytest.approx(theirs.tolist(), rel=1e-4)
    theirs = branch_and_shortcut(trained, images[:2], labels[:2], method="conductance")["branch_share"] * 100
    assert ours(CONDUCTANCE) == pytest.approx(theirs.tolist(), rel=1e-4)
    torch.manual_seed(0)
    fresh = rp.build(spec)
    rp.precise_batch_norm(fresh, (trained.normalization(batch) for batch, _ in data.train.views(128)))
    theirs = branch_and_shortcut(fresh, images, labels)["branch_share"] * 100
    assert ours(UNTRAINED) == pytest.approx(theirs.tolist(), rel=1e-4)
    assert (tmp_path / "results/branch_contribution/figure-pixels.png").stat().st_size > 5000
    report = (tmp_path / "results/branch_contribution/report.md").read_text()
    assert report.startswith("# Beyond the paper: what a block's branch contributes")
    assert report.count("(beyond the paper)") == 2  # behind either claim
    assert "ResNet-14, seed 0: integrated gradients from the mean image" in report


WEIGHED = """
import resprobe as rp

@rp.register_block("weighed")
class Weighed(rp.BLOCKS["basic"]):
    def forward(self, x):
        return self.activation(self.branch(x) + 0.5 * self.shortcut(x))
"""


@pytest.mark.usefixtures("clean_registries")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--images", "0"), "images (=0) must be a whole number ≥ 1"),
        (("--conductance-images", "-1"), "conductance_images (=-1) must be a whole number ≥ 1"),
        (("--depths", "21"), "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26"),
        (("--plugin", "weighed.py", "--block", "weighed"), "it does not add its branch and its shortcut as they are"),
        (("--method", "conductance"), "option (='--method') is unknown; accepted: --preset"),
    ],
)
def test_a_mistake_gets_one_line_and_nothing_is_trained(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weighed.py").write_text(WEIGHED)
    # A mistake that is not found ends here and not in minutes of training.
    monkeypatch.setattr("resprobe.sweep.run_all", lambda *_, **__: pytest.fail("trained all the same"))
    assert study.main(arguments) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_first_images_are_explained_alone(monkeypatch):
    """`--images` and `--conductance-images` reach the plugin as the number of images."""
    seen = []

    def note(network, images, targets, *, method):
        seen.append((method, len(images), len(targets)))
        return branch_and_shortcut(network, images[:1], targets[:1])

    monkeypatch.setattr("plugins.attribution.branch_and_shortcut", note)
    run = rp.train("cifar/resnet-8", "digits", rp.recipes.digits_quick(1), progress=False, device="cpu")
    options = Options(depths=(8,), seeds=(0,), images=7, conductance_images=3)
    branch_contribution.measure(rp.Results(options, pandas.DataFrame([{"depth": 8, "seed": 0}]), None, [run]))
    assert seen == [("gradient-x-activation", 7, 7), ("conductance", 3, 3), ("gradient-x-activation", 7, 7)]
