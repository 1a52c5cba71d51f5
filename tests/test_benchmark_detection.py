"""The detection benchmark: both detectors get the same work, and shares and ratios are of what was timed."""

import json

import pytest
import torch

from benchmarks import detection

CPU = torch.device("cpu")


def test_both_detectors_take_the_same_batch():
    images, targets = detection.batch(2, 64, CPU)
    assert [image.shape for image in images] == [(3, 64, 64)] * 2
    for target in targets:
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"]) == 4
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 64
    for model in detection.subjects("imagenet/resnet-18", 64, CPU).values():
        losses = model.train()(images, targets)
        assert all(torch.isfinite(loss) for loss in losses.values())


def test_the_shares_are_of_the_whole(monkeypatch):
    clock = iter(float(tick) for tick in range(1000))
    monkeypatch.setattr(detection, "_now", lambda device: next(clock))
    monkeypatch.setattr(detection, "seconds", lambda work, device: (work(), 16.0)[1])

    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in detection.PARTS:
                setattr(self, name, torch.nn.Identity())

        def forward(self, x):
            for name in detection.PARTS:
                x = getattr(self, name)(x)
            return x

    model = Parts()
    found = detection.shares(model, torch.ones(1), CPU, 2)  # each part takes a tick in each of two passes
    assert found == dict.fromkeys(detection.PARTS, 2 / 16)
    assert not any(part._forward_hooks for part in model.children())


@pytest.mark.slow
def test_it_prints_ratios_and_writes_what_was_measured(tmp_path, capsys):
    out = tmp_path / "detection.json"
    arguments = [
        "--backbone",
        "imagenet/resnet-18",
        "--side",
        "64",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert detection.main(arguments) == 0
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    for title in ("inference", "training step"):
        (one,) = record[title]["seconds"]
        ratio = one["ours"] / one["torchvision"]
        assert record[title]["ours over torchvision"]["median"] == pytest.approx(ratio)
        assert f"time, ours over torchvision: {ratio:.2f}" in said
    assert 0.5 < sum(record["shares"].values()) <= 1.01
