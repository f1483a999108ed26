"""A TFLite file made ready for quantization: every tensor has a name of its own, and the metadata says what to observe."""

from __future__ import annotations

from collections.abc import Mapping

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, ModelError
from edgekd.models.notes import carried_notes, free_notes
from edgekd.models.tflite_artifact import read_notes, store_tflite
from edgekd.models.tflite_file import ensure_signature, load_model, unique_tensor_names
from edgekd.records import Format, Precision


class PrepareTflite:
    """Gives tensors names of their own and the file a signature; changes no numbers.

    Metadata: `tensors` and `ops` are JSON: what calibration observes (elements per sample, -1 unknown) and which operators can stay
    in float (`[name, operator]`; an operator is called by its first output tensor); `renamed_tensors` counts the new names.
    """

    name = "prepare-tflite"
    source = "tflite"
    target = "tflite"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    needs: Mapping[str, str] = {"ai_edge_litert": "litert"}
    cost_s = 1.0

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The prepared file in `request.folder`; a source that is prepared already is copied there.

        Raises:
            ConversionRejected: the model is not float32.
            ConfigError: an option. ModelError: the source is no TFLite artifact. MissingDependency: ai-edge-litert is not installed.
        """
        if request.options:
            raise ConfigError(f"prepare-tflite has no option {min(request.options)!r}", allowed="(none)", subject=min(request.options))
        source = request.source
        if not isinstance(source, StoredArtifact) or source.record.format is not Format.TFLITE:
            raise ModelError("the quantizer takes a TFLite artifact", found=type(source).__name__, subject=self.name)
        if source.record.precision is not Precision.FP32:
            raise ConversionRejected("only a float32 model can be quantized", found=source.record.precision.value, allowed="fp32", subject=self.name)
        model = load_model(source.entry)
        signed, renamed = ensure_signature(model), unique_tensor_names(model)
        if not signed and not renamed and {"tensors", "ops"} <= set(source.record.metadata):
            return source.copy_to(request.folder)
        return store_tflite(
            model,
            request.folder,
            precision=Precision.FP32,
            like=source.record.iospec,
            converter=self.name,
            producers=source.record.producers,
            parent=source.record.content_hash(),
            metadata={"renamed_tensors": str(renamed)},
            notes={**free_notes(read_notes(model)), **carried_notes(request)},
        )
