"""Outputs of any nesting become tensors named by their key path; one rule, used by every exporter, trainer and check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.errors import ModelError


def flatten_outputs(outputs: Any) -> dict[str, Any]:
    """The leaves of `outputs` by key path, in order.

    A single tensor is `output`; a mapping gives `a` or, nested, `a.b`; a tuple or list gives `output.0`, `output.1`.

    Raises:
        ModelError: there is no leaf, a key is not text, or two leaves get one name.
    """
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                if not isinstance(key, str):
                    raise ModelError("a model's output mapping has a key that is not text", found=repr(key), subject=path)
                walk(value, f"{path}.{key}" if path else key)
        elif isinstance(node, (tuple, list)):
            for position, value in enumerate(node):
                walk(value, f"{path or 'output'}.{position}")
        elif node is not None:
            name = path or "output"
            if name in flat:
                raise ModelError("two outputs of the model get one name", found=name, hint="rename a key of the output mapping")
            flat[name] = node

    walk(outputs, "")
    if not flat:
        raise ModelError("the model returned no tensor", found=type(outputs).__name__)
    return flat


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def to_numpy(value: Any) -> Any:
    """A tensor (of torch or any library with `numpy()`), array or scalar as a numpy array without gradients."""
    import numpy as np

    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        return value.numpy()
    return np.asarray(value)
