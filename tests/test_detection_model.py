"""plugins.detection's detector: where a network is cut, what is frozen, what trains, and Table 9 computed by hand."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import RoIPool

import resprobe as rp
from plugins import flops
from plugins.detection.backbones import Backbone, split
from plugins.detection.improvements import adjacent_scales, detect, refine, vote
from plugins.detection.model import Detector, RegionFeatures, cost, faster_rcnn, trainable
from plugins.detection.normalization import FrozenBatchNorm2d, freeze_batch_norm
from plugins.detection.spec import DetectorSpec

SMALL = {
    "shorter_side": 64,
    "longer_side": 96,
    "anchor_sizes": (16, 32),
    "proposals_train": 50,
    "proposals_test": 20,
    "candidates_train": 200,
    "candidates_test": 100,
    "rpn_batch": 32,
    "roi_batch": 16,
    "roi_size": 4,
}


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    with tiny.one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def network(name: str = "cifar/resnet-8", **options: object) -> rp.Network:
    """A small network whose normalization layers hold numbers of their own, as after a training."""
    made = rp.build(name, **{"width": 4, "num_classes": 5, **options})
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            lively(module)
    return made.eval()


def lively(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    for values, low, high in (
        (norm.weight, 0.5, 1.5),
        (norm.bias, -0.5, 0.5),
        (norm.running_mean, -0.2, 0.2),
        (norm.running_var, 0.5, 2.0),
    ):
        nn.init.uniform_(values, low, high)
    return norm


def detector(backbone: nn.Module | None = None, **options: object) -> Detector:
    """With siblings that were drawn wide, so that untrained scores and boxes differ from region to region."""
    model = faster_rcnn(backbone or network(), **{"num_classes": 4, **SMALL, **options})
    for layer in (model.roi_heads.box_predictor.cls_score, model.roi_heads.box_predictor.bbox_pred):
        nn.init.normal_(layer.weight, std=0.5)
    return model


def images() -> list[Tensor]:
    return [torch.rand(3, 70, 100), torch.rand(3, 80, 64)]


def targets() -> list[dict[str, Tensor]]:
    return [
        {"boxes": torch.tensor([[10.0, 10, 40, 45], [50, 20, 90, 60]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor([[5.0, 30, 50, 70]]), "labels": torch.tensor([2])},
    ]


def assert_detections_equal(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name])


# Frozen batch normalization


def test_frozen_batch_normalization_is_batch_normalization_in_evaluation_mode() -> None:
    norm = lively(nn.BatchNorm2d(6, eps=0.01)).eval()
    frozen = FrozenBatchNorm2d.of(norm)
    x = torch.randn(3, 6, 5, 5)
    torch.testing.assert_close(frozen.train()(x), norm(x))
    assert frozen.eps == 0.01
    with_default_eps = FrozenBatchNorm2d(6)
    with_default_eps.load_state_dict(norm.state_dict())
    assert not torch.allclose(with_default_eps(x), norm(x), atol=1e-4)


def test_training_leaves_frozen_batch_normalization_unchanged() -> None:
    frozen = FrozenBatchNorm2d.of(lively(nn.BatchNorm2d(6))).train()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen(torch.randn(3, 6, 5, 5, requires_grad=True)).sum().backward()
    assert list(frozen.parameters()) == []
    assert frozen.state_dict().keys() == {"weight", "bias", "running_mean", "running_var"}
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name])


def test_frozen_batch_normalization_keeps_no_activation_for_the_backward_pass() -> None:
    def kept(module: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            module(torch.randn(3, 6, 5, 5, requires_grad=True))
        return max(sizes)

    norm = lively(nn.BatchNorm2d(6)).eval()
    assert kept(norm) == 3 * 6 * 5 * 5
    assert kept(FrozenBatchNorm2d.of(norm)) == 6


def test_frozen_batch_normalization_keeps_the_precision_of_its_input() -> None:
    frozen = FrozenBatchNorm2d.of(lively(nn.BatchNorm2d(6)))
    assert frozen(torch.randn(1, 6, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dicts_of_batch_normalization_load() -> None:
    trained, other = network(), freeze_batch_norm(network())
    other.load_state_dict(trained.state_dict())
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(other(x), trained(x))


def test_freezing_replaces_every_batch_normalization_and_nothing_else() -> None:
    module = network()
    x = torch.rand(2, 3, 32, 32)
    before = module(x)
    assert freeze_batch_norm(module) is module
    assert not any(isinstance(each, nn.BatchNorm2d) for each in module.modules())
    torch.testing.assert_close(module.train()(x), before)

    other = nn.Sequential(nn.GroupNorm(2, 4), nn.BatchNorm1d(4))
    kinds = [type(each) for each in freeze_batch_norm(other)]
    assert kinds == [nn.GroupNorm, nn.BatchNorm1d]
    assert isinstance(freeze_batch_norm(nn.BatchNorm2d(4)), FrozenBatchNorm2d)


def test_a_layer_in_two_places_remains_one_layer() -> None:
    norm = nn.BatchNorm2d(4)
    frozen = freeze_batch_norm(nn.Sequential(norm, nn.ReLU(), norm))
    assert isinstance(frozen[0], FrozenBatchNorm2d) and frozen[0] is frozen[2]


def test_batch_normalization_without_affine_part_freezes_and_without_statistics_does_not() -> None:
    norm = nn.BatchNorm2d(4, affine=False).eval()
    nn.init.uniform_(norm.running_mean)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(FrozenBatchNorm2d.of(norm)(x), norm(x))
    with pytest.raises(rp.UsageError, match=r"bn \(='frozen'\) needs .* accepted with them: bn='trained'"):
        freeze_batch_norm(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)))


class ActivatedNorm(nn.BatchNorm2d):
    """As timm's, with the activation in it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_batch_normalization_that_does_more_is_not_replaced() -> None:
    said = (
        r"^bn \(='frozen'\) cannot fix '1': a ActivatedNorm does more than batch normalization; accepted: bn='trained'$"
    )
    with pytest.raises(rp.UsageError, match=said):
        freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), ActivatedNorm(4)))


# Where a network is cut


def vgg(width: int = 4) -> torchvision.models.VGG:
    """torchvision's VGG class with narrow layers, so that its 103 million fc weights are not made."""
    with torch.device("meta"):
        made = torchvision.models.vgg11_bn()
    made.features = torchvision.models.vgg.make_layers([width, "M", width, "M", width, width, "M"], batch_norm=True)
    made.classifier = nn.Sequential(nn.Linear(width * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 5))
    return made.eval()


@pytest.mark.parametrize(
    ("make", "last", "stride", "channels", "features", "region"),
    [
        (lambda: network("imagenet/resnet-18"), "fc", 16, 16, 32, 14),
        (lambda: network("imagenet/resnet-50"), "fc", 16, 64, 128, 14),
        (lambda: network("imagenet/plain-34"), "fc", 16, 16, 32, 14),
        (lambda: network("cifar/resnet-8", shortcut="B"), "fc", 2, 8, 16, 14),
        (lambda: network("cifar/plain-14", norm="group"), "fc", 2, 8, 16, 14),
        (lambda: torchvision.models.resnet18(num_classes=5).eval(), "fc", 16, 256, 512, 14),
    ],
)
def test_head_after_trunk_is_the_network(
    make: Callable[[], nn.Module], last: str, stride: int, channels: int, features: int, region: int
) -> None:
    whole = make()
    backbone = split(whole)
    assert (backbone.stride, backbone.channels, backbone.features) == (stride, channels, features)
    assert backbone.region_size == region
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(whole.get_submodule(last)(backbone.head(backbone.trunk(x))), whole(x))


@pytest.mark.parametrize(
    ("make", "last", "stride", "image"),
    [(lambda: network("imagenet/vgg-16", width=2), "fc", 16, 224), (vgg, "classifier.3", 4, 56)],
)
def test_in_vgg_region_pooling_steps_into_the_place_of_the_last_pooling(
    make: Callable[[], nn.Module], last: str, stride: int, image: int
) -> None:
    whole = make()
    backbone = split(whole)
    assert (backbone.stride, backbone.region_size) == (stride, 7)
    assert sum(isinstance(each, nn.Linear) for each in backbone.head.modules()) == (2 if last == "fc" else 1)
    x = torch.rand(2, 3, image, image)
    pooled = nn.functional.max_pool2d(backbone.trunk(x), 2)
    torch.testing.assert_close(whole.get_submodule(last)(backbone.head(pooled)), whole(x))


@pytest.mark.parametrize("make", [network, lambda: network("imagenet/resnet-18"), vgg])
def test_the_trunk_is_made_of_stages(make: Callable[[], nn.Module]) -> None:
    names = [name for name, _ in split(make()).trunk.named_children()]
    assert names in (
        ["stem", "stage1", "stage2"],
        ["stem", "stage1", "stage2", "stage3"],
        ["stage1", "stage2", "stage3"],
    )


def test_91_convolutions_of_resnet_101_are_shared() -> None:
    """Appendix A: "conv1, conv2_x, conv3_x, and conv4_x (totally 91 conv layers in ResNet-101)"."""
    trunk = split(network("imagenet/resnet-101", width=2)).trunk
    names = [name for name, module in trunk.named_modules() if isinstance(module, nn.Conv2d)]
    assert sum("shortcut" not in name for name in names) == 91


@pytest.mark.usefixtures("clean_registries")
def test_a_network_with_a_strangers_block_can_be_a_backbone() -> None:
    class Strange(rp.Block):
        weighted_layers = 2
        expansion = 3

        def make_branch(self, in_channels: int, width: int, stride: int, layers: rp.Layers) -> nn.Module:
            wide = nn.Conv2d(in_channels, width * 3, 5, stride, padding=2)
            return nn.Sequential(wide, nn.BatchNorm2d(width * 3), nn.GELU(), nn.Conv2d(width * 3, width * 3, 1))

    rp.BLOCKS.register("strange-in-test")(Strange)
    whole = network("cifar/resnet-8", block="strange-in-test", shortcut="B")
    backbone = split(whole)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(whole.fc(backbone.head(backbone.trunk(x))), whole(x))
    losses = detector(whole)(images(), targets())
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_family_that_wraps_torchvisions_network_is_seen_through() -> None:
    wrapped = rp.Network(OrderedDict(body=torchvision.models.resnet18(num_classes=5)))
    assert split(wrapped).stride == 16


def test_splitting_leaves_the_network_as_it_is() -> None:
    whole = network().train()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    split(whole)
    assert all(module.training for module in whole.modules())
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_unfit_networks_are_named_in_one_line() -> None:
    with pytest.raises(rp.UsageError, match=r"network \(=MobileNetV2\) .* accepted: networks of rp.build, torchvision"):
        split(torchvision.models.mobilenet_v2(num_classes=2))
    with pytest.raises(rp.UsageError, match=r"network \(=imagenet/vgg-16\) cannot .* its head fails on an input of"):
        split(network("imagenet/vgg-16", width=2), region_size=5)
    flat = rp.Network(OrderedDict(stem=nn.Conv2d(3, 4, 3), stage1=nn.ReLU(), fc=nn.Linear(4, 2)))
    with pytest.raises(rp.UsageError, match=r"its head turns an input of shape .* expected 2 dimensions") as caught:
        split(flat)
    assert "\n" not in str(caught.value)


# The detector


def test_training_gives_four_losses_whose_gradient_reaches_every_part() -> None:
    model = detector().train()
    losses = model(images(), targets())
    assert losses.keys() == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("roi", ["pool", "align"])
def test_evaluation_gives_boxes_labels_and_scores_in_the_images_own_pixels(roi: str) -> None:
    given = images()
    found = detector(roi=roi, score_threshold=0.0).eval()(given)
    assert len(found) == 2
    for image, detections in zip(given, found, strict=True):
        height, width = image.shape[-2:]
        assert detections.keys() == {"boxes", "labels", "scores"}
        assert 0 < len(detections["boxes"]) == len(detections["labels"]) == len(detections["scores"]) <= 100
        assert (detections["labels"] >= 1).all() and (detections["labels"] <= 3).all()
        assert (detections["boxes"] >= 0).all()
        assert detections["boxes"][:, 2].max() <= width + 1e-3 and detections["boxes"][:, 3].max() <= height + 1e-3
        assert (detections["scores"].diff() <= 0).all()


def test_a_few_steps_on_one_image_reduce_the_loss() -> None:
    model = faster_rcnn(network(), 4, **SMALL).train()
    image, target = images()[:1], targets()[:1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    course = []
    for _ in range(25):
        loss = sum(model(image, target).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert sum(course[-5:]) < 0.7 * sum(course[:5])


@pytest.mark.parametrize(("bn", "moves"), [("frozen", False), ("trained", True)])
def test_statistics_move_in_training_only_if_they_are_trained(bn: str, moves: bool) -> None:
    model = detector(bn=bn).train()
    statistics = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    assert {name.split(".")[0] for name in statistics} == {"backbone", "roi_heads"}
    model(images(), targets())
    for name, before in statistics.items():
        assert torch.equal(model.state_dict()[name], before) != moves, name


def test_the_network_that_was_given_is_left_as_it_is() -> None:
    whole = network()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    model = detector(whole, freeze_stages=1)
    sum(model.train()(images(), targets()).values()).backward()
    assert any(isinstance(each, nn.BatchNorm2d) for each in whole.modules())
    assert all(each.requires_grad and each.grad is None for each in whole.parameters())
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_the_same_seed_gives_the_same_detector() -> None:
    whole, made = network(), []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(faster_rcnn(whole, 4, **SMALL))
    first, second = (model.state_dict() for model in made)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_region_as_large_as_the_head_needs_gives_the_networks_own_logits() -> None:
    """RoI pooling of 8 × 8 map pixels to 8 × 8 takes nothing away: the region is classified as the image is."""
    whole = network()
    features = RegionFeatures(split(whole, region_size=8), "pool", context=False)
    x = torch.rand(1, 3, 16, 16)
    # RoIPool counts a region's last pixel in: 7 · 2 = 14 is the left edge of the map's last pixel.
    seen = features({"0": split(whole).trunk(x)}, [torch.tensor([[0.0, 0, 14, 14]])], [(16, 16)])
    torch.testing.assert_close(whole.fc(seen), whole(x))


def test_images_are_normalized_as_for_the_classifier() -> None:
    whole = network()
    mean_image = torch.rand(3, 8, 8)
    whole.normalization = rp.Normalization.per_pixel_mean(mean_image)
    model = detector(whole)
    torch.testing.assert_close(torch.tensor(model.transform.image_mean), mean_image.mean((1, 2)))
    assert model.transform.image_std == [1.0, 1.0, 1.0]
    given = rp.Normalization.channels((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert detector(whole, normalization=given).transform.image_std == pytest.approx([0.4, 0.5, 0.6])
    assert detector(network()).transform.image_mean == pytest.approx([0.485, 0.456, 0.406])


def test_images_are_resized_and_padded_to_whole_map_pixels() -> None:
    model = detector(network("imagenet/resnet-18"), roi_size=None).eval()
    batch, _ = model.transform([torch.rand(3, 45, 100), torch.rand(3, 40, 56)])
    # 45 × 100 is limited by the longer side: 96 / 100; 40 × 56 by the shorter: 64 / 40.
    assert [tuple(size) for size in batch.image_sizes] == [(43, 96), (64, 89)]
    assert batch.tensors.shape == (2, 3, 64, 96)
    batch, _ = model.transform([torch.rand(3, 45, 90)])
    assert batch.image_sizes == [(48, 96)] and batch.tensors.shape == (1, 3, 48, 96)
    batch, _ = model.transform([torch.rand(3, 40, 56)])
    assert batch.tensors.shape == (1, 3, 64, 96)
    batch, _ = detector().eval().transform([torch.rand(3, 40, 56)])
    assert batch.tensors.shape == (1, 3, 64, 90)
    assert model.backbone(batch.tensors).shape[-2:] == (4, 6)


def test_the_paper_s_wiring_of_vgg_16_and_a_residual_network() -> None:
    """Anchors, region maps and the width of what the siblings see, at the defaults."""
    residual = faster_rcnn(network("imagenet/resnet-50"), 21)
    assert isinstance(residual.roi_heads.box_roi_pool.pool, RoIPool)
    assert residual.roi_heads.box_roi_pool.map_shape == (64, 14, 14)
    last_stage = residual.roi_heads.box_roi_pool.head.stage4
    assert last_stage(torch.rand(1, 64, 14, 14)).shape == (1, 128, 7, 7)
    assert residual.rpn.head.cls_logits.out_channels == 9
    sizes = residual.rpn.anchor_generator.cell_anchors[0]
    areas = ((sizes[:, 2] - sizes[:, 0]) * (sizes[:, 3] - sizes[:, 1])).sqrt()
    assert sorted(areas.round(decimals=-1).tolist()) == [130.0] * 3 + [260.0] * 3 + [510.0] * 3
    vgg_16 = faster_rcnn(network("imagenet/vgg-16", width=2), 21)
    assert vgg_16.roi_heads.box_roi_pool.map_shape == (16, 7, 7)
    assert [type(each).__name__ for each in vgg_16.roi_heads.box_roi_pool.head] == [
        *("Flatten", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout")
    ]
    for model in (residual, vgg_16):
        assert model.stride == 16
        siblings = model.roi_heads.box_predictor
        assert (siblings.cls_score.out_features, siblings.bbox_pred.out_features) == (21, 84)
        assert siblings.bbox_pred.weight.std() < 0.0015 and siblings.cls_score.weight.std() < 0.015
        assert model.rpn._post_nms_top_n == {"training": 2000, "testing": 300}


# Global context


def test_the_context_is_the_feature_of_the_whole_image() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    backbone = Backbone(nn.Sequential(), Mean(), in_channels=1, stride=1, channels=1, region_size=1, features=1)
    features = RegionFeatures(backbone, "pool", context=True)
    # Pooled to one number each, regions are the largest value inside; the map is padded beyond the second image.
    maps = torch.zeros(2, 1, 8, 8)
    maps[0, 0, 1, 1], maps[0, 0, 6, 6], maps[1, 0, 2, 2], maps[1, 0, 7, 7] = 3.0, 5.0, 2.0, 9.0
    boxes = [torch.tensor([[0.0, 0, 2, 2], [4, 0, 6, 2], [5, 5, 7, 7]]), torch.tensor([[0.0, 0, 3, 3]])]
    seen = features({"0": maps}, boxes, [(8, 8), (4, 4)])
    assert seen.tolist() == [[3.0, 5.0], [0.0, 5.0], [5.0, 5.0], [2.0, 2.0]]


def test_a_detector_with_context_trains_and_detects() -> None:
    model = detector(context=True).train()
    assert model.roi_heads.box_predictor.cls_score.in_features == 2 * 16
    sum(model(images(), targets()).values()).backward()
    assert model.roi_heads.box_predictor.cls_score.weight.grad[:, 16:].abs().sum() > 0
    assert_detections_equal(detect(model.eval(), images_ := images()), model(images_))


# Box refinement and voting


def test_a_kept_box_becomes_the_mean_of_its_neighbours_weighted_by_their_scores() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 4], [50, 50, 60, 60]])
    scores = torch.tensor([0.6, 0.2, 0.9, 0.5])
    # Overlaps with the first: 1, 0.8, 0.4, 0. So y2 = (0.6 · 10 + 0.2 · 8) / 0.8 = 9.5; the last stands alone.
    voted = vote(boxes, scores, torch.tensor([0, 3]))
    torch.testing.assert_close(voted, torch.tensor([[0.0, 0, 10, 9.5], [50, 50, 60, 60]]))
    # At 0.4 the third votes too: y2 = (6 + 1.6 + 3.6) / 1.7.
    assert vote(boxes, scores, torch.tensor([0]), iou=0.4)[0, 3].item() == pytest.approx(11.2 / 1.7)


def test_the_threshold_of_voting_is_inclusive() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])  # overlap exactly 0.5
    assert vote(boxes, torch.tensor([1.0, 1.0]), torch.tensor([0]))[0].tolist() == [0, 0, 10, 7.5]


def test_voting_on_nothing_gives_nothing() -> None:
    nothing = torch.empty(0, 4)
    assert vote(nothing, torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0, 4)


def test_refinement_pools_again_from_the_box_of_the_best_class_and_keeps_both() -> None:
    asked = []

    def predict(boxes: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        asked.append([each.tolist() for each in boxes])
        result = []
        for each in boxes:
            regressed = torch.stack([each, each + 1, each + 10], dim=1)  # background, class 1, class 2
            scores = torch.tensor([[0.9, 0.04, 0.06], [0.1, 0.7, 0.2]])[: len(each)]
            result.append((regressed, scores))
        return result

    first, second = torch.tensor([[0.0, 0, 5, 5], [1.0, 1, 6, 6]]), torch.tensor([[2.0, 2, 3, 3]])
    (boxes, scores), (other_boxes, _) = refine(predict, [first, second])
    # The first region's background is likelier than class 2, which is what moves it nevertheless.
    assert asked == [
        [first.tolist(), second.tolist()],
        [[[10.0, 10, 15, 15], [2.0, 2, 7, 7]], [[12.0, 12, 13, 13]]],
    ]
    assert boxes.shape == (4, 3, 4) and scores.shape == (4, 3) and other_boxes.shape == (2, 3, 4)
    assert boxes[:, 2].tolist() == [[10.0, 10, 15, 15], [11, 11, 16, 16], [20, 20, 25, 25], [12, 12, 17, 17]]


class Rigged(nn.Module):
    """Sibling layers of known output: probabilities [regions, classes], and boxes that move right by `dx` widths."""

    def __init__(self, probabilities: list[list[float]], dx: float) -> None:
        super().__init__()
        self.logits, self.dx = torch.tensor(probabilities).log(), dx

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.zeros(len(features), self.logits.shape[1], 4)
        codes[:, :, 0] = self.dx * 10  # the coder's weight of dx is 10
        return self.logits, codes.flatten(1)


def rigged(proposals: list[list[float]], probabilities: list[list[float]], dx: float) -> Detector:
    """A detector of 64 × 64 images, whose size it keeps."""
    model = faster_rcnn(network(), 2, **{**SMALL, "longer_side": 64}).eval()
    model.roi_heads.box_predictor = Rigged(probabilities, dx)
    model.rpn.forward = lambda images, maps, targets=None: ([torch.tensor(proposals)], {})
    return model


def test_refinement_of_one_proposal_computed_by_hand() -> None:
    model, image = rigged([[0.0, 0, 10, 10]], [[0.2, 0.8]], dx=0.5), [torch.rand(3, 64, 64)]
    assert detect(model, image)[0]["boxes"].tolist() == [[5.0, 0, 15, 10]]
    (found,) = detect(model, image, refinement=True)
    # The second round moves the box on to [10, 0, 20, 10]: overlap 50/150 > 0.3, so only one of the two stays, and the
    # other, below 0.5, has no vote.
    assert found["boxes"].tolist() == [[5.0, 0, 15, 10]]
    assert found["scores"].item() == pytest.approx(0.8) and found["labels"].tolist() == [1]


def test_voting_of_refined_boxes_computed_by_hand() -> None:
    model, image = rigged([[56.0, 0, 62, 10]], [[0.2, 0.8]], dx=0.5), [torch.rand(3, 64, 64)]
    # Clipped at the image's border. First round: [59, 0, 65, 10] → [59, 0, 64, 10].
    # Second: [61.5, 0, 66.5, 10] → [61.5, 0, 64, 10]. Their overlap is 2.5/5.
    (found,) = detect(model, image, refinement=True)
    assert found["boxes"].tolist() == [[(59 + 61.5) / 2, 0, 64, 10]]


def test_boxes_have_the_votes_of_their_own_class_only() -> None:
    # Boxes stay where they are. The third overlaps the first by 0.8, but is of the other class.
    boxes = [[0.0, 0, 10, 10], [30, 30, 50, 50], [0, 0, 10, 8]]
    model = rigged(boxes, [[0.39, 0.6, 0.01], [0.08, 0.9, 0.02], [0.04, 0.01, 0.95]], dx=0.0)
    (found,) = detect(model, [torch.rand(3, 64, 64)], refinement=True)
    assert found["labels"].tolist() == [2, 1, 1]
    assert found["scores"].tolist() == pytest.approx([0.95, 0.9, 0.6])
    torch.testing.assert_close(found["boxes"], torch.tensor([boxes[2], boxes[1], boxes[0]]))


def test_refinement_changes_what_a_detector_finds() -> None:
    model, given = detector(score_threshold=0.0).eval(), images()
    plain, refined = detect(model, given), detect(model, given, refinement=True)
    assert not all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(plain, refined, strict=True))
    for one in refined:
        assert (one["scores"].diff() <= 0).all()


# Multi-scale testing


def test_the_two_scales_are_those_nearest_to_224_squared() -> None:
    # A region of 112 × 112 at shorter side 600, on the paper's pyramid.
    sides = torch.tensor([200.0, 400, 600, 800, 1000])
    areas = (112 * sides / 600)[:, None] ** 2
    # Areas: 37², 75², 112², 149², 187²; the nearest to 224² are 1000 and 800.
    assert adjacent_scales(areas)[:, 0].tolist() == [4, 3]
    # 224 × 224 at 600: 75², 149², 224², 299², 373². 299² is off by 39,021 pixels, 149² by 27,876.
    assert adjacent_scales((224 * sides / 600)[:, None] ** 2)[:, 0].tolist() == [2, 1]
    # 500 × 300 at 600: areas/1000 = 16.7, 66.7, 150, …; 224² = 50.2.
    assert adjacent_scales((150000 * (sides / 600) ** 2)[:, None])[:, 0].tolist() == [1, 0]
    # Every region has its own pair; another size that suits the head asks for other scales.
    both = torch.cat([(112 * sides / 600)[:, None] ** 2, (500 * sides / 600)[:, None] ** 2], dim=1)
    assert adjacent_scales(both).shape == (2, 2)
    assert adjacent_scales(both, pretrained_size=32)[:, 0].tolist() == [0, 1]


def test_the_two_scales_are_adjacent() -> None:
    sides = torch.tensor([200.0, 400, 600, 800, 1000])
    chosen = adjacent_scales(torch.outer(sides**2, torch.logspace(-4, 1, 500)))
    assert ((chosen[0] - chosen[1]).abs() == 1).all()


def test_detect_without_improvements_is_the_model() -> None:
    for options in ({"score_threshold": 0.0}, {"context": True}, {"roi": "align", "detections": 3}):
        model, given = detector(**options).eval(), images()
        assert_detections_equal(detect(model, given), model(given))


def test_a_pyramid_of_the_models_own_scale_is_the_model() -> None:
    model, given = detector(score_threshold=0.0).eval(), images()
    assert_detections_equal(detect(model, given, scales=(64,)), model(given))
    assert_detections_equal(detect(model, given, scales=(64, 64)), model(given))


def test_features_of_two_scales_are_merged_by_maxout() -> None:
    model = faster_rcnn(network(), 2, **{**SMALL, "longer_side": 64}).eval()
    image, proposal = torch.rand(3, 64, 64), torch.tensor([[0.0, 0, 20, 30]])
    model.rpn.forward = lambda images, maps, targets=None: ([proposal], {})
    seen = []
    model.roi_heads.box_predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    # With 32 px as the size that suits the head: areas 600 · (1/4, 1, 4) against 1024 → scales 64 and 32.
    detect(model, [image], scales=(128, 32, 64), pretrained_size=32)
    by_hand = []
    for scale in (0.5, 1.0):
        size = [round(64 * scale)] * 2
        smaller = nn.functional.interpolate(model.transform.normalize(image)[None], size=size, mode="bilinear")
        maps = {"0": model.backbone(smaller)}
        by_hand.append(model.roi_heads.box_roi_pool(maps, [proposal * scale], [tuple(size)]))
    assert not torch.allclose(*by_hand)
    torch.testing.assert_close(seen[-1], torch.maximum(*by_hand))


def test_all_improvements_together() -> None:
    model, given = detector(context=True, score_threshold=0.0).eval(), images()
    found = detect(model, given, refinement=True, scales=(32, 64, 96), pretrained_size=32)
    for image, one in zip(given, found, strict=True):
        assert (
            0 < len(one["boxes"]) <= 100 and torch.isfinite(one["boxes"]).all() and torch.isfinite(one["scores"]).all()
        )
        assert one["boxes"][:, 2].max() <= image.shape[2] + 1e-3 and one["boxes"][:, 3].max() <= image.shape[1] + 1e-3


@pytest.mark.parametrize("improvements", [{}, {"refinement": True, "scales": (32, 64)}])
def test_an_image_without_proposals_has_no_detections(improvements: dict[str, object]) -> None:
    model = detector().eval()
    model.rpn.forward = lambda images, maps, targets=None: ([torch.empty(0, 4)] * 2, {})
    for found in detect(model, images(), **improvements):
        assert found["boxes"].shape == (0, 4) and len(found["scores"]) == 0


def test_mistakes_in_detecting() -> None:
    with pytest.raises(rp.UsageError, match=r"model \(in training mode\) cannot detect; call model.eval\(\) first"):
        detect(detector().train(), images())
    with pytest.raises(rp.UsageError, match=r"scales \(=\(0, 600\)\) must be shorter sides ≥ 1"):
        detect(detector().eval(), images(), scales=(0, 600))


# What trains, what it costs, what it is


def test_the_table_says_which_layers_train() -> None:
    model = detector(freeze_stages=2)
    table = trainable(model).set_index("layer")
    assert table.parameters[table.trains].sum() == sum(
        each.numel() for each in model.parameters() if each.requires_grad
    )
    buffers = sum(
        each.weight.numel() + each.bias.numel() for each in model.modules() if isinstance(each, FrozenBatchNorm2d)
    )
    assert table.parameters.sum() == sum(each.numel() for each in model.parameters()) + buffers
    assert table.part.unique().tolist() == ["trunk", "RPN", "per-region head", "sibling layers"]
    assert tuple(table.loc["backbone.stem.conv", ["trains", "why"]]) == (False, "freeze_stages=2")
    assert tuple(table.loc["backbone.stage2.0.branch.conv1", ["trains", "why"]]) == (True, "fine-tuned")
    frozen = table.loc["backbone.stage2.0.branch.norm1"]
    assert (frozen.trains, frozen.why) == (False, "batch normalization is frozen (Appendix A)")
    assert tuple(table.loc["rpn.head.cls_logits", ["trains", "why"]]) == (True, "new")
    model.rpn.requires_grad_(False)
    assert trainable(model).set_index("layer").why["rpn.head.cls_logits"] == "requires_grad is False"


def test_everything_trains_with_trained_batch_normalization() -> None:
    assert trainable(detector(bn="trained")).trains.all()


def test_a_fixed_stage_stays_fixed_also_where_batch_normalization_is_trained() -> None:
    model = detector(bn="trained", freeze_stages=1).train()
    before = {name: value.clone() for name, value in model.backbone.stem.state_dict().items()}
    sum(model(images(), targets()).values()).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.stem.state_dict().items())
    assert all(each.grad is None for each in model.backbone.stem.parameters())
    assert all(each.grad is not None for each in model.backbone.stage1.parameters())


def test_the_cost_is_the_sum_of_closed_forms() -> None:
    model = detector(proposals_test=20)
    table = cost(model, (64, 64)).set_index("part")
    whole = network()
    trunk = flops.count(whole, (3, 64, 64)).set_index("layer").macs
    of_trunk = trunk[[name.startswith(("stem", "stage1", "stage2")) for name in trunk.index]].sum()
    assert table.macs["trunk"] == of_trunk
    # The map is 32 × 32 of 8 channels; 2 sizes × 3 ratios are 6 anchors.
    assert table.macs["RPN"] == 32 * 32 * (8 * 8 * 9 + 8 * 6 + 8 * 24)
    # Stage 3 of resnet-8 on a 4 × 4 map gives 2 × 2: 8 → 16 → 16 channels of 3 × 3, option A.
    assert table.macs_each["per-region head"] == 4 * (8 * 16 * 9 + 16 * 16 * 9)
    assert table.macs_each["sibling layers"] == 16 * 4 + 16 * 16
    assert table.times.tolist() == [1, 1, 20, 20]
    assert table.macs.sum() == (table.macs_each * table.times).sum()


def test_the_cost_counts_the_resized_and_padded_image_and_the_context() -> None:
    model = detector(context=True)
    # 128 × 256 is resized by 96/256 to 48 × 96.
    assert (
        cost(model, (128, 256)).macs[0]
        == cost(model, (48, 96)).macs[0]
        == flops.total(model.backbone, (3, 48, 96)).macs
    )
    assert cost(model, (64, 64)).set_index("part").times["per-region head"] == 21


def test_specifications_are_hashable_and_a_list_is_as_good_as_a_tuple() -> None:
    spec = DetectorSpec(21, bn="trained", anchor_sizes=(16, 32), roi_size=7)
    again = DetectorSpec(21, bn="trained", anchor_sizes=[16, 32], roi_size=7)
    assert again == spec and hash(again) == hash(spec)
    assert detector(context=True).spec == DetectorSpec(4, context=True, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bn": "froze"}, "bn (='froze') is unknown; accepted: frozen, trained; nearest: frozen"),
        ({"roi": "crop"}, "roi (='crop') is unknown; accepted: pool, align"),
        ({"num_classes": 1}, "num_classes (=1) must be a whole number ≥ 2: the background counts as a class"),
        ({"nms": 1.5}, "nms (=1.5) must be a number ≥ 0 and ≤ 1"),
        ({"detections": 0}, "detections (=0) must be a whole number ≥ 1"),
        ({"longer_side": 32}, "longer_side (=32) must be ≥ shorter_side (=64)"),
        ({"anchor_sizes": ()}, "anchor_sizes (=()) must be one or more numbers > 0"),
        ({"rpn_background": 0.9}, "rpn_background (=0.9) must be ≤ rpn_foreground (=0.7)"),
        ({"freeze_stages": 4}, "freeze_stages (=4) must be ≤ 3, the number of stages in the trunk"),
        ({"freeze_stages": -1}, "freeze_stages (=-1) must be a whole number ≥ 0"),
        ({"roi_size": 0}, "roi_size (=0) must be a whole number ≥ 1, or None"),
        ({"proposals": 300}, "option of faster_rcnn (='proposals') is unknown; accepted: bn, freeze_stages, roi, "),
    ],
)
def test_mistakes_in_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(rp.UsageError, match=re.escape(message)):
        detector(**options)


def test_images_of_other_channels_than_the_backbones() -> None:
    with pytest.raises(rp.UsageError, match=r"normalization \(of 3 channels\) does not fit .* 1 channels; give norm"):
        detector(network(in_channels=1))
    model = detector(network(in_channels=1), normalization=rp.Normalization.channels((0.5,), (0.25,)))
    assert len(model.eval()([torch.rand(1, 40, 40)])) == 1
    for given in (model, lambda images: detect(model, images)):
        with pytest.raises(
            rp.UsageError, match=r"image \(of shape \(3, 70, 100\)\) does not fit .* \[1, height, width\]"
        ):
            given(images())


def test_the_detector_saves_and_loads() -> None:
    whole, given = network(), images()
    first, second = detector(whole).eval(), detector(whole).eval()
    second.load_state_dict(first.state_dict())
    assert_detections_equal(first(given), second(given))


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector().train()(images(), targets())


def test_every_number_of_the_specification_gets_to_its_place() -> None:
    numbers = {
        "proposals_train": 51,
        "proposals_test": 21,
        "candidates_train": 201,
        "candidates_test": 101,
        "rpn_nms": 0.61,
        "rpn_foreground": 0.71,
        "rpn_background": 0.31,
        "rpn_batch": 33,
        "rpn_foreground_fraction": 0.41,
        "roi_foreground": 0.51,
        "roi_batch": 17,
        "roi_foreground_fraction": 0.26,
        "score_threshold": 0.06,
        "nms": 0.37,
        "detections": 7,
    }
    model = detector(**numbers)
    rpn, heads = model.rpn, model.roi_heads
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n) == (
        {"training": 201, "testing": 101},
        {"training": 51, "testing": 21},
    )
    assert (rpn.nms_thresh, rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (
        0.61,
        0.71,
        0.31,
    )
    sampler = rpn.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (33, 0.41)
    sampler = heads.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (17, 0.26)
    assert (heads.proposal_matcher.high_threshold, heads.proposal_matcher.low_threshold) == (0.51, 0.51)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.06, 0.37, 7)
    assert heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)
    assert model.transform.min_size == (64,) and model.transform.max_size == 96


def test_an_anchor_s_ratio_is_height_over_width() -> None:
    (cells,) = detector(anchor_sizes=(32,), anchor_ratios=(2.0,)).rpn.anchor_generator.cell_anchors
    width, height = (cells[0, 2:] - cells[0, :2]).tolist()
    assert height / width == pytest.approx(2, rel=0.1) and height * width == pytest.approx(32**2, rel=0.1)
