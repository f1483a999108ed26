"""What to use instead of an operator that a converter or a runtime is known to refuse; every row is proven by a conversion in the tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Replacement(NamedTuple):
    """One piece of advice: for what (`operators` by name without overload, `kinds` of modules by the start of their name with all `settings`; both
    where both are given), in which formats it is needed, and what to write instead. A type of `TYPES` stands among the operators."""

    name: str
    formats: tuple[str, ...]
    advice: str
    operators: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


_ONNX, _TFLITE, _BOTH = ("onnx",), ("tflite",), ("onnx", "tflite")

TYPES = ("bfloat16",)
"""Types of numbers that a row may be for, whatever the operators that compute in them."""

REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(
        "packed sequences",
        _BOTH,
        "without pack_padded_sequence, in one direction: y, _ = lstm(padded), then y * (torch.arange(steps) < lengths[:, None]).unsqueeze(-1); "
        "for the last state (y * (torch.arange(steps) == lengths[:, None] - 1).unsqueeze(-1)).sum(1)",
        operators=("aten._local_scalar_dense",),
        kinds=("torch.nn.LSTM", "torch.nn.GRU", "torch.nn.RNN"),
    ),
    Replacement(
        "bfloat16",
        _BOTH,
        "net.float(), and no torch.autocast or .bfloat16() inside forward: train under autocast outside of it",
        operators=("bfloat16",),
    ),
    Replacement(
        "control flow on values",
        _BOTH,
        "compute both branches and choose by torch.where(condition, a, b); give a loop a fixed number of steps",
        operators=("aten._local_scalar_dense",),
    ),
    Replacement(
        "mask written in place",
        _BOTH,
        "do not assign to scores[:, mask]: scores = scores.masked_fill(mask, -1e4)",
        operators=("aten.index_put",),
    ),
    Replacement(
        "projected LSTM",
        _ONNX,
        "nn.LSTM(inputs, hidden) without proj_size, then nn.Linear(hidden, proj_size) on its outputs",
        kinds=("torch.nn.LSTM",),
        settings=("proj_size",),
    ),
    Replacement(
        "adaptive max pooling",
        _BOTH,
        "nn.MaxPool2d(kernel) whose kernel divides the size; x.amax((2, 3)) for one value per channel",
        operators=("aten.adaptive_max_pool2d",),
    ),
    Replacement("median", _ONNX, "x.sort(dim).values, then select the middle one", operators=("aten.median", "aten.kthvalue")),
    Replacement("cumulative product", _BOTH, "for positive values x.log().cumsum(dim).exp()", operators=("aten.cumprod", "prims.prod")),
    Replacement(
        "randomized ReLU",
        _BOTH,
        "nn.LeakyReLU((lower + upper) / 2), which is what nn.RReLU computes after training",
        operators=("aten.rrelu_with_noise", "aten.rrelu_with_noise_functional"),
    ),
    Replacement("pairwise distances", _ONNX, "(a[:, :, None] - b[:, None]).square().sum(-1).sqrt() instead of torch.cdist", operators=("aten._cdist_forward",)),
    Replacement(
        "transposed convolution",
        _TFLITE,
        "nn.ConvTranspose2d(inputs, outputs, 2, stride=2) without padding, or F.interpolate(x, scale_factor=2) and a convolution",
        kinds=("torch.nn.ConvTranspose2d",),
    ),
    Replacement(
        "Fourier transform",
        _TFLITE,
        "for the real part of torch.fft.fft over n values: x @ torch.cos(2 * torch.pi * i * k / n), as a fixed matrix; the imaginary part with -sin",
        operators=("aten._fft_c2c", "aten._fft_r2c"),
    ),
    Replacement(
        "as many values as there are",
        _TFLITE,
        "keep the shape and use the mask as a factor: (x * mask).sum() instead of x[mask].sum()",
        operators=("aten.nonzero", "aten.index", "aten.masked_select", "aten._unique2"),
    ),
    Replacement(
        "resize with antialiasing",
        _TFLITE,
        'F.interpolate(..., mode="bilinear") without antialias=True, behind F.avg_pool2d where the image shrinks',
        operators=("aten._upsample_bilinear2d_aa",),
    ),
    Replacement(
        "sort",
        _TFLITE,
        "x.gather(dim, x.topk(x.shape[dim], dim, largest=False).indices) for rising values; the indices alone instead of argsort",
        operators=("aten.sort", "aten.argsort"),
    ),
    Replacement(
        "largest values",
        _TFLITE,
        "x.gather(dim, x.topk(k, dim).indices) instead of x.topk(k, dim).values; x.amax(dim) for one",
        operators=("aten.topk",),
    ),
    Replacement("stable sort", _ONNX, "x.sort(dim) without stable=True", operators=("aten.sort",)),
    Replacement("embedding bag", _TFLITE, "nn.Embedding(...)(x).mean(1), or .sum(1)", operators=("aten._embedding_bag",)),
)
"""In order: the first row that fits is taken."""


def replacement_for(operators: Iterable[str], kind: str, format: str) -> str:
    """The advice for a part of the kind `kind` with these operators, or an empty text.

    Operators are given in any spelling: `aten.sort`, `aten::sort`, `aten.sort.default`.
    """
    names = {_plain(operator) for operator in operators if operator}
    name, _, told = kind.partition("(")
    settings = {setting.partition("=")[0].strip() for setting in told.rstrip(")").split(",")}
    for row in REPLACEMENTS:
        if format not in row.formats:
            continue
        kind_fits = name in row.kinds and set(row.settings) <= settings
        operator_fits = bool(names & {_plain(operator) for operator in row.operators})
        if (kind_fits or not row.kinds) and (operator_fits or not row.operators):
            return row.advice
    return ""


def _plain(operator: str) -> str:
    """The operator's own name: `sort` of `aten::sort`, `torch.ops.aten._sort` and `aten.sort_.default`."""
    parts = operator.replace("::", ".").split(".")
    return (parts[parts.index("aten") + 1] if "aten" in parts[:-1] else parts[0]).strip("_")
