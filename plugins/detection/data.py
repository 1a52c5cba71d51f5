"""Images with boxes: PASCAL VOC, COCO, and drawn shapes that need no download.

    from plugins.detection import load_detection

    data = load_detection("shapes")                      # drawn, embedded
    data = load_detection("voc:VOCdevkit@07+12")         # §4.3: VOC 07+12 trainval; tested on VOC 07 test
    data = load_detection("coco:PATH@train2014/val2014") # PATH/annotations/instances_*.json
    image, target = data.train[0]                        # uint8 [3, H, W] and its objects

A target is what torchvision's detectors and `plugins.detection.metrics` read: `boxes` (float32 [N, 4] as edges x0, y0,
x1, y1 in pixels), `labels` (int64 [N]; 0 is the background, class i of `classes` is i + 1), `difficult` (bool [N]),
`iscrowd` (int64 [N]), `area` (float32 [N], square pixels) and `image_id`.

**Which files.** `voc:PATH` is a VOCdevkit (with VOC2007/, VOC2012/) or one folder in VOC's layout (Annotations/,
JPEGImages/, ImageSets/Main/); `coco:PATH` holds annotations/instances_PART.json and the images in PART/, images/PART/ or
images/. What to train and test on comes after an @, as TRAIN/TEST, each one part or several joined by +:

    voc:VOCdevkit@2007-trainval+2012-trainval/2007-test    the same as @07+12
    voc:VOCdevkit@07++12                                   2007 trainval and test + 2012 trainval; tested on 2012 test
    voc:PATH@train/val                                     lists of one folder
    coco:PATH@train2017/val2017

Without an @ it is 07+12 in a whole devkit, VOC's trainval/test or else train/val in one folder, and COCO's one train and
one val part. A VOC folder without lists tests on every fifth image. The truth of VOC 2012's test images is kept by VOC's
server: they come with empty targets, and `labelled` is false.

**Boxes.** VOC counts pixels from 1 and names the first and the last one; as edges its box is (xmin − 1, ymin − 1, xmax,
ymax). COCO's (x, y, width, height) is (x, y, x + width, y + height), and its category ids become 1, 2, ... in their order.

**Bad annotations** are counted by file in `problems`. With `on_bad="skip"` an object without area (in VOC also one with
xmax = xmin), outside its image or of unknown class is left out, one that reaches outside by more than a pixel is cut off
at the border, and left out if no more than a pixel is left. An image is left out that has no file or annotation that can be
read, or another size than is annotated, as one that a camera's note turns: its boxes would lie elsewhere. What is said of
`difficult` otherwise than by 0 and 1, true and false, is taken for 0. `on_bad="stop"` raises at the first.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor

import resprobe as rp
from resprobe.data.folder import NO_PICTURE, read_image

Target = dict[str, Tensor]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
UNIONS = {
    "07+12": "2007-trainval+2012-trainval/2007-test",
    "07++12": "2007-trainval+2007-test+2012-trainval/2012-test",
}
"""What the paper trains and tests on (Table 7), by the names that the literature gives it."""
_ORIENTATION = 0x0112
"""EXIF's number for how a picture is to be turned."""
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Problem(NamedTuple):
    """A bad annotation: the file, as seen from the data's folder, and what is wrong."""

    file: str
    what: str


@dataclass(frozen=True, eq=False)
class DetectionSet(Sequence):
    """Images and their objects: `len(part)`, `part[i] -> (uint8 [3, H, W], target)`. `targets` needs no image read."""

    images: tuple[Path, ...] | Tensor
    """Files, or uint8 [N, 3, H, W]."""
    targets: tuple[Target, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    """The names of labels 1, 2, ...; the background, 0, has none here."""
    identity: str
    """A digest of what the set holds, wherever it stands."""
    problems: tuple[Problem, ...] = ()
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = self.images[index]
        pixels = image.clone() if isinstance(image, Tensor) else read_image(image)
        return pixels, {name: value.clone() for name, value in self.targets[index].items()}

    def select(self, indices: Iterable[int]) -> DetectionSet:
        """These images in this order. The problems stay: they are of the files."""
        chosen = [int(index) for index in indices]
        images = (
            self.images[chosen] if isinstance(self.images, Tensor) else tuple(self.images[index] for index in chosen)
        )
        return replace(
            self,
            images=images,
            targets=tuple(self.targets[index] for index in chosen),
            names=tuple(self.names[index] for index in chosen),
            identity=f"{self.identity} {_digest([repr(chosen).encode()])}",
        )


@dataclass(frozen=True)
class DetectionData:
    """A data set: its parts, its classes (labels 1, 2, ...), and the name and identity by which runs find it again."""

    name: str
    identity: str
    train: DetectionSet
    test: DetectionSet
    classes: tuple[str, ...]

    @property
    def problems(self) -> tuple[Problem, ...]:
        return self.train.problems + self.test.problems


def load_detection(
    data: str | DetectionData, *, classes: Sequence[str] | None = None, on_bad: str = "skip"
) -> DetectionData:
    """The data set named by `shapes`, `voc:PATH` or `coco:PATH` (see the module's text for parts of it).

    `classes`: the names that a VOC folder may hold; by default VOC's twenty in a folder VOC2007 or the like, else those
    that its training part does hold. `on_bad`: skip or stop. Raises `UsageError` for an unknown name or unusable files.
    """
    if isinstance(data, DetectionData):
        return data
    source, colon, path = str(data).partition(":")
    if source == "shapes" and not colon:
        from plugins.detection.shapes import draw_shapes

        return draw_shapes()
    if source not in ("voc", "coco") or not path:
        raise rp.UsageError(f"detection data (={data!r}) is unknown; accepted: shapes, voc:PATH, coco:PATH")
    root, parts = _root_and_parts(path)
    if not root.is_dir():
        raise rp.UsageError(f"detection data (={data!r}): there is no folder {root}")
    if source == "coco":
        if classes is not None:
            raise rp.UsageError("classes is for voc:PATH; COCO's files name their own")
        train, test = _halves(parts or _coco_default(root), parts)
        train_set = read_coco(root, train, on_bad=on_bad)
        test_set = read_coco(root, test, on_bad=on_bad)
        if train_set.classes != test_set.classes:
            raise rp.UsageError(f"{'+'.join(train)} and {'+'.join(test)} in {root} differ in their categories")
    elif parts or (root / "ImageSets").is_dir() or _years(root):
        parts = parts or _voc_default(root)
        train, test = _halves(parts, parts)
        train_set = read_voc(root, train, classes=classes, on_bad=on_bad)
        test_set = read_voc(root, test, classes=train_set.classes, on_bad=on_bad)
    else:
        whole = read_voc(root, classes=classes, on_bad=on_bad)
        train_set = replace(whole.select(i for i in range(len(whole)) if i % 5 != 4), problems=whole.problems)
        test_set = replace(whole.select(range(4, len(whole), 5)), problems=())
    for part in (train_set, test_set):
        if not len(part):
            raise rp.UsageError(f"detection data (={data!r}) has no usable image in a part; {_first(part.problems)}")
    both = set(train_set.images) & set(test_set.images)
    if both:
        raise rp.UsageError(f"detection data (={data!r}): {len(both)} images are trained and tested on")
    identity = f"{source}:{_digest([train_set.identity.encode(), test_set.identity.encode()])}"
    name = f"{source}-{root.name}" + (f"-{parts.replace('/', '-')}" if parts else "")
    return DetectionData(name, identity, train_set, test_set, train_set.classes)


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Image [C, H, W] and boxes mirrored left to right; exact where boxes are on whole pixels. The inputs stay."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), {**target, "boxes": boxes}


def read_voc(
    root: str | Path,
    parts: Sequence[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    on_bad: str = "skip",
) -> DetectionSet:
    """The union of VOC image lists, `trainval` of one folder or `2007-trainval` of a devkit; None is every annotation."""
    root = Path(root).expanduser()
    book, files, named, seen = _Book(root, on_bad), [], [], set()
    labelled = True
    for part in parts or (None,):
        folder, names = _voc_list(root, part)
        if not (folder / "Annotations").is_dir() or not (folder / "JPEGImages").is_dir():
            raise rp.UsageError(f"{folder} is not in VOC's layout: it needs Annotations/ and JPEGImages/")
        if classes is None and re.fullmatch(r"VOC\d{4}", folder.name):
            classes = VOC_CLASSES
        images = {
            file.stem: file for file in sorted((folder / "JPEGImages").iterdir()) if file.suffix.lower() in _IMAGES
        }
        annotated = {file.stem for file in (folder / "Annotations").glob("*.xml")}
        held_back = part is not None and part.endswith("test") and not annotated.intersection(names)
        labelled = labelled and not held_back
        for name in names:
            annotation = folder / "Annotations" / f"{name}.xml"
            if annotation in seen:
                continue
            seen.add(annotation)
            if name not in images:
                book.report(folder / "JPEGImages" / f"{name}.jpg", "the image is missing")
            elif held_back:
                files.append(images[name])
                named.append([])
            elif name not in annotated:
                book.report(annotation, "the annotation is missing")
            elif (objects := _voc_objects(annotation, images[name], book)) is not None:
                files.append(images[name])
                named.append([(annotation, *thing) for thing in objects])
    if classes is None:
        classes = sorted({kind for objects in named for _, kind, _, _ in objects})
    labels = {name: label for label, name in enumerate(classes, start=1)}
    targets = []
    for index, objects in enumerate(named):
        for annotation, kind, _, _ in objects:
            if kind not in labels:
                book.report(annotation, f"class {kind!r} is unknown")
        known = [(box, labels[kind], difficult) for _, kind, box, difficult in objects if kind in labels]
        targets.append(
            make_target(index, [box for box, _, _ in known], [it[1] for it in known], difficult=[it[2] for it in known])
        )
    return _file_set(files, targets, tuple(classes), book, labelled)


def read_coco(root: str | Path, parts: Sequence[str], *, on_bad: str = "skip") -> DetectionSet:
    """The union of the `parts` (such as train2017) of a COCO folder: PATH/annotations/instances_PART.json."""
    root = Path(root).expanduser()
    book, files, targets = _Book(root, on_bad), [], []
    categories: dict[int, str] | None = None
    for part in parts:
        file = root / "annotations" / f"instances_{part}.json"
        if not file.is_file():
            raise rp.UsageError(f"{file} is not there; parts here: {', '.join(_coco_parts(root)) or 'none'}")
        try:
            content = json.loads(file.read_bytes())
            own = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
            of_image: dict[Any, list[dict]] = {entry["id"]: [] for entry in content["images"]}
            for entry in content["annotations"]:
                if entry["image_id"] in of_image:
                    of_image[entry["image_id"]].append(entry)
                else:
                    book.report(file, f"annotation {entry.get('id')} is of an unknown image {entry['image_id']!r}")
            if categories not in (None, own):
                raise rp.UsageError(f"{file}: its categories are not those of {parts[0]}")
            categories = own
            labels = {identifier: label for label, identifier in enumerate(sorted(own), start=1)}
            folder = _coco_images(root, part, content["images"])
            for entry in content["images"]:
                image = folder / entry["file_name"]
                if not image.is_file():
                    book.report(image, "the image is missing")
                    continue
                size = book.size_of(image, (float(entry.get("width", 0)), float(entry.get("height", 0))))
                if size is None:
                    continue
                kept = list(_coco_objects(image, size, of_image[entry["id"]], labels, book))
                boxes, kinds, crowds, areas = ([thing[column] for thing in kept] for column in range(4))
                files.append(image)
                targets.append(make_target(int(entry["id"]), boxes, kinds, iscrowd=crowds, area=areas))
        except rp.UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise rp.UsageError(f"{file} is not COCO's instances: {type(error).__name__}: {error}") from None
    names = tuple(categories[identifier] for identifier in sorted(categories or {}))  # type: ignore[index]
    return _file_set(files, targets, names, book)


def make_target(
    image_id: int,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    *,
    difficult: Sequence[bool] | None = None,
    iscrowd: Sequence[bool] | None = None,
    area: Sequence[float] | None = None,
) -> Target:
    """The tensors of one image's objects. By default none is difficult or a crowd, and an area is its box's."""
    edges = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    none = [False] * len(edges)
    return {
        "boxes": edges,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(none if difficult is None else difficult, dtype=torch.bool),
        "iscrowd": torch.tensor(none if iscrowd is None else iscrowd, dtype=torch.int64),
        "area": (edges[:, 2:] - edges[:, :2]).prod(1) if area is None else torch.tensor(area, dtype=torch.float32),
        "image_id": torch.tensor(image_id),
    }


class _Book:
    """Takes down what is wrong with the files under `root`, or stops at it."""

    def __init__(self, root: Path, on_bad: str):
        if on_bad not in ("skip", "stop"):
            raise rp.UsageError(f"on_bad (={on_bad!r}) is unknown; accepted: skip, stop")
        self.root, self.stop, self.problems = root, on_bad == "stop", list[Problem]()

    def report(self, file: Path, what: str) -> None:
        if self.stop:
            raise rp.UsageError(f'{file}: {what}; on_bad="skip" leaves it out')
        self.problems.append(Problem(file.relative_to(self.root).as_posix(), what))

    def fitted(self, file: Path, what: str, box: Sequence[float], size: Sequence[float]) -> list[float] | None:
        """The box within its image of (width, height), or None if nothing is left of it."""
        said = f"{what} ({', '.join(f'{number:g}' for number in box)})"
        width, height = size
        if not all(math.isfinite(number) for number in box):
            self.report(file, f"{said} is not finite")
            return None
        if box[2] <= box[0] or box[3] <= box[1]:
            self.report(file, f"{said} has no area")
            return None
        inside = [max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)]
        inside = torch.tensor(inside, dtype=torch.float32).tolist()  # in which boxes are kept
        # Annotators' rounding: COCO's boxes often end a fraction of a pixel outside.
        cut = max(abs(one - other) for one, other in zip(box, inside, strict=True)) > 1
        if min(inside[2] - inside[0], inside[3] - inside[1]) <= (1 if cut else 0):  # nobody finds a pixel's part
            self.report(file, f"{said} is outside the image of {width:g}×{height:g}")
            return None
        if cut:
            self.report(file, f"{said} reaches outside the image of {width:g}×{height:g} and is cut off there")
        return inside

    def size_of(self, image: Path, said: Sequence[float]) -> list[float] | None:
        """The image's (width, height); None if it cannot be read or is not of the size that is `said`, if one is: then it may
        have been turned since its boxes were drawn."""
        why = ""
        try:
            with Image.open(image) as opened:
                size = [float(side) for side in opened.size]
                other = min(said) > 0 and size != list(said)
                if other and opened.getexif().get(_ORIENTATION, 1) != 1:
                    why = "; its EXIF says that it is to be turned"
        except NO_PICTURE as error:
            self.report(image, f"the image cannot be read: {error}")
            return None
        if other:
            self.report(
                image, f"the image has {size[0]:g}×{size[1]:g} pixels, not {said[0]:g}×{said[1]:g} as annotated{why}"
            )
            return None
        return size


def _root_and_parts(path: str) -> tuple[Path, str | None]:
    whole = Path(path).expanduser()
    if whole.exists() or "@" not in path:  # a folder may have an @ in its name
        return whole, None
    root, _, parts = path.rpartition("@")
    return Path(root).expanduser(), UNIONS.get(parts, parts)


def _halves(parts: str, given: str | None) -> tuple[list[str], list[str]]:
    halves = [half.split("+") for half in parts.split("/")]
    if len(halves) != 2 or not all(all(half) for half in halves):
        raise rp.UsageError(
            f"parts (={given!r}) must be TRAIN/TEST, each one part or several joined by +, or one of {', '.join(UNIONS)}"
        )
    return halves[0], halves[1]


def _years(root: Path) -> list[str]:
    return sorted(folder.name[3:] for folder in root.glob("VOC[0-9][0-9][0-9][0-9]") if folder.is_dir())


def _voc_default(root: Path) -> str:
    years = _years(root)
    if {"2007", "2012"} <= set(years):
        return UNIONS["07+12"]
    folder, prefix = (root / f"VOC{years[0]}", f"{years[0]}-") if years else (root, "")
    lists = {file.stem for file in (folder / "ImageSets" / "Main").glob("*.txt")}
    for train, test in (("trainval", "test"), ("train", "val"), ("train", "test")):
        # VOC's own test sets after 2007 have no public truth.
        if {train, test} <= lists and not (test == "test" and prefix > "2008"):
            return f"{prefix}{train}/{prefix}{test}"
    raise rp.UsageError(
        f"{folder}/ImageSets/Main has neither trainval and test nor train and val; name them after an @"
    )


def _voc_list(root: Path, part: str | None) -> tuple[Path, list[str]]:
    """The folder that a part is of, and the names of its images."""
    if part is None:
        return root, sorted(file.stem for file in (root / "Annotations").glob("*.xml"))
    match = re.fullmatch(r"(\d{4})-(.+)", part)
    folder, name = (root / f"VOC{match[1]}", match[2]) if match else (root, part)
    if not folder.is_dir():
        raise rp.UsageError(f"part (={part!r}): there is no {folder}; years here: {', '.join(_years(root)) or 'none'}")
    file = folder / "ImageSets" / "Main" / f"{name}.txt"
    if not file.is_file():
        here = sorted(path.stem for path in file.parent.glob("*.txt") if "_" not in path.stem)
        raise rp.UsageError(f"part (={part!r}): there is no {file}; lists here: {', '.join(here) or 'none'}")
    return folder, [line.split()[0] for line in file.read_text().splitlines() if line.split()]


_DIFFICULT = {"0": False, "false": False, "unspecified": False, "1": True, "true": True}


def _voc_objects(annotation: Path, image: Path, book: _Book) -> list[tuple[str, list[float], bool]] | None:
    """(class, box, difficult) of an XML file's objects; None if it cannot be read."""
    try:
        tree = ElementTree.parse(annotation).getroot()
    except (ElementTree.ParseError, OSError) as error:
        book.report(annotation, f"the annotation cannot be read: {error}")
        return None
    try:
        size = [float(tree.findtext(f"size/{side}", "")) for side in ("width", "height")]
    except ValueError:
        size = [0.0, 0.0]
    size = book.size_of(image, size)  # some annotation tools leave it out
    if size is None:
        return None
    objects = []
    for element in tree.findall("object"):
        kind = (element.findtext("name") or "").strip()
        try:
            x0, y0, x1, y1 = (
                float(element.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError:
            book.report(annotation, f"an object of class {kind!r} has no readable box")
            continue
        said = (element.findtext("difficult") or "0").strip().lower()
        if said not in _DIFFICULT:
            book.report(
                annotation, f"difficult (={said!r}) of an object of class {kind!r} is neither 0 nor 1, and taken for 0"
            )
        if x1 <= x0 or y1 <= y0:
            book.report(annotation, f"box of {kind!r} ({x0:g}, {y0:g}, {x1:g}, {y1:g}) has no area")
            continue
        box = book.fitted(annotation, f"box of {kind!r}", (x0 - 1, y0 - 1, x1, y1), size)
        if box is not None:
            objects.append((kind, box, _DIFFICULT.get(said, False)))
    return objects


def _coco_parts(root: Path) -> list[str]:
    return sorted(file.stem.removeprefix("instances_") for file in (root / "annotations").glob("instances_*.json"))


def _coco_default(root: Path) -> str:
    here = _coco_parts(root)
    chosen = [[part for part in here if part.startswith(kind)] for kind in ("train", "val")]
    if [len(parts) for parts in chosen] != [1, 1]:
        raise rp.UsageError(
            f"{root}/annotations must hold instances_train*.json and instances_val*.json, one each, or say which with "
            f"@TRAIN/TEST; parts here: {', '.join(here) or 'none'}"
        )
    return f"{chosen[0][0]}/{chosen[1][0]}"


def _coco_images(root: Path, part: str, entries: Sequence[dict]) -> Path:
    """The folder of a part's images: the first in which one of some images is found."""
    folders = [root / part, root / "images" / part, root / "images", root]
    return next(
        (it for it in folders if any((it / entry["file_name"]).is_file() for entry in entries[:20])), folders[0]
    )


def _coco_objects(
    image: Path, size: Sequence[float], annotations: Sequence[dict], labels: dict[int, int], book: _Book
) -> Iterator[tuple[list[float], int, bool, float]]:
    """(box, label, crowd, area) of an image's annotations that are sound."""
    for annotation in annotations:
        number = annotation.get("id")
        if annotation["category_id"] not in labels:
            book.report(image, f"annotation {number}: category {annotation['category_id']!r} is unknown")
            continue
        x, y, width, height = (float(value) for value in annotation["bbox"])
        edges = (x, y, x + width, y + height)
        box = book.fitted(image, f"annotation {number}: box", edges, size)
        if box is not None:
            area = float(annotation.get("area", width * height))
            yield box, labels[annotation["category_id"]], bool(annotation.get("iscrowd", 0)), area


def _file_set(
    files: list[Path], targets: list[Target], classes: tuple[str, ...], book: _Book, labelled: bool = True
) -> DetectionSet:
    names = tuple(file.stem for file in files)
    held = [repr(classes).encode()]
    for file, target in zip(files, targets, strict=True):
        held.append(f"{file.parent.parent.name}/{file.name}\0{file.stat().st_size}\n".encode())
        held += [value.numpy().tobytes() for value in target.values()]
    return DetectionSet(tuple(files), tuple(targets), names, classes, _digest(held), tuple(book.problems), labelled)


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]


def _first(problems: Sequence[Problem]) -> str:
    return (
        f"first of {len(problems)} problems: {problems[0].file}: {problems[0].what}"
        if problems
        else "its lists are empty"
    )
