"""From a SavedModel to a TFLite file by TensorFlow, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.records import Format, IOSpec, Precision

from ._child import WORKERS, limits_of, run_worker, work_folder
from ._saved_model import ENVIRONMENT, described, fixed_binding, require_names, stored_source, tensorflow_python
from ._tflite_edges import calibration_arrays, check_options, finish, kind_of, one_sample, save_arrays


class TfliteFromSavedModel:
    """Converts the signature `serving_default` with all sizes fixed (a named first axis without a binding becomes 1): fp32, fp16
    (option `precision`), or int8 by a recipe, inputs and outputs float.

    Scheme `static_int8` takes ranges by minmax on the request's calibration inputs, weights per channel; `dynamic_int8` needs none.
    Layouts stay as they are. The file is run on the example; in fp32 it must give what the SavedModel gives. TensorFlow is that of
    this Python (extra `tensorflow`) if it is installed, else that of the environment `tensorflow`. Options of the process:
    `timeout_s` (1800), `memory_mb` (8000), `environments` (folder; asks for the environment).
    """

    name = "tflite-from-saved-model"
    source = "saved_model"
    target = "tflite"
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.FP16, Precision.INT8)
    environment = ENVIRONMENT
    environment_here = "tensorflow"
    needs: Mapping[str, str] = {"ai_edge_litert": "litert"}
    cost_s = 15.0
    precision_options: Mapping[str, Mapping[str, str]] = {"fp16": {"precision": "fp16"}}

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The file `model.tflite` in `request.folder`; the same request gives the same bytes.

        Raises:
            ConversionRejected: TensorFlow refuses the model, or its signature has other names than the IOSpec.
            MissingEnvironment: TensorFlow is neither here nor in an environment. MissingDependency: ai-edge-litert is not installed.
            ConfigError: an option or the recipe asks for what TensorFlow does not do. ModelError: the source is no float32 SavedModel.
        """
        check_options(request, self.name, ("precision",))
        limits = limits_of(request.options)
        source = stored_source(request, Format.SAVED_MODEL, Precision.FP32, self.name)
        kind, precision = kind_of(request, self.name)
        spec = source.record.iospec
        require_names(request, spec)
        binding = fixed_binding(spec)
        python, where = tensorflow_python(request, "converting a SavedModel to TFLite")
        calibration = calibration_arrays(request, spec.inputs, binding, self.name) if kind == "static_int8" else {}
        example = {tensor.name: one_sample(request, tensor, binding) for tensor in spec.inputs}
        with work_folder(self.name) as work:
            asked = {
                "model": str(source.folder.resolve()),
                "kind": kind,
                "per_channel": request.recipe is None or request.recipe.per_channel,
                "inputs": described(spec.inputs, binding),
                "outputs": [tensor.name for tensor in spec.outputs],
                "example": save_arrays(example, work, "example"),
                "calibration": save_arrays(calibration, work, "calibration"),
            }
            told = run_worker(WORKERS / "tflite_worker.py", asked, python=python, work=work, converter=self.name, limits=limits)
            data = Path(told["file"]).read_bytes()
        return finish(
            request,
            data,
            IOSpec(inputs=spec.inputs, outputs=spec.outputs, state=spec.state, static_binding=binding),
            told["borders"],
            precision=precision,
            converter=self.name,
            producers={**source.record.producers, **told["versions"]},
            metadata={"environment": where, "example_error": f"{max(told['errors'].values()):.2e}"},
        )
