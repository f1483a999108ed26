"""Files are written whole or not at all: temporary file, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekd.errors import StorageError

_CHUNK = 1 << 20


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (*_FULL, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)


def _is_full(error: OSError) -> bool:
    """Whether the disk, a quota or a limit on file sizes ended a write; numpy tells of a short write without a number."""
    return error.errno in _FULL or (error.errno is None and "written" in str(error))


def _concerns(error: OSError, folders: tuple[Path, ...]) -> bool:
    """Whether the error is about writing below `folders`, and not about a file that the block itself reads elsewhere."""
    if error.errno in _DISK or _is_full(error):
        return True
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return any(name.is_relative_to(folder) for name in names for folder in folders)


def _storage_error(path: Path, error: OSError) -> StorageError:
    full = _is_full(error)
    return StorageError(
        f"{path} could not be written",
        found=f"no space left ({error.strerror or error})" if full else error.strerror or str(error),
        hint="free some space and run the same command again: finished stages are kept" if full else "check the path and its permissions",
        subject=path,
    )


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full or the path is not writable; a file that was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fchmod(stream.fileno(), 0o644)
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error


@contextmanager
def folder_atomic(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and vanishes when it does not.

    Every file in it is synced before the rename. An existing `final` is replaced. An `OSError` of the block that has nothing to do
    with this folder (a data file that cannot be read) goes through as it is.

    Raises:
        StorageError: the disk is full or the path is not writable.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise _storage_error(final, error) from error
    try:
        yield work
        for item in sorted(work.rglob("*")):
            if item.is_file():
                with item.open("rb") as stream:
                    os.fsync(stream.fileno())
            else:
                sync_folder(item)
        sync_folder(work)
        work.chmod(0o755)
        if final.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
            os.replace(final, old / final.name)
            os.replace(work, final)
            shutil.rmtree(old)
        else:
            os.replace(work, final)
        sync_folder(final.parent)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        if not _concerns(error, (work, final.parent)):
            raise
        raise _storage_error(final, error) from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file whole or not at all; what was at the destination before stays when the copy fails.

    Raises:
        StorageError: the disk is full or the destination is not writable.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{destination.name}.", dir=destination.parent)
        try:
            os.close(handle)
            shutil.copyfile(source, name)
            os.chmod(name, 0o644)
            os.replace(name, destination)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _storage_error(destination, error) from error


def copy_folder(source: Path, destination: Path) -> None:
    """Copy a folder whole; an existing one is replaced.

    Raises:
        StorageError: the destination is not writable.
    """
    with folder_atomic(destination) as work:
        for path in sorted(source.rglob("*")):
            place = work / path.relative_to(source)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                copy_file(path, place)
