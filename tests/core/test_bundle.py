"""Bundles: sealed whole, and every way in which one can be changed is an error that names the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekd.bundle import MANIFEST, file_hashes, load_evaluation, open_bundle, save_evaluation
from edgekd.errors import BundleError
from edgekd.records import Budget, Ledger, Manifest
from tests.pipeline.bundle_kit import bundle_copy, edit, resealed


def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundle_copy(tmp_path / "bundle")


def test_bundle_is_complete_and_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert set(opened.manifest.files) | {MANIFEST} == set(file_hashes(bundle))
    assert {"ledger.json", "evidence.json", "report.html", "MODEL_CARD.md", "evaluation/index.json", "artifact/model.onnx", "float/model.onnx"} <= set(
        opened.manifest.files
    )
    assert opened.artifact.entry.is_file()
    assert Ledger.load(bundle / "ledger.json").rows
    evaluation = opened.evaluation()
    assert {len(evaluation.inputs["x"]), len(evaluation.targets), len(evaluation.teacher["y"])} == {60}
    assert "Simulated (null)" in (bundle / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "artifact/model.onnx",
        "float/model.onnx",
        "evaluation/inputs-000.npy",
        "evaluation/targets-000.npy",
        "evaluation/teacher-000.npy",
        "evaluation/index.json",
        "ledger.json",
        "evidence.json",
        "report.html",
        "MODEL_CARD.md",
    ],
)
def test_changed_byte_is_refused_with_the_file(bundle: Path, name: str) -> None:
    edit(bundle / name, flip)
    with pytest.raises(BundleError, match="was changed") as caught:
        open_bundle(bundle)
    assert caught.value.subject == name


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "x"]
    return value | {"x": "x"}


@pytest.mark.parametrize(
    "field", [name for name in Manifest.__struct_fields__ if name not in ("student", "artifact", "budget", "verdict", "fingerprint", "profile", "recipe")]
)
def test_changed_field_of_the_manifest_is_refused(bundle: Path, field: str) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    content[field] = changed(content[field])
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"manifest\.json was changed.*make it again"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("budget", "max_drop"), 0.9),
        (("verdict", "outcome"), "fail"),
        (("artifact", "size_bytes"), 1),
        (("fingerprint", "fields", "cpu_model"), "another"),
        (("recipe", "scheme"), "s8s8"),
        (("profile", "runtime", "threads"), 7),
        (("profile", "measure", "verdict", "launches"), 1),
    ],
)
def test_changed_value_inside_the_manifest_is_refused(bundle: Path, place: tuple[str, ...], value: Any) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    assert inner[place[-1]] != value
    inner[place[-1]] = value
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"manifest\.json was changed"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"{}", b'{"type": "edgekd.ledger/1", "rows": []}', b'{"type": "edgekd.manifest/1", "surplus": 1}']
)
def test_manifest_that_cannot_be_read_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        open_bundle(bundle)


def test_manifest_with_an_impossible_budget_is_refused(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    content["budget"]["latency_share"] = -1.0
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="positive"):
        open_bundle(bundle)


def test_manifest_without_a_seal_is_refused(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    del content["seal"]
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="seal none"):
        open_bundle(bundle)


def test_missing_and_unknown_files_are_named(bundle: Path) -> None:
    (bundle / "ledger.json").unlink()
    (bundle / "artifact" / "surplus.bin").write_bytes(b"x")
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert caught.value.found == "missing ['ledger.json'], unknown ['artifact/surplus.bin']"


def test_second_manifest_deeper_in_the_bundle_is_unknown(bundle: Path) -> None:
    (bundle / "artifact" / MANIFEST).write_text("{}")
    with pytest.raises(BundleError, match=r"unknown \['artifact/manifest\.json'\]"):
        open_bundle(bundle)


def test_sealing_anew_makes_a_changed_bundle_open(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("shipped to site 7")
    opened = open_bundle(resealed(bundle, seed=7))
    assert (opened.manifest.seed, "notes.txt" in opened.manifest.files) == (7, True)


def test_seal_holds_where_a_whole_number_stands_for_a_float(bundle: Path) -> None:
    resealed(bundle, budget=Budget(latency_ms=1, percentile=90))
    assert open_bundle(bundle).manifest.budget.percentile == 90.0


def test_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match=r"not a bundle.*the bundle folder that a run printed"):
            open_bundle(folder)


# ------------------------------------------------------------------------------------------ evaluation data


@pytest.mark.parametrize("targets", [np.arange(5), {"kind": np.arange(5), "a/size": np.zeros((5, 2))}])
def test_evaluation_data_come_back_as_they_were(targets: Any, tmp_path: Path) -> None:
    inputs: dict[str, np.ndarray]
    inputs, teacher = {"x.y": np.ones((5, 3), dtype=np.float32), "z": np.zeros((5,), dtype=np.int64)}, {"cls/logits": np.eye(5)}
    size = save_evaluation(tmp_path, inputs, targets, teacher)
    assert size == sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    again = load_evaluation(tmp_path)
    assert all(np.array_equal(again.inputs[name], value) and again.inputs[name].dtype == value.dtype for name, value in inputs.items())
    assert np.array_equal(again.teacher["cls/logits"], teacher["cls/logits"])
    if isinstance(targets, dict):
        assert all(np.array_equal(again.targets[name], value) for name, value in targets.items())
    else:
        assert np.array_equal(again.targets, targets)


def test_pickled_evaluation_data_are_never_read(tmp_path: Path) -> None:
    save_evaluation(tmp_path, {"x": np.zeros((5, 3))}, np.arange(5), {"y": np.zeros((5, 2))})
    np.save(tmp_path / "targets-000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BundleError, match=r"targets-000\.npy cannot be read"):
        load_evaluation(tmp_path)


@pytest.mark.parametrize("name", ["index.json", "inputs-000.npy"])
def test_missing_evaluation_file_is_a_bundle_error(tmp_path: Path, name: str) -> None:
    save_evaluation(tmp_path, {"x": np.zeros((5, 3))}, np.arange(5), {"y": np.zeros((5, 2))})
    (tmp_path / name).unlink()
    with pytest.raises(BundleError, match=name):
        load_evaluation(tmp_path)


def test_bundle_from_before_a_field_came_still_opens(bundle: Path) -> None:
    path = bundle / MANIFEST
    fields = json.loads(path.read_bytes())
    for later in ("accuracy", "metric"):
        del fields[later]
    fields["seal"] = ""
    fields["seal"] = hashlib.sha256(msgspec.json.encode(fields)).hexdigest()
    path.write_bytes(json.dumps(fields).encode())
    assert open_bundle(bundle).manifest.accuracy is None
    fields["seed"] += 1
    path.write_bytes(json.dumps(fields).encode())
    with pytest.raises(BundleError, match="was changed"):
        open_bundle(bundle)
