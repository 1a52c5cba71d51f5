"""The paper's numbers and defaults, typed once more from its tables and text: a slip of the finger in either copy is seen."""

import dataclasses

import pytest

import resprobe as rp
from plugins.detection import DetectorSpec
from resprobe.recipes import Recipe, cifar_paper
from studies import complexity, convergence, degradation, detection, extreme_depth, imagenet, test_protocols

TABLE_2 = {"plain": {18: "27.94", 34: "28.54"}, "ResNet": {18: "27.88", 34: "25.03"}}
"""Top-1 error, 10-crop, by kind and layers."""
TABLE_3 = """
VGG-16        28.07  9.33
plain-34      28.54 10.02
ResNet-34 A   25.03  7.76
ResNet-34 B   24.52  7.46
ResNet-34 C   24.19  7.40
ResNet-50 B   22.85  6.71
ResNet-101 B  21.75  6.05
ResNet-152 B  21.43  5.71
"""
TABLE_4 = """
ResNet-34 B   21.84  5.71
ResNet-34 C   21.53  5.60
ResNet-50 B   20.74  5.25
ResNet-101 B  19.87  4.60
ResNet-152 B  19.38  4.49
"""
TABLE_6 = {20: (0.27, 8.75), 32: (0.46, 7.51), 44: (0.66, 7.17), 56: (0.85, 6.97), 110: (1.7, 6.61), 1202: (19.4, 7.93)}
"""Parameters in millions and test error; of 110 layers the mean of the five runs."""


def rows(table: str) -> dict[str, str]:
    """A network's two errors, as a table of ours says them."""
    found = {}
    for line in table.strip().splitlines():
        *name, top1, top5 = line.split()
        found[" ".join(name)] = f"{top1} / {top5}"
    return found


def test_errors_on_imagenet():
    assert {name: said for name, said in imagenet.PAPER_TEN_CROP.items() if "–" not in said} == rows(TABLE_3)
    assert rows(TABLE_4) == imagenet.PAPER_MULTI_SCALE
    for kind, by_depth in TABLE_2.items():
        for depth, error in by_depth.items():
            name = f"{kind}-{depth}" + (" A" if kind == "ResNet" else "")
            assert imagenet.PAPER_TEN_CROP[name].split()[0] == error
    assert {"plain": TABLE_2["plain"][18], "residual": TABLE_2["ResNet"][18]} == convergence.PAPER_18
    assert test_protocols.PAPER["ten-crop"] == (22.85, 6.71)
    assert test_protocols.PAPER["multi-scale"] == (20.74, 5.25)


def test_errors_and_parameters_on_cifar():
    errors = {depth: error for depth, (_, error) in TABLE_6.items()}
    assert errors == {**degradation.PAPER_TEST_ERROR, **extreme_depth.PAPER_TEST_ERROR}
    assert {depth: pytest.approx(1e6 * size) for depth, (size, _) in TABLE_6.items()} == complexity.PAPER_PARAMETERS


def test_detection_of_tables_7_and_8():
    vgg, resnet = "imagenet/vgg-16", "imagenet/resnet-101"
    assert detection.PAPER["voc"] == {vgg: (73.2, 70.4), resnet: (76.4, 73.8)}
    assert detection.PAPER["coco"] == {vgg: (41.5, 21.2), resnet: (48.4, 27.2)}


def test_the_recipe_of_section_4_2_with_all_that_it_leaves_open():
    """Its numbers, and beside them the reading that is ours wherever it says nothing (docs/choices.md)."""
    assert dataclasses.asdict(cifar_paper()) == {
        "name": "cifar-paper",
        "iterations": 64_000,
        "batch_size": 128,
        "learning_rate": 0.1,
        "milestones": (32_000, 48_000),
        "decay": 10.0,
        "plateau": None,
        "warm_up_rate": None,
        "warm_up_until": 80.0,
        "warm_up_iterations": None,
        "momentum": 0.9,
        "momentum_form": "torch",
        "nesterov": False,
        "weight_decay": 1e-4,
        "weight_decay_on": "all",
        "bn_batch": None,
        "bn_test_statistics": "precise",
        "augmentation": "pad-crop",
        "pad": 4,
        "pad_value": "mean",
        "flip": 0.5,
        "scale": (256, 480),
        "crop": 224,
        "colour": "none",
        "normalization": "per-pixel-mean",
        "validation_fraction": 0.0,
        "window": 100,
        "evaluations": 64,
    }
    assert cifar_paper() == Recipe("cifar-paper")


@pytest.mark.parametrize(("depth", "rate"), [(56, None), (110, 0.01), (1202, 0.01)])
def test_from_110_layers_on_networks_are_warmed_up(depth, rate):
    images = rp.ImageSet(rp.load_data("digits").train.images[:2], rp.load_data("digits").train.labels[:2])
    data = rp.Data("cifar10", "two images", images, images, tuple("0123456789"))
    assert rp.default_recipe(data, depth=depth).warm_up_rate == rate
    if depth < 1000:
        assert rp.runs.configure(f"cifar/resnet-{depth}", data).recipe.warm_up_rate == rate


def test_the_paper_preset_warms_up_its_deepest_networks(monkeypatch):
    from resprobe.planning import jobs_of

    images = rp.load_data("digits").train.select([0, 1])
    data = rp.Data("cifar10", "two images", images, images, tuple("0123456789"))
    options = degradation.study.presets["paper"]
    jobs = jobs_of(degradation.plan(options), options, data, "fp32", {})
    rates = {job.config.network.depth: job.config.recipe.warm_up_rate for _, job in jobs}
    assert rates == {20: None, 32: None, 44: None, 56: None, 110: 0.01}


def test_a_detector_is_faster_rcnns_as_the_paper_takes_it():
    """Ren et al. (2015) and its released code, whose numbers App. A says it keeps."""
    assert dataclasses.asdict(DetectorSpec(21)) == {
        "num_classes": 21,
        "bn": "frozen",
        "freeze_stages": 0,
        "roi": "pool",
        "roi_size": None,
        "context": False,
        "shorter_side": 600,
        "longer_side": 1000,
        "anchor_sizes": (128, 256, 512),
        "anchor_ratios": (0.5, 1.0, 2.0),
        "proposals_train": 2000,
        "proposals_test": 300,
        "candidates_train": 12_000,
        "candidates_test": 6000,
        "rpn_nms": 0.7,
        "rpn_foreground": 0.7,
        "rpn_background": 0.3,
        "rpn_batch": 256,
        "rpn_foreground_fraction": 0.5,
        "roi_foreground": 0.5,
        "roi_batch": 128,
        "roi_foreground_fraction": 0.25,
        "score_threshold": 0.05,
        "nms": 0.3,
        "detections": 100,
    }


def test_layers_that_the_framework_gives():
    norm = rp.NORMALIZATIONS["batch"](16)
    assert (norm.eps, norm.momentum, norm.affine, norm.track_running_stats) == (1e-5, 0.1, True, True)
    assert [rp.NORMALIZATIONS["group"](channels).num_groups for channels in (4, 16, 24)] == [1, 2, 3]
    dropouts = [
        module.p for module in rp.build("imagenet/vgg-16", width=4).modules() if type(module).__name__ == "Dropout"
    ]
    assert dropouts and set(dropouts) == {0.5}
