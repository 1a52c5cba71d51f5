"""Images in memory, their normalization, and a data set's parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from resprobe.errors import UsageError


@dataclass(frozen=True)
class Normalization:
    """Input normalization (x/255 − mean) / std of uint8 images.

    `mean` is [C, H, W] (the mean image of §4.2) or [C, 1, 1]; `std` is [C, 1, 1]. Both in units of x/255.
    """

    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] → float32 of the same shape. Raises `UsageError` for images of other channels."""
        if self.mean.shape[0] not in (1, images.shape[1]):
            raise UsageError(
                f"images of {images.shape[1]} channel(s) cannot be normalized by the mean of {self.mean.shape[0]}"
            )
        return (images.float() / 255 - self.mean_at(images.shape[-2:])) / self.std

    def mean_at(self, size: tuple[int, int]) -> Tensor:
        """The mean for images of another size: a mean image is resampled (multi-scale testing, §3.4)."""
        if self.mean.shape[-2:] in (tuple(size), (1, 1)):
            return self.mean
        return F.interpolate(self.mean[None], size=tuple(size), mode="bilinear", align_corners=False)[0]

    def to(self, device: torch.device) -> Normalization:
        return Normalization(self.mean.to(device), self.std.to(device))

    @classmethod
    def per_pixel_mean(cls, mean_image: Tensor) -> Normalization:
        """Subtraction of a mean image [C, H, W] in [0, 1], nothing else (§4.2)."""
        return cls(mean_image.float(), torch.ones(mean_image.shape[0], 1, 1, device=mean_image.device))

    @classmethod
    def channels(cls, mean: tuple[float, ...], std: tuple[float, ...]) -> Normalization:
        """One mean and one standard deviation a channel."""
        return cls(torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1))

    @classmethod
    def fit(cls, images: Tensor, kind: str) -> Normalization:
        """The normalization `kind` (see `Recipe.normalization`) of uint8 training images [N, C, H, W]."""
        # Sums of 1,024 bytes are whole numbers that float32 holds exactly.
        total = sum(chunk.float().sum(0).cpu().double() for chunk in images.split(1024))
        mean_image = total / (len(images) * 255)
        if kind == "per-pixel-mean":
            return cls.per_pixel_mean(mean_image).to(images.device)
        mean = mean_image.mean((1, 2))
        # A histogram of 256 levels a channel holds all there is to know, and needs no float copy of the set.
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).cpu().double()
        levels = torch.arange(256, dtype=torch.float64) / 255
        variance = (counts * levels.square()).sum(1) / counts.sum(1) - mean.square()
        std = variance.clamp_min(1e-12).sqrt()
        return cls(mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)).to(images.device)


@dataclass(frozen=True)
class ImageSet:
    """Images in memory: uint8 [N, C, H, W] and int64 labels [N], on one device."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise UsageError(
                f"images must be uint8 [N, C, H, W], not {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        height, width, channels = self.images.shape[1:]
        if channels in (1, 3, 4) and height == width and height > 4:
            raise UsageError(
                f"images of shape {tuple(self.images.shape)} seem to have their channels last; expected [N, C, H, W]: "
                "images.permute(0, 3, 1, 2)"
            )
        if self.labels.shape != (len(self.images),):
            raise UsageError(f"labels must have shape ({len(self.images)},), not {tuple(self.labels.shape)}")
        if self.labels.dtype != torch.int64:
            raise UsageError(f"labels must be int64 [N], not {self.labels.dtype}")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images of {'×'.join(map(str, self.images.shape[1:]))})"

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))

    def select(self, indices: Tensor) -> ImageSet:
        return ImageSet(self.images[indices], self.labels[indices])

    def digest(self) -> str:
        """What the images and labels are, as a digest."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def cropped(self, size: int) -> ImageSet:
        """These images: in memory they are as they are."""
        return self

    def sample(self, limit: int) -> Tensor:
        """Images to fit a normalization on: all of them, being in memory."""
        return self.images

    def views(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images in order, in batches (uint8, labels)."""
        for start in range(0, len(self), batch_size):
            yield self.images[start : start + batch_size], self.labels[start : start + batch_size]


@dataclass(frozen=True)
class Data:
    """A data set: its parts, its classes, and the name and identity by which runs on it are found again."""

    name: str
    identity: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    validation: ImageSet | None = None

    def __post_init__(self) -> None:
        for name in ("name", "identity"):
            if not (isinstance(value := getattr(self, name), str) and value):
                raise UsageError(f"data: {name} (={value!r}) must be a text that says which data these are")
        for name in ("train", "test", "validation"):
            part = getattr(self, name)
            if isinstance(part, ImageSet) and len(part):
                least, most = (int(label) for label in part.labels.aminmax())
                if least < 0 or most >= len(self.classes):
                    raise UsageError(
                        f"data {self.name!r}: {name}'s labels go from {least} to {most}; with {len(self.classes)} classes "
                        f"they must be from 0 to {len(self.classes) - 1}"
                    )
            channels = {each.images.shape[1] for each in (self.train, part) if isinstance(each, ImageSet)}
            if len(channels) > 1:
                raise UsageError(f"data {self.name!r}: {name}'s images have other channels than train's: {channels}")

    @property
    def in_channels(self) -> int:
        return self.train.sample(1).shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def digest(self) -> str | None:
        """What the data are, as a digest; None of image files."""
        parts = [part for part in (self.train, self.test, self.validation) if part is not None]
        return "-".join(part.digest() for part in parts) if all(isinstance(part, ImageSet) for part in parts) else None

    def cropped(self, size: int) -> Data:
        """The same data, image files tested by a centre crop of `size` pixels."""
        validation = self.validation and self.validation.cropped(size)
        return replace(self, train=self.train.cropped(size), test=self.test.cropped(size), validation=validation)

    def hold_out(self, fraction: float) -> Data:
        """Holds out a fraction of the training set for validation (0.1 of CIFAR-10 is §4.2's 45k/5k).

        Which images does not depend on a run's seed, so that all runs choose on the same ones.
        """
        if fraction == 0:
            return self
        held = round(len(self.train) * fraction)
        if not 0 < held < len(self.train):
            raise UsageError(f"validation_fraction (={fraction}) holds out {held} of {len(self.train)} images")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(45_000))
        kept, held_out = order[held:].sort().values, order[:held].sort().values
        return replace(self, train=self.train.select(kept), validation=self.train.select(held_out))


def generator(*what: object) -> torch.Generator:
    """A random generator that is a pure function of what it is for: the same on every device, after every resume."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
