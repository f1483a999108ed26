"""A small ONNX net with data, a finished bundle of it on the null target, and an interpreter that lacks some packages."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper
from packaging.requirements import Requirement

from edgekd.bundle import MANIFEST, seal
from edgekd.options import Options
from edgekd.quantize_only import quantize_only
from edgekd.records import Budget, Manifest
from edgekd.target import connect

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 150
_KEPT = tempfile.TemporaryDirectory(prefix="edgekd.tests.")


def save_net(path: Path, *, channels: int = 32) -> Path:
    """Two convolutions and a linear layer from `x` (batch, 1, 8, 8) to four classes `y`; a few hundredths of a millisecond."""
    generator = np.random.default_rng(0)
    weights = {"w1": (16, 1, 3, 3), "w2": (channels, 16, 3, 3), "w3": (channels, 4)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], name="pool"),
        helper.make_node("Flatten", ["e"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w3"], ["y"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array((generator.standard_normal(shape) * 0.3).astype(np.float32), name) for name, shape in weights.items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def save_inputs(folder: Path, *, samples: int = SAMPLES) -> Path:
    """A folder with `x.npy` for the net."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "x.npy", np.random.default_rng(1).standard_normal((samples, 1, 8, 8)).astype(np.float32))
    return folder


@functools.cache
def home() -> Path:
    """A folder with `net.onnx` and `data/x.npy`, shared by the tests of one process; not to be changed."""
    place = Path(_KEPT.name) / "home"
    save_net(place / "net.onnx")
    save_inputs(place / "data")
    return place


def quantized(run_dir: Path, *, target: str = "null", options: Options | None = None, budget: Budget | None = None, overrides: tuple[str, ...] = ()) -> Path:
    """The bundle of `quantize_only` on the net."""
    with connect(target, overrides=overrides) as live:
        result = quantize_only(
            home() / "net.onnx",
            home() / "data",
            target=live,
            budget=budget or Budget(latency_share=0.9, max_drop=0.5),
            run_dir=run_dir,
            options=options or Options(accept_simulated=True),
        )
    assert result.bundle is not None
    return result.bundle


@functools.cache
def _finished() -> Path:
    return quantized(Path(_KEPT.name) / "runs" / "net")


def bundle_copy(folder: Path) -> Path:
    """A bundle that passes on the null target when simulation is accepted; the caller's own copy."""
    shutil.copytree(_finished(), folder)
    return folder


def resealed(bundle: Path, **changes: object) -> Path:
    """The bundle with fields of its manifest changed and sealed anew: what a person with the tools could ship."""
    manifest = Manifest.load(bundle / MANIFEST)
    seal(bundle, msgspec.structs.replace(manifest, **changes))
    return bundle


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change a file's bytes in place."""
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))


def _closure(names: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = importlib.metadata.distribution(requirement.name).metadata["Name"]
        if name not in found:
            found.add(name)
            todo += [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return found


@functools.cache
def interpreter(*extra: str) -> Path:
    """A Python that has the checkout, what edgekd itself requires, and `extra` with what these require; nothing else, so no torch."""
    place = Path(_KEPT.name) / "-".join(("python", *extra))
    venv.create(place, with_pip=False, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    own = [text for text in importlib.metadata.requires("edgekd") or [] if "extra ==" not in text]
    for name in _closure((*own, *extra)):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    (site / "checkout.pth").write_text(f"{ROOT}\n")
    return place / "bin" / "python"


def shell(python: Path | str, *args: object, cwd: Path, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """`edgekd` with these arguments, run by this interpreter in a folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [str(python), "-m", "edgekd", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
