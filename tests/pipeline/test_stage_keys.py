"""Which stages a change redoes: those that use what changed, and those that rest on them."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edgekd.contracts import ConvertRequest
from edgekd.data import Arrays, make_split
from edgekd.errors import DataError
from edgekd.identity.keys import stage_key
from edgekd.options import Options
from edgekd.pipeline import compress, make_context
from edgekd.records import Budget, IOSpec, TensorSpec
from edgekd.registry import load
from edgekd.spaces import Fixed
from edgekd.stages import STAGES, StageStore
from edgekd.steps.inputs import run_facts
from edgekd.target import connect
from edgekd.tasks import Classification
from tests.pipeline.pipeline_kit import OPTIONS, arguments, make_data, make_teacher

pytestmark = pytest.mark.torch

ALL = tuple(stage.name for stage in STAGES)
ITEMS = 48
"""So few that the fingerprint sees every item."""


@dataclass
class World:
    """The run's files, and what a case changes."""

    folder: Path
    options: Options = OPTIONS
    changes: dict[str, Any] = field(default_factory=dict)

    def run(self) -> list[str]:
        """The stages that were done, in order."""
        done: list[str] = []
        given = arguments("classification", self.folder / "run", teacher=self.folder / "teacher.onnx", options=self.options)
        given |= {"budget": Budget(latency_share=0.9), "student": Fixed(self.folder / "teacher.onnx"), "data": None}
        del given["data"]
        given |= {name: small(name) for name in ("train", "validation", "test")} | self.changes
        target = given.pop("target", ("null", ()))
        with connect(target[0], overrides=target[1]) as live:
            compress(
                **given,
                target=live,
                cache_dir=self.folder / "cache",
                listener=lambda event: done.append(event.stage) if event.kind == "finished" else None,
            )
        return done


def small(name: str) -> Arrays:
    whole: Arrays = getattr(make_data("classification"), name)
    assert whole.targets is not None
    return Arrays({key: value[:ITEMS].copy() for key, value in whole.inputs.items()}, whole.targets[:ITEMS])


def export(module: torch.nn.Module, path: Path) -> None:
    image = np.zeros((1, 1, 8, 8), dtype=np.float32)
    spec = IOSpec(inputs=(TensorSpec(name="image", dtype="float32", shape=image.shape),), outputs=(TensorSpec(name="output", dtype="float32", shape=()),))
    request = ConvertRequest(source=module, folder=path.parent / "made", iospec=spec, example={"image": image})
    shutil.copyfile(load("converters", "onnx-from-torch")().convert(request).entry, path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher's file and a finished run of it: every stage is real, and none trains."""
    folder = tmp_path_factory.mktemp("finished")
    export(make_teacher("classification"), folder / "teacher.onnx")
    assert World(folder).run() == list(ALL)
    return folder


@pytest.fixture
def world(finished: Path, tmp_path: Path) -> World:
    shutil.copytree(finished, tmp_path / "copy")
    return World(tmp_path / "copy")


def options(part: str, **values: Any) -> Options:
    changes = {part: msgspec.structs.replace(getattr(OPTIONS, part), **values)} if part else values
    made: Options = msgspec.structs.replace(OPTIONS, **changes)
    return made


CASES: Mapping[str, tuple[Options, tuple[str, ...]]] = {
    "nothing": (OPTIONS, ()),
    "train": (options("train", epochs=5), tuple(name for name in ALL if name != "baseline")),
    "threads": (options("train", threads=0, checkpoint_every_s=3.0), ()),
    "search": (options("search", measurements=5), tuple(name for name in ALL if name != "baseline")),
    "attempts": (options("search", attempts=1), ()),
    "transposes": (options("convert", max_transposes=50), tuple(name for name in ALL if name != "baseline")),
    "quantize": (options("quantize", percentile=99.9), ("baseline", "quantize", "validate", "bundle")),
    "parity": (options("", parity_samples=16), ("baseline", "convert", "quantize", "validate", "bundle")),
    "extreme": (options("", allow_extreme=True), ("baseline", "validate", "bundle")),
    "accept": (options("", accept_simulated=False), ("validate", "bundle")),
    "cap": (options("", bundle_data_mb=100.0), ("bundle",)),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_changed_options_redo_only_the_stages_that_use_them(world: World, name: str) -> None:
    world.options, expected = CASES[name]
    assert world.run() == list(expected)


def test_one_byte_of_the_training_data_redoes_everything(world: World) -> None:
    changed = small("train")
    changed.inputs["image"].view(np.uint8).reshape(-1)[-4] ^= 1
    world.changes = {"train": changed}
    assert world.run() == list(ALL)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_changed_labels_redo_everything(world: World, split: str) -> None:
    changed = small(split)
    assert changed.targets is not None
    targets = changed.targets.copy()
    targets[3] = (targets[3] + 1) % 4
    world.changes = {split: Arrays(changed.inputs, targets)}
    assert world.run() == list(ALL)


def test_changed_budget_or_seed_redoes_everything(world: World) -> None:
    world.changes = {"budget": Budget(latency_share=0.8)}
    assert world.run() == list(ALL)
    world.changes = {"seed": 1}
    assert world.run() == list(ALL)


def test_other_device_redoes_everything(world: World) -> None:
    world.changes = {"target": ("null", ("runtime.options.speed=2.0",))}
    assert world.run() == list(ALL)


def test_changed_student_redoes_from_the_search_on(world: World) -> None:
    module = make_teacher("classification", 16)
    export(module, world.folder / "student.onnx")
    world.changes = {"student": Fixed(world.folder / "student.onnx")}
    assert world.run() == [name for name in ALL if name != "baseline"]


@pytest.mark.slow
def test_changed_code_of_an_own_task_redoes_everything(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "from edgekd.tasks import Classification\nclass Mine(Classification):\n    extra = {}\n"
    done = []
    for extra in (1, 2, 2):
        name = f"own_task_{extra}"
        (tmp_path / f"{name}.py").write_text(source.replace("{}", str(extra)))
        world.changes = {"task": __import__(name).Mine()}
        done.append(world.run())
    assert done == [list(ALL), list(ALL), []]
    assert isinstance(world.changes["task"], Classification)


def test_a_callable_with_the_same_source_but_other_answers_has_another_key(tmp_path: Path) -> None:
    class Scaled:
        """Its one number lies where nothing but a call can see it, as another library's session keeps its weights."""

        def __init__(self, factor: float) -> None:
            self.factors = (factor for _ in itertools.count())

        def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"output": next(self.factors) * inputs["image"].reshape(len(inputs["image"]), -1)[:, :4]}

    def facts(factor: float) -> dict[str, Any]:
        given = arguments("classification", tmp_path / "run", teacher=Scaled(factor))
        del given["run_dir"]
        with connect("null") as live:
            return run_facts(make_context(**given, target=live, store=StageStore(tmp_path / "run")))

    first, again, other = facts(1.0), facts(1.0), facts(2.0)
    assert first == again
    assert stage_key("baseline", 1, {}, first) != stage_key("baseline", 1, {}, other)
    assert {name for name, value in first.items() if value != other[name]} == {"teacher"}


def test_every_kind_of_teacher_is_known_by_its_answers_too(tmp_path: Path) -> None:
    class Hiding(torch.nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factors = (factor for _ in itertools.count())

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.flatten(1)[:, :4] * next(self.factors)

    def key(factor: float) -> str:
        given = arguments("classification", tmp_path / "run", teacher=Hiding(factor))
        del given["run_dir"]
        with connect("null") as live:
            return stage_key("baseline", 1, {}, run_facts(make_context(**given, target=live, store=StageStore(tmp_path / "run"))))

    assert key(1.0) == key(1.0) != key(2.0)


def test_used_task_has_the_facts_of_a_new_one(tmp_path: Path) -> None:
    task = Classification()

    def facts() -> dict[str, Any]:
        given = arguments("classification", tmp_path / "run") | {"task": task}
        del given["run_dir"]
        with connect("null") as live:
            return run_facts(make_context(**given, target=live, store=StageStore(tmp_path / "run")))

    before = facts()
    task.check({"mask": np.zeros((2, 3, 5), dtype=np.float32)}, np.zeros((2, 5), dtype=np.int64))
    assert not task.binary
    assert facts() == before


def test_labels_that_went_bad_since_the_baseline_was_kept_are_refused(world: World) -> None:
    names = ("train", "validation", "test")
    world.changes = {name: getattr(make_data("classification"), name) for name in names}
    world.run()
    good = make_data("classification").validation
    seen = make_split(good, Classification(), name="validation", seed=0)
    for item in range(len(good)):
        labels = np.array(good.targets)
        labels[item] = 9
        changed = Arrays(good.inputs, labels)
        if make_split(changed, Classification(), name="validation", seed=0).fingerprint() == seen.fingerprint():
            break  # an item that the fingerprint does not see: the baseline is taken as it is
    world.changes["validation"] = changed
    with pytest.raises(DataError, match="the labels of the validation split are outside the classes"):
        world.run()
    journal = [json.loads(line) for line in (world.folder / "run" / "events.jsonl").read_text().splitlines()]
    assert (journal[-1]["stage"], journal[-1]["kind"]) == ("baseline", "reused")


def test_damaged_stage_of_a_run_is_named_with_the_remedy(world: World) -> None:
    from edgekd.errors import InputError

    path = next((world.folder / "run" / "stages").glob("quantize-*")) / "output.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="remove the folder") as caught:
        world.run()
    assert caught.value.subject == path
    shutil.rmtree(path.parent)
    assert world.run() == ["quantize"]  # the same output again, so that nothing after it changes
    assert json.loads((world.folder / "run" / "run.json").read_text())["verdict"]["outcome"]


@pytest.mark.slow
def test_changed_package_that_alters_the_student_redoes_from_the_search_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factory's own source is the same each time; what it gets from an installed package is not."""
    factory = "import outer_package\n\ndef make():\n    return outer_package.net()\n"
    package = (
        "import torch\n\ndef net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, {}), torch.nn.ReLU(), torch.nn.Linear({}, 4))\n"
    )
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "outer_factory.py").write_text(factory)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    done, hashes = [], set()
    for width in (8, 6, 6):
        (tmp_path / "site-packages" / "outer_package.py").write_text(package.format(width, width))
        monkeypatch.delitem(sys.modules, "outer_package", raising=False)
        monkeypatch.delitem(sys.modules, "outer_factory", raising=False)
        space = Fixed(importlib.import_module("outer_factory").make)
        hashes.add(space.source_hash())
        world.changes = {"student": space, "budget": Budget(latency_share=0.9, max_drop=0.99)}
        done.append(world.run())
    assert len(hashes) == 1
    assert done[0] == list(ALL)
    assert done[1][0] == "search"
    assert done[2] == []
