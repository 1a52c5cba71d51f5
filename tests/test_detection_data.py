"""Detection data: VOC, COCO and the drawn shapes, with what is wrong in files, and the real sets where they are."""

from __future__ import annotations

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import resprobe as rp
from plugins.detection import (
    DetectionData,
    DetectionSet,
    Problem,
    draw_shapes,
    flip,
    load_detection,
    mean_average_precision,
    read_coco,
    read_voc,
    shapes,
)
from plugins.detection.data import UNIONS, VOC_CLASSES, make_target

TARGET = {
    "boxes": torch.float32,
    "labels": torch.int64,
    "difficult": torch.bool,
    "iscrowd": torch.int64,
    "area": torch.float32,
    "image_id": torch.int64,
}


def assert_well_formed(part: DetectionSet) -> None:
    """What every part of every source promises."""
    assert len(part) == len(part.names) == len(part.images) == len(part.targets) > 0
    for target in part.targets:
        assert {name: value.dtype for name, value in target.items()} == TARGET
        count = len(target["boxes"])
        assert target["boxes"].shape == (count, 4) and target["image_id"].shape == ()
        assert all(target[name].shape == (count,) for name in ("labels", "difficult", "iscrowd", "area"))
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all() and (target["boxes"] >= 0).all()
        assert ((target["labels"] >= 1) & (target["labels"] <= len(part.classes))).all()
    image, target = part[0]
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
    assert (target["boxes"][:, [0, 2]] <= image.shape[2]).all() and (target["boxes"][:, [1, 3]] <= image.shape[1]).all()


def same_targets(one: DetectionSet, other: DetectionSet) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[name], b[name]) for a, b in zip(one.targets, other.targets, strict=True) for name in TARGET
    )


# --- VOC ---


def voc_object(kind="dog", box=(11, 21, 30, 40), difficult=0) -> str:
    edges = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    # A part has a box of its own, which is not the object's.
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    hard = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{kind}</name>{part}{hard}<bndbox>{edges}</bndbox></object>"


def voc_image(folder, name, *objects, size=(60, 50), stated=True):
    """One image of `size` (width, height) whose red channel grows with x and green with y, and its annotation."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.png")
    said = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>" if stated else ""
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{said}{''.join(objects)}</annotation>")


def voc_list(folder, name, *images):
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in images))


@pytest.fixture
def devkit(tmp_path):
    """A whole VOCdevkit in small: 2 + 1 images of 2007, 1 + 1 of 2012, whose test annotations are held back."""
    for name in ("000001", "000002", "000003"):
        voc_image(tmp_path / "VOC2007", name, voc_object("dog"))
    voc_list(tmp_path / "VOC2007", "trainval", "000001", "000002")
    voc_list(tmp_path / "VOC2007", "test", "000003")
    for name in ("2008_000001", "2012_000009"):
        voc_image(tmp_path / "VOC2012", name, voc_object("cat"))
    voc_list(tmp_path / "VOC2012", "trainval", "2008_000001")
    voc_list(tmp_path / "VOC2012", "train", "2008_000001")
    voc_list(tmp_path / "VOC2012", "test", "2012_000009")
    (tmp_path / "VOC2012" / "Annotations" / "2012_000009.xml").unlink()
    return tmp_path


def test_vocs_pixels_become_edges(tmp_path):
    voc_image(tmp_path, "a", voc_object("dog", (11, 21, 30, 40)), voc_object("cat", (1, 1, 60, 50), difficult=1))
    part = read_voc(tmp_path)
    assert_well_formed(part)
    image, target = part[0]
    assert image.shape == (3, 50, 60)
    assert target["boxes"].tolist() == [[10, 20, 30, 40], [0, 0, 60, 50]]
    assert target["area"].tolist() == [400, 3000]
    # The eleventh pixel, counted from 1, is at 10, and the fortieth row, the last inside, at 39.
    x0, y0, x1, y1 = target["boxes"][0].long().tolist()
    inside = image[:, y0:y1, x0:x1]
    assert (inside[0].min(), inside[0].max(), inside[1].min(), inside[1].max()) == (10, 29, 20, 39)
    assert part.classes == ("cat", "dog") and target["labels"].tolist() == [2, 1]
    assert target["difficult"].tolist() == [False, True] and target["iscrowd"].tolist() == [0, 0]
    assert part.problems == () and part.labelled


def test_voc_unions_and_classes(devkit):
    data = load_detection(f"voc:{devkit}")
    assert data.train.names == ("000001", "000002", "2008_000001") and data.test.names == ("000003",)
    assert data.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert [VOC_CLASSES[int(target["labels"]) - 1] for target in data.train.targets] == ["dog", "dog", "cat"]
    for written in ("07+12", UNIONS["07+12"], "2007-trainval+2012-trainval/2007-test"):
        assert load_detection(f"voc:{devkit}@{written}").identity == data.identity
    assert load_detection(f"voc:{devkit}@2007-trainval/2007-test").identity != data.identity
    alone = load_detection(f"voc:{devkit}/VOC2007")
    assert alone.classes == VOC_CLASSES and alone.train.names == ("000001", "000002")
    # Without 2007: 2012's own lists with a public truth.
    voc_image(devkit / "VOC2012", "2012_000010", voc_object("cow"))
    voc_list(devkit / "VOC2012", "val", "2012_000010")
    shutil.move(devkit / "VOC2012", devkit / "later" / "VOC2012")
    assert load_detection(f"voc:{devkit}/later").test.names == ("2012_000010",)
    assert load_detection(f"voc:{devkit}").test.names == ("000003",)


def test_an_image_in_two_lists_is_one_image(devkit):
    assert read_voc(devkit, ["2012-trainval", "2012-train"]).names == ("2008_000001",)


def test_the_test_set_whose_truth_is_held_back_has_images_alone(devkit):
    data = load_detection(f"voc:{devkit}@07++12")
    assert data.train.names == ("000001", "000002", "000003", "2008_000001") and data.train.labelled
    assert data.test.names == ("2012_000009",) and not data.test.labelled
    assert data.test[0][0].shape == (3, 50, 60) and len(data.test.targets[0]["boxes"]) == 0
    assert data.problems == ()
    # Held back is a test set's truth; elsewhere it is missing.
    voc_list(devkit / "VOC2012", "train", "2012_000009")
    part = read_voc(devkit, ["2012-train"])
    assert part.problems == (Problem("VOC2012/Annotations/2012_000009.xml", "the annotation is missing"),)
    assert len(part) == 0 and part.labelled


def test_one_folder_with_lists_and_one_without(tmp_path):
    folder = tmp_path / "mine@home"  # an @ in a folder's name is not yet a list
    for number in range(10):
        voc_image(folder, f"image{number}", voc_object("cell"))
    shutil.rmtree(folder / "ImageSets")
    assert load_detection(f"voc:{folder}").test.names == ("image4", "image9")
    assert load_detection(f"voc:{folder}").train.names == tuple(f"image{n}" for n in (0, 1, 2, 3, 5, 6, 7, 8))
    voc_list(folder, "train", *(f"image{number}" for number in range(6)))
    voc_list(folder, "val", "image7 -1", "", "image6")  # a class's list has a mark behind the name
    listed = load_detection(f"voc:{folder}")
    assert listed.test.names == ("image7", "image6") and len(listed.train) == 6 and listed.classes == ("cell",)
    assert load_detection(f"voc:{folder}@val/train").train.names == ("image7", "image6")


BAD = {
    "no area": (voc_object("dog", (5, 5, 5, 9)), "box of 'dog' (5, 5, 5, 9) has no area", 0),
    "turned": (voc_object("dog", (9, 5, 5, 9)), "box of 'dog' (9, 5, 5, 9) has no area", 0),
    "outside": (voc_object("dog", (70, 5, 80, 9)), "box of 'dog' (69, 4, 80, 9) is outside the image of 60×50", 0),
    "beyond": (
        voc_object("dog", (51, 1, 80, 9)),
        "box of 'dog' (50, 0, 80, 9) reaches outside the image of 60×50 and is cut off there",
        1,
    ),
    "unknown class": (voc_object("dgo"), "class 'dgo' is unknown", 0),
    "not a number": (voc_object("dog", ("x", 1, 3, 3)), "an object of class 'dog' has no readable box", 0),
    "infinite": (voc_object("dog", (1, 1, "inf", 3)), "box of 'dog' (0, 0, inf, 3) is not finite", 0),
    "no box": ("<object><name>dog</name></object>", "an object of class 'dog' has no readable box", 0),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_voc_objects_are_reported_and_left_out_or_stop(tmp_path, case):
    written, what, kept = BAD[case]
    voc_image(tmp_path, "good", voc_object("cat"))
    voc_image(tmp_path, "half", voc_object("cat"), written)
    part = read_voc(tmp_path, classes=("cat", "dog"))
    assert part.problems == (Problem("Annotations/half.xml", what),)
    assert [len(target["labels"]) for target in part.targets] == [1, 1 + kept]
    assert_well_formed(part)
    with pytest.raises(rp.UsageError) as error:
        read_voc(tmp_path, classes=("cat", "dog"), on_bad="stop")
    assert str(error.value) == f'{tmp_path}/Annotations/half.xml: {what}; on_bad="skip" leaves it out'


def test_a_box_that_reaches_outside_is_cut_off_and_a_rounding_is_no_problem(tmp_path):
    voc_image(tmp_path, "a", voc_object("dog", (51, 1, 80, 9)), voc_object("dog", (0, 1, 61, 9)))
    part = read_voc(tmp_path)
    assert part.targets[0]["boxes"].tolist() == [[50, 0, 60, 9], [0, 0, 60, 9]]
    assert [problem.file for problem in part.problems] == ["Annotations/a.xml"]


def test_bad_voc_files_are_reported_and_left_out_or_stop(tmp_path):
    for name in ("a", "b", "c", "d"):
        voc_image(tmp_path, name, voc_object())
    voc_list(tmp_path, "all", "a", "b", "c", "d")
    (tmp_path / "JPEGImages" / "b.png").unlink()
    (tmp_path / "Annotations" / "c.xml").unlink()
    (tmp_path / "Annotations" / "d.xml").write_text("<annotation><object>")
    part = read_voc(tmp_path, ["all"])
    assert part.names == ("a",)
    assert part.problems[:2] == (
        Problem("JPEGImages/b.jpg", "the image is missing"),
        Problem("Annotations/c.xml", "the annotation is missing"),
    )
    assert part.problems[2].file == "Annotations/d.xml" and "cannot be read: " in part.problems[2].what
    with pytest.raises(rp.UsageError, match=r"JPEGImages/b\.jpg: the image is missing"):
        read_voc(tmp_path, ["all"], on_bad="stop")


def test_what_is_said_of_difficult_does_not_lose_an_object(tmp_path):
    words = ("0", "1", "False", "true", "Unspecified", "hard")
    voc_image(tmp_path, "a", *(voc_object("dog", difficult=word) for word in words))
    part = read_voc(tmp_path)
    assert part.targets[0]["difficult"].tolist() == [False, True, False, True, False, False]
    what = "difficult (='hard') of an object of class 'dog' is neither 0 nor 1, and taken for 0"
    assert part.problems == (Problem("Annotations/a.xml", what),)


def test_an_image_of_another_size_than_annotated_is_left_out(tmp_path):
    """Turned by a camera's note, or an annotation with its sides the wrong way round: the boxes lie elsewhere."""
    for name in ("a", "b", "c"):
        voc_image(tmp_path, name, voc_object())
    Image.new("RGB", (50, 60)).save(tmp_path / "JPEGImages" / "b.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (50, 60)).save(tmp_path / "JPEGImages" / "c.png", exif=turned)
    part = read_voc(tmp_path)
    assert part.names == ("a",)
    what = "the image has 50×60 pixels, not 60×50 as annotated"
    assert part.problems == (
        Problem("JPEGImages/b.png", what),
        Problem("JPEGImages/c.png", f"{what}; its EXIF says that it is to be turned"),
    )


def test_coco_s_images_need_not_say_their_size(tmp_path):
    coco_folder(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content, before = json.loads(file.read_text()), read_coco(tmp_path, ["train2017"])
    for entry in content["images"]:
        del entry["width"], entry["height"]
    file.write_text(json.dumps(content))
    assert same_targets(read_coco(tmp_path, ["train2017"]), before) and not before.problems


def test_what_is_left_of_a_box_is_a_pixel_or_more(tmp_path):
    """In the precision in which boxes are kept: torchvision ends a training at a box without width."""
    good = {"id": 7, "image_id": 200, "category_id": 3, "bbox": [1, 1, 9, 9]}
    slivers = [{**good, "id": 8 + i, "bbox": [edge, 5, 5, 5]} for i, edge in enumerate((59.9999999, 59.5))]
    coco_folder(tmp_path, annotations=[good, *slivers])
    part = read_coco(tmp_path, ["train2017"])
    assert [len(target["boxes"]) for target in part.targets].count(1) == 1 and len(part.problems) == 2
    assert all("is outside the image of" in problem.what for problem in part.problems)


def test_an_annotation_may_leave_out_the_size_and_the_flags(tmp_path):
    voc_image(tmp_path, "a", voc_object("dog", (70, 5, 80, 9)), voc_object("cat", difficult=None), stated=False)
    part = read_voc(tmp_path)
    assert part.problems == (Problem("Annotations/a.xml", "box of 'dog' (69, 4, 80, 9) is outside the image of 60×50"),)
    assert part.targets[0]["difficult"].tolist() == [False]


def test_a_damaged_image_is_named_when_it_is_read(tmp_path):
    voc_image(tmp_path, "a", voc_object())
    file = tmp_path / "JPEGImages" / "a.png"
    file.write_bytes(file.read_bytes()[:60])  # whose size can still be read
    with pytest.raises(rp.UsageError, match=r"image .*a\.png cannot be read"):
        read_voc(tmp_path)[0]


def test_the_identity_is_what_the_files_hold(tmp_path):
    voc_image(tmp_path / "one", "a", voc_object())
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "one")
    first = read_voc(tmp_path / "one").identity
    assert read_voc(tmp_path / "elsewhere" / "one").identity == first
    assert read_voc(tmp_path / "one", classes=("cat", "dog")).identity != first
    voc_image(tmp_path / "one", "a", voc_object("dog", (11, 21, 30, 41)))
    moved = read_voc(tmp_path / "one").identity
    voc_image(tmp_path / "one", "a", voc_object(), size=(70, 50))
    assert len({first, moved, read_voc(tmp_path / "one").identity}) == 3


# --- COCO ---


def coco_folder(root, part="train2017", annotations=None, images_in=None, **changes):
    """Two images of 60×50 pixels; category ids have gaps and no order, as COCO's have."""
    folder = root / (images_in or part)
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images = [{"id": 100 * n, "file_name": f"{part}-{n}.png", "width": 60, "height": 50} for n in (1, 2)]
    for image in images:
        Image.new("RGB", (60, 50)).save(folder / image["file_name"])
    content = {
        "images": images,
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "brush"}],
        "annotations": [
            {"id": 1, "image_id": 100, "category_id": 18, "bbox": [10.5, 20, 20, 10], "area": 150.5, "iscrowd": 0},
            {"id": 2, "image_id": 100, "category_id": 3, "bbox": [0, 0, 60, 50], "area": 2000, "iscrowd": 1},
        ],
        **changes,
    }
    if annotations is not None:
        content["annotations"] = annotations
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def test_cocos_boxes_and_categories(tmp_path):
    coco_folder(tmp_path)
    part = read_coco(tmp_path, ["train2017"])
    assert_well_formed(part)
    assert part.classes == ("car", "dog", "brush")  # in the order of their ids: 3, 18, 90
    target = part.targets[0]
    assert target["boxes"].tolist() == [[10.5, 20, 30.5, 30], [0, 0, 60, 50]]
    assert target["labels"].tolist() == [2, 1] and target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [150.5, 2000] and target["image_id"] == 100
    assert len(part.targets[1]["labels"]) == 0 and part.targets[1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("images_in", ["{}", "images/{}", "images"])
def test_coco_parts_and_folders(tmp_path, images_in):
    for part in ("train2017", "val2017"):
        coco_folder(tmp_path, part, images_in=images_in.format(part))
    data = load_detection(f"coco:{tmp_path}")
    assert (data.train.names[0], data.test.names[0]) == ("train2017-1", "val2017-1")
    assert data.problems == () and data.classes == ("car", "dog", "brush")
    assert load_detection(f"coco:{tmp_path}@train2017/val2017").identity == data.identity
    assert len(read_coco(tmp_path, ["train2017", "val2017"])) == 4


COCO_BAD = {
    "no area": ({"bbox": [5, 5, 0, 9]}, "annotation 7: box (5, 5, 5, 14) has no area", 0),
    "outside": ({"bbox": [60, 5, 9, 9]}, "annotation 7: box (60, 5, 69, 14) is outside the image of 60×50", 0),
    "beyond": (
        {"bbox": [50, 5, 19, 9]},
        "annotation 7: box (50, 5, 69, 14) reaches outside the image of 60×50 and is cut off there",
        1,
    ),
    "unknown class": ({"category_id": 4}, "annotation 7: category 4 is unknown", 0),
}


@pytest.mark.parametrize("case", COCO_BAD)
def test_bad_coco_annotations_are_reported_and_left_out_or_stop(tmp_path, case):
    changes, what, kept = COCO_BAD[case]
    good = {"id": 7, "image_id": 200, "category_id": 3, "bbox": [1, 1, 9, 9]}
    coco_folder(tmp_path, annotations=[{**good, "id": 6}, {**good, **changes}])
    part = read_coco(tmp_path, ["train2017"])
    assert part.problems == (Problem("train2017/train2017-2.png", what),)
    assert len(part.targets[1]["labels"]) == 1 + kept
    assert part.targets[1]["area"][0] == 81  # where the file says none, the box's
    with pytest.raises(rp.UsageError, match=r"train2017-2\.png: annotation 7"):
        read_coco(tmp_path, ["train2017"], on_bad="stop")


def test_missing_coco_images_are_reported(tmp_path):
    stray = {"id": 9, "image_id": 5, "category_id": 3, "bbox": [1, 1, 9, 9]}
    coco_folder(tmp_path, annotations=[stray])
    (tmp_path / "train2017" / "train2017-1.png").unlink()
    part = read_coco(tmp_path, ["train2017"])
    assert part.names == ("train2017-2",)
    assert part.problems == (
        Problem("annotations/instances_train2017.json", "annotation 9 is of an unknown image 5"),
        Problem("train2017/train2017-1.png", "the image is missing"),
    )


# --- drawn shapes ---


@pytest.fixture(scope="module")
def drawn() -> DetectionData:
    return load_detection("shapes")


def test_the_embedded_set(drawn):
    assert (len(drawn.train), len(drawn.test)) == (400, 100)
    assert drawn.classes == ("disc", "square", "triangle", "star", "cross")
    for part in (drawn.train, drawn.test):
        assert_well_formed(part)
        assert part.images.shape[1:] == (3, 128, 128)
        counts = [len(target["labels"]) for target in part.targets]
        assert min(counts) == 1 and max(counts) == 6
        of_class = torch.cat([target["labels"] for target in part.targets]).bincount(minlength=6)
        assert of_class[0] == 0 and of_class[1:].min() > 0.15 * sum(counts)
    assert load_detection(drawn) is drawn


def test_an_image_is_a_function_of_its_part_number_and_size():
    few, more = draw_shapes(64, train=3, test=2), draw_shapes(64, train=5, test=2)
    assert torch.equal(few.train.images, more.train.images[:3])
    assert same_targets(few.train, more.train.select(range(3)))
    assert not torch.equal(few.train.images[:2], few.test.images)
    assert len({few.identity, more.identity, draw_shapes(65, train=3, test=2).identity}) == 3
    shapes.draw_shapes.cache_clear()
    again = draw_shapes(64, train=3, test=2)
    assert torch.equal(few.train.images, again.train.images) and few.identity == again.identity


def test_the_first_image_stays_what_it_is(drawn):
    """If this fails because the drawing was changed on purpose, raise `_VERSION` in shapes.py and write what is there."""
    target = drawn.train.targets[0]
    assert target["labels"].tolist() == [4, 2, 3, 1, 2]
    assert target["boxes"].tolist() == [
        [9, 99, 35, 126],
        [15, 26, 47, 57],
        [0, 9, 17, 27],
        [45, 28, 74, 56],
        [35, 4, 65, 34],
    ]


def pixels_seen(monkeypatch, index, number, count, size=128):
    """Which pixels show object `number`: those that change when it alone is painted in another colour."""
    original, images = shapes._colour, []
    for value in (0, 255):
        calls = []

        def colour(random, ground, value=value, calls=calls):
            original(random, ground)  # draws the same random numbers
            calls.append(None)
            return np.full(3, value if len(calls) == number + 1 else 128)

        monkeypatch.setattr(shapes, "_colour", colour)
        images.append(shapes._draw("train", index, size)[0])
        assert len(calls) == count
    return (images[0] != images[1]).any(2)


def test_boxes_are_tight_around_what_is_seen(monkeypatch):
    objects = 0
    for index in range(25):
        target = shapes._draw("train", index, 128)[1]
        for number, box in enumerate(target["boxes"].long().tolist()):
            seen = pixels_seen(monkeypatch, index, number, len(target["labels"]))
            rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert seen.sum() == target["area"][number]
            objects += 1
            monkeypatch.undo()
    assert objects > 50


def test_every_object_can_be_seen_and_the_hidden_ones_are_difficult(monkeypatch):
    original, told = shapes._target, []

    def target(index, owner, labels, pixels):
        told.append((owner, pixels))
        return original(index, owner, labels, pixels)

    monkeypatch.setattr(shapes, "_target", target)
    hard = cut = 0
    for index in range(60):
        made = shapes._draw("test", index, 96)[1]
        owner, pixels = told[-1]
        seen = np.array([(owner == number).sum() for number in range(len(pixels))]) / pixels
        assert (seen >= shapes.VISIBLE).all() and (seen <= 1).all()
        assert made["difficult"].tolist() == (seen < shapes.DIFFICULT).tolist()
        hard, cut = hard + int((seen < shapes.DIFFICULT).sum()), cut + int((seen < 1).sum())
    assert hard > 3 and cut > 30


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("disc", math.pi),
        ("square", 2),  # its diagonal is 2
        ("triangle", 3 * math.sqrt(3) / 4),
        ("star", 5 * 0.4 * math.sin(math.pi / 5)),  # ten triangles with sides 1 and 0.4 about an angle of 36°
        ("cross", 2 * (1.9 * 0.6) - 0.6**2),  # two bars that share a square
    ],
)
def test_shapes_have_the_area_of_their_formula(kind, area):
    across = (np.arange(800) + 0.5) / 400 - 1
    inside = shapes._inside(kind, across[None], across[:, None])
    assert inside.mean() * 4 == pytest.approx(area, rel=2e-3)
    assert not inside[[0, -1]].all() and inside[400, 400]


def test_crops_are_a_data_set_by_name():
    data = rp.load_data("shapes")
    assert data.classes == shapes.CLASSES and data.in_channels == 3 and data.identity == "shapes-1"
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (3, 32, 32)
    drawn = draw_shapes()
    easy = [sum(int((~target["difficult"]).sum()) for target in part.targets) for part in (drawn.train, drawn.test)]
    assert (len(data.train), len(data.test)) == (3 * easy[0], easy[1])
    first = drawn.train.targets[0]
    assert data.train.labels[:3].tolist() == [int(first["labels"][~first["difficult"]][0]) - 1] * 3
    assert not torch.equal(data.train.images[0], data.train.images[1])  # another view of the object
    again = shapes.crops()
    assert torch.equal(again.train.images, data.train.images) and torch.equal(again.test.labels, data.test.labels)
    with pytest.raises(rp.UsageError, match="takes no path"):
        rp.load_data("shapes:somewhere")


def test_a_crop_shows_its_object(drawn):
    """The middle of a disc's crop has the colour of the middle of its box."""
    data, number, checked = rp.load_data("shapes"), 0, 0
    for image, target in drawn.test:
        for box, label in zip(
            target["boxes"][~target["difficult"]].long().tolist(),
            target["labels"][~target["difficult"]].tolist(),
            strict=True,
        ):
            if label == 1 and box[3] - box[1] == box[2] - box[0] > 20 and len(target["labels"]) == 1:
                x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
                middle = image[:, y - 2 : y + 3, x - 2 : x + 3].float().mean((1, 2))
                shown = data.test.images[number][:, 13:19, 13:19].float().mean((1, 2))
                assert (middle - shown).abs().max() < 8
                checked += 1
            number += 1
    assert number == len(data.test) and checked > 0


# --- parts ---


def test_a_part_is_a_list_that_nobody_can_spoil():
    part = draw_shapes(64, train=4, test=1).train
    image, target = part[1]
    image.zero_()
    target["boxes"].zero_()
    assert part[1][0].any() and part[1][1]["boxes"].any()
    assert torch.equal(part[-1][0], part[3][0]) and len(list(part)) == 4
    with pytest.raises(IndexError):
        part[4]
    chosen = part.select([2, 0])
    assert chosen.names == ("train-00002", "train-00000") and torch.equal(chosen[1][0], part[0][0])
    assert chosen.identity != part.identity and chosen.identity != part.select([0, 2]).identity
    assert torch.equal(pickle.loads(pickle.dumps(part))[2][0], part[2][0])  # a loader's workers get it so


@given(st.integers(8, 40), st.lists(st.tuples(*[st.integers(0, 7)] * 2, *[st.integers(1, 8)] * 2), max_size=4))
def test_a_flip_mirrors_every_pixel_of_a_box(width, boxes):
    boxes = [[x, y, min(x + w, width), y + h] for x, y, w, h in boxes]
    image = torch.arange(3 * 16 * width).reshape(3, 16, width)
    target = make_target(5, boxes, [1] * len(boxes), difficult=[True] * len(boxes))
    before = target["boxes"].clone()
    flipped, moved = flip(image, target)
    for (x0, y0, x1, y1), (u0, v0, u1, v1) in zip(boxes, moved["boxes"].long().tolist(), strict=True):
        assert torch.equal(image[:, y0:y1, x0:x1].flip(2), flipped[:, v0:v1, u0:u1])
    assert torch.equal(target["boxes"], before)
    assert all(moved[name] is target[name] for name in TARGET if name != "boxes")
    back, there = flip(flipped, moved)
    assert torch.equal(back, image) and torch.equal(there["boxes"], before)


def test_truth_is_its_own_perfect_prediction(drawn):
    """The parts and the metrics speak of the same boxes and labels."""
    targets = list(drawn.test.targets)
    predictions = [{**target, "scores": torch.ones(len(target["labels"]))} for target in targets]
    assert mean_average_precision(predictions, targets, iou=1.0) == 1


# --- mistakes ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("shape", r"detection data \(='shape'\) is unknown; accepted: shapes, voc:PATH, coco:PATH"),
        ("voc", r"detection data \(='voc'\) is unknown"),
        ("shapes:96", r"detection data \(='shapes:96'\) is unknown"),
        ("voc:/nowhere/here", r"there is no folder /nowhere/here"),
        ("coco:/nowhere@train/val", r"there is no folder /nowhere$"),
        ("voc:{}@2007-trainval", r"parts \(='2007-trainval'\) must be TRAIN/TEST, .* or one of 07\+12, 07\+\+12"),
        ("voc:{}@2007-trainval+/2007-test", r"must be TRAIN/TEST"),
        ("voc:{}@2009-train/2007-test", r"part \(='2009-train'\): there is no .*VOC2009; years here: 2007, 2012"),
        ("voc:{}@2007-train/2007-test", r"2007-train'\): there is no .*train.txt; lists here: test, trainval"),
        ("voc:{}@2012-trainval/2012-train", r"1 images are trained and tested on"),
        ("coco:{}", r"annotations must hold instances_train\*.json and instances_val\*.json, .* parts here: none"),
        ("coco:{}@train/val", r"instances_train.json is not there; parts here: none"),
    ],
)
def test_mistaken_names_get_one_line(devkit, data, message):
    with pytest.raises(rp.UsageError, match=message) as error:
        load_detection(data.format(devkit))
    assert "\n" not in str(error.value)


def test_other_mistakes_get_one_line(tmp_path):
    voc_image(tmp_path, "a", voc_object("dog"))
    with pytest.raises(rp.UsageError, match=r"on_bad \(='ignore'\) is unknown; accepted: skip, stop"):
        read_voc(tmp_path, on_bad="ignore")
    with pytest.raises(rp.UsageError, match=r"is not in VOC's layout: it needs Annotations/ and JPEGImages/"):
        read_voc(tmp_path / "JPEGImages")
    with pytest.raises(rp.UsageError, match=r"has neither trainval and test nor train and val"):
        load_detection(f"voc:{tmp_path}")
    voc_list(tmp_path, "train", "a")
    voc_list(tmp_path, "val", "b")
    with pytest.raises(
        rp.UsageError, match=r"no usable image in a part; first of 1 problems: JPEGImages/b.jpg: the image"
    ):
        load_detection(f"voc:{tmp_path}")
    with pytest.raises(rp.UsageError, match=r"size \(=20\) must be at least 48 pixels"):
        draw_shapes(20)
    with pytest.raises(rp.UsageError, match=r"train \(=0\) and test \(=5\) must be at least 1"):
        draw_shapes(train=0, test=5)


def test_a_file_that_is_not_cocos_gets_one_line(tmp_path):
    coco_folder(tmp_path)
    coco_folder(tmp_path, "val2017", categories=[{"id": 1, "name": "other"}], annotations=[])
    with pytest.raises(rp.UsageError, match="train2017 and val2017 in .* differ in their categories"):
        load_detection(f"coco:{tmp_path}")
    with pytest.raises(rp.UsageError, match="instances_val2017.json: its categories are not those of train2017"):
        read_coco(tmp_path, ["train2017", "val2017"])
    with pytest.raises(rp.UsageError, match="classes is for voc:PATH"):
        load_detection(f"coco:{tmp_path}", classes=("dog",))
    for content in ("[]", "{", '{"images": []}'):
        (tmp_path / "annotations" / "instances_val2017.json").write_text(content)
        with pytest.raises(rp.UsageError, match="instances_val2017.json is not COCO's instances: ") as error:
            read_coco(tmp_path, ["val2017"])
        assert "\n" not in str(error.value)


# --- real data ---


def test_a_hundred_images_of_voc_2012(shared_data):
    part = read_voc(shared_data / "detection" / "voc2012-100", on_bad="stop")
    assert_well_formed(part)
    assert len(part) == 100 and part.classes == VOC_CLASSES and part.problems == ()
    assert sum(len(target["labels"]) for target in part.targets) == 273
    assert sum(int(target["difficult"].sum()) for target in part.targets) == 38
    # 2007_000027: one person, (174, 101) to (349, 351) in an image of 486×500.
    image, target = part[part.names.index("2007_000027")]
    assert image.shape == (3, 500, 486)
    assert target["boxes"].tolist() == [[173, 100, 349, 351]] and VOC_CLASSES[int(target["labels"]) - 1] == "person"
    for image, target in part:
        assert (target["boxes"][:, 2] <= image.shape[2]).all() and (target["boxes"][:, 3] <= image.shape[1]).all()
    data = load_detection(f"voc:{shared_data}/detection/voc2012-100")
    assert (len(data.train), len(data.test)) == (80, 20)


def test_blood_cells(shared_data):
    folder = shared_data / "detection" / "bccd" / "BCCD"
    data = load_detection(f"voc:{folder}")
    assert (len(data.train), len(data.test)) == (292, 72) and data.classes == ("Platelets", "RBC", "WBC")
    assert sum(len(target["labels"]) for part in (data.train, data.test) for target in part.targets) == 4888 - 2
    assert sorted(problem.file for problem in data.problems) == [
        "Annotations/BloodImage_00338.xml",
        "Annotations/BloodImage_00343.xml",
    ]
    assert all(problem.what.endswith("has no area") for problem in data.problems)
    assert data.test[0][0].shape == (3, 480, 640)
    with pytest.raises(rp.UsageError, match=r"BloodImage_003(38|43)\.xml: box of 'RBC' .* has no area"):
        load_detection(f"voc:{folder}", on_bad="stop")
