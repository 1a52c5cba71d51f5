"""Detectors are trained: what they see, that a resumed run is the unbroken one, and how they are found again."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import resprobe as rp
from plugins.detection import draw_shapes, faster_rcnn, load_detection, training
from plugins.detection.recipes import DetectionRecipe, coco_paper, shapes_quick, voc_paper
from plugins.detection.training import batch_choices, score, train_detector, training_batch
from resprobe import keeping

RECIPE = DetectionRecipe("tiny", 6, batch_size=2, learning_rate=0.01, milestones=(4,), window=2, evaluations=2)
SMALL = {
    "shorter_side": 48,
    "longer_side": 48,
    "anchor_sizes": (8, 16),
    "anchor_ratios": (1.0,),
    "proposals_train": 30,
    "proposals_test": 10,
    "candidates_train": 100,
    "candidates_test": 50,
    "rpn_batch": 16,
    "roi_batch": 8,
    "roi_size": 4,
    "bn": "trained",
}


@pytest.fixture(autouse=True)
def _alike():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def data():
    return draw_shapes(48, 7, 3)


def network(seed=0, **options):
    return tiny.network(seed=seed, in_channels=3, num_classes=5, **options)


def train(data, recipe=RECIPE, net=None, **options):
    options = {"device": "cpu", "progress": False} | SMALL | options
    return train_detector(net or network(), data, recipe, **options)


def test_the_papers_schedules():
    voc, coco = voc_paper(), coco_paper()
    assert (voc.iterations, voc.batch_size, voc.momentum, voc.weight_decay, voc.flip) == (110_000, 1, 0.9, 5e-4, 0.5)
    assert [voc.rate(iteration) for iteration in (0, 79_999, 80_000)] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert (coco.iterations, coco.batch_size) == (320_000, 8)
    assert [coco.rate(iteration) for iteration in (239_999, 240_000)] == pytest.approx([1e-3, 1e-4])
    short = voc_paper(1100)
    assert (short.iterations, short.milestones) == (1100, (800,))


def test_a_recipe_survives_json_and_its_name_is_no_part_of_it():
    recipe = shapes_quick()
    assert DetectionRecipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
    assert replace(recipe, name="other").identity() == recipe.identity()
    assert replace(recipe, flip=0.0).identity() != recipe.identity()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, r"iterations \(=0\) must be a whole number ≥ 1"),
        ({"flip": 1.5}, r"flip \(=1.5\) must be a number ≥ 0 and ≤ 1"),
        ({"learning_rate": 0.0}, r"learning_rate \(=0.0\) must be a number > 0"),
        ({"milestones": (4, 2)}, r"milestones \(=\(4, 2\)\) must rise"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_clear_line(wrong, message):
    with pytest.raises(rp.UsageError, match=message):
        replace(RECIPE, **wrong)


def test_every_image_is_seen_once_an_epoch_and_half_are_flipped():
    recipe = replace(RECIPE, batch_size=3)
    seen = [choice for iteration in range(700) for choice in batch_choices(7, recipe, 0, iteration)]
    for epoch in range(300):
        assert sorted(index for index, _ in seen[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert 0.45 < sum(flipped for _, flipped in seen) / len(seen) < 0.55
    assert batch_choices(7, recipe, 0, 5) == seen[15:18]  # whatever came before
    assert batch_choices(7, recipe, 1, 5) != seen[15:18]


def test_flipped_images_keep_their_boxes_and_difficult_objects_are_left_out(data):
    always, never = replace(RECIPE, flip=1.0), replace(RECIPE, flip=0.0)
    (mirrored, _), (moved, *_) = training_batch(data.train, always, 0, 0)
    (image, _), (target, *_) = training_batch(data.train, never, 0, 0)
    assert torch.equal(mirrored, image.flip(-1)) and image.min() >= 0 and image.max() <= 1
    assert moved["boxes"][:, 0].tolist() == (48 - target["boxes"][:, 2]).tolist()
    part = data.train.select(range(1))
    part.targets[0]["difficult"][0] = True
    (only,) = training_batch(part, replace(never, batch_size=1), 0, 0)[1]
    assert len(only["boxes"]) == len(part.targets[0]["boxes"]) - 1
    part.targets[0]["iscrowd"][1] = 1  # nor are crowds learned, of which a box holds many
    (only,) = training_batch(part, replace(never, batch_size=1), 0, 0)[1]
    assert len(only["boxes"]) == len(part.targets[0]["boxes"]) - 2


class Killed(BaseException):
    pass


def test_a_resumed_run_ends_in_the_same_bits(data, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0.0)
    whole = train(data, runs=tmp_path / "whole")

    def kill(row):
        if row["iteration"] == 4:
            raise Killed

    with pytest.raises(Killed):
        train(data, runs=tmp_path / "broken", progress=kill)
    torch.manual_seed(99)  # global random numbers are no part of it
    rows = []
    resumed = train(data, runs=tmp_path / "broken", progress=rows.append)
    assert [row["iteration"] for row in rows] == [4, 6]  # from iteration 3, between two log points
    tiny.assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    tiny.assert_same(whole.metrics, resumed.metrics)
    tiny.assert_same(whole.history.to_dict("list"), resumed.history.to_dict("list"))
    assert not list((tmp_path / "broken").rglob("checkpoint*"))


def test_a_finished_run_is_found_by_what_it_is(data, tmp_path):
    made = train(data, runs=tmp_path)
    assert json.loads((made.path / "result.json").read_text())["metrics"].keys() == made.metrics.keys()
    assert len(json.loads((made.path / "detections.json").read_text())) == len(data.test)
    rows = []
    again = train(data, replace(RECIPE, name="renamed"), runs=tmp_path, progress=rows.append)
    assert rows == [] and again.path == made.path
    tiny.assert_same(dict(made.model.state_dict()), dict(again.model.state_dict()))
    tiny.assert_same(made.history.to_dict("list"), again.history.to_dict("list"))
    keys = {made.config.key}
    for changed in ({"seed": 1}, {"net": network(seed=1)}, {"roi": "align"}, {"recipe": replace(RECIPE, flip=0.0)}):
        keys.add(train(data, **{"recipe": replace(RECIPE, iterations=1, milestones=()), **changed}).config.key)
    assert len(keys) == 5


def test_a_backbone_with_tied_weights_is_kept_and_found(data, tmp_path):
    """A highway block's two gates are one weight, and the file's format refuses tensors that share memory."""
    recipe = replace(RECIPE, iterations=1, milestones=())
    made = train(data, recipe, network(shortcut="highway"), runs=tmp_path)
    weights = dict(made.model.state_dict())
    assert len({value.data_ptr() for value in weights.values()}) < len(weights)
    rows = []
    again = train(data, recipe, network(shortcut="highway"), runs=tmp_path, progress=rows.append)
    assert rows == [] and again.path == made.path
    tiny.assert_same(weights, dict(again.model.state_dict()))


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b"\x00" * 100), Path.unlink], ids=["zeros", "missing"]
)
def test_damaged_weights_are_named_with_what_to_do(data, tmp_path, damage):
    recipe = replace(RECIPE, iterations=1, milestones=())
    damage(train(data, recipe, runs=tmp_path).path / "detector.safetensors")
    said = r"^the weights in .*seed0\S+ are missing or damaged \(.+\); delete that folder and the run is made again$"
    with pytest.raises(rp.UsageError, match=said):
        train(data, recipe, runs=tmp_path)


def test_the_history_and_the_weights(data):
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    run = train(data, net=net)
    assert run.history["iteration"].tolist() == [0, 2, 3, 4, 6]
    assert run.history["mAP"].notna().tolist() == [True, False, True, False, True]
    assert run.history["learning_rate"].tolist() == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.001])
    parts = run.history[list(training.LOSSES)].sum(axis=1)
    assert run.history["loss"].iloc[1:].tolist() == pytest.approx(parts.iloc[1:].tolist())
    assert run.history["mAP"].iloc[-1] == run.metrics["mAP"]
    tiny.assert_same(before, dict(net.state_dict()))  # the backbone that was given is left as it is
    first = next(iter(run.model.backbone.parameters()))
    assert not torch.equal(first, next(iter(net.parameters())))


def test_a_detector_learns_to_find_what_it_was_shown():
    """Four images learned by heart: the loss falls and the mAP rises by a wide margin."""
    few = draw_shapes(48, 4, 1)
    few = replace(few, test=few.train)
    recipe = replace(RECIPE, iterations=120, learning_rate=0.05, milestones=(100,), flip=0.0, window=10, evaluations=1)
    run = train(few, recipe, roi_batch=32, rpn_batch=32)
    first, last = run.history["mAP"].iloc[[0, -1]]
    assert run.history["loss"].iloc[-1] < 0.8 * run.history["loss"].iloc[1]
    assert last > first + 10


def test_perfect_predictions_score_a_hundred_percent(data):
    perfect = [
        {"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))} for t in data.test.targets
    ]
    found = score(perfect, data.test)
    assert found["mAP"] == found["mAP all-point"] == found["COCO AP50"] == pytest.approx(100)
    label = int(data.test.targets[0]["labels"][0])
    assert found[f"AP {data.classes[label - 1]}"] == pytest.approx(100)


def test_mean_ap_is_of_eleven_points_and_the_other_is_said_to_be_all_point(data):
    """VOC 07's rule, by which Table 7 is: the case of test_detection_metrics that tells the two apart."""
    boxes = torch.tensor([[0, 0, 10, 10], [20, 0, 30, 10], [60, 60, 70, 70]]).float()
    target = {
        "boxes": boxes[:2],
        "labels": torch.ones(2, dtype=torch.long),
        "difficult": torch.zeros(2, dtype=torch.bool),
        "iscrowd": torch.zeros(2, dtype=torch.long),
        "area": torch.full((2,), 100.0),
    }
    part = replace(data.test.select(range(1)), targets=(data.test.targets[0] | target,))
    seen = [0, 2, 0, 1]
    prediction = {
        "boxes": boxes[seen],
        "labels": torch.ones(4, dtype=torch.long),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
    }
    found = score([prediction], part)
    name = data.classes[0]
    assert found[f"AP {name}"] == pytest.approx(100 * 8.5 / 11)
    assert found[f"AP {name} all-point"] == pytest.approx(75)


def test_the_rate_falls_and_weights_decay(data):
    """The parameters themselves, not what the history says of the rate."""
    still = replace(RECIPE, iterations=1, milestones=(), momentum=0.0, weight_decay=0.0)
    first = dict(train(data, still).model.named_parameters())
    stopped = dict(train(data, replace(still, iterations=3, milestones=(1,), decay=1e12)).model.named_parameters())
    before = dict(training.begin(network(), data, still, 0, **SMALL)[1].named_parameters())
    decayed = dict(train(data, replace(still, weight_decay=1.0)).model.named_parameters())
    moved = 0
    for name, parameter in first.items():
        torch.testing.assert_close(stopped[name], parameter, rtol=0, atol=1e-6)
        torch.testing.assert_close(decayed[name], parameter - still.learning_rate * before[name], rtol=0, atol=1e-5)
        moved += not torch.equal(parameter, before[name])
    assert moved > len(first) / 2


def test_divergence_is_one_clear_line(data):
    with pytest.raises(
        rp.TrainingDiverged, match=r"cifar/resnet-8, seed 0: the loss stopped being finite between iterations \d"
    ):
        train(data, replace(RECIPE, learning_rate=1e12, milestones=()))


def test_mistakes_are_one_clear_line(data):
    with pytest.raises(rp.UsageError, match=r"seed \(=-1\)"):
        train(data, seed=-1)
    with pytest.raises(rp.UsageError, match=r"option of faster_rcnn \(='rio'\) is unknown"):
        train(data, rio="pool")
    with pytest.raises(rp.UsageError, match=r"detection data \(='cifar10'\) is unknown"):
        train("cifar10")


def test_an_image_without_objects_is_trained_on():
    data = load_detection(draw_shapes(48, 2, 1))
    empty = {name: value[:0] if value.ndim else value for name, value in data.train.targets[0].items()}
    data = replace(data, train=replace(data.train, targets=(empty, empty)))
    run = train(data, replace(RECIPE, iterations=2, milestones=()))
    assert run.history["loss"].iloc[1:].notna().all()
    assert run.history["loss_rpn_box_reg"].iloc[-1] == 0


def test_what_is_kept_for_the_backward_pass_is_counted_once(data):
    """Against a model of three tensors, and fixed normalization keeps less than one that trains."""

    class Squares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, images, targets):
            (image,) = images
            scaled = image * self.weight  # keeps the image; the weight is the module's own
            return {"loss": (scaled * scaled.view(10, 100).view(-1)).sum()}  # one tensor, kept as two views

    assert training.kept_for_backward(Squares(), [torch.ones(1000)], []) == 2 * 4000
    images, targets = training_batch(data.train, RECIPE, 0, 0)
    kept = {}
    for bn in ("frozen", "trained"):
        torch.manual_seed(0)
        model = faster_rcnn(network(), 6, **SMALL | {"bn": bn})
        kept[bn] = training.kept_for_backward(model, images, targets)
    assert 0 < kept["frozen"] < 0.9 * kept["trained"]


def test_blood_cells_are_trained_on(shared_data):
    """Real images in VOC's layout, two bad boxes among them, through the whole path."""
    cells = load_detection(f"voc:{shared_data}/detection/bccd/BCCD")
    few = replace(cells, test=cells.test.select(range(4)))
    net = tiny.network(in_channels=3, num_classes=3)
    run = train(few, replace(RECIPE, iterations=8, milestones=(), evaluations=1), net, longer_side=64)
    assert {name[3:] for name in run.metrics if name.startswith("AP ") and "all-point" not in name} == set(
        cells.classes
    )
    assert run.history["loss"].iloc[1:].notna().all()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"bn": "frozen", "context": True}], ids=str)
def test_on_cuda_a_detector_is_trained_as_on_the_cpu(data, options):
    """But for the boxes to learn from, which are drawn there by other numbers."""
    here, there = (train(data, replace(RECIPE, iterations=2), device=device, **options) for device in ("cpu", "cuda"))
    assert there.history["loss"].iloc[-1] == pytest.approx(here.history["loss"].iloc[-1], rel=0.3)
    assert not any(parameter.is_cuda for parameter in there.model.parameters())
