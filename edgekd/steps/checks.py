"""What is checked of the data and the teacher before anything is measured or trained: leaks between splits, and a teacher that knows nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekd.data import Split
from edgekd.errors import DataError, ModelError
from edgekd.quantize.calibrate import sample_hashes
from edgekd.records import LedgerRow
from edgekd.steps.context import Context, row
from edgekd.tasks import Regression

_ALL_UP_TO = 20_000
_SAMPLE = 4_096
_LEAK = 0.01
"""The share of a split that may stand in another one as well: public data sets hold some doubles."""


def _hashes(split: Split, seed: int) -> tuple[str, ...]:
    """Content hashes of a split's inputs; of a seeded sample where it is large, of its first items where it is a stream."""
    if split.indexed and len(split) > _ALL_UP_TO:
        picks = np.sort(np.random.default_rng([seed, 0x1E]).choice(len(split), size=_SAMPLE, replace=False))
        return sample_hashes(split.batch(picks).inputs)
    return sample_hashes(split.all(None if split.indexed else _SAMPLE).inputs)


def check_splits(context: Context) -> list[LedgerRow]:
    """Ledger rows about single doubles between the splits.

    Raises:
        DataError: more than 1 % of one split (of the smaller one's items that were compared) stands in another.
    """
    splits = (context.train, context.validation, context.test)
    hashes = {split.name: _hashes(split, context.seed) for split in splits}
    rows = []
    for one, other in ((context.train, context.test), (context.validation, context.test), (context.train, context.validation)):
        shared = len(set(hashes[one.name]) & set(hashes[other.name]))
        compared = min(len(hashes[one.name]), len(hashes[other.name]))
        if shared > _LEAK * compared:
            raise DataError(
                f"the {one.name} and {other.name} data overlap",
                found=f"{shared} of {compared} compared items have equal inputs",
                allowed=f"at most {_LEAK:.0%}",
                hint="split the data so that no item stands in two splits: what is chosen on an item cannot be judged on it",
                subject=other.name,
            )
        if shared:
            rows.append(row(context, "baseline", f"{one.name} and {other.name}", "noted", f"{shared} of {compared} compared items stand in both splits"))
    return rows


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
