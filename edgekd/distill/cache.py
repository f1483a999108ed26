"""Teacher outputs on disk by data index and view: one memory-mapped `.npy` per view and output, shared between runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekd.contracts import Array, Teacher
from edgekd.data import Split
from edgekd.errors import DataError, StorageError
from edgekd.records.base import Record
from edgekd.records.model import NonNegative, Positive
from edgekd.storage import sync_folder, write_atomic

FOLDER = "teacher-outputs"
FILL_BATCH = 64
"""Items per teacher call when a view is filled; fixed, so that a cache has the same bytes whatever the training's batch size."""

_VERSION = 1
_SYNC_EVERY_S = 5.0

Compute = Callable[[NDArray[np.int64]], Mapping[str, Array]]


class CacheEntry(Record, tag="edgekd.teacher_cache/1", frozen=True, kw_only=True):
    """What an entry of the cache holds, for people and for `edgekd cache ls`."""

    teacher: str
    teacher_hash: str
    data: str
    items: Positive
    features: tuple[str, ...] = ()


class CachedView(Record, tag="edgekd.teacher_cache_view/1", frozen=True, kw_only=True):
    """The arrays of one view: `files[i]` holds output `names[i]` as `(items, *shapes[i])`; the first `done` items are written."""

    items: Positive
    names: tuple[str, ...]
    files: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    done: NonNegative = 0


def cache_key(teacher: Teacher, split: Split, features: tuple[str, ...] = ()) -> str:
    """What identifies a cache entry: teacher, data, augmentation (its source and the bytes it gives) and tapped modules.

    Views are files within the entry, so runs with more or fewer views share them.
    """
    digest = hashlib.sha256()
    digest.update(msgspec.json.encode([_VERSION, teacher.weights_hash(), split.fingerprint(), split.name, split.seed, len(split), FILL_BATCH, list(features)]))
    if split.augmented:
        picks = np.unique(np.linspace(0, len(split) - 1, num=8).astype(np.int64))
        for view in (0, 1):
            for name, value in sorted(split.batch(picks, view).inputs.items()):
                digest.update(f"{view}|{name}|{value.dtype.str}|{value.shape}|".encode())
                digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:32]


def bytes_per_item(outputs: Mapping[str, Array]) -> int:
    """How many bytes one item of a batch of teacher outputs takes in the cache."""
    return sum(int(np.asarray(value).nbytes) // max(1, len(value)) for value in outputs.values())


class OutputCache:
    """The outputs of one teacher on one split, by item index and view.

    A view is written by one process under a lock (a second one waits and then reads); a killed one goes on where its
    writing stopped; readers see whole views only.
    """

    def __init__(self, cache_dir: Path, key: str, entry: CacheEntry) -> None:
        self.folder = cache_dir / FOLDER / key
        self.entry = entry
        self._open: dict[int, dict[str, NDArray[Any]]] = {}

    def _view(self, view: int) -> Path:
        return self.folder / f"view-{view:03d}"

    def has(self, view: int) -> bool:
        """Whether this view is complete on disk."""
        return (self._view(view) / "view.json").is_file()

    def size_bytes(self) -> int:
        """What the entry takes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.npy"))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder.parent / f".{self.folder.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def fill(self, view: int, compute: Compute) -> bool:
        """Write one view unless it is there; true if it was written now. `compute` gives the outputs for a range of items.

        Raises:
            StorageError: the disk is full or the cache cannot be written; what was there before is untouched.
            DataError: an output does not have one row per item.
        """
        if self.has(view):
            return False
        try:
            with self._locked():
                if self.has(view):
                    return False
                self.folder.mkdir(parents=True, exist_ok=True)
                self.entry.save(self.folder / "about.json")
                work = self.folder / f".{self._view(view).name}.partial"
                _write_view(work, self.entry.items, _reading(compute))
                os.replace(work, self._view(view))
                sync_folder(self.folder)
        except OSError as error:
            raise StorageError(
                "the cache of teacher outputs cannot be written",
                found=f"{self.folder}: {error.strerror}",
                hint="free some space, choose another cache_dir, or set teacher_outputs='online'",
                subject=self.folder,
            ) from error
        return True

    def read(self, indices: NDArray[np.int64], view: int) -> dict[str, Array]:
        """The cached outputs of some items, copied, in the order of `indices`.

        Raises:
            DataError: the view is missing or damaged.
        """
        if view not in self._open:
            self._open[view] = self._map(view)
        return {name: np.array(rows[indices]) for name, rows in self._open[view].items()}

    def _map(self, view: int) -> dict[str, NDArray[Any]]:
        folder = self._view(view)
        record = CachedView.load(folder / "view.json")
        rows = {}
        for name, file, dtype, shape in zip(record.names, record.files, record.dtypes, record.shapes, strict=True):
            try:
                array = np.load(folder / file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise _damaged(folder / file, str(error)) from error
            if array.dtype.str != dtype or array.shape != (record.items, *shape) or record.items != self.entry.items:
                raise _damaged(folder / file, f"{array.dtype.str} {array.shape}")
            rows[name] = array
        return rows

    def discard(self) -> None:
        """Remove the entry; a process that reads it keeps what it has open."""
        self._open = {}
        with self._locked():
            shutil.rmtree(self.folder, ignore_errors=True)


def _reading(compute: Compute) -> Compute:
    """`compute`, with a file that the data set cannot read told apart from a cache that cannot be written."""

    def guarded(indices: NDArray[np.int64]) -> Mapping[str, Array]:
        try:
            return compute(indices)
        except OSError as error:
            raise DataError("items of the data cannot be read", found=f"items {indices[0]} to {indices[-1]}: {error}", hint="check the data's files") from error

    return guarded


def _damaged(path: Path, found: str) -> DataError:
    return DataError("a file of the teacher-output cache is damaged", found=f"{path}: {found}", hint="remove its folder; it is computed again", subject=path)


def _header_size(path: Path) -> int:
    with path.open("rb") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        return stream.tell()


def _start(work: Path, items: int, compute: Compute) -> CachedView:
    """The state of a view's folder: what a killed process left, or a new one with headers only."""
    progress = work / "view.json"
    if progress.is_file():
        return CachedView.load(progress)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    outputs = _rows(compute(np.arange(min(FILL_BATCH, items), dtype=np.int64)), min(FILL_BATCH, items))
    record = CachedView(
        items=items,
        names=tuple(outputs),
        files=tuple(f"output-{position}.npy" for position in range(len(outputs))),
        dtypes=tuple(value.dtype.str for value in outputs.values()),
        shapes=tuple(value.shape[1:] for value in outputs.values()),
    )
    for file, dtype, shape in zip(record.files, record.dtypes, record.shapes, strict=True):
        with (work / file).open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, {"shape": (items, *shape), "fortran_order": False, "descr": dtype})
            stream.flush()
            os.fsync(stream.fileno())
    write_atomic(progress, record.to_json())
    return record


def _rows(outputs: Mapping[str, Array], count: int) -> dict[str, NDArray[Any]]:
    rows = {}
    for name, value in outputs.items():
        array = np.asarray(value)
        if array.ndim == 0 or len(array) != count or array.dtype.hasobject:
            raise DataError(
                f"the teacher's output {name!r} does not have one row per item",
                found=f"shape {array.shape}, dtype {array.dtype}, {count} items",
                hint="set teacher_outputs='online'",
                subject=name,
            )
        rows[name] = array
    return rows


def _write_view(work: Path, items: int, compute: Compute) -> None:
    record = _start(work, items, compute)
    streams = []
    try:
        for file, dtype, shape in zip(record.files, record.dtypes, record.shapes, strict=True):
            stride = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            header = _header_size(work / file)
            stream = (work / file).open("r+b")
            streams.append(stream)
            stream.truncate(header + record.done * stride)
            stream.seek(header + record.done * stride)
        synced = time.monotonic()
        for start in range(record.done, items, FILL_BATCH):
            picks = np.arange(start, min(start + FILL_BATCH, items), dtype=np.int64)
            rows = _rows(compute(picks), len(picks))
            for stream, name, dtype, shape in zip(streams, record.names, record.dtypes, record.shapes, strict=True):
                if name not in rows or rows[name].shape[1:] != shape or rows[name].dtype.str != dtype:
                    raise DataError(f"the teacher's output {name!r} changes from batch to batch", hint="set teacher_outputs='online'", subject=name)
                stream.write(np.ascontiguousarray(rows[name]).tobytes())
            if time.monotonic() - synced > _SYNC_EVERY_S:
                _sync(streams)
                record = msgspec.structs.replace(record, done=int(picks[-1]) + 1)
                write_atomic(work / "view.json", record.to_json())
                synced = time.monotonic()
        _sync(streams)
    finally:
        for stream in streams:
            stream.close()
    write_atomic(work / "view.json", msgspec.structs.replace(record, done=items).to_json())


def _sync(streams: list[Any]) -> None:
    for stream in streams:
        stream.flush()
        os.fsync(stream.fileno())
