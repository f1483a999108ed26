"""One cell of the conversion matrix: a network brought to a format by edgekd.convert, and compared with torch on held-out inputs."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from networks import NETWORKS, SEED, build

from edgekd import convert
from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest, Target
from edgekd.conversion.inputs import refit
from edgekd.errors import ConversionRejected, EdgekdError
from edgekd.measuring.launching import utc_now
from edgekd.parity.compare import BASE_DEPTH, compare_hop
from edgekd.parity.graph import output_ranges
from edgekd.records import Artifact, HopParity, IOSpec, Precision, Record, TensorParity, TensorSpec
from edgekd.registry import load
from edgekd.teachers import TorchTeacher

CALIBRATION, HELD_OUT = 64, 64
"""Samples that calibrate int8, and samples that every figure is taken on; no digit is in both."""

LEGACY = "onnx-legacy-from-torch"
OPSETS = (17, 13, 12, 11)
"""Operator sets that torch's older exporter is asked for, for onnx-tf, which knows none that the newer one writes."""

_REASON = 260
_LOG = "its last words:"


@dataclass(frozen=True)
class Kind:
    """One column: `title` for people, and what edgekd.convert is asked for."""

    title: str
    to: str
    precision: str
    via: tuple[str, ...] = ()
    scheme: str | None = None


KINDS: Mapping[str, Kind] = {
    "onnx-fp32": Kind("ONNX fp32", "onnx", "fp32"),
    "onnx-fp16": Kind("ONNX fp16", "onnx", "fp16"),
    "onnx-int8": Kind("ONNX int8 (local's own scheme)", "onnx", "int8"),
    "onnx-tensorrt": Kind("TensorRT-ready Q/DQ ONNX", "onnx", "int8", scheme="s8s8_tensorrt"),
    "tflite-fp32": Kind("TFLite fp32", "tflite", "fp32", ("tflite-from-torch",)),
    "tflite-fp16": Kind("TFLite fp16", "tflite", "fp16", ("tflite-from-torch",)),
    "tflite-dynamic": Kind("TFLite dynamic int8", "tflite", "int8", ("tflite-from-torch",), "dynamic_int8"),
    "tflite-static": Kind("TFLite static int8", "tflite", "int8", ("tflite-from-torch",), "static_int8"),
    "onnx2tf-fp32": Kind("onnx2tf fp32", "tflite", "fp32", ("tflite-from-onnx",)),
    "onnx2tf-static": Kind("onnx2tf static int8", "tflite", "int8", ("tflite-from-onnx",), "static_int8"),
    "onnx-tf-fp32": Kind("onnx-tf fp32", "tflite", "fp32", (LEGACY, "saved-model-from-onnx")),
    "onnx-tf-static": Kind("onnx-tf, then TensorFlow's static int8", "tflite", "int8", (LEGACY, "saved-model-from-onnx"), "static_int8"),
}
"""Every column by its short name."""


class Cell(Record, tag="edgekd.benchmark.cell/1", frozen=True, kw_only=True):
    """What became of one network in one format.

    `status`: `ok`, `DIFFERS` (the file exists, and some figure is outside its tolerance) or `refused` (there is no file); `reason` says why.
    `parity` compares the file with torch on held-out inputs, `hops` every hop with the one before. `seconds` is the wall time of the conversion.
    """

    network: str
    kind: str
    key: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    route: tuple[str, ...] = ()
    parity: HopParity | None = None
    hops: tuple[HopParity, ...] = ()
    artifact: Artifact | None = None
    made_at: str = ""

    @property
    def worst(self) -> TensorParity | None:
        """The output with the least signal to error."""
        return None if self.parity is None else min(self.parity.tensors, key=lambda tensor: tensor.sqnr_db)


def cell_key(identity: str, kind: str, versions: Mapping[str, str]) -> str:
    """What makes a finished cell still good: the network's fingerprint, what is asked for, and the versions of the packages."""
    parts = [identity, repr(KINDS[kind]), repr(sorted(versions.items())), f"{CALIBRATION} {HELD_OUT} {SEED}"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def short(text: str) -> str:
    """A reason as one line that fits a table, without paths of this machine."""
    line = re.sub(r"(?:/[\w.+-]+){2,}/", "", " ".join(text.split())).replace("|", "/")
    return line if len(line) <= _REASON else line[: _REASON - 3].rstrip() + "..."


def told(error: EdgekdError) -> str:
    """What an error says is wrong and what was found, without the advice and the tail of a process's log."""
    found = "" if error.found is None else str(error.found).partition(_LOG)[0].rstrip(": ;")
    return short(f"{error.what}: {found}" if found else error.what)


class Workbench:
    """A network with its inputs and torch's outputs, ready for every column."""

    def __init__(self, network: str, targets: Mapping[str, Target], environments: Path | None) -> None:
        self.network, self.targets, self.environments = network, targets, environments
        self.module = build(network)
        self.calibration = {"x": NETWORKS[network].inputs("calibration", CALIBRATION)}
        self.inputs = {"x": NETWORKS[network].inputs("held-out", HELD_OUT)}
        self.reference = TorchTeacher(self.module).outputs(self.inputs)
        self.spec = IOSpec(inputs=specs_of(self.inputs), outputs=specs_of(self.reference), static_binding={"batch": 1})

    def run(self, kind: str, key: str, folder: Path) -> Cell:
        """The cell, with its artifact in `folder`; what edgekd refuses is a cell too."""
        asked = KINDS[kind]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begun = time.monotonic()
        common: dict[str, Any] = {"network": self.network, "kind": kind, "key": key, "made_at": utc_now()}
        try:
            options = {LEGACY: {"opset": self._opset(folder)}} if LEGACY in asked.via else {}
            made = convert(
                self.module,
                asked.to,
                precision=asked.precision,
                calibration=self.calibration if asked.precision == "int8" else None,
                via=asked.via,
                example=self.inputs,
                out=folder / "artifact",
                scheme=asked.scheme,
                environments=self.environments,
                options=options,
                samples=HELD_OUT,
                allow_divergence=True,
                seed=SEED,
                progress=False,
            )
            seconds = time.monotonic() - begun
            parity = self.compare(made.stored)
        except EdgekdError as error:
            return Cell(**common, status="refused", reason=told(error), seconds=time.monotonic() - begun)
        bad = next((hop for hop in (parity, *made.parity) if not hop.passed), None)
        reason = "" if bad is None else short(f"{bad.hop}, {bad.first_bad}: {next(row.reason for row in bad.tensors if row.name == bad.first_bad)}")
        return Cell(
            **common,
            status="ok" if bad is None else "DIFFERS",
            reason=reason,
            seconds=seconds,
            route=made.route,
            parity=parity,
            hops=made.parity,
            artifact=made.artifact,
        )

    def compare(self, stored: StoredArtifact) -> HopParity:
        """A file against torch on the held-out inputs, run by the target of its format, within the tolerance of its precision and depth."""
        record = stored.record
        found = self.targets[record.format.value].runtime.infer(stored, refit(self.inputs, self.spec, stored, changed=True))
        depth = record.metadata.get("depth", "")
        return compare_hop(
            f"torch -> {record.format.value} {record.precision.value}",
            refit(self.reference, self.spec, stored, changed=True, outputs=True),
            found,
            precision=record.precision,
            depth=int(depth) if depth.isdigit() else BASE_DEPTH,
            limits=output_ranges(stored) if record.precision is Precision.INT8 else None,
        )

    def _opset(self, folder: Path) -> int:
        """The newest operator set that onnx-tf takes of this network, else the newest that the exporter writes.

        Raises:
            ConversionRejected: the exporter refuses all of them.
        """
        written, refused = [], None
        for opset in OPSETS:
            place = folder / f"{LEGACY}-{opset}"
            place.mkdir()
            asked = ConvertRequest(source=self.module, folder=place, iospec=self.spec, example=self.inputs, options={"opset": opset})
            try:
                made = load("converters", LEGACY)().convert(asked)
            except ConversionRejected as error:
                refused = error
                continue
            written.append(opset)
            if load("converters", "saved-model-from-onnx")().supports(made).supported:
                return opset
        if refused is not None and not written:
            raise refused
        return written[0]


def specs_of(arrays: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Arrays `(samples, ...)` as tensors with a symbolic batch."""
    return tuple(TensorSpec(name=name, dtype=array.dtype.name, shape=("batch", *array.shape[1:])) for name, array in arrays.items())
