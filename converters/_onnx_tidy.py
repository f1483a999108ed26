"""What the converters that write float ONNX files do last: batch norms folded and proven equal, idle nodes and weights removed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekd.benching import random_inputs
from edgekd.contracts import Array, Tensors
from edgekd.models.onnx_batchnorm import Folded, fold_batch_norms
from edgekd.models.onnx_file import count_ops, depth_of, iospec_of, name_nodes, require_onnx
from edgekd.models.onnx_trim import trim
from edgekd.parity.compare import compare_hop
from edgekd.records import HopParity, IOSpec, Precision
from edgekd.teachers import MODEL_ERRORS, ort_errors

from ._onnx_io import last_message, plain_session


class _NotRun(Exception):
    """The model cannot be run here; the text says by what and why."""


def tidy(model: Any, iospec: IOSpec, example: Tensors) -> tuple[Any, dict[str, str]]:
    """The model without idle nodes and with its batch norms folded, and metadata about both.

    Every fold is proven: the model is run before and after on the first sample of the example (where an input is missing there, on a seeded
    random one) and must agree within the tolerance of float32 at its depth (`edgekd.parity.compare.tolerance_for`). One that does not agree
    is taken back, and none is made where the model itself does not run here. `batch_normalizations` counts those that are left,
    `batch_norms_left` names them with their reasons (JSON), `batch_norms_folded` counts the others, `batch_norm_error` is the largest error of
    the outputs and what was allowed.
    """
    removed = trim(model)
    if not count_ops(model, {"BatchNormalization"}):
        return model, {"batch_normalizations": "0", "batch_norms_folded": "0", **removed.metadata()}
    made, folded, parity = _folded(model, iospec, example)
    removed_after = trim(made)
    found = {
        "batch_normalizations": str(count_ops(made, {"BatchNormalization"})),
        "batch_norms_folded": str(len(folded.done)),
        **removed.metadata(),
        "removed_weights": str(removed.weights + removed_after.weights),
    }
    if folded.left:
        found["batch_norms_left"] = json.dumps([list(item) for item in folded.left])
    if parity is not None:
        worst = max(parity.tensors, key=lambda tensor: tensor.max_rel)
        found["batch_norm_error"] = f"{worst.max_rel:.1e} of the largest value, {worst.tolerance:.1e} is allowed"
    return made, found


def _folded(model: Any, iospec: IOSpec, example: Tensors) -> tuple[Any, Folded, HopParity | None]:
    """The model with all folds that keep its outputs, and how the outputs compare; no comparison where nothing was folded."""
    name_nodes(model)
    before: Mapping[str, Array] | None = None
    skip: set[str] = set()
    while True:
        made = type(model)()
        made.CopyFrom(model)
        folded = fold_batch_norms(made, skip=skip)
        if not folded.done:
            return made, folded, None
        feeds = _feeds(model, iospec, example)
        try:
            before = before or _run(model, feeds)
            parity = compare_hop("batch norms folded", before, _run(made, feeds), precision=Precision.FP32, depth=depth_of(model))
            if parity.passed:
                return made, folded, parity
            alone = {name for name in folded.done if len(folded.done) > 1 and _alone(model, name, folded.done, skip, before, feeds)}
        except _NotRun as reason:
            return model, Folded((), (*folded.left, *((name, f"folding it cannot be proven: {reason}") for name in folded.done))), None
        skip |= (set(folded.done) - alone) or set(folded.done)


def _alone(model: Any, name: str, done: tuple[str, ...], skip: set[str], before: Mapping[str, Array], feeds: Tensors) -> bool:
    """Whether folding this one alone keeps the outputs."""
    made = type(model)()
    made.CopyFrom(model)
    fold_batch_norms(made, skip=skip | (set(done) - {name}))
    return compare_hop(name, before, _run(made, feeds), precision=Precision.FP32, depth=depth_of(model)).passed


def _feeds(model: Any, iospec: IOSpec, example: Tensors) -> dict[str, Array]:
    """One sample for every input of the model."""
    spec = iospec_of(model, iospec)
    made = random_inputs(spec, samples=1, seed=0)
    for tensor in spec.inputs:
        given = example.get(tensor.name)
        if given is not None and np.ndim(given) == len(tensor.shape) and len(given):
            made[tensor.name] = np.ascontiguousarray(np.asarray(given)[:1].astype(tensor.dtype))
    return {
        tensor.name: np.repeat(made[tensor.name], tensor.shape[0], axis=0) if tensor.shape and isinstance(tensor.shape[0], int) else made[tensor.name]
        for tensor in spec.inputs
    }


def _run(model: Any, feeds: Tensors) -> dict[str, Array]:
    """All outputs with a sample axis, by onnxruntime without its own optimizations, else by ONNX's evaluator.

    Raises:
        _NotRun: an operator has no kernel, or refuses its inputs.
    """
    names = [item.name for item in model.graph.output]
    if importlib.util.find_spec("onnxruntime") is not None:
        try:
            found = plain_session(model).run(names, dict(feeds))
        except ort_errors() as error:
            raise _NotRun(f"onnxruntime does not run the model ({last_message(error)})") from error
    else:
        require_onnx("running an ONNX model")
        from onnx.reference import ReferenceEvaluator

        try:
            found = ReferenceEvaluator(model).run(names, dict(feeds))
        except MODEL_ERRORS as error:
            raise _NotRun(f"ONNX's evaluator does not run the model ({last_message(error)})") from error
    return {name: np.atleast_1d(np.asarray(value)) for name, value in zip(names, found, strict=True)}
