"""From a float TFLite file to one in int8 or with fp16 weights, by ai-edge-quantizer with ranges that edgekd observed."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, DataError, MissingDependency, ModelError, near_names
from edgekd.models.notes import carried_notes, free_notes
from edgekd.models.tflite_artifact import COMPUTING, fit_layouts, quantizable, read_notes, store_tflite
from edgekd.models.tflite_file import TfliteGraph, ensure_signature, load_model, pack_model, parse_model, read_graph, require_schema, unique_tensor_names
from edgekd.quantize.calibrate import observe
from edgekd.records import Format, IOSpec, Precision, QuantRecipe

from ._litert import blame, host_infer, quiet
from ._onnx_io import versions
from ._tflite_outputs import separate_outputs

Ranges = Mapping[str, tuple[float, float]]

SCHEMES = ("static_int8", "dynamic_int8", "fp16")
"""int8 throughout; int8 weights with activations quantized at run time; fp16 weights with float arithmetic."""

_FLOAT = "float"
_ANY, _BORDERS, _NONE, _CASTING, _UNIFORM = "*", ("INPUT", "OUTPUT"), "no_quantize", "float_casting", "min_max_uniform_quantize"
_MOVING = frozenset({"MAX_POOL_2D", "PAD", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "SLICE", "STRIDED_SLICE", "TRANSPOSE"})
_ONE_BIT = 2.0
_BORDER_OPS = {"QUANTIZE", "DEQUANTIZE"}
_LIBRARY_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError, ArithmeticError)


class QuantizedTfliteFromTflite:
    """Quantizes a float32 file; inputs and outputs stay float32, names and layouts stay.

    Scheme `static_int8`: asymmetric int8 activations per tensor, symmetric int8 weights per output channel (per tensor if
    `recipe.per_channel` is false); the request carries `ranges` (low, high per tensor of the file) or a calibration set. Without `infer`
    and with method `minmax` the quantizer's own calibration runs on one sample at a time and the results are merged by minimum and
    maximum (its default, a moving average, forgets outliers); else the ranges are observed with `infer`, or on the host.
    Scheme `dynamic_int8`: int8 weights, activations quantized at run time. Scheme `fp16`: weights only. These two need no ranges and
    may be asked for by the option `scheme` instead of a recipe.
    `recipe.float_ops` names operators by their first output tensor; `recipe.op_rules` maps kinds (`SOFTMAX`) to a scheme or `float`.
    """

    name = "quantized-tflite-from-tflite"
    source = "tflite"
    target = "tflite"
    precisions: tuple[Precision, ...] = (Precision.INT8, Precision.FP16)
    needs: Mapping[str, str] = {"ai_edge_litert": "litert", "ai_edge_quantizer": "android"}
    cost_s = 3.0
    precision_options: Mapping[str, Mapping[str, str]] = {"fp16": {"scheme": "fp16"}}

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The quantized file `model.tflite` in `request.folder`; the same request gives the same bytes.

        Raises:
            ConversionRejected: nothing in the model can be quantized, or the quantizer refuses it.
            ConfigError: no recipe, no ranges, an unknown scheme, or an unknown name in `float_ops` or `op_rules`.
            DataError: a range or an activation is not finite, or calibration does not fit the model's inputs.
            ModelError: the source is no TFLite artifact. MissingDependency: ai-edge-quantizer is not installed.
        """
        source = request.source
        if not isinstance(source, StoredArtifact) or source.record.format is not Format.TFLITE:
            raise ModelError("the quantizer takes a TFLite artifact", found=type(source).__name__, subject=self.name)
        if source.record.precision is not Precision.FP32:
            raise ConversionRejected("only a float32 model can be quantized", found=source.record.precision.value, allowed="fp32", subject=self.name)
        scheme = _scheme(request)
        quantizer = _library()
        model = load_model(source.entry)
        changed = ensure_signature(model) + unique_tensor_names(model)
        graph = read_graph(model)
        rules = _rules(graph, scheme, request.recipe)
        data = pack_model(model)
        uses = {scheme, *(request.recipe.op_rules.values() if request.recipe else ())}
        ranges, how = _ranges(request, quantizer, data, graph, rules, renamed=bool(changed)) if "static_int8" in uses else (None, "none")
        if ranges is not None:
            separated = separate_outputs(model)
            ranges = {**ranges, **{name: ranges[repeated] for name, repeated in separated.items() if repeated in ranges}}
            if separated:
                graph, data = read_graph(model), pack_model(model)
        made = parse_model(_quantized(quantizer, data, rules, None if ranges is None else _as_results(graph, ranges)))
        _restore_signature(model, made)
        counts = _check(graph, read_graph(made), scheme)
        return store_tflite(
            made,
            request.folder,
            precision=Precision.FP16 if uses == {"fp16"} else Precision.INT8,
            like=source.record.iospec,
            converter=self.name,
            producers={**source.record.producers, **versions("ai-edge-quantizer", "ai-edge-litert")},
            parent=source.record.content_hash(),
            recipe=request.recipe.digest() if request.recipe else "",
            metadata={"scheme": scheme, "ranges": how, **counts},
            notes={**free_notes(read_notes(model)), **carried_notes(request)},
        )


def _scheme(request: ConvertRequest) -> str:
    unknown = sorted(set(request.options) - {"scheme"})
    if unknown:
        raise ConfigError(f"quantized-tflite-from-tflite has no option {unknown[0]!r}", allowed="scheme")
    asked = request.options.get("scheme")
    if request.recipe is not None:
        if asked not in (None, request.recipe.scheme):
            raise ConfigError("the option scheme contradicts the recipe", found=asked, allowed=request.recipe.scheme)
        asked = request.recipe.scheme
    elif asked is None or asked == "static_int8":
        raise ConfigError("quantizing needs a recipe", hint="pass recipe=QuantRecipe(...), or the option scheme=dynamic_int8 or fp16", subject="recipe")
    if asked not in SCHEMES:
        raise ConfigError(f"there is no quantization scheme {asked!r} for TFLite", allowed=near_names(str(asked), SCHEMES), subject=asked)
    return str(asked)


def _library() -> Any:
    """The module of the quantizer."""
    require_schema("quantizing a TFLite model")
    with quiet():
        try:
            from ai_edge_quantizer import quantizer
        except ImportError as error:
            raise MissingDependency(error.name or "ai-edge-quantizer", "android", purpose="quantizing a TFLite model") from error
    return quantizer


def _rules(graph: TfliteGraph, scheme: str, recipe: QuantRecipe | None) -> list[dict[str, Any]]:
    """The library's recipe; later rules win. It knows an operator by the names of its output tensors, each followed by a semicolon."""
    per_channel = recipe.per_channel if recipe else True
    rules = [_rule(".*", _ANY, scheme, per_channel)]
    kinds = {op.kind for op in graph.ops}
    for kind, wish in sorted(recipe.op_rules.items() if recipe else ()):
        if kind not in kinds:
            raise ConfigError(f"the recipe has a rule for an operator that the model lacks: {kind!r}", allowed=near_names(kind, kinds), subject=kind)
        if wish not in (*SCHEMES, _FLOAT):
            raise ConfigError(f"the rule for {kind} is unknown", found=wish, allowed=near_names(wish, (*SCHEMES, _FLOAT)), subject=kind)
        for op in graph.ops:
            if op.kind == kind:
                rules.append(_rule(_scope(op.outputs), _ANY, wish, per_channel))
    named = {op.name: op for op in graph.ops}
    for name in recipe.float_ops if recipe else ():
        if name not in named:
            raise ConfigError(f"the recipe keeps an operator in float that the model lacks: {name!r}", allowed=near_names(name, named)[:500], subject=name)
        rules.append(_rule(_scope(named[name].outputs), _ANY, _FLOAT, per_channel))
    return [*rules, *(_rule(".*", border, _FLOAT, per_channel) for border in _BORDERS)]


def _scope(outputs: Sequence[Any]) -> str:
    return "^" + re.escape("".join(f"{tensor.name};" for tensor in outputs)) + "$"


def _rule(regex: str, operation: str, scheme: str, per_channel: bool) -> dict[str, Any]:
    """One entry of the library's recipe, in its JSON form."""
    if scheme == _FLOAT:
        return {"regex": regex, "operation": operation, "algorithm_key": _NONE, "op_config": {}}
    half = scheme == "fp16"
    weight = {
        "num_bits": 16 if half else 8,
        "symmetric": True,
        "granularity": "CHANNELWISE" if per_channel else "TENSORWISE",
        "dtype": "FLOAT" if half else "INT",
    }
    config: dict[str, Any] = {"weight_tensor_config": weight, "compute_precision": "FLOAT" if half else "INTEGER", "explicit_dequantize": half}
    if scheme == "static_int8":
        config["activation_tensor_config"] = {"num_bits": 8, "symmetric": False, "granularity": "TENSORWISE", "dtype": "INT"}
    return {"regex": regex, "operation": operation, "algorithm_key": _CASTING if half else _UNIFORM, "op_config": config}


def _ranges(request: ConvertRequest, quantizer: Any, data: bytes, graph: TfliteGraph, rules: list[dict[str, Any]], *, renamed: bool) -> tuple[Ranges, str]:
    """Lowest and highest value of every float tensor that is computed or fed, and where they come from."""
    sizes: dict[str, int] = json.loads(quantizable(graph)["tensors"])
    ranges, how = request.ranges, "given"
    if ranges is None:
        if request.calibration is None or request.recipe is None:
            raise ConfigError("static int8 needs activation ranges", hint="pass ranges=... or calibration=...", subject="ranges")
        source: StoredArtifact = request.source
        inputs = _fitted(request, source.record.iospec, graph)
        method = request.recipe.calibration.method
        if request.infer is None and method == "minmax":
            ranges, how = _merged(quantizer, data, graph, rules, inputs), "calibrate"
        else:
            how = "host" if request.infer is None else "infer"
            with tempfile.TemporaryDirectory(prefix="edgekd.tflite.") as work:
                ranges = _observed(request, _named_file(data, source, Path(work)) if renamed else source, inputs, sizes)
    missing = sorted(set(sizes) - set(ranges)) if how != "calibrate" else []
    if missing:
        raise ConfigError("tensors of the model have no activation range", found=", ".join(missing[:5]), hint="observe the ranges on the float model")
    for name, (low, high) in ranges.items():
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise DataError(f"the range of the tensor {name!r} is none", found=(low, high), hint="look for NaN or Inf in inputs and weights", subject=name)
    return ranges, how


def _named_file(data: bytes, source: StoredArtifact, folder: Path) -> StoredArtifact:
    """The source in a file whose tensors have names of their own."""
    return store_tflite(parse_model(data), folder, precision=Precision.FP32, like=source.record.iospec, converter="names", producers=source.record.producers)


def _observed(request: ConvertRequest, source: StoredArtifact, inputs: Mapping[str, Array], sizes: Mapping[str, int]) -> Ranges:
    """Ranges by the recipe's method. Inputs of the file are observed under the names of their tensors."""
    if request.recipe is None:
        raise ConfigError("quantizing needs a recipe", hint="pass recipe=QuantRecipe(...)", subject="recipe")
    seen = observe(request.infer or host_infer, source, inputs, sizes)
    return seen.ranges(request.recipe.calibration.method)


def _fitted(request: ConvertRequest, spec: IOSpec, graph: TfliteGraph) -> dict[str, Array]:
    """The calibration inputs, laid out and typed as the file takes them."""
    if request.calibration is None:
        raise ConfigError("static int8 needs activation ranges", hint="pass ranges=... or calibration=...", subject="ranges")
    arrays = fit_layouts(request.calibration.inputs, request.iospec, spec)
    missing = sorted(set(graph.inputs) - set(arrays))
    if missing:
        raise DataError(f"the calibration set has no input {missing[0]!r}", found=sorted(arrays), allowed=", ".join(graph.inputs), subject=missing[0])
    for name, tensor in graph.inputs.items():
        if arrays[name].shape[1:] != tensor.shape[1:]:
            raise DataError(
                f"the calibration input {name!r} has another shape than the model's",
                found=arrays[name].shape,
                allowed=("samples", *tensor.shape[1:]),
                hint="state its layout (NCHW or NHWC) in the request's IOSpec",
                subject=name,
            )
    return {name: arrays[name].astype(tensor.dtype) for name, tensor in graph.inputs.items()}


def _merged(quantizer: Any, data: bytes, graph: TfliteGraph, rules: list[dict[str, Any]], inputs: Mapping[str, Array]) -> Ranges:
    """Minimum and maximum over the results of the library's calibration on each sample."""
    merged: dict[str, tuple[float, float]] = {}
    with quiet() as noise:
        try:
            made = quantizer.Quantizer(bytearray(data), rules)
            for position in range(len(next(iter(inputs.values())))):
                sample = {name: np.ascontiguousarray(array[position : position + 1]) for name, array in inputs.items()}
                for name, seen in made.calibrate({graph.signature: [sample]}, num_threads=1).items():
                    if seen:
                        low, high = float(np.min(seen["min"])), float(np.max(seen["max"]))
                        before = merged.get(name, (low, high))
                        merged[name] = (float(np.minimum(before[0], low)), float(np.maximum(before[1], high)))
        except _LIBRARY_ERRORS as error:
            raise ConversionRejected("the model cannot be calibrated", found=blame(error, noise), hint="pass ranges=...", subject=graph.signature) from error
    if not merged:
        raise _nothing(graph, "static_int8")
    return merged


def _shared(graph: TfliteGraph, ranges: Ranges) -> Ranges:
    """The ranges, with those of what a concatenation joins widened to that of its output, also through operators that only move values.

    The parts then have the output's scale from the start. With scales of their own each would be rounded twice: half a decibel on a U-Net.
    A part that others read too keeps its range where they would lose more than one bit.
    """
    made = dict(ranges)
    readers = Counter(tensor.name for op in graph.ops for tensor in op.inputs)
    widened: set[str] = set()
    for op in reversed(graph.ops):
        out = op.outputs[0].name if op.outputs else ""
        if out in made and (op.kind == "CONCATENATION" or (op.kind in _MOVING and out in widened)):
            for tensor in op.inputs:
                if tensor.name in made and not tensor.constant:
                    low, high = made[tensor.name]
                    wide = (min(low, made[out][0]), max(high, made[out][1]))
                    if readers[tensor.name] == 1 or wide[1] - wide[0] <= _ONE_BIT * (high - low):
                        made[tensor.name] = wide
                        widened.add(tensor.name)
    return made


def _as_results(graph: TfliteGraph, ranges: Ranges) -> dict[str, dict[str, Array]]:
    """Ranges as the library's calibration gives them. Zero must be among the values that int8 represents, and a tensor that was zero throughout
    (a dead ReLU) gets 0 to 1: of an empty range the library makes a step of 4e-12, and XNNPACK refuses the ratios of scales around it."""
    ranks = {tensor.name: len(tensor.shape) for tensor in graph.tensors}
    made = {}
    for name, (low, high) in _shared(graph, ranges).items():
        if name in ranks:
            least, most = min(low, 0.0), max(high, 0.0)
            shape = (1,) * ranks[name]
            made[name] = {"min": np.full(shape, least, np.float32), "max": np.full(shape, 1.0 if least == most else most, np.float32)}
    return made


def _quantized(quantizer: Any, data: bytes, rules: list[dict[str, Any]], results: dict[str, dict[str, Array]] | None) -> bytes:
    with quiet() as noise:
        try:
            made = quantizer.Quantizer(bytearray(data), rules)
            return bytes(made.quantize(results, enable_progress_bar=False, enable_progress_report=False).quantized_model)
        except _LIBRARY_ERRORS as error:
            raise ConversionRejected(
                "the model cannot be quantized",
                found=blame(error, noise),
                hint="keep the operator in float with float_ops",
                subject="quantized-tflite-from-tflite",
            ) from error


def _restore_signature(before: Any, after: Any) -> None:
    """Point the signature to the graph's inputs and outputs again, in place: by their positions, which the quantizer keeps.

    The quantizer itself goes by tensor names and loses an output that is an input, a constant or another output as well.
    """
    old, new = before.signatureDefs[0], after.signatureDefs[0]
    graphs = (before.subgraphs[old.subgraphIndex], after.subgraphs[new.subgraphIndex])
    fed, still_fed = list(graphs[0].inputs), list(graphs[1].inputs)
    graphs[1].outputs = [still_fed[fed.index(was)] if was in fed else now for was, now in zip(graphs[0].outputs, graphs[1].outputs, strict=True)]
    for items, kept, sides in (
        (old.inputs, new.inputs, [list(graph.inputs) for graph in graphs]),
        (old.outputs, new.outputs, [list(graph.outputs) for graph in graphs]),
    ):
        places = {item.name: sides[0].index(item.tensorIndex) for item in items}
        for item in kept:
            item.tensorIndex = sides[1][places[item.name]]


def _nothing(graph: TfliteGraph, scheme: str) -> ConversionRejected:
    return ConversionRejected("nothing in this model can be quantized", found=f"{len(graph.ops)} operators", hint="deploy in float", subject=scheme)


def _check(before: TfliteGraph, after: TfliteGraph, scheme: str) -> dict[str, str]:
    """Counts for the metadata, after making sure that something was quantized and that the borders are as before.

    Raises:
        ConversionRejected: nothing was quantized, or inputs or outputs changed.
    """
    for old, new in ((before.inputs, after.inputs), (before.outputs, after.outputs)):
        borders = [[(name, tensor.dtype, tensor.shape) for name, tensor in items.items()] for items in (old, new)]
        if borders[0] != borders[1]:
            raise ConversionRejected(
                "the quantizer changed the model's inputs or outputs", found=borders[1], allowed=borders[0], hint="use another scheme", subject=scheme
            )
    computing = [op for op in after.ops if op.kind not in _BORDER_OPS]
    low = [op for op in computing if any(tensor.scales and tensor.dtype in ("int8", "int32") for tensor in op.inputs)]
    half = sum(op.kind == "DEQUANTIZE" and op.inputs[0].dtype == "float16" for op in after.ops)
    if not low and not half:
        raise _nothing(before, scheme)
    left = Counter(op.kind for op in computing if op.kind in COMPUTING and op not in low and op.outputs[0].dtype == "float32")
    kinds = Counter(op.kind for op in after.ops)
    return {
        "int8_ops": str(len(low)),
        "fp16_weights": str(half),
        "left_in_float": json.dumps(dict(sorted(left.items()))),
        "quantize_ops": str(kinds["QUANTIZE"]),
        "dequantize_ops": str(kinds["DEQUANTIZE"]),
    }
