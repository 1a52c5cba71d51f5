"""Test protocols: the single view of §4.2, 10-crop and multi-scale fully-convolutional testing of §3.4, ensembles."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resprobe.data import Data, FolderSet, ImageSet, Normalization, load_data
from resprobe.devices import autocast, memory_format, resolve_device, resolve_precision
from resprobe.errors import UsageError, check_whole, not_accepted
from resprobe.modes import evaluation_mode
from resprobe.networks import Network, NetworkSpec, check_fit, check_logits

PROTOCOLS = ("single-view", "ten-crop", "multi-scale")
SCALES = (224, 256, 384, 480, 640)
"""Shorter sides of multi-scale testing (§3.4)."""


@dataclass(frozen=True)
class Evaluation:
    """Result of a test. Errors in percent; `errors` is the count of wrong images; `loss` the mean cross-entropy."""

    images: int
    errors: int
    error: float
    top5_error: float
    loss: float


def normalization_of(network: nn.Module, data: Data | None) -> Normalization:
    """How a network's inputs are normalized: as it was trained (`network.normalization`), else by the per-pixel mean of the
    training part of `data` (§3.4, §4.2), with a warning if the network is not one that `rp.build` made.

    Raises `UsageError` if neither is there.
    """
    network = _within(network)
    own = getattr(network, "normalization", None)
    if isinstance(own, Normalization):
        return own
    if data is None:
        raise UsageError("the network has no normalization: give normalization=…, or a whole data set")
    if not isinstance(network, Network):  # it may well have been trained by another one
        warnings.warn(
            f"{type(network).__name__} does not say how its inputs are normalized; the data's mean image is subtracted. "
            "Where it was another, give normalization=…"
        )
    return Normalization.fit(data.train.sample(2000), "per-pixel-mean")


def _within(network: nn.Module) -> nn.Module:
    """What `DataParallel` or `DistributedDataParallel` is wrapped around, which alone says what it is."""
    wrapped = isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return network.module if wrapped else network


def evaluate(
    network: nn.Module | Sequence[nn.Module],
    data: str | Data | ImageSet | FolderSet,
    protocol: str = "single-view",
    *,
    normalization: Normalization | None = None,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    precision: str = "fp32",
) -> Evaluation:
    """Error of `network` on the test part of `data`.

    "single-view": the whole small image (§4.2), or the centre crop of a file. "ten-crop": four corners, centre and
    their flips, softmax scores averaged (§3.4). "multi-scale": the network applied fully convolutionally with the
    shorter side at 224, 256, 384, 480 and 640 pixels, scores averaged over scales (§3.4; image files only). Files are
    cropped to `data.cropped(size)`; for crops other than 224 pixels the scales are in proportion.
    A sequence of networks is an ensemble: their scores are averaged. Networks are left where they were, in their modes.
    `batch_size`: images at a time; None is 250, of small images on CUDA 2,000. `precision` is float32 whatever a network was
    trained in, so that a run's own `test_error`, tested in bfloat16 where it was trained so, may be a few images off.

    Inputs are normalized by `normalization`, else as the network was trained (`network.normalization`), else by the
    per-pixel mean of the training part of `data`, with a warning if the network is not one that `rp.build` made.
    Raises `UsageError` for a network that does not fit the data.
    """
    with _scoring(network, data, protocol, normalization, batch_size, device, precision) as scored:
        return tally(scored)


def scores(
    network: nn.Module | Sequence[nn.Module],
    data: str | Data | ImageSet | FolderSet,
    protocol: str = "single-view",
    *,
    normalization: Normalization | None = None,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """What `evaluate` counts errors of, image by image, on the CPU: log-probabilities [N, classes], the mean softmax over
    views and networks, and labels [N]. Arguments and errors are those of `evaluate`."""
    with _scoring(network, data, protocol, normalization, batch_size, device, precision) as scored:
        parts = [(of_batch.cpu(), labels.cpu()) for of_batch, labels in scored]
    if not parts:
        raise UsageError("there are no images to evaluate on")
    log_probabilities, labels = zip(*parts, strict=True)
    return torch.cat(log_probabilities), torch.cat(labels)  # here, or they could not be changed in place


@contextmanager
def _scoring(
    network: nn.Module | Sequence[nn.Module],
    data: str | Data | ImageSet | FolderSet,
    protocol: str,
    normalization: Normalization | None,
    batch_size: int | None,
    device: str | torch.device,
    precision: str,
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Log-probabilities [N, classes] and labels [N] of batch after batch, on the device, to be taken in the `with` block."""
    if protocol not in PROTOCOLS:
        raise not_accepted("protocol", protocol, PROTOCOLS)
    networks = list(network) if isinstance(network, list | tuple) else [network]
    if not networks or not all(isinstance(member, nn.Module) for member in networks):
        kinds = ", ".join(type(member).__name__ for member in networks) or "nothing"
        raise UsageError(f"network (={kinds}) must be a built network, or a list of them: rp.build makes one of a name")
    if normalization is not None and not isinstance(normalization, Normalization):
        raise UsageError(
            f"normalization (={normalization!r}) must be a Normalization, such as Normalization.fit(images)"
        )
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    images: ImageSet | FolderSet
    loaded = None
    if isinstance(data, ImageSet | FolderSet):
        images = data
    else:
        loaded = load_data(data)
        images = loaded.test
        for spec in (getattr(_within(member), "spec", None) for member in networks):
            if isinstance(spec, NetworkSpec):
                check_fit(spec, loaded)
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    if batch_size is None:
        # A card waits for its kernels to be launched, for 2,000 small images hardly longer than for 250.
        batch_size = 2000 if device.type == "cuda" and isinstance(images, ImageSet) else 250
    members: list[tuple[nn.Module, Normalization]] = []
    for member in networks:
        members.append((member, (normalization or normalization_of(member, loaded)).to(device)))
    views = {"single-view": _single_view, "ten-crop": _ten_crop, "multi-scale": _multi_scale}[protocol](
        images, batch_size
    )
    # Small images are padded after normalization, as in training, so that their crops are cut there.
    crops = _padded_crops if protocol == "ten-crop" and isinstance(images, ImageSet) else _whole

    classes = int(images.labels.max()) + 1 if len(images) else 0

    def score(batch: Sequence[Tensor]) -> Tensor:
        """Mean softmax over members and views: log-probabilities [N, classes]."""
        total, count = None, 0
        for member, normalize in members:
            for view in (crop for whole in batch for crop in crops(normalize(whole.to(device)))):
                with autocast(device, precision):
                    logits = member(view.contiguous(memory_format=memory_format(device)))
                check_logits(member, logits, len(view), classes)
                probabilities = logits.double().softmax(1) if device.type != "mps" else logits.float().softmax(1)
                total = probabilities if total is None else total + probabilities
                count += 1
        assert total is not None
        return (total / count).clamp_min(1e-300 if total.dtype == torch.float64 else 1e-38).log()

    with ExitStack() as stack:
        for member in networks:
            stack.enter_context(_lent(member, device))
        stack.enter_context(torch.inference_mode())
        yield ((score(batch), labels.to(device)) for batch, labels in views)


def tally(scored: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Counts errors over batches of (log-probabilities [N, classes], labels [N]); one transfer to the host at the end.

    `tally([scores(…)])` is what `evaluate` gives.
    """
    images, sums = 0, None
    for log_probabilities, labels in scored:
        top = log_probabilities.topk(min(5, log_probabilities.shape[1]), dim=1).indices
        right = top == labels[:, None]
        loss = F.nll_loss(log_probabilities, labels, reduction="sum")
        counts = torch.stack([(~right[:, 0]).sum().to(loss.dtype), (~right.any(1)).sum().to(loss.dtype), loss])
        sums = counts if sums is None else sums + counts
        images += len(labels)
    if sums is None:
        raise UsageError("there are no images to evaluate on")
    wrong, wrong_top5, loss_sum = sums.tolist()
    return Evaluation(images, round(wrong), 100 * wrong / images, 100 * wrong_top5 / images, loss_sum / images)


def precise_batch_norm(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces running statistics by true averages over `batches` of normalized images, as the authors did.

    Modules that are frozen (in eval mode already while the network trains) are left alone.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [module for module in norms if module.track_running_stats and (module.training or not network.training)]
    if not norms:
        return
    momenta = [module.momentum for module in norms]
    calls = dict.fromkeys(norms, 0)

    def average(module: nn.Module, _: object) -> None:
        # A cumulative average. `momentum = None` would be one too, and ask the device how many batches came before.
        calls[module] += 1
        module.momentum = 1 / calls[module]

    with evaluation_mode(network), torch.no_grad():
        for module in norms:
            module.reset_running_stats()
            module.train()
        hooks = [module.register_forward_pre_hook(average) for module in norms]
        try:
            for images in batches:
                network(images)
        finally:
            for hook, module, momentum in zip(hooks, norms, momenta, strict=True):
                hook.remove()
                module.momentum = momentum


@contextmanager
def _lent(network: nn.Module, device: torch.device) -> Iterator[None]:
    """In evaluation mode and on `device` for the length of a block; then again in its own, and where it was."""
    home = next((parameter.device for parameter in network.parameters()), device)
    with evaluation_mode(network.to(device)):
        try:
            yield
        finally:
            network.to(home)


Views = Iterator[tuple[Sequence[Tensor], Tensor]]


def _single_view(images: ImageSet | FolderSet, batch_size: int) -> Views:
    for batch, labels in images.views(batch_size):
        yield [batch], labels


def _ten_crop(images: ImageSet | FolderSet, batch_size: int) -> Views:
    """Ten crops of files at 256/224 of the crop; small images as they are (see `_padded_crops`)."""
    if isinstance(images, ImageSet):
        yield from _single_view(images, batch_size)
        return
    files = images.whole([images.size * 256 // 224])
    while group := list(itertools.islice(files, max(1, batch_size // 10))):
        crops = (ten_crops(image[None], (images.size, images.size)) for (image,), _ in group)
        yield [torch.cat(views) for views in zip(*crops, strict=True)], torch.tensor([label for _, label in group])


def _padded_crops(images: Tensor) -> list[Tensor]:
    """Ten crops of normalized small images, padded on each side."""
    size = images.shape[-2:]
    return ten_crops(F.pad(images, (ten_crop_padding(min(size)),) * 4), size)


def ten_crop_padding(side: int) -> int:
    """Pixels by which small images are padded for ten crops: 4 (§4.2), or as much less as they are smaller than CIFAR's, so
    that a corner crop shows three quarters of the image and more."""
    return max(1, min(4, side // 8))


def _whole(images: Tensor) -> list[Tensor]:
    return [images]


def ten_crops(images: Tensor, size: Sequence[int]) -> list[Tensor]:
    """Four corners and the centre of [N, C, H, W], and their horizontal flips: ten tensors [N, C, *size]."""
    (height, width), (high, wide) = images.shape[-2:], size
    if height < high or width < wide:
        raise UsageError(f"ten-crop needs images of at least {high}×{wide}, not {height}×{width}")
    bottom, right, middle, centre = height - high, width - wide, (height - high) // 2, (width - wide) // 2
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (middle, centre)]
    crops = [images[..., top : top + high, left : left + wide] for top, left in corners]
    return crops + [crop.flip(-1) for crop in crops]


def _multi_scale(images: ImageSet | FolderSet, batch_size: int) -> Views:
    if isinstance(images, ImageSet):
        raise UsageError("protocol (='multi-scale') needs image files (folder:PATH); small images have one scale")
    files = images.whole([scale * images.size // 224 for scale in SCALES])
    # Files of one shape that follow each other go through the network together; the largest scale has 8 times the pixels.
    for _, alike in itertools.groupby(files, lambda file: [view.shape for view in file[0]]):
        while group := list(itertools.islice(alike, max(1, batch_size // 25))):
            at_scales = zip(*(views for views, _ in group), strict=True)
            yield [torch.stack(views) for views in at_scales], torch.tensor([label for _, label in group])
