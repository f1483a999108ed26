"""The cache of teacher outputs: same values as online, views apart, whole files, detection of data that change."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edgekd.data import Arrays
from edgekd.distill.cache import FOLDER, CacheEntry, OutputCache, cache_key
from edgekd.distill.sources import TeacherRunner, open_source
from edgekd.errors import DataError, StorageError
from edgekd.teachers import as_teacher
from tests.distill.distill_cases import QUICK, Mlp, blob_splits, blobs, quick, seeded, shift, split

pytestmark = pytest.mark.torch


def entry(items: int) -> CacheEntry:
    return CacheEntry(teacher="t", teacher_hash="h", data="d", items=items)


def rows(indices: Any) -> dict[str, Any]:
    return {"a": np.stack([indices, indices * 2], axis=1).astype(np.float32), "b.c": indices.astype(np.int64)}


class Counting:
    """A callable teacher that counts the items it was asked for."""

    def __init__(self) -> None:
        self.items = 0
        self._net = seeded(Mlp, 16, seed=4).eval()

    def __call__(self, inputs: Any) -> Any:
        value = next(iter(inputs.values()))
        self.items += len(value)
        with torch.no_grad():
            return self._net(torch.from_numpy(value))


def source(teacher: Any, train: Any, folder: Path, **kwargs: Any) -> Any:
    said: list[str] = []
    options: dict[str, Any] = {"wanted": "cached", "views": 3, "epochs": 9, "batch_size": 16, "cache_features": False, "seed": 0} | kwargs
    made = open_source(TeacherRunner(teacher, torch.device("cpu")), train, cache_dir=folder, say=said.append, **options)
    return made, said


def test_cached_rows_come_back_in_the_asked_order(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, "k", entry(150))
    assert cache.fill(0, rows)
    assert not cache.fill(0, rows)
    picks = np.array([149, 0, 64, 3], dtype=np.int64)
    again = OutputCache(tmp_path, "k", entry(150)).read(picks, 0)
    for name, value in rows(picks).items():
        np.testing.assert_array_equal(again[name], value)
        assert again[name].dtype == value.dtype


def test_view_is_absent_until_it_is_whole_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.distill.cache._SYNC_EVERY_S", 0.0)
    cache = OutputCache(tmp_path, "k", entry(300))
    asked: list[int] = []

    def stops(indices: Any) -> dict[str, Any]:
        if indices[0] >= 128:
            raise KeyboardInterrupt
        return rows(indices)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(0, stops)
    assert not cache.has(0)

    def counted(indices: Any) -> dict[str, Any]:
        asked.extend(indices.tolist())
        return rows(indices)

    assert cache.fill(0, counted)
    assert asked == list(range(128, 300))
    picks = np.arange(300, dtype=np.int64)
    np.testing.assert_array_equal(cache.read(picks, 0)["a"], rows(picks)["a"])


def test_two_writers_at_once_compute_a_view_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(indices: Any) -> dict[str, Any]:
        calls.append(int(indices[0]))
        return rows(indices)

    caches = [OutputCache(tmp_path, "k", entry(256)) for _ in range(4)]
    threads = [threading.Thread(target=cache.fill, args=(0, counted)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == [0, 0, 64, 128, 192]  # the first batch is asked for twice: once for its shape
    picks = np.arange(256, dtype=np.int64)
    for cache in caches:
        np.testing.assert_array_equal(cache.read(picks, 0)["b.c"], picks)


def test_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, "k", entry(100))
    cache.fill(0, rows)
    path = tmp_path / FOLDER / "k" / "view-000" / "output-0.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"output-0\.npy"):
        OutputCache(tmp_path, "k", entry(100)).read(np.array([1]), 0)


def test_unwritable_cache_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cache_dir"):
        OutputCache(tmp_path, "k", entry(100)).fill(0, rows)


def test_file_that_the_data_set_cannot_read_is_a_data_error(tmp_path: Path) -> None:
    def broken(indices: Any) -> dict[str, Any]:
        raise FileNotFoundError("image-17.png")

    with pytest.raises(DataError, match=r"image-17\.png"):
        OutputCache(tmp_path, "k", entry(100)).fill(0, broken)


def test_output_without_a_row_per_item_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="online"):
        OutputCache(tmp_path, "k", entry(100)).fill(0, lambda indices: {"a": np.zeros(3)})


def test_key_changes_with_teacher_data_and_augmentation() -> None:
    def half_shift(item: Any, generator: Any) -> Any:
        return item + generator.normal(size=item.shape).astype(np.float32) * FACTOR

    FACTOR = 0.5
    plain, _ = blob_splits()
    teacher = as_teacher(seeded(Mlp, 8).eval())
    keys = [cache_key(teacher, plain), cache_key(as_teacher(seeded(Mlp, 8, seed=1).eval()), plain)]
    keys += [cache_key(teacher, blob_splits(161)[0]), cache_key(teacher, blob_splits(augment=shift)[0]), cache_key(teacher, plain, ("first",))]
    changing, _ = blob_splits(augment=half_shift)
    keys.append(cache_key(teacher, changing))
    FACTOR = 0.25  # the source is the same, the bytes that it gives are not
    keys.append(cache_key(teacher, changing))
    assert len(set(keys)) == len(keys)
    assert cache_key(teacher, blob_splits()[0]) == keys[0]


def test_cached_outputs_equal_online_outputs_in_every_view(tmp_path: Path) -> None:
    train, _ = blob_splits(150, augment=shift)
    teacher = as_teacher(seeded(Mlp, 24, seed=7).eval())
    cached, _ = source(teacher, train, tmp_path)
    online, _ = source(teacher, train, tmp_path, wanted="online")
    assert (cached.mode, online.mode) == ("cached", "online")
    picks = np.random.default_rng(0).permutation(150)[:40]
    seen = []
    for epoch in range(4):
        cached.start_epoch(epoch)
        batch = train.batch(picks, cached.view(epoch))
        given = cached.get(batch, epoch)["output"]
        torch.testing.assert_close(given, online.get(batch, epoch)["output"], rtol=1e-5, atol=1e-5)
        seen.append(given)
    assert cached.mode == "cached"
    assert not torch.allclose(seen[0], seen[1])
    assert torch.equal(seen[0], seen[3])  # view = epoch mod 3


def test_teacher_runs_once_per_item_and_view_and_a_second_run_reuses_the_cache(tmp_path: Path) -> None:
    counting = Counting()
    first, _ = source(as_teacher(counting), blob_splits(150)[0], tmp_path)
    for epoch in range(5):
        first.start_epoch(epoch)
    for_filling = counting.items
    assert for_filling < 150 + 64 + 16 + 5 * 4 + 1
    again = Counting()  # its state is part of what identifies it: as a second process makes it
    second, _ = source(as_teacher(again), blob_splits(150)[0], tmp_path)
    second.start_epoch(0)
    assert again.items < 64


class Wobbly:
    """A data set that gives other bytes for the same index, but not before it was probed."""

    def __init__(self) -> None:
        self.values, self.labels = blobs(96, 1)
        self.reads = 0
        self.calm = 10**9

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        noise = 0.0 if self.reads < self.calm else float(self.reads)
        return self.values[index] + np.float32(noise), self.labels[index]


def test_data_set_that_changes_under_way_turns_the_cache_off_with_the_reason(tmp_path: Path) -> None:
    data = Wobbly()
    train = split(data, "train")
    made, said = source(as_teacher(seeded(Mlp, 24, seed=7).eval()), train, tmp_path)
    made.start_epoch(0)
    assert made.mode == "cached"
    data.calm = data.reads
    made.start_epoch(1)
    assert made.mode == "online"
    assert "same index" in made.reason
    assert said[-1].endswith(made.reason)
    assert not (tmp_path / FOLDER / made._cache.folder.name).exists()


def test_data_set_that_draws_random_numbers_is_never_cached(tmp_path: Path) -> None:
    data = Wobbly()
    data.calm = 0
    made, _ = source(as_teacher(seeded(Mlp, 24, seed=7).eval()), split(data, "train"), tmp_path, wanted="auto")
    assert made.mode == "online"
    assert "different bytes" in made.reason


def test_impure_augmentation_is_detected(tmp_path: Path) -> None:
    state = np.random.default_rng(0)

    def impure(item: Any, generator: Any) -> Any:
        return item + state.normal(size=item.shape).astype(np.float32)

    made, _ = source(as_teacher(seeded(Mlp, 24, seed=7).eval()), blob_splits(augment=impure)[0], tmp_path)
    made.start_epoch(0)
    assert made.mode == "online"


def test_iterable_data_are_trained_online_and_said_so(tmp_path: Path) -> None:
    values, labels = blobs(49, 1)

    class Stream:
        def __iter__(self) -> Any:
            for start in range(0, 49, 16):
                yield values[start : start + 16], labels[start : start + 16]

    result = quick(
        seeded(Mlp, 8),
        tmp_path / "run",
        teacher=as_teacher(seeded(Mlp, 24, seed=7).eval()),
        splits=(split(Stream(), "train"), split(Arrays(*blobs(48, 2)), "validation")),
        options=msgspec.structs.replace(QUICK, teacher_outputs="auto", epochs=2),
    )
    assert result.record.teacher_outputs == "online"
    assert "iterable" in result.record.teacher_outputs_reason
    assert result.record.steps == 2 * 3  # the last batch has one item, and there is batch norm


def test_auto_caches_an_expensive_teacher_and_says_both_times(tmp_path: Path) -> None:
    heavy = torch.nn.Sequential(torch.nn.Linear(8, 1500), torch.nn.Linear(1500, 1500), torch.nn.Linear(1500, 6)).eval()
    made, said = source(as_teacher(heavy), blob_splits()[0], tmp_path, wanted="auto", epochs=50)
    assert made.mode == "cached"
    assert "online" in made.reason
    assert "teacher" in made.reason
    assert any("MB" in text for text in said)


def test_cache_that_would_fill_the_disk_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    made, _ = source(as_teacher(seeded(Mlp, 24, seed=7).eval()), blob_splits()[0], tmp_path)
    assert made.mode == "online"
    assert "more than half" in made.reason
