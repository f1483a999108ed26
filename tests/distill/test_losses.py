"""Losses against independent numpy references, and their degenerate cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from edgekd.distill.losses import (
    attention_loss,
    attention_map,
    hint_loss,
    kd_loss,
    lskd_loss,
    mse_loss,
    resolve_kind,
    soft_target_loss,
    standardize_logits,
)
from edgekd.errors import ConfigError, ModelError

pytestmark = pytest.mark.torch


def drawn(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape) * 3.0


def reference_kd(student: np.ndarray[Any, Any], teacher: np.ndarray[Any, Any], temperature: float) -> float:
    p = log_softmax(teacher / temperature, axis=1)
    q = log_softmax(student / temperature, axis=1)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean() * temperature**2)


def tensor(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(values)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (6, 2), (2, 5, 3, 4)])
def test_kd_loss_equals_the_numpy_reference(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = drawn(*shape), drawn(*shape, seed=1)
    assert float(kd_loss(tensor(student), tensor(teacher), temperature)) == pytest.approx(reference_kd(student, teacher, temperature), rel=1e-4)


def test_kd_loss_equals_a_value_computed_by_hand() -> None:
    # teacher (0.75, 0.25), student (0.5, 0.5): 0.75 ln 1.5 + 0.25 ln 0.5
    student = torch.zeros(1, 2)
    teacher = torch.log(torch.tensor([[0.75, 0.25]]))
    assert float(kd_loss(student, teacher, 1.0)) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)


def test_kd_loss_is_zero_when_student_equals_teacher_and_ignores_a_shift() -> None:
    teacher = tensor(drawn(4, 6)).float()
    assert float(kd_loss(teacher, teacher, 4.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(kd_loss(teacher + 5.0, teacher, 4.0)) == pytest.approx(0.0, abs=1e-5)


def test_kd_gradient_tends_to_the_logit_difference_at_high_temperature() -> None:
    # Hinton et al., section 2.1: dL/dz_s -> (z_s - z_t) / C per item for zero-mean logits (T² restored)
    student, teacher = drawn(1, 6), drawn(1, 6, seed=1)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    given = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    kd_loss(given, torch.tensor(teacher, dtype=torch.float32), 300.0).backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    np.testing.assert_allclose(given.grad.numpy(), (student - teacher) / 6, atol=0.03)


@pytest.mark.parametrize("shape", [(5, 7), (1, 5), (2, 6, 3)])
def test_lskd_loss_equals_the_numpy_reference(shape: tuple[int, ...]) -> None:
    def standard(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        out: np.ndarray[Any, Any] = (values - values.mean(axis=1, keepdims=True)) / (values.std(axis=1, ddof=1, keepdims=True) + 1e-7)
        return out

    student, teacher = drawn(*shape), drawn(*shape, seed=1)
    np.testing.assert_allclose(standardize_logits(tensor(student)).numpy(), standard(student), rtol=1e-4, atol=1e-5)
    expected = reference_kd(standard(student), standard(teacher), 2.0)
    assert float(lskd_loss(tensor(student), tensor(teacher))) == pytest.approx(expected, rel=1e-4)


def test_lskd_loss_ignores_scale_and_shift_of_a_students_logits() -> None:
    teacher = tensor(drawn(4, 6)).float()
    assert float(lskd_loss(teacher * 0.1 + 2.0, teacher)) == pytest.approx(0.0, abs=1e-5)


def test_lskd_loss_stays_finite_when_all_logits_are_equal() -> None:
    student = torch.full((3, 6), 2.0, requires_grad=True)
    loss = lskd_loss(student, tensor(drawn(3, 6)))
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_lskd_is_refused_for_few_classes_and_auto_takes_kd(classes: int) -> None:
    student, teacher = tensor(drawn(3, classes)), tensor(drawn(3, classes, seed=1))
    with pytest.raises(ConfigError, match="loss='kd'"):
        soft_target_loss("lskd", student, teacher, 0.0)
    assert torch.equal(soft_target_loss("auto", student, teacher, 0.0), kd_loss(student, teacher, 4.0))


def test_auto_takes_lskd_above_four_classes() -> None:
    student, teacher = tensor(drawn(3, 5)), tensor(drawn(3, 5, seed=1))
    assert resolve_kind("auto", 5) == "lskd"
    assert torch.equal(soft_target_loss("auto", student, teacher, 0.0), lskd_loss(student, teacher, 2.0))
    assert torch.equal(soft_target_loss("lskd", student, teacher, 3.0), lskd_loss(student, teacher, 3.0))


def test_unknown_kind_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match="lskd"):
        soft_target_loss("lksd", torch.zeros(2, 6), torch.zeros(2, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_float32_for_half_inputs(dtype: torch.dtype) -> None:
    student, teacher = tensor(drawn(4, 6)).to(dtype), tensor(drawn(4, 6, seed=1)).to(dtype)
    for loss in (kd_loss, lskd_loss, mse_loss, hint_loss):
        value = loss(student, teacher)
        assert value.dtype is torch.float32
        assert float(value) == pytest.approx(float(loss(student.float(), teacher.float())), rel=1e-6)
    # squares of 300 overflow float16
    large = torch.full((1, 2), 300.0, dtype=dtype)
    assert float(mse_loss(large, torch.zeros(1, 2))) == pytest.approx(90000.0, rel=0.01)


def test_hint_and_mse_equal_the_numpy_reference() -> None:
    student, teacher = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1)
    assert float(hint_loss(tensor(student), tensor(teacher))) == pytest.approx(((student - teacher) ** 2).mean(), rel=1e-5)
    assert float(mse_loss(tensor(student), tensor(teacher))) == pytest.approx(((student - teacher) ** 2).mean(), rel=1e-5)


def test_attention_loss_equals_the_numpy_reference_with_the_larger_map_pooled() -> None:
    student, teacher = drawn(2, 3, 4, 4), drawn(2, 5, 8, 8, seed=1)

    def normal(maps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        flat = maps.reshape(len(maps), -1)
        out: np.ndarray[Any, Any] = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        return out

    mine = (np.abs(student) ** 2).mean(axis=1)
    other = (np.abs(teacher) ** 2).mean(axis=1).reshape(2, 4, 2, 4, 2).mean(axis=(2, 4))
    expected = ((normal(mine) - normal(other)) ** 2).mean()
    assert float(attention_loss(tensor(student), tensor(teacher))) == pytest.approx(expected, rel=1e-4)


def test_attention_loss_compares_a_map_with_tokens() -> None:
    maps = tensor(drawn(2, 3, 4, 4)).float()
    tokens = maps.flatten(2).transpose(1, 2)
    assert attention_map(tokens).shape == (2, 16)
    assert float(attention_loss(maps, tokens)) == pytest.approx(0.0, abs=1e-9)


def test_attention_loss_stays_finite_when_features_are_zero() -> None:
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_loss(student, tensor(drawn(2, 3, 4, 4)))
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ModelError, match=r"\(2, 3\)"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ModelError, match="mse"):
        kd_loss(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ModelError, match="maps or tokens"):
        attention_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="temperature"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


@pytest.mark.parametrize("kind", ["kd", "lskd", "mse"])
def test_gradients_equal_finite_differences(kind: str) -> None:
    student, teacher = drawn(2, 5), drawn(2, 5, seed=1)
    given = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    soft_target_loss(kind, given, tensor(teacher), 0.0).backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    step = 1e-2
    for row, column in [(0, 0), (1, 3)]:
        shifted = [student.copy(), student.copy()]
        shifted[0][row, column] += step
        shifted[1][row, column] -= step
        up, down = (float(soft_target_loss(kind, tensor(values), tensor(teacher), 0.0)) for values in shifted)
        assert float(given.grad[row, column]) == pytest.approx((up - down) / (2 * step), rel=0.02, abs=2e-3)
