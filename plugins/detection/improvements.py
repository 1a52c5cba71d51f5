"""What Table 9 adds to a trained detector at test time: box refinement and multi-scale testing (Appendix B).

    detect(model.eval(), images)                                                   # equals model(images)
    detect(model, images, refinement=True)                                         # + box refinement
    detect(model, images, refinement=True, scales=(200, 400, 600, 800, 1000))      # + multi-scale testing

Table 9's third addition, global context, has to be trained: it is an option of the model, `context=True`.

**Box refinement** (iterative localization and voting of Gidaris and Komodakis 2015): features are pooled again from the
boxes that the detector gives, which are scored and regressed once more; old and new predictions together pass
non-maximum suppression; each box that is kept becomes the mean of the boxes around it, weighted by their scores.
The paper combines "300 new predictions" with the 300 old ones, so one box of each region is pooled again. It does not
say which of its classes' boxes: here it is that of the most probable class other than the background.

**Multi-scale testing** (as in Ren et al. 2015, "Object detection networks on convolutional feature maps"): proposals come
from the model's own scale. The trunk runs on a pyramid of images; each region is pooled at two adjacent scales, the
head runs for both, and the features that it gives are merged by maxout before the sibling layers. The two scales are those
at which the region's area is nearest to 224² pixels, the size that the network was pre-trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

import resprobe as rp
from plugins.detection.model import Detector, InputTransform

PAPER_SCALES = (200, 400, 600, 800, 1000)

Prediction = tuple[Tensor, Tensor]
"""Boxes [regions, classes, 4] and scores [regions, classes] of one image; class 0 is the background."""

Predict = Callable[[list[Tensor]], list[Prediction]]
"""Boxes [regions, 4] of each image → its prediction."""


@torch.no_grad()
def detect(
    model: Detector,
    images: list[Tensor],
    *,
    refinement: bool = False,
    scales: Sequence[int] = (),
    pretrained_size: int = 224,
) -> list[dict[str, Tensor]]:
    """Detections as `model(images)` gives them, with Table 9's improvements where asked for.

    `scales` are the shorter sides of the pyramid, any number of them; none: the model's own. The longer side may be
    longer than the shorter in the same proportion as at the model's own scale. `pretrained_size` is the side of a region
    that suits the head best. Raises `rp.UsageError` for a scale < 1 and for a model in training mode.
    """
    if model.training:
        raise rp.UsageError("model (in training mode) cannot detect; call model.eval() first")
    if scales and min(scales) < 1:
        raise rp.UsageError(f"scales (={tuple(scales)}) must be shorter sides ≥ 1, such as {PAPER_SCALES}")
    batch, _ = model.transform(images)
    sizes, maps = batch.image_sizes, {"0": model.backbone(batch.tensors)}
    proposals, _ = model.rpn(batch, maps)
    features = _pyramid(model, images, sizes, sorted(scales), pretrained_size) if scales else None

    def predict(boxes: list[Tensor]) -> list[Prediction]:
        seen = features(boxes) if features else model.roi_heads.box_roi_pool(maps, boxes, sizes)
        logits, codes = model.roi_heads.box_predictor(seen)
        decoded = model.roi_heads.box_coder.decode(codes, boxes).reshape(*logits.shape, 4)
        counts = [len(each) for each in boxes]
        clipped = [clip_boxes_to_image(each, size) for each, size in zip(decoded.split(counts), sizes, strict=True)]
        return list(zip(clipped, logits.softmax(1).split(counts), strict=True))

    predictions = refine(predict, proposals) if refinement else predict(proposals)
    detections = [_choose(prediction, model.roi_heads, voting=refinement) for prediction in predictions]
    return model.transform.postprocess(detections, sizes, [tuple(image.shape[-2:]) for image in images])


def refine(predict: Predict, proposals: list[Tensor]) -> list[Prediction]:
    """For each image its prediction from the proposals, followed by that from the boxes the first one gave."""
    first = predict(proposals)
    second = predict([_most_probable(boxes, scores) for boxes, scores in first])
    return [
        (torch.cat([old_boxes, new_boxes]), torch.cat([old_scores, new_scores]))
        for (old_boxes, old_scores), (new_boxes, new_scores) in zip(first, second, strict=True)
    ]


def _most_probable(boxes: Tensor, scores: Tensor) -> Tensor:
    """The box of each region's best class other than the background."""
    best = 1 + scores[:, 1:].argmax(1)
    return boxes[torch.arange(len(boxes), device=boxes.device), best]


def vote(boxes: Tensor, scores: Tensor, kept: Tensor, iou: float = 0.5) -> Tensor:
    """Boxes [kept, 4]: each the mean, weighted by `scores`, of those of `boxes` that it overlaps by `iou` or more.

    `kept` are indices into `boxes`, which are all of one class. A kept box votes for itself too.
    """
    weights = (box_iou(boxes[kept], boxes) >= iou) * scores
    return weights @ boxes / weights.sum(1, keepdim=True)


def adjacent_scales(areas: Tensor, pretrained_size: int = 224) -> Tensor:
    """Which two scales of a pyramid a region is pooled at: indices [2, regions], the better first.

    `areas` [scales, regions] are the region's pixels at each scale, from the smallest scale to the largest. The two whose
    areas are nearest to `pretrained_size`² are always adjacent; a pyramid of one scale gives [1, regions].
    """
    distance = (areas - pretrained_size**2).abs()
    return distance.argsort(dim=0, stable=True)[:2]


def _pyramid(
    model: Detector, images: list[Tensor], sizes: list[tuple[int, int]], scales: list[int], pretrained_size: int
) -> Callable[[list[Tensor]], Tensor]:
    """Boxes at the model's own scale, where the images have `sizes` → their features, merged over two scales."""
    levels = []
    for side in scales:
        longer = round(model.spec.longer_side * side / model.spec.shorter_side)
        mean, std = model.transform.image_mean, model.transform.image_std
        transform = InputTransform(side, longer, mean, std, size_divisible=model.stride).eval()
        batch, _ = transform(images)
        levels.append(({"0": model.backbone(batch.tensors)}, batch.image_sizes))
    regions = model.roi_heads.box_roi_pool

    def features(boxes: list[Tensor]) -> Tensor:
        resized = [
            [resize_boxes(*resize) for resize in zip(boxes, sizes, level_sizes, strict=True)]
            for _, level_sizes in levels
        ]
        areas = torch.stack([_areas(torch.cat(level)) for level in resized])
        chosen = adjacent_scales(areas, pretrained_size)
        merged = areas.new_full((areas.shape[1], regions.features), -torch.inf)
        counts = [len(each) for each in boxes]
        for index, (maps, level_sizes) in enumerate(levels):
            here = (chosen == index).any(0)
            mine = [each[wanted] for each, wanted in zip(resized[index], here.split(counts), strict=True)]
            merged[here] = torch.maximum(merged[here], regions(maps, mine, level_sizes))
        return merged

    return features


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _choose(prediction: Prediction, roi_heads: RoIHeads, *, voting: bool) -> dict[str, Tensor]:
    """The detections of one image: thresholds, non-maximum suppression by class, and voting if asked for."""
    boxes, scores = (each[:, 1:] for each in prediction)
    labels = torch.arange(1, 1 + scores.shape[1], device=scores.device).expand_as(scores)
    boxes, scores, labels = boxes.reshape(-1, 4), scores.flatten(), labels.flatten()
    seen = torch.where(scores > roi_heads.score_thresh)[0]
    seen = seen[remove_small_boxes(boxes[seen], min_size=1e-2)]
    boxes, scores, labels = boxes[seen], scores[seen], labels[seen]
    kept = batched_nms(boxes, scores, labels, roi_heads.nms_thresh)[: roi_heads.detections_per_img]
    final = boxes[kept]
    if voting:
        for label in labels[kept].unique():
            mine = torch.where(labels == label)[0]
            place = torch.where(labels[kept] == label)[0]
            final[place] = vote(boxes[mine], scores[mine], torch.searchsorted(mine, kept[place]))
    return {"boxes": final, "labels": labels[kept], "scores": scores[kept]}
