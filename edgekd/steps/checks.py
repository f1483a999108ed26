"""What is checked of the data and the teacher before anything is measured or trained: leaks between splits, and a teacher that knows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from edgekd.contracts import Array
from edgekd.data import Split
from edgekd.errors import DataError, ModelError
from edgekd.identity.keys import item_digests
from edgekd.records import LedgerRow
from edgekd.stats import CONFIDENCE
from edgekd.steps.context import Context, row
from edgekd.tasks import Regression

_READ = 20_000
"""Training items that are read for the check where they do not lie in memory; validation and test are judged on and always read whole."""

_BATCH = 256
_LEAK = 0.01
"""The share of a split that may stand in another one as well: public data sets hold some doubles."""


@dataclass(frozen=True)
class _Seen:
    """The different digests of the items that were read, 8 bytes each. `share` of the split's items were read: 1 is all, 0 an unknown part."""

    digests: NDArray[np.uint64]
    read: int
    share: float
    words: str


def _see(split: Split, role: str, seed: int) -> _Seen:
    whole = role != "train" or split.in_memory or (split.indexed and len(split) <= _READ)
    picks = np.arange(len(split)) if split.indexed else None
    if picks is not None and not whole:
        picks = np.sort(np.random.default_rng([seed, 0x1E]).choice(len(split), size=_READ, replace=False))
    parts = []
    read = 0
    for inputs in _batches(split, picks):
        parts.append(item_digests(inputs))
        read += len(parts[-1])
        if not whole and read >= _READ:
            break
    digests = np.unique(np.concatenate(parts))
    if split.indexed:
        words = f"{role} {read} items" if whole else f"{role} {read} of {len(split)} items, drawn by seed"
        return _Seen(digests, read, read / len(split), words)
    return _Seen(digests, read, 1.0, f"{role} {read} items") if whole or read < _READ else _Seen(digests, read, 0.0, f"{role} the first {read} items")


def _batches(split: Split, picks: NDArray[np.int64] | None) -> Iterator[dict[str, Array]]:
    if picks is None:
        yield from (batch.inputs for batch in split.stream(0))
        return
    for start in range(0, len(picks), _BATCH):
        yield split.batch(picks[start : start + _BATCH]).inputs


def check_splits(context: Context) -> list[LedgerRow]:
    """Ledger rows about what was compared, and about doubles between the splits.

    Validation and test are compared whole, and so is train if it lies in memory or has at most 20,000 items; else 20,000 seeded items
    of it (of a stream: its first ones). From a sample the doubles are estimated, with exact bounds at 99 % each (Clopper and Pearson,
    Biometrika 26:404, 1934); a split is refused by the lower one, so that a sample's chance refuses nothing.

    Raises:
        DataError: more than 1 % of the smaller of two splits stands in the other.
    """
    splits = {"train": context.train, "validation": context.validation, "test": context.test}
    seen = {role: _see(split, role, context.seed) for role, split in splits.items()}
    compared = "inputs compared: " + "; ".join(one.words for one in seen.values())
    if context.train.indexed and not context.train.cacheable:
        compared += "; the training data differ from one reading to the next, so that doubles in them cannot be seen"
    rows = [row(context, "baseline", "splits", "noted", compared)]
    for one, other in combinations(seen, 2):
        shared = len(np.intersect1d(seen[one].digests, seen[other].digests, assume_unique=True))
        share = seen[one].share  # only train is ever read in part, and it stands first
        smaller = len(seen[other].digests) if share < 1.0 else min(len(seen[one].digests), len(seen[other].digests))
        fewest, said = shared, f"{shared} of {smaller} items stand in both splits"
        if 0.0 < share < 1.0:
            low, high = _bounds(shared, seen[one].read)
            fewest = int(np.ceil(low * seen[one].read / share))
            most = min(smaller, int(np.ceil(high * seen[one].read / share)))
            said = f"{shared} of {smaller} {other} items found among {seen[one].words}: about {shared / share:.0f} in all"
            said += f", {fewest} to {most} with {CONFIDENCE:.0%} confidence each"
        if fewest > _LEAK * smaller:
            raise DataError(
                f"the {one} and {other} data overlap",
                found=f"{said}, by equal inputs",
                allowed=f"at most {_LEAK:.0%}",
                hint="split the data so that no item stands in two splits: what is chosen on an item cannot be judged on it",
                subject=other,
            )
        if shared or share < 1.0:
            rows.append(row(context, "baseline", f"{one} and {other}", "noted", said))
    return rows


def _bounds(found: int, of: int) -> tuple[float, float]:
    """The exact bounds of a share, each one-sided at the confidence of the verdicts."""
    from scipy.special import betaincinv

    low = float(betaincinv(found, of - found + 1, 1.0 - CONFIDENCE)) if found else 0.0
    high = float(betaincinv(found + 1, of - found, CONFIDENCE)) if found < of else 1.0
    return low, high


def check_teacher(context: Context, scores: NDArray[np.float64], targets: object) -> None:
    """Refuse a teacher that is no better than a constant answer on the validation split, unless `allow_extreme`.

    Raises:
        ModelError: its accuracy is at most the share of the commonest class, or its R² is not positive.
    """
    if context.options.allow_extreme:
        return
    reached = float(scores.mean())
    labels = context.task.classes(targets)
    if labels is not None:
        constant, what = float(np.bincount(labels).max() / len(labels)), "always answering the commonest class"
    elif isinstance(context.task, Regression):
        constant, what = 0.0, "always answering the mean"
    else:
        return
    if reached <= constant < 1.0:
        raise ModelError(
            f"the teacher is no better than {what}",
            found=f"{context.task.metric} {reached:.4f} on validation, a constant answer reaches {constant:.4f}",
            hint="check the label encoding, the input normalisation and that its weights are loaded; options.allow_extreme accepts it as it is",
            subject=context.teacher.name,
        )
