"""From a float ONNX file to a TFLite file by onnx2tf, in an environment of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.conversion.environments import environment_python
from edgekd.errors import ConfigError, ConversionRejected, ModelError, near_names
from edgekd.models.onnx_file import iospec_of, load_model, require_onnx, write_model
from edgekd.records import Format, IOSpec, Precision

from ._child import WORKERS, limits_of, run_worker, work_folder
from ._tflite_edges import calibration_arrays, check_options, environments_of, finish, kind_of, one_sample, save_arrays, turned

ENVIRONMENT = "onnx2tf"
_SEQUENCE_RANK = 3
_BLAME = re.compile(r"onnx_op_name: (\S+)")


class TfliteFromOnnx:
    """Converts an ONNX file whose sizes are all fixed: fp32, fp16 (option `precision`), or int8 by a recipe, inputs and outputs float.

    Scheme `static_int8` takes ranges by minmax on the request's calibration inputs, weights per channel; `dynamic_int8` needs none.
    Images become channel-last: `TensorSpec.layout` says so, metadata `orders` (JSON: tensor to its axes in the source). Inputs in
    `keep_inputs` keep their shape: `auto` (the default: those of three axes, which are sequences more often than signals), `none`, or
    names with commas between. The float file is run against the ONNX file on the example before anything is given back.
    Options of the process: `timeout_s` (1800), `memory_mb` (8000), `environments` (folder; default: the user's cache).
    """

    name = "tflite-from-onnx"
    source = "onnx"
    target = "tflite"
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.FP16, Precision.INT8)
    environment = ENVIRONMENT
    needs: Mapping[str, str] = {"onnx": "x86", "ai_edge_litert": "litert"}
    cost_s = 25.0
    precision_options: Mapping[str, Mapping[str, str]] = {"fp16": {"precision": "fp16"}}

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The file `model.tflite` in `request.folder`; the same request gives the same bytes.

        Raises:
            ConversionRejected: an axis is dynamic, or onnx2tf refuses the model or computes something else; names axis or operator.
            MissingEnvironment: `edgekd env create onnx2tf` was not run. MissingDependency: onnx or ai-edge-litert is not installed.
            ConfigError: an option or the recipe asks for what onnx2tf does not do. ModelError: the source is no float32 ONNX artifact.
        """
        check_options(request, self.name, ("precision", "keep_inputs"))
        limits = limits_of(request.options)
        source = onnx_source(request.source, self.name)
        proto = load_model(source.entry)
        spec = iospec_of(proto, source.record.iospec)
        require_fixed(spec, "onnx2tf")
        kind, precision = kind_of(request, self.name)
        keep = _kept(request, spec)
        python = environment_python(ENVIRONMENT, purpose="converting ONNX to TFLite by onnx2tf", path=environments_of(request))
        inside = rename_borders(proto, spec)
        example = {inside[tensor.name]: one_sample(request, tensor, {}) for tensor in spec.inputs}
        static = kind == "static_int8"
        calibration = {inside[name]: array for name, array in calibration_arrays(request, spec.inputs, {}, self.name).items()} if static else {}
        with work_folder(self.name) as work:
            write_model(proto, work, "source.onnx")
            asked = {
                "model": str(work / "source.onnx"),
                "kind": kind,
                "per_channel": request.recipe is None or request.recipe.per_channel,
                "keep": [inside[name] for name in keep],
                "outputs": [inside[tensor.name] for tensor in spec.outputs],
                "example": save_arrays(example, work, "example"),
                "calibration": save_arrays(calibration, work, "calibration"),
            }
            told = run_worker(WORKERS / "onnx2tf_worker.py", asked, python=python, work=work, converter=self.name, limits=limits, blame=_BLAME)
            data = Path(told["file"]).read_bytes()
        orders = {tensor.name: told["orders"][inside[tensor.name]] for tensor in (*spec.inputs, *spec.outputs)}
        like = IOSpec(
            inputs=tuple(turned(tensor, orders[tensor.name]) for tensor in spec.inputs),
            outputs=tuple(turned(tensor, orders[tensor.name]) for tensor in spec.outputs),
            state=spec.state,
            static_binding=spec.static_binding,
        )
        borders = {side: {tensor.name: told["borders"][side][inside[tensor.name]] for tensor in getattr(spec, side)} for side in ("inputs", "outputs")}
        return finish(
            request,
            data,
            like,
            borders,
            precision=precision,
            converter=self.name,
            producers={**source.record.producers, **told["versions"]},
            metadata={
                "environment": ENVIRONMENT,
                "orders": json.dumps({name: order for name, order in orders.items() if order != sorted(order)}),
                "kept_inputs": ", ".join(keep),
                "float_error": f"{max(told['float_errors'].values()):.2e}",
            },
        )


def onnx_source(source: Any, converter: str) -> StoredArtifact:
    """The source, which must be a float32 ONNX artifact.

    Raises:
        ModelError: it is something else. MissingDependency: onnx is not installed.
    """
    require_onnx("converting an ONNX model")
    if not isinstance(source, StoredArtifact) or source.record.format is not Format.ONNX:
        raise ModelError(
            f"{converter} takes an ONNX artifact", found=type(source).__name__, hint="edgekd.models.onnx_artifact.import_onnx makes one", subject=converter
        )
    if source.record.precision is not Precision.FP32:
        raise ModelError(
            f"{converter} takes a float32 model", found=source.record.precision.value, allowed="fp32", hint="convert first, quantize then", subject=converter
        )
    return source


def require_fixed(spec: IOSpec, library: str) -> None:
    """Refuse a dynamic axis by name.

    Raises:
        ConversionRejected: an input has one.
    """
    for tensor in spec.inputs:
        for axis in tensor.shape:
            if isinstance(axis, str):
                raise ConversionRejected(
                    f"{library} needs fixed sizes, and the axis {axis!r} of {tensor.name!r} is dynamic",
                    found=f"shape {tensor.shape}",
                    hint=f"bind it: import_onnx(path, folder, binding={{{axis!r}: 1}})",
                    subject=tensor.name,
                )


def _kept(request: ConvertRequest, spec: IOSpec) -> tuple[str, ...]:
    asked = request.options.get("keep_inputs", "auto")
    names = tuple(tensor.name for tensor in spec.inputs)
    if asked == "auto":
        return tuple(tensor.name for tensor in spec.inputs if len(tensor.shape) == _SEQUENCE_RANK)
    if asked == "none":
        return ()
    wanted = tuple(part.strip() for part in str(asked).split(",") if part.strip())
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ConfigError(
            "the option keep_inputs names no input", found=asked, allowed=f"auto, none, or of: {near_names(str(asked), names)}", subject="keep_inputs"
        )
    return wanted


def rename_borders(proto: Any, spec: IOSpec) -> dict[str, str]:
    """Give inputs and outputs plain names (`in_0`, `out_0`) in place, because libraries change others; old name to new."""
    names = {tensor.name: f"in_{position}" for position, tensor in enumerate(spec.inputs)}
    for position, tensor in enumerate(spec.outputs):
        names.setdefault(tensor.name, f"out_{position}")
    taken = {name for node in proto.graph.node for name in (*node.input, *node.output)} | {item.name for item in proto.graph.initializer}
    names = {old: _free(new, taken - {old}) for old, new in names.items()}
    for item in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        item.name = names.get(item.name, item.name)
    _rename_nodes(proto.graph.node, names)
    return names


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _rename_nodes(nodes: Any, names: dict[str, str]) -> None:
    for node in nodes:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _rename_nodes(graph.node, names)
                for item in graph.output:
                    item.name = names.get(item.name, item.name)
