"""Named data sets: `load_data("digits")`, `load_data("cifar10:PATH")`, `load_data("folder:PATH")`."""

from resprobe.data.batches import FolderBatches, TensorBatches, batches_of
from resprobe.data.datasets import DATASETS, load_data, register_dataset
from resprobe.data.folder import FolderSet
from resprobe.data.images import Data, ImageSet, Normalization

__all__ = [
    "DATASETS",
    "Data",
    "FolderBatches",
    "FolderSet",
    "ImageSet",
    "Normalization",
    "TensorBatches",
    "batches_of",
    "load_data",
    "register_dataset",
]
