"""Distillation losses as functions on tensors, all computed in float32 whatever the inputs are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from edgekd.errors import ConfigError, ModelError, near_names

DEFAULT_TEMPERATURE = {"kd": 4.0, "lskd": 2.0, "mse": 1.0}
"""Temperatures of the reference codes for CIFAR-sized problems: KD of mdistiller, LSKD of logit-standardization-KD."""

DEFAULT_WEIGHTS = {"kd": (0.1, 0.9), "lskd": (0.1, 9.0), "mse": (1.0, 1.0), "auto": (1.0, 1.0), "none": (1.0, 0.0)}
"""Weights of (task loss, soft-target loss) per kind, from the same codes; for `mse`, and for several outputs that want different
losses (`auto`), the plain sum of both."""

FEATURE_WEIGHTS = {"hint": 100.0, "attention": 1000.0}
"""Weights of feature losses, from RepDistiller and mdistiller."""

LSKD_MIN_CLASSES = 5
_LSKD_EPS = 1e-7


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ModelError(
            f"student and teacher have different shapes of {what}",
            found=f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}",
            hint="give both the same outputs, or set loss='none' and use feature losses",
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0.0:
        raise ConfigError("a temperature must be positive", found=temperature, allowed="above 0, usually 1 to 8")


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    _same_shape(student, teacher, "logits")
    if student.ndim < 2 or student.shape[1] < 2:
        raise ModelError(
            "soft targets need logits of at least two classes",
            found=f"shape {tuple(student.shape)}",
            allowed="(items, classes, ...)",
            hint="use loss='mse' for single outputs",
        )


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """`T² KL(softmax(z_t/T) || softmax(z_s/T))`, summed over classes (axis 1) and averaged over everything else; a scalar.

    Source: Hinton et al., arXiv:1503.02531. Shapes `(items, classes, ...)`; `temperature` above 0, 4 by default.

    Raises:
        ModelError: the shapes differ, or there are fewer than two classes.
        ConfigError: the temperature is not positive.
    """
    _check_temperature(temperature)
    _check_logits(student_logits, teacher_logits)
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    per_item = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return per_item.mean() * temperature**2


def standardize_logits(logits: Tensor) -> Tensor:
    """`(z - mean(z)) / (std(z) + 1e-7)` over the classes (axis 1) of each item, std with n - 1; float32. Equal logits give zeros.

    Source: Sun et al., arXiv:2403.01427.
    """
    values = logits.float()
    spread = values.std(dim=1, keepdim=True, correction=1)
    return (values - values.mean(dim=1, keepdim=True)) / (spread + _LSKD_EPS)


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Hinton KD on logits standardized per item; a scalar.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", arXiv:2403.01427. `temperature` above 0, 2 by default.

    Raises:
        ConfigError: four classes or fewer (standardized logits then hold almost no information), or a temperature not above 0.
        ModelError: the shapes differ.
    """
    _check_logits(student_logits, teacher_logits)
    if student_logits.shape[1] < LSKD_MIN_CLASSES:
        raise ConfigError(
            "logit standardization needs more than four classes",
            found=f"{student_logits.shape[1]} classes",
            allowed=f"{LSKD_MIN_CLASSES} or more",
            hint="use loss='kd' or loss='auto'",
        )
    return kd_loss(standardize_logits(student_logits), standardize_logits(teacher_logits), temperature)


def mse_loss(student_values: Tensor, teacher_values: Tensor) -> Tensor:
    """Mean squared difference over all values; a scalar.

    Source for logits: Kim et al., arXiv:2105.08919; for regression: the plain L2 to the teacher.

    Raises:
        ModelError: the shapes differ.
    """
    _same_shape(student_values, teacher_values, "outputs")
    return F.mse_loss(student_values.float(), teacher_values.float())


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference between regressed student features and teacher features of the same shape; a scalar.

    Source: FitNets, Romero et al., arXiv:1412.6550 (the regressor and pooling are `features.FeatureLoss`'s). Default weight 100.

    Raises:
        ModelError: the shapes differ.
    """
    _same_shape(student_features, teacher_features, "features")
    return F.mse_loss(student_features.float(), teacher_features.float())


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """`mean over channels of |F|^p`, not yet normalised: `(items, H, W)` of maps `(items, C, H, W)`, `(items, T)` of tokens `(items, T, D)`.

    Raises:
        ModelError: the features are neither maps nor tokens.
    """
    if features.ndim not in (3, 4):
        raise ModelError(
            "attention transfer needs maps or tokens",
            found=f"shape {tuple(features.shape)}",
            allowed="(items, channels, height, width) or (items, tokens, width)",
            hint="tap a layer before pooling, or use kind='hint'",
        )
    axis = 1 if features.ndim == 4 else 2
    return features.float().abs().pow(power).mean(dim=axis)


def attention_loss(student_features: Tensor, teacher_features: Tensor, power: float = 2.0) -> Tensor:
    """Mean squared difference of L2-normalised attention maps, `a = vec(mean_C |F|^p) / ||.||`, p = 2; a scalar.

    The larger map is pooled (adaptive average) to the smaller, per axis; a map against tokens is compared flattened.
    Source: Zagoruyko and Komodakis, arXiv:1612.03928. Default weight 1000.

    Raises:
        ModelError: features without a spatial axis.
    """
    student, teacher = attention_map(student_features, power), attention_map(teacher_features, power)
    if student.ndim != teacher.ndim:
        student, teacher = student.flatten(1), teacher.flatten(1)
    if student.ndim == 3:
        size = (min(student.shape[1], teacher.shape[1]), min(student.shape[2], teacher.shape[2]))
        student, teacher = (_pool2d(value.unsqueeze(1), size).flatten(1) for value in (student, teacher))
    else:
        length = min(student.shape[1], teacher.shape[1])
        student, teacher = (_pool1d(value.unsqueeze(1), length).flatten(1) for value in (student, teacher))
    return F.mse_loss(F.normalize(student, dim=1), F.normalize(teacher, dim=1))


def _pool2d(value: Tensor, size: tuple[int, int]) -> Tensor:
    return value if tuple(value.shape[2:]) == size else F.adaptive_avg_pool2d(value, size)


def _pool1d(value: Tensor, length: int) -> Tensor:
    return value if value.shape[2] == length else F.adaptive_avg_pool1d(value, length)


def resolve_kind(kind: str, classes: int) -> str:
    """The loss behind `auto`: `lskd` above four classes, else `kd`; every other kind is itself.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind == "auto":
        return "lskd" if classes >= LSKD_MIN_CLASSES else "kd"
    if kind not in DEFAULT_TEMPERATURE:
        raise ConfigError("an unknown soft-target loss", found=kind, allowed=near_names(kind, ["auto", *DEFAULT_TEMPERATURE]), subject=kind)
    return kind


def soft_target_loss(kind: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 0.0) -> Tensor:
    """The soft-target loss `kd`, `lskd`, `mse` or `auto` (by the number of classes), a scalar in float32.

    A `temperature` of 0 takes the default of the kind: 4 for `kd`, 2 for `lskd`; `mse` has none.

    Raises:
        ConfigError: an unknown kind, a negative temperature, or `lskd` with four classes or fewer.
        ModelError: student and teacher have different shapes.
    """
    name = resolve_kind(kind, student_logits.shape[1] if student_logits.ndim > 1 else 1)
    if name == "mse":
        return mse_loss(student_logits, teacher_logits)
    chosen = DEFAULT_TEMPERATURE[name] if temperature == 0.0 else temperature
    return (lskd_loss if name == "lskd" else kd_loss)(student_logits, teacher_logits, chosen)
