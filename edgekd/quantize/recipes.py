"""Quantization schemes and the recipes built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgekd.contracts import CalibrationSet
from edgekd.errors import UnsupportedModel
from edgekd.records import CalibrationSpec, Capabilities, QuantRecipe


@dataclass(frozen=True)
class Scheme:
    """What a scheme's name means; weights are symmetric int8 per output channel in all of them. `format` is the file that has it.

    `by_network`: whether it is faster than the others depends on the network, not on the processor alone.
    """

    signed_activations: bool
    symmetric_activations: bool
    reduced_weights: bool
    why: str
    format: str = "onnx"
    by_network: bool = False


SCHEMES: Mapping[str, Scheme] = {
    "u8s8": Scheme(False, False, False, "x86 with VNNI"),
    "u8s8_reduced": Scheme(False, False, True, "x86 without VNNI, whose 8-bit products saturate in 16 bits: 7-bit weights"),
    "s8s8": Scheme(True, True, False, "ARM and accelerators with symmetric int8"),
    "s8s8_tensorrt": Scheme(True, True, False, "TensorRT: explicit pairs by its placement rules, biases in float"),
    "static_int8": Scheme(True, False, False, "LiteRT, integer kernels throughout: convolutions, depthwise ones above all", "tflite", True),
    "dynamic_int8": Scheme(True, True, False, "LiteRT, activations quantized at run time: transformers and recurrent nets", "tflite", True),
}
"""Every scheme by name."""


def candidate_schemes(capabilities: Capabilities) -> tuple[str, ...]:
    """The target's schemes that edgekd has for files of its first format, in the target's order of preference.

    Raises:
        UnsupportedModel: the target names none.
    """
    fitting = [name for name, scheme in SCHEMES.items() if scheme.format == capabilities.formats[0].value]
    known = tuple(scheme for scheme in capabilities.schemes if scheme in fitting)
    if not known:
        allowed = ", ".join(fitting) or f"(none for {capabilities.formats[0].value} files)"
        raise UnsupportedModel("the target has no int8 scheme", found=capabilities.schemes or "(none)", allowed=allowed, hint="deploy in float")
    return known


def make_recipe(
    scheme: str, method: str, calibration: CalibrationSet, float_ops: tuple[str, ...] = (), op_rules: Mapping[str, str] | None = None
) -> QuantRecipe:
    """The recipe for a scheme, a calibration method, the nodes that stay in float and rules for kinds of operators; `float_ops` are stored sorted."""
    size = len(next(iter(calibration.inputs.values())))
    spec = CalibrationSpec(method=method, size=size, split=calibration.split, data_hash=calibration.data_hash)
    return QuantRecipe(scheme=scheme, calibration=spec, float_ops=tuple(sorted(float_ops)), op_rules=dict(op_rules or {}))
