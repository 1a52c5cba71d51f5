"""Training recipes: frozen dataclasses made by functions. `dataclasses.replace` changes what a function does not offer.

Every choice that the paper leaves open is a field with its default; the reasons stand beside the fields.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from resprobe.errors import UsageError, check_number, check_whole, is_whole, not_accepted, plain

_WHOLE = {
    **dict.fromkeys(("iterations", "batch_size", "window", "evaluations", "crop", "plateau", "bn_batch"), 1),
    **dict.fromkeys(("pad", "warm_up_iterations"), 0),
}
"""Fields of a recipe that are whole numbers, and the least they may be."""
_MAY_BE_NONE = ("plateau", "bn_batch", "warm_up_iterations", "warm_up_rate")
_EXAMPLES = {"milestones": (32_000, 48_000), "scale": (256, 480)}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Counted in iterations (mini-batches), as in the paper; errors are in percent."""

    name: str
    """What a reader calls it."""

    iterations: int = 64_000
    """Mini-batches in all; training ends after the last one (§4.2: "terminate training at 64k iterations")."""
    batch_size: int = 128
    learning_rate: float = 0.1
    """The rate before the first division."""
    milestones: tuple[int, ...] = (32_000, 48_000)
    """Iterations from which the rate is divided by `decay` once more."""
    decay: float = 10.0
    plateau: int | None = None
    """Divide also when the test error has not improved over this many evaluations (§3.4, ImageNet). None: never."""

    warm_up_rate: float | None = None
    """The rate of the warm-up (§4.2: 0.01 for 110 layers). None: no warm-up."""
    warm_up_until: float = 80.0
    """The warm-up ends when the running training error, averaged over `window` iterations, is below this, and at the first
    milestone at the latest: a network that does not get there is not kept from the rest of the schedule. The paper
    does not say over what it measured; a window of 100 mini-batches steadies the figure to about 0.4 points."""
    warm_up_iterations: int | None = None
    """If set, the warm-up lasts exactly this long instead (the paper: "about 400 iterations")."""

    momentum: float = 0.9
    momentum_form: Literal["torch", "caffe"] = "torch"
    """v ← m·v + g, w ← w − lr·v (torch) or v ← m·v + lr·g, w ← w − v (Caffe, the authors'). They differ only in the
    iterations after a change of rate."""
    nesterov: bool = False
    weight_decay: float = 1e-4
    weight_decay_on: Literal["all", "weights"] = "all"
    """"all" decays biases and normalization too, as Caffe and fb.resnet.torch do; "weights" spares them."""
    bn_batch: int | None = None
    """Images per batch-normalization batch. None: the whole mini-batch; 64: as on the paper's two GPUs."""
    bn_test_statistics: Literal["precise", "running"] = "precise"
    """Statistics at test time: recomputed over the training set after training, as the authors did for their released
    models, or the running averages. Both results are kept."""

    augmentation: Literal["pad-crop", "scale-crop", "none"] = "pad-crop"
    """"pad-crop" (§4.2): pad, random crop, flip, on the device. "scale-crop" (§3.4): random scale, crop, flip, from
    files."""
    pad: int = 4
    """Pixels of padding on each side (§4.2)."""
    pad_value: Literal["mean", "black"] = "mean"
    """What is padded: "mean" pads after the mean is subtracted, "black" before. The paper does not say; fb.resnet.torch
    pads after."""
    flip: float = 0.5
    """Probability of a horizontal flip ("a crop is randomly sampled from the padded image or its horizontal flip")."""
    scale: tuple[int, int] = (256, 480)
    """The shorter side is drawn from this closed range ("scale-crop", §3.4)."""
    crop: int = 224
    """Side of the crop in pixels ("scale-crop")."""
    colour: Literal["none", "pca"] = "none"
    """"pca": AlexNet's lighting noise (§3.4: "the standard color augmentation in [21] is used"; "scale-crop")."""
    normalization: Literal["per-pixel-mean", "channel-mean-std"] = "per-pixel-mean"
    """"per-pixel-mean" subtracts the training set's mean image (§4.2); pixels are in [0, 1]."""

    validation_fraction: float = 0.0
    """Part of the training set held out. 0: train on all of it, as the paper's final numbers ("we present experiments
    trained on the training set"); 0.1: the 45k/5k split on which the paper fixed its schedule."""
    window: int = 100
    """Iterations over which the logged training loss and error are averaged."""
    evaluations: int = 64
    """Points of the test curve, evenly spaced."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = plain(getattr(self, field.name))
            # JSON knows no tuples.
            object.__setattr__(self, field.name, tuple(map(plain, value)) if isinstance(value, list | tuple) else value)
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if not (value is None and name in _MAY_BE_NONE):
                check_whole(name, value, least)
        for name in ("learning_rate", "decay", "warm_up_rate"):
            value = getattr(self, name)
            if not (value is None and name in _MAY_BE_NONE):
                check_number(name, value, 0, above=True)
        for name, high in (("flip", 1), ("validation_fraction", 0.9), ("momentum", 1), ("weight_decay", math.inf)):
            check_number(name, getattr(self, name), 0, high)
        check_number("warm_up_until", self.warm_up_until, 0, 100, above=True, why=", in percent")
        if not isinstance(self.nesterov, bool) or (self.nesterov and not self.momentum):
            raise UsageError(f"nesterov (={self.nesterov!r}) must be True or False, and False without momentum")
        for name, accepted in (
            ("momentum_form", ("torch", "caffe")),
            ("weight_decay_on", ("all", "weights")),
            ("bn_test_statistics", ("precise", "running")),
            ("augmentation", ("pad-crop", "scale-crop", "none")),
            ("pad_value", ("mean", "black")),
            ("colour", ("none", "pca")),
            ("normalization", ("per-pixel-mean", "channel-mean-std")),
        ):
            if getattr(self, name) not in accepted:
                raise not_accepted(name, getattr(self, name), accepted)
        for name in ("milestones", "scale"):
            values = getattr(self, name)
            if not (isinstance(values, tuple) and all(is_whole(value, 0) for value in values)):
                raise UsageError(f"{name} (={values!r}) must be whole numbers ≥ 0, such as {_EXAMPLES[name]}")
            if list(values) != sorted(values):
                raise UsageError(f"{name} (={values}) must rise")
        if len(self.scale) != 2:
            raise UsageError(f"scale (={self.scale}) must be two numbers, such as {_EXAMPLES['scale']}")
        if self.warm_up_iterations is not None and self.warm_up_rate is None:
            raise UsageError(f"warm_up_iterations (={self.warm_up_iterations}) needs a warm_up_rate, such as 0.01")
        if self.colour != "none" and self.augmentation != "scale-crop":
            raise UsageError(
                f"colour (={self.colour!r}) goes with augmentation 'scale-crop' alone, not {self.augmentation!r}"
            )
        if self.augmentation == "scale-crop" and self.crop > self.scale[0]:
            raise UsageError(f"crop (={self.crop}) must not be larger than the smallest scale (={self.scale[0]})")

    def unread(self) -> dict[str, str]:
        """Fields that say nothing beside the others, of padding without any say, and beside which others."""
        idle = {
            "pad-crop": ("scale", "crop", "colour"),
            "scale-crop": ("pad", "pad_value"),
            "none": ("pad", "pad_value", "flip", "scale", "colour"),
        }[self.augmentation]
        found = dict.fromkeys(idle, f"augmentation {self.augmentation!r}")
        if not self.momentum:
            found["momentum_form"] = "momentum 0"
        if self.warm_up_rate is None:
            found["warm_up_until"] = "warm_up_rate None"
        return found

    def with_iterations(self, iterations: int) -> Recipe:
        """The same recipe with its whole schedule scaled to `iterations`."""
        iterations = plain(iterations)
        check_whole("iterations", iterations, 1)
        ratio = iterations / self.iterations
        # Twenty points draw a curve; in a short training more would take longer than the training itself. Plateaus want
        # more, and are so many evaluations that they last as long a part of the training.
        most = self.evaluations if ratio >= 1 else 20 if self.plateau is None else 40
        evaluations = min(self.evaluations, most, iterations)
        return replace(
            self,
            iterations=iterations,
            milestones=tuple(round(milestone * ratio) for milestone in self.milestones),
            warm_up_iterations=self.warm_up_iterations and max(1, round(self.warm_up_iterations * ratio)),
            window=max(1, min(self.window, iterations // 40)),
            evaluations=evaluations,
            plateau=self.plateau and max(1, round(self.plateau * evaluations / self.evaluations)),
        )


def learning_rate(recipe: Recipe, iteration: int, error: float | None = None, plateaus: int = 0) -> float:
    """The learning rate of one iteration: a pure function, so that it cannot be left in a wrong state.

    `iteration` counts from 0. `error` is the lowest running training error so far in percent (None before the first
    is known); it ends the warm-up, once and for all since the lowest never rises, if the first milestone does not.
    `plateaus` is how often the test error has plateaued (see `plateaus`).
    """
    if recipe.warm_up_rate is not None:
        if recipe.warm_up_iterations is not None:
            warming_up = iteration < recipe.warm_up_iterations
        else:
            late = bool(recipe.milestones) and iteration >= recipe.milestones[0]
            warming_up = not late and (error is None or error >= recipe.warm_up_until)
        if warming_up:
            return recipe.warm_up_rate
    divisions = sum(iteration >= milestone for milestone in recipe.milestones) + plateaus
    return recipe.learning_rate / recipe.decay**divisions


def plateaus(recipe: Recipe, errors: Sequence[float]) -> int:
    """How often the test errors so far have gone `recipe.plateau` evaluations without a new minimum (§3.4)."""
    if recipe.plateau is None:
        return 0
    count, best, waited = 0, float("inf"), 0
    for error in errors:
        best, waited = (error, 0) if error < best else (best, waited + 1)
        if waited >= recipe.plateau:
            count, waited = count + 1, 0
    return count


WARM_UP_FROM = 110
"""Layers from which on CIFAR's networks are warmed up (§4.2)."""


def with_warm_up(recipe: Recipe) -> Recipe:
    """A recipe with the warm-up of §4.2: a tenth of its rate until the training error is below 80 %."""
    name = f"{recipe.name}, with warm-up"
    return replace(recipe, name=name, warm_up_rate=recipe.learning_rate / 10, warm_up_until=80.0)


def without_warm_up(recipe: Recipe) -> Recipe:
    """A recipe that begins with its full rate."""
    return replace(recipe, warm_up_rate=None, warm_up_iterations=None)


def cifar_paper(iterations: int = 64_000, *, depth: int | None = None) -> Recipe:
    """The CIFAR-10 recipe of §4.2. `iterations` scales the whole schedule.

    `depth` ≥ 110 adds the warm-up that the paper needed there: 0.01 until the training error is below 80 %.
    """
    if depth is not None:
        check_whole("depth", plain(depth), 1)
    deep = depth is not None and depth >= WARM_UP_FROM
    return Recipe("cifar-paper", warm_up_rate=0.01 if deep else None).with_iterations(iterations)


def imagenet_paper(iterations: int = 600_000) -> Recipe:
    """The ImageNet recipe of §3.4: batch 256, 0.1 divided by 10 at each plateau, scale and colour augmentation."""
    return Recipe(
        "imagenet-paper",
        iterations=600_000,
        batch_size=256,
        milestones=(),
        plateau=5,
        augmentation="scale-crop",
        colour="pca",
        pad=0,
        evaluations=120,
    ).with_iterations(iterations)


def digits_quick(iterations: int = 400) -> Recipe:
    """A recipe of ours, for the embedded digits on a laptop: batch 64, 0.05 divided at one half and three quarters.

    No augmentation: on 1,437 small digits it would slow every network down, and degradation is a matter of fitting.
    """
    return Recipe(
        "digits-quick",
        iterations=400,
        batch_size=64,
        learning_rate=0.05,
        milestones=(200, 300),
        augmentation="none",
        window=10,
        evaluations=20,
    ).with_iterations(iterations)


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of a recipe and their values, from `NAME=VALUE` as on a command line: `bn_batch=64`, `milestones=100,200`.

    Raises `UsageError` for what is no field. Whether a value makes sense the recipe says itself.
    """
    usual = {field.name: field.default for field in fields(Recipe) if field.name not in ("name", "iterations")}
    changes: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if name == "iterations":
            raise UsageError(f"recipe (={text!r}): the number of iterations is an option of its own, --iterations")
        if name not in usual:
            raise not_accepted("recipe", name, usual)
        if name in changes:
            raise UsageError(f"recipe (={text!r}): {name} is given twice")
        if not equals:
            raise UsageError(f"recipe (={text!r}) must be NAME=VALUE, such as {name}={usual[name]}")
        if value.lower() in ("true", "false") or (value.lower() == "none" and name in _MAY_BE_NONE):
            value = value.capitalize()  # as people write Python's words on a command line
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):  # another word
            changes[name] = value
        real = isinstance(usual[name], float) or name == "warm_up_rate"
        if real and type(changes[name]) is int:  # else 1 and 1.0 would be two runs
            changes[name] = float(changes[name])
        if isinstance(changes[name], list):
            changes[name] = tuple(changes[name])
    return changes


def departures(recipe: Recipe, paper: Recipe | None = None) -> list[str]:
    """What in `recipe` is not the paper's, one line each.

    `paper`: the paper's recipe for what is trained; by default that for CIFAR or ImageNet, whichever is nearer, where the
    warm-up of 110 layers is none, since the depth is not known.
    """
    if paper is None:
        paper = imagenet_paper() if recipe.augmentation == "scale-crop" else cifar_paper()
        if recipe.warm_up_rate == 0.01 and recipe.warm_up_until == 80.0:
            paper = with_warm_up(paper)
    scaled = paper.with_iterations(recipe.iterations)
    found = []
    if recipe.iterations != paper.iterations:
        found.append(f"iterations: {recipe.iterations:,} instead of {paper.iterations:,} (the whole schedule scaled)")
    followed, ours = asdict(scaled), asdict(recipe)
    # How finely curves are drawn is not part of the method.
    ignored = {"name", "iterations", "window", "evaluations"}
    for name, value in ours.items():
        if name not in ignored and value != followed[name]:
            found.append(f"{name.replace('_', ' ')}: {_in_words(value)} instead of {_in_words(followed[name])}")
    return found


def _in_words(value: object) -> str:
    """A field's value as a reader knows it."""
    if isinstance(value, tuple):
        return ", ".join(map(_in_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
