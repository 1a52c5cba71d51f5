"""Test protocols against naive twins."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import digits, hook_count, network, one_thread
from torch import Tensor, nn
from torch.nn import functional as F

import resprobe as rp
from resprobe.data import FolderSet, ImageSet, Normalization
from resprobe.errors import UsageError
from resprobe.evaluation import (
    SCALES,
    evaluate,
    evaluation_mode,
    precise_batch_norm,
    tally,
    ten_crop_padding,
    ten_crops,
)

PLAIN = Normalization.channels((0.0,), (1.0,))
COLOUR = Normalization.channels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


def on(net, data, protocol="single-view", **options):
    return evaluate(net, data, protocol, device="cpu", **options)


def naive(log_probabilities: Tensor, labels: Tensor) -> tuple[int, float, float, float]:
    """Errors, error, top-5 error and loss, one image at a time."""
    wrong = wrong5 = loss = 0
    for row, label in zip(log_probabilities.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda index: -row[index])
        wrong += order[0] != label
        wrong5 += label not in order[:5]
        loss -= row[label]
    return wrong, 100 * wrong / len(labels), 100 * wrong5 / len(labels), loss / len(labels)


def check(result: rp.Evaluation, log_probabilities: Tensor, labels: Tensor) -> None:
    wrong, error, error5, loss = naive(log_probabilities, labels)
    assert (result.images, result.errors) == (len(labels), wrong)
    assert result.error == pytest.approx(error)
    assert result.top5_error == pytest.approx(error5)
    assert result.loss == pytest.approx(loss, rel=1e-5)


@pytest.fixture
def net() -> nn.Module:
    """Lively running statistics, so that eval mode is not train mode."""
    made = network()
    with torch.no_grad():
        for _ in range(3):
            made(torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    return made


# -- single view -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 60, 250])
def test_single_view_equals_a_naive_twin(net, batch_size):
    data = digits()
    mean = data.train.images.double().mean(0) / 255
    result = on(net, data, batch_size=batch_size)
    net.eval()
    with torch.no_grad():
        rows = [net((image.double() / 255 - mean).float()[None])[0].log_softmax(0) for image in data.test.images]
    check(result, torch.stack(rows), data.test.labels)
    assert 0 < result.errors < result.images
    assert result.top5_error < result.error


def test_a_data_set_may_be_named_or_given_in_part(net):
    named = on(net, "digits")
    data = rp.load_data("digits")
    fitted = Normalization.fit(data.train.images, "per-pixel-mean")
    assert on(net, data.test, normalization=fitted) == named
    assert named.images == 360


def test_the_networks_own_normalization_is_used_unless_another_is_given(net):
    data = digits()
    without = on(net, data)
    net.normalization = Normalization.channels((0.9,), (0.05,))
    own = on(net, data)
    assert own != without
    assert own == on(net, data.test)
    assert on(net, data, normalization=PLAIN) == on(net, data.test, normalization=PLAIN) != own


def test_bf16_is_close_but_not_the_same(net):
    data = digits()
    exact, rough = on(net, data), on(net, data, precision="bf16")
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.05)


# -- errors ------------------------------------------------------------------------------------------------------


def test_an_unknown_protocol_is_named(net):
    with pytest.raises(UsageError) as caught:
        on(net, "digits", "tencrop")
    assert (
        str(caught.value)
        == "protocol (='tencrop') is unknown; accepted: single-view, ten-crop, multi-scale; nearest: ten-crop"
    )


def test_no_network(net):
    with pytest.raises(UsageError, match=r"^network \(=nothing\) must be a built network"):
        on([], "digits")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"in_channels": 3}, "in_channels (=3) of cifar/resnet-8 does not fit data 'digits', which has 1"),
        ({"num_classes": 5}, "num_classes (=5) of cifar/resnet-8 does not fit data 'digits', which has 10"),
        ({"num_classes": 20}, "num_classes (=20) of cifar/resnet-8 does not fit data 'digits', which has 10"),
    ],
)
def test_a_network_that_does_not_fit_the_data(changes, text):
    """One of three channels would be given grey images, and its error would be a number like any other."""
    member = rp.build("cifar/resnet-8", **{"in_channels": 1} | changes)
    for asked in (member, [rp.build("cifar/resnet-8", in_channels=1), member]):
        with pytest.raises(UsageError) as caught:
            rp.evaluate(asked, "digits", device="cpu")
        assert str(caught.value) == text


class Answers(nn.Module):
    """Gives for images whatever `answer` makes of their number."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.answer(len(x))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda count: torch.zeros(count, 7), "a tensor of shape ({}, 7)"),
        (lambda count: torch.zeros(count, 10, 1, 1), "a tensor of shape ({}, 10, 1, 1)"),
        (lambda count: torch.zeros(1, 10), "a tensor of shape (1, 10)"),
        (lambda count: (torch.zeros(count, 10),), "a tuple"),
    ],
    ids=["classes", "pixels", "images", "tuple"],
)
def test_what_is_no_logit_a_class_is_said(answer, text):
    network = Answers(answer)
    recipe = rp.recipes.digits_quick(iterations=2)
    for count, ask in (
        (250, lambda: rp.evaluate(network, "digits", normalization=PLAIN, device="cpu")),
        (250, lambda: rp.evaluate(network, rp.load_data("digits").test, normalization=PLAIN, device="cpu")),
        (recipe.batch_size, lambda: rp.train(network, "digits", recipe, device="cpu", progress=False)),
    ):
        with pytest.raises(UsageError) as caught:
            ask()
        assert str(caught.value) == (
            f"Answers gives {text.format(count)} for {count} images of 10 classes; a tensor of shape ({count}, 10) is needed"
        )


def test_more_logits_than_classes_are_none_of_our_business():
    """A network of 1,000 outputs may be asked about ten of them."""
    network = Answers(lambda count: torch.eye(1000)[:count])
    assert rp.evaluate(network, "digits", normalization=PLAIN, device="cpu").images == 360


def test_a_wrapped_network_says_what_it_was_trained_with(net):
    """`DataParallel` hands on nothing but the forward pass."""
    net.normalization = rp.Normalization.channels((0.2,), (3.0,))
    wrapped = nn.DataParallel(net)
    assert on(wrapped, "digits") == on(net, "digits")
    assert rp.normalization_of(wrapped, None) is net.normalization
    with pytest.raises(rp.UsageError, match=r"^in_channels \(=1\) of cifar/resnet-8 does not fit data 'shapes'"):
        on(wrapped, "shapes")


def test_a_strangers_network_that_says_nothing_of_its_inputs_is_told_of():
    """Published weights were trained on pixels of some mean and std; by another the error would be wrong, and plausible."""
    network = Answers(lambda count: torch.eye(10).repeat(count, 1)[:count])
    with pytest.warns(
        UserWarning, match=r"^Answers does not say how its inputs are normalized; the data's mean image is subt"
    ):
        rp.evaluate(network, "digits", device="cpu")
    network.normalization = PLAIN
    rp.evaluate(network, "digits", device="cpu")
    rp.evaluate(rp.build("cifar/plain-8", in_channels=1, width=4), "digits", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("cifar/resnet-8", "digits"), {}, r"^network \(=str\) must be a built network, or a list of them: rp.build"),
        ((None, "digits"), {}, r"^network \(=NoneType\) must be a built network"),
        ((nn.Identity(), "digits"), {"batch_size": 0}, r"^batch_size \(=0\) must be a whole number ≥ 1$"),
        ((nn.Identity(), "digits"), {"normalization": "mean"}, r"^normalization \(='mean'\) must be a Normalization"),
        ((nn.Identity(), torch.zeros(2, 1, 8, 8)), {}, r"^data \(=a Tensor\) must be NAME or NAME:PATH, or a Data$"),
    ],
)
def test_arguments_of_another_kind(arguments, options, text):
    with pytest.raises(UsageError, match=text):
        rp.evaluate(*arguments, device="cpu", **options)


@pytest.mark.parametrize("precision", ["fp16", "FP32", 16])
def test_a_precision_that_is_not_there(net, precision):
    with pytest.raises(UsageError, match=r"^precision \(=.*\) is unknown; accepted: auto, fp32, bf16"):
        rp.evaluate(net, digits(), device="cpu", precision=precision)


def test_images_of_other_channels_than_the_mean(net):
    colour = rp.Normalization.per_pixel_mean(torch.rand(3, 8, 8))
    with pytest.raises(UsageError, match="^images of 1 channel.s. cannot be normalized by the mean of 3$"):
        on(net, digits(), normalization=colour)


@pytest.mark.parametrize("protocol", ["single-view", "ten-crop"])
def test_scores_are_what_errors_are_counted_of(protocol):
    members, data = [network(seed=0), network(seed=1)], digits()
    options = {"normalization": PLAIN, "device": "cpu", "batch_size": 13}
    both, labels = rp.scores(members, data, protocol, **options)
    assert both.shape == (len(data.test), 10) and torch.equal(labels, data.test.labels)
    tallied, evaluated = rp.tally([(both, labels)]), rp.evaluate(members, data, protocol, **options)
    assert tallied == dataclasses.replace(evaluated, loss=tallied.loss)
    assert tallied.loss == pytest.approx(evaluated.loss, rel=1e-12)  # summed over batches, or at once
    each = [rp.scores(member, data, protocol, **options)[0].exp() for member in members]
    torch.testing.assert_close(both.exp(), (each[0] + each[1]) / 2)
    both += 1  # a tensor like others
    with pytest.raises(UsageError, match="^there are no images to evaluate on$"):
        rp.scores(members, digits(test=0), **options)


def test_no_images(net):
    with pytest.raises(UsageError, match="^there are no images to evaluate on$"):
        on(net, digits(test=0), normalization=PLAIN)


def test_no_normalization(net):
    with pytest.raises(UsageError) as caught:
        on(net, digits().test)
    assert str(caught.value) == ("the network has no normalization: give normalization=…, or a whole data set")


def test_multi_scale_needs_files(net):
    with pytest.raises(UsageError) as caught:
        on(net, digits(), "multi-scale")
    assert str(caught.value) == (
        "protocol (='multi-scale') needs image files (folder:PATH); small images have one scale"
    )


def test_ten_crop_needs_room():
    with pytest.raises(UsageError, match="^ten-crop needs images of at least 9×9, not 12×8$"):
        ten_crops(torch.zeros(1, 1, 12, 8), (9, 9))


# -- top-5 and the tally -----------------------------------------------------------------------------------------


def test_top5_by_hand():
    scores = torch.log_softmax(torch.arange(10.0).repeat(3, 1), 1).double()
    result = tally([(scores[:2], torch.tensor([9, 5])), (scores[2:], torch.tensor([4]))])
    assert (result.images, result.errors) == (3, 2)
    assert result.error == pytest.approx(200 / 3)
    assert result.top5_error == pytest.approx(100 / 3)
    assert result.loss == pytest.approx(-(scores[0, 9] + scores[0, 5] + scores[0, 4]).item() / 3)


def test_fewer_than_five_classes_are_always_in_the_top():
    result = tally([(torch.log_softmax(torch.tensor([[3.0, 2.0, 1.0]]), 1), torch.tensor([2]))])
    assert (result.error, result.top5_error) == (100, 0)


def test_a_score_of_zero_costs_a_finite_loss():
    class Sure(nn.Module):
        def forward(self, x):
            return torch.tensor([[1e4, 0.0]]).expand(len(x), 2)

    images = ImageSet(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.tensor([1]))
    result = on(Sure(), images, normalization=PLAIN)
    assert result.errors == 1
    assert math.isfinite(result.loss)
    assert result.loss > 100


# -- ten-crop ----------------------------------------------------------------------------------------------------


def test_the_ten_crops_are_the_corners_the_centre_and_their_flips():
    image = torch.arange(6 * 8).view(1, 1, 6, 8)
    crops = [crop[0, 0].numpy() for crop in ten_crops(image, (4, 4))]
    whole = image[0, 0].numpy()
    expected = [whole[:4, :4], whole[:4, -4:], whole[-4:, :4], whole[-4:, -4:], whole[1:5, 2:6]]
    expected += [np.fliplr(crop) for crop in expected]
    assert len(crops) == 10
    for crop, wanted in zip(crops, expected, strict=True):
        np.testing.assert_array_equal(crop, wanted)
    assert len({crop.tobytes() for crop in crops}) == 10


def test_ten_crops_of_images_that_are_not_square_have_their_shape():
    net, images = Recording(), ImageSet(torch.zeros(2, 3, 16, 40, dtype=torch.uint8), torch.tensor([0, 1]))
    on(net, images, "ten-crop", normalization=COLOUR)
    assert {tuple(view.shape) for view in net.seen} == {(2, 3, 16, 40)}


class Recording(nn.Module):
    """Scores by the mean pixel, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


def test_ten_crops_of_a_constant_image_score_alike(tmp_path):
    Image.new("RGB", (50, 70), (200, 210, 220)).save(tmp_path / "grey.png")
    net, files = Recording(), FolderSet((tmp_path / "grey.png",), torch.tensor([0]), size=28)
    result = on(net, files, "ten-crop", normalization=COLOUR)
    assert len(net.seen) == 10
    for view in net.seen:
        assert view.shape == (1, 3, 28, 28)
        assert torch.equal(view, net.seen[0])
    assert result.errors == 0
    single = on(net, files, normalization=COLOUR)
    assert result.loss == pytest.approx(single.loss, rel=1e-6)


class ByCorner(nn.Module):
    """Very sure of class 0 where the first pixel is lit, a little sure of class 1 elsewhere."""

    def forward(self, x):
        lit = x[:, 0, 0, 0] > 0.5
        return torch.where(lit[:, None], torch.tensor([40.0, 0.0]), torch.tensor([0.0, 2.0]))


def test_ten_crop_averages_softmax_and_not_logits():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, 0, 0] = 255  # padded, it is the first pixel of the centre crop alone
    result = on(ByCorner(), ImageSet(image, torch.tensor([1])), "ten-crop", normalization=PLAIN)
    other = 1 / (1 + math.exp(-2))
    assert (40 * 1 + 0 * 9) / 10 > 2 * 9 / 10, "by logits the answer would be class 0, an error"
    assert result.errors == 0
    assert result.loss == pytest.approx(-math.log((9 * other + math.exp(-40)) / 10), rel=1e-9)


def test_ten_crop_of_small_images_equals_a_naive_twin(net):
    data = digits(test=20)
    normalization = Normalization.fit(data.train.images, "per-pixel-mean")
    result = on(net, data, "ten-crop", batch_size=9)
    net.eval()
    rows = []
    for image in data.test.images:
        padded = torch.zeros(1, 10, 10)  # after the mean is subtracted, as in training
        padded[:, 1:9, 1:9] = image.float() / 255 - normalization.mean
        total = torch.zeros(10, dtype=torch.float64)
        for top, left in [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]:
            crop = padded[:, top : top + 8, left : left + 8]
            for view in (crop, crop.flip(2)):
                with torch.no_grad():
                    total += net(view[None])[0].double().softmax(0)
        rows.append((total / 10).log())
    check(result, torch.stack(rows), data.test.labels)


@pytest.mark.parametrize(("side", "pixels"), [(4, 1), (8, 1), (28, 3), (32, 4), (64, 4)])
def test_small_images_are_padded_as_cifars_or_in_proportion(side, pixels):
    assert ten_crop_padding(side) == pixels


def test_ten_crop_of_files_crops_at_256_of_224(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    net, files = Recording(), FolderSet((tmp_path / "a.png",), torch.tensor([0]), size=56)
    on(net, files, "ten-crop", normalization=Normalization.channels((0.0,) * 3, (1.0,) * 3))
    # 56 · 256/224 = 64: the file as it is, uncropped and not resized.
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    corners = [(0, 0), (0, 40), (8, 0), (8, 40), (4, 20)]
    expected = [whole[..., top : top + 56, left : left + 56] for top, left in corners]
    for seen, wanted in zip(net.seen, [*expected, *(crop.flip(3) for crop in expected)], strict=True):
        assert torch.equal(seen, wanted)


@pytest.mark.parametrize("protocol", ["ten-crop", "multi-scale"])
def test_files_that_other_processes_read_are_the_same(tmp_path, monkeypatch, protocol):
    random, paths = np.random.default_rng(0), []
    for index, shape in enumerate([(40, 50, 3), (60, 40, 3), (45, 45, 3), (45, 45, 3)]):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    files, seen = FolderSet(tuple(paths), torch.tensor([0, 1, 0, 1]), size=28), []
    for processes in (0, 2):
        monkeypatch.setattr("resprobe.data.folder.loader_processes", lambda items, processes=processes: processes)
        net = Recording()
        result = on(net, files, protocol, normalization=COLOUR)
        seen.append((result, net.seen))
    assert seen[0][0] == seen[1][0]
    assert all(map(torch.equal, seen[0][1], seen[1][1]))


def test_ten_crop_of_many_files_comes_in_batches(tmp_path):
    random, paths = np.random.default_rng(0), []
    for index, shape in enumerate([(40, 50, 3), (60, 40, 3), (45, 45, 3)]):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    files, net = FolderSet(tuple(paths), torch.tensor([0, 1, 0]), size=28), Recording()
    result = on(net, files, "ten-crop", normalization=COLOUR, batch_size=20)
    assert [len(view) for view in net.seen] == [2] * 10 + [1] * 10  # twenty crops at a time
    single = [on(net, files.select(torch.tensor([index])), "ten-crop", normalization=COLOUR) for index in range(3)]
    assert result.images == 3
    assert result.errors == sum(one.errors for one in single)
    assert result.loss == pytest.approx(sum(one.loss for one in single) / 3, rel=1e-6)


def test_multi_scale_takes_files_of_one_shape_together(tmp_path):
    random, paths = np.random.default_rng(1), []
    for index, (width, height) in enumerate([(30, 40), (30, 40), (30, 40), (40, 30), (30, 40)]):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    files, net = FolderSet(tuple(paths), torch.tensor([0, 1, 0, 1, 1])).cropped(28), Recording()
    result = on(net, files, "multi-scale", normalization=COLOUR, batch_size=50)
    assert [len(view) for view in net.seen] == [2] * 5 + [1] * 5 + [1] * 5 + [1] * 5
    single = [on(net, files.select(torch.tensor([index])), "multi-scale", normalization=COLOUR) for index in range(5)]
    assert (result.images, result.errors) == (5, sum(one.errors for one in single))
    assert result.loss == pytest.approx(sum(one.loss for one in single) / 5, rel=1e-6)


def test_scales_are_in_proportion_to_the_crop(tmp_path):
    Image.new("RGB", (60, 40), (9, 99, 199)).save(tmp_path / "a.png")
    net, files = Recording(), FolderSet((tmp_path / "a.png",), torch.tensor([0])).cropped(112)
    on(net, files, "multi-scale", normalization=COLOUR)
    assert [min(view.shape[2:]) for view in net.seen] == [112, 128, 192, 240, 320]


# -- multi-scale -------------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """Takes any size: shares of edges in three random directions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=4)
        nn.init.normal_(self.conv.weight, generator=torch.Generator().manual_seed(0))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return self.conv(x).relu().mean((2, 3)) * 3


def test_multi_scale_equals_a_naive_twin(tmp_path):
    random, paths = np.random.default_rng(0), []
    for index, (width, height) in enumerate([(80, 60), (60, 90), (70, 70)]):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        paths.append(tmp_path / f"{index}.png")
        coarse.resize((width, height)).save(paths[-1])
    labels = torch.tensor([0, 1, 2])
    net = Convolutional()
    result = on(net, FolderSet(tuple(paths), labels), "multi-scale", normalization=COLOUR)
    seen, net.sizes = net.sizes, []
    rows = []
    for path in paths:
        total = torch.zeros(3, dtype=torch.float64)
        for scale in (224, 256, 384, 480, 640):
            with Image.open(path) as image:
                ratio = scale / min(image.size)
                size = (round(image.width * ratio), round(image.height * ratio))
                pixels = np.array(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
            view = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
            with torch.no_grad():
                total += net((view - COLOUR.mean) / COLOUR.std)[0].double().softmax(0)
        rows.append((total / 5).log())
    check(result, torch.stack(rows), labels)
    assert seen == net.sizes
    assert SCALES == (224, 256, 384, 480, 640)
    assert seen[:5] == [(scale, round(scale * 80 / 60)) for scale in SCALES]


# -- ensembles ---------------------------------------------------------------------------------------------------


def test_an_ensemble_averages_scores(net):
    data, other = digits(), network("cifar/plain", seed=3)
    other.normalization = Normalization.channels((0.5,), (0.5,))
    result = on([net, other], data)
    fitted = Normalization.fit(data.train.images, "per-pixel-mean")
    with torch.no_grad():
        one = net.eval()(fitted(data.test.images)).double().softmax(1)
        two = other.eval()(other.normalization(data.test.images)).double().softmax(1)
    check(result, ((one + two) / 2).log(), data.test.labels)
    assert result.loss not in (on(net, data).loss, on(other, data).loss)


def test_a_network_with_itself_is_itself(net):
    data = digits()
    assert on((net, net), data).loss == pytest.approx(on(net, data).loss, rel=1e-12)


# -- modes -------------------------------------------------------------------------------------------------------


def modes(net: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in net.named_modules()}


@pytest.fixture
def half_frozen() -> nn.Module:
    net = network()
    net.train()
    net.stem.norm.eval()
    net.stage2.eval()
    return net


def test_evaluation_mode_gives_every_module_its_own_mode_back(half_frozen):
    before = modes(half_frozen)
    assert set(before.values()) == {True, False}
    with evaluation_mode(half_frozen):
        assert not any(modes(half_frozen).values())
    assert modes(half_frozen) == before
    with pytest.raises(KeyError), evaluation_mode(half_frozen):
        raise KeyError
    assert modes(half_frozen) == before


def test_evaluate_restores_modes_and_leaves_the_network_as_it_was(half_frozen):
    frozen, other = half_frozen, network(seed=1)
    before, weights = (modes(frozen), modes(other)), {k: v.clone() for k, v in frozen.state_dict().items()}
    on([frozen, other], digits())
    assert (modes(frozen), modes(other)) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in frozen.state_dict().items())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_evaluate_restores_modes_after_an_exception(half_frozen):
    before, grad = modes(half_frozen), torch.is_grad_enabled()

    class Breaks(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="^broken$"):
        on([half_frozen, Breaks()], digits(), normalization=PLAIN)
    assert modes(half_frozen) == before
    assert torch.is_grad_enabled() is grad
    assert hook_count(half_frozen) == 0


def test_evaluating_files_draws_none_of_the_callers_random_numbers(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    files = FolderSet((tmp_path / "a.png",), torch.tensor([0]), size=16)
    before = torch.get_rng_state()
    for protocol in ("single-view", "ten-crop"):
        on(Recording(), files, protocol, normalization=COLOUR)
    assert torch.equal(torch.get_rng_state(), before)


# -- precise batch normalization ---------------------------------------------------------------------------------


class Two(nn.Module):
    """Two normalizations in a row; the second sees what the first makes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(2, momentum=0.3), nn.BatchNorm2d(2, momentum=0.7)
        self.free = nn.BatchNorm2d(2, track_running_stats=False)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([2.0, 0.5]))
            self.first.running_mean.fill_(7)
            self.second.running_var.fill_(7)

    def forward(self, x):
        return self.dropout(self.free(self.second(self.first(x).relu() + x)))


def batches(count: int = 4) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(6, 2, 3, 3, generator=random) * (1 + index) + index for index in range(count)]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance a channel, in plain arithmetic."""
    values = x.transpose(0, 1).flatten(1).double()
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().sum(1) / (values.shape[1] - 1)


def test_precise_statistics_are_true_averages():
    net = Two()
    precise_batch_norm(net, iter(batches()))
    firsts, seconds = [], []
    for x in batches():
        firsts.append(statistics(x))
        out = F.batch_norm(x, None, None, net.first.weight, net.first.bias, training=True).relu() + x
        seconds.append(statistics(out.detach()))
    for module, seen in ((net.first, firsts), (net.second, seconds)):
        mean, variance = (torch.stack(part).mean(0).float() for part in zip(*seen, strict=True))
        torch.testing.assert_close(module.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.running_var, variance, rtol=1e-5, atol=1e-6)
        assert module.num_batches_tracked == 4


def test_precise_statistics_of_a_module_called_twice_are_of_all_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x):
            return self.norm(x), self.norm(3 * x)

    net = Twice()
    precise_batch_norm(net, batches())
    means = [statistics(times * x)[0] for x in batches() for times in (1, 3)]
    torch.testing.assert_close(net.norm.running_mean, torch.stack(means).mean(0).float(), rtol=1e-5, atol=1e-6)
    assert not net.norm._forward_pre_hooks


def test_precise_statistics_leave_momenta_modes_weights_and_random_numbers_alone():
    net = Two().train()
    before, weights = modes(net), [parameter.clone() for parameter in net.parameters()]
    random = torch.get_rng_state()
    precise_batch_norm(net, batches())
    assert (net.first.momentum, net.second.momentum) == (0.3, 0.7)
    assert modes(net) == before
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), random), "dropout must not draw"
    assert all(parameter.grad is None for parameter in net.parameters())


def test_precise_statistics_leave_frozen_modules_alone():
    net = Two().train()
    net.first.eval()
    before = {name: buffer.clone() for name, buffer in net.first.named_buffers()}
    precise_batch_norm(net, batches())
    for name, buffer in net.first.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert not net.first.training
    # What comes after them sees their frozen output.
    frozen = (batches()[0] - 7) / math.sqrt(1 + 1e-5) * net.first.weight.detach().view(2, 1, 1)
    assert net.second.num_batches_tracked == 4
    twin = Two().train()
    twin.first.eval()
    precise_batch_norm(twin, batches(1))
    mean, _ = statistics(frozen.relu() + batches()[0])
    torch.testing.assert_close(twin.second.running_mean, mean.float(), rtol=1e-5, atol=1e-5)


def test_a_network_that_is_not_training_has_no_frozen_modules():
    one, other = Two().eval(), Two().train()
    precise_batch_norm(one, batches())
    precise_batch_norm(other, batches())
    assert torch.equal(one.first.running_mean, other.first.running_mean)
    assert torch.equal(one.second.running_var, other.second.running_var)
    assert not any(modes(one).values())


def test_momenta_and_modes_come_back_after_an_exception():
    net = Two().train()
    net.dropout.eval()
    before = modes(net)
    with pytest.raises(RuntimeError):
        precise_batch_norm(net, [torch.zeros(6, 5, 3, 3)])
    assert (net.first.momentum, net.second.momentum) == (0.3, 0.7)
    assert modes(net) == before
    assert torch.is_grad_enabled()


def test_without_batch_normalization_no_batch_is_taken():
    def never():
        raise AssertionError("a batch was asked for")
        yield

    precise_batch_norm(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False)), never())


@pytest.mark.gpu
def test_a_network_that_was_evaluated_on_cuda_is_where_it_was():
    net, data = network().train(), digits()
    with torch.no_grad():
        before = net.eval()(PLAIN(data.test.images[:2]))
    placed = {name: tensor.device for name, tensor in net.train().state_dict().items()}
    found = evaluate(net, data, device="cuda", precision="fp32")
    assert {name: tensor.device for name, tensor in net.state_dict().items()} == placed and net.training
    assert found.loss == pytest.approx(on(net, data).loss, rel=1e-3)
    with torch.no_grad():
        assert torch.equal(net.eval()(PLAIN(data.test.images[:2])), before)


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["single-view", "ten-crop", "multi-scale"])
def test_files_are_evaluated_on_cuda_as_on_the_cpu(protocol, tmp_path):
    Image.effect_noise((30, 40), 90).convert("RGB").save(tmp_path / "a.png")
    files = FolderSet((tmp_path / "a.png",) * 3, torch.tensor([0, 1, 2])).cropped(28)
    net = network(in_channels=3)
    here, there = (
        evaluate(net, files, protocol, normalization=COLOUR, device=device, precision="fp32")
        for device in ("cpu", "cuda")
    )
    assert (there.images, there.loss) == (3, pytest.approx(here.loss, rel=1e-3))
