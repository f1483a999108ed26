"""What kind of network a torch module is, before there is a file of it: seen while it runs once, in the words of `structure`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgekd.contracts import Tensors
from edgekd.quantize.structure import Op, Structure, counted
from edgekd.teachers import accepted, evaluating, tensors_of

if TYPE_CHECKING:
    import torch

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"})
_ROLES: Mapping[str, str] = {"_softmax": "softmax", "_safe_softmax": "softmax", "tanh": "tanh"}
_BETWEEN = frozenset({
    "_to_copy", "_unsafe_view", "add", "alias", "clamp", "clone", "detach", "div", "expand", "masked_fill", "mul", "permute", "reshape", "squeeze",
    "sub", "t", "transpose", "unsqueeze", "view", "where",
})  # fmt: skip


def module_structure(module: torch.nn.Module, inputs: Tensors) -> Structure:
    """The structure of a module, found by running it on the first sample: `inputs` holds one batch per input in the order of its arguments.

    `ops` holds the names that its convolutions have in TFLite. A recurrent layer of torch is one recurrence, however its steps are computed.

    Raises:
        ModelError: the module does not run on the sample.
    """
    import torch
    from torch.utils import _pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    ops: list[Op] = []
    kinds: set[str] = set()
    held: list[torch.Tensor] = []  # their ids name them: none may be freed and used again
    weights = {id(tensor): f"weight {name}" for name, tensor in module.state_dict(keep_vars=True).items()}
    first = {name: value[:1] for name, value in inputs.items()}
    arguments = tensors_of(first)
    computed = {id(tensor) for tensor in arguments}

    class Note(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Notes each operator with what it reads and gives; what is made of constants alone is a constant under the name of the first of them."""

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            given = [leaf for leaf in _pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
            made = func(*args, **(kwargs or {}))
            results = [leaf for leaf in _pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            held.extend((*given, *results))
            variable = tuple(str(id(tensor)) for tensor in given if id(tensor) in computed)
            constant = tuple(weights.get(id(tensor), str(id(tensor))) for tensor in given if id(tensor) not in computed)
            if not variable:
                weights.update({id(tensor): constant[0] for tensor in results if constant})
                return made
            computed.update(id(tensor) for tensor in results)
            name = str(func.overloadpacket).removeprefix("aten.").removesuffix("_")
            if name == "convolution":
                role, kind = _convolution(args)
                kinds.add(kind)
            elif name in _PRODUCTS:
                role = "product" if len(variable) > 1 else "dense"
            elif "scaled_dot_product" in name:
                role = "attention"
            else:
                role = _ROLES.get(name, "between" if name in _BETWEEN else "other")
            ops.append(Op(role, variable, tuple(str(id(tensor)) for tensor in results), constant))
            return made

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that hides the attention of an encoder layer
    try:
        with evaluating(module), accepted("the module", type(module).__name__, first), torch.no_grad(), Note():  # type: ignore[no-untyped-call]
            module(*arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    recurrent = sum(isinstance(part, (torch.nn.RNNBase, torch.nn.RNNCellBase)) for part in module.modules())
    return counted(ops, frozenset(kinds), recurrent)


def _convolution(args: tuple[Any, ...]) -> tuple[str, str]:
    """The role of a call of `aten.convolution`, and its operator in TFLite."""
    weight, transposed, groups = args[1], args[6], args[8]
    window = any(size > 1 for size in weight.shape[2:])
    if weight.ndim > 4:
        return "convolutions", "CONV_3D"
    if transposed:
        return "convolutions", "TRANSPOSE_CONV"
    if groups > 1 and weight.shape[1] == 1:
        return "depthwise", "DEPTHWISE_CONV_2D"
    return "convolutions" if window else "pointwise", "CONV_2D"
