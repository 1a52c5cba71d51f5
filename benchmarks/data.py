"""Images to time with, of CIFAR's shape and number: random bytes, since what is in them costs nothing.

Importing this registers them as the data set `random`, or `random:COUNT`.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms

import resprobe as rp

IMAGES = 50_000
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@rp.register_dataset("random")
def random_images(path: str | None = None) -> rp.Data:
    """COUNT random images of 3×32×32 in ten classes to train on (by default 50,000), and 128 of them to test on."""
    count = IMAGES if path is None else int(path)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, 10, (count,), generator=random)
    whole = rp.ImageSet(images, labels)
    return rp.Data("random", f"random {count}", whole, whole.select(torch.arange(min(128, count))), tuple("0123456789"))


def augmentation(*then) -> transforms.Compose:
    """The augmentation of §4.2 on PIL images, as torchvision offers it, and what makes arrays of them."""
    return transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *then])


class Pictures(Dataset):
    """The images as torchvision's CIFAR10 gives them: a PIL image made of an array's row, then transforms."""

    def __init__(self, images: rp.ImageSet):
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        self.transform = augmentation(transforms.ToTensor(), transforms.Normalize(MEAN, STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]
