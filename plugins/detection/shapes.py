"""Drawn shapes with exact boxes: a detection set that is embedded, and its crops to pre-train a classifier on.

    load_detection("shapes")            # 400 images to train on, 100 to test, 128×128 pixels
    draw_shapes(size=96, train=1000)    # others
    rp.train("cifar/resnet-20", data="shapes")   # 32×32 crops of single objects

Each image holds one to six objects of five classes in any rotation and colour before clutter: a gradient, lines, short
strokes and noise. Later objects cover earlier ones and the border cuts some off. As in VOC's annotation a box is the
tightest around the pixels that can be seen; 30 % or more of every object can, and one of which less than half can be
seen is difficult. `area` is the number of pixels seen.

An image is a function of its part, its number and its size, by numpy's `RandomState`, whose numbers never change.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from PIL import Image

import resprobe as rp
from plugins.detection.data import DetectionData, DetectionSet, Target, make_target

CLASSES = ("disc", "square", "triangle", "star", "cross")
VISIBLE, DIFFICULT = 0.3, 0.5
"""The least part of an object's pixels that is seen, and the part below which it is difficult."""
_VERSION = 1  # raise when the images change
_CROP = 32
_VIEWS = 3
# Points and the distance of the inner corners: a regular polygon is a star whose inner corners lie on its sides.
_STARS = {"square": (4, np.cos(np.pi / 4)), "triangle": (3, 0.5), "star": (5, 0.4)}


@functools.lru_cache(maxsize=4)
def draw_shapes(size: int = 128, train: int = 400, test: int = 100) -> DetectionData:
    """The set with images of `size` pixels. Raises `UsageError` below 48 pixels or without images."""
    if size < 48:
        raise rp.UsageError(f"size (={size}) must be at least 48 pixels")
    if min(train, test) < 1:
        raise rp.UsageError(f"train (={train}) and test (={test}) must be at least 1")
    parts = [_part(name, count, size) for name, count in (("train", train), ("test", test))]
    return DetectionData("shapes", f"shapes-{_VERSION} {size} {train} {test}", *parts, classes=CLASSES)


@rp.register_dataset("shapes", identity=lambda path: f"shapes-{_VERSION}")
def crops(path: str | None = None) -> rp.Data:
    """32×32 crops of the drawn shapes in five classes: three views of each object to train on, one to test."""
    if path is not None:
        raise rp.UsageError(f"data (='shapes:{path}') takes no path: the shapes are drawn")
    whole = draw_shapes()
    return rp.Data("shapes", f"shapes-{_VERSION}", _crops(whole.train, _VIEWS), _crops(whole.test, 1), CLASSES)


def _part(name: str, count: int, size: int) -> DetectionSet:
    drawn = [_draw(name, index, size) for index in range(count)]
    names = tuple(f"{name}-{index:05d}" for index in range(count))
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    targets = tuple(target for _, target in drawn)
    return DetectionSet(images, targets, names, CLASSES, f"shapes-{_VERSION} {size} {name} {count}")


def _random(*what: object) -> np.random.RandomState:
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return np.random.RandomState(int.from_bytes(digest[:4], "big"))


def _draw(part: str, index: int, size: int) -> tuple[np.ndarray, Target]:
    """The uint8 image [H, W, 3] and its objects."""
    random = _random("shapes", _VERSION, part, index, size)
    ground = random.uniform(40, 215, 3)
    image = _background(random, size, ground)
    owner = np.full((size, size), -1)
    labels: list[int] = []
    pixels: list[int] = []  # of each whole object, seen or not
    for _ in range(random.randint(1, 7)):
        for _ in range(10):
            label = random.randint(len(CLASSES))
            rows, columns, count = _outline(random, CLASSES[label], size)
            trial = owner.copy()
            trial[rows, columns] = len(labels)
            seen = np.bincount(trial[trial >= 0], minlength=len(labels) + 1)
            if (seen >= VISIBLE * np.array([*pixels, count])).all():
                owner = trial
                image[rows, columns] = _colour(random, ground)
                labels.append(label + 1)
                pixels.append(count)
                break
    noise = random.randint(-14, 15, image.shape)
    image = (image + noise).clip(0, 255).astype(np.uint8)
    return image, _target(index, owner, labels, pixels)


def _target(index: int, owner: np.ndarray, labels: list[int], pixels: list[int]) -> Target:
    boxes, areas = [], []
    for number in range(len(labels)):
        rows, columns = np.nonzero(owner == number)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        areas.append(len(rows))
    hidden = [area < DIFFICULT * count for area, count in zip(areas, pixels, strict=True)]
    return make_target(index, np.array(boxes), labels, difficult=hidden, area=areas)


def _background(random: np.random.RandomState, size: int, ground: np.ndarray) -> np.ndarray:
    """float64 [H, W, 3]: a gradient with lines across it and short strokes."""
    slope = random.uniform(-25, 25, (2, 3))
    along = np.linspace(-1, 1, size)
    image = ground + along[:, None, None] * slope[0] + along[None, :, None] * slope[1]
    for number in range(12):
        start = random.uniform(0, size, 2)
        reach = size if number < 4 else 0.08 * size
        end = start + random.uniform(-reach, reach, 2)
        steps = np.linspace(0, 1, 2 * int(np.abs(end - start).max()) + 2)[:, None]
        points = (start + steps * (end - start)).astype(int)
        points = np.concatenate([points, points + (0, 1)])  # two pixels wide
        rows, columns = points[((points >= 0) & (points < size)).all(1)].T
        image[rows, columns] = random.uniform(0, 255, 3)
    return image


def _outline(random: np.random.RandomState, kind: str, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A random object of this kind: rows and columns of its pixels inside the image, and how many it has in all."""
    radius = random.uniform(0.08, 0.2) * size
    centre = random.uniform(0.6 * radius, size - 0.6 * radius, 2)
    angle = random.uniform(0, 2 * np.pi)
    first = np.floor(centre - radius).astype(int)
    across = np.arange(int(2 * radius) + 3) + 0.5  # the pixels' centres
    y, x = (across + first[0] - centre[0])[:, None] / radius, (across + first[1] - centre[1])[None] / radius
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    rows, columns = np.nonzero(_inside(kind, u, v))
    rows, columns, count = rows + first[0], columns + first[1], len(rows)
    kept = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    return rows[kept], columns[kept], count


def _inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points lie in the shape of radius 1 about (0, 0)."""
    if kind == "disc":
        return u**2 + v**2 <= 1
    if kind == "cross":
        u, v = np.abs(u), np.abs(v)
        return (np.minimum(u, v) <= 0.3) & (np.maximum(u, v) <= 0.95)
    points, inner = _STARS[kind]
    # All points of a star are alike and symmetric: turned onto one half point, from its tip (1, 0) to the inner corner.
    half = np.pi / points
    turned = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)
    distance = np.hypot(u, v)
    corner = inner * np.cos(half), inner * np.sin(half)
    return (corner[0] - 1) * distance * np.sin(turned) >= corner[1] * (distance * np.cos(turned) - 1)


def _colour(random: np.random.RandomState, ground: np.ndarray) -> np.ndarray:
    """A colour that is well apart from the ground's."""
    while True:
        colour = random.uniform(0, 255, 3)
        if np.abs(colour - ground).max() >= 80:
            return colour


def _crops(part: DetectionSet, views: int) -> rp.ImageSet:
    """Each object that is not difficult in squares a little larger than it, somewhat off its centre."""
    images, labels = [], []
    for name, pixels, target in zip(part.names, part.images, part.targets, strict=True):
        random = _random("crops", _VERSION, name)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        for box, label in zip(
            target["boxes"][~target["difficult"]], target["labels"][~target["difficult"]], strict=True
        ):
            centre, extent = ((box[:2] + box[2:]) / 2).numpy(), float((box[2:] - box[:2]).max())
            for _ in range(views):
                side = min(extent * random.uniform(1.1, 1.5), *picture.size)
                corner = centre - side / 2 + random.uniform(-0.08, 0.08, 2) * extent
                left, top = np.clip(corner, 0, np.array(picture.size) - side)
                view = (left, top, left + side, top + side)
                images.append(np.asarray(picture.resize((_CROP, _CROP), Image.Resampling.BILINEAR, box=view)))
                labels.append(int(label) - 1)
    return rp.ImageSet(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))
