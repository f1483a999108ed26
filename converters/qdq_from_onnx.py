"""From a float ONNX file to an int8 one with QuantizeLinear/DequantizeLinear pairs, with ranges that edgekd observed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, near_names
from edgekd.models.onnx_file import count_ops, depth_of, iospec_of, load_model, name_nodes, nodes_of, note_state, opset_of, require_onnx, write_model
from edgekd.options import QuantizeOptions
from edgekd.quantize.calibrate import observe
from edgekd.quantize.recipes import SCHEMES
from edgekd.records import Format, Precision, QuantRecipe

from ._onnx_io import captured, host_infer, last_message, versions
from ._place_qdq import place
from ._placement import PLACEMENTS, check_placement
from .prepare_onnx import PrepareOnnx

_ENTRY = "model.onnx"
_REQUANTIZED = {"Conv", "ConvTranspose", "Gemm"}


class QdqFromOnnx:
    """Quantizes to int8 in the QDQ form; inputs and outputs stay float32.

    The request carries a recipe and `ranges` (low, high per tensor), or a calibration set to observe them on: with the request's
    `infer`, or without one by onnxruntime on the host (metadata `ranges` says which: `given`, `infer` or `host`). Observing holds at most
    the option `memory_mb` at once (10^6 bytes, default 512).
    Scheme `u8s8`: asymmetric uint8 activations, int8 weights; `u8s8_reduced`: the same with 7-bit weights, for processors whose 8-bit
    products saturate; `s8s8`: symmetric int8 for both. `s8s8_tensorrt`: the same, with pairs where TensorRT wants them and biases in float
    (`_placement.py`); the graph is checked against these rules and computed by onnxruntime, but no TensorRT has read it. Its metadata counts
    `quantized_ops` of `weighted_ops`, `residual_adds` and `shared_scales`, and names `float_weighted_ops`.
    Node names in `recipe.float_ops` are those of the prepared model.
    """

    name = "qdq-from-onnx"
    source = "onnx"
    target = "onnx"
    precisions: tuple[Precision, ...] = (Precision.INT8,)
    needs: Mapping[str, str] = {"onnx": "x86", "onnxruntime": "x86"}
    cost_s = 2.0

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The quantized file `model.onnx` in `request.folder`; the same request gives the same bytes.

        Raises:
            ConversionRejected: nothing in the model can be quantized, or the quantizer refuses it.
            ConfigError: no recipe, no ranges, an unknown scheme or an unknown name in `float_ops`.
        """
        recipe = request.recipe
        if recipe is None:
            raise ConfigError("quantizing needs a recipe", hint="pass recipe=QuantRecipe(...)", subject=self.name)
        known_schemes = [name for name, scheme in SCHEMES.items() if scheme.format == self.target]
        if recipe.scheme not in known_schemes:
            raise ConfigError(
                f"there is no quantization scheme {recipe.scheme!r} for ONNX", allowed=near_names(recipe.scheme, known_schemes), subject=recipe.scheme
            )
        for name in request.options.keys() - {"memory_mb"}:
            raise ConfigError(f"qdq-from-onnx has no option {name!r}", allowed="memory_mb")
        with tempfile.TemporaryDirectory(prefix="edgekd.qdq.") as work:
            prepared = PrepareOnnx().convert(ConvertRequest(source=request.source, folder=Path(work), iospec=request.iospec, example=request.example))
            ranges = _ranges(request, prepared)
            float_model = load_model(prepared.entry)
        known = {node.name for node in nodes_of(float_model)}
        for name in recipe.float_ops:
            if name not in known:
                raise ConfigError(f"the recipe keeps a node in float that the model lacks: {name!r}", allowed=near_names(name, known), subject=name)
        depth = depth_of(float_model)
        placement = PLACEMENTS.get(recipe.scheme)
        if placement is None:
            model = _quantized(float_model, recipe, ranges)
            _keep_float(model, recipe.float_ops)
        else:
            if not recipe.per_channel:
                raise ConfigError(f"{recipe.scheme} quantizes weights per channel only", found="per_channel=False", subject=recipe.scheme)
            model = float_model
            place(model, ranges, placement, recipe.float_ops)
        pairs = count_ops(model, {"QuantizeLinear", "DequantizeLinear"})
        if not pairs:
            raise ConversionRejected(
                "nothing in this model can be quantized", found=f"{len(known)} nodes, {len(recipe.float_ops)} kept in float", subject=self.name
            )
        name_nodes(model)
        placed = check_placement(model, placement) if placement is not None else {}
        note_state(model, prepared.record.iospec.state)
        extra = write_model(model, request.folder, _ENTRY)
        kept = ("prepared", "prepared_reason", "upgraded_from_opset")
        return store_artifact(
            request.folder,
            _ENTRY,
            format=Format.ONNX,
            precision=Precision.INT8,
            iospec=iospec_of(model, prepared.record.iospec),
            opset=opset_of(model),
            producers={**prepared.record.producers, **versions("onnx", "onnxruntime")},
            parent=request.source.record.content_hash(),
            recipe=recipe.digest(),
            metadata={
                "converter": self.name,
                "scheme": recipe.scheme,
                "ranges": "given" if request.ranges is not None else "infer" if request.infer is not None else "host",
                "quantize_nodes": str(count_ops(model, {"QuantizeLinear"})),
                "dequantize_nodes": str(count_ops(model, {"DequantizeLinear"})),
                "depth": str(depth),
                **placed,
                **{key: prepared.record.metadata[key] for key in kept},
            },
            extra_files=extra,
        )


def _ranges(request: ConvertRequest, prepared: StoredArtifact) -> Mapping[str, tuple[float, float]]:
    sizes: dict[str, int] = json.loads(prepared.record.metadata["tensors"])
    ranges = request.ranges
    if ranges is None:
        if request.calibration is None or request.recipe is None:
            raise ConfigError("quantizing needs activation ranges", hint="pass ranges=... or calibration=...", subject="qdq-from-onnx")
        memory_mb = int(request.options.get("memory_mb", QuantizeOptions().memory_mb))
        seen = observe(request.infer or host_infer, prepared, request.calibration.inputs, sizes, memory_mb=memory_mb)
        ranges = seen.ranges(request.recipe.calibration.method)
    missing = sorted(set(sizes) - set(ranges))
    if missing:
        raise ConfigError(
            "tensors of the model have no activation range", found=", ".join(missing[:5]), hint="observe the ranges on the prepared model", subject=missing[0]
        )
    return {name: ranges[name] for name in sizes}


def _quantized(model: Any, recipe: QuantRecipe, ranges: Mapping[str, tuple[float, float]]) -> Any:
    from onnxruntime.quantization import CalibrationMethod, QuantType, registry
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    scheme = SCHEMES[recipe.scheme]
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    try:
        with captured():
            quantizer = QDQQuantizer(
                model,
                recipe.per_channel,
                scheme.reduced_weights,
                QuantType.QInt8,
                QuantType.QInt8 if scheme.signed_activations else QuantType.QUInt8,
                TensorsData(CalibrationMethod.MinMax, data),
                [],
                list(recipe.float_ops),
                sorted(set(registry.QLinearOpsRegistry) | set(registry.QDQRegistry)),
                {"ActivationSymmetric": scheme.symmetric_activations},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()  # the quantizer appends nodes at the end; ONNX wants producers first
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ConversionRejected(
            "the model cannot be quantized", found=last_message(error), hint="keep the node in float with float_ops", subject="qdq-from-onnx"
        ) from error
    return quantizer.model.model


def _keep_float(model: Any, float_ops: tuple[str, ...]) -> None:
    """Make the runtime leave the float operators in float, in place; numbers stay as they are.

    Since 1.20 onnxruntime quantizes float weights of a Conv, ConvTranspose or Gemm that stands between a DequantizeLinear and a
    QuantizeLinear, per tensor and without a word (`weight_bias_quantization.cc`), if the DequantizeLinear has a scalar scale. So the
    operator gets a DequantizeLinear of its own, whose scale is the same for every channel.
    """
    onnx = require_onnx("quantizing an ONNX model")
    graph = model.graph
    arrays = {item.name: item for item in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in [node for node in graph.node if node.name in float_ops and node.op_type in _REQUANTIZED]:
        maker = makers.get(node.input[0])
        weight = arrays.get(node.input[1])
        if maker is None or maker.op_type != "DequantizeLinear" or weight is None:
            continue
        flags = {item.name: item.i for item in node.attribute}
        if node.op_type == "Gemm":
            axis, channels = int(not flags.get("transA", 0)), weight.dims[1 if flags.get("transB", 0) else 0]
        else:
            axis, channels = 1, weight.dims[0] if node.op_type == "ConvTranspose" else weight.dims[1] * (flags.get("group") or 1)
        stem = f"{node.name}_float_input"
        names = [f"{stem}_scale", f"{stem}_zero_point"]
        for source, name in zip(maker.input[1:], names, strict=False):
            value = onnx.numpy_helper.to_array(arrays[source]).reshape(-1)
            graph.initializer.append(onnx.numpy_helper.from_array(np.repeat(value, channels), name))
        inputs = [maker.input[0], *names[: len(maker.input) - 1]]
        own = onnx.helper.make_node("DequantizeLinear", inputs, [stem], name=f"{stem}_DequantizeLinear", axis=axis, domain=maker.domain)
        graph.node.insert(list(graph.node).index(node), own)
        node.input[0] = stem
    used = {name for node in graph.node for name in node.input} | {item.name for item in graph.output}
    idle = [node for node in graph.node if node.op_type == "DequantizeLinear" and not used & set(node.output)]
    for node in idle:
        graph.node.remove(node)
