"""The data of the example: scikit-learn's handwritten digits, split once and for all."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Split = tuple[np.ndarray, np.ndarray]


def _splits() -> tuple[Split, Split, Split]:
    """Train, validation (10 %) and test (40 %): images `(items, 1, 8, 8)` float32 in [0, 1] and labels 0 to 9."""
    digits = load_digits()
    images, labels = (digits.images / 16.0).astype(np.float32)[:, None], digits.target.astype(np.int64)
    rest, test, rest_labels, test_labels = train_test_split(images, labels, test_size=0.4, random_state=0, stratify=labels)
    train, validation, train_labels, validation_labels = train_test_split(rest, rest_labels, test_size=1 / 6, random_state=0, stratify=rest_labels)
    return (train, train_labels), (validation, validation_labels), (test, test_labels)


def train() -> Split:
    """What the student is trained on."""
    return _splits()[0]


def validation() -> Split:
    """What choices are made on."""
    return _splits()[1]


def test() -> Split:
    """What the verdict is about; nothing is chosen on it."""
    return _splits()[2]


def shift(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The image `(1, 8, 8)` moved by up to one pixel in each direction."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    down, right = generator.integers(0, 3, size=2)
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]
