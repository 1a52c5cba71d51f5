"""Data sets by name. `load_data("cifar10:PATH")` reads a local copy; nothing needs the network if one is there."""

from __future__ import annotations

import hashlib
import os
import socket
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch.nn import functional as F

from resprobe.data.folder import open_folder
from resprobe.data.images import Data, ImageSet
from resprobe.errors import UsageError, blamed, one_line, short
from resprobe.registry import Registry

DATASETS: Registry[Callable[[str | None], Data]] = Registry("data")


def register_dataset(name: str, *, identity: Callable[[str | None], str] | None = None):
    """Decorator that files a function `(path | None) -> Data` under `name`.

    Finished runs are found again by the data's identity: what `identity(path)` says, else `Data.identity`. Where that is
    just the name, the path belongs to it: another path, other data.
    """
    return DATASETS.register(name, identity)


def load_data(data: str | Data) -> Data:
    """The data set named by `NAME` or `NAME:PATH`. Raises `UsageError` for an unknown name or unusable files."""
    if isinstance(data, Data):
        return data
    name, path = _split(data)
    load = DATASETS[name]
    with blamed(f"data (={data!r}) cannot be read"):
        loaded = load(path)
    if not isinstance(loaded, Data):
        raise UsageError(f"data (={name!r}): its function must give a resprobe.Data, not {short(loaded)}")
    if DATASETS.fingerprint(name) is None:  # ours say themselves what they are, wherever they are read from
        return loaded
    identity = DATASETS.about(name)
    if identity is not None:
        return replace(loaded, identity=identity(path))
    return replace(loaded, identity=data) if path is not None and loaded.identity == name else loaded


def _split(data: str) -> tuple[str, str | None]:
    if not isinstance(data, str) or not data:
        raise UsageError(f"data (={short(data)}) must be NAME or NAME:PATH, or a Data")
    name, colon, path = data.partition(":")
    return name, os.path.expanduser(path) if colon else None


@register_dataset("digits")
def digits(path: str | None = None) -> Data:
    """1,797 handwritten digits of 8×8 pixels, embedded in scikit-learn: 1,437 to train on, 360 to test, no download."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if path is not None:
        raise UsageError(f"data (='digits:{path}') takes no path: the digits are embedded")
    bunch = load_digits()
    # The original grey levels run from 0 to 16.
    images = torch.from_numpy((bunch.images * 255 / 16).round().astype("uint8"))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    train, test = (
        torch.as_tensor(part).sort().values
        for part in train_test_split(range(len(labels)), test_size=360, stratify=bunch.target, random_state=0)
    )
    whole = ImageSet(images, labels)
    return Data("digits", "digits", whole.select(train), whole.select(test), tuple("0123456789"))


@register_dataset("digits-64")
def digits_64(path: str | None = None) -> Data:
    """The digits enlarged to 64×64 pixels, for networks that halve their input five times (Table 1)."""
    if path is not None:
        raise UsageError(f"data (='digits-64:{path}') takes no path: the digits are embedded")
    small = digits()
    train, test = (
        ImageSet(F.interpolate(part.images, size=(64, 64), mode="bilinear"), part.labels)
        for part in (small.train, small.test)
    )
    return Data("digits-64", "digits-64", train, test, small.classes)


@register_dataset("folder")
def folder(path: str | None = None) -> Data:
    """Class folders of images, `folder:PATH` with PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg (or test/)."""
    return open_folder(path)


# The official archives (Krizhevsky 2009), as torchvision knows them too.
_CIFAR = {
    "cifar10": ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"),
}


@register_dataset("cifar10")
def cifar10(path: str | None = None) -> Data:
    """CIFAR-10: 50,000 training and 10,000 test images of 32×32 pixels in 10 classes."""
    return _cifar("cifar10", path)


@register_dataset("cifar100")
def cifar100(path: str | None = None) -> Data:
    """CIFAR-100: 50,000 training and 10,000 test images of 32×32 pixels in 100 classes."""
    return _cifar("cifar100", path)


def cache_folder() -> Path:
    """Where downloads go and local copies are looked for: `$RESPROBE_CACHE`, else `~/.cache/resprobe`."""
    return Path(os.environ.get("RESPROBE_CACHE", "~/.cache/resprobe")).expanduser()


def _cifar(name: str, path: str | None) -> Data:
    archive, md5, folder = _CIFAR[name]
    if path is not None:
        given = Path(path)
        if not given.exists():
            raise UsageError(
                f"data path (={path!r}) is not there; {name}:PATH is {archive}, the folder {folder}, or a folder with either"
            )
        if given.is_file():
            return _from_archive(name, given)
        root = given.parent if given.name == folder else given
        if (root / folder).is_dir():
            return _from_folder(name, root)
        if (root / archive).is_file():
            return _from_archive(name, root / archive)
        raise UsageError(f"data path (={path!r}) holds neither {folder}/ nor {archive}")
    with suppress(OSError):  # of a cache that may only be read
        if (lock := _lock(name)).is_file():
            with FileLock(lock):  # another process may be downloading
                pass
    for root in (Path("data"), cache_folder()):
        if (root / folder).is_dir():
            return _from_folder(name, root)
        if (root / archive).is_file():
            return _from_archive(name, root / archive)
    return _download(name) if _downloads.get() else _stand_in(name)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Within a `with` block, what would have to be downloaded is stood in for by as many black images of the same size, with a
    note: to reckon how long a training takes, the images need not be there."""
    token = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(token)


_downloads: ContextVar[bool] = ContextVar("downloads", default=True)


def _stand_in(name: str) -> Data:
    warnings.warn(
        f"{name} is not here yet: it is downloaded (170 MB) when the training begins, or named with --data {name}:PATH"
    )
    parts = (
        ImageSet(torch.zeros(count, 3, 32, 32, dtype=torch.uint8), torch.zeros(count).long())
        for count in (50_000, 10_000)
    )
    return Data(name, name, *parts, classes=tuple(map(str, range(int(name.removeprefix("cifar"))))))


def _from_archive(name: str, archive: Path) -> Data:
    official, md5, _ = _CIFAR[name]
    digest = hashlib.md5()
    with archive.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        raise UsageError(
            f"archive {archive} is damaged or not {official}: its MD5 is {digest.hexdigest()}, expected {md5}"
        )
    # Beside the archive may be read-only, and a half-unpacked folder would be worse than none.
    with tempfile.TemporaryDirectory(prefix="resprobe-") as scratch, tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
        return _from_folder(name, Path(scratch))


def _from_folder(name: str, root: Path) -> Data:
    from torchvision import datasets

    make = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        # torchvision checks every file's MD5 before it unpickles anything.
        train, test = make(root, train=True, download=False), make(root, train=False, download=False)
    except RuntimeError:
        raise UsageError(
            f"{name} in {root / _CIFAR[name][2]} is incomplete or damaged (a file is missing or its MD5 differs); "
            f"unpack {_CIFAR[name][0]} there again"
        ) from None
    parts = (
        ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    )
    return Data(name, name, *parts, classes=tuple(train.classes))


def _lock(name: str) -> Path:
    return cache_folder() / f".{name}.lock"


def _download(name: str) -> Data:
    from torchvision import datasets

    archive, md5, folder = _CIFAR[name]
    target, make = cache_folder(), {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock(name)):  # of processes that want it at the same time one downloads
            make(target, download=True)
    except Exception as error:  # whatever a network can do
        raise UsageError(
            f"{name} is not here and its download failed ({one_line(error, named=True)[:200]}); "
            f"put {archive} (MD5 {md5}) into {target} or ./data, or name its place with --data {name}:PATH"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return _from_folder(name, target)
