"""From a float32 ONNX file to one that computes in float16, with what would leave float16's range kept in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array, ConvertRequest, Infer, Tensors
from edgekd.errors import ConfigError, ConversionRejected, DataError, MissingDependency, ModelError, near_names
from edgekd.models.notes import carried_notes
from edgekd.models.onnx_artifact import store_onnx
from edgekd.models.onnx_file import count_ops, depth_of, float_tensors, iospec_of, load_model, name_nodes, opset_of, require_onnx, strip_notes, write_model
from edgekd.options import QuantizeOptions
from edgekd.quantize.calibrate import observe
from edgekd.records import Format, Precision

from ._fp16_casts import join_float_neighbours, sort_nodes
from ._fp16_rules import FP16_MAX, Pins, Seen
from ._onnx_io import captured, host_infer, last_message, versions

_ENTRY = "model.onnx"
_PINS = ("all", "rules", "ranges", "none")
_OPTIONS: Mapping[str, type] = {"keep_io": bool, "max_share": float, "lost_share": float, "pins": str, "float_ops": str, "memory_mb": int}


class OnnxFp16FromOnnx:
    """Converts weights and arithmetic to float16 by onnxruntime's converter; inputs and outputs stay float32 unless `keep_io` is false.

    In float32 stay: operators of a fixed table (norms, softmax, exponentials, sums), readers of tiny constants, and whatever makes or reads
    a tensor that went beyond `max_share` (default 0.5) of 65504, or lost more than `lost_share` (default 0.01) of its non-zero values to zero,
    on the calibration inputs, or on the example where there are none. Neighbours in float32 pass float32 on. `pins` is `all` (default),
    `rules` (table and constants), `ranges` or `none`; `float_ops` names further nodes, separated by commas. The result is run on the same
    inputs, every tensor of it read back, with the request's `infer`, else by onnxruntime on the host. That one has no float16 kernel for most
    operators and keeps float32 between them: it shows a tensor that overflows, not what a value lost to zero does further on.
    Metadata: `float_ops` is JSON, `[name, operator, reason]`; `library_float_ops` counts nodes of operators
    that the library leaves in float32; `scanned` says on what the ranges were seen.
    """

    name = "onnx-fp16-from-onnx"
    source = "onnx"
    target = "onnx"
    precisions: tuple[Precision, ...] = (Precision.FP16,)
    needs: Mapping[str, str] = {"onnx": "x86", "onnxruntime": "x86"}
    cost_s = 2.0

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The converted file `model.onnx` in `request.folder`; the same request gives the same bytes.

        Raises:
            ConversionRejected: a constant does not fit float16, a tensor of the result is NaN or Inf, nothing becomes float16, or the library refuses.
            ConfigError: an unknown option or node. DataError: inputs or the model's own tensors are not finite. ModelError: no float32 ONNX artifact.
        """
        options = _options(request)
        source = _checked(request.source)
        model = _plain(load_model(source.entry))
        infer, inputs = request.infer or host_infer, request.calibration.inputs if request.calibration is not None else request.example
        sizes = float_tensors(model)
        pins = Pins(model.graph)
        for name in filter(None, (part.strip() for part in str(options["float_ops"]).split(","))):
            known = {node.name: node for node in model.graph.node}
            if name not in known:
                raise ConfigError(f"the option float_ops names a node that the model lacks: {name!r}", allowed=near_names(name, known), subject=name)
            pins.pin(known[name], "asked for")
        scanned = f"{'calibration' if request.calibration is not None else 'example'}, {len(next(iter(inputs.values()), ()))} samples"
        with tempfile.TemporaryDirectory(prefix="edgekd.fp16.") as work:
            seen = _scan(infer, _stored(model, source, Path(work)), inputs, sizes, int(options["memory_mb"]))
            if options["pins"] in ("all", "rules"):
                pins.by_rules()
                pins.by_constants()
            if options["pins"] in ("all", "ranges"):
                pins.by_ranges(seen, float(options["max_share"]), float(options["lost_share"]))
            if not options["keep_io"]:
                _refuse_borders(model, seen)
            pins.refuse_large_constants()
            depth, listed = depth_of(model), pins.listed()
            made, left = _converted(model, list(pins.reasons), bool(options["keep_io"]))
            if not _has_half(made):
                raise ConversionRejected("nothing in this model becomes float16", found=f"{len(pins.reasons)} nodes stay in float32", subject=self.name)
            folder = Path(work) / "made"
            stored = store_onnx(
                made,
                folder,
                _ENTRY,
                precision=Precision.FP16,
                iospec=iospec_of(made, source.record.iospec),
                producers={**source.record.producers, **versions("onnx", "onnxruntime")},
                parent=source.record.content_hash(),
                metadata={
                    "converter": self.name,
                    "depth": str(depth),
                    "keep_io": str(options["keep_io"]).lower(),
                    "scanned": scanned,
                    "max_share": f"{options['max_share']:g}",
                    "lost_share": f"{options['lost_share']:g}",
                    "pins": str(options["pins"]),
                    "float_ops": listed,
                    "library_float_ops": str(left),
                    "cast_nodes": str(count_ops(made, {"Cast"})),
                },
                notes=carried_notes(request),
            )
            _prove(infer, stored, made, inputs, int(options["memory_mb"]), bool(options["keep_io"]))
            return stored.copy_to(request.folder)


def _options(request: ConvertRequest) -> dict[str, Any]:
    if request.recipe is not None:
        raise ConfigError("onnx-fp16-from-onnx takes no recipe", found=request.recipe.scheme, hint="leave recipe out", subject="onnx-fp16-from-onnx")
    found: dict[str, Any] = {
        "keep_io": True, "max_share": 0.5, "lost_share": 0.01, "pins": "all", "float_ops": "", "memory_mb": QuantizeOptions().memory_mb
    }  # fmt: skip
    for name, value in request.options.items():
        if name not in _OPTIONS:
            raise ConfigError(f"onnx-fp16-from-onnx has no option {name!r}", allowed=near_names(name, _OPTIONS), subject=name)
        kind = _OPTIONS[name]
        if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"the option {name} has the wrong type", found=repr(value), allowed=kind.__name__, subject=name)
        found[name] = value
    for name in ("max_share", "lost_share"):
        if not 0 < found[name] <= 1:
            raise ConfigError(f"the option {name} is no share", found=found[name], allowed="above 0, up to 1", subject=name)
    if found["pins"] not in _PINS:
        raise ConfigError("the option pins is unknown", found=found["pins"], allowed=", ".join(_PINS), subject="pins")
    return found


def _checked(source: Any) -> StoredArtifact:
    if not isinstance(source, StoredArtifact) or source.record.format is not Format.ONNX:
        raise ModelError("onnx-fp16-from-onnx takes an ONNX artifact", found=type(source).__name__, subject="onnx-fp16-from-onnx")
    if source.record.precision is not Precision.FP32:
        raise ModelError("onnx-fp16-from-onnx takes a float32 model", found=source.record.precision.value, allowed="fp32", subject="onnx-fp16-from-onnx")
    return source


def _plain(model: Any) -> Any:
    """The model with functions inlined, constants as initializers, every node named and shapes inferred.

    Raises:
        ConversionRejected: a node holds a graph of its own, whose tensors the library would not convert.
    """
    onnx = require_onnx("converting an ONNX model")
    from onnx.inliner import inline_local_functions

    if model.functions:
        model = inline_local_functions(model)
    name_nodes(model)
    strip_notes(model)
    kept = []
    for node in model.graph.node:
        held = {item.name: item for item in node.attribute}
        if any(item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for item in node.attribute):
            raise ConversionRejected(
                f"the node {node.name!r} ({node.op_type}) holds a graph of its own, which cannot become float16",
                found=node.op_type,
                hint="unroll the loop or cut the branch before the export",
                subject=node.name,
            )
        value = None
        if node.op_type == "Constant" and "value" in held:
            value = onnx.TensorProto()
            value.CopyFrom(held["value"].t)
        elif node.op_type == "Constant" and ("value_float" in held or "value_floats" in held):
            floats = held["value_floats"].floats if "value_floats" in held else [held["value_float"].f]
            value = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [len(floats)] if "value_floats" in held else [], floats)
        if value is None:
            kept.append(node)
        else:
            value.name = node.output[0]
            model.graph.initializer.append(value)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _stored(model: Any, source: StoredArtifact, folder: Path) -> StoredArtifact:
    """The model that is scanned, as an artifact that lives as long as the folder."""
    extra = write_model(model, folder, _ENTRY)
    return store_artifact(folder, _ENTRY, format=Format.ONNX, precision=Precision.FP32, iospec=source.record.iospec, opset=opset_of(model), extra_files=extra)


def _scan(infer: Infer, model: StoredArtifact, inputs: Tensors, sizes: Mapping[str, int], memory_mb: int) -> dict[str, Seen]:
    """What the float tensors of the source reach on all inputs, in the order of `sizes`."""
    seen = {name: Seen() for name in sizes}

    def counted(model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]:
        answer = infer(model, inputs, taps)
        for name in answer.keys() & seen.keys():
            seen[name].update(answer[name])
        return answer

    observe(counted, model, inputs, sizes, memory_mb=memory_mb)
    for name in sizes.keys() & inputs.keys():
        seen[name].update(inputs[name])
    return seen


def _refuse_borders(model: Any, seen: Mapping[str, Seen]) -> None:
    for item in (*model.graph.input, *model.graph.output):
        if item.name in seen and seen[item.name].largest > FP16_MAX:
            raise ConversionRejected(
                f"{item.name!r} cannot be float16",
                found=f"magnitudes up to {seen[item.name].largest:.6g}",
                allowed=f"up to {FP16_MAX:g}",
                hint="keep inputs and outputs in float32 with keep_io",
                subject=item.name,
            )


def _has_half(model: Any) -> bool:
    """Whether something other than a cast gives or holds float16."""
    half = require_onnx("converting an ONNX model").TensorProto.FLOAT16
    types = {item.name: item.type.tensor_type.elem_type for item in (*model.graph.value_info, *model.graph.output)}
    computed = (name for node in model.graph.node if node.op_type != "Cast" for name in node.output)
    return any(item.data_type == half for item in model.graph.initializer) or any(types.get(name) == half for name in computed)


def _converted(model: Any, pinned: list[str], keep_io: bool) -> tuple[Any, int]:
    """The converted model in topological order, and how many further nodes the library left in float32."""
    try:
        from onnxruntime.transformers import float16
    except ImportError as error:
        raise MissingDependency("onnxruntime", "x86", purpose="converting an ONNX model to float16") from error
    names = {node.name for node in model.graph.node}
    left = sum(node.op_type in float16.DEFAULT_OP_BLOCK_LIST and node.name not in pinned for node in model.graph.node)
    try:
        with captured():
            made = float16.convert_float_to_float16(model, keep_io_types=keep_io, disable_shape_infer=True, node_block_list=pinned)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ConversionRejected(
            "the model cannot become float16", found=last_message(error), hint="deploy it in float32", subject="onnx-fp16-from-onnx"
        ) from error
    join_float_neighbours(made.graph, names)
    sort_nodes(made.graph)
    name_nodes(made)
    return made, left


def _prove(infer: Infer, stored: StoredArtifact, made: Any, inputs: Tensors, memory_mb: int, keep_io: bool) -> None:
    """Run the result with all its float tensors observed.

    Raises:
        ConversionRejected: it does not run, or a tensor is NaN or Inf; names the first.
    """
    given = dict(inputs) if keep_io else {spec.name: inputs[spec.name].astype(spec.dtype) for spec in stored.record.iospec.inputs}
    try:
        observe(infer, stored, given, float_tensors(made), memory_mb=memory_mb)
    except DataError as error:
        if error.subject in {name for node in made.graph.node for name in node.output}:
            raise ConversionRejected(
                f"the tensor {error.subject!r} is NaN or Inf in float16",
                found=error.what,
                hint="let the converter pin it (pins=all), or name the nodes before it in float_ops",
                subject=error.subject,
            ) from error
        raise
    except ConversionRejected as error:
        raise ConversionRejected(
            "the float16 model does not run", found=last_message(error), hint="deploy it in float32", subject=stored.record.entry
        ) from error
