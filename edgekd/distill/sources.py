"""Where a batch's teacher outputs come from: computed now, or from the cache; which of the two is decided by measured time."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.contracts import Array, Teacher
from edgekd.data import Batch, Split
from edgekd.distill.cache import FILL_BATCH, CacheEntry, OutputCache, bytes_per_item, cache_key
from edgekd.distill.features import FeatureTaps
from edgekd.errors import ModelError
from edgekd.tree import flatten_outputs, to_numpy

FEATURE_PREFIX = "feature:"
VERIFY_ITEMS = 4
_TOLERANCE = 1e-3
_PREFER_CACHE = 0.9
"""Online is taken only if it is predicted to take less than this share of the cached time: a tie goes to the cache, which other runs reuse."""

Say = Callable[[str], None]


def as_tensors(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Named arrays as tensors on a device; 64-bit floats become 32-bit."""
    out = {}
    for name, value in arrays.items():
        array = np.ascontiguousarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        out[name] = torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)
    return out


class TeacherRunner:
    """Runs the teacher on batches, in evaluation mode and float32, with taps on its modules where features are asked for."""

    def __init__(self, teacher: Teacher, device: torch.device, features: Sequence[str] = ()) -> None:
        if features and teacher.module is None:
            raise ModelError(
                "feature losses need a teacher that is a torch module",
                found=f"the teacher {teacher.name} gives outputs only",
                hint="hand over the torch.nn.Module, or drop TrainOptions.features",
                subject=teacher.name,
            )
        self.teacher = teacher
        self.device = device
        self.features = tuple(dict.fromkeys(features))
        self._direct = teacher.module if teacher.module is not None and (self.features or device.type != "cpu") else None
        self._home: torch.device | None = None
        if self._direct is not None:
            if self.features:
                FeatureTaps(self._direct, self.features, owner="teacher")
            self._home = next((value.device for value in self._direct.parameters()), torch.device("cpu"))
            self._direct.to(device)

    def close(self) -> None:
        """Move the teacher's module back to where it was."""
        if self._direct is not None and self._home is not None:
            self._direct.to(self._home)

    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs by key path and, under `feature:<module>`, the tapped features, on the training's device."""
        if self._direct is None:
            return as_tensors(self.teacher.outputs(batch.inputs), self.device)
        module = self._direct
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad(), FeatureTaps(module, self.features, owner="teacher") as taps:
                outputs = flatten_outputs(module(*as_tensors(batch.inputs, self.device).values()))
                return outputs | {FEATURE_PREFIX + name: value for name, value in taps.taken().items()}
        finally:
            module.train(was_training)

    def arrays(self, batch: Batch) -> dict[str, Array]:
        """The same as numpy arrays."""
        if self._direct is None:
            return self.teacher.outputs(batch.inputs)
        return {name: to_numpy(value) for name, value in self.tensors(batch).items()}


class TeacherSource:
    """Gives the teacher's outputs for training batches, `mode` `cached` or `online`, `reason` why.

    A cached source checks a few items at the start of each epoch against the teacher; a difference (a data set that draws
    random numbers, an augmentation that is not a function of its generator) turns the cache off for good, removes the entry
    and says so.
    """

    def __init__(self, runner: TeacherRunner, split: Split, views: int, cache: OutputCache | None, mode: str, reason: str, seed: int, say: Say) -> None:
        self.runner = runner
        self.split = split
        self.views = views
        self.mode = mode
        self.reason = reason
        self._cache = cache
        self._seed = seed
        self._say = say

    def view(self, epoch: int) -> int | None:
        """The augmentation's view in an epoch (from 0); `None` where nothing is augmented."""
        return epoch % self.views if self.split.augmented else None

    def start_epoch(self, epoch: int) -> None:
        """Fill the epoch's view if it is not there yet, and check a sample of it."""
        if self.mode != "cached" or self._cache is None:
            return
        view = self.view(epoch)
        self._cache.fill(view or 0, lambda indices: self.runner.arrays(self.split.batch(indices, view)))
        picks = np.sort(np.random.default_rng([self._seed, epoch, 0xCA]).choice(len(self.split), min(VERIFY_ITEMS, len(self.split)), replace=False))
        problem = self._difference(picks.astype(np.int64), view)
        if problem:
            self._cache.discard()
            self.mode, self.reason = "online", f"the cache was turned off in epoch {epoch + 1}: {problem}"
            self._say(f"teacher outputs: {self.reason}")

    def _difference(self, picks: NDArray[np.int64], view: int | None) -> str:
        assert self._cache is not None
        fresh = self.runner.arrays(self.split.batch(picks, view))
        kept = self._cache.read(picks, view or 0)
        if sorted(fresh) != sorted(kept):
            return f"the teacher now gives the outputs {sorted(fresh)}, the cache holds {sorted(kept)}"
        for name, value in fresh.items():
            if value.shape != kept[name].shape:
                return f"the output {name!r} has another shape now"
            scale = max(1e-6, float(np.abs(value).max(initial=0.0))) if np.isfinite(value).all() else 1.0
            wrong = ~np.isclose(value, kept[name], rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True)
            if wrong.any():
                item = int(picks[int(np.flatnonzero(wrong.reshape(len(picks), -1).any(axis=1))[0])])
                return (
                    f"for item {item} the teacher's output {name!r} differs from the cached one; "
                    "the data set or the augmentation gives different values for the same index and view"
                )
        return ""

    def get(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """Outputs (and features under `feature:<module>`) for a batch of this epoch, on the training's device."""
        if self.mode == "cached" and self._cache is not None:
            return as_tensors(self._cache.read(batch.indices, self.view(epoch) or 0), self.runner.device)
        return self.runner.tensors(batch)


def open_source(
    runner: TeacherRunner,
    split: Split,
    *,
    wanted: str,
    views: int,
    epochs: int,
    batch_size: int,
    cache_dir: Path,
    cache_features: bool,
    seed: int,
    say: Say,
    decided: tuple[str, str] | None = None,
) -> TeacherSource:
    """The source of teacher outputs for a training; `wanted` is `auto`, `cached` or `online`.

    `auto` times both ways on the first batches and takes the one that is predicted to be faster over all epochs.
    `decided` is the mode and reason of an earlier process, taken as it is.

    Raises:
        DataError: the teacher gives no rows per item.
    """
    count = min(views, epochs) if split.augmented else 1
    cache: OutputCache | None = None
    obstacle = _obstacle(runner, split, cache_features)
    if not obstacle and wanted != "online":
        entry = CacheEntry(
            teacher=runner.teacher.name, teacher_hash=runner.teacher.weights_hash(), data=split.fingerprint(), items=len(split), features=runner.features
        )
        cache = OutputCache(cache_dir, cache_key(runner.teacher, split, runner.features), entry)
    if decided is not None:
        mode, reason = decided
    elif wanted == "online":
        mode, reason = "online", "set by teacher_outputs='online'"
    elif cache is None:
        mode, reason = "online", obstacle
    else:
        mode, reason = _decide(runner, split, cache, wanted, count, epochs, batch_size, cache_dir, say)
    if decided is None:
        say(f"teacher outputs: {mode} ({reason})")
    return TeacherSource(runner, split, views, cache, mode if cache is not None else "online", reason, seed, say)


def _obstacle(runner: TeacherRunner, split: Split, cache_features: bool) -> str:
    if not split.indexed:
        return "the data set has no item index (iterable), so the teacher runs for every batch"
    if not split.cacheable:
        return split.uncacheable_reason
    if runner.features and not cache_features:
        return "feature losses run the teacher anyway (cache_features=True would store the features)"
    return ""


def _decide(
    runner: TeacherRunner, split: Split, cache: OutputCache, wanted: str, count: int, epochs: int, batch_size: int, cache_dir: Path, say: Say
) -> tuple[str, str]:
    sample = np.arange(min(batch_size, FILL_BATCH, len(split)), dtype=np.int64)
    view = 0 if split.augmented else None
    first = runner.arrays(split.batch(sample, view))
    for name, value in first.items():
        if np.ndim(value) == 0 or len(value) != len(sample):
            return "online", f"the teacher's output {name!r} does not have one row per item (shape {np.shape(value)})"
    missing = [number for number in range(count) if not cache.has(number)]
    size = bytes_per_item(first) * len(split) * len(missing)
    cache_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_dir).free
    what = "outputs and features" if runner.features else "outputs"
    say(f"teacher outputs: the cache of {what} takes {size / 1e6:.1f} MB more ({len(missing)} of {count} views to write), {free / 1e6:.0f} MB are free")
    if size > free // 2:
        return "online", f"the cache would take {size / 1e6:.1f} MB of {free / 1e6:.0f} MB free, more than half"
    if wanted == "cached":
        return "cached", f"set by teacher_outputs='cached' ({size / 1e6:.1f} MB to write)"
    online_ms, data_ms, read_ms = _times(runner, split, view, sample, first, cache_dir)
    steps = -(-len(split) // batch_size)
    online = epochs * steps * online_ms
    cached = len(missing) * steps * (online_ms + data_ms) + epochs * steps * read_ms
    reason = (
        f"predicted {cached / 1e3:.1f} s cached, {online / 1e3:.1f} s online over {epochs} epochs; per batch of {len(sample)}: "
        f"teacher {online_ms:.2f} ms, data {data_ms:.2f} ms, reading {read_ms:.3f} ms"
    )
    return ("online" if online < _PREFER_CACHE * cached else "cached"), reason


def _times(
    runner: TeacherRunner, split: Split, view: int | None, sample: NDArray[np.int64], outputs: Mapping[str, Array], cache_dir: Path
) -> tuple[float, float, float]:
    """The smallest time per batch, in milliseconds, of the teacher, of loading the data, and of reading cached outputs."""
    online: list[float] = []
    data: list[float] = []
    read: list[float] = []
    with tempfile.TemporaryDirectory(prefix=".probe.", dir=cache_dir) as folder:
        maps = []
        for position, value in enumerate(outputs.values()):
            path = Path(folder) / f"{position}.npy"
            np.save(path, value, allow_pickle=False)
            maps.append(np.load(path, mmap_mode="r", allow_pickle=False))
        for _ in range(3):
            start = time.perf_counter_ns()
            batch = split.batch(sample, view)
            loaded = time.perf_counter_ns()
            runner.arrays(batch)
            done = time.perf_counter_ns()
            for rows in maps:
                np.array(rows[sample])
            data.append((loaded - start) / 1e6)
            online.append((done - loaded) / 1e6)
            read.append((time.perf_counter_ns() - done) / 1e6)
    return min(online), min(data), min(read)
