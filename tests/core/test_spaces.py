"""Student spaces: what is listed, what is built, what is refused."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekd.contracts import StudentSpace
from edgekd.errors import ConfigError, ModelError, Rejected
from edgekd.identity.provenance import built_hash
from edgekd.records import StudentSpec
from edgekd.spaces import Family, Fixed

pytest.importorskip("torch")
import torch

pytestmark = pytest.mark.torch

SCALE = 1


def make_net(width: int, depth: int = 1) -> torch.nn.Module:
    if width > 900:
        raise ValueError("too wide")
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(depth * SCALE)])


def helper(width: int) -> int:
    return width + 1


def uses_helper(width: int) -> torch.nn.Module:
    return torch.nn.Linear(helper(width), 2)


def gives_text(width: int) -> str:
    return "no module"


def make_default() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


class Net(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(x))


def test_family_lists_the_product_in_the_order_of_the_choices() -> None:
    space = Family(make_net, width=[16, 8], depth=[1, 2])
    assert [spec.kwargs for spec in space.candidates(0)] == [
        {"width": 16, "depth": 1},
        {"width": 16, "depth": 2},
        {"width": 8, "depth": 1},
        {"width": 8, "depth": 2},
    ]
    assert isinstance(space, StudentSpace)
    assert space.note(0) == ""


def test_family_leaves_out_what_where_excludes() -> None:
    space = Family(make_net, where=lambda width, depth: width * depth <= 16, width=[8, 16], depth=[1, 2])
    assert [spec.label() for spec in space.candidates(0)] == ["depth=1 width=8", "depth=2 width=8", "depth=1 width=16"]
    assert space.note(0) == ""


@pytest.mark.parametrize("widths", [range(1, 41), range(1, 3001)])
def test_family_samples_by_seed_and_says_so_when_it_is_large(widths: range) -> None:
    space = Family(make_net, max_candidates=50, width=widths, depth=list(range(1, 101)))
    first, again, other = space.candidates(1), space.candidates(1), space.candidates(2)
    assert first == again != other
    assert len(first) == 50
    assert len({spec.label() for spec in first}) == 50
    assert {"width": 1, "depth": 1} in [spec.kwargs for spec in first]
    assert {"width": widths[-1], "depth": 100} in [spec.kwargs for spec in first]
    assert "sampled with seed 1" in space.note(1)


def test_build_is_seeded_and_leaves_the_callers_random_state_alone() -> None:
    space = Family(make_net, width=[8])
    spec = space.candidates(0)[0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, three = space.build(spec, 1), space.build(spec, 1), space.build(spec, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(next(one.parameters()), next(two.parameters()))
    assert not torch.equal(next(one.parameters()), next(three.parameters()))
    assert one.training


def test_build_rejects_with_the_arguments_when_the_factory_raises() -> None:
    space = Family(make_net, width=[8, 999])
    with pytest.raises(Rejected, match=r"width=999.*too wide"):
        space.build(space.candidates(0)[1], 0)


def test_build_names_the_type_when_the_factory_gives_no_module() -> None:
    space = Family(gives_text, width=[8])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="str"):
        space.build(space.candidates(0)[0], 0)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "at least one choice"),
        ({"width": []}, "empty"),
        ({"width": 8}, "list of values"),
        ({"width": "wide"}, "list of values"),
        ({"width": [8, 8]}, "repeats"),
        ({"width": [None]}, "JSON"),
        ({"width": [(8, 16)]}, "JSON"),
        ({"width": [float("nan")]}, "JSON"),
        ({"width": [8], "depht": [1]}, r"depth \(did you mean this\?\)"),
        ({"depth": [1]}, "width"),
    ],
)
def test_family_refuses_choices_that_cannot_be_used(choices: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Family(make_net, **choices)  # type: ignore[arg-type]


def test_family_refuses_a_where_that_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match="where="):
        Family(make_net, where=lambda width: False, width=[8]).candidates(0)


def test_factory_is_named_when_it_can_be_imported_and_the_reason_given_when_not() -> None:
    def nested(width: int) -> torch.nn.Module:
        return torch.nn.Linear(width, 2)

    spec = Family(make_net, width=[8]).candidates(0)[0]
    assert spec.rebuildable == "yes"
    assert spec.factory == f"{__name__}:make_net"
    assert StudentSpec.from_json(spec.to_json()) == spec
    for factory, word in ((lambda width: Net(width), "lambda"), (nested, "inside a function"), (functools.partial(make_net, depth=2), "partial")):
        spec = Family(factory, width=[8]).candidates(0)[0]
        assert spec.factory == ""
        assert word in spec.rebuildable


def test_factory_of_the_main_script_is_not_rebuildable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_default, "__module__", "__main__")
    assert "__main__" in Fixed(make_default).candidates(0)[0].rebuildable


def test_hash_of_a_factory_changes_with_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "import torch\nSIZE = 4\nUNUSED = 1\n\n\ndef inner():\n    return torch.nn.Linear(SIZE, 2)\n\n\ndef outer():\n    return inner()\n"
    hashes = []
    for version, changed in enumerate((text, text.replace("UNUSED = 1", "UNUSED = 2"), text.replace("SIZE = 4", "SIZE = 5"), text.replace(", 2)", ", 3)"))):
        (tmp_path / f"hashed_factory_{version}.py").write_text(changed)
        module = __import__(f"hashed_factory_{version}")
        hashes.append(Fixed(module.outer).candidates(0)[0].factory_hash)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_hash_of_a_lambda_changes_with_its_closure() -> None:
    def family(size: int) -> Family:
        return Family(lambda width: torch.nn.Linear(width, size), width=[8])

    assert family(2).source_hash() == family(2).source_hash() != family(3).source_hash()


def test_source_hash_changes_with_choices_and_filter() -> None:
    hashes = {
        Family(make_net, width=[8]).source_hash(),
        Family(make_net, width=[8, 16]).source_hash(),
        Family(uses_helper, width=[8]).source_hash(),
        Family(make_net, where=lambda width: width > 4, width=[8]).source_hash(),
        Family(make_net, init=lambda student, teacher: None, width=[8]).source_hash(),
    }
    assert len(hashes) == 5


def test_fixed_module_is_copied_with_its_weights_and_hashed_by_them() -> None:
    net = Net(3)
    space = Fixed(net)
    (spec,) = space.candidates(0)
    built = space.build(spec, 0)
    assert isinstance(built, Net)
    assert built is not net
    assert torch.equal(built.layer.weight, net.layer.weight)
    before = space.source_hash()
    assert Fixed(net).source_hash() == before
    with torch.no_grad():
        net.layer.weight.add_(1.0)
    assert Fixed(net).source_hash() != before


def test_fixed_factory_is_built_from_the_seed() -> None:
    space = Fixed(make_default)
    (spec,) = space.candidates(0)
    assert spec.rebuildable == "yes"
    assert torch.equal(next(space.build(spec, 3).parameters()), next(space.build(spec, 3).parameters()))


def _save_onnx(path: Path, *, bias: float, outside: bool) -> None:
    """One addition of a constant vector, its values inside the file or in `net.data` beside it."""
    import onnx

    weight = onnx.helper.make_tensor("b", onnx.TensorProto.FLOAT, [512], [bias] * 512)
    node = onnx.helper.make_node("Add", ["x", "b"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 512]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "net", ports[:1], ports[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (path.parent / "net.data").unlink(missing_ok=True)
    onnx.save_model(model, str(path), save_as_external_data=outside, location="net.data", size_threshold=0)


@pytest.mark.parametrize("outside", [False, True])
def test_fixed_onnx_file_has_a_path_and_cannot_be_built(outside: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    _save_onnx(path, bias=1.0, outside=outside)
    space = Fixed(path)
    (spec,) = space.candidates(0)
    assert spec.kind == space.kind == "fixed-onnx"
    assert space.onnx == path
    with pytest.raises(ModelError, match="ONNX"):
        space.build(spec, 0)
    first = space.source_hash()
    _save_onnx(path, bias=2.0, outside=outside)  # with weights outside the graph's own bytes stay as they were
    assert space.source_hash() != first


def test_fixed_refuses_what_is_no_student(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        Fixed(tmp_path / "absent.onnx")
    (tmp_path / "net.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match="ONNX"):
        Fixed(tmp_path / "net.pt")
    with pytest.raises(ConfigError, match="Fixed"):
        Fixed(3)  # type: ignore[arg-type]


def built(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: int) -> tuple[str, str]:
    """`source_hash` and `built_hash` of a factory that calls an installed package."""
    package = folder / str(version) / "site-packages"
    package.mkdir(parents=True)
    (package / "ak_package.py").write_text("import torch\n" + text)
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.delitem(sys.modules, "ak_package", raising=False)
    space = Fixed(uses_package)
    return space.source_hash(), built_hash(space, 0)


def uses_package() -> torch.nn.Module:
    import ak_package  # type: ignore[import-not-found]

    made: torch.nn.Module = ak_package.make()
    return made


def test_built_hash_sees_a_changed_package_that_alters_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = (
        "def make():\n    return torch.nn.Linear(3, 2)\n",
        "def make():\n    # the same\n    return torch.nn.Linear(3, 2)\n",
        "def make():\n    return torch.nn.Linear(3, 4)\n",
        "def make():\n    made = torch.nn.Linear(3, 2)\n    torch.nn.init.zeros_(made.bias)\n    return made\n",
    )
    found = [built(tmp_path, monkeypatch, text, version) for version, text in enumerate(texts)]
    assert len({source for source, _ in found}) == 1
    assert found[0][1] == found[1][1]
    assert len({network for _, network in found}) == 3


def draws_unseeded(width: int) -> torch.nn.Module:
    made = torch.nn.Linear(width, 2)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(np.random.default_rng().standard_normal((2, width))))
    return made


def test_built_hash_leaves_out_weights_that_no_seed_determines_and_refused_members() -> None:
    space = Family(draws_unseeded, width=[3, 4])
    assert built_hash(space, 0) == built_hash(space, 0) != built_hash(Family(draws_unseeded, width=[3, 5]), 0)
    assert built_hash(Family(make_net, width=[8, 999]), 0) == built_hash(Family(make_net, width=[8, 998]), 0) != built_hash(Family(make_net, width=[8, 9]), 0)
