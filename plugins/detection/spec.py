"""What a detector is besides its backbone: every choice and hyper-parameter, by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import resprobe as rp
from resprobe.errors import check_number

_COUNTS = (
    *("shorter_side", "longer_side", "proposals_train", "proposals_test", "candidates_train", "candidates_test"),
    *("rpn_batch", "roi_batch", "detections"),
)
_FRACTIONS = (
    *("rpn_nms", "rpn_foreground", "rpn_background", "rpn_foreground_fraction"),
    *("roi_foreground", "roi_foreground_fraction", "score_threshold", "nms"),
)


@dataclass(frozen=True)
class DetectorSpec:
    """What is built around a backbone, complete and JSON-able. The defaults are those of Faster R-CNN for PASCAL VOC.

    Sizes are in pixels of the resized image. Raises `rp.UsageError` for a value that makes no sense.
    """

    num_classes: int
    """The background counts, as class 0."""
    bn: str = "frozen"
    """"frozen": statistics and affine part are fixed, in trunk and head (Appendix A). "trained": both move (C24).
    A network that was never trained has no statistics worth freezing: its activations grow from block to block."""
    freeze_stages: int = 0
    """How many of the trunk's first stages are fixed: 1 is conv1, 2 conv1 and conv2_x, …"""
    roi: str = "pool"
    """How a region is taken out of the map: "pool", RoI max pooling as in the paper, or "align", the later RoIAlign."""
    roi_size: int | None = None
    """Side of the regions' maps; None: what suits the backbone (14, VGG 7)."""
    context: bool = False
    """Global context (Table 9): the feature of the whole image beside that of each region, in training and test."""

    shorter_side: int = 600
    longer_side: int = 1000
    anchor_sizes: tuple[float, ...] = (128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""

    proposals_train: int = 2000
    proposals_test: int = 300
    candidates_train: int = 12000
    """How many best-scored anchors proposals are chosen from; the numbers are py-faster-rcnn's."""
    candidates_test: int = 6000
    rpn_nms: float = 0.7
    rpn_foreground: float = 0.7
    rpn_background: float = 0.3
    rpn_batch: int = 256
    rpn_foreground_fraction: float = 0.5

    roi_foreground: float = 0.5
    roi_batch: int = 128
    roi_foreground_fraction: float = 0.25
    score_threshold: float = 0.05
    nms: float = 0.3
    """As in py-faster-rcnn; torchvision's own default is 0.5."""
    detections: int = 100

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # which has no hash
                object.__setattr__(self, field.name, tuple(value))
        rp.check_whole("num_classes", self.num_classes, 2, ": the background counts as a class")
        for name, accepted in (("bn", ("frozen", "trained")), ("roi", ("pool", "align"))):
            if getattr(self, name) not in accepted:
                raise rp.not_accepted(name, getattr(self, name), accepted)
        for name in _COUNTS:
            rp.check_whole(name, getattr(self, name), 1)
        for name in _FRACTIONS:
            check_number(name, getattr(self, name), 0, 1)
        rp.check_whole("freeze_stages", self.freeze_stages, 0)
        if self.roi_size is not None:
            rp.check_whole("roi_size", self.roi_size, 1, ", or None")
        for name in ("anchor_sizes", "anchor_ratios"):
            values = getattr(self, name)
            self._require(name, bool(values) and min(values) > 0, "one or more numbers > 0")
        self._require("longer_side", self.longer_side >= self.shorter_side, f"≥ shorter_side (={self.shorter_side})")
        below = f"≤ rpn_foreground (={self.rpn_foreground})"
        self._require("rpn_background", self.rpn_background <= self.rpn_foreground, below)

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise rp.UsageError(f"{name} (={getattr(self, name)}) must be {what}")
