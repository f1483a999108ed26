"""From a Keras file (.keras) to a SavedModel by TensorFlow, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ModelError
from edgekd.records import Format, Precision

from ._child import WORKERS, limits_of, run_worker, work_folder
from ._saved_model import ENVIRONMENT, described, refuse_quantizing, require_names, store_saved_model, stored_source, tensorflow_python
from ._tflite_edges import check_options


class SavedModelFromKeras:
    """Converts a `.keras` file in inference mode; files of the older format (.h5) and layers with code inside are refused.

    Inputs and outputs take the names of the source's IOSpec: inputs by name (a single one by position), outputs by their keys or in
    their order. TensorFlow is that of this Python (extra `tensorflow`) if it is installed, else that of the environment `tensorflow`.
    Options of the process: `timeout_s` (1800), `memory_mb` (8000), `environments` (folder; asks for the environment).
    """

    name = "saved-model-from-keras"
    source = "keras"
    target = "saved_model"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    environment = ENVIRONMENT
    environment_here = "tensorflow"
    cost_s = 15.0

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The SavedModel in `request.folder`: `saved_model.pb` and the files of its weights.

        Raises:
            ConversionRejected: Keras refuses the file, or its inputs and outputs are not those of the IOSpec.
            MissingEnvironment: TensorFlow is neither here nor in an environment. ConfigError: an unknown option, or a recipe.
            ModelError: the source is no `.keras` artifact.
        """
        check_options(request, self.name, ())
        limits = limits_of(request.options)
        refuse_quantizing(request, self.name)
        source = stored_source(request, Format.KERAS, Precision.FP32, self.name)
        if source.entry.suffix != ".keras":
            raise ModelError(
                "only the format .keras is read, because others can hold code", found=source.record.entry, hint="model.save('model.keras')", subject=self.name
            )
        spec = source.record.iospec
        require_names(request, spec)
        python, where = tensorflow_python(request, "converting a Keras model to SavedModel")
        with work_folder(self.name) as work:
            asked = {
                "model": str(source.entry.resolve()),
                "inputs": described(spec.inputs, None),
                "outputs": [tensor.name for tensor in spec.outputs],
            }
            told = run_worker(WORKERS / "keras_worker.py", asked, python=python, work=work, converter=self.name, limits=limits)
            return store_saved_model(
                Path(told["folder"]),
                request,
                spec,
                graph_version=told["graph_version"],
                converter=self.name,
                producers={**source.record.producers, **told["versions"]},
                metadata={"environment": where},
            )
