"""A student comes back from its description and its weights, or says exactly why not."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekd.errors import InputError, ModelError
from edgekd.records import Cut, StudentSpec
from edgekd.spaces import Family, Fixed

pytest.importorskip("torch")
pytest.importorskip("safetensors")
import torch

from edgekd.rebuild import complete_spec, load_weights, rebuild, save_weights

pytestmark = pytest.mark.torch
EXAMPLE = {"x": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)}


def make_net(width: int, gain: float = 1.0) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width), torch.nn.Tanh(), Scale(gain), torch.nn.Linear(width, 3))


class Scale(torch.nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


class Tied(torch.nn.Module):
    """Two layers that share one weight, two inputs (one of integers), a dictionary of outputs."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 6)
        self.head = torch.nn.Linear(6, 10, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = x + self.embedding(tokens).mean(1)
        return {"logits": self.head(hidden), "hidden": hidden}


def untied(tie: bool = False) -> torch.nn.Module:
    return Tied(tie)


def trained(width: int = 4, seed: int = 0) -> tuple[StudentSpec, torch.nn.Sequential]:
    space = Family(make_net, width=[width])
    (spec,) = space.candidates(0)
    module = space.build(spec, seed)
    assert isinstance(module, torch.nn.Sequential)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
        module(torch.randn(16, 6, generator=torch.Generator().manual_seed(1)))
    return complete_spec(spec, module, EXAMPLE, seed=3), module


def test_student_is_rebuilt_with_equal_outputs_after_a_round_trip_through_files(tmp_path: Path) -> None:
    spec, module = trained()
    spec.save(tmp_path / "student.json")
    save_weights(module, tmp_path / "student.safetensors")
    back = rebuild(StudentSpec.load(tmp_path / "student.json"), tmp_path / "student.safetensors", factory=make_net)
    assert not back.training
    assert module.training
    module.eval()
    x = torch.from_numpy(EXAMPLE["x"])
    assert torch.equal(back(x), module(x))
    assert spec.state["1.num_batches_tracked"] == ((), "int64")


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    from safetensors import safe_open

    space = Fixed(Tied)
    (spec,) = space.candidates(0)
    module = space.build(spec, 0)
    example: dict[str, np.ndarray] = {"x": EXAMPLE["x"], "tokens": np.array([[0, 9], [1, 2], [3, 4], [5, 6]], dtype=np.int64)}
    spec = complete_spec(spec, module, example, seed=1)
    assert spec.probe is not None
    assert set(spec.probe.outputs) == {"logits", "hidden"}
    path = tmp_path / "tied.safetensors"
    save_weights(module, path)
    with safe_open(str(path), framework="np") as handle:
        assert list(handle.keys()) == ["embedding.weight"]
    back = rebuild(StudentSpec.from_json(spec.to_json()), path, factory=Tied)
    assert isinstance(back, Tied)
    assert back.head.weight is back.embedding.weight
    with pytest.raises(ModelError, match="share"):
        load_weights(untied(), path)
    save_weights(untied(), path)
    with pytest.raises(ModelError, match="tied"):
        load_weights(Tied(), path)


def test_rebuild_names_the_tensor_when_the_weights_do_not_fit(tmp_path: Path) -> None:
    spec, _ = trained(4)
    path = tmp_path / "other.safetensors"
    save_weights(make_net(5), path)
    with pytest.raises(ModelError, match=r"0\.weight"):
        rebuild(spec, path, factory=make_net)
    save_weights(torch.nn.Sequential(torch.nn.Linear(6, 4)), path)
    with pytest.raises(ModelError, match="missing"):
        rebuild(spec, path, factory=make_net)
    save_weights(make_net(4).double(), path)
    with pytest.raises(ModelError, match="float64"):
        rebuild(spec, path, factory=make_net)


def test_rebuild_refuses_weights_of_another_training_by_the_probe(tmp_path: Path) -> None:
    spec, _ = trained(seed=0)
    _, other = trained(seed=1)
    save_weights(other, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="probe"):
        rebuild(spec, tmp_path / "w.safetensors", factory=make_net)


def test_rebuild_refuses_a_cut_off_or_missing_file(tmp_path: Path) -> None:
    spec, module = trained()
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        rebuild(spec, path, factory=make_net)
    save_weights(module, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="safetensors"):
        rebuild(spec, path, factory=make_net)


def test_changed_factory_is_refused_unless_allowed_and_then_the_probe_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "import torch\n\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Tanh())\n"
    (tmp_path / "changing_factory.py").write_text(text)
    space = Fixed(__import__("changing_factory").make)
    (spec,) = space.candidates(0)
    module = space.build(spec, 0)
    spec = complete_spec(spec, module, EXAMPLE, seed=0)
    save_weights(module, tmp_path / "w.safetensors")
    for changed, message in (
        (text.replace("def make():", "def make():\n    # same network"), None),
        (text.replace("Tanh", "Sigmoid"), "computes something else"),
    ):
        (tmp_path / "changing_factory.py").write_text(changed)
        monkeypatch.delitem(sys.modules, "changing_factory")
        __import__("linecache").checkcache()
        make = __import__("changing_factory").make
        with pytest.raises(InputError, match="allow_changed"):
            rebuild(spec, tmp_path / "w.safetensors", factory=make)
        if message is None:
            rebuild(spec, tmp_path / "w.safetensors", factory=make, allow_changed=True)
        else:
            with pytest.raises(ModelError, match=message):
                rebuild(spec, tmp_path / "w.safetensors", factory=make, allow_changed=True)


def test_rebuild_imports_nothing_that_a_description_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "named_by_a_spec.py").write_text("print('imported')\n\n\ndef make():\n    raise AssertionError\n")
    spec, module = trained()
    save_weights(module, tmp_path / "w.safetensors")
    named = msgspec.structs.replace(spec, factory="named_by_a_spec:make")
    for allow in (False, True):
        with pytest.raises(InputError, match="factory=") as caught:
            rebuild(named, tmp_path / "w.safetensors", allow_changed=allow)
        assert caught.value.found == "named_by_a_spec:make"
    assert "named_by_a_spec" not in sys.modules
    assert capsys.readouterr().out == ""
    assert rebuild(named, tmp_path / "w.safetensors", factory=make_net).training is False


def test_student_of_a_factory_without_a_name_is_rebuilt_with_the_factory_in_hand(tmp_path: Path) -> None:
    space = Fixed(lambda: make_net(4))
    (spec,) = space.candidates(0)
    module = space.build(spec, 0)
    spec = complete_spec(spec, module, EXAMPLE, seed=0)
    save_weights(module, tmp_path / "w.safetensors")
    assert space._factory is not None
    assert not rebuild(spec, tmp_path / "w.safetensors", factory=space._factory).training
    with pytest.raises(InputError, match="not the one that was recorded"):
        rebuild(spec, tmp_path / "w.safetensors", factory=lambda: make_net(5))


def test_rebuild_says_why_when_there_is_no_factory_and_takes_a_module_instead(tmp_path: Path) -> None:
    module = make_net(4)
    space = Fixed(module)
    (spec,) = space.candidates(0)
    student = space.build(spec, 0)
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    spec = complete_spec(spec, student, EXAMPLE, seed=0)
    save_weights(student, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="teacher_module="):
        rebuild(spec, tmp_path / "w.safetensors")
    back = rebuild(spec, tmp_path / "w.safetensors", teacher_module=module)
    assert torch.equal(next(back.parameters()), next(student.parameters()))
    assert not torch.equal(next(back.parameters()), next(module.parameters()))


def test_rebuild_refuses_a_pruned_student_and_names_its_space(tmp_path: Path) -> None:
    spec, module = trained()
    save_weights(module, tmp_path / "w.safetensors")
    pruned = msgspec.structs.replace(spec, kind="pruned", keep=(Cut(module="0", dim=0, indices=(0, 2)),))
    with pytest.raises(InputError, match="'pruned'"):
        rebuild(pruned, tmp_path / "w.safetensors")


def test_complete_spec_refuses_outputs_that_are_not_finite() -> None:
    spec, module = trained()
    with torch.no_grad():
        next(module[4].parameters())[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        complete_spec(spec, module, EXAMPLE, seed=0)


def test_large_outputs_are_probed_at_256_places() -> None:
    module = torch.nn.Linear(6, 1000)
    spec = complete_spec(StudentSpec(kind="fixed"), module, EXAMPLE, seed=0)
    assert spec.probe is not None
    assert len(spec.probe.outputs["output"]) == 256
