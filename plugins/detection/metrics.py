"""Average precision as PASCAL VOC and COCO define it, from predictions and truth in torchvision's format.

    from plugins.detection import coco_metrics, mean_average_precision, voc_average_precision

    predictions = [{"boxes": ..., "labels": ..., "scores": ...}, ...]   # one entry an image
    targets = [{"boxes": ..., "labels": ...}, ...]                      # also "difficult", "iscrowd", "area"
    voc_average_precision(predictions, targets, rule="11-point")        # a pandas.Series, one AP a class
    mean_average_precision(predictions, targets, rule="11-point")       # VOC's mAP
    coco_metrics(predictions, targets)["AP"]                            # COCO's mAP@[.5, .95]

Boxes are [N, 4] as (x0, y0, x1, y1) with x1 ≥ x0 and y1 ≥ y0. All values are fractions in [0, 1], as the COCO library
gives them; the paper prints percent. What cannot be said is nan: a class without an object in the truth, a size of
which there is none.

**Pixels.** VOC's boxes are first and last pixel, both inside, so its devkit computes a width as x1 − x0 + 1. Boxes here
are edges, as torchvision's: a width is x1 − x0. `plugins.detection.data` turns VOC's (x0, y0, x1, y1), counted from 1,
into edges (x0 − 1, y0 − 1, x1, y1), and with these the plain intersection over union *is* the devkit's. For boxes that
still name their last pixel there is `inclusive=True`.

**Order.** Detections of equal score keep their order: images as given, in an image as given.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas
import torch
from torch import Tensor

import resprobe as rp

COCO_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
RULES = ("11-point", "all-point")

Predictions = Sequence[Mapping[str, Tensor]]
Targets = Sequence[Mapping[str, Tensor]]


def voc_average_precision(
    predictions: Predictions,
    targets: Targets,
    iou: float = 0.5,
    rule: str = "11-point",
    *,
    classes: Sequence[str] | None = None,
    inclusive: bool = False,
) -> pandas.Series:
    """AP of each class by the VOC devkit's rules; the index holds the labels, or the names in `classes` (1, 2, ...).

    In descending order of score each detection goes to the object of its class and image that it overlaps most (the
    first of equals). Where that overlap is at least `iou`, the first detection of an object is a hit; any other
    detection is a false positive. Detections that go to a difficult object count as neither, and difficult objects are
    not asked for. `iscrowd` is no notion of VOC's; crowds are treated as difficult.

    `rule`: "11-point" is the mean of the highest precision at a recall of at least 0, 0.1, ..., 1 (VOC 2007);
    "all-point" is the area under the curve of highest precision at that recall or a higher one (VOC 2010 and later).
    """
    if rule not in RULES:
        raise rp.not_accepted("rule", rule, RULES)
    if not 0 < iou <= 1:
        raise rp.UsageError(f"iou (={iou!r}) must be above 0 and at most 1")
    found, truth = _gathered(predictions, targets)
    present = np.union1d(found.labels, truth.labels)
    if classes is None:
        names = labels = [int(label) for label in present]
    else:
        names, labels = list(classes), range(1, len(classes) + 1)
        if len(present) and not (present[0] >= 1 and present[-1] <= len(classes)):
            strange = next(int(label) for label in present if not 1 <= label <= len(classes))
            raise rp.UsageError(f"label (={strange}) has no name in classes; accepted: 1 to {len(classes)}")
    area_under = _eleven_point if rule == "11-point" else _all_point
    values = []
    for label in labels:
        objects = truth.of(label)
        positives = int(np.sum(~objects.ignored))
        hits = _ranked_hits(found.of(label), objects, iou, 1.0 if inclusive else 0.0)
        values.append(area_under(hits, positives) if positives else np.nan)
    return pandas.Series(values, index=pandas.Index(names, name="class"), name="AP", dtype=float)


def mean_average_precision(
    predictions: Predictions, targets: Targets, iou: float = 0.5, rule: str = "11-point", *, inclusive: bool = False
) -> float:
    """VOC's mAP: the mean AP of all classes that have an object in the truth; nan if none has."""
    return float(voc_average_precision(predictions, targets, iou, rule, inclusive=inclusive).mean())


def coco_metrics(predictions: Predictions, targets: Targets) -> dict[str, float]:
    """COCO's twelve figures by pycocotools; at most 100 detections an image and class count.

    `AP` is the mean over IoU 0.50, 0.55, ..., 0.95, `AP50` and `AP75` are at one IoU; s, m and l are objects of less
    than 32² pixels, up to 96², and more, by `area` where the truth gives it, else by the box. `AR1`, `AR10` and `AR100`
    are the recall with so many detections an image and class. Crowds (`iscrowd`) excuse detections inside them and are
    not asked for. COCO knows no difficult objects: they count as all others.
    """
    from pycocotools.cocoeval import COCOeval

    found, truth = _gathered(predictions, targets)
    categories = np.unique(truth.labels)  # what else is detected has no AP, and no part in the mean
    if not len(categories):
        return dict.fromkeys(COCO_KEYS, float("nan"))
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints a dozen lines
        evaluation = COCOeval(*(_coco(part, len(targets), categories) for part in (truth, found)), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 is the library's mark for "there is no such object".
    return {
        key: float(value) if value >= 0 else float("nan")
        for key, value in zip(COCO_KEYS, evaluation.stats, strict=True)
    }


class _Boxes(NamedTuple):
    """The boxes of all images, one after the other. Truth has a score of 1; nothing that is found is ignored."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    ignored: np.ndarray
    crowd: np.ndarray
    area: np.ndarray

    def where(self, mask: np.ndarray) -> _Boxes:
        return _Boxes(*(column[mask] for column in self))

    def of(self, label: int) -> _Boxes:
        return self.where(self.labels == label)


def _gathered(predictions: Predictions, targets: Targets) -> tuple[_Boxes, _Boxes]:
    if len(predictions) != len(targets):
        raise rp.UsageError(
            f"predictions ({len(predictions)}) and targets ({len(targets)}) must have one entry for each image"
        )
    return _flat(predictions, "predictions", ("scores",)), _flat(targets, "targets", ())


def _flat(entries: Sequence[Mapping[str, Tensor]], what: str, needed: tuple[str, ...]) -> _Boxes:
    columns: dict[str, list[Tensor]] = {name: [] for name in ("boxes", "labels", "scores", "difficult", "iscrowd")}
    columns["area"] = []
    counts = []
    for index, entry in enumerate(entries):
        where = f"{what}[{index}]"
        if not isinstance(entry, Mapping):
            raise rp.UsageError(f"{where} must be a dict of tensors, not {type(entry).__name__}")
        for name in ("boxes", "labels", *needed):
            if name not in entry:
                raise rp.UsageError(f"{where} has no {name!r}; needed: {', '.join(('boxes', 'labels', *needed))}")
        boxes = torch.as_tensor(entry["boxes"]).detach().cpu().double()  # Apple's GPUs have no float64
        boxes = boxes.reshape(0, 4) if boxes.numel() == 0 else boxes
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise rp.UsageError(f"{where}['boxes'] must have shape [N, 4], not {list(boxes.shape)}")
        counts.append(len(boxes))
        columns["boxes"].append(boxes)
        # What an entry does not say: no crowd, not difficult, the box's own area.
        absent = {"scores": boxes.new_ones(len(boxes)), "area": (boxes[:, 2:] - boxes[:, :2]).prod(1)}
        for name in columns.keys() - {"boxes"}:
            value = entry[name] if name in entry else absent.get(name, boxes.new_zeros(len(boxes)))
            value = torch.as_tensor(value).detach().cpu()
            if value.shape != (len(boxes),):
                raise rp.UsageError(
                    f"{where}[{name!r}] must have shape [{len(boxes)}], one for each box, not {list(value.shape)}"
                )
            if name == "labels" and value.is_floating_point() and value.numel():
                raise rp.UsageError(f"{where}['labels'] must be whole numbers, not {value.dtype}")
            columns[name].append(value.long() if name == "labels" else value.double())
    flat = {
        name: torch.cat(parts).numpy() if parts else np.empty((0, 4) if name == "boxes" else 0)
        for name, parts in columns.items()
    }
    image = np.repeat(np.arange(len(counts)), counts)
    _check_numbers(flat, image, what)
    crowd = flat["iscrowd"] > 0
    ignored = crowd | (flat["difficult"] > 0)
    return _Boxes(image, flat["boxes"], flat["labels"].astype(np.int64), flat["scores"], ignored, crowd, flat["area"])


def _check_numbers(flat: dict[str, np.ndarray], image: np.ndarray, what: str) -> None:
    finite = {"boxes": np.isfinite(flat["boxes"]).all(1), "scores": np.isfinite(flat["scores"])}
    for name, good in finite.items():
        if not good.all():
            raise rp.UsageError(f"{what}[{image[~good][0]}][{name!r}] holds a number that is not finite")
    bad = (flat["boxes"][:, 2:] < flat["boxes"][:, :2]).any(1)
    if bad.any():
        box = ", ".join(f"{number:g}" for number in flat["boxes"][bad][0])
        raise rp.UsageError(
            f"{what}[{image[bad][0]}]['boxes'] holds ({box}); a box is (x0, y0, x1, y1), x1 ≥ x0, y1 ≥ y0"
        )


def _ranked_hits(found: _Boxes, truth: _Boxes, threshold: float, pixel: float) -> np.ndarray:
    """Which detections of one class are hits, the highest score first; those on ignored objects are left out."""
    found = found.where(np.argsort(-found.scores, kind="stable"))
    # All pairs of a detection and an object in its image; the truth is in the order of the images.
    first = np.searchsorted(truth.image, found.image, "left")
    counts = np.searchsorted(truth.image, found.image, "right") - first
    starts = np.cumsum(counts) - counts
    detection = np.repeat(np.arange(len(counts)), counts)
    other = np.arange(len(detection)) + np.repeat(first - starts, counts)
    overlap = _intersection_over_union(found.boxes[detection], truth.boxes[other], pixel)

    best = np.zeros(len(counts))
    best[counts > 0] = np.maximum.reduceat(overlap, starts[counts > 0]) if len(overlap) else []
    # Written from the last to the first, so that the first object of equal overlap stays.
    winners = np.flatnonzero(overlap == best[detection])[::-1]
    chosen = np.zeros(len(counts), dtype=np.int64)
    chosen[detection[winners]] = other[winners]

    matched = best >= threshold
    ignored = np.zeros(len(counts), dtype=bool)
    ignored[matched] = truth.ignored[chosen[matched]]
    candidates = np.flatnonzero(matched & ~ignored)
    hits = np.zeros(len(counts), dtype=bool)
    hits[candidates[np.unique(chosen[candidates], return_index=True)[1]]] = True
    return hits[~ignored]


def _intersection_over_union(one: np.ndarray, other: np.ndarray, pixel: float) -> np.ndarray:
    """Overlaps [N] of pairs of boxes [N, 4]. `pixel` is 1 where boxes name their last pixel, 0 where they are edges."""
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2]) + pixel
    intersection = sides.clip(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2] + pixel).prod(1) for boxes in (one, other)]
    union = areas[0] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


def _envelope(hits: np.ndarray) -> np.ndarray:
    """After each detection: the highest precision there or later."""
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1]


def _eleven_point(hits: np.ndarray, positives: int) -> float:
    # In whole numbers: 3 of 10 objects are a recall of 0.3, whatever 3 · 0.1 is in binary.
    reached = np.searchsorted(10 * np.cumsum(hits), np.arange(11) * positives)
    return float(np.append(_envelope(hits), 0.0)[reached].mean())


def _all_point(hits: np.ndarray, positives: int) -> float:
    # Recall rises by 1/positives at each hit and nowhere else.
    return float(_envelope(hits)[hits].sum() / positives)


def _coco(part: _Boxes, images: int, categories: np.ndarray):
    """pycocotools' index of these boxes, made without a file."""
    from pycocotools.coco import COCO

    corner, size = part.boxes[:, :2], part.boxes[:, 2:] - part.boxes[:, :2]
    columns = (part.image, part.labels, np.hstack([corner, size]), part.area, part.crowd, part.scores)
    index = COCO()
    index.dataset = {
        "images": [{"id": image} for image in range(images)],
        "categories": [{"id": int(label)} for label in categories],
        "annotations": [
            # From 1: the library reads a match with 0 as no match.
            {
                "id": number,
                "image_id": image,
                "category_id": label,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
                "score": score,
            }
            for number, (image, label, box, area, crowd, score) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), start=1
            )
        ],
    }
    index.createIndex()
    return index
