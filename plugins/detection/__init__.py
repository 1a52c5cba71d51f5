"""Faster R-CNN with any classification network as its backbone (Appendix A): model, data and metrics.

Public names are imported when first used: importing the package costs nothing.
"""

from importlib import import_module

_PUBLIC = {
    "plugins.detection.backbones": ("Backbone", "split"),
    "plugins.detection.data": (
        "DetectionData",
        "DetectionSet",
        "Problem",
        "flip",
        "load_detection",
        "read_coco",
        "read_voc",
    ),
    "plugins.detection.improvements": ("PAPER_SCALES", "adjacent_scales", "detect", "refine", "vote"),
    "plugins.detection.metrics": ("coco_metrics", "mean_average_precision", "voc_average_precision"),
    "plugins.detection.model": ("Detector", "cost", "faster_rcnn", "trainable"),
    "plugins.detection.normalization": ("FrozenBatchNorm2d", "freeze_batch_norm"),
    "plugins.detection.recipes": ("DetectionRecipe", "coco_paper", "shapes_quick", "voc_paper"),
    "plugins.detection.shapes": ("draw_shapes",),
    "plugins.detection.spec": ("DetectorSpec",),
    "plugins.detection.training": ("DetectorRun", "kept_for_backward", "train_detector"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'plugins.detection' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
