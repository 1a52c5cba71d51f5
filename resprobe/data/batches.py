"""Training batches as a pure function of (seed, iteration).

The order of images is one permutation an epoch, the epochs end to end: every batch is full and no image is skipped, as
the authors' cycling data layer does it. Since batch k does not depend on how training came to it, a resumed run sees
exactly the images it would have seen, whatever was interrupted.

A batch comes in two parts: tensors that are drawn for it (`drawn`), and what the device makes of them (`make`), which is a
part of the training step and can be captured with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from resprobe.data.folder import FolderSet
from resprobe.data.images import ImageSet, Normalization, generator
from resprobe.devices import memory_format
from resprobe.errors import UsageError
from resprobe.recipes import Recipe


class TensorBatches:
    """Augmented, normalized batches of images that live on the training device.

    Crop offsets and flips are drawn per image (§4.2) on the host once an epoch; the images themselves never leave the
    device. `make(choices(k))` gives float32 [batch_size, C, H, W] (channels last in memory) and int64 labels; with a
    `part`, `drawn` draws for these images of a batch alone.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        seed: int,
        normalization: Normalization,
        part: slice = slice(None),
    ):
        self.recipe, self.seed, self.count, self.part = recipe, seed, len(images), part
        self.pad = recipe.pad if recipe.augmentation == "pad-crop" else 0
        self.flip = recipe.flip if recipe.augmentation == "pad-crop" else 0.0
        self.height, self.width = images.images.shape[-2:]
        self.labels = images.labels
        device = images.images.device
        self.layout = memory_format(device)
        around = (self.pad,) * 4
        # [N, H + 2p, W + 2p, C]: with the channels last, gathering a crop reads whole pixels.
        self.padded = F.pad(images.images, around).permute(0, 2, 3, 1).contiguous()
        mean = normalization.mean_at((self.height, self.width)).to(device) * 255
        mean = mean.expand(-1, self.height, self.width)
        border = F.pad(mean, around)
        if recipe.pad_value == "black":  # the border is a black pixel, from which the colour's mean is subtracted
            inside = F.pad(torch.ones_like(mean), around)
            border = border + (1 - inside) * mean.mean((1, 2), keepdim=True)
        self.mean = border.permute(1, 2, 0).contiguous()
        self.scale = (1 / (255 * normalization.std)).to(device).view(-1)
        self.rows = torch.arange(self.height, device=device)
        self.columns = torch.arange(self.width, device=device)
        self.epochs: dict[int, Tensor] = {}

    def drawn(self, start: int) -> Iterator[tuple[Tensor]]:
        """What is drawn for the batches from iteration `start` (counted from 0) to the recipe's last: see `choices`."""
        for iteration in range(start, self.recipe.iterations):
            yield (self.choices(iteration)[self.part],)

    def make(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """The images that were chosen, cropped and flipped as was drawn, and their labels. Nothing here is random."""
        index, top, left, flipped = choices.unbind(1)
        rows = top[:, None] + self.rows
        columns = left[:, None] + torch.where(flipped[:, None] == 1, self.columns.flip(0), self.columns)
        rows, columns = rows[:, :, None], columns[:, None, :]
        pixels = self.padded[index[:, None, None], rows, columns].float()
        pixels = (pixels - self.mean[rows, columns]) * self.scale
        return pixels.permute(0, 3, 1, 2).contiguous(memory_format=self.layout), self.labels[index]

    def choices(self, iteration: int) -> Tensor:
        """What was drawn for the batch: int64 [batch_size, 4] of image, top, left, flipped."""
        start, stop = iteration * self.recipe.batch_size, (iteration + 1) * self.recipe.batch_size
        parts = []
        while start < stop:  # a batch may end one epoch and begin the next
            epoch, first = divmod(start, self.count)
            last = min(self.count, first + stop - start)
            parts.append(self._epoch(epoch)[first:last])
            start += last - first
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self.epochs:
            random = generator("epoch", self.seed, epoch)
            order = torch.randperm(self.count, generator=random)
            offsets = torch.randint(0, 2 * self.pad + 1, (self.count, 2), generator=random)
            flipped = torch.rand(self.count, generator=random) < self.flip
            drawn = torch.cat([order[:, None], offsets, flipped[:, None].long()], dim=1).to(self.labels.device)
            # Only the epochs a batch can touch are kept.
            self.epochs = {known: rows for known, rows in self.epochs.items() if known >= epoch - 1} | {epoch: drawn}
        return self.epochs[epoch]


class FolderBatches:
    """Augmented, normalized batches of images that come from files: made before the step, by a loader's processes."""

    def __init__(
        self,
        images: FolderSet,
        recipe: Recipe,
        seed: int,
        normalization: Normalization,
        device: torch.device,
        part: slice = slice(None),
    ):
        self.images, self.how = images, (recipe, seed, normalization.to(device), device)
        self.part = part

    def drawn(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the batches from iteration `start` (counted from 0) to the recipe's last, on the device."""
        return self.images.training_batches(*self.how, start, self.part)

    def make(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """They are made already."""
        return images, labels


def batches_of(
    images: ImageSet | FolderSet,
    recipe: Recipe,
    seed: int,
    normalization: Normalization,
    device: torch.device,
    part: slice = slice(None),
) -> TensorBatches | FolderBatches:
    """The batches of a run, normalized, on the device; of each batch the images `part`."""
    if isinstance(images, FolderSet):
        return FolderBatches(images, recipe, seed, normalization, device, part)
    if recipe.augmentation == "scale-crop":
        raise UsageError(
            "augmentation (='scale-crop') needs image files, as from folder:PATH; images in memory accept pad-crop, none"
        )
    return TensorBatches(images.to(device), recipe, seed, normalization, part)
