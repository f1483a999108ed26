"""How many transpositions a converted file may hold: what the model itself asks for, and one at each border where the layout turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Tensors
from edgekd.errors import ConfigError, ConversionRejected
from edgekd.models.layout import LayoutOps, layout_ops
from edgekd.records import Format, IOSpec
from edgekd.teachers import accepted, evaluating, tensors_of

if TYPE_CHECKING:
    import torch

_IMAGE_RANK = 4
_BORDERS = 2
_SHOWN = 8


@dataclass(frozen=True)
class Bound:
    """At most `limit` transpositions; `why` says where the number comes from."""

    limit: int
    why: str


def check_limit(limit: int | None) -> None:
    """Refuse a bound that is none.

    Raises:
        ConfigError: it is negative or no whole number.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise ConfigError("the bound of transpositions is no number of operators", found=limit, allowed="0 or more", subject="max_transposes")


def asked_bound(limit: int) -> Bound:
    """The bound that the user asks for."""
    return Bound(limit, "as asked by max_transposes")


def module_bound(module: torch.nn.Module, inputs: Tensors, iospec: IOSpec) -> Bound:
    """The bound for a file made from a torch module: found by running it on the first sample and counting.

    Allowed are the module's own permutations (heads of attention need them; one more for each fused attention, which holds one inside),
    one for each place where an image becomes a vector or back, since channel-last memory is flattened in another order, and those at
    the borders: two, or one for each input and output of rank 3 or more where there are more of them.

    Raises:
        ModelError: the module does not take the sample.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    permutes = crossings = 0

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts what moves axes. Weights of a linear layer are transposed by `t`, which is not counted."""

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            nonlocal permutes, crossings
            made = func(*args, **(kwargs or {}))
            name = str(func.overloadpacket).removeprefix("aten.")
            if name in ("permute", "transpose", "movedim", "swapaxes") or "scaled_dot_product" in name:
                permutes += 1
            elif name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "mean", "squeeze", "unsqueeze"):
                crossings += _crosses(args[0], made)
            return made

    first = {tensor.name: inputs[tensor.name][:1] for tensor in iospec.inputs}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that hides the permutations of an encoder layer
    try:
        with evaluating(module), torch.no_grad(), accepted("the module", type(module).__name__, first), Count():  # type: ignore[no-untyped-call]
            module(*tensors_of(first))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return _bound(permutes, crossings, iospec)


def _crosses(source: Any, made: Any) -> bool:
    """Whether an image with more than one pixel becomes something of another rank, or the other way."""
    ranks = {getattr(source, "ndim", 0), getattr(made, "ndim", 0)}
    image = source if getattr(source, "ndim", 0) == _IMAGE_RANK else made
    return _IMAGE_RANK in ranks and len(ranks) > 1 and image.numel() > image.shape[0] * image.shape[1]


def onnx_bound(artifact: StoredArtifact) -> Bound:
    """The bound for a file made from an ONNX file: its own transpositions, places where the rank changes, and the borders."""
    found = layout_of(artifact)
    return _bound(len(found.moving), len(found.renaming), artifact.record.iospec)


def _bound(permutes: int, crossings: int, iospec: IOSpec) -> Bound:
    borders = max(_BORDERS, sum(len(tensor.shape) >= 3 for tensor in (*iospec.inputs, *iospec.outputs)))
    parts = f"{permutes} of the model's own, {crossings} where its tensors change their rank, {borders} at its borders"
    return Bound(permutes + crossings + borders, parts)


def layout_of(artifact: StoredArtifact) -> LayoutOps:
    """The layout operators of an ONNX or TFLite artifact."""
    if artifact.record.format is Format.TFLITE:
        from edgekd.models.tflite_file import load_model as load_tflite
        from edgekd.models.tflite_file import named_ops as tflite_ops

        return layout_ops(tflite_ops(load_tflite(artifact.entry)))
    from edgekd.models.onnx_file import load_model, named_ops

    return layout_ops(named_ops(load_model(artifact.entry)))


def require_bound(made: StoredArtifact, bound: Bound, converter: str) -> None:
    """Refuse a file with more transpositions than the bound.

    Raises:
        ConversionRejected: names the count, the operators and what removes them.
    """
    told = made.record.metadata.get("transposes")
    if told is not None and int(told) <= bound.limit:
        return
    names = layout_of(made).moving
    count = len(names)
    if count <= bound.limit:
        return
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    ways = ["take another road with via", f"allow them with max_transposes={count} (--max-transposes {count})"]
    if converter == "tflite-from-torch" and made.record.metadata.get("channel_last") != "true":
        ways.insert(0, "take images channel-last: options={'tflite-from-torch': {'channel_last': True}} (--channel-last)")
    raise ConversionRejected(
        f"the {made.record.format.value} file moves whole tensors through memory in {count} transpositions",
        found=shown,
        allowed=f"{bound.limit}: {bound.why}",
        hint="; or ".join(ways),
        subject=made.record.entry,
    )
