"""The benchmark of probes: every variant does its work, ratios are over the bare one."""

import argparse
import json
from functools import partial

import pytest
import tiny
import torch

from benchmarks import probes

CPU = torch.device("cpu")


@pytest.fixture
def subject():
    with tiny.one_thread():
        yield probes.subject(8, 4, CPU)


def test_variants_give_a_figure_a_layer(subject):
    network, images = subject
    layers = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    network.eval()
    with torch.no_grad():
        by_hook, by_captum = probes.with_std(network, images), probes.with_captum(network, images)
    assert len(by_hook) == len(by_captum) == layers
    for one, other in zip(by_hook, by_captum, strict=True):
        torch.testing.assert_close(one, other)
    assert tiny.hook_count(network) == 0


def test_every_round_times_every_variant(subject):
    network, images = subject
    passes = probes.forward_rounds(network, images, 2, "fp32")
    assert [list(each) for each in passes] == [["bare", "layer-responses", "std in a hook", "captum"]] * 2
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    steps = probes.step_rounds(network, images, 2, "fp32")
    assert [list(each) for each in steps] == [["bare", "gradient-norms", "layer-responses"]] * 2
    assert all(value > 0 for each in (*passes, *steps) for value in each.values())
    assert tiny.differ(before, dict(network.named_parameters()))  # the steps did train
    assert tiny.hook_count(network) == 0


def test_every_variant_is_first_in_turn():
    order: list[str] = []
    done = probes.in_turns({name: partial(order.append, name) for name in "abc"}, 3, CPU)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert [list(each) for each in done] == [["a", "b", "c"]] * 3


def test_ratios_are_over_the_bare_one(capsys):
    rounds = [{"bare": 2.0, "layer-responses": 3.0}, {"bare": 1.0, "layer-responses": 1.1}]
    found = probes.report("layer-responses: a forward pass", rounds, CPU)
    assert found["layer-responses"].high == 1.5
    assert "1.30 (1.10–1.50, n = 2)  1.26  target 1.35" in capsys.readouterr().out


def test_it_prints_ratios_and_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    asked = []

    def peaks(options: argparse.Namespace) -> dict[str, list[int]]:
        asked.append(options.depth)
        found = {
            name: [probes.peak_bytes(8, 2, CPU, "fp32", passes, probed)]
            for name, passes, probed in (("bare, 1 pass", 1, False), ("1 pass", 1, True))
        }
        return found

    monkeypatch.setattr(probes, "peaks", peaks)  # a process for each takes long
    monkeypatch.setattr(probes.flops, "count", lambda network, shape: asked.append(network.depth))
    out = tmp_path / "probes.json"
    assert probes.main(["--depth", "8", "--batch", "2", "--rounds", "1", "--device", "cpu", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert asked == [1202, 8]
    assert set(record["pass_over_bare"]) == {"layer-responses", "std in a hook", "captum"}
    assert set(record["step_over_bare"]) == {"gradient-norms", "layer-responses"}
    assert min(map(min, record["peak_bytes"].values())) > 2**20
    assert "gradient-norms: a training step" in capsys.readouterr().out
