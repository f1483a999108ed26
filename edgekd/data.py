"""Data sets become splits: indexed numpy batches with a fingerprint, seeded views, and checks that name the bad item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.contracts import Array, Task
from edgekd.errors import DataError
from edgekd.identity.keys import array_hash
from edgekd.identity.provenance import code_hash
from edgekd.loaders import is_indexed, unwrap_loader
from edgekd.tree import first_line, to_numpy

Augment = Callable[[Any, np.random.Generator], Any]
"""`augment(x, generator)`: one item's input (a mapping where there are several) and a numpy generator seeded by
(seed, index, view); returns the same structure and shapes."""

_FINGERPRINT_ITEMS = 64
_STABLE_ITEMS = 4


@dataclass(frozen=True)
class Batch:
    """Named inputs and targets, batch first, with each item's index in its data set (`-1` where there is none)."""

    indices: NDArray[np.int64]
    inputs: dict[str, Array]
    targets: Any

    def __len__(self) -> int:
        return len(self.indices)


class Arrays:
    """A data set of arrays in memory: `inputs` is one array or a mapping of arrays, `targets` an array, a mapping, or `None`."""

    def __init__(self, inputs: Mapping[str, Array] | Array, targets: Any = None) -> None:
        self.inputs = {name: np.asarray(value) for name, value in inputs.items()} if isinstance(inputs, Mapping) else {"": np.asarray(inputs)}
        self.targets = (
            {name: np.asarray(value) for name, value in targets.items()}
            if isinstance(targets, Mapping)
            else targets
            if targets is None
            else np.asarray(targets)
        )
        named = {name or "inputs": value for name, value in self.inputs.items()}
        if isinstance(self.targets, dict):
            named |= {f"target {name}": value for name, value in self.targets.items()}
        elif self.targets is not None:
            named["targets"] = self.targets
        if not self.inputs:
            raise DataError("there is no input array", found="an empty mapping", allowed="one array per input, the items along its first axis")
        for name, value in named.items():
            if value.ndim == 0:
                raise DataError(f"{name} is no array of items", found=repr(value.item()), allowed="an array with the items along its first axis", subject=name)
        lengths = {name: len(value) for name, value in named.items()}
        if len(set(lengths.values())) > 1:
            raise DataError("inputs and targets have different numbers of items", found=lengths, hint="every array has the items along its first axis")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def _take(value: Any, indices: NDArray[np.int64]) -> Any:
    if isinstance(value, dict):
        return {name: array[indices] for name, array in value.items()}
    return value[indices]


def _stack(items: Sequence[Any]) -> Any:
    first = items[0]
    if isinstance(first, Mapping):
        return {key: _stack([item[key] for item in items]) for key in first}
    if isinstance(first, (tuple, list)):
        return [_stack([item[position] for item in items]) for position in range(len(first))]
    return np.stack([to_numpy(item) for item in items])


def _numpy_tree(value: Any) -> Any:
    return {name: to_numpy(item) for name, item in value.items()} if isinstance(value, Mapping) else to_numpy(value)


class Split:
    """One part of the data (train, validation or test). Made by `make_split`.

    `indexed` is false for iterable data sets: then only `stream` works, and the teacher runs online.
    `cacheable` is false when the data set gives different bytes for one index; `uncacheable_reason` says so.
    """

    def __init__(
        self,
        source: Any,
        task: Task,
        *,
        name: str,
        input_names: Sequence[str],
        augment: Augment | None,
        seed: int,
        revision: str,
        collate: Callable[[list[Any]], Any] | None,
        batch_size: int | None,
    ) -> None:
        self.name = name
        self.task = task
        self.augment = augment
        self.augment_hash = code_hash(augment, generators=False) if augment is not None else ""  # now: its state may change as it runs
        self.seed = seed
        self.revision = revision
        self.batch_size = batch_size
        self.indexed = isinstance(source, Arrays) or is_indexed(source)
        self._source = source
        self._collate = collate or _stack
        self._wanted_names = tuple(input_names)
        if self.indexed and len(source) == 0:
            raise DataError(f"the {name} data are empty", found="0 items", hint="check the loader or the split", subject=name)
        if not self.indexed and not hasattr(source, "__iter__"):
            raise DataError(
                f"the {name} data cannot be read",
                found=type(source).__name__,
                allowed="a torch DataLoader or Dataset, edgekd.Arrays, (inputs, targets), or an iterable of batches",
                subject=name,
            )
        if not self.indexed and iter(source) is source:
            raise DataError(
                f"the {name} data can be read only once",
                found=type(source).__name__,
                allowed="data that start again each time they are iterated",
                hint="wrap the generator in a class whose __iter__ starts it anew, or collect it in edgekd.Arrays",
                subject=name,
            )
        self.input_names: tuple[str, ...] = tuple((self.batch([0]) if self.indexed else next(self.stream(0))).inputs)
        self.uncacheable_reason = self._find_instability()

    def __len__(self) -> int:
        if not self.indexed:
            raise DataError(
                f"the {self.name} data have no length: an iterable data set", hint="give a map-style data set where items must be counted", subject=self.name
            )
        return len(self._source)

    @property
    def in_memory(self) -> bool:
        """Whether the items lie in arrays, so that reading all of them is cheap."""
        return isinstance(self._source, Arrays)

    @property
    def augmented(self) -> bool:
        """Whether views differ from the plain items."""
        return self.augment is not None

    @property
    def cacheable(self) -> bool:
        """Whether a teacher's outputs may be cached by index and view."""
        return not self.uncacheable_reason

    def _find_instability(self) -> str:
        if not self.indexed:
            return "an iterable data set has no item index"
        return self._drawing()

    def _drawing(self) -> str:
        """Why reading the same items again gives other bytes; empty when it does not, as far as a few items and the first batch tell."""
        if isinstance(self._source, Arrays):
            return ""
        if not self.indexed:
            first, again = (_content(next(self.stream(0))) for _ in range(2))
            return "" if first == again else "the data set gives other items, or another order, each time it is read"
        probe = self._picks(_STABLE_ITEMS)
        if self.content_hash(probe) != self.content_hash(probe):
            return "the data set gives different bytes for the same index: it draws random numbers itself (pass the randomness as augment=)"
        return ""

    def require_repeatable(self) -> None:
        """Refuse data that differ from one reading to the next: teacher and student are judged on the same items.

        Raises:
            DataError: the data set draws random numbers itself, or a stream shuffles.
        """
        reason = self._drawing()
        if reason:
            raise DataError(
                f"the {self.name} data must be the same at every reading",
                found=reason,
                hint="judge on plain items in a fixed order; random views belong to the training data, as augment=",
                subject=self.name,
            )

    def _picks(self, count: int) -> NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, 0xF1])
        return np.sort(generator.choice(len(self), size=min(count, len(self)), replace=False)).astype(np.int64)

    def content_hash(self, indices: Sequence[int] | NDArray[np.int64]) -> str:
        """The hash of the inputs and targets of some items, before augmentation."""
        return _content(self.batch(indices))

    def fingerprint(self) -> str:
        """What identifies the data in stage keys: the length and 64 seeded items before augmentation, or the user's revision; and the augmentation.

        Of a stream these are its first 64 items, as they are batched.
        """
        if self.revision:
            found = f"revision:{self.revision}"
        elif self.indexed:
            found = f"{len(self)}:{self.content_hash(self._picks(_FINGERPRINT_ITEMS))}"
        else:
            found = f"stream:{':'.join(_content(part) for part in self._first(_FINGERPRINT_ITEMS))}"
        return f"{found}:{self.augment_hash[:16]}"

    def _first(self, count: int) -> Iterator[Batch]:
        """The first batches of the data, `count` items in all, or every item where there are fewer."""
        for batch in self.stream(0):
            yield batch if len(batch) <= count else _head(batch, count)
            count -= len(batch)
            if count <= 0:
                return

    def batch(self, indices: Sequence[int] | NDArray[np.int64], view: int | None = None) -> Batch:
        """The items at `indices`, in this order; `view` numbers the seeded augmentation, `None` leaves the items plain.

        Raises:
            DataError: an item is not finite, or items have different shapes.
        """
        picks = np.asarray(indices, dtype=np.int64)
        if isinstance(self._source, Arrays):
            names = self._wanted_names if self._wanted_names and "" not in self._source.inputs else tuple(self._source.inputs)
            missing = [name for name in names if name not in self._source.inputs]
            if missing:
                raise DataError(f"the {self.name} data lack an input of the model", found=sorted(self._source.inputs), allowed=list(names), subject=missing[0])
            inputs = {name or (self._wanted_names or ("input",))[0]: self._source.inputs[name][picks] for name in names}
            targets = None if self._source.targets is None else _take(self._source.targets, picks)
        else:
            try:
                raw = self._collate([self._source[int(index)] for index in picks])
            except (ValueError, RuntimeError) as error:
                raise DataError(
                    f"items of the {self.name} data cannot be put into one batch",
                    found=first_line(error),
                    hint="items need equal shapes, or a collate function",
                    subject=self.name,
                ) from error
            inputs, targets = self._unpacked(raw)
        if view is not None and self.augment is not None:
            inputs = self._augmented(inputs, picks, view)
        batch = Batch(picks, inputs, targets)
        self._check_finite(batch)
        return batch

    def _unpacked(self, raw: Any) -> tuple[dict[str, Array], Any]:
        inputs, targets = self.task.unpack(raw, self._wanted_names)
        return {name: to_numpy(value) for name, value in inputs.items()}, None if targets is None else _numpy_tree(targets)

    def _augmented(self, inputs: dict[str, Array], picks: NDArray[np.int64], view: int) -> dict[str, Array]:
        assert self.augment is not None
        single = len(inputs) == 1
        only = next(iter(inputs))
        items = []
        for position, index in enumerate(picks):
            generator = np.random.default_rng([self.seed, int(index), view])
            item: Any = inputs[only][position] if single else {name: value[position] for name, value in inputs.items()}
            changed = self.augment(item, generator)
            items.append({only: to_numpy(changed)} if single else {name: to_numpy(value) for name, value in changed.items()})
        out = {name: np.stack([item[name] for item in items]) for name in inputs}
        for name, value in out.items():
            if value.shape != inputs[name].shape:
                raise DataError("augment changed the shape of an input", found=value.shape, allowed=inputs[name].shape, subject=name)
        return {name: value.astype(inputs[name].dtype, copy=False) for name, value in out.items()}

    def _check_finite(self, batch: Batch) -> None:
        parts = {f"input {name!r}": value for name, value in batch.inputs.items()}
        if isinstance(batch.targets, dict):
            parts |= {f"target {name!r}": value for name, value in batch.targets.items()}
        elif batch.targets is not None:
            parts["target"] = batch.targets
        for what, value in parts.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                bad = int(np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(axis=1))[0])
                raise DataError(
                    f"the {self.name} data hold NaN or infinity in {what}",
                    found=f"item {int(batch.indices[bad])}",
                    hint="clean the data or drop the item",
                    subject=self.name,
                )

    def all(self, limit: int | None = None) -> Batch:
        """Every item (the first `limit`), unaugmented, in index order; a stream is read once from its start."""
        if self.indexed:
            count = len(self) if limit is None else min(limit, len(self))
            return self.batch(np.arange(count))
        return _join(list(self.stream(0) if limit is None else self._first(limit)))

    def stream(self, epoch: int) -> Iterator[Batch]:
        """Batches in the data set's own order: for iterable data sets, or an indexed one read from front to back.

        Raises:
            DataError: the loader gives no batch.
        """
        if self.indexed:
            size = self.batch_size or 64
            for start in range(0, len(self), size):
                yield self.batch(np.arange(start, min(start + size, len(self))))
            return
        empty = True
        for raw in self._source:
            inputs, targets = self._unpacked(raw)
            empty = False
            batch = Batch(np.full(len(next(iter(inputs.values()))), -1, dtype=np.int64), inputs, targets)
            self._check_finite(batch)
            yield batch
        if empty:
            raise DataError(f"the {self.name} data are empty", found="no batch", hint="check the loader", subject=self.name)


def _content(batch: Batch) -> str:
    targets = batch.targets if isinstance(batch.targets, dict) else {} if batch.targets is None else {"": batch.targets}
    return array_hash({f"input {name}": value for name, value in batch.inputs.items()} | {f"target {name}": value for name, value in targets.items()})


def _head(batch: Batch, count: int) -> Batch:
    keep = np.arange(count)
    targets = None if batch.targets is None else _take(batch.targets, keep)
    return Batch(batch.indices[keep], {name: value[keep] for name, value in batch.inputs.items()}, targets)


def _join(batches: Sequence[Batch]) -> Batch:
    targets: Any = None
    if isinstance(batches[0].targets, dict):
        targets = {name: np.concatenate([batch.targets[name] for batch in batches]) for name in batches[0].targets}
    elif batches[0].targets is not None:
        targets = np.concatenate([batch.targets for batch in batches])
    return Batch(
        np.concatenate([batch.indices for batch in batches]),
        {name: np.concatenate([batch.inputs[name] for batch in batches]) for name in batches[0].inputs},
        targets,
    )


def make_split(
    data: Any,
    task: Task,
    *,
    name: str,
    input_names: Sequence[str] = (),
    augment: Augment | None = None,
    seed: int = 0,
    revision: str = "",
) -> Split:
    """The split behind `data`: a `Split` (returned as it is), `Arrays`, `(inputs, targets)` as arrays, a DataLoader (unwrapped to its
    data set, collate function and batch size), a map-style data set, or an iterable of batches.

    Raises:
        DataError: the data are empty, not finite, or cannot be read.
    """
    if isinstance(data, Split):
        if augment is not None and augment is not data.augment:
            raise DataError(f"the {name} data are a Split already, which keeps its own augmentation", hint="give augment= to make_split", subject=name)
        return data
    collate: Callable[[list[Any]], Any] | None = None
    batch_size: int | None = None
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "__len__") for part in data):
        data = Arrays(
            {key: to_numpy(value) for key, value in data[0].items()} if isinstance(data[0], Mapping) else to_numpy(data[0]),
            data[1] if isinstance(data[1], Mapping) else to_numpy(data[1]),
        )
    elif hasattr(data, "dataset") and hasattr(data, "collate_fn"):
        data, collate, batch_size = unwrap_loader(data, name)
    return Split(data, task, name=name, input_names=input_names, augment=augment, seed=seed, revision=revision, collate=collate, batch_size=batch_size)
