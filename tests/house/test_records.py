"""Every record: frozen, tagged, read back as it was written, and strict about what it reads."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekd.options
import edgekd.records
from edgekd.errors import BudgetError, InputError, ModelError
from edgekd.records import Artifact, Budget, Format, IOSpec, Launch, Limits, Precision, Profile, QuantRecipe, Record, TensorSpec
from edgekd.search import Seen

for _module in pkgutil.walk_packages(edgekd.__path__[:1], "edgekd."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)


def every_record() -> list[type[Record]]:
    found, todo = [], [Record]
    while todo:
        for child in todo.pop().__subclasses__():
            if child.__module__.startswith("edgekd."):
                found.append(child)
                todo.append(child)
    return sorted(found, key=lambda cls: cls.__qualname__)


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
SPEC = TensorSpec(name="x", dtype="float32", shape=("batch", 3, 8, 8))
IO = IOSpec(inputs=(SPEC,), outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 10)),), static_binding={"batch": 1})


def artifact(**changes: Any) -> Artifact:
    fields: dict[str, Any] = {"files": {"m.onnx": "0" * 64}, "entry": "m.onnx", "format": Format.ONNX, "precision": Precision.FP32}
    return Artifact(**(fields | {"iospec": IO, "size_bytes": 1} | changes))


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("cls", every_record(), ids=lambda cls: cls.__qualname__)
def test_a_record_is_frozen_tagged_and_strict(cls: type[Record]) -> None:
    config = cls.__struct_config__
    assert config.frozen
    assert config.forbid_unknown_fields
    assert config.tag_field == "type"
    assert isinstance(config.tag, str)
    assert config.tag.startswith("edgekd.")
    assert config.tag.rpartition("/")[2].isdigit()
    assert cls.__doc__


def test_tags_are_unique() -> None:
    tags = [cls.__struct_config__.tag for cls in every_record()]
    assert len(tags) == len(set(tags)) > 30


def test_the_records_room_exports_all_it_holds() -> None:
    assert edgekd.records.__all__ == sorted(edgekd.records.__all__)
    held = {cls.__name__ for cls in every_record() if cls.__module__.startswith("edgekd.records.")}
    assert held <= set(edgekd.records.__all__)


@pytest.mark.parametrize(
    "cls",
    [cls for cls in every_record() if cls not in (Budget, Seen) and not any(field.required for field in msgspec.structs.fields(cls))],
    ids=lambda cls: cls.__qualname__,
)
def test_a_default_record_is_read_back(cls: type[Record]) -> None:
    value = cls()
    assert cls.from_json(value.to_json()) == value


# ------------------------------------------------------------------------------------------ reading


def test_an_unknown_field_is_refused() -> None:
    data = json.loads(SPEC.to_json()) | {"colour": "red"}
    with pytest.raises(InputError, match="colour"):
        TensorSpec.from_json(json.dumps(data))


@pytest.mark.parametrize("tag", ["edgekd.tensor/2", "edgekd.io/1", "", 1])
def test_a_foreign_tag_is_refused(tag: object) -> None:
    data = json.loads(SPEC.to_json()) | {"type": tag}
    with pytest.raises(InputError, match=r"edgekd\.tensor/1"):
        TensorSpec.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", b"\xff", "{}", '{"type": "edgekd.tensor/1"}'])
def test_what_is_no_record_is_refused(text: str | bytes) -> None:
    with pytest.raises(InputError):
        TensorSpec.from_json(text)


def test_a_value_of_the_wrong_type_or_range_is_refused() -> None:
    for changes in ({"size_bytes": -1}, {"size_bytes": "1"}, {"format": "pickle"}, {"files": ["m.onnx"]}):
        with pytest.raises(InputError):
            Artifact.from_json(json.dumps(json.loads(artifact().to_json()) | changes))


def test_save_and_load_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "artifact.json"
    artifact().save(path)
    assert Artifact.load(path) == artifact()
    assert path.read_text().count("\n") > 5
    with pytest.raises(InputError, match=r"other\.json does not exist"):
        Artifact.load(tmp_path / "other.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"artifact\.json"):
        Artifact.load(path)


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SPEC.name = "z"  # type: ignore[misc]


# ------------------------------------------------------------------------------------------ round trips


@given(names, st.lists(st.one_of(st.integers(1, 4096), names), max_size=5), st.one_of(st.none(), st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))))
@settings(max_examples=50)
def test_a_tensor_spec_is_read_back(name: str, shape: list[int | str], value_range: tuple[float, float] | None) -> None:
    spec = TensorSpec(name=name, dtype="float32", shape=tuple(shape), value_range=value_range)
    again = TensorSpec.from_json(spec.to_json())
    assert again == spec
    assert again.digest() == spec.digest()


@given(names, st.lists(st.integers(0, 2**62), max_size=20), st.dictionaries(names, st.integers(0, 2**62), max_size=3), st.one_of(st.none(), st.floats(0, 1)))
@settings(max_examples=50)
def test_a_launch_keeps_every_nanosecond(label: str, samples: list[int], summary: dict[str, int], share: float | None) -> None:
    launch = Launch(label=label, index=0, samples_ns=tuple(samples), summary_ns=summary, cpu_share=share)
    assert Launch.from_json(launch.to_json()) == launch


@given(st.dictionaries(names, names, min_size=2, max_size=5))
@settings(max_examples=50)
def test_the_digest_does_not_depend_on_the_order_of_keys(producers: dict[str, str]) -> None:
    assert artifact(producers=producers).digest() == artifact(producers=dict(reversed(producers.items()))).digest()


def test_the_digest_changes_with_every_field() -> None:
    base = Limits()
    others = [Limits(cpu_share_min=0.5), Limits(steal_max=None), Limits(spread_max=2.0), Limits(temperature_max_c=80.0)]
    assert len({record.digest() for record in (base, *others)}) == 5


# ------------------------------------------------------------------------------------------ well-formed


def test_the_content_hash_sees_files_and_not_their_history() -> None:
    assert artifact().content_hash() == artifact(parent="p", recipe="r", producers={"torch": "2"}, metadata={"a": "b"}, opset=20).content_hash()
    assert artifact().content_hash() != artifact(files={"m.onnx": "1" * 64}).content_hash()
    assert artifact().content_hash() != artifact(precision=Precision.INT8).content_hash()


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up"])
def test_an_artifact_does_not_leave_its_folder(name: str) -> None:
    with pytest.raises(InputError, match="stay inside"):
        artifact(files={"m.onnx": "0", name: "0"})


def test_an_artifacts_entry_is_one_of_its_files() -> None:
    with pytest.raises(InputError, match="entry"):
        artifact(entry="other")


def test_a_symbolic_axis_needs_a_size() -> None:
    assert SPEC.sizes({"batch": 2}) == (2, 3, 8, 8)
    with pytest.raises(ModelError, match="batch"):
        SPEC.sizes({})


def test_tensors_of_a_model_have_their_own_names() -> None:
    with pytest.raises(ModelError, match="share a name"):
        IOSpec(inputs=(SPEC, SPEC), outputs=(SPEC,))
    with pytest.raises(ModelError, match="without any output"):
        IOSpec(inputs=(SPEC,), outputs=())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"latency_ms": 1.0, "latency_share": 0.5},
        {"latency_ms": 0.0},
        {"latency_ms": -1.0},
        {"latency_ms": float("nan")},
        {"latency_ms": float("inf")},
        {"latency_share": 1.5},
        {"latency_ms": 1.0, "percentile": 100.0},
        {"latency_ms": 1.0, "percentile": 0.0},
        {"latency_ms": 1.0, "max_drop": -0.1},
        {"latency_ms": 1.0, "max_drop": float("nan")},
        {"latency_ms": 1.0, "size_mb": 0.0},
    ],
)
def test_a_budget_without_meaning_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(BudgetError):
        Budget(**fields)  # type: ignore[arg-type]


def test_a_recipe_and_a_profile_are_read_back() -> None:
    from edgekd.records import CalibrationSpec

    recipe = QuantRecipe(scheme="u8s8", calibration=CalibrationSpec(method="minmax", size=8, split="train", data_hash="h"), float_ops=("conv1",))
    assert QuantRecipe.from_json(recipe.to_json()) == recipe
    profile = Profile(name="p", description="d")
    assert Profile.from_json(profile.to_json()) == profile
