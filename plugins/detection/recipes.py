"""How detectors are trained: the published schedules, and one of ours for the drawn shapes.

The paper: "The hyper-parameters of the detection system follow those in [Faster R-CNN]" (§4.3, Appendix A). Ren et al.
(2015) train with SGD, momentum 0.9 and weight decay 0.0005, at a rate of 0.001 and then a tenth of it, one image a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import resprobe as rp
from resprobe.errors import check_number


@dataclass(frozen=True)
class DetectionRecipe:
    """A schedule, counted in iterations (mini-batches of images); JSON-able, and the same for every seed."""

    name: str
    """What a reader calls it; no part of what a run is."""
    iterations: int
    batch_size: int = 1
    """Images a step."""
    learning_rate: float = 1e-3
    milestones: tuple[int, ...] = ()
    """Iterations from which the rate is divided by `decay` once more."""
    decay: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    flip: float = 0.5
    """Probability of a horizontal flip."""
    window: int = 20
    """Iterations over which logged losses are averaged."""
    evaluations: int = 4
    """Points of the mAP curve after the one before training, evenly spaced; the last one ends training."""

    def __post_init__(self) -> None:
        if isinstance(self.milestones, list):  # JSON knows no tuples
            object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("iterations", "batch_size", "window", "evaluations"):
            rp.check_whole(name, getattr(self, name), 1)
        for name, high in (("flip", 1), ("momentum", 1), ("weight_decay", math.inf)):
            check_number(name, getattr(self, name), 0, high)
        for name in ("learning_rate", "decay"):
            check_number(name, getattr(self, name), 0, above=True)
        if list(self.milestones) != sorted(self.milestones):
            raise rp.UsageError(f"milestones (={self.milestones}) must rise")

    def identity(self) -> dict[str, object]:
        """Everything but its name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        return self.learning_rate / self.decay ** sum(iteration >= milestone for milestone in self.milestones)

    def with_iterations(self, iterations: int) -> DetectionRecipe:
        """The same recipe with its whole schedule scaled."""
        ratio = iterations / self.iterations
        return replace(
            self,
            iterations=iterations,
            milestones=tuple(round(milestone * ratio) for milestone in self.milestones),
            evaluations=max(1, min(self.evaluations, iterations)),
        )


def voc_paper(iterations: int = 110_000) -> DetectionRecipe:
    """PASCAL VOC 07+12: one image a step, 0.001 for 80k iterations and 0.0001 for 30k.

    Ren et al. print 60k + 20k iterations for VOC 07 trainval, a third of these images. Neither paper prints a schedule
    for 07+12 under joint training; this one is usual among Faster R-CNN's open implementations.
    """
    return DetectionRecipe("voc-paper", 110_000, milestones=(80_000,)).with_iterations(iterations)


def coco_paper(iterations: int = 320_000) -> DetectionRecipe:
    """COCO (Appendix A): 8 images a step, 0.001 for 240k iterations and 0.0001 for 80k.

    The paper trains the RPN on 8 images a step and Fast R-CNN on 16, over 8 GPUs; joint training has one number, the RPN's.
    """
    return DetectionRecipe("coco-paper", 320_000, batch_size=8, milestones=(240_000,)).with_iterations(iterations)


def shapes_quick(iterations: int = 1000) -> DetectionRecipe:
    """A recipe of ours for the drawn shapes on a laptop: 4 images a step, 0.06 and, for the last fifth, 0.006."""
    return DetectionRecipe(
        "shapes-quick", 1000, batch_size=4, learning_rate=0.06, milestones=(800,), weight_decay=1e-4, evaluations=5
    ).with_iterations(iterations)
