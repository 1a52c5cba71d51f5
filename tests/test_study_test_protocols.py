"""The study of test protocols: the same weights under each, differences paired over images, verdicts that follow the data."""

import pandas
import pytest
import torch
from PIL import Image

import resprobe as rp
from studies import test_protocols
from studies.test_protocols import Options, judge, plan, study

PARTS = 20
SPREAD = [3.0 * (part % 5 - 2) for part in range(PARTS)]
"""Some images are harder than others, under every protocol."""


def results(errors: dict[str, float], *, noise: float = 0.2, networks: int = 1, parts: int = PARTS) -> rp.Results:
    """Given mean errors by protocol, in parts of 100 images: alike in what is hard, with a little noise of their own."""
    rows = []
    for network in range(networks):
        for index, (protocol, error) in enumerate(errors.items()):
            for part in range(parts):
                own = noise * ((part * (index + 3)) % 7 - 3)
                here = error + SPREAD[part] + own + network
                rows.append(
                    {"network": f"net {network}", "protocol": protocol, "part": part, "images": 100, "seconds": 0.5}
                    | {"errors": here, "error": here, "top5_error": here / 4}
                )
    return rp.Results(Options(), pandas.DataFrame(), pandas.DataFrame(), [], measurements=pandas.DataFrame(rows))


LIKE_THE_PAPER = {"single-view": 24.7, "ten-crop": 22.85, "multi-scale": 20.74}


def verdict(*arguments, **changes) -> rp.Verdict:
    (only,) = judge(results(*arguments, **changes))
    return only


def test_the_papers_order_confirms_the_claim():
    found = verdict(LIKE_THE_PAPER)
    assert found.verdict == "holds"  # though parts differ by more than protocols do: they are paired
    assert found.measured.startswith("test error: single-view 24.")
    assert "single-view above ten-crop: +1.8" in found.evidence
    assert "ten-crop above multi-scale: +2.1" in found.evidence
    assert "paired t test" in found.evidence and "over 20 parts of the test images" in found.evidence


@pytest.mark.parametrize("change", [{"ten-crop": 24.9}, {"multi-scale": 22.9}])
def test_a_broken_order_refutes_it(change):
    assert verdict(LIKE_THE_PAPER | change).verdict == "fails"


def test_few_images_exclude_no_gain():
    alike = LIKE_THE_PAPER | {"ten-crop": 24.7}
    assert verdict(alike, noise=0.0).verdict == "fails"
    found = verdict(alike, noise=0.0, parts=4)
    assert found.verdict == "inconclusive"
    assert found.evidence.startswith("400 test images are too few to exclude a gain of 0.5 points")
    worse = verdict(LIKE_THE_PAPER | {"ten-crop": 34.7}, parts=4)
    assert worse.verdict == "fails" and "too few" not in worse.evidence


def test_noise_and_single_parts_are_inconclusive():
    assert verdict(LIKE_THE_PAPER, noise=4.0).verdict == "inconclusive"
    assert verdict(LIKE_THE_PAPER, parts=1).verdict == "inconclusive"


def test_without_image_files_half_of_the_claim_is_not_tested():
    half = {name: error for name, error in LIKE_THE_PAPER.items() if name != "multi-scale"}
    found = verdict(half)
    assert found.verdict == "inconclusive"
    assert "multi-scale was not tested: it needs image files" in found.evidence
    assert "a corner crop of these 8×8 images, padded by 1, shows 77 % of the image" in found.evidence
    assert verdict(half | {"ten-crop": 60.0}).verdict == "fails"


def test_the_paired_test_is_the_textbooks():
    from scipy import stats

    ours = results(LIKE_THE_PAPER, networks=2)
    gap = test_protocols._gap(ours.measurements, "single-view", "ten-crop")
    parts = ours.measurements.groupby(["protocol", "part"])["error"].mean()
    expected = stats.ttest_rel(parts["single-view"], parts["ten-crop"], alternative="greater")
    assert gap.p == pytest.approx(expected.pvalue)
    assert gap.lower == pytest.approx(expected.confidence_interval(0.95).low)


def test_the_plan_follows_the_data_and_the_options(monkeypatch):
    (one,) = plan(Options(data="digits"))
    assert (one.network, one.options) == ("cifar/resnet-20", {})
    (one,) = plan(study.presets["quick"])
    assert (one.network, one.options) == ("imagenet/resnet-18", {"width": 16})
    (one,) = plan(Options(network="imagenet/resnet-50", width=16, stride_in="3x3"))
    assert (one.network, one.options) == ("imagenet/resnet-50", {"width": 16, "stride_in": "3x3"})
    assert plan(Options(weights=("resnet50.pth",))) == []
    monkeypatch.setattr(rp, "load_data", lambda name: files())
    (one,) = plan(Options(data="folder:photographs"))
    assert one.network == "imagenet/resnet-50"


def test_crops_of_another_size_take_the_scales_along(monkeypatch):
    monkeypatch.setattr(rp, "load_data", lambda name: files())
    (one,) = plan(Options(data="folder:photographs", crop=112))
    changed = one.recipe(rp.recipes.imagenet_paper())
    assert (changed.crop, changed.scale) == (112, (128, 240))
    (usual,) = plan(Options(data="folder:photographs"))
    assert usual.recipe(rp.recipes.imagenet_paper()) == rp.recipes.imagenet_paper()


@pytest.mark.parametrize(("data", "pad"), [("digits", 1), ("digits-64", 4)])
def test_networks_are_trained_on_the_views_that_ten_crop_shows(data, pad):
    (one,) = plan(Options(data=data))
    recipe = one.recipe(rp.recipes.digits_quick())
    assert (recipe.augmentation, recipe.pad, recipe.flip) == ("pad-crop", pad, 0.5)


def files() -> rp.Data:
    empty = rp.FolderSet((), torch.empty(0))
    return rp.Data("folder", "folder", empty, empty, ("a", "b"))  # type: ignore[arg-type]


def test_the_figure_has_our_errors_and_the_papers():
    (axis,) = study.draw(results(LIKE_THE_PAPER, noise=0.0, networks=2))["figure"].figure.axes
    (mean, _, _), *_ = axis.containers
    assert mean.get_ydata() == pytest.approx([0, -1.85, -3.96])
    for line in axis.lines[:2]:  # a network each
        assert line.get_ydata() == pytest.approx([0, -1.85, -3.96])
    ours, paper = sorted(axis.get_legend_handles_labels()[1])
    assert ours.startswith("ours on digits") and ours.endswith(": 25.20 → 23.35 → 21.24 %")
    assert paper == "the paper's ResNet-50: 24.7 → 22.85 → 20.74 %"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["one view", "10-crop", "several scales"]


def test_the_figure_has_the_limits_that_decide():
    noisy = results({name: error for name, error in LIKE_THE_PAPER.items() if name != "multi-scale"}, noise=3.0)
    (axis,) = study.draw(noisy)["figure"].figure.axes
    (_, _, (bars,)), *_ = axis.containers
    gap = test_protocols._gap(noisy.measurements, "ten-crop", "single-view")
    assert bars.get_segments()[1][:, 1] == pytest.approx([gap.lower, gap.upper])
    assert gap.lower < gap.difference < gap.upper


def test_the_table_is_beside_the_papers():
    half = {name: error for name, error in LIKE_THE_PAPER.items() if name != "multi-scale"}
    table = study.tabulate(results(half, noise=0.0, networks=2)).set_index("protocol")
    assert table["top-1 error (%)"].tolist() == ["25.20 ± 0.71", "23.35 ± 0.71", "not tested"]
    assert table["top-5 error (%)"].tolist() == ["6.30 ± 0.18", "5.84 ± 0.18", "–"]
    assert table["s for 1,000 images"].tolist() == ["5.0", "5.0", "–"]
    assert table["the paper's ResNet-50, top-1 / top-5 (%)"].tolist() == ["24.7 / –", "22.85 / 6.71", "20.74 / 5.25"]


def test_small_images_are_tested_as_by_a_naive_twin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smallest = ["--data", "digits", "--network", "cifar/resnet-8", "--width", "4", "--seeds", "0", "--iterations", "30"]
    assert study.main([*smallest, "--concurrency", "1", "--device", "cpu", "--precision", "fp32"]) == 0
    measured = pandas.read_csv("results/test_protocols/measurements.csv")
    assert measured.groupby("protocol")["images"].sum().to_dict() == {"single-view": 360, "ten-crop": 360}
    run = next((tmp_path / "runs").glob("cifar-resnet-8*"))
    network = rp.load_weights(rp.build("cifar/resnet-8", width=4, in_channels=1), run).eval()
    test = rp.load_data("digits").test
    padded = torch.nn.functional.pad(network.normalization(test.images), (1, 1, 1, 1))
    corners = [padded[..., top : top + 8, left : left + 8] for top, left in ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))]
    with torch.no_grad():
        logits = torch.stack([network(view) for crop in corners for view in (crop, crop.flip(-1))])
    softmax, raw = (
        100 * (mean.argmax(1) != test.labels).double().mean().item()
        for mean in (logits.double().softmax(2).mean(0), logits.double().mean(0))
    )
    errors = measured.groupby("protocol")["errors"].sum() / 3.6
    assert errors["ten-crop"] == pytest.approx(softmax)
    assert raw != pytest.approx(softmax)  # averaging logits is another protocol
    results = pandas.read_csv("results/test_protocols/results.csv")
    assert errors["single-view"] == pytest.approx(results["test_error"].item())


@pytest.fixture
def photographs(tmp_path):
    """Four noisy pictures to test on, of two shapes and two classes."""
    random = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label in ("ant", "bee"):
            folder = tmp_path / "pictures" / part / label
            folder.mkdir(parents=True)
            for index, size in enumerate(((80, 96, 3), (96, 72, 3))):
                pixels = torch.randint(0, 256, size, generator=random, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def test_trained_weights_are_tested_on_files_under_all_protocols(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = rp.build("imagenet/resnet-18", width=4, num_classes=2).eval()
    torch.save(network.state_dict(), "mine.pth")
    asked = ["--network", "imagenet/resnet-18", "--width", "4", "--crop", "64", "--weights", "mine.pth"]
    asked += ["--data", f"folder:{photographs}"]
    assert study.main([*asked, "--device", "cpu", "--precision", "fp32"]) == 0
    measured = pandas.read_csv("results/test_protocols/measurements.csv")
    assert measured["network"].unique().tolist() == ["imagenet/resnet-18, mine.pth"]
    assert measured.groupby("protocol", sort=False)["images"].agg(list).to_dict() == {
        "single-view": [1, 1, 1, 1],
        "ten-crop": [1, 1, 1, 1],
        "multi-scale": [1, 1, 1, 1],
    }
    network.normalization = None  # the file has none: that of the training images is taken
    data = rp.load_data(f"folder:{photographs}").cropped(64)
    for protocol, counted in measured.groupby("protocol")["errors"].sum().items():
        assert counted == rp.evaluate(network, data, protocol, device="cpu").errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--width", "-1"], "width (=-1) must be a whole number ≥ 1, or 0 for the network's own"),
        (["--crop", "20"], "crop (=20) must be a whole number ≥ 32"),
        (["--preset", "paper"], "data (='folder') needs a path: folder:PATH"),
        (["--weights", "absent.pth"], "weights (='absent.pth') are not there; accepted: .pth, .th, .pt, .safetensors,"),
        (
            ["--data", "digits", "--network", "cifar/resnet-21"],
            "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26",
        ),
        (["--depths", "20"], "option (='--depths') is unknown; accepted:"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
