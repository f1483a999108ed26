"""Feature taps and projectors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from edgekd.data import Arrays
from edgekd.distill.features import FeatureLoss, FeatureTaps, Projector
from edgekd.errors import ConfigError, ModelError
from edgekd.options import FeaturePair
from edgekd.rebuild import load_weights
from edgekd.teachers import as_teacher
from tests.distill.distill_cases import QUICK, Cnn, blobs, quick, seeded, split

pytestmark = pytest.mark.torch


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) for child in module.modules())


def test_taps_hold_the_named_outputs_and_their_hooks_are_removed() -> None:
    net = seeded(Cnn, 4)
    with FeatureTaps(net, ["stem", "body"], owner="student") as taps:
        net(torch.zeros(2, 1, 6, 6))
        assert hooks(net) == 2
    assert {name: tuple(value.shape) for name, value in taps.taken().items()} == {"stem": (2, 4, 6, 6), "body": (2, 4, 3, 3)}
    assert hooks(net) == 0


def test_taps_are_removed_when_the_forward_pass_fails() -> None:
    net = seeded(Cnn, 4)
    with pytest.raises(RuntimeError), FeatureTaps(net, ["stem"], owner="student"):
        net(torch.zeros(2, 3, 6, 6))
    assert hooks(net) == 0


def test_unknown_module_names_the_near_one() -> None:
    with pytest.raises(ModelError, match=r"body \(did you mean this\?\)"):
        FeatureTaps(seeded(Cnn, 4), ["bdy"], owner="student")


def test_module_that_does_not_run_is_named() -> None:
    net = seeded(Cnn, 4)
    net.spare = nn.Linear(2, 2)
    with FeatureTaps(net, ["spare"], owner="student") as taps:
        net(torch.zeros(2, 1, 6, 6))
    with pytest.raises(ModelError, match="spare"):
        taps.taken()


def test_first_tensor_of_a_recurrent_layers_tuple_is_taken() -> None:
    layer = nn.Sequential(nn.LSTM(3, 5, batch_first=True))
    with FeatureTaps(layer, ["0"], owner="student") as taps:
        layer(torch.zeros(2, 4, 3))
    assert taps.taken()["0"].shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("student", "teacher", "common", "projects"),
    [
        ((2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8), False),
        ((2, 4, 8, 8), (2, 6, 4, 4), (2, 6, 4, 4), True),
        ((2, 4, 4, 6), (2, 6, 8, 3), (2, 6, 4, 3), True),
        ((2, 5), (2, 7), (2, 7), True),
        ((2, 9, 5), (2, 9, 7), (2, 9, 7), True),
        ((2, 4, 9), (2, 6, 9), (2, 6, 9), True),
        ((2, 4, 4, 4), (2, 16, 8), (2, 16, 8), True),
        ((2, 4, 4, 4), (2, 9, 8), (2, 9, 8), True),
        ((2, 4, 4, 4), (2, 8), (2, 8), True),
        ((2, 5, 4), (2, 3, 4, 4), (2, 5, 3), True),
    ],
)
def test_projector_brings_features_to_one_shape(student: tuple[int, ...], teacher: tuple[int, ...], common: tuple[int, ...], projects: bool) -> None:
    projector = Projector(torch.Size(student), torch.Size(teacher), pair="a -> b")
    mine, other = projector(torch.randn(*student).bfloat16(), torch.randn(*teacher))
    assert tuple(mine.shape) == tuple(other.shape) == common
    assert mine.dtype is torch.float32
    assert bool(list(projector.parameters())) is projects


def test_features_without_a_batch_layout_are_refused() -> None:
    with pytest.raises(ModelError, match=r"a -> b"):
        Projector(torch.Size((2,)), torch.Size((2, 3)), pair="a -> b")


def test_feature_loss_takes_the_weights_of_the_options_or_the_defaults() -> None:
    pairs = (
        FeaturePair(student="s", teacher="t"),
        FeaturePair(student="s", teacher="t", kind="attention"),
        FeaturePair(student="s", teacher="t", kind="attention", weight=7.0),
    )
    maps = {"s": torch.randn(2, 3, 4, 4)}, {"t": torch.randn(2, 5, 4, 4)}
    loss = FeatureLoss(pairs, *maps)
    assert loss.weights == (100.0, 1000.0, 7.0)
    assert set(loss(*maps)) == {"hint:s->t", "attention:s->t"}
    assert sum(value.numel() for value in loss.parameters()) == 3 * 5 + 5


def images(items: int, seed: int) -> Arrays:
    values, labels = blobs(items, seed, inputs=36)
    return Arrays(values.reshape(-1, 1, 6, 6), labels)


@pytest.mark.parametrize("cached", [False, True])
def test_feature_training_lowers_the_hint_and_leaves_the_student_without_projectors(tmp_path: Path, cached: bool) -> None:
    options = msgspec.structs.replace(
        QUICK,
        loss="none",
        cache_features=cached,
        epochs=5,
        features=(FeaturePair(student="body", teacher="body", weight=1.0), FeaturePair(student="stem", teacher="stem", kind="attention", weight=1.0)),
    )
    result = quick(
        seeded(Cnn, 4),
        tmp_path / "run",
        teacher=as_teacher(seeded(Cnn, 8, seed=3).eval()),
        options=options,
        splits=(split(images(64, 1), "train"), split(images(48, 2), "validation")),
    )
    rows = result.record.epochs
    assert rows[-1].parts["hint:body->body"] < 0.8 * rows[0].parts["hint:body->body"]
    assert result.record.teacher_outputs == ("cached" if cached else "online")
    assert any("MB" in note for note in result.record.notes) is cached
    fresh = seeded(Cnn, 4, seed=9)
    load_weights(fresh, result.weights)
    assert hooks(result.module) == 0


def test_feature_training_gives_the_same_student_with_cached_features(tmp_path: Path) -> None:
    students = []
    for cached in (False, True):
        options = msgspec.structs.replace(QUICK, cache_features=cached, epochs=2, features=(FeaturePair(student="body", teacher="body", weight=1.0),))
        result = quick(
            seeded(Cnn, 4),
            tmp_path / str(cached),
            teacher=as_teacher(seeded(Cnn, 8, seed=3).eval()),
            options=options,
            splits=(split(images(64, 1), "train"), split(images(48, 2), "validation")),
        )
        students.append(result.module.state_dict())
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=1e-3, atol=1e-4)


def test_features_are_refused_for_a_teacher_without_a_module(tmp_path: Path) -> None:
    options = msgspec.structs.replace(QUICK, features=(FeaturePair(student="first", teacher="first"),))
    net = seeded(Cnn, 4)
    teacher = as_teacher(lambda inputs: inputs["input"][:, 0, 0, :6])
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        quick(net, tmp_path / "a", teacher=teacher, options=options)
    with pytest.raises(ConfigError, match="need a teacher"):
        quick(net, tmp_path / "b", teacher=None, options=options, splits=(split(images(64, 1), "train"), split(images(48, 2), "validation")))
