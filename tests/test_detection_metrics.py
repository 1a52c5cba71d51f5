"""AP of VOC and COCO: by hand, against a loop written from the definition, and on the awkward cases."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resprobe as rp
from plugins.detection import coco_metrics, mean_average_precision, voc_average_precision
from plugins.detection.metrics import COCO_KEYS

A, B, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [60, 60, 70, 70]


def truth(*boxes, labels=None, **more):
    """One image's objects, all of class 1 unless said."""
    more = {name: torch.tensor(value) for name, value in more.items()}
    labels = [1] * len(boxes) if labels is None else labels
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.tensor(labels).long(), **more}


def found(*boxes, scores=None, labels=None):
    """One image's detections in descending order of score unless said."""
    scores = [0.9 - 0.1 * index for index in range(len(boxes))] if scores is None else scores
    return truth(*boxes, labels=labels, scores=scores)


def both_rules(predictions, targets, **options):
    return tuple(
        float(voc_average_precision(predictions, targets, rule=rule, **options).loc[1])
        for rule in ("11-point", "all-point")
    )


# --- VOC by hand ---


def test_a_miss_and_a_duplicate_by_hand():
    # Score:      0.9 on A   0.8 nothing   0.7 on A again   0.6 on B
    # Hit:           1            0               0             1
    # Precision:    1/1          1/2             1/3           2/4
    # Recall:       1/2          1/2             1/2            1
    # Highest precision at recall r or more: 1 up to r = 1/2, then 1/2.
    # 11 points: r = 0, 0.1, ..., 0.5 are six times 1, r = 0.6, ..., 1 five times 1/2: 8.5/11. Area: 1/2 · 1 + 1/2 · 1/2.
    predictions, targets = [found(A, FAR, A, B)], [truth(A, B)]
    assert both_rules(predictions, targets) == pytest.approx((8.5 / 11, 0.75), abs=1e-12)
    # COCO's 101 points at the one IoU: 51 times 1, 50 times 1/2.
    assert coco_metrics(predictions, targets)["AP50"] == pytest.approx(76 / 101, abs=1e-9)


def test_recall_of_the_eleven_points_is_counted_in_whole_numbers():
    # 10 objects, the first 3 found, then a miss, then nothing: recall 0.3 is reached at precision 1, as 3 of 10 is 0.3
    # (3 · 0.1 is not, in binary). r = 0, 0.1, 0.2, 0.3 are 1, the rest 0: 4/11. Area 0.3.
    boxes = [[20 * column, 0, 20 * column + 10, 10] for column in range(10)]
    predictions = [found(*boxes[:3], FAR)]
    assert both_rules(predictions, [truth(*boxes)]) == pytest.approx((4 / 11, 0.3), abs=1e-12)


def test_images_and_classes_are_kept_apart():
    # Class 1: A in image 0 is found (0.9); the detection in image 1 (0.8) has the right place in the wrong image: miss.
    # One hit of one object with nothing above it: AP 1. Class 2: found once (0.5) below a detection on class 1's A (0.7):
    # precision 1/2 at recall 1. Class 3 is in the truth only: 0. Class 4 is only detected: nan.
    predictions = [
        found(A, A, scores=[0.9, 0.7], labels=[1, 2]),
        found(A, B, B, scores=[0.8, 0.5, 0.6], labels=[1, 2, 4]),
    ]
    targets = [truth(A, FAR, labels=[1, 3]), truth(B, labels=[2])]
    values = voc_average_precision(predictions, targets)
    assert isinstance(values, pandas.Series) and values.index.name == "class" and values.name == "AP"
    expected = pandas.Series({1: 1.0, 2: 0.5, 3: 0.0, 4: math.nan})
    pandas.testing.assert_series_equal(values, expected, check_names=False)
    assert mean_average_precision(predictions, targets) == pytest.approx(0.5)
    named = voc_average_precision(predictions, targets, classes=("disc", "square", "star", "cross", "cone"))
    assert list(named.index) == ["disc", "square", "star", "cross", "cone"]
    assert named["square"] == 0.5 and named[["cross", "cone"]].isna().all()


def test_difficult_objects_are_neither_asked_for_nor_held_against_a_detector():
    # A is difficult: both detections on it (0.9, 0.8) are left out. Then a miss (0.7) and B (0.6): precision 1/2.
    predictions, targets = [found(A, A, FAR, B)], [truth(A, B, difficult=[True, False])]
    assert both_rules(predictions, targets) == pytest.approx((0.5, 0.5))
    # As an ordinary object: hits 1 0 0 1 of two, as in the first case.
    assert both_rules(predictions, [truth(A, B)]) == pytest.approx((8.5 / 11, 0.75))
    # Nothing but difficult objects: the class cannot be judged.
    assert all(map(math.isnan, both_rules(predictions, [truth(A, difficult=[True])])))


def test_a_detection_goes_to_the_object_it_overlaps_most_even_if_that_one_is_taken():
    # The second detection (0, 1, 10, 11) overlaps A = (0, 0, 10, 10) by 90/110 and C = (0, 4, 10, 14) by 70/130 > 0.5.
    # A is taken by the first: the devkit counts the second as false and does not pass it on to C. Recall 1/2 at 1: 6/11.
    predictions, targets = [found(A, [0, 1, 10, 11])], [truth(A, [0, 4, 10, 14])]
    assert both_rules(predictions, targets) == pytest.approx((6 / 11, 0.5))
    # COCO passes it on: both objects are found at IoU 0.5.
    assert coco_metrics(predictions, targets)["AP50"] == pytest.approx(1)


def test_of_objects_overlapped_equally_the_first_is_meant():
    # (5, 0, 15, 10) overlaps A and (10, 0, 20, 10) by 50/150 each. On a difficult object it is left out.
    predictions, pair = [found([5, 0, 15, 10])], [A, [10, 0, 20, 10]]
    assert both_rules(predictions, [truth(*pair, difficult=[False, True])], iou=0.25) == (1, 1)
    assert both_rules(predictions, [truth(*pair, difficult=[True, False])], iou=0.25) == (0, 0)


def test_the_threshold_itself_is_a_match():
    # (0, 0, 10, 5) lies in A: 50/100.
    predictions, targets = [found([0, 0, 10, 5])], [truth(A)]
    assert both_rules(predictions, targets, iou=0.5) == (1, 1)
    assert both_rules(predictions, targets, iou=0.51) == (0, 0)


def test_equal_scores_keep_their_order():
    # Miss before hit: precision 1/2; hit before miss: 1. Also over images, in the order given.
    tie = [0.5, 0.5]
    assert both_rules([found(FAR, A, scores=tie)], [truth(A)]) == (0.5, 0.5)
    assert both_rules([found(A, FAR, scores=tie)], [truth(A)]) == (1, 1)
    images = [found(FAR, scores=[0.5]), found(A, scores=[0.5])], [truth(), truth(A)]
    assert both_rules(*images) == (0.5, 0.5)
    assert both_rules(*(part[::-1] for part in images)) == (1, 1)


def test_the_devkits_pixel_is_counted_in_by_the_reader_or_on_request():
    # VOC's boxes (1, 1, 10, 10) and (1, 1, 10, 5) are 10×10 and 10×5 pixels: 50/100 with the devkit's + 1.
    # Without it they would be 9×9 and 9×4: 36/81 < 0.5.
    whole, half = [1, 1, 10, 10], [1, 1, 10, 5]
    assert both_rules([found(half)], [truth(whole)]) == (0, 0)
    assert both_rules([found(half)], [truth(whole)], inclusive=True) == (1, 1)
    assert mean_average_precision([found(half)], [truth(whole)], inclusive=True) == 1
    # As edges (x0 − 1, y0 − 1, x1, y1), which is what the VOC reader gives, no option is needed.
    assert both_rules([found([0, 0, 10, 5])], [truth([0, 0, 10, 10])]) == (1, 1)


def test_crowds_excuse_detections():
    # The crowd is treated as difficult by VOC's rule: a detection on it is left out, A alone is asked for.
    crowd = [40, 0, 80, 40]
    predictions, targets = [found(crowd, crowd, A)], [truth(A, crowd, iscrowd=[0, 1])]
    assert both_rules(predictions, targets) == (1, 1)
    assert coco_metrics(predictions, targets)["AP"] == pytest.approx(1)
    # As one ordinary object: hits 1 0 1 of two, so 1 up to recall 1/2, then 2/3: (6 + 5 · 2/3)/11.
    assert both_rules(predictions, [truth(A, crowd)])[0] == pytest.approx((6 + 10 / 3) / 11)
    # COCO excuses whatever lies inside a crowd, however small; VOC's rule measures IoU and counts it as false.
    inside = [found([50, 10, 60, 20], A)]
    assert coco_metrics(inside, targets)["AP"] == pytest.approx(1)
    assert both_rules(inside, targets) == (0.5, 0.5)


# --- nothing there ---


def test_no_detections():
    assert both_rules([found()], [truth(A)]) == (0, 0)
    metrics = coco_metrics([found()], [truth(A)])
    assert metrics["AP"] == metrics["AR100"] == metrics["APs"] == 0
    assert math.isnan(metrics["APl"])


def test_no_ground_truth():
    assert all(map(math.isnan, both_rules([found(A)], [truth()])))
    assert math.isnan(mean_average_precision([found(A)], [truth()]))
    metrics = coco_metrics([found(A)], [truth()])
    assert tuple(metrics) == COCO_KEYS and all(map(math.isnan, metrics.values()))


def test_nothing_at_all():
    assert voc_average_precision([], []).empty
    assert voc_average_precision([found()], [truth()]).empty
    assert voc_average_precision([], [], classes=("disc",)).isna().all()
    assert math.isnan(mean_average_precision([], []))
    assert all(map(math.isnan, coco_metrics([], []).values()))


def test_empty_images_change_no_recall_but_their_detections_count():
    # A is found (0.5) below a detection in an image without objects (0.9): precision 1/2.
    predictions, targets = [found(FAR), found(A, scores=[0.5]), found()], [truth(), truth(A), truth()]
    assert both_rules(predictions, targets) == (0.5, 0.5)
    assert coco_metrics(predictions, targets)["AP50"] == pytest.approx(0.5)
    assert both_rules(predictions[1:], targets[1:]) == (1, 1)
    # Tensors without a shape to speak of are how many a detector says "nothing".
    bare = {"boxes": torch.tensor([]), "labels": torch.tensor([]), "scores": torch.tensor([])}
    assert both_rules([bare, predictions[1]], [truth(), truth(A)]) == (1, 1)


def test_a_detection_without_area_overlaps_nothing():
    assert both_rules([found([5, 5, 5, 5], [0, 0, 10, 0], A)], [truth(A)]) == pytest.approx((1 / 3, 1 / 3))
    assert both_rules([found([5, 5, 5, 5])], [truth([5, 5, 5, 5])]) == (0, 0)


# --- COCO by hand ---


def test_coco_averages_over_ten_thresholds():
    # (0, 0, 100, 82) in (0, 0, 100, 100) has an IoU of 0.82: found at 0.50, 0.55, ..., 0.80, seven of ten.
    # 100² pixels are large (more than 96²); there is no small and no medium object.
    metrics = coco_metrics([found([0, 0, 100, 82])], [truth([0, 0, 100, 100])])
    assert tuple(metrics) == COCO_KEYS
    for name in ("AP", "APl", "AR1", "AR10", "AR100", "ARl"):
        assert metrics[name] == pytest.approx(0.7), name
    assert metrics["AP50"] == metrics["AP75"] == pytest.approx(1)
    assert all(math.isnan(metrics[name]) for name in ("APs", "APm", "ARs", "ARm"))
    assert all(type(value) is float for value in metrics.values())


def test_coco_sizes_are_by_the_given_area():
    boxes = [0, 0, 20, 20], [50, 0, 100, 50]  # 400 pixels, small; 2,500, medium
    metrics = coco_metrics([found(boxes[0])], [truth(*boxes)])
    assert metrics["APs"] == pytest.approx(1) and metrics["APm"] == 0
    # The mask of the second is said to cover 500 pixels: both are small, and one of them is found.
    metrics = coco_metrics([found(boxes[0])], [truth(*boxes, area=[400.0, 500.0])])
    assert metrics["ARs"] == pytest.approx(0.5) and math.isnan(metrics["APm"])


def test_coco_recall_by_number_of_detections():
    # Two objects of one class in one image: with one detection an image, half of them can be found.
    metrics = coco_metrics([found(A, B)], [truth(A, B)])
    assert (metrics["AR1"], metrics["AR10"], metrics["AR100"]) == pytest.approx((0.5, 1, 1))


def test_coco_has_no_difficult_objects_and_no_opinion_on_absent_classes():
    targets = [truth(A, B, difficult=[True, False])]
    assert coco_metrics([found(A)], targets)["AR100"] == pytest.approx(0.5)
    # Class 2 is not in the truth: its detections are in no mean.
    with_other = [found(A, A, scores=[0.9, 0.95], labels=[1, 2])]
    assert coco_metrics(with_other, targets) == pytest.approx(coco_metrics([found(A)], targets), nan_ok=True)


def test_coco_is_quiet_and_leaves_its_inputs_alone(capsys):
    predictions, targets = [found(A, B)], [truth(A, labels=[7])]
    before = {name: value.clone() for name, value in predictions[0].items()}
    coco_metrics(predictions, targets)
    assert capsys.readouterr() == ("", "")
    assert all(torch.equal(before[name], predictions[0][name]) for name in before)


# --- twins ---

coordinate = st.integers(0, 12)
box = st.tuples(coordinate, coordinate, st.integers(0, 8), st.integers(0, 8)).map(
    lambda it: [it[0], it[1], it[0] + it[2], it[1] + it[3]]
)
label = st.integers(1, 2)
objects = st.lists(st.tuples(box, label, st.booleans()), max_size=5)
detections = st.lists(st.tuples(box, label, st.sampled_from([0.1, 0.25, 0.5, 0.75])), max_size=8)


def loop(predictions, targets, wanted, threshold, rule, pixel):
    """AP of one class, step by step as the devkit's description has it, in fractions."""

    def overlap(one, other):
        width = min(one[2], other[2]) - max(one[0], other[0]) + pixel
        height = min(one[3], other[3]) - max(one[1], other[1]) + pixel
        if width <= 0 or height <= 0:
            return Fraction(0)
        areas = [(it[2] - it[0] + pixel) * (it[3] - it[1] + pixel) for it in (one, other)]
        return Fraction(width * height, sum(areas) - width * height)

    ranked = []
    for image, entry in enumerate(predictions):
        for shape, kind, score in entry:
            if kind == wanted:
                ranked.append((score, image, shape))
    ranked = sorted(ranked, key=lambda it: -it[0])
    positives = sum(kind == wanted and not hard for entry in targets for _, kind, hard in entry)
    if not positives:
        return math.nan
    taken, hits, misses, curve = set(), 0, 0, []
    for _, image, shape in ranked:
        best, which = Fraction(-1), None
        for number, (other, kind, _) in enumerate(targets[image]):
            if kind == wanted and overlap(shape, other) > best:
                best, which = overlap(shape, other), number
        if which is not None and best >= threshold:
            if targets[image][which][2]:
                continue
            if (image, which) in taken:
                misses += 1
            else:
                taken.add((image, which))
                hits += 1
        else:
            misses += 1
        curve.append((Fraction(hits, positives), Fraction(hits, hits + misses)))

    def precision_at(recall):
        return max((precision for reached, precision in curve if reached >= recall), default=Fraction(0))

    if rule == "11-point":
        return float(sum(precision_at(Fraction(step, 10)) for step in range(11)) / 11)
    return float(sum(precision_at(Fraction(step, positives)) for step in range(1, positives + 1)) / positives)


@given(
    images=st.lists(st.tuples(detections, objects), max_size=4),
    threshold=st.sampled_from([Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)]),
    inclusive=st.booleans(),
)
def test_voc_is_a_loop_over_the_definition(images, threshold, inclusive):
    predictions = [
        found(*(it[0] for it in seen), scores=[it[2] for it in seen], labels=[it[1] for it in seen])
        for seen, _ in images
    ]
    targets = [
        truth(*(it[0] for it in there), labels=[it[1] for it in there], difficult=[it[2] for it in there])
        for _, there in images
    ]
    for rule in ("11-point", "all-point"):
        values = voc_average_precision(
            predictions, targets, float(threshold), rule, classes=("one", "two"), inclusive=inclusive
        )
        seen, there = [it[0] for it in images], [it[1] for it in images]
        expected = [loop(seen, there, kind, threshold, rule, int(inclusive)) for kind in (1, 2)]
        assert values.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)


cell_and_rank = st.tuples(st.integers(0, 9), st.integers(1, 20))


@given(st.lists(st.tuples(st.integers(1, 6), st.lists(cell_and_rank, max_size=12)), min_size=1, max_size=3))
def test_coco_at_half_and_vocs_area_agree_where_objects_lie_apart(images):
    """They differ by COCO's 101 points only: less than one of them."""
    cells = [[30 * column, 0, 30 * column + 20, 20] for column in range(10)]
    targets = [truth(*cells[:count]) for count, _ in images]
    predictions = [found(*(cells[it] for it, _ in seen), scores=[rank / 20 for _, rank in seen]) for _, seen in images]
    area = mean_average_precision(predictions, targets, rule="all-point")
    assert coco_metrics(predictions, targets)["AP50"] == pytest.approx(area, abs=1 / 101 + 1e-9)


# --- mistakes ---


@pytest.mark.parametrize("measure", [voc_average_precision, mean_average_precision, coco_metrics])
@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([found(A)], [], r"predictions \(1\) and targets \(0\) must have one entry for each image"),
        ([truth(A)], [truth(A)], r"predictions\[0\] has no 'scores'; needed: boxes, labels, scores"),
        ([found(A)], [{"boxes": torch.zeros(1, 4)}], r"targets\[0\] has no 'labels'; needed: boxes, labels"),
        ([(A,)], [truth(A)], r"predictions\[0\] must be a dict of tensors, not tuple"),
        (
            [found(), {**found(A), "boxes": torch.zeros(1, 5)}],
            [truth(), truth()],
            r"predictions\[1\]\['boxes'\] must have shape \[N, 4\], not \[1, 5\]",
        ),
        (
            [{**found(A), "scores": torch.rand(2)}],
            [truth()],
            r"predictions\[0\]\['scores'\] must have shape \[1\], one for each box, not \[2\]",
        ),
        ([found()], [truth(A, difficult=[True, False])], r"targets\[0\]\['difficult'\] must have shape \[1\]"),
        ([found()], [{**truth(A), "labels": torch.rand(1)}], r"\['labels'\] must be whole numbers, not torch.float32"),
        ([found(A, scores=[math.nan])], [truth(A)], r"predictions\[0\]\['scores'\] holds a number that is not finite"),
        ([found([0, 0, math.inf, 1])], [truth(A)], r"predictions\[0\]\['boxes'\] holds a number that is not finite"),
        ([found(A)], [truth()], None),
        (
            [found()],
            [truth([30, 40, 10, 10])],
            r"targets\[0\]\['boxes'\] holds \(30, 40, 10, 10\); a box is \(x0, y0, x1, y1\), x1 ≥ x0, y1 ≥ y0",
        ),
    ],
)
def test_mistakes_get_one_line(measure, predictions, targets, message):
    if message is None:  # the control: these are well-formed
        measure(predictions, targets)
        return
    with pytest.raises(rp.UsageError, match=message) as error:
        measure(predictions, targets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "12-point"}, r"rule \(='12-point'\) is unknown; accepted: 11-point, all-point; nearest: 11-point$"),
        ({"iou": 0}, r"iou \(=0\) must be above 0 and at most 1"),
        ({"iou": 50}, r"iou \(=50\) must be above 0 and at most 1"),
        ({"classes": ("disc",)}, r"label \(=2\) has no name in classes; accepted: 1 to 1"),
    ],
)
def test_mistaken_options_get_one_line(options, message):
    with pytest.raises(rp.UsageError, match=message):
        voc_average_precision([found(A, labels=[2])], [truth(A)], **options)


def test_the_package_is_cheap_to_import():
    heavy = "{'torch', 'torchvision', 'pycocotools', 'pandas', 'numpy'}"
    code = (
        f"import sys, plugins.detection as it; assert not {heavy} & set(sys.modules); assert 'coco_metrics' in dir(it)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
