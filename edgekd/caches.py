"""The shared caches beside runs: what is in them, and their size cap. Runs and bundles never depend on an entry."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CACHE_NAME = ".edgekd-cache"
"""What the cache beside a run is called."""

_IN_USE_S = 3600.0


class CacheEntry(NamedTuple):
    """One thing in a cache, with everything below it; `age_days` counts from the last write."""

    path: Path
    kind: str
    size_bytes: int
    age_days: float


def cache_entries(cache: Path) -> tuple[CacheEntry, ...]:
    """The entries `kind/key` of a cache folder, sorted; half-written ones and locks, whose names start with a dot, are left out."""
    entries = []
    for kind in sorted(item for item in cache.iterdir() if item.is_dir() and not item.name.startswith(".")):
        for entry in sorted(item for item in kind.iterdir() if not item.name.startswith(".")):
            files = [path for path in entry.rglob("*") if path.is_file()] if entry.is_dir() else [entry]
            newest = max((path.stat().st_mtime for path in files), default=entry.stat().st_mtime)
            entries.append(CacheEntry(entry, kind.name, sum(path.stat().st_size for path in files), (time.time() - newest) / 86400))
    return tuple(entries)


def remove_entries(entries: Sequence[CacheEntry]) -> None:
    """Remove entries with everything below them."""
    for entry in entries:
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)


def trim_cache(cache: Path, cap_mb: float) -> tuple[CacheEntry, ...]:
    """The entries that were removed, the oldest first, to bring a cache under `cap_mb` (10^6 bytes).

    Entries written within the last hour stay, because another run may be using them: the cap can be exceeded by as much.
    """
    if not cache.is_dir():
        return ()
    entries = sorted(cache_entries(cache), key=lambda entry: -entry.age_days)
    excess = sum(entry.size_bytes for entry in entries) - cap_mb * 1e6
    out: list[CacheEntry] = []
    for entry in entries:
        if excess <= 0 or entry.age_days * 86400 < _IN_USE_S:
            break
        out.append(entry)
        excess -= entry.size_bytes
    remove_entries(out)
    return tuple(out)
