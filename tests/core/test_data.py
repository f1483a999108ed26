"""Splits: what a loader is unwrapped to, what identifies data, seeded views, and errors that name the bad item."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from edgekd.data import Arrays, Split, make_split
from edgekd.errors import DataError
from edgekd.tasks import Classification, Regression

ITEMS = 80


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ITEMS, 1, 4, 4)).astype(np.float32)


def labels() -> np.ndarray:
    return np.arange(ITEMS, dtype=np.int64) % 4


def split(data: Any, **options: Any) -> Split:
    return make_split(data, Classification(), name="train", **options)


def tensors() -> TensorDataset:
    return TensorDataset(torch.from_numpy(images()), torch.from_numpy(labels()))


class Stream(IterableDataset[Any]):
    """Ready-made batches, in order or shuffled anew at each reading; has a length, as many such data sets do."""

    def __init__(self, *, shuffled: bool = False) -> None:
        self.shuffled = shuffled
        self.readings = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        self.readings += 1
        order = np.random.default_rng(self.readings).permutation(ITEMS) if self.shuffled else np.arange(ITEMS)
        for part in np.split(order, 4):
            yield images()[part], labels()[part]


class Noisy(Dataset[Any]):
    """Draws new noise at every reading of an item."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> Any:
        return images()[index] + self.random.standard_normal((1, 4, 4)).astype(np.float32), int(labels()[index])


# ------------------------------------------------------------------------------------------ loaders


def test_loader_is_unwrapped_to_its_data_set_collate_and_batch_size() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.stack([image for image, _ in items]) * 2.0, torch.stack([label for _, label in items])

    made = split(DataLoader(tensors(), batch_size=7, shuffle=True, collate_fn=collate))
    batch = made.batch([5, 0])
    assert (made.indexed, made.batch_size, len(made)) == (True, 7, ITEMS)
    assert batch.indices.tolist() == [5, 0]
    assert np.array_equal(batch.inputs["input"], 2.0 * images()[[5, 0]])
    assert batch.targets.tolist() == [1, 0]
    assert [len(part) for part in made.stream(0)] == [7] * 11 + [3]


def test_loader_with_a_subset_gives_its_items_and_no_others() -> None:
    chosen = [40, 3, 17]
    for loader in (
        DataLoader(tensors(), batch_size=2, sampler=SubsetRandomSampler(chosen)),
        DataLoader(Subset(tensors(), sorted(chosen)), batch_size=2),
    ):
        made = split(loader)
        assert len(made) == 3
        assert np.array_equal(made.all().inputs["input"], images()[[3, 17, 40]])


class Pairs(torch.utils.data.Sampler[list[int]]):
    """A batch sampler of its own kind."""

    def __iter__(self) -> Iterator[list[int]]:
        yield [0, 1]

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": WeightedRandomSampler([1.0] * ITEMS, ITEMS)},
        {"sampler": RandomSampler(range(ITEMS), num_samples=10)},
        {"sampler": RandomSampler(range(ITEMS), replacement=True)},
        {"batch_sampler": Pairs()},
    ],
)
def test_loader_whose_sampler_cannot_be_kept_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"torch\.utils\.data\.Subset") as caught:
        split(DataLoader(tensors(), **options))
    assert caught.value.found in ("WeightedRandomSampler", "RandomSampler", "Pairs")


@pytest.mark.parametrize("wrap", [lambda stream: stream, lambda stream: DataLoader(stream, batch_size=None)])
def test_iterable_data_set_is_not_indexed_and_says_why(wrap: Any) -> None:
    made = split(wrap(Stream()))
    assert (made.indexed, made.cacheable) == (False, False)
    assert "no item index" in made.uncacheable_reason
    assert all((batch.indices == -1).all() for batch in made.stream(0))
    assert np.array_equal(made.all().inputs["input"], images())
    assert np.array_equal(made.all(limit=33).targets, labels()[:33])
    with pytest.raises(DataError, match="iterable"):
        len(made)
    made.require_repeatable()


def test_loader_of_ready_batches_is_read_as_a_stream() -> None:
    ready = [(torch.from_numpy(images()[start : start + 8]), torch.from_numpy(labels()[start : start + 8])) for start in range(0, ITEMS, 8)]
    made = split(DataLoader(ready, batch_size=None))  # type: ignore[arg-type]
    assert not made.indexed
    assert np.array_equal(made.all().inputs["input"], images())


def test_generator_is_refused_because_it_is_read_once() -> None:
    with pytest.raises(DataError, match="__iter__"):
        split(part for part in Stream())


def test_data_that_change_between_readings_are_not_cached_and_never_judge() -> None:
    made = split(Noisy())
    assert not made.cacheable
    assert "augment=" in made.uncacheable_reason
    with pytest.raises(DataError, match="same at every reading"):
        made.require_repeatable()
    with pytest.raises(DataError, match="another order"):
        split(Stream(shuffled=True)).require_repeatable()
    assert split(DataLoader(tensors(), shuffle=True)).cacheable


# ------------------------------------------------------------------------------------------ views and fingerprints


def shifted(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return image + generator.standard_normal(image.shape)


def test_augmentation_depends_on_seed_index_and_view_only() -> None:
    made = split(Arrays(images(), labels()), augment=shifted, seed=3)
    together, reverse = made.batch([2, 9], view=1), made.batch([9, 2], view=1)
    assert np.array_equal(together.inputs["input"], reverse.inputs["input"][::-1])
    assert np.array_equal(together.inputs["input"], split(Arrays(images(), labels()), augment=shifted, seed=3).batch([2, 9], view=1).inputs["input"])
    noise = together.inputs["input"] - images()[[2, 9]]
    assert not np.allclose(noise[0], noise[1])
    assert not np.array_equal(together.inputs["input"], made.batch([2, 9], view=2).inputs["input"])
    assert not np.array_equal(together.inputs["input"], split(Arrays(images(), labels()), augment=shifted, seed=4).batch([2, 9], view=1).inputs["input"])
    assert np.array_equal(made.batch([2, 9]).inputs["input"], images()[[2, 9]])
    assert together.inputs["input"].dtype == np.float32
    assert made.augmented


def test_augmentation_that_changes_the_shape_is_refused() -> None:
    made = split(Arrays(images(), labels()), augment=lambda image, _: image[:, :2])
    with pytest.raises(DataError, match="shape"):
        made.batch([0], view=0)


def test_augmentation_on_a_finished_split_is_refused() -> None:
    made = split(Arrays(images(), labels()))
    assert make_split(made, Classification(), name="train") is made
    with pytest.raises(DataError, match="make_split"):
        make_split(made, Classification(), name="train", augment=shifted)


def test_fingerprint_changes_with_one_byte_of_a_sampled_item_and_with_the_length() -> None:
    inputs, targets = images()[:60], labels()[:60]  # at most 64 items are sampled: all of these
    plain = split(Arrays(inputs, targets)).fingerprint()
    assert plain == split(Arrays(inputs.copy(), targets.copy())).fingerprint()
    changed = inputs.copy()
    changed.view(np.uint8).reshape(-1)[12345 % changed.nbytes] ^= 1
    assert split(Arrays(changed, targets)).fingerprint() != plain
    other = targets.copy()
    other[59] += 1
    assert split(Arrays(inputs, other)).fingerprint() != plain
    assert split(Arrays(inputs[:59], targets[:59])).fingerprint() != plain
    assert split(Arrays(inputs, targets), augment=shifted).fingerprint() != plain


def test_revision_stands_for_the_bytes() -> None:
    first, second = Arrays(images(0), labels()), Arrays(images(1), labels())
    assert split(first).fingerprint() != split(second).fingerprint()
    assert split(first, revision="v1").fingerprint() == split(second, revision="v1").fingerprint()
    assert split(first, revision="v1").fingerprint() != split(first, revision="v2").fingerprint()


class Batches:
    """A stream of ready batches of 8 items."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        self.inputs, self.targets = inputs, targets

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.inputs), 8):
            yield self.inputs[start : start + 8], self.targets[start : start + 8]


@pytest.mark.parametrize(("items", "changed", "seen"), [(ITEMS, 0, True), (ITEMS, 63, True), (ITEMS, 64, False), (60, 59, True)])
def test_fingerprint_of_a_stream_sees_its_first_64_items(items: int, changed: int, seen: bool) -> None:
    plain = split(Batches(images()[:items], labels()[:items]))
    assert plain.fingerprint() == split(Batches(images()[:items], labels()[:items])).fingerprint()
    inputs, targets = images()[:items], labels()[:items].copy()
    inputs[changed] += 1.0
    targets[changed] += 1
    assert (split(Batches(inputs, labels()[:items])).fingerprint() != plain.fingerprint()) == seen
    assert (split(Batches(images()[:items], targets)).fingerprint() != plain.fingerprint()) == seen
    fingerprints = {split(Batches(data, labels()[:items]), revision="v1").fingerprint() for data in (images()[:items], inputs)}
    assert len(fingerprints) == 1
    assert plain.all(limit=9).targets.tolist() == [0, 1, 2, 3] * 2 + [0]


def test_fingerprint_of_a_stream_reads_no_more_than_it_needs() -> None:
    class Endless(Batches):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            raise AssertionError("read past the items that are needed")

    assert split(Endless(images(), labels())).fingerprint()


class Shift:
    """Shifts by some pixels; counts its calls."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.calls = 0

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        self.calls += 1
        return np.roll(image, self.pixels)


def test_fingerprint_sees_the_state_of_the_augmentation_as_it_was_at_first() -> None:
    data = Arrays(images(), labels())
    made = split(data, augment=Shift(2))
    before = made.fingerprint()
    made.batch([0, 1], view=0)
    assert made.fingerprint() == before == split(data, augment=Shift(2)).fingerprint()
    assert split(data, augment=Shift(3)).fingerprint() != before
    assert split(data, augment=Shift(2), revision="v1").fingerprint() != split(data, augment=Shift(3), revision="v1").fingerprint()


# ------------------------------------------------------------------------------------------ bad data


@pytest.mark.parametrize("targets", [labels()[:79], {"a": labels(), "b": labels()[:3]}])
def test_arrays_of_different_lengths_are_refused(targets: Any) -> None:
    with pytest.raises(DataError, match="first axis"):
        Arrays({"image": images()}, targets)


@pytest.mark.parametrize("inputs", [{}, np.float32(3.0), {"image": np.float32(1.0)}])
def test_arrays_without_items_axis_are_refused(inputs: Any) -> None:
    with pytest.raises(DataError, match="first axis"):
        Arrays(inputs, labels())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_value_that_is_not_finite_names_the_item(bad: float) -> None:
    inputs = images()
    inputs[37, 0, 1, 2] = bad
    with pytest.raises(DataError, match=r"train data hold NaN or infinity in input 'input'.*item 37"):
        split(Arrays(inputs, labels())).all()
    targets = np.linspace(0, 1, ITEMS)
    targets[5] = bad
    with pytest.raises(DataError, match=r"target.*item 5;"):
        make_split(Arrays(images(), targets), Regression(), name="test").batch([8, 5])


@pytest.mark.parametrize(
    "data",
    [
        Arrays(images()[:0], labels()[:0]),
        DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))),
        DataLoader(tensors(), sampler=SubsetRandomSampler([])),
        [],
        Subset(tensors(), []),
    ],
)
def test_empty_data_are_refused(data: Any) -> None:
    with pytest.raises(DataError, match="train data are empty"):
        split(data)


class Nothing(Stream):
    """A stream that gives no batch."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_empty_stream_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        split(Nothing())


def test_data_of_no_known_kind_are_refused() -> None:
    with pytest.raises(DataError, match=r"DataLoader or Dataset, edgekd\.Arrays") as caught:
        split(3)
    assert caught.value.found == "int"


def test_items_of_different_shapes_are_refused() -> None:
    ragged = [(np.zeros((1, size), dtype=np.float32), 0) for size in (3, 4, 3, 3)]
    with pytest.raises(DataError, match="equal shapes"):
        split(ragged).all()


class Broken(Noisy):
    """Raises an error without a text."""

    def __getitem__(self, index: int) -> Any:
        raise ValueError


def test_error_without_text_in_a_data_set_keeps_its_class_name() -> None:
    with pytest.raises(DataError, match="found: ValueError"):
        split(Broken())


def test_named_arrays_that_lack_an_input_of_the_model_are_refused() -> None:
    with pytest.raises(DataError, match="lack an input") as caught:
        split(Arrays({"image": images()}, labels()), input_names=("image", "extra"))
    assert caught.value.subject == "extra"


def test_inputs_take_the_order_of_the_model() -> None:
    arrays = Arrays({"b": images(), "a": images(1)}, labels())
    assert split(arrays, input_names=("a", "b")).input_names == ("a", "b")
    assert split((images(), labels()), input_names=("pixels",)).input_names == ("pixels",)
