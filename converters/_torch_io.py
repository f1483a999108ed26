"""What the converters from torch share: the caller's module copied, and run once on its example."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from edgekd.errors import ConversionRejected, ModelError
from edgekd.teachers import MODEL_ERRORS
from edgekd.tree import flatten_outputs

from ._onnx_io import last_message

if TYPE_CHECKING:
    import torch


def copy_module(source: torch.nn.Module) -> torch.nn.Module:
    """A copy in evaluation mode, in float32, on the CPU.

    Raises:
        ConversionRejected: the module cannot be copied.
    """
    try:
        module = copy.deepcopy(source)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConversionRejected("the module cannot be copied", found=last_message(error), hint="keep no tensors of a graph on the module") from error
    return module.eval().cpu().float()


def module_outputs(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The module's outputs by key path, in order.

    Raises:
        ConversionRejected: the module fails on its example, or an output is no tensor.
    """
    import torch

    try:
        with torch.no_grad():
            outputs = flatten_outputs(module(*arguments))
    except ModelError:
        raise
    except MODEL_ERRORS as error:
        shapes = [tuple(argument.shape) for argument in arguments]
        raise ConversionRejected(
            "the module fails on its example inputs",
            found=last_message(error),
            hint=f"check the order and shapes of its inputs: {shapes}",
            subject=type(module).__name__,
        ) from error
    for name, value in outputs.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionRejected(f"the output {name!r} is no tensor", found=type(value).__name__, hint="return tensors only", subject=name)
    return outputs
