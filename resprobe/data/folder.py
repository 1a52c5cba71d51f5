"""Class folders of image files, read as they are needed: the ImageNet path of §3.4."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resprobe.data.images import Data, ImageSet, Normalization, generator
from resprobe.devices import cores, memory_format
from resprobe.errors import DamagedFile, UsageError, last_words
from resprobe.recipes import Recipe

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Principal components of ImageNet's RGB values (Krizhevsky et al. 2012, §4.1; the figures as in fb.resnet.torch).
_PCA_VALUES = torch.tensor([0.2175, 0.0188, 0.0045])
_PCA_VECTORS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
NO_PICTURE = (OSError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, or a broken one."""
_IN_MEMORY_BYTES = 2 * 2**30


class _NotOneTensor(UsageError):
    """Images of several sizes, or too many."""


@dataclass(frozen=True)
class FolderSet:
    """Image files with their labels. `size` is the side of the test crop in pixels; a training tests at its recipe's."""

    files: tuple[Path, ...]
    labels: Tensor
    size: int = 224

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return f"FolderSet({len(self)} files, crop {self.size})"

    def to(self, device: torch.device) -> FolderSet:
        return self

    def select(self, indices: Tensor) -> FolderSet:
        return FolderSet(tuple(self.files[index] for index in indices.tolist()), self.labels[indices], self.size)

    def cropped(self, size: int) -> FolderSet:
        """The same files with a test crop of `size` pixels."""
        return replace(self, size=size)

    def sample(self, limit: int) -> Tensor:
        """Up to `limit` images, spread evenly over the files, as single views: to fit a normalization on."""
        count = min(limit, len(self))
        chosen = [self.files[position * len(self) // count] for position in range(count)]
        return torch.stack([_centre_view(path, self.size) for path in chosen])

    def views(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The files in order as centre views, in batches (uint8, labels).

        The shorter side is resized to 256/224 of the crop, as in testing at 256 and cropping 224 (§3.4).
        """
        loader = DataLoader(
            _Views(self),
            batch_size,
            num_workers=loader_processes(len(self)),
            generator=torch.Generator(),  # else a loader draws one of the caller's random numbers
        )
        yield from _read_by(loader)

    def whole(self, sides: Sequence[int]) -> Iterator[tuple[list[Tensor], int]]:
        """The files in order, each whole at several scales, the shorter side `sides` pixels: uint8 [3, H, W] each; the label."""
        loader = DataLoader(
            _Whole(self, sides), None, num_workers=loader_processes(len(self)), generator=torch.Generator()
        )
        yield from _read_by(loader)

    def training_batches(
        self,
        recipe: Recipe,
        seed: int,
        normalization: Normalization,
        device: torch.device,
        start: int,
        part: slice = slice(None),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from `start` on: random scale, crop, flip and lighting (§3.4), each a function of (seed, position)."""
        if recipe.augmentation == "pad-crop":
            raise UsageError(
                "augmentation (='pad-crop') needs images of one size in memory; these files are too large or differ in "
                "size; accepted: scale-crop, none"
            )
        pinned = device.type == "cuda"
        loader = DataLoader(
            _Crops(self, recipe),
            batch_sampler=_Positions(len(self), recipe, seed, start, part),
            num_workers=loader_processes(len(self)),
            pin_memory=pinned,
            generator=torch.Generator(),  # else a resumed run's network would draw other random numbers
        )
        for crops, labels, light in _read_by(loader):
            # Without waiting only from pinned memory: else Apple's GPUs may read what is not there any more (pytorch#189690).
            images = normalization(crops.to(device, non_blocking=pinned))
            if recipe.colour == "pca":
                images = images + light.to(device, non_blocking=pinned)[:, :, None, None] / normalization.std
            yield images.contiguous(memory_format=memory_format(device)), labels.to(device, non_blocking=pinned)

    def in_memory(self) -> ImageSet:
        """All images as one tensor, for small images of one size. Raises `UsageError` if they are not."""
        width, height = _open(self.files[0]).size
        if width * height * 3 * len(self) > _IN_MEMORY_BYTES:
            raise _NotOneTensor(
                f"{len(self):,} images of {width}×{height} do not fit {_IN_MEMORY_BYTES >> 30} GiB of memory"
            )
        images = []
        for path in self.files:
            pixels = read_image(path)
            if pixels.shape[1:] != (height, width):
                raise _NotOneTensor(
                    f"{path} is {pixels.shape[2]}×{pixels.shape[1]}, the first image {width}×{height}; small ones must be alike"
                )
            images.append(pixels)
        return ImageSet(torch.stack(images), self.labels)


def open_folder(path: str | None) -> Data:
    """`path` with `train/CLASS/*.jpg` and `val/CLASS/*.jpg` (or `test/`). Small images of one size come in memory."""
    root = _given(path)
    if not root.is_dir():
        raise UsageError(f"data folder (={str(root)!r}) is not there; expected train/ and val/ with a folder a class")
    train, test = _parts(root)
    for part in (train, test):
        if not part.is_dir():
            raise UsageError(f"data folder (={str(root)!r}) has no {part.name}/; expected train/ and val/ (or test/)")
    classes = tuple(sorted(entry.name for entry in _class_folders(train)))
    if not classes:
        raise UsageError(f"data folder (={str(train)!r}) has no class folders; expected a folder a class")
    unknown = sorted({entry.name for entry in _class_folders(test)} - set(classes))
    if unknown:
        raise UsageError(f"{test} has classes that {train} has not: {', '.join(unknown[:5])}")
    parts = [_list_files(part, classes) for part in (train, test)]
    if empty := set(range(len(classes))).difference(parts[0].labels.tolist()):
        raise UsageError(
            f"data folder (={str(train)!r}) holds no images of {', '.join(classes[label] for label in sorted(empty))}"
        )
    train_set, test_set = parts
    if _is_small(train_set.files[0]):
        try:
            train_set, test_set = train_set.in_memory(), test_set.in_memory()
        except _NotOneTensor:
            if all(_is_small(file) for part in parts for file in part.files):
                raise
            # One small image among photographs.
    return Data(f"folder-{root.name}", folder_identity(str(root)), train_set, test_set, classes)  # type: ignore[arg-type]


def folder_identity(path: str | None) -> str:
    """A folder is what its files are: a digest of their relative paths and sizes. Where it stands does not matter."""
    root = _given(path)
    digest = hashlib.sha256()
    classes = [entry for part in _parts(root) if part.is_dir() for entry in _class_folders(part)]
    files = {file.relative_to(root): file for each in classes for file in _images_in(each)}
    for name in sorted(files, key=_in_order):
        digest.update(f"{name.as_posix()}\0{files[name].stat().st_size}\n".encode())
    return f"folder:{digest.hexdigest()[:16]}"


def _given(path: str | None) -> Path:
    if path is None:
        raise UsageError("data (='folder') needs a path: folder:PATH")
    return Path(path)


def _parts(root: Path) -> tuple[Path, Path]:
    """The folders to train on and to test on."""
    return root / "train", next((root / part for part in ("val", "test") if (root / part).is_dir()), root / "val")


def _class_folders(part: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones (of notebooks, say), which are none of the user's classes."""
    return [entry for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _images_in(folder: Path) -> list[Path]:
    """The image files in a folder, but for hidden ones, which macOS puts beside others on foreign disks."""
    files = [path for path in folder.glob("*") if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")]
    return sorted(files, key=_in_order)


def _in_order(path: PurePath) -> tuple[str, ...]:
    """What paths are sorted by, the same on all systems: Windows' own order knows no capitals."""
    return path.parts


def _list_files(part: Path, classes: tuple[str, ...]) -> FolderSet:
    files, labels = [], []
    for label, name in enumerate(classes):
        of_class = _images_in(part / name)
        files += of_class
        labels += [label] * len(of_class)
    if not files:
        raise UsageError(f"data folder (={str(part)!r}) holds no images ({', '.join(EXTENSIONS)})")
    return FolderSet(tuple(files), torch.tensor(labels))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image file, not yet decoded. Raises `DamagedFile` for what is none, also while it is decoded."""
    try:
        with Image.open(path) as image:
            yield image
    except NO_PICTURE as error:
        raise DamagedFile(f"image {path} cannot be read: {error}") from error


def _is_small(path: Path) -> bool:
    with _opened(path) as image:
        return max(image.size) <= 64


def read_image(path: Path) -> Tensor:
    """The picture as uint8 [3, H, W]. Raises `DamagedFile` for what is none."""
    return _pixels(_open(path))


def _open(path: Path) -> Image.Image:
    with _opened(path) as image:
        return image.convert("RGB")


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _crop(image: Image.Image, shorter: float, top: float, left: float, size: int) -> Image.Image:
    """Resizes so that the shorter side is `shorter` and crops [top, left, size, size], in one step."""
    ratio = min(image.size) / shorter
    left, top, right, bottom = (ratio * edge for edge in (left, top, left + size, top + size))
    # Rounding may put its edges a hair beyond the image.
    box = (max(0.0, left), max(0.0, top), min(right, image.width), min(bottom, image.height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _resized(image: Image.Image, shorter: int) -> Tensor:
    """The whole image, its shorter side `shorter` pixels: uint8 [3, H, W]."""
    ratio = shorter / min(image.size)
    size = (max(shorter, round(image.width * ratio)), max(shorter, round(image.height * ratio)))
    return _pixels(image.resize(size, Image.Resampling.BILINEAR))


def _centre_view(path: Path, size: int) -> Tensor:
    image, shorter = _open(path), size * 256 / 224
    scale = shorter / min(image.size)
    top, left = (image.height * scale - size) / 2, (image.width * scale - size) / 2
    return _pixels(_crop(image, shorter, top, left, size))


def _read_by(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. What one of its processes meets comes with that process's traceback, which says nothing to a user."""
    try:
        yield from loader
    except DamagedFile as error:
        said = last_words(str(error)).removeprefix(f"{DamagedFile.__module__}.{DamagedFile.__name__}: ")
        raise DamagedFile(said) from None


def loader_processes(items: int) -> int:
    """Processes that read so many files: a large card trains small networks on more images than eight of them decode."""
    return min(16, cores()) if items > 32 else 0


class _Views(Dataset):
    def __init__(self, images: FolderSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return _centre_view(self.images.files[index], self.images.size), self.images.labels[index]


class _Whole(Dataset):
    """Whole images, decoded once for all scales."""

    def __init__(self, images: FolderSet, sides: Sequence[int]):
        self.images, self.sides = images, sides

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        image = _open(self.images.files[index])
        return [_resized(image, side) for side in self.sides], int(self.images.labels[index])


class _Crops(Dataset):
    """One augmented image for (image, what it is drawn from)."""

    def __init__(self, images: FolderSet, recipe: Recipe):
        self.images, self.recipe = images, recipe

    def __getitem__(self, key: tuple[int, tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        index, drawn_from = key
        path, label = self.images.files[index], self.images.labels[index]
        if self.recipe.augmentation == "none":
            return _centre_view(path, self.recipe.crop), label, torch.zeros(3)
        random, size = generator("image", *drawn_from), self.recipe.crop
        image = _open(path)
        low, high = self.recipe.scale
        shorter = int(torch.randint(low, high + 1, (), generator=random))
        scale = shorter / min(image.size)
        u, v, flip = torch.rand(3, generator=random).tolist()
        view = _crop(image, shorter, u * (image.height * scale - size), v * (image.width * scale - size), size)
        pixels = _pixels(view)
        if flip < self.recipe.flip:
            pixels = pixels.flip(2)
        light = _PCA_VECTORS @ (torch.randn(3, generator=random) * 0.1 * _PCA_VALUES)
        return pixels, label, light


class _Positions:
    """Batches of (image, (seed, position)): the stream of `resprobe.data.batches`, for a loader with workers."""

    def __init__(self, count: int, recipe: Recipe, seed: int, start: int, part: slice):
        self.count, self.recipe, self.seed, self.start, self.part = count, recipe, seed, start, part

    def __len__(self) -> int:
        return self.recipe.iterations - self.start

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        epoch, order = -1, torch.empty(0)
        for iteration in range(self.start, self.recipe.iterations):
            batch = []
            for position in range(iteration * self.recipe.batch_size, (iteration + 1) * self.recipe.batch_size):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = torch.randperm(self.count, generator=generator("epoch", self.seed, epoch))
                batch.append((int(order[position % self.count]), (self.seed, position)))
            yield batch[self.part]
