"""The deliverable: artifact, manifest, ledger, evaluation data and report in one folder, every file hashed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Tensors
from edgekd.errors import BundleError, InputError
from edgekd.records import Format, Manifest, Record, TensorSpec
from edgekd.storage import sha256_file, write_atomic
from edgekd.tree import first_line

R = TypeVar("R", bound=Record)

MANIFEST = "manifest.json"
_PACKAGES = (
    *("edgekd", "numpy", "onnx", "onnxruntime", "onnxscript", "torch", "lightning-fabric", "scipy", "safetensors"),
    *("ai-edge-litert", "ai-edge-quantizer", "litert-torch"),
)


class EvaluationIndex(Record, tag="edgekd.evaluation/1", frozen=True, kw_only=True):
    """Which `.npy` file holds which array: inputs, targets (`""` if there is one unnamed target) and the teacher's outputs."""

    items: int
    inputs: dict[str, str]
    targets: dict[str, str]
    teacher: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """The test split with the teacher's outputs on it; arrays are `(items, ...)`."""

    inputs: dict[str, Array]
    targets: Any
    teacher: dict[str, Array]


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that take part, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save_evaluation(folder: Path, inputs: Tensors, targets: Any, teacher: Tensors) -> int:
    """Write evaluation data as plain `.npy` files with an index; gives the number of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    named_targets: Mapping[str, Array] = targets if isinstance(targets, Mapping) else {"": targets}
    files: dict[str, dict[str, str]] = {}
    size = 0
    for group, arrays in (("inputs", inputs), ("targets", named_targets), ("teacher", teacher)):
        files[group] = {}
        for position, (name, value) in enumerate(arrays.items()):
            path = folder / f"{group}-{position:03d}.npy"
            np.save(path, np.ascontiguousarray(value), allow_pickle=False)
            files[group][name] = path.name
            size += path.stat().st_size
    items = len(next(iter(inputs.values())))
    EvaluationIndex(items=items, inputs=files["inputs"], targets=files["targets"], teacher=files["teacher"]).save(folder / "index.json")
    return size


def load_evaluation(folder: Path) -> Evaluation:
    """The evaluation data in `folder`.

    Raises:
        BundleError: a file is missing or is not a plain array.
    """
    index = _loaded(EvaluationIndex, folder / "index.json", "this folder holds no evaluation data")

    def read(files: Mapping[str, str]) -> dict[str, Array]:
        out = {}
        for name, file in files.items():
            try:
                out[name] = np.load(folder / Path(file).name, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise BundleError(f"the evaluation array {file} cannot be read", found=first_line(error), hint="restore the bundle", subject=file) from error
        return out

    targets = read(index.targets)
    return Evaluation(read(index.inputs), targets.get("", targets), read(index.teacher))


def file_hashes(folder: Path) -> dict[str, str]:
    """Every file below `folder`, by its path in it, with its SHA-256."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest over all files that lie in `folder`; gives it with their hashes and its own digest."""
    files = file_hashes(folder)
    files.pop(MANIFEST, None)
    sealed = Manifest.from_json(msgspec.structs.replace(manifest, files=files, seal="").to_json())  # as a reader sees it: 90 is then 90.0
    sealed = msgspec.structs.replace(sealed, seal=sealed.digest())
    sealed.save(folder / MANIFEST)
    return sealed


def _loaded(kind: type[R], path: Path, problem: str) -> R:
    try:
        return kind.load(path)
    except InputError as error:
        found = ": ".join(str(part) for part in (error.what, error.found) if part is not None)
        raise BundleError(problem, found=found, hint="restore the bundle, or make it again", subject=path) from error


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files were compared with their hashes."""

    folder: Path
    manifest: Manifest

    @property
    def artifact(self) -> StoredArtifact:
        """What runs on the device."""
        return StoredArtifact(self.manifest.artifact, self.folder / "artifact")

    def evaluation(self, data: Path | None = None) -> Evaluation:
        """The evaluation data, from the bundle or from `data` where the bundle was capped.

        Raises:
            BundleError: the bundle has none and no folder was given, or the folder does not hold the data that the bundle was judged on.
        """
        if data is not None:
            self._check_data(data)
            return load_evaluation(data)
        if self.manifest.data_capped:
            raise BundleError(
                "the bundle holds no evaluation data: they were over the cap",
                found=str(self.folder),
                hint="give the folder with them: --data RUN/evaluation",
                subject=self.folder,
            )
        return load_evaluation(self.folder / "evaluation")

    def _check_data(self, data: Path) -> None:
        own = "evaluation/"
        wanted = self.manifest.evaluation or {name.removeprefix(own): digest for name, digest in self.manifest.files.items() if name.startswith(own)}
        for name, digest in wanted.items():
            path = data / name
            if not path.is_file() or sha256_file(path) != digest:
                raise BundleError(
                    "these are not the evaluation data that the bundle was judged on",
                    found=f"{path} {'was changed' if path.is_file() else 'is missing'}",
                    hint="give the folder that the run wrote: --data RUN/evaluation",
                    subject=path,
                )


def open_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, after comparing every file with the manifest.

    Raises:
        BundleError: it is no bundle, a file is missing, was changed, or is not in the manifest.
    """
    if not (folder / MANIFEST).is_file():
        inside = sorted(str(path.parent) for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{MANIFEST}"))
        raise BundleError(
            "this folder is not a bundle",
            found=str(folder),
            allowed=f"a folder with {MANIFEST}",
            hint=f"name one of the bundles in it: {', '.join(inside)}" if inside else "give the bundle folder that a run printed",
            subject=folder,
        )
    manifest = _loaded(Manifest, folder / MANIFEST, f"the bundle's {MANIFEST} cannot be read")
    if _seal_of(folder / MANIFEST) != manifest.seal:
        raise BundleError(
            f"the bundle's {MANIFEST} was changed",
            found=f"seal {manifest.seal[:16] or 'none'}",
            allowed="the seal over all its fields",
            hint="restore the bundle, or make it again",
            subject=MANIFEST,
        )
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    missing = sorted(set(manifest.files) - present)
    extra = sorted(present - set(manifest.files))
    if missing or extra:
        raise BundleError(
            "the bundle's files are not those of its manifest",
            found=f"missing {missing or 'none'}, unknown {extra or 'none'}",
            hint="restore the bundle",
            subject=folder,
        )
    for name, expected in manifest.files.items():
        if sha256_file(folder / name) != expected:
            raise BundleError(
                f"the bundle's file {name} was changed",
                found=sha256_file(folder / name)[:16],
                allowed=expected[:16],
                hint="restore the bundle, or make it again",
                subject=name,
            )
    bundle = Bundle(folder, manifest)
    bundle.artifact.verify()
    return bundle


def _seal_of(path: Path) -> str:
    """The digest of a manifest's fields as they stand in the file, so that a field that came later does not break an older bundle."""
    fields = msgspec.json.decode(path.read_bytes())
    return hashlib.sha256(msgspec.json.encode(fields | {"seal": ""})).hexdigest()


def model_card(manifest: Manifest, *, student: str, summary: Mapping[str, str]) -> str:
    """A short Markdown text about the student for those who get only the folder."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary.items())
    simulated = f"\n**Simulated ({manifest.verdict.simulated}): these numbers are not from real hardware.**\n" if manifest.verdict.simulated else ""
    head = f"# {student}\n\nVerdict: **{manifest.verdict.outcome.value}**. {manifest.verdict.reason}\n{simulated}"
    return f"{head}\n| | |\n|---|---|\n{rows}\n{_tensors(manifest)}{_snippet(manifest)}"


def _tensors(manifest: Manifest) -> str:
    spec = manifest.artifact.iospec
    known = [("input", tensor) for tensor in spec.inputs] + [("output", tensor) for tensor in spec.outputs]
    rows = "".join(f"| {kind} | `{tensor.name}` | {tensor.dtype} | ({', '.join(map(str, tensor.shape))}) |\n" for kind, tensor in known)
    return f"\n| | name | dtype | shape |\n|---|---|---|---|\n{rows}"


def _sizes(tensor: TensorSpec, binding: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(binding.get(axis, 1) if isinstance(axis, str) else axis for axis in tensor.shape)


def _snippet(manifest: Manifest) -> str:
    """A few lines of Python that run the artifact; empty for formats other than ONNX and TFLite."""
    if manifest.artifact.format not in (Format.ONNX, Format.TFLITE):
        return ""
    binding = manifest.artifact.iospec.static_binding
    feeds = ", ".join(f"{tensor.name!r}: np.zeros({_sizes(tensor, binding)}, np.{np.dtype(tensor.dtype).name})" for tensor in manifest.artifact.iospec.inputs)
    threads = manifest.fingerprint.fields.get("threads", "1")
    onnx = (
        "import numpy as np, onnxruntime as ort",
        f"options = ort.SessionOptions(); options.intra_op_num_threads = {threads}",
        f'session = ort.InferenceSession("artifact/{manifest.artifact.entry}", options, providers=["CPUExecutionProvider"])',
        f"outputs = session.run(None, {{{feeds}}})",
        "print(*(output.shape for output in outputs))",
    )
    tflite = (
        "import numpy as np",
        "from ai_edge_litert.interpreter import Interpreter",
        f'runner = Interpreter("artifact/{manifest.artifact.entry}", num_threads={threads}).get_signature_runner()',
        f"outputs = runner(**{{{feeds}}})",
        "print(*(f'{name} {output.shape}' for name, output in outputs.items()))",
    )
    lines = onnx if manifest.artifact.format is Format.ONNX else tflite
    return "\nTo run it from this folder, with your arrays in place of the zeros:\n\n```python\n" + "\n".join(lines) + "\n```\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_atomic(path, text.encode())
