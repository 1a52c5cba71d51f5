"""Recipes (§3.4, §4.2): the paper's numbers, and the learning rate as a pure function."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import resprobe as rp
from resprobe.recipes import (
    Recipe,
    cifar_paper,
    departures,
    digits_quick,
    imagenet_paper,
    learning_rate,
    parse_changes,
    plateaus,
    without_warm_up,
)


@st.composite
def recipes(draw) -> Recipe:
    iterations = draw(st.integers(1, 300))
    milestones = sorted(draw(st.lists(st.integers(0, iterations), max_size=4)))
    warm_up = draw(st.sampled_from([{}, {"warm_up_rate": 0.01}, {"warm_up_rate": 0.01, "warm_up_iterations": 20}]))
    return Recipe("drawn", iterations=iterations, milestones=tuple(milestones), **warm_up)


def falling_errors(length: int) -> list[float | None]:
    """The lowest running error by iteration: unknown at first, then from 90 % down."""
    return [None if iteration < 10 else 90 - 80 * iteration / length for iteration in range(length)]


def test_cifar_schedule_of_section_4_2():
    recipe = cifar_paper()
    rates = {iteration: learning_rate(recipe, iteration) for iteration in (0, 31_999, 32_000, 47_999, 48_000, 63_999)}
    assert rates == pytest.approx(
        {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}, rel=1e-12
    )
    assert (recipe.iterations, recipe.batch_size, recipe.momentum, recipe.weight_decay) == (64_000, 128, 0.9, 1e-4)
    assert (recipe.pad, recipe.flip, recipe.augmentation) == (4, 0.5, "pad-crop")
    assert (recipe.validation_fraction, recipe.nesterov) == (0.0, False)


def test_imagenet_recipe_of_section_3_4():
    recipe = imagenet_paper()
    assert (recipe.iterations, recipe.batch_size, recipe.learning_rate) == (600_000, 256, 0.1)
    assert (recipe.augmentation, recipe.scale, recipe.crop, recipe.colour) == ("scale-crop", (256, 480), 224, "pca")
    assert [learning_rate(recipe, 599_999, plateaus=count) for count in range(3)] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize("iterations", [600, 60_000, 600_000, 1_200_000])
def test_a_plateau_lasts_about_as_long_a_part_of_a_shortened_training(iterations):
    recipe = imagenet_paper(iterations)
    assert recipe.plateau / recipe.evaluations == pytest.approx(5 / 120, abs=0.01)
    assert recipe.evaluations <= recipe.iterations // recipe.window


@given(recipes())
def test_rate_is_piecewise_constant_and_never_rises_after_the_warm_up(recipe):
    errors = falling_errors(recipe.iterations)
    rates = [learning_rate(recipe, iteration, errors[iteration]) for iteration in range(recipe.iterations)]
    warm_up = [index for index, error in enumerate(errors) if error is None or error >= recipe.warm_up_until]
    if recipe.warm_up_rate is None:
        start = 0
    elif recipe.warm_up_iterations is not None:
        start = min(recipe.warm_up_iterations, recipe.iterations)
    else:
        start = min([len(warm_up), *recipe.milestones])
    assert rates[:start] == [recipe.warm_up_rate] * start
    after = rates[start:]
    assert after == sorted(after, reverse=True)
    changes = {start + index for index in range(1, len(after)) if after[index] != after[index - 1]}
    assert changes <= set(recipe.milestones)
    for iteration in range(start, recipe.iterations):
        passed = len([milestone for milestone in recipe.milestones if milestone <= iteration])
        assert rates[iteration] == pytest.approx(0.1 * 10.0**-passed)


@given(recipes(), st.randoms(use_true_random=False))
def test_rate_after_a_resume_is_the_rate_without_one(recipe, random):
    errors = falling_errors(recipe.iterations)
    in_order = [learning_rate(recipe, iteration, errors[iteration]) for iteration in range(recipe.iterations)]
    shuffled = random.sample(range(recipe.iterations), recipe.iterations)
    again = Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe))))  # as a checkpoint keeps it
    assert again == recipe
    assert {iteration: learning_rate(again, iteration, errors[iteration]) for iteration in shuffled} == dict(
        enumerate(in_order)
    )


def test_warm_up_lasts_until_the_error_is_below_80_percent():
    recipe = cifar_paper(depth=110)
    assert [learning_rate(recipe, 400, error) for error in (None, 90.0, 80.0, 79.9, 5.0)] == [
        0.01,
        0.01,
        0.01,
        0.1,
        0.1,
    ]


def test_a_network_that_learns_nothing_is_not_kept_from_the_schedule():
    recipe = cifar_paper(depth=110)
    rates = [learning_rate(recipe, iteration, 85.0) for iteration in (31_999, 32_000, 48_000)]
    assert rates == pytest.approx([0.01, 0.01, 0.001])


def test_warm_up_may_last_a_number_of_iterations_instead():
    recipe = dataclasses.replace(cifar_paper(depth=110), warm_up_iterations=400)
    assert [learning_rate(recipe, iteration, 5.0) for iteration in (0, 399)] == [0.01, 0.01]
    assert [learning_rate(recipe, iteration, None) for iteration in (400, 31_999)] == [0.1, 0.1]


@pytest.mark.parametrize(("depth", "rate"), [(None, None), (20, None), (109, None), (110, 0.01), (1202, 0.01)])
def test_warm_up_is_for_110_layers_and_more(depth, rate):
    assert cifar_paper(depth=depth).warm_up_rate == rate


@pytest.mark.parametrize(
    ("errors", "count"),
    [
        ([], 0),
        ([50, 40, 30, 20, 10], 0),
        ([50, 50], 0),
        ([50, 50, 50], 1),  # an equal error is no improvement
        ([50, 51, 52, 53], 1),
        ([50, 51, 52, 53, 54], 2),  # waits anew after a division
        ([50, 51, 49, 51, 48], 0),
        ([50, 51, 52, 49, 49, 49], 2),
    ],
)
def test_plateau_is_two_evaluations_without_a_new_minimum(errors, count):
    assert plateaus(dataclasses.replace(cifar_paper(), plateau=2), errors) == count


def test_no_plateaus_unless_asked_for():
    assert plateaus(cifar_paper(), [50] * 100) == 0


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 5))
def test_plateaus_never_decrease_as_errors_come_in(errors, patience):
    recipe = dataclasses.replace(cifar_paper(), plateau=patience)
    counts = [plateaus(recipe, errors[:length]) for length in range(len(errors) + 1)]
    assert counts == sorted(counts)
    assert counts[-1] <= max(0, len(errors) - 1) // patience


@pytest.mark.parametrize("make", [cifar_paper, imagenet_paper, digits_quick])
def test_iterations_scale_the_whole_schedule(make):
    whole = make()
    quarter = make(whole.iterations // 4)
    assert quarter == whole.with_iterations(whole.iterations // 4)
    assert quarter.iterations == whole.iterations // 4
    assert quarter.milestones == tuple(milestone // 4 for milestone in whole.milestones)
    assert quarter.name == whole.name
    assert whole.with_iterations(whole.iterations) == whole


def test_short_runs_have_short_windows_and_few_evaluations():
    short, tiny = cifar_paper(iterations=8_000), cifar_paper(iterations=8)
    assert (short.window, short.evaluations, short.milestones) == (100, 20, (4_000, 6_000))
    assert (tiny.window, tiny.evaluations, tiny.milestones) == (1, 8, (4, 6))


def test_without_a_warm_up_nothing_of_it_is_left():
    warming = dataclasses.replace(cifar_paper(depth=110), warm_up_iterations=400)
    assert without_warm_up(warming) == cifar_paper()


@pytest.mark.parametrize("iterations", [0, -5, 2.5, "many", None])
def test_iterations_must_be_a_count(iterations):
    with pytest.raises(rp.UsageError) as error:
        cifar_paper(iterations=iterations)
    assert str(error.value) == f"iterations (={iterations!r}) must be a whole number ≥ 1"


def test_paper_recipes_depart_in_nothing():
    assert departures(cifar_paper()) == []
    assert departures(cifar_paper(depth=110)) == []
    assert departures(imagenet_paper()) == []


def test_every_departure_is_named():
    recipe = dataclasses.replace(cifar_paper(iterations=8_000), nesterov=True, weight_decay=5e-4, bn_batch=64, window=7)
    assert departures(recipe) == [
        "iterations: 8,000 instead of 64,000 (the whole schedule scaled)",
        "nesterov: yes instead of no",
        "weight decay: 0.0005 instead of 0.0001",
        "bn batch: 64 instead of none",
    ]


def test_another_warm_up_than_the_papers_is_a_departure():
    assert departures(dataclasses.replace(cifar_paper(), warm_up_rate=0.001)) == ["warm up rate: 0.001 instead of none"]
    warming, deep = dataclasses.replace(cifar_paper(), warm_up_rate=0.01), cifar_paper(depth=110)
    assert departures(warming, cifar_paper(depth=20)) == ["warm up rate: 0.01 instead of none"]
    assert departures(without_warm_up(deep), deep) == ["warm up rate: none instead of 0.01"]
    assert departures(deep, deep) == []
    assert departures(dataclasses.replace(imagenet_paper(), warm_up_rate=0.01), imagenet_paper()) != []


def test_departures_are_from_the_recipe_one_names():
    recipe = dataclasses.replace(digits_quick(), learning_rate=1.0)
    assert departures(recipe, digits_quick()) == ["learning rate: 1.0 instead of 0.05"]
    assert departures(dataclasses.replace(imagenet_paper(), colour="none")) == ["colour: none instead of pca"]


def test_changes_as_on_a_command_line():
    asked = ["bn_batch=64", "learning-rate=1", "milestones=10,20", "scale=[20, 30]", "pad_value=black", "nesterov=True"]
    changes = parse_changes([*asked, "plateau=None", "warm_up_rate=1", "augmentation={[]:1}"])
    assert changes == {
        "bn_batch": 64,
        "plateau": None,
        "learning_rate": 1.0,
        "milestones": (10, 20),
        "scale": (20, 30),
        "pad_value": "black",
        "nesterov": True,
        "warm_up_rate": 1.0,
        "augmentation": "{[]:1}",
    }
    assert all(isinstance(changes[name], float) for name in ("learning_rate", "warm_up_rate"))  # 1 would be another run
    del changes["augmentation"]
    assert dataclasses.replace(cifar_paper(), **changes).milestones == (10, 20)


@given(st.sampled_from([cifar_paper(depth=110), imagenet_paper(), digits_quick()]), st.data())
def test_any_value_of_a_recipe_can_be_written(recipe, data):
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(Recipe)][2:]))
    assert parse_changes([f"{name}={getattr(recipe, name)}"]) == {name: getattr(recipe, name)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bn_bach=64", "recipe (='bn_bach') is unknown; accepted: batch_size, learning_rate, "),
        ("bn_batch", "recipe (='bn_batch') must be NAME=VALUE, such as bn_batch=None"),
        ("iterations=10", "recipe (='iterations=10'): the number of iterations is an option of its own, --iterations"),
        ("name=mine", "recipe (='name') is unknown; accepted: "),
        ("", "recipe (='') is unknown; accepted: "),
    ],
)
def test_a_change_that_is_none(text, said):
    with pytest.raises(rp.UsageError) as error:
        parse_changes([text])
    assert str(error.value).startswith(said)


def test_recipes_are_frozen_and_hashable():
    recipe = cifar_paper()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.iterations = 1
    assert {recipe: 1}[cifar_paper()] == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"iterations": 0}, "iterations (=0) must be a whole number ≥ 1"),
        ({"batch_size": 12.5}, "batch_size (=12.5) must be a whole number ≥ 1"),
        ({"window": 0}, "window (=0) must be a whole number ≥ 1"),
        ({"evaluations": -1}, "evaluations (=-1) must be a whole number ≥ 1"),
        ({"crop": "224"}, "crop (='224') must be a whole number ≥ 1"),
        ({"learning_rate": 0.0}, "learning_rate (=0.0) must be a number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate (=nan) must be a number > 0"),
        ({"decay": -10}, "decay (=-10) must be a number > 0"),
        ({"pad": -1}, "pad (=-1) must be a whole number ≥ 0"),
        ({"pad": 1.5}, "pad (=1.5) must be a whole number ≥ 0"),
        ({"batch_size": True}, "batch_size (=True) must be a whole number ≥ 1"),
        ({"bn_batch": 0}, "bn_batch (=0) must be a whole number ≥ 1"),
        ({"plateau": 0}, "plateau (=0) must be a whole number ≥ 1"),
        ({"warm_up_rate": -1}, "warm_up_rate (=-1) must be a number > 0"),
        ({"learning_rate": "0.1"}, "learning_rate (='0.1') must be a number > 0"),
        ({"learning_rate": float("inf")}, "learning_rate (=inf) must be a number > 0"),
        ({"weight_decay": -1}, "weight_decay (=-1) must be a number ≥ 0"),
        ({"momentum": "0.9"}, "momentum (='0.9') must be a number ≥ 0 and ≤ 1"),
        ({"nesterov": "yes"}, "nesterov (='yes') must be True or False, and False without momentum"),
        (
            {"nesterov": True, "momentum": 0.0},
            "nesterov (=True) must be True or False, and False without momentum",
        ),
        ({"milestones": 5}, "milestones (=5) must be whole numbers ≥ 0, such as (32000, 48000)"),
        ({"milestones": (1.5,)}, "milestones (=(1.5,)) must be whole numbers ≥ 0, such as (32000, 48000)"),
        ({"scale": (480, 256)}, "scale (=(480, 256)) must rise"),
        ({"scale": (256,)}, "scale (=(256,)) must be two numbers, such as (256, 480)"),
        (
            {"augmentation": "scale-crop", "crop": 64, "scale": (48, 80)},
            "crop (=64) must not be larger than the smallest scale (=48)",
        ),
        ({"warm_up_iterations": 400}, "warm_up_iterations (=400) needs a warm_up_rate, such as 0.01"),
        ({"colour": "pca"}, "colour (='pca') goes with augmentation 'scale-crop' alone, not 'pad-crop'"),
        ({"warm_up_until": "abc"}, "warm_up_until (='abc') must be a number > 0 and ≤ 100, in percent"),
        ({"warm_up_until": 0}, "warm_up_until (=0) must be a number > 0 and ≤ 100, in percent"),
        ({"nesterov": 1}, "nesterov (=1) must be True or False, and False without momentum"),
        ({"flip": True}, "flip (=True) must be a number ≥ 0 and ≤ 1"),
        ({"flip": 1.5}, "flip (=1.5) must be a number ≥ 0 and ≤ 1"),
        ({"validation_fraction": 0.95}, "validation_fraction (=0.95) must be a number ≥ 0 and ≤ 0.9"),
        ({"momentum": -0.1}, "momentum (=-0.1) must be a number ≥ 0 and ≤ 1"),
        ({"milestones": (300, 200)}, "milestones (=(300, 200)) must rise"),
        (
            {"momentum_form": "Caffe"},
            "momentum_form (='Caffe') is unknown; accepted: torch, caffe; nearest: caffe",
        ),
        (
            {"weight_decay_on": "weight"},
            "weight_decay_on (='weight') is unknown; accepted: all, weights; nearest: weights",
        ),
        (
            {"bn_test_statistics": "exact"},
            "bn_test_statistics (='exact') is unknown; accepted: precise, running",
        ),
        (
            {"augmentation": "padcrop"},
            "augmentation (='padcrop') is unknown; accepted: pad-crop, scale-crop, none; nearest: pad-crop",
        ),
        ({"pad_value": "blak"}, "pad_value (='blak') is unknown; accepted: mean, black; nearest: black"),
        ({"colour": "PCA"}, "colour (='PCA') is unknown; accepted: none, pca; nearest: pca"),
        (
            {"normalization": "per-pixel"},
            "normalization (='per-pixel') is unknown; accepted: per-pixel-mean, channel-mean-std; "
            "nearest: per-pixel-mean",
        ),
    ],
)
def test_unusable_values_are_refused_by_name(changes, text):
    with pytest.raises(rp.UsageError) as error:
        dataclasses.replace(cifar_paper(), **changes)
    assert str(error.value) == text
