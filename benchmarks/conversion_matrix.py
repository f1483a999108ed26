"""Makes the conversion matrix: nine networks in every format that edgekd reaches, with parity, size and latency, or the reason why not.

    python benchmarks/conversion_matrix.py                     # what is missing; then the page
    python benchmarks/conversion_matrix.py --retime            # every latency anew, on a quiet machine
    python benchmarks/conversion_matrix.py --only vit --only-format tflite-static

Every cell is a call of `edgekd.convert`. Finished cells lie in the run folder, so that a command that was stopped goes on; a cell is made anew
if the networks, what is asked for, or a package's version changed. The page is written from the run folder, `docs/matrix.json` holds its raw figures.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from edgekd.converters._onnx_io import versions as installed
from matrix_kit.cells import KINDS, Cell, Workbench, cell_key
from matrix_kit.page import GOAL_NETWORKS, Results, render
from matrix_kit.timing import Ratio, Screen, hashes_of, limits_for, load_stored, take_ratio, take_screen
from networks import NETWORKS, SEED, build, fingerprint

import edgekd
from edgekd.contracts import Target
from edgekd.conversion.formats import HOST_PROFILES
from edgekd.errors import InputError
from edgekd.measuring.launching import utc_now
from edgekd.storage import write_atomic
from edgekd.target import connect

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "litert-torch", "ai-edge-quantizer", "ai-edge-litert", "numpy", "scikit-learn")


def say(text: str) -> None:
    """A line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


class Run:
    """A run folder: cells, screens and ratios as JSON, artifacts beside their cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions = installed(*PACKAGES)
        self.identities: dict[str, str] = {}

    def key(self, network: str, kind: str) -> str:
        """The key that a good cell has; the network is built for it once."""
        if network not in self.identities:
            self.identities[network] = fingerprint(network, build(network))
        return cell_key(self.identities[network], kind, self.versions)

    def place(self, network: str, kind: str) -> Path:
        """The folder of one cell."""
        return self.folder / "cells" / network / kind

    def cell(self, network: str, kind: str) -> Cell | None:
        """A finished cell that is still good, with its file."""
        path = self.place(network, kind) / "cell.json"
        if not path.is_file():
            return None
        try:
            found = Cell.load(path)
        except InputError:
            return None
        whole = found.artifact is None or load_stored(path.parent, found) is not None
        return found if whole and found.key == self.key(network, kind) else None

    def cells(self) -> dict[str, dict[str, Cell]]:
        """All good cells by network and kind."""
        found = {network: {kind: self.cell(network, kind) for kind in KINDS} for network in NETWORKS}
        return {network: {kind: cell for kind, cell in row.items() if cell is not None} for network, row in found.items()}

    def convert(self, networks: Iterable[str], kinds: Sequence[str], again: bool, targets: Mapping[str, Target], environments: Path | None) -> None:
        """Make the cells that are missing, or all of those named if `again`."""
        for network in networks:
            wanted = [kind for kind in kinds if again or self.cell(network, kind) is None]
            if not wanted:
                continue
            bench = Workbench(network, targets, environments)
            for kind in wanted:
                place = self.place(network, kind)
                made = bench.run(kind, self.key(network, kind), place)
                made.save(place / "cell.json")
                figure = f"{made.worst.sqnr_db:.1f} dB" if made.worst is not None else ""
                say(f"{network} {kind}: {made.status} {figure} {made.seconds:.1f} s {made.reason}")

    def time(self, networks: Iterable[str], again: bool, targets: Mapping[str, Target]) -> None:
        """Time the files of a network whose screen is missing or of other files; the A/A run of a target is taken once, before its first screen."""
        limits = {}
        cells = self.cells()
        for network in networks:
            for form, target in targets.items():
                row = {kind: cell for kind, cell in cells[network].items() if cell.artifact is not None and cell.artifact.format.value == form}
                stored = {kind: one for kind, cell in row.items() if (one := load_stored(self.place(network, kind), cell)) is not None}
                if not stored:
                    continue
                path = self.folder / "times" / f"{network}-{form}.json"
                fresh = again or not _same(path, Screen, hashes_of(row))
                pair = {kind: stored[kind] for kind in ("onnx-fp32", "onnx-int8") if kind in stored} if network in GOAL_NETWORKS and form == "onnx" else {}
                beside = self.folder / "times" / f"{network}-ratio.json"
                paired = len(pair) == 2 and (again or not _same(beside, Ratio, hashes_of({kind: row[kind] for kind in pair})))
                if (fresh or paired) and form not in limits:
                    limits[form] = limits_for(target, network, next(iter(stored.values())), SEED)
                if fresh:
                    made = take_screen(network, target, stored, limits[form], SEED)
                    made.save(path)
                    say(f"{network} on {target.name}: " + ", ".join(f"{kind} {one.p50_ms or 0:.3f} ms" for kind, one in made.latencies.items()))
                if paired:
                    ratio = take_ratio(network, target, ("onnx-fp32", pair["onnx-fp32"]), ("onnx-int8", pair["onnx-int8"]), limits[form], SEED)
                    ratio.save(beside)
                    say(f"{network}: int8 ONNX is {ratio.ratio:.2f} times as fast as fp32")

    def results(self) -> Results:
        """Everything that the page is made of; times of files that are no more are left out."""
        cells = self.cells()
        hashes = {network: hashes_of(row) for network, row in cells.items()}
        screens = [Screen.load(path) for path in sorted((self.folder / "times").glob("*.json")) if not path.name.endswith("-ratio.json")]
        ratios = [Ratio.load(path) for path in sorted((self.folder / "times").glob("*-ratio.json"))]
        return Results(
            cells=tuple(cell for row in cells.values() for cell in row.values()),
            screens=tuple(one for one in screens if one.hashes.items() <= hashes.get(one.network, {}).items()),
            ratios=tuple(one for one in ratios if one.hashes.items() <= hashes.get(one.network, {}).items()),
            versions={"edgekd": edgekd.__version__, "python": platform.python_version(), **self.versions},
            machine=f"{platform.machine()}, {platform.system()}",
            made_at=utc_now(),
        )


def _same(path: Path, kind: type[Screen] | type[Ratio], hashes: Mapping[str, str]) -> bool:
    """Whether a file holds times of exactly these files."""
    if not path.is_file():
        return False
    try:
        return kind.load(path).hashes == dict(hashes)
    except InputError:
        return False


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "matrix", help="where cells and times are kept (default: runs/matrix)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where matrix.md and matrix.json are written (default: docs)")
    parser.add_argument("--only", action="append", choices=sorted(NETWORKS), help="a network whose cells are made anew, also if they are finished")
    parser.add_argument("--only-format", action="append", choices=list(KINDS), help="a format whose cells are made anew")
    parser.add_argument("--missing", action="store_true", help="with --only and --only-format: make only what is missing")
    parser.add_argument("--retime", action="store_true", help="take every latency anew; no cell is made anew")
    parser.add_argument("--no-timing", action="store_true", help="convert only")
    parser.add_argument("--environments", type=Path, help="the folder of the converters' environments, as in `edgekd env --path`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides both targets' profiles, as in `edgekd bench`")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """0 if the page is whole; 1 if a cell or a latency is still missing, which the page says too."""
    asked = parsed(words)
    torch.set_num_threads(1)
    run = Run(asked.run_dir.absolute())
    networks, kinds = asked.only or list(NETWORKS), asked.only_format or list(KINDS)
    again = bool(asked.only or asked.only_format) and not asked.missing
    with ExitStack() as stack:
        targets: dict[str, Target] = {}
        if not asked.page_only:
            targets |= {form: stack.enter_context(connect(profile, overrides=asked.set)) for form, profile in HOST_PROFILES.items()}
        if not asked.page_only and not asked.retime:
            run.convert(networks, kinds, again, targets, asked.environments)
        if not asked.page_only and not asked.no_timing:
            run.time(networks, asked.retime, targets)
    results = run.results()
    page, missing = render(results)
    asked.out.mkdir(parents=True, exist_ok=True)
    write_atomic(asked.out / "matrix.json", results.to_readable())
    write_atomic(asked.out / "matrix.md", page.encode())
    say(f"written: {asked.out / 'matrix.md'}" + (f"; still missing: {', '.join(missing[:8])}" if missing else ""))
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
