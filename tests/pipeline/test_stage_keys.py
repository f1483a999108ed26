"""Which stages a change redoes: those that use what changed, and those that rest on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edgekd.contracts import ConvertRequest
from edgekd.data import Arrays
from edgekd.options import Options
from edgekd.pipeline import compress
from edgekd.records import Budget, IOSpec, TensorSpec
from edgekd.registry import load
from edgekd.spaces import Fixed
from edgekd.stages import STAGES
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
