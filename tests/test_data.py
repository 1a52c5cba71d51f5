"""Data: what is read, what is augmented, and that neither depends on when or where."""

import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.error import URLError

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock, Timeout
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import resprobe as rp
from resprobe.data import TensorBatches, datasets, folder
from resprobe.recipes import cifar_paper, imagenet_paper
from resprobe.training import Training

# From Python 3.12 on, a loader's workers are frowned upon beside torch's threads.
with_workers = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

CPU = torch.device("cpu")
# As they were drawn when runs were first kept.
HELD_OUT = [2, 7, 11, 15, 17]
CHOSEN = [[780, 1, 7, 0], [20, 7, 2, 0], [273, 2, 3, 1], [762, 0, 0, 0]]
NO_CHANGE = rp.Normalization.channels((0.0,), (1.0,))


def random_images(count: int, channels: int = 1, height: int = 4, width: int = 5, seed: int = 0) -> rp.ImageSet:
    """Images of which no two crops are equal; each one's label is its index."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=random)
    return rp.ImageSet(pixels, torch.arange(count))


def variants(image: Tensor, border: Tensor, pad: int, flips: bool = True) -> dict[tuple[int, int, int], Tensor]:
    """Every crop of a normalized image in a border, and its mirror image: §4.2 spelled out in loops."""
    channels, height, width = image.shape
    canvas = border.view(channels, 1, 1).repeat(1, height + 2 * pad, width + 2 * pad)
    canvas[:, pad : pad + height, pad : pad + width] = image
    found = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = canvas[:, top : top + height, left : left + width]
            found[top, left, 0] = crop
            if flips:
                found[top, left, 1] = crop.flip(-1)
    return found


def recognized(image: Tensor, candidates: dict[tuple[int, int, int], Tensor]) -> tuple[int, int, int]:
    """Which of the candidates an augmented image is."""
    matches = [which for which, candidate in candidates.items() if torch.allclose(candidate, image, atol=1e-5)]
    assert len(matches) == 1, f"the image is {len(matches)} of {len(candidates)} crops"
    return matches[0]


@pytest.fixture(scope="module")
def digits() -> rp.Data:
    return rp.load_data("digits")


class TestDigits:
    def test_sizes(self, digits):
        assert digits.train.images.shape == (1437, 1, 8, 8)
        assert digits.test.images.shape == (360, 1, 8, 8)
        assert (digits.in_channels, digits.num_classes, digits.classes) == (1, 10, tuple("0123456789"))
        assert digits.validation is None

    def test_classes_have_the_same_share_of_both_parts(self, digits):
        train, test = digits.train.labels.bincount(), digits.test.labels.bincount()
        assert train.sum() + test.sum() == 1797
        expected = (train + test) * 360 / 1797
        assert ((test - expected).abs() < 1).all()

    def test_parts_are_the_embedded_digits_each_once(self, digits):
        from sklearn.datasets import load_digits

        theirs = sorted(np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images)
        ours = sorted(image.numpy().tobytes() for part in (digits.train, digits.test) for image in part.images)
        assert ours == theirs

    def test_split_is_always_the_same(self, digits):
        again = rp.load_data("digits")
        assert torch.equal(again.train.images, digits.train.images)
        assert torch.equal(again.test.labels, digits.test.labels)

    def test_identity(self, digits):
        assert digits.identity == "digits"

    def test_take_no_path(self):
        with pytest.raises(rp.UsageError) as error:
            rp.load_data("digits:somewhere")
        assert str(error.value) == "data (='digits:somewhere') takes no path: the digits are embedded"

    def test_enlarged_digits_are_the_same_digits(self, digits):
        large = rp.load_data("digits-64")
        assert large.train.images.shape == (1437, 1, 64, 64)
        assert torch.equal(large.test.labels, digits.test.labels)
        for ours, small in ((large.train, digits.train), (large.test, digits.test)):
            means = torch.nn.functional.avg_pool2d(ours.images.float(), 8)  # 8×8 again, blurred a little
            assert (means - small.images.float()).abs().mean() < 20
        assert large.identity == "digits-64"
        with pytest.raises(rp.UsageError, match="takes no path: the digits are embedded"):
            rp.load_data("digits-64:somewhere")


def identity_of(folder: Path) -> str:
    return rp.load_data(f"folder:{folder}").identity


class TestNames:
    def test_unknown_name_gets_the_nearest_one(self):
        with pytest.raises(rp.UsageError) as error:
            rp.load_data("cifar-10")
        assert str(error.value) == (
            f"data (='cifar-10') is unknown; accepted: {', '.join(rp.DATASETS.names())}; nearest: cifar10"
        )

    @pytest.mark.parametrize("data", ["", None, 3])
    def test_unusable_name(self, data):
        with pytest.raises(rp.UsageError) as error:
            rp.load_data(data)
        assert str(error.value) == f"data (={data!r}) must be NAME or NAME:PATH, or a Data"

    @pytest.mark.usefixtures("clean_registries")
    def test_strangers_data(self):
        images = random_images(3)

        @rp.register_dataset("mine", identity=lambda path: f"mine from {path}")
        def mine(path):
            return rp.Data("mine", f"mine from {path}", images, images, ("a", "b", "c"))

        data = rp.load_data("mine:C:/there")
        assert data.train is images
        assert data.identity == "mine from C:/there"
        assert rp.load_data("mine").identity == "mine from None"
        assert rp.load_data(data) is data

    @pytest.mark.usefixtures("clean_registries")
    def test_a_strangers_path_belongs_to_the_identity_unless_it_says_more(self):
        images = random_images(3)
        for name, identity in (("bare", "bare"), ("versioned", "versioned-2")):
            rp.register_dataset(name)(lambda path, i=identity: rp.Data("mine", i, images, images, ("a", "b", "c")))
        found = [rp.load_data(data).identity for data in ("bare", "bare:a.pt", "bare:b.pt", "versioned:a.pt")]
        assert found == ["bare", "bare:a.pt", "bare:b.pt", "versioned-2"]

    @pytest.mark.usefixtures("clean_registries")
    def test_a_function_that_gives_something_else(self):
        rp.register_dataset("mine")(lambda path: (1, 2))
        with pytest.raises(rp.UsageError) as error:
            rp.load_data("mine")
        assert str(error.value) == "data (='mine'): its function must give a resprobe.Data, not (1, 2)"


class TestData:
    @pytest.mark.parametrize("part", ["train", "test", "validation"])
    @pytest.mark.parametrize(("labels", "said"), [((0, 3), "from 0 to 3"), ((-1, 2), "from -1 to 2")])
    def test_labels_beyond_the_classes(self, part, labels, said):
        good, bad = random_images(2), rp.ImageSet(random_images(2).images, torch.tensor(labels))
        good = rp.ImageSet(good.images, torch.tensor([0, 2]))
        parts = {"train": good, "test": good, "validation": good}
        rp.Data("mine", "mine", **parts, classes=("a", "b", "c"))
        with pytest.raises(rp.UsageError) as error:
            rp.Data("mine", "mine", **parts | {part: bad}, classes=("a", "b", "c"))
        assert str(error.value) == (f"data 'mine': {part}'s labels go {said}; with 3 classes they must be from 0 to 2")


class TestImageSet:
    def test_refuses_other_images(self):
        with pytest.raises(rp.UsageError) as error:
            rp.ImageSet(torch.zeros(2, 3, 4, 4), torch.zeros(2))
        assert str(error.value) == "images must be uint8 [N, C, H, W], not torch.float32 of shape (2, 3, 4, 4)"
        with pytest.raises(rp.UsageError, match=r"not torch.uint8 of shape \(2, 4, 4\)$"):
            rp.ImageSet(torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2))

    def test_refuses_channels_last(self):
        with pytest.raises(rp.UsageError) as error:
            rp.ImageSet(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
        assert str(error.value) == (
            "images of shape (2, 8, 8, 3) seem to have their channels last; expected [N, C, H, W]: images.permute(0, 3, 1, 2)"
        )
        assert len(rp.ImageSet(torch.zeros(2, 1, 8, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))) == 2

    def test_refuses_labels_of_another_number(self):
        with pytest.raises(rp.UsageError) as error:
            rp.ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3))
        assert str(error.value) == "labels must have shape (2,), not (3,)"

    def test_refuses_labels_of_another_kind(self):
        with pytest.raises(rp.UsageError) as error:
            rp.ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8))
        assert str(error.value) == "labels must be int64 [N], not torch.uint8"

    def test_views_are_the_images_in_order(self):
        images = random_images(7)
        batches = list(images.views(3))
        assert [len(labels) for _, labels in batches] == [3, 3, 1]
        assert torch.equal(torch.cat([pixels for pixels, _ in batches]), images.images)
        assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)


class TestHoldOut:
    def test_cifar_split_is_45k_and_5k(self):
        whole = rp.ImageSet(torch.zeros(50_000, 1, 1, 1, dtype=torch.uint8), torch.arange(50_000))
        data = rp.Data("d", "d", whole, random_images(2), ("a",) * len(whole))
        split = data.hold_out(0.1)
        assert (len(split.train), len(split.validation)) == (45_000, 5_000)
        together = torch.cat([split.train.labels, split.validation.labels])
        assert torch.equal(together.sort().values, whole.labels)
        assert split.test is data.test
        torch.manual_seed(1)
        assert torch.equal(data.hold_out(0.1).validation.labels, split.validation.labels)

    def test_what_is_held_out_is_drawn_from_all_and_stays_what_it_is(self):
        """Files of a folder come class by class: were the first held out, whole classes would be."""
        whole = rp.ImageSet(torch.zeros(1000, 1, 1, 1, dtype=torch.uint8), torch.arange(1000))
        data = rp.Data("d", "d", whole, random_images(2), ("a",) * 1000)
        split = data.hold_out(0.1)
        for part in (split.train, split.validation):
            assert set((part.labels // 100).tolist()) == set(range(10))
        assert split.validation.labels[:5].tolist() == HELD_OUT

    def test_nothing_held_out(self):
        data = rp.Data("d", "d", random_images(5), random_images(2), ("a",) * 5)
        assert data.hold_out(0) is data
        for fraction in (0.5 / len(data.train), 1 - 0.4 / len(data.train)):
            with pytest.raises(rp.UsageError, match=r"^validation_fraction \(=.*\) holds out \d+ of \d+ images$"):
                data.hold_out(fraction)

    def test_images_keep_their_labels(self):
        whole = random_images(20)
        split = rp.Data("d", "d", whole, whole, ("a",) * 20).hold_out(0.25)
        assert (len(split.train), len(split.validation)) == (15, 5)
        for part in (split.train, split.validation):
            assert torch.equal(part.images, whole.images[part.labels])


class TestNormalization:
    @pytest.mark.parametrize("count", [1, 7, 1500])  # more than one chunk
    def test_per_pixel_mean_is_numpys(self, count):
        images = random_images(count, channels=3).images
        fitted = rp.Normalization.fit(images, "per-pixel-mean")
        expected = images.numpy().astype(np.float64).mean(0) / 255
        np.testing.assert_allclose(fitted.mean.numpy(), expected, rtol=1e-6)
        assert torch.equal(fitted.std, torch.ones(3, 1, 1))
        np.testing.assert_allclose(fitted(images).numpy(), images.numpy() / 255 - expected, atol=1e-6)

    @pytest.mark.parametrize("count", [1, 7, 1500])
    def test_channel_statistics_are_numpys(self, count):
        images = random_images(count, channels=3).images
        fitted = rp.Normalization.fit(images, "channel-mean-std")
        pixels = images.numpy().astype(np.float64) / 255
        mean, std = pixels.mean((0, 2, 3)).reshape(3, 1, 1), pixels.std((0, 2, 3)).reshape(3, 1, 1)
        np.testing.assert_allclose(fitted.mean.numpy(), mean, rtol=1e-6)
        np.testing.assert_allclose(fitted.std.numpy(), std, rtol=1e-6)
        np.testing.assert_allclose(fitted(images).numpy(), (pixels - mean) / std, atol=1e-5)

    def test_constant_channel_stays_finite(self):
        images = torch.full((3, 1, 2, 2), 9, dtype=torch.uint8)
        assert rp.Normalization.fit(images, "channel-mean-std")(images).isfinite().all()

    def test_mean_image_is_resampled_for_another_size(self):
        fitted = rp.Normalization.per_pixel_mean(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
        assert torch.equal(fitted.mean_at((2, 2)), fitted.mean)
        wide = fitted.mean_at((2, 4))
        assert torch.equal(wide, torch.tensor([[[0.0, 0.25, 0.75, 1.0]] * 2]))
        channels = rp.Normalization.channels((0.5,), (2.0,))
        assert channels.mean_at((9, 9)) is channels.mean


BATCHES = st.fixed_dictionaries(
    {"count": st.integers(1, 6), "batch_size": st.integers(1, 14), "seed": st.integers(0, 3)}
)


class TestTensorBatches:
    @settings(max_examples=30)
    @given(
        BATCHES,
        st.integers(0, 2),
        st.integers(1, 3),
        st.sampled_from(["mean", "black"]),
        st.sampled_from(["per-pixel-mean", "channel-mean-std"]),
        st.integers(0, 5),
    )
    def test_every_output_is_a_crop_or_mirrored_crop_of_its_own_image(
        self, sizes, pad, channels, pad_value, kind, iteration
    ):
        images = random_images(sizes["count"], channels)
        recipe = dataclasses.replace(cifar_paper(), batch_size=sizes["batch_size"], pad=pad, pad_value=pad_value)
        # Fitted on other images, else the border could be mistaken for a pixel.
        normalization = rp.Normalization.fit(random_images(50, channels, seed=1).images, kind)
        batches = TensorBatches(images, recipe, sizes["seed"], normalization)
        pixels, labels = batches.make(batches.choices(iteration))
        assert pixels.shape == (sizes["batch_size"], channels, 4, 5)
        assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
        normalized = normalization(images.images)
        colour = normalization.mean.mean((1, 2)) if pad_value == "black" else torch.zeros(channels)
        border = -colour / normalization.std.view(-1)
        drawn = batches.choices(iteration).tolist()
        for image, label, (index, *choice) in zip(pixels, labels.tolist(), drawn, strict=True):
            assert label == index  # a label stays with its image
            assert recognized(image, variants(normalized[label], border, pad)) == tuple(choice)

    @given(BATCHES)
    def test_epochs_are_permutations_end_to_end(self, sizes):
        count, batch_size = sizes["count"], sizes["batch_size"]
        recipe = dataclasses.replace(cifar_paper(), batch_size=batch_size)
        batches = TensorBatches(random_images(count), recipe, sizes["seed"], NO_CHANGE)
        labels = torch.cat([batches.make(batches.choices(iteration))[1] for iteration in range(3 * count)])
        assert len(labels) == 3 * count * batch_size
        for epoch in labels.view(-1, count):
            assert torch.equal(epoch.sort().values, torch.arange(count))

    def test_what_is_drawn_stays_what_it_was(self):
        """Else kept runs would be found under figures that the code makes no more, and begun ones go on with other images."""
        drawn = TensorBatches(random_images(1000), cifar_paper(), 3, NO_CHANGE).choices(0)
        assert drawn[:4].tolist() == CHOSEN  # image, top, left, mirrored

    def test_epochs_differ(self):
        batches = TensorBatches(random_images(20), dataclasses.replace(cifar_paper(), batch_size=20), 0, NO_CHANGE)
        assert not torch.equal(batches.make(batches.choices(0))[1], batches.make(batches.choices(1))[1])

    @given(BATCHES, st.lists(st.integers(0, 20), min_size=1, max_size=6))
    def test_batch_is_a_function_of_seed_and_iteration(self, sizes, order):
        images = random_images(sizes["count"])
        recipe = dataclasses.replace(cifar_paper(), batch_size=sizes["batch_size"])
        used = TensorBatches(images, recipe, sizes["seed"], NO_CHANGE)
        for iteration in order:  # forwards, backwards, twice
            torch.manual_seed(iteration)  # the global generator is of no concern
            fresh = TensorBatches(images, recipe, sizes["seed"], NO_CHANGE)
            for one, other in zip(
                used.make(used.choices(iteration)), fresh.make(fresh.choices(iteration)), strict=True
            ):
                assert torch.equal(one, other)

    def test_seeds_differ(self):
        recipe = dataclasses.replace(cifar_paper(), batch_size=20)
        one, other = (TensorBatches(random_images(20), recipe, seed, NO_CHANGE) for seed in (0, 1))
        assert not torch.equal(one.choices(0), other.choices(0))

    def test_offsets_and_flips_are_drawn_per_image(self):
        batches = TensorBatches(random_images(64), dataclasses.replace(cifar_paper(), batch_size=64), 0, NO_CHANGE)
        _, top, left, flipped = batches.choices(0).T
        assert len(set(top.tolist())) == len(set(left.tolist())) == 9
        assert set(flipped.tolist()) == {0, 1}
        assert len({*zip(top.tolist(), left.tolist(), strict=True)}) > 32

    def test_all_variants_of_an_image_are_reached(self):
        images = random_images(1)
        batches = TensorBatches(images, dataclasses.replace(cifar_paper(), batch_size=200, pad=1), 0, NO_CHANGE)
        candidates = variants(images.images[0] / 255, torch.zeros(1), 1)
        assert {recognized(image, candidates) for image in batches.make(batches.choices(0))[0]} == set(candidates)
        assert len(candidates) == 9 * 2

    def test_all_81_times_2_variants_of_the_paper_are_drawn_equally_often(self):
        batches = TensorBatches(random_images(162), dataclasses.replace(cifar_paper(), batch_size=16_200), 0, NO_CHANGE)
        _, top, left, flipped = batches.choices(0).T
        counts = torch.bincount((top * 9 + left) * 2 + flipped, minlength=162)
        assert len(counts) == 162
        # 100 expected each: χ² with 161 degrees of freedom is below 230 in all but 3 of 10,000 cases.
        assert counts.min() > 0
        assert ((counts - 100) ** 2 / 100).sum() < 230

    @pytest.mark.parametrize(("flip", "mirrored"), [(0.0, 0), (1.0, 30)])
    def test_flip_is_a_probability(self, flip, mirrored):
        recipe = dataclasses.replace(cifar_paper(), batch_size=30, flip=flip)
        assert TensorBatches(random_images(5), recipe, 0, NO_CHANGE).choices(0)[:, 3].sum() == mirrored

    def test_no_augmentation_leaves_images_as_they_are(self):
        images = random_images(6)
        recipe = dataclasses.replace(cifar_paper(), batch_size=6, augmentation="none")
        batches = TensorBatches(images, recipe, 0, NO_CHANGE)
        pixels, labels = batches.make(batches.choices(3))
        torch.testing.assert_close(pixels, images.images[labels] / 255)

    def test_mean_border_is_zero_and_black_border_the_colour_of_black(self):
        images = rp.ImageSet(torch.full((1, 2, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
        normalization = rp.Normalization.channels((0.25, 0.5), (0.5, 2.0))
        recipe = dataclasses.replace(cifar_paper(), batch_size=400, pad=2)
        for pad_value, border in (("mean", (0.0, 0.0)), ("black", (-0.5, -0.25))):
            batches = TensorBatches(images, dataclasses.replace(recipe, pad_value=pad_value), 0, normalization)
            pixels, corner = batches.make(batches.choices(0))[0], batches.choices(0)[:, 1:3].eq(0).all(1)
            outside = pixels[corner]  # the crop of the upper left corner shows nothing but the border
            assert len(outside) > 0
            assert torch.equal(outside, torch.tensor(border).view(2, 1, 1).expand_as(outside))
            inside = pixels[batches.choices(0)[:, 1:3].eq(2).all(1)]
            torch.testing.assert_close(inside, torch.tensor((1.5, 0.25)).view(2, 1, 1).expand_as(inside))

    def test_run_goes_on_where_it_stopped(self):
        recipe = dataclasses.replace(cifar_paper(iterations=9), batch_size=4)
        images = random_images(6)
        whole = list(tiny.batches(images, recipe, 5, NO_CHANGE, CPU, 0))
        rest = list(tiny.batches(images, recipe, 5, NO_CHANGE, CPU, 6))
        assert (len(whole), len(rest)) == (9, 3)
        for (pixels, labels), (later_pixels, later_labels) in zip(whole[6:], rest, strict=True):
            assert torch.equal(pixels, later_pixels)
            assert torch.equal(labels, later_labels)

    def test_images_in_memory_have_no_scale_to_crop_at(self):
        with pytest.raises(rp.UsageError) as error:
            next(tiny.batches(random_images(3), imagenet_paper(), 0, NO_CHANGE, CPU, 0))
        assert str(error.value) == (
            "augmentation (='scale-crop') needs image files, as from folder:PATH; images in memory accept pad-crop, none"
        )


def write_images(root: Path, sizes: dict[str, tuple[int, int]], parts=("train", "val"), seed: int = 0) -> Path:
    """`root/PART/CLASS/FILE` of noise for each `CLASS/FILE` and its (width, height)."""
    random = np.random.default_rng(seed)
    for part in parts:
        for name, (width, height) in sizes.items():
            file = root / part / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_images(tmp_path / "small", {"cat/1.png": (8, 6), "cat/2.png": (8, 6), "dog/1.png": (8, 6)})


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return write_images(tmp_path / "large", {"cat/1.png": (90, 70), "cat/2.jpg": (70, 90), "dog/1.PNG": (80, 80)})


def refusal(root: Path) -> str:
    with pytest.raises(rp.UsageError) as error:
        rp.load_data(f"folder:{root}")
    return str(error.value)


def test_a_function_that_fails_is_one_line(clean_registries):
    @rp.register_dataset("broken")
    def broken(path):
        raise ValueError(f"no header in\n{path}")

    with pytest.raises(
        rp.UsageError,
        match=r"^data \(='broken:here'\) cannot be read: ValueError: no header in here \(test_data.py, line \d+\)$",
    ):
        rp.load_data("broken:here")


def test_parts_of_other_channels_or_without_images_are_said():
    grey, colour = random_images(8), random_images(8, channels=3)
    classes = tuple("01234567")
    with pytest.raises(rp.UsageError, match=r"^data 'mine': test's images have other channels than train's: {1, 3}$"):
        rp.Data("mine", "mine", grey, colour, classes)
    for empty in ({"train": grey.select([])}, {"test": grey.select([])}):
        data = rp.Data(**{"name": "mine", "identity": "mine", "train": grey, "test": grey, "classes": classes} | empty)
        with pytest.raises(rp.UsageError, match=f"^data 'mine' has no images in {next(iter(empty))}$"):
            rp.train("cifar/resnet-8", data, rp.recipes.digits_quick(2), device="cpu", progress=False)


class TestFolder:
    def test_small_images_of_one_size_come_in_memory(self, small):
        data = rp.load_data(f"folder:{small}")
        assert isinstance(data.train, rp.ImageSet)
        assert isinstance(data.test, rp.ImageSet)
        assert data.train.images.shape == (3, 3, 6, 8)
        assert data.train.labels.tolist() == [0, 0, 1]
        assert (data.name, data.classes, data.in_channels) == ("folder-small", ("cat", "dog"), 3)
        for part, images in (("train", data.train), ("val", data.test)):
            with Image.open(small / part / "dog" / "1.png") as image:
                assert np.array_equal(images.images[2].permute(1, 2, 0).numpy(), np.array(image))

    def test_larger_images_are_streamed(self, large):
        data = rp.load_data(f"folder:{large}")
        assert isinstance(data.train, rp.FolderSet)
        assert [file.name for file in data.train.files] == ["1.png", "2.jpg", "1.PNG"]
        assert data.train.labels.tolist() == [0, 0, 1]
        pixels, labels = next(iter(data.test.views(8)))
        assert (pixels.shape, pixels.dtype) == ((3, 3, 224, 224), torch.uint8)
        assert labels.tolist() == [0, 0, 1]

    def test_centre_view_is_the_resized_centre(self, tmp_path):
        write_images(tmp_path, {"a/1.png": (300, 256)})
        view = next(iter(rp.load_data(f"folder:{tmp_path}").test.views(1)))[0][0]
        with Image.open(tmp_path / "val" / "a" / "1.png") as image:  # its shorter side is 256 already
            expected = np.array(image)[16 : 16 + 224, 38 : 38 + 224]
        assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)

    @with_workers
    def test_views_by_workers_come_in_order(self, tmp_path):
        write_images(tmp_path, {f"a/{index:02}.png": (70, 70) for index in range(40)})
        data = rp.load_data(f"folder:{tmp_path}").cropped(16)
        many = torch.cat([pixels for pixels, _ in data.test.views(8)])  # 40 files: with workers
        parts = (data.test.select(torch.arange(start, start + 20)) for start in (0, 20))
        few = torch.cat([pixels for part in parts for pixels, _ in part.views(8)])  # 20 each: without
        assert torch.equal(many, few)

    def test_hidden_entries_are_none_of_the_users(self, small):
        """As macOS leaves on foreign disks, and notebooks beside them."""
        data = rp.load_data(f"folder:{small}")
        (small / "train" / ".ipynb_checkpoints").mkdir()
        (small / "train" / "dog" / "._1.png").write_bytes(b"\0\5\x16\7")
        again = rp.load_data(f"folder:{small}")
        assert (again.identity, again.classes, len(again.train)) == (data.identity, data.classes, len(data.train))

    def test_files_come_in_the_same_order_on_all_systems(self):
        for kind in PurePosixPath, PureWindowsPath:
            files = [kind("train/b/1.png"), kind("train/C/1.png"), kind("train/C-1/1.png"), kind("train/a/1.png")]
            names = [file.as_posix() for file in sorted(files, key=folder._in_order)]
            assert names == ["train/C/1.png", "train/C-1/1.png", "train/a/1.png", "train/b/1.png"]

    def test_test_folder_will_do_for_val(self, small):
        (small / "val").rename(small / "test")
        assert len(rp.load_data(f"folder:{small}").test) == 3

    def test_sample_is_spread_evenly_over_the_files(self, large):
        train = rp.load_data(f"folder:{large}").train
        repeated = rp.FolderSet(train.files * 3, train.labels.repeat(3), size=8)
        views = {index: repeated.select(torch.tensor([index])).sample(1)[0] for index in range(9)}
        sample = repeated.sample(5)  # not the first five
        assert len(sample) == 5
        for view, index in zip(sample, (0, 1, 3, 5, 7), strict=True):
            assert torch.equal(view, views[index])
        assert len(repeated.sample(100)) == 9

    def test_a_training_tests_at_its_recipes_crop(self, large):
        data = rp.load_data(f"folder:{large}")
        recipe = dataclasses.replace(
            imagenet_paper(2), batch_size=2, crop=48, scale=(50, 60), validation_fraction=1 / 3
        )
        network = rp.build("imagenet/resnet-18", width=2, num_classes=2)
        training = Training(network, data, recipe, device=CPU)
        for part in (training.data.train, training.data.validation, training.test):
            assert next(iter(part.views(1)))[0].shape == (1, 3, 48, 48)
        assert training.normalization.mean.shape == (3, 48, 48)
        sizes = set()
        network.register_forward_pre_hook(lambda _, inputs: sizes.add(tuple(inputs[0].shape[2:])))
        training.test_now()
        assert sizes == {(48, 48)}
        assert data.test.size == 224  # the caller's data are as they were

    def test_hold_out_of_files(self, large):
        split = rp.load_data(f"folder:{large}").hold_out(1 / 3)
        assert (len(split.train), len(split.validation)) == (2, 1)
        assert {*split.train.files, *split.validation.files} == {*rp.load_data(f"folder:{large}").train.files}

    def test_needs_a_path(self):
        with pytest.raises(rp.UsageError) as error:
            rp.load_data("folder")
        assert str(error.value) == "data (='folder') needs a path: folder:PATH"

    def test_missing_folder(self, tmp_path):
        root = tmp_path / "absent"
        assert refusal(root) == (
            f"data folder (={str(root)!r}) is not there; expected train/ and val/ with a folder a class"
        )

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_missing_part(self, small, part):
        shutil.rmtree(small / part)
        assert refusal(small) == f"data folder (={str(small)!r}) has no {part}/; expected train/ and val/ (or test/)"

    def test_no_class_folders(self, tmp_path):
        (tmp_path / "train").mkdir()
        (tmp_path / "val").mkdir()
        assert (
            refusal(tmp_path)
            == f"data folder (={str(tmp_path / 'train')!r}) has no class folders; expected a folder a class"
        )

    def test_a_class_without_images(self, small):
        shutil.rmtree(small / "train" / "dog")
        (small / "train" / "dog").mkdir()
        assert refusal(small) == f"data folder (={str(small / 'train')!r}) holds no images of dog"

    def test_unknown_class(self, small):
        (small / "val" / "cow").mkdir()
        (small / "val" / "bee").mkdir()
        assert refusal(small) == f"{small / 'val'} has classes that {small / 'train'} has not: bee, cow"

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_no_images(self, small, part):
        for file in (small / part).rglob("*.png"):
            file.rename(file.with_suffix(".txt"))
        assert refusal(small) == (
            f"data folder (={str(small / part)!r}) holds no images (.jpg, .jpeg, .png, .bmp, .webp)"
        )

    @pytest.mark.parametrize("name", ["train/cat/1.png", "train/dog/1.png", "val/cat/2.png"])
    def test_file_that_is_no_image(self, small, name):
        (small / name).write_text("not an image")
        assert (
            refusal(small) == f"image {small / name} cannot be read: cannot identify image file {str(small / name)!r}"
        )

    @pytest.mark.parametrize("name", ["train/cat/1.png", "val/dog/1.png"])
    def test_truncated_image(self, small, name):
        whole = (small / name).read_bytes()
        (small / name).write_bytes(whole[: len(whole) // 2])
        assert refusal(small).startswith(f"image {small / name} cannot be read: ")

    @pytest.mark.parametrize("name", ["train/cat/1.png", "val/dog/1.png"])
    def test_damaged_image(self, small, name):
        damaged = bytearray((small / name).read_bytes())
        damaged[41:49] = bytes(8)
        (small / name).write_bytes(damaged)
        assert refusal(small).startswith(f"image {small / name} cannot be read: ")

    def test_an_image_that_breaks_off_in_another_way(self, large):
        """Pillow has a SyntaxError for a PNG whose later chunks are damaged."""
        file = large / "val" / "cat" / "2.png"
        noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        content = bytearray(file.read_bytes())
        second = content.index(b"IDAT", content.index(b"IDAT") + 4)
        content[second : second + 4] = bytes(4)
        file.write_bytes(content)
        with pytest.raises(rp.UsageError, match=rf"^image {file} cannot be read: "):
            list(rp.load_data(f"folder:{large}").test.views(8))

    def test_unreadable_image_among_streamed_ones(self, large):
        file = large / "val" / "cat" / "2.jpg"
        file.write_bytes(file.read_bytes()[:200])
        views = rp.load_data(f"folder:{large}").test.views(8)
        with pytest.raises(rp.UsageError, match=rf"^image {file} cannot be read: "):
            next(iter(views))

    @pytest.mark.parametrize("processes", [0, 2])
    def test_unreadable_image_among_those_that_other_processes_read(self, large, monkeypatch, processes):
        """A loader's process hands its whole traceback on."""
        monkeypatch.setattr("resprobe.data.folder.loader_processes", lambda items: processes)
        file = large / "train" / "cat" / "2.jpg"
        file.write_bytes(b"no image")
        train = rp.load_data(f"folder:{large}").train
        recipe = dataclasses.replace(imagenet_paper(), batch_size=2, crop=16, scale=(20, 30), iterations=9)
        for batches in (train.views(8), tiny.batches(train, recipe, 0, NO_CHANGE, CPU, 0)):
            with pytest.raises(rp.UsageError) as error:
                list(batches)
            assert str(error.value) == f"image {file} cannot be read: cannot identify image file {str(file)!r}"

    def test_small_images_of_two_sizes(self, small):
        file = small / "train" / "dog" / "1.png"
        Image.new("RGB", (9, 6)).save(file)
        assert refusal(small) == f"{file} is 9×6, the first image 8×6; small ones must be alike"

    @pytest.mark.parametrize("first", ["train/cat/1.png", "train/dog/1.PNG"])
    def test_a_small_image_among_larger_ones(self, large, first):
        Image.new("RGB", (9, 6)).save(large / first)
        data = rp.load_data(f"folder:{large}")
        assert isinstance(data.train, rp.FolderSet) and isinstance(data.test, rp.FolderSet)

    def test_streamed_images_cannot_be_padded(self, large):
        with pytest.raises(rp.UsageError) as error:
            next(tiny.batches(rp.load_data(f"folder:{large}").train, cifar_paper(), 0, NO_CHANGE, CPU, 0))
        assert str(error.value) == (
            "augmentation (='pad-crop') needs images of one size in memory; these files are too large or differ in "
            "size; accepted: scale-crop, none"
        )

    def test_identity_is_independent_of_the_place(self, small, tmp_path):
        moved = tmp_path / "elsewhere" / "renamed"
        shutil.copytree(small, moved)
        identity = identity_of(small)
        assert identity == identity_of(moved)
        assert identity.startswith("folder:")
        (moved / "notes.txt").write_text("no image")
        (moved / "results").mkdir()
        (moved / "results" / "figure.png").write_bytes(b"not of the data")
        assert identity_of(moved) == identity

    def test_identity_changes_with_a_files_size_name_and_number(self, small):
        file = small / "val" / "dog" / "1.png"
        identities = [identity_of(small)]
        file.write_bytes(file.read_bytes() + b"\0")
        identities.append(identity_of(small))
        file = file.rename(file.with_name("2.png"))
        identities.append(identity_of(small))
        shutil.copy(file, file.with_name("3.png"))
        identities.append(identity_of(small))
        assert len(set(identities)) == 4

    def test_identity_of_classes_that_lie_elsewhere(self, small, large, tmp_path):
        """A part of a larger set is often a folder of links."""
        identities = []
        for number, source in enumerate((small, large)):
            for part in ("train", "val"):
                (tmp_path / f"linked-{number}" / part).mkdir(parents=True)
                for each in (source / part).iterdir():
                    (tmp_path / f"linked-{number}" / part / each.name).symlink_to(each)
            identities.append(identity_of(tmp_path / f"linked-{number}"))
        assert identities == [identity_of(small), identity_of(large)]
        assert identities[0] != identities[1]


class TestScaleCrop:
    """§3.4: the stream of a folder is a function of (seed, position)."""

    RECIPE = dataclasses.replace(imagenet_paper(iterations=6), batch_size=2, scale=(20, 30), crop=16)

    def stream(self, root: Path, start: int = 0, seed: int = 0, **changes) -> list[tuple[Tensor, Tensor]]:
        recipe, images = dataclasses.replace(self.RECIPE, **changes), rp.load_data(f"folder:{root}").train
        return list(tiny.batches(images, recipe, seed, rp.Normalization.channels((0.5,) * 3, (2.0,) * 3), CPU, start))

    def test_shapes(self, large):
        batches = self.stream(large)
        assert len(batches) == 6
        for pixels, labels in batches:
            assert (pixels.shape, pixels.dtype, labels.shape) == ((2, 3, 16, 16), torch.float32, (2,))

    @pytest.mark.parametrize("start", [1, 4])
    def test_does_not_depend_on_where_it_started(self, large, start):
        whole, rest = self.stream(large), self.stream(large, start)
        assert len(rest) == 6 - start
        for (pixels, labels), (later_pixels, later_labels) in zip(whole[start:], rest, strict=True):
            assert torch.equal(pixels, later_pixels)
            assert torch.equal(labels, later_labels)

    @with_workers
    def test_does_not_depend_on_workers(self, tmp_path, monkeypatch):
        write_images(tmp_path, {f"a/{index:02}.png": (70, 70) for index in range(7)})
        without = self.stream(tmp_path, batch_size=6, iterations=6)
        monkeypatch.setattr(folder, "loader_processes", lambda files: 2)
        by_workers = self.stream(tmp_path, batch_size=36, iterations=1)
        assert torch.equal(by_workers[0][0], torch.cat([pixels for pixels, _ in without]))

    def test_seeds_differ(self, large):
        assert not torch.equal(self.stream(large)[0][0], self.stream(large, seed=1)[0][0])

    def test_epochs_are_permutations_with_fresh_crops(self, large):
        pixels, labels = (torch.cat(parts) for parts in zip(*self.stream(large, colour="none"), strict=True))
        for epoch in labels.view(-1, 3):
            assert epoch.sort().values.tolist() == [0, 0, 1]
        assert len({image.numpy().tobytes() for image in pixels}) == 12

    def test_colour_noise_is_one_shift_an_image(self, large):
        plain, noisy = self.stream(large, colour="none"), self.stream(large)
        for (without, _), (with_noise, _) in zip(plain, noisy, strict=True):
            shift = with_noise - without
            assert (shift.amax((2, 3)) - shift.amin((2, 3)) < 1e-6).all()
            assert (shift.abs().amax((1, 2, 3)) > 1e-5).all()
            assert not torch.allclose(shift[0], shift[1])

    def test_crops_lie_anywhere_in_the_image_at_their_scale_and_half_are_mirrored(self, tmp_path):
        """An image that says in red how far to the right a pixel is, and in green how far down, both in halves of a pixel."""
        height, width = 100, 120
        right, down = np.meshgrid(2 * np.arange(width), 2 * np.arange(height))
        picture = np.stack([right, down, 0 * right], axis=2).astype(np.uint8)
        for part in ("train", "val"):
            (tmp_path / part / "a").mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / part / "a" / "1.png")
        scales, tops, lefts, mirrored = [], [], [], []
        for pixels, _ in self.stream(tmp_path, iterations=300, colour="none"):
            for red, green, _ in (pixels * 2 + 0.5) * 255 / 2:  # undone: pixels of the image
                across, along = (float((rows[8, 12] - rows[8, 4]) / 8) for rows in (red, green.T))
                mirrored.append(across < 0)
                red = red.flip(1) if across < 0 else red
                assert abs(across) == pytest.approx(along, rel=0.1), "the crop is distorted, or upside down"
                scales.append(height / along)
                lefts.append(
                    (float(red[8, 8]) + 0.5 - 8.5 * along) / (width - 16 * along)
                )  # of where it may begin, the part
                tops.append((float(green[8, 8]) + 0.5 - 8.5 * along) / (height - 16 * along))
        assert 19 < min(scales) < 21 and 29 < max(scales) < 31.5
        assert 0.35 < sum(mirrored) / len(mirrored) < 0.65
        for places in (lefts, tops):
            assert -0.05 < min(places) < 0.05 and 0.95 < max(places) < 1.05
            assert 0.4 < sum(places) / len(places) < 0.6
        assert abs(np.corrcoef(lefts, tops)[0, 1]) < 0.2

    @pytest.mark.parametrize(("flip", "kinds"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
    def test_a_mirror_image_is_the_crop_from_right_to_left(self, tmp_path, flip, kinds):
        picture = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        for part in ("train", "val"):
            (tmp_path / part / "a").mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / part / "a" / "1.png")
        whole = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - 0.5) / 2
        seen = set()
        for pixels, _ in self.stream(tmp_path, iterations=20, scale=(80, 80), crop=80, colour="none", flip=flip):
            for image in pixels:
                mirrored = torch.allclose(image, whole.flip(2), atol=1e-5)
                assert mirrored or torch.allclose(image, whole, atol=1e-5)
                seen.add(mirrored)
        assert seen == kinds

    def test_colour_noise_has_the_published_covariance(self, tmp_path):
        """AlexNet's: along each principal component of ImageNet's colours, normal with a tenth of its eigenvalue."""
        values = np.array([0.2175, 0.0188, 0.0045])
        vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
        write_images(tmp_path, {"a/1.png": (70, 90)})
        images = rp.load_data(f"folder:{tmp_path}").train
        recipe = dataclasses.replace(self.RECIPE, batch_size=50, iterations=60, scale=(20, 20))
        found = {}
        for deviation in (1.0, 2.0):
            normalization, shifts = rp.Normalization.channels((0.5,) * 3, (deviation,) * 3), []
            for colour in ("none", "pca"):
                stream = tiny.batches(images, dataclasses.replace(recipe, colour=colour), 0, normalization, CPU)
                shifts.append(torch.cat([pixels[:, :, 0, 0] for pixels, _ in stream]))
            found[deviation] = np.cov((shifts[1] - shifts[0]).numpy().T) * deviation**2
        expected = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
        for covariance in found.values():
            assert covariance == pytest.approx(expected, rel=0.15, abs=0.05 * expected.max())

    def test_a_crop_of_the_whole_shorter_side_is_inside_the_image(self):
        for side in range(225, 300):
            whole = Image.fromarray(np.full((side, side + 40, 3), 7, dtype=np.uint8))
            for image in (whole, whole.rotate(90, expand=True)):
                scale = 224 / side
                edges = image.height * scale - 224, image.width * scale - 224
                for top, left in ((0.0, 0.0), edges):
                    cropped = folder._crop(image, 224, top, left, 224)
                    assert np.asarray(cropped).shape == (224, 224, 3)

    def test_without_augmentation_crops_are_centre_views(self, large):
        for pixels, labels in self.stream(large, augmentation="none", colour="none"):
            assert len(labels) == len(pixels) == 2
        images = rp.load_data(f"folder:{large}").train.cropped(16)
        views = torch.cat([view for view, _ in images.views(8)])
        expected = {((view.float() / 255 - 0.5) / 2).numpy().tobytes() for view in views}
        assert {image.contiguous().numpy().tobytes() for image in pixels} <= expected


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No ./data, and an empty cache, whose path this is."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RESPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestCifar:
    def test_missing_path(self, tmp_path):
        where = str(tmp_path / "absent")
        with pytest.raises(rp.UsageError) as error:
            rp.load_data(f"cifar10:{where}")
        assert str(error.value) == (
            f"data path (={where!r}) is not there; cifar10:PATH is cifar-10-python.tar.gz, the folder "
            "cifar-10-batches-py, or a folder with either"
        )

    def test_folder_without_it(self, tmp_path):
        with pytest.raises(rp.UsageError) as error:
            rp.load_data(f"cifar100:{tmp_path}")
        assert str(error.value) == (
            f"data path (={str(tmp_path)!r}) holds neither cifar-100-python/ nor cifar-100-python.tar.gz"
        )

    @pytest.mark.parametrize("name_the_folder", [True, False])
    def test_damaged_archive(self, tmp_path, name_the_folder):
        archive = tmp_path / "cifar-10-python.tar.gz"
        archive.write_bytes(b"abc")
        with pytest.raises(rp.UsageError) as error:
            rp.load_data(f"cifar10:{tmp_path if name_the_folder else archive}")
        assert str(error.value) == (
            f"archive {archive} is damaged or not cifar-10-python.tar.gz: its MD5 is "
            "900150983cd24fb0d6963f7d28e17f72, expected c58f30108f718f92721af3b95e74349a"
        )

    @pytest.mark.parametrize("inside", [True, False])
    def test_empty_folder(self, tmp_path, inside):
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        with pytest.raises(rp.UsageError) as error:
            rp.load_data(f"cifar10:{folder if inside else tmp_path}")
        assert str(error.value) == (
            f"cifar10 in {folder} is incomplete or damaged (a file is missing or its MD5 differs); "
            "unpack cifar-10-python.tar.gz there again"
        )

    def test_of_processes_that_want_it_one_downloads_and_the_others_wait(self, nowhere, monkeypatch):
        lock = FileLock(nowhere / ".cifar10.lock")

        def download(root, download):
            with pytest.raises(Timeout):
                lock.acquire(timeout=0)
            raise URLError("seen enough")

        monkeypatch.setattr("torchvision.datasets.CIFAR10", download)
        with pytest.raises(rp.UsageError, match="seen enough"):
            rp.load_data("cifar10")
        # While another downloads, half an archive is not taken for a damaged one.
        (nowhere / "cifar-10-python.tar.gz").write_bytes(b"half")
        with lock, ThreadPoolExecutor() as threads:
            waiting = threads.submit(rp.load_data, "cifar10")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            (nowhere / "cifar-10-python.tar.gz").unlink()
            lock.release()
            with pytest.raises(rp.UsageError, match="seen enough"):
                waiting.result(timeout=60)

    @pytest.mark.parametrize(("name", "official"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
    def test_failed_download_says_what_to_put_where(self, nowhere, monkeypatch, name, official):
        def fail(root, download):
            assert (Path(root), download) == (nowhere, True)
            raise URLError("no route to host")

        monkeypatch.setattr(f"torchvision.datasets.{official}", fail)
        with pytest.raises(rp.UsageError) as error:
            rp.load_data(name)
        archive, md5, _ = datasets._CIFAR[name]
        said = re.sub(r" \(test_data.py, line \d+\)", "", str(error.value))  # where `fail` is
        assert said == (
            f"{name} is not here and its download failed (URLError: <urlopen error no route to host>); put {archive} "
            f"(MD5 {md5}) into {nowhere} or ./data, or name its place with --data {name}:PATH"
        )


@pytest.fixture(scope="module")
def cifar10(cifar10_folder: Path) -> rp.Data:
    return rp.load_data(f"cifar10:{cifar10_folder}")


class TestRealCifar:
    def test_sizes_and_classes(self, cifar10):
        assert cifar10.identity == "cifar10", "wherever it is read from"
        assert cifar10.train.images.shape == (50_000, 3, 32, 32)
        assert cifar10.test.images.shape == (10_000, 3, 32, 32)
        assert cifar10.train.labels.bincount().tolist() == [5_000] * 10
        assert cifar10.test.labels.bincount().tolist() == [1_000] * 10
        assert cifar10.classes == (
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        )
        assert (cifar10.name, cifar10.identity, cifar10.num_classes) == ("cifar10", "cifar10", 10)

    def test_mean_colour_is_the_known_one(self, cifar10):
        fitted = rp.Normalization.fit(cifar10.train.images, "channel-mean-std")
        assert fitted.mean.view(-1).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
        assert fitted.std.view(-1).tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)

    def test_batches_folder_itself_may_be_named(self, cifar10, cifar10_folder):
        again = rp.load_data(f"cifar10:{cifar10_folder / 'cifar-10-batches-py'}")
        assert torch.equal(again.test.images, cifar10.test.images)

    def test_copies_in_the_cache_and_in_data_are_found(self, cifar10, cifar10_folder, nowhere):
        nowhere.symlink_to(cifar10_folder)
        assert torch.equal(rp.load_data("cifar10").test.labels, cifar10.test.labels)
        nowhere.unlink()
        Path("data").symlink_to(cifar10_folder)
        assert torch.equal(rp.load_data("cifar10").test.labels, cifar10.test.labels)

    def test_archive(self, cifar10, cifar10_folder, tmp_path, monkeypatch):
        archive = tmp_path / "cifar-10-python.tar.gz"  # the official one's compression is not to be had again
        with tarfile.open(archive, "w") as tar:
            tar.add(cifar10_folder / "cifar-10-batches-py", "cifar-10-batches-py")
        with archive.open("rb") as stream:
            md5 = hashlib.file_digest(stream, "md5").hexdigest()
        monkeypatch.setitem(datasets._CIFAR, "cifar10", (archive.name, md5, "cifar-10-batches-py"))
        data = rp.load_data(f"cifar10:{archive}")
        assert torch.equal(data.train.labels, cifar10.train.labels)
        assert [path.name for path in tmp_path.iterdir()] == [archive.name]

    @pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
    @pytest.mark.parametrize("missing", [True, False])
    def test_damaged_batch(self, cifar10_folder, tmp_path, name, missing):
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        for file in (cifar10_folder / "cifar-10-batches-py").iterdir():
            (folder / file.name).symlink_to(file)
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        if not missing:
            (folder / name).write_bytes(whole[:-1])
        with pytest.raises(rp.UsageError) as error:
            rp.load_data(f"cifar10:{tmp_path}")
        assert str(error.value) == (
            f"cifar10 in {folder} is incomplete or damaged (a file is missing or its MD5 differs); "
            "unpack cifar-10-python.tar.gz there again"
        )


UNGUARDED = """
import dataclasses
import multiprocessing

multiprocessing.set_start_method("spawn", force=True)  # as on Windows and macOS
import resprobe as rp

recipe = dataclasses.replace(rp.recipes.imagenet_paper(2), batch_size=8, crop=32, scale=(32, 40))
rp.train("cifar/resnet-8", "folder:images", recipe, runs="runs", device="cpu", progress=False)
"""


def test_a_script_that_trains_where_it_is_imported_does_not_wait_for_itself(tmp_path):
    """Processes that read images import the script, and would wait for the run that waits for them."""
    write_images(tmp_path / "images", {f"{name}/{index}.png": (70, 70) for name in "ab" for index in range(20)})
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "the script trains wherever it is imported" in done.stderr
