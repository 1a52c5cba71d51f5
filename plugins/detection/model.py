"""Faster R-CNN around a classification network, wired as in Appendix A, from torchvision's parts.

    network = rp.load_weights(rp.build("imagenet/resnet-101", stride_in="3x3"), "resnet101.pth")
    model = faster_rcnn(network, num_classes=21)           # 20 classes and the background, as torchvision counts
    losses = model(images, targets)                        # training mode: a dict of four losses
    detections = model.eval()(images)                      # a dict of boxes, labels, scores for each image

    trainable(model)                                       # which layers train, and why the others do not
    cost(model, (375, 500))                                # multiply-adds of trunk, RPN, head × proposals

The trunk (`split` says where a network is cut) is run once an image. A region proposal network on its map proposes
regions; RoI pooling takes each out of the map; the head, then two sibling layers, classes and boxes, run for each.
`improvements.detect` adds what Table 9 adds at test time.

Hyper-parameters are those of Faster R-CNN (Ren et al. 2015), as the paper says; `DetectorSpec` lists them. Known
departures, all of torchvision's parts:

- All parts are trained together ("approximate joint training": no gradient through the proposals' coordinates).
- Backgrounds for the head overlap an object by [0, 0.5), without Fast R-CNN's lower bound of 0.1.
- Anchors that cross the image's border take part in the RPN's training; Ren et al. leave them out.
- Anchors' centres lie at 0, 16, 32, … pixels, the corners of the map's cells; Faster R-CNN's at 7.5, 23.5, …
- The box losses are smooth L1 with its corner at 1/9, also in the head, where Fast R-CNN has it at 1.
- The RPN's 3×3 convolution is as wide as the trunk's map: 512 for VGG as in the paper, 1024 for ResNet-50 and deeper.

The paper does not say which layers besides batch normalization stay fixed. Faster R-CNN fixes conv1 and conv2 of VGG:
`freeze_stages=2`. The default is 0: all convolutions train.

There is no feature pyramid network; it is a later idea than the paper's.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pandas
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import RoIAlign, RoIPool

import resprobe as rp
from plugins import flops
from plugins.detection.backbones import Backbone, split
from plugins.detection.normalization import FrozenBatchNorm2d, freeze_batch_norm
from plugins.detection.spec import DetectorSpec
from resprobe.weights import IMAGENET_STATISTICS


def faster_rcnn(
    network: nn.Module, num_classes: int, *, normalization: rp.Normalization | None = None, **options: Any
) -> Detector:
    """A `Detector` with a copy of `network` as its backbone; `options` are the fields of `DetectorSpec`.

    `network` is one that `split` takes; it is left as it is. New layers are drawn from torch's global random generator.
    Images are normalized by `normalization`, or that of the network, or ImageNet's (torchvision's weights, networks that
    were never trained); a mean image is reduced to its mean over pixels, since detection knows no fixed image size.

    Raises `rp.UsageError` for an option or value that is not accepted, or a network that cannot be a backbone.
    """
    accepted = [field.name for field in dataclasses.fields(DetectorSpec)][1:]
    for name in options:
        if name not in accepted:
            raise rp.not_accepted("option of faster_rcnn", name, accepted)
    return Detector(network, DetectorSpec(num_classes, **options), normalization)


class Detector(GeneralizedRCNN):
    """A Faster R-CNN: `transform`, `backbone` (the trunk), `rpn` and `roi_heads`, torchvision's names and contract.

    In training mode it takes images and targets and gives a dict of losses; in evaluation mode, images only, and gives a
    list of dicts `boxes` (xyxy, pixels of the image as given), `labels` and `scores`. Images are float [C, H, W] in
    [0, 1] of any sizes.
    """

    def __init__(self, network: nn.Module, spec: DetectorSpec, normalization: rp.Normalization | None = None) -> None:
        backbone = split(copy.deepcopy(network), spec.roi_size)
        normalization = normalization or getattr(network, "normalization", None)
        normalization = normalization or rp.Normalization.channels(*IMAGENET_STATISTICS)
        mean, std = normalization.mean.mean((1, 2)).tolist(), normalization.std.flatten().tolist()
        if len(mean) != backbone.in_channels:
            raise rp.UsageError(
                f"normalization (of {len(mean)} channels) does not fit a network for images of "
                f"{backbone.in_channels} channels; give normalization=rp.Normalization.channels(mean, std)"
            )
        _freeze(backbone, spec)
        anchors = AnchorGenerator((spec.anchor_sizes,), (spec.anchor_ratios,))
        rpn = RegionProposalNetwork(
            anchors,
            RPNHead(backbone.channels, len(spec.anchor_sizes) * len(spec.anchor_ratios)),
            fg_iou_thresh=spec.rpn_foreground,
            bg_iou_thresh=spec.rpn_background,
            batch_size_per_image=spec.rpn_batch,
            positive_fraction=spec.rpn_foreground_fraction,
            pre_nms_top_n={"training": spec.candidates_train, "testing": spec.candidates_test},
            post_nms_top_n={"training": spec.proposals_train, "testing": spec.proposals_test},
            nms_thresh=spec.rpn_nms,
        )
        regions = RegionFeatures(backbone, spec.roi, spec.context)
        siblings = FastRCNNPredictor(regions.features, spec.num_classes)
        for layer, deviation in ((siblings.cls_score, 0.01), (siblings.bbox_pred, 0.001)):
            # As in Fast R-CNN (Girshick 2015, §2.3): the first boxes are the proposals.
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)
        roi_heads = RoIHeads(
            box_roi_pool=regions,
            box_head=nn.Identity(),  # `regions` is both, so that a region's context can be put beside its feature
            box_predictor=siblings,
            fg_iou_thresh=spec.roi_foreground,
            bg_iou_thresh=spec.roi_foreground,
            batch_size_per_image=spec.roi_batch,
            positive_fraction=spec.roi_foreground_fraction,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=spec.score_threshold,
            nms_thresh=spec.nms,
            detections_per_img=spec.detections,
        )
        # Padded to whole pixels of the trunk's map, so that map and image stay aligned.
        transform = InputTransform(spec.shorter_side, spec.longer_side, mean, std, size_divisible=backbone.stride)
        super().__init__(backbone.trunk, rpn, roi_heads, transform)
        self.spec, self.stride, self.in_channels = spec, backbone.stride, backbone.in_channels


class InputTransform(GeneralizedRCNNTransform):
    """Normalizes, resizes and pads images. Raises `rp.UsageError` for one whose channels the backbone does not take."""

    def normalize(self, image: Tensor) -> Tensor:
        if image.shape[0] != len(self.image_mean):
            raise rp.UsageError(
                f"image (of shape {tuple(image.shape)}) does not fit the backbone; accepted: "
                f"[{len(self.image_mean)}, height, width]"
            )
        return super().normalize(image)


class RegionFeatures(nn.Module):
    """Features [regions, features] of all images' regions: RoI pooling, then the head, and the context if wanted.

    The context is the whole image as one more region, through the same pooling and head (Appendix B), put behind the
    feature of each region of that image.
    """

    def __init__(self, backbone: Backbone, roi: str, context: bool) -> None:
        super().__init__()
        size, scale = backbone.region_size, 1 / backbone.stride
        if roi == "pool":
            self.pool: nn.Module = RoIPool(size, scale)
        else:
            self.pool = RoIAlign(size, scale, sampling_ratio=2, aligned=True)
        self.head = backbone.head
        self.map_shape = (backbone.channels, size, size)
        self.context, self.features = context, backbone.features * (2 if context else 1)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]) -> Tensor:
        """`maps` is torchvision's dict of one map; `boxes` [N, 4] of each image, `image_sizes` (height, width)."""
        (shared,) = maps.values()
        features = self.head(self.pool(shared, boxes))
        if not self.context:
            return features
        whole = [
            each.new_tensor([[0, 0, width, height]]) for each, (height, width) in zip(boxes, image_sizes, strict=True)
        ]
        context = self.head(self.pool(shared, whole))
        times = torch.tensor([len(each) for each in boxes], device=context.device)
        return torch.cat([features, context.repeat_interleave(times, dim=0)], dim=1)


def _freeze(backbone: Backbone, spec: DetectorSpec) -> None:
    stages = list(backbone.trunk)
    if spec.freeze_stages > len(stages):
        raise rp.UsageError(
            f"freeze_stages (={spec.freeze_stages}) must be ≤ {len(stages)}, the number of stages in the trunk"
        )
    for stage in stages[: spec.freeze_stages]:
        freeze_batch_norm(stage).requires_grad_(False)
    if spec.bn == "frozen":
        freeze_batch_norm(backbone.trunk)
        freeze_batch_norm(backbone.head)


_PARTS = {
    "backbone.": "trunk",
    "rpn.": "RPN",
    "roi_heads.box_roi_pool.": "per-region head",
    "roi_heads.box_predictor.": "sibling layers",
}


def trainable(model: Detector) -> pandas.DataFrame:
    """Which layers train: one row a layer with `part`, `layer`, `parameters`, `trains` and `why`, in forward order.

    The weights and biases of frozen batch normalization are counted as parameters that do not train.
    """
    fixed_stages = [f"backbone.{name}." for name, _ in model.backbone.named_children()][: model.spec.freeze_stages]
    rows = []
    for layer, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            parameters, trains = [module.weight, module.bias], False
        else:
            parameters = list(module.parameters(recurse=False))
            trains = any(each.requires_grad for each in parameters)
        if not parameters:
            continue
        part = next(name for prefix, name in _PARTS.items() if layer.startswith(prefix))
        if layer.startswith(tuple(fixed_stages)):
            why = f"freeze_stages={model.spec.freeze_stages}"
        elif isinstance(module, FrozenBatchNorm2d):
            why = "batch normalization is frozen (Appendix A)"
        elif not trains:
            why = "requires_grad is False"
        else:
            why = "new" if part in ("RPN", "sibling layers") else "fine-tuned"
        rows.append((part, layer, sum(each.numel() for each in parameters), trains, why))
    return pandas.DataFrame(rows, columns=["part", "layer", "parameters", "trains", "why"])


def cost(model: Detector, image_size: tuple[int, int]) -> pandas.DataFrame:
    """Multiply-adds to detect in an image of `image_size` (height, width): one row for each part of the detector.

    `macs` are those of `times` passes, `macs_each` those of one: a pass of trunk and RPN over the resized and padded
    image, one of the head and the sibling layers for each of the `proposals_test` proposals, which is the most there
    can be. As everywhere in `plugins.flops`, pooling and what chooses boxes is not counted.
    """
    image = torch.zeros(model.in_channels, *image_size, device=next(model.parameters()).device)
    (batch, _), regions, times = model.transform([image]), model.roi_heads.box_roi_pool, model.spec.proposals_test
    height, width = batch.tensors.shape[-2:]
    channels, *_ = regions.map_shape
    map_shape = (channels, height // model.stride, width // model.stride)
    rows = [
        ("trunk", flops.total(model.backbone, (model.in_channels, height, width)).macs, 1),
        ("RPN", flops.total(model.rpn.head, map_shape).macs, 1),  # which takes a list of maps, or a batch of one
        ("per-region head", flops.total(regions.head, regions.map_shape).macs, times + regions.context),
        ("sibling layers", flops.total(model.roi_heads.box_predictor, (regions.features,)).macs, times),
    ]
    table = pandas.DataFrame(rows, columns=["part", "macs_each", "times"])
    return table.assign(macs=table.macs_each * table.times)
