"""Fashion-MNIST (60,000 training and 10,000 test images, 28 x 28, 10 classes) from Debian's package."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

PACKAGE = "dataset-fashion-mnist"
FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
NO_CLASS = len(CLASSES)


def load_split(split: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Images (N, 28, 28) uint8 and labels (N,) int64 of "train" or "test".

    Raises:
        FileNotFoundError: the data is not there; the message names the package that brings it.
        ValueError: a file is not in idx format.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def to_patches(images: Tensor) -> Tensor:
    """Pixels (B, 28, 28) in any dtype to 49 tokens of 4 x 4 pixels, (B, 49, 16)."""
    return images.unflatten(1, (7, 4)).unflatten(3, (7, 4)).permute(0, 1, 3, 2, 4).reshape(len(images), 49, 16)


def from_patches(tokens: Tensor) -> Tensor:
    """Tokens (B, 49, 16) back to pixels (B, 28, 28)."""
    return tokens.reshape(len(tokens), 7, 7, 4, 4).permute(0, 1, 3, 2, 4).reshape(len(tokens), 28, 28)


class Patches(Dataset[dict[str, Tensor]]):
    """Samples {"x": (49, 16) float32 in [-1, 1], "label": () int64}."""

    def __init__(self, split: str = "train", folder: Path = FOLDER) -> None:
        images, self.labels = load_split(split, folder)
        self.tokens = to_patches(images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.tokens[index].float() / 127.5 - 1, "label": self.labels[index]}


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: install Debian's package {PACKAGE} (apt-get install {PACKAGE}), "
            "or set FASHION_MNIST to a folder with its four idx files"
        )
    with gzip.open(path) as file:
        data = file.read()
    header = np.frombuffer(data, ">i4", 1 + dimensions)
    shape = tuple(int(size) for size in header[1:])
    if header[0] != 0x800 + dimensions or len(data) != header.nbytes + int(np.prod(shape)):
        raise ValueError(f"{path} is not an idx file of {dimensions} dimensions of bytes: install {PACKAGE} again")
    return np.frombuffer(data, np.uint8, offset=header.nbytes).reshape(shape).copy()
