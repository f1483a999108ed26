"""Files whole or not at all: the old file survives a full disk, an error leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekd.errors import StorageError
from edgekd.storage import copy_file, folder_atomic, sha256_bytes, sha256_file, write_atomic

ROOT = Path(__file__).resolve().parents[2]

LIMITED = """
import resource, signal, sys
from pathlib import Path
from edgekd.errors import StorageError
from edgekd.storage import copy_file, folder_atomic, write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
target, big = Path(sys.argv[1]), b"x" * 5000
try:
    {code}
except StorageError as error:
    print(error)
else:
    sys.exit("the write went through")
"""


def under_a_size_limit(code: str, target: Path) -> str:
    """What the StorageError said, in a process that may write no file above 1000 bytes."""
    done = subprocess.run([sys.executable, "-c", LIMITED.replace("{code}", code), str(target)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_write_atomic_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [item.name for item in path.parent.iterdir()] == ["file"]


def test_write_atomic_keeps_the_old_file_when_the_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    assert str(path) in under_a_size_limit("write_atomic(target, big)", path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_folder_atomic_keeps_the_old_folder_when_the_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "stage"
    with folder_atomic(path) as work:
        (work / "file").write_bytes(b"old")
    code = "\n    ".join(["with folder_atomic(target) as work:", "    (work / 'small').write_bytes(b'x')", "    (work / 'file').write_bytes(big)"])
    under_a_size_limit(code, path)
    assert (path / "file").read_bytes() == b"old"
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["file", "stage"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root; the size-limited twin above covers the behaviour")
def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        path = disk / "file"
        write_atomic(path, b"old")
        with pytest.raises(StorageError, match="no space left") as caught:
            write_atomic(path, b"x" * 200_000)
        assert "free some space" in str(caught.value)
        assert path.read_bytes() == b"old"
        with pytest.raises(StorageError, match="no space left"), folder_atomic(disk / "stage") as work:
            (work / "file").write_bytes(b"x" * 200_000)
        assert [item.name for item in disk.iterdir()] == ["file"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_path_through_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        write_atomic(tmp_path / "file" / "below", b"x")
    assert caught.value.subject == tmp_path / "file" / "below"
    with pytest.raises(StorageError), folder_atomic(tmp_path / "file" / "below"):
        pass
    with pytest.raises(StorageError):
        copy_file(tmp_path / "absent", tmp_path / "copy")


def test_folder_atomic_appears_whole_and_replaces(tmp_path: Path) -> None:
    final = tmp_path / "stage"
    for round_ in range(2):
        with folder_atomic(final) as work:
            (work / "sub").mkdir()
            (work / "sub" / f"file{round_}").write_bytes(b"x")
            assert not (final / "sub" / f"file{round_}").exists()
    assert [item.name for item in (final / "sub").iterdir()] == ["file1"]
    assert [item.name for item in tmp_path.iterdir()] == ["stage"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_folder_atomic_leaves_nothing_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "stage"

    def fail() -> None:
        with folder_atomic(final) as work:
            (work / "file").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """A process that rewrites a file without pause is killed; the file is one of the whole versions."""
    path = tmp_path / "file"
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgekd.storage import write_atomic\n"
        "for round_ in range(10**9):\n    write_atomic(Path(sys.argv[1]), bytes([round_ % 256]) * 200_000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    data = path.read_bytes()
    assert len(data) == 200_000
    assert len(set(data)) == 1


def test_hashes_are_those_of_the_standard_library(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
