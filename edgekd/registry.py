"""Names to plug-ins, imported late: what ships with edgekd and what third parties add by entry points, on equal terms."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from edgekd.contracts import Converter, Runtime, Transport
from edgekd.errors import RegistryError, near_names

_GROUPS: Mapping[str, type] = {
    "transports": Transport,
    "runtimes": Runtime,
    "converters": Converter,
}
"""Kind of plug-in to its contract; the entry-point group of a kind is `edgekd.<kind>`."""

_SHIPPED: Mapping[str, Mapping[str, str]] = {
    "transports": {"local": "edgekd.targets.transports.local:LocalTransport"},
    "runtimes": {
        "onnxruntime": "edgekd.targets.runtimes.onnxruntime:OnnxRuntime",
        "litert": "edgekd.targets.runtimes.litert:LiteRt",
        "null": "edgekd.targets.runtimes.null:NullRuntime",
    },
    "converters": {
        "onnx-fp16-from-onnx": "edgekd.converters.onnx_fp16_from_onnx:OnnxFp16FromOnnx",
        "onnx-from-torch": "edgekd.converters.onnx_from_torch:OnnxFromTorch",
        "onnx-legacy-from-torch": "edgekd.converters.onnx_legacy_from_torch:OnnxLegacyFromTorch",
        "prepare-onnx": "edgekd.converters.prepare_onnx:PrepareOnnx",
        "prepare-tflite": "edgekd.converters.prepare_tflite:PrepareTflite",
        "qdq-from-onnx": "edgekd.converters.qdq_from_onnx:QdqFromOnnx",
        "quantized-tflite-from-tflite": "edgekd.converters.quantized_tflite_from_tflite:QuantizedTfliteFromTflite",
        "saved-model-from-keras": "edgekd.converters.saved_model_from_keras:SavedModelFromKeras",
        "saved-model-from-onnx": "edgekd.converters.saved_model_from_onnx:SavedModelFromOnnx",
        "tflite-from-onnx": "edgekd.converters.tflite_from_onnx:TfliteFromOnnx",
        "tflite-from-saved-model": "edgekd.converters.tflite_from_saved_model:TfliteFromSavedModel",
        "tflite-from-torch": "edgekd.converters.tflite_from_torch:TfliteFromTorch",
    },
}


def required_members(contract: type) -> tuple[str, ...]:
    """The public names that a class must have to fulfil `contract`, sorted."""
    names = {name for name in vars(contract) if not name.startswith("_")}
    names |= {name for name in getattr(contract, "__annotations__", {}) if not name.startswith("_")}
    return tuple(sorted(names))


def table(kind: str) -> dict[str, str]:
    """Every known name of a kind with its `module:attribute`.

    Raises:
        RegistryError: the kind is unknown, or two packages want one name.
    """
    if kind not in _GROUPS:
        raise RegistryError(f"there is no kind of plug-in called {kind!r}", found=kind, allowed=near_names(kind, _GROUPS))
    known = dict(_SHIPPED[kind])
    for entry in importlib.metadata.entry_points(group=f"edgekd.{kind}"):
        if known.get(entry.name, entry.value) != entry.value:
            raise RegistryError(
                f"two plug-ins want the name {entry.name!r} among the {kind}",
                found=f"{known[entry.name]} and {entry.value}",
                hint="rename one, or uninstall its package",
                subject=entry.name,
            )
        known[entry.name] = entry.value
    return known


def load(kind: str, name: str) -> Any:
    """The class registered as `name` among the `kind` (`transports`, `runtimes` or `converters`).

    Raises:
        RegistryError: the name is unknown, its module cannot be imported, or the class lacks a member of the contract.
    """
    known = table(kind)
    if name not in known:
        raise RegistryError(f"no plug-in among the {kind} is called {name!r}", found=name, allowed=near_names(name, known), subject=name)
    module_name, _, attribute = known[name].partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise RegistryError(
            f"the plug-in {name!r} cannot be imported",
            found=f"{known[name]}: {error}",
            hint="install what it needs; `edgekd doctor` lists it",
            subject=name,
        ) from error
    declared = set(getattr(found, "__annotations__", {}))
    missing = [member for member in required_members(_GROUPS[kind]) if not hasattr(found, member) and member not in declared]
    if missing:
        raise RegistryError(f"the plug-in {name!r} does not fulfil the contract {_GROUPS[kind].__name__}", found=f"missing: {', '.join(missing)}", subject=name)
    return found
