"""From a float ONNX file of an old operator set to a SavedModel by onnx-tf, in an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.conversion.environments import environment_python
from edgekd.errors import ConversionRejected
from edgekd.models.onnx_file import iospec_of, load_model, opset_of, require_onnx, write_model
from edgekd.records import Precision, SupportReport

from ._child import WORKERS, limits_of, run_worker, work_folder
from ._saved_model import described, refuse_quantizing, store_saved_model
from ._tflite_edges import check_options, environments_of, one_sample, save_arrays
from .tflite_from_onnx import onnx_source, rename_borders, require_fixed

ENVIRONMENT = "onnx-tf"
IR_VERSION = 8
"""The newest file version that onnx 1.15's checker, as onnx-tf calls it, takes for these operator sets."""

OLDEST_OPSET = 7
NEWEST_OPSET = 17
"""onnx-tf 1.10.0 was released for operator set 15; networks exported at 16 and 17 convert, those at 18 and above were never seen to."""

NEWEST_RECURRENT_OPSET = 12
"""torch writes Unsqueeze 13 around recurrent layers from operator set 13 on, and onnx-tf has it up to 11."""

_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


class SavedModelFromOnnx:
    """Converts an ONNX file whose sizes are fixed and whose operators onnx-tf knows in their versions: convolutional nets up to
    operator set 17, LSTM nets up to 12. `supports` says so before anything is started.

    Inputs and outputs stay channel-first, named as in the ONNX file, in the signature `serving_default`. The SavedModel is run against
    the ONNX file on the example. Options of the process: `timeout_s` (1800), `memory_mb` (8000), `environments` (folder).
    """

    name = "saved-model-from-onnx"
    source = "onnx"
    target = "saved_model"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    environment = ENVIRONMENT
    needs: Mapping[str, str] = {"onnx": "x86"}
    cost_s = 20.0
    follows = ("onnx-legacy-from-torch",)

    def supports(self, source: StoredArtifact) -> SupportReport:
        """Whether onnx-tf knows every operator of the model in its version; `missing` names those that it does not, and why.

        Raises:
            ModelError: the source is no float32 ONNX artifact. MissingDependency: onnx is not installed.
        """
        return support_of(load_model(onnx_source(source, self.name).entry))

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The SavedModel in `request.folder`: `saved_model.pb` and the files of its weights.

        Raises:
            ConversionRejected: an axis is dynamic, onnx-tf lacks an operator (named, before it is started), or fails on the model.
            MissingEnvironment: `edgekd env create onnx-tf` was not run. ConfigError: an unknown option, or a recipe.
            ModelError: the source is no float32 ONNX artifact.
        """
        check_options(request, self.name, ())
        limits = limits_of(request.options)
        refuse_quantizing(request, self.name)
        source = onnx_source(request.source, self.name)
        proto = load_model(source.entry)
        spec = iospec_of(proto, source.record.iospec)
        require_fixed(spec, "onnx-tf")
        report = support_of(proto)
        if not report.supported:
            operator, why = next(iter(report.missing.items()))
            raise ConversionRejected(
                f"onnx-tf cannot convert the operator {operator}",
                found=why + (f"; and {len(report.missing) - 1} more: {', '.join(list(report.missing)[1:6])}" if len(report.missing) > 1 else ""),
                hint=report.note,
                subject=operator,
            )
        python = environment_python(ENVIRONMENT, purpose="converting ONNX to SavedModel by onnx-tf", path=environments_of(request))
        inside = rename_borders(proto, spec)
        example = {inside[tensor.name]: one_sample(request, tensor, {}) for tensor in spec.inputs}
        proto.ir_version = IR_VERSION
        with work_folder(self.name) as work:
            write_model(proto, work, "source.onnx")
            asked = {
                "model": str(work / "source.onnx"),
                "inputs": described(spec.inputs, {}),
                "outputs": [tensor.name for tensor in spec.outputs],
                "inner_inputs": [inside[tensor.name] for tensor in spec.inputs],
                "inner_outputs": [inside[tensor.name] for tensor in spec.outputs],
                "example": save_arrays(example, work, "example"),
            }
            told = run_worker(WORKERS / "onnx_tf_worker.py", asked, python=python, work=work, converter=self.name, limits=limits)
            return store_saved_model(
                Path(told["folder"]),
                request,
                spec,
                graph_version=told["graph_version"],
                converter=self.name,
                producers={**source.record.producers, **told["versions"]},
                metadata={
                    "environment": ENVIRONMENT,
                    "float_error": f"{max(told['errors'].values()):.2e}",
                    "depth": source.record.metadata.get("depth", ""),
                },
            )


def support_of(proto: Any) -> SupportReport:
    """Whether onnx-tf has every operator of a model in the version that the model's operator set means.

    The versions are those of `onnx_tf.opset_version` in onnx-tf 1.10.0. `note` says what to do.
    """
    onnx = require_onnx("reading an ONNX model")
    known: Mapping[str, list[int]] = json.loads(Path(__file__).with_name("onnx_tf_ops.json").read_text(encoding="utf-8"))
    opset = opset_of(proto)
    nodes = list(_all_nodes(proto.graph))
    missing = {}
    for domain, operator in sorted(set(nodes)):
        if domain not in ("", "ai.onnx"):
            missing[operator] = f"it belongs to the domain {domain}"
        elif operator not in known:
            missing[operator] = "onnx-tf does not have it"
        else:
            version = onnx.defs.get_schema(operator, opset).since_version
            if version not in known[operator]:
                missing[operator] = f"operator set {opset} means its version {version}; onnx-tf has {', '.join(map(str, known[operator]))}"
    if not missing and OLDEST_OPSET <= opset <= NEWEST_OPSET:
        return SupportReport(supported=True)
    if not missing:
        return SupportReport(
            supported=False,
            missing={"(model)": f"its operator set is {opset}, and {OLDEST_OPSET} to {NEWEST_OPSET} are known to work"},
            note=f"export it with opset_version={NEWEST_OPSET} by torch's older exporter (dynamo=False)",
        )
    plain = {operator for domain, operator in nodes if domain in ("", "ai.onnx")}
    newest = NEWEST_RECURRENT_OPSET if plain & _RECURRENT else NEWEST_OPSET
    fitting = [at for at in range(newest, OLDEST_OPSET - 1, -1) if all(_has(onnx, operator, at, known) for operator in plain)]
    if fitting and fitting[0] < opset:
        note = f"export it with opset_version={fitting[0]} by torch's older exporter (dynamo=False), or take tflite-from-onnx"
    else:
        note = "replace the operator, or take tflite-from-onnx, which knows newer ones"
    return SupportReport(supported=False, missing=missing, note=note)


def _has(onnx: Any, operator: str, opset: int, known: Mapping[str, list[int]]) -> bool:
    """Whether onnx-tf has the operator as it is in this operator set."""
    try:
        schema = onnx.defs.get_schema(operator, opset)
    except onnx.defs.SchemaError:
        return False
    return not schema.deprecated and schema.since_version in known.get(operator, [])


def _all_nodes(graph: Any) -> Iterator[tuple[str, str]]:
    """Domain and operator of every node, those of inner graphs too."""
    for node in graph.node:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _all_nodes(inner)
