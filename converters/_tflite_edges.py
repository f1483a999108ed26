"""What the edges to TFLite share whose file is written by TensorFlow in a process of its own: the request read, the file named and stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, DataError, near_names
from edgekd.models.notes import carried_notes
from edgekd.models.tflite_artifact import store_tflite
from edgekd.models.tflite_file import op_counts, parse_model, precision_of, read_graph, require_schema, unique_tensor_names
from edgekd.records import IOSpec, Precision, TensorSpec

CHILD_OPTIONS = ("timeout_s", "memory_mb", "environments")
"""Options of every edge that runs in a process of its own."""

_KINDS = ("static_int8", "dynamic_int8")
_DEFAULT_LAYOUTS = {3: "NCW", 4: "NCHW", 5: "NCDHW"}


def check_options(request: ConvertRequest, converter: str, own: Sequence[str]) -> None:
    """Refuse options that the edge does not have.

    Raises:
        ConfigError: names the option.
    """
    allowed = (*own, *CHILD_OPTIONS)
    unknown = sorted(set(request.options) - set(allowed))
    if unknown:
        raise ConfigError(f"{converter} has no option {unknown[0]!r}", allowed=near_names(unknown[0], allowed), subject=unknown[0])


def environments_of(request: ConvertRequest) -> Path | None:
    """The folder of the environments in the option `environments`; nothing: the default one."""
    told = request.options.get("environments")
    return None if told is None else Path(str(told))


def kind_of(request: ConvertRequest, converter: str) -> tuple[str, Precision]:
    """What is asked for: `fp32`, `fp16` (option `precision`), or the recipe's `static_int8` or `dynamic_int8`.

    Raises:
        ConfigError: recipe and options contradict each other, or ask for what TensorFlow's converter does not do.
    """
    require_schema("storing a TFLite model")
    recipe, precision = request.recipe, request.options.get("precision")
    if recipe is None:
        if precision not in (None, "fp32", "fp16"):
            raise ConfigError("the option precision is unknown", found=precision, allowed="fp32, fp16, or a recipe for int8", subject=converter)
        return ("fp16", Precision.FP16) if precision == "fp16" else ("fp32", Precision.FP32)
    if precision is not None:
        raise ConfigError("a recipe says the precision by itself", found=f"precision={precision}", hint="leave the option precision out", subject=converter)
    if recipe.scheme not in _KINDS:
        raise ConfigError(f"{converter} has no quantization scheme {recipe.scheme!r}", allowed=near_names(recipe.scheme, _KINDS), subject=recipe.scheme)
    if recipe.float_ops or recipe.op_rules:
        raise ConfigError(
            f"{converter} cannot keep single operators in float",
            found=", ".join((*recipe.float_ops, *recipe.op_rules)),
            hint="quantize the float file with quantized-tflite-from-tflite",
            subject=converter,
        )
    if recipe.scheme == "static_int8":
        if request.calibration is None:
            raise ConfigError("static int8 needs calibration inputs", hint="pass calibration=...", subject=converter)
        if request.ranges is not None or recipe.calibration.method != "minmax":
            raise ConfigError(
                f"{converter} takes ranges by minmax from the calibration inputs only",
                found="given ranges" if request.ranges is not None else recipe.calibration.method,
                allowed="minmax",
                hint="quantize the float file with quantized-tflite-from-tflite",
                subject=converter,
            )
    return recipe.scheme, Precision.INT8


def one_sample(request: ConvertRequest, spec: TensorSpec, binding: Mapping[str, int]) -> Array:
    """The example of an input, as many samples as its batch is bound to.

    Raises:
        DataError: it is missing, too short, or of another shape.
    """
    sizes = spec.sizes(dict(binding))
    array = request.example.get(spec.name)
    if array is None:
        raise DataError(f"the example has no input {spec.name!r}", found=sorted(request.example), hint="give one batch for every input", subject=spec.name)
    return _fitting(np.asarray(array), spec, sizes, "example")[: sizes[0] if sizes else None]


def calibration_arrays(request: ConvertRequest, specs: Sequence[TensorSpec], binding: Mapping[str, int], converter: str) -> dict[str, Array]:
    """The calibration inputs by name, whole batches of them.

    Raises:
        ConversionRejected: an input is no float32. DataError: an input is missing, or of another shape.
    """
    if request.calibration is None:
        return {}
    found = {}
    for spec in specs:
        if spec.dtype != "float32":
            raise ConversionRejected(
                f"{converter} calibrates float32 inputs only",
                found=f"{spec.name}: {spec.dtype}",
                hint="quantize the float file with quantized-tflite-from-tflite",
                subject=spec.name,
            )
        if spec.name not in request.calibration.inputs:
            raise DataError(f"the calibration inputs lack {spec.name!r}", found=sorted(request.calibration.inputs), subject=spec.name)
        sizes = spec.sizes(dict(binding))
        array = _fitting(np.asarray(request.calibration.inputs[spec.name]), spec, sizes, "calibration input")
        found[spec.name] = array[: len(array) // sizes[0] * sizes[0]]
    return found


def _fitting(array: Array, spec: TensorSpec, sizes: tuple[int, ...], what: str) -> Array:
    if array.ndim != len(sizes) or array.shape[1:] != sizes[1:] or (sizes and array.shape[0] < sizes[0]):
        raise DataError(
            f"the {what} of {spec.name!r} does not fit its shape", found=array.shape, allowed=f"(at least {sizes[0]}, *{sizes[1:]})", subject=spec.name
        )
    return np.ascontiguousarray(array.astype(spec.dtype, copy=False))


def save_arrays(arrays: Mapping[str, Array], work: Path, stem: str) -> dict[str, str]:
    """Write arrays as files; name to path."""
    paths = {}
    for position, (name, array) in enumerate(arrays.items()):
        path = work / f"{stem}.{position}.npy"
        np.save(path, array, allow_pickle=False)
        paths[name] = str(path)
    return paths


def turned(spec: TensorSpec, order: Sequence[int]) -> TensorSpec:
    """The tensor with its axes in another order; the layout says so, `NHWC` for an image that was `NCHW`."""
    rank = len(spec.shape)
    if list(order) == list(range(rank)):
        return spec
    letters = spec.layout if len(spec.layout) == rank else _DEFAULT_LAYOUTS.get(rank, "")
    return TensorSpec(
        name=spec.name,
        dtype=spec.dtype,
        shape=tuple(spec.shape[axis] for axis in order),
        layout="".join(letters[axis] for axis in order) if letters else "",
        value_range=spec.value_range,
        normalization=spec.normalization,
    )


def finish(
    request: ConvertRequest,
    data: bytes,
    like: IOSpec,
    borders: Mapping[str, Mapping[str, int]],
    *,
    precision: Precision,
    converter: str,
    producers: Mapping[str, str],
    metadata: Mapping[str, str],
) -> StoredArtifact:
    """The artifact: inputs and outputs named and ordered as in `like`; `borders` maps those names to tensors of the file.

    Raises:
        ConversionRejected: the file holds operators that a TFLite runtime does not have, or is not in the precision asked for.
    """
    model = parse_model(data, source=f"what {converter} wrote")
    foreign = sorted(kind for kind in op_counts(model) if kind.startswith("CUSTOM"))
    if foreign:
        raise ConversionRejected(
            "the TFLite file needs operators that its runtimes do not have",
            found=", ".join(foreign),
            hint="replace the operator, or take another road",
            subject=foreign[0],
        )
    found = precision_of(read_graph(model))
    if found is not precision:
        raise ConversionRejected(
            f"nothing in the TFLite file became {precision.value}",
            found=f"a file in {found.value}",
            hint="TensorFlow leaves weights below 1024 values in float; deploy it in float, or quantize with quantized-tflite-from-tflite",
            subject=converter,
        )
    _name_borders(model, {kind: {tensor.name: borders[kind][tensor.name] for tensor in getattr(like, kind)} for kind in ("inputs", "outputs")})
    return store_tflite(
        model,
        request.folder,
        precision=precision,
        like=like,
        converter=converter,
        producers=producers,
        parent=request.source.record.content_hash(),
        recipe=request.recipe.digest() if request.recipe is not None else "",
        metadata={**metadata, **({"scheme": request.recipe.scheme} if request.recipe is not None else {})},
        notes=carried_notes(request),
    )


def _name_borders(model: Any, borders: Mapping[str, Mapping[str, int]]) -> None:
    """Give the file one signature with these names and this order, in place."""
    schema, _ = require_schema("storing a TFLite model")
    graph = model.subgraphs[0]
    for kind, named in borders.items():
        for name, index in named.items():
            graph.tensors[index].name = name.encode()
        setattr(graph, kind, np.array(list(named.values()), dtype=np.int32))
    unique_tensor_names(model)
    maps = {kind: [schema.TensorMapT(name=name.encode(), tensorIndex=index) for name, index in named.items()] for kind, named in borders.items()}
    model.signatureDefs = [schema.SignatureDefT(inputs=maps["inputs"], outputs=maps["outputs"], signatureKey=b"serving_default", subgraphIndex=0)]
