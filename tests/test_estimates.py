"""Estimates: what is there, what is to be trained, and how long that takes, before anything is trained."""

import dataclasses
import re
import time

import pytest
import tiny
import torch
from torch import nn

import resprobe as rp
from resprobe import estimates, sweep
from resprobe.estimates import Cost, costs
from resprobe.networks import resolve
from resprobe.runs import configure
from resprobe.sweep import Job, Survey, run_all, survey
from resprobe.words import duration
from studies import constructed_solution, degradation

CPU = torch.device("cpu")


def job(depth: int, seed: int = 0, iterations: int = 8, **options) -> Job:
    recipe = rp.default_recipe(rp.load_data("digits"), iterations)
    return Job(configure(f"cifar/resnet-{depth}", "digits", recipe, seed=seed, width=4, **options))


def test_a_training_is_its_steps_its_tests_and_its_end():
    data, recipe = tiny.digits(train=100, test=50), tiny.recipe(iterations=12, evaluations=2)
    cost = Cost(step=10.0, test=0.5)
    assert cost.of_training(data, recipe) == 12 * 10 + 0.5 * (2 * 50 + 2 * (50 + 100))
    assert cost.of_training(data, recipe, done=6) == 6 * 10 + 0.5 * (1 * 50 + 2 * (50 + 100))


def test_only_the_shallowest_and_the_deepest_of_a_kind_are_timed(monkeypatch):
    timed = []

    def clock(spec, *others):
        timed.append(spec.name)
        return Cost(float(spec.depth), spec.depth / 10)

    monkeypatch.setattr(estimates, "_timed", clock)
    recipe, data = tiny.recipe(), tiny.digits()
    asked = [(resolve(f"cifar/{kind}-{depth}"), recipe) for kind in ("plain", "resnet") for depth in (8, 56, 20, 8)]
    found = costs(asked, data, device=CPU, precision="fp32", threads=1)
    assert timed == ["cifar/plain-8", "cifar/plain-56", "cifar/resnet-8", "cifar/resnet-56"]
    assert [cost.step for cost in found] == [8, 56, 20, 8] * 2
    assert found[2].test == pytest.approx(2.0)


@pytest.mark.usefixtures("clean_registries")
def test_random_numbers_are_as_if_nothing_was_timed():
    @rp.register_block("noisy")
    class Noisy(rp.BLOCKS["basic"]):
        def make_activation(self):
            return nn.Dropout(0.5)

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    costs(
        [(resolve("cifar/resnet-8", block="noisy", in_channels=1, width=4), tiny.recipe())],
        tiny.digits(),
        device=CPU,
        precision="fp32",
        threads=1,
    )
    assert torch.equal(torch.rand(2), expected)


def test_the_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    asked = [(job(8).config.network, tiny.recipe())]
    costs(asked, tiny.digits(), device=CPU, precision="fp32", threads=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("changes", [{}, {"bn_batch": 8}])
def test_the_estimate_is_near_what_it_takes(changes):
    recipe = tiny.recipe(iterations=40, milestones=(), batch_size=64, evaluations=4, **changes)
    data = tiny.digits(train=640, test=300)
    with tiny.one_thread():
        network = tiny.network(width=8)
        (cost,) = costs([(network.spec, recipe)], data, device=CPU, precision="fp32", threads=1)
        warm = tiny.training(tiny.network(width=8), data, iterations=1, milestones=())
        warm.run()  # what is imported at a first step is no part of it
        training = rp.training.Training(network, data, recipe, device=CPU)
        started = time.perf_counter()
        training.run()
        training.finish()
    taken = time.perf_counter() - started
    assert taken / 4 < cost.of_training(data, recipe) < taken * 4


def test_files_are_counted_as_long_as_they_take_to_read(tmp_path, monkeypatch):
    from PIL import Image

    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (80, 90), (index, 0, 0)).save(tmp_path / part / name / f"{index}.png")
    data = rp.load_data(f"folder:{tmp_path}")
    recipe = dataclasses.replace(rp.default_recipe(data, 4), crop=64, scale=(70, 80), batch_size=8)
    spec = resolve("cifar/resnet-8", width=4, num_classes=2)
    monkeypatch.setattr(estimates, "_reading", lambda *_: 100.0)
    (cost,) = costs([(spec, recipe)], data, device=CPU, precision="fp32", threads=1)
    assert (cost.step, cost.test) == (800.0, 100.0)
    monkeypatch.undo()
    (cost,) = costs([(spec, recipe)], data, device=CPU, precision="fp32", threads=1)
    assert 0 < cost.test < 1


def test_a_survey_tells_found_begun_and_missing(tmp_path):
    store, asked = rp.RunStore(tmp_path), [job(8), job(14), job(20)]
    run_all(asked[:1], store, device=CPU)
    folder = store.folder(asked[1].config)
    folder.mkdir()
    (folder / "checkpoint.pt").touch()
    (folder / "history.unfinished.csv").write_text("iteration,train_error\n2,50.0\n4,40.0\n")
    assert store.iterations_done(asked[1].config) == 4
    found = survey(asked, store, device=CPU, concurrency=1)
    assert [each.config.network.depth for each in found.missing] == [20, 14]
    assert (found.total, found.found, found.begun) == (3, 1, 1)
    # How long a step takes beside other work on the same cores is anybody's guess.
    assert found.duration == pytest.approx(sum(found.seconds)) and min(found.seconds) > 0
    first, second, third = str(found).splitlines()
    assert first == "3 runs: 1 finished already, 2 to train (1 of them begun)"
    assert second == "to train: cifar/resnet-20, cifar/resnet-14"
    assert third.startswith("time: about ")
    assert survey(asked[:1], store, device=CPU).duration == 0
    assert str(survey(asked[:1], store, device=CPU)) == "1 run: 1 finished already, nothing to train"


def test_several_at_a_time_end_when_the_last_does():
    jobs = (job(26), job(20), job(8))
    ahead = Survey(3, jobs, 0, 2, 1, "cpu", (30.0, 20.0, 15.0))
    assert ahead.duration == 35.0
    assert "time: about 35 s on cpu, 2 at a time" in str(ahead)


def test_several_at_a_time_on_one_card_take_turns_at_worst():
    ahead = Survey(3, (job(26), job(20), job(8)), 0, 2, 1, "a card", (30.0, 20.0, 15.0), one_card=True)
    assert ahead.duration == 65.0
    assert "time: at most about 65 s on a card, 2 at a time" in str(ahead)
    assert "time: about 65 s on a card" in str(dataclasses.replace(ahead, workers=1))


def test_what_cannot_be_timed_says_why(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory:\n 3 GiB")

    monkeypatch.setattr(sweep, "costs", fails)
    ahead = survey([job(8)], rp.RunStore(tmp_path), device=CPU)
    assert ahead.duration is None
    assert re.search(r"time: not known: out of memory: 3 GiB \(test_estimates.py, line \d+\) on ", str(ahead))


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.1, "1 s"), (99, "99 s"), (130, "2 min"), (5000, "83 min"), (7200, "2.0 h")]
)
def test_durations_in_words(seconds, said):
    assert duration(seconds) == said


def test_a_dry_run_trains_nothing_and_writes_no_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--depths", "8", "14", "--seeds", "0", "1", "--iterations", "4"]
    assert degradation.study.main([*small, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("8 runs: 0 finished already, 8 to train\nto train: cifar/plain-14 ×2, ")
    assert "report:" not in said
    assert not list(tmp_path.rglob("*.json"))


def test_a_dry_run_of_two_rounds_says_that_a_second_follows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert constructed_solution.study.main(["--seeds", "0", "--iterations", "4", "--dry-run"]) == 0
    assert "a second round of training follows" in capsys.readouterr().out
