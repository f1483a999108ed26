"""What each extra adds to a clean environment, in megabytes, packages and seconds; writes `edgekd/extras.json`, which `edgekd doctor` prints.

python benchmarks/extras.py [EXTRA ...]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
import time
import venv
from datetime import UTC, datetime
from pathlib import Path

from edgekd.extras import ABOUT, ExtraSize, ExtraSizes

ROOT = Path(__file__).resolve().parents[1]
SIZES = ROOT / "edgekd" / "extras.json"
_TORCH = ("distill", "android", "all")
"""Extras that bring torch: its version is named in the same command, so that the wheel at hand is taken and not a larger one of CUDA."""


def installed(folder: Path, extra: str) -> tuple[float, int, float]:
    """Megabytes on disk, packages and seconds of a clean environment with edgekd and one extra (none: an empty text)."""
    place = folder / (extra or "base")
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "-c", str(ROOT / "constraints.txt")]
    torch = ["torch==" + _pinned("torch")] if extra in _TORCH else []
    start = time.monotonic()
    subprocess.run([*pip, *torch, f"{ROOT}[{extra}]" if extra else str(ROOT)], check=True)
    seconds = time.monotonic() - start
    subprocess.run([str(python), "-m", "pip", "check", "--disable-pip-version-check"], check=True)
    said = subprocess.run([str(place / "bin" / "edgekd"), "doctor", "--json"], check=True, capture_output=True, text=True, cwd=place).stdout
    if extra and next(row for row in json.loads(said)["extras"] if row["extra"] == extra)["remedy"]:
        raise SystemExit(f"{extra} is installed and yet not complete: {said}")
    (site,) = place.glob("lib/python*/site-packages")
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file() and not path.is_symlink())
    return size / 1e6, len(list(site.glob("*.dist-info"))), seconds


def _pinned(package: str) -> str:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if name == package:
            return version
    raise SystemExit(f"constraints.txt does not pin {package}")


def main() -> None:
    """Measure the extras that are named, or all, and keep what is recorded of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", choices=[[], *ABOUT], help="default: all")
    given = parser.parse_args()
    before = ExtraSizes.load(SIZES).extras if SIZES.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="edgekd-extras-") as name:
        base_mb, base_packages, _ = installed(Path(name), "")
        found = {}
        for extra in given.extras or ABOUT:
            size_mb, packages, seconds = installed(Path(name), extra)
            found[extra] = ExtraSize(size_mb=round(size_mb - base_mb, 1), packages=packages - base_packages, seconds=round(seconds, 1))
            print(f"{extra}: {found[extra].size_mb:.0f} MB, {found[extra].packages} packages, {seconds:.0f} s", flush=True)
            shutil.rmtree(Path(name) / extra)
    ExtraSizes(
        measured_on=f"Python {platform.python_version()}, Linux {platform.machine()}, torch's CPU wheel, the versions of constraints.txt",
        date=datetime.now(UTC).date().isoformat(),
        base_mb=round(base_mb, 1),
        extras={extra: (before | found)[extra] for extra in ABOUT if extra in before | found},
    ).save(SIZES)


if __name__ == "__main__":
    main()
