"""A torch DataLoader as what stands behind it, so that items can be read by their index; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgekd.errors import DataError


def is_indexed(source: Any) -> bool:
    """Whether items have a number; torch's iterable data sets inherit a `__getitem__` that only raises."""
    iterable = any(cls.__name__ == "IterableDataset" for cls in type(source).__mro__)
    return not iterable and hasattr(source, "__len__") and hasattr(source, "__getitem__")


class Picked:
    """Some items of a data set, in the order given."""

    def __init__(self, source: Any, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Any:
        return self._source[self._indices[position]]


def unwrap_loader(loader: Any, name: str) -> tuple[Any, Callable[[list[Any]], Any] | None, int | None]:
    """The data set behind a DataLoader with its collate function and batch size; the loader itself where it gives ready batches.

    The order of a loader is not kept, but its choice of items is: a `SubsetRandomSampler` gives its items and no others.

    Raises:
        DataError: the sampler weighs, repeats or groups items, which cannot be kept.
    """
    grouped = getattr(loader, "batch_sampler", None)
    if not is_indexed(loader.dataset) or grouped is None:
        return loader, None, loader.batch_size
    size = getattr(grouped, "batch_size", loader.batch_size)
    sampler = loader.sampler
    kind = type(sampler).__name__
    if type(grouped).__name__ == "BatchSampler":
        sampler = grouped.sampler
        kind = type(sampler).__name__
        if kind == "SequentialSampler" or (kind == "RandomSampler" and not sampler.replacement and len(sampler) == len(loader.dataset)):
            return loader.dataset, loader.collate_fn, size
        if kind == "SubsetRandomSampler":
            return Picked(loader.dataset, sorted(int(index) for index in sampler.indices)), loader.collate_fn, size
    else:
        kind = type(grouped).__name__
    raise DataError(
        f"the {name} loader draws items in a way that cannot be kept when items are read by their index",
        found=kind,
        allowed="no sampler, shuffle=True, or a SubsetRandomSampler",
        hint="hand over the data set, or torch.utils.data.Subset(data_set, indices)",
        subject=name,
    )
