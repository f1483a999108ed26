"""The members of a space as candidates of a search: built once, counted, described by numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from edgekd.contracts import StudentSpace, Tensors
from edgekd.errors import Rejected
from edgekd.records import StudentSpec
from edgekd.search.model import Candidate
from edgekd.search.predictor import choice_features
from edgekd.teachers import tensors_of

if TYPE_CHECKING:
    import torch

Watch: TypeAlias = "Callable[[StudentSpec, torch.nn.Module], AbstractContextManager[object]]"
"""What looks on while a candidate is run: entered around the one run of it, in evaluation mode."""


class Size(NamedTuple):
    """Parameters, and multiply-accumulates of one inference of one sample."""

    parameters: int
    macs: int


def count_size(module: torch.nn.Module, example: Tensors, watch: AbstractContextManager[object] | None = None) -> Size:
    """The size of a module. Multiply-accumulates are those of matrix products and convolutions, as torch's own counter sees them.

    `example` holds one batch per input, batch first, in the order of the module's arguments; one sample of it is run, inside `watch`.

    Raises:
        Rejected: the module does not accept the example.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    inputs = tensors_of({name: value[:1] for name, value in example.items()})
    training = module.training
    module.eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter, watch or nullcontext():
            module(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = {name: tuple(value.shape) for name, value in example.items()}
        raise Rejected("the student does not accept the inputs", found=str(error).splitlines()[0], allowed=f"inputs like {shapes}") from error
    finally:
        module.train(training)
    return Size(sum(parameter.numel() for parameter in module.parameters()), int(counter.get_total_flops()) // 2)


def describe_candidates(space: StudentSpace, example: Tensors, seed: int, watch: Watch | None = None) -> tuple[tuple[Candidate, ...], dict[str, str]]:
    """The candidates of a space, and the members that cannot be built: label -> reason.

    The capacity is the geometric mean of parameters and multiply-accumulates; the predictor sees the choices, both counts and
    how far widths miss the multiples of 8 and 16. Every member is built once with untrained weights and thrown away;
    `watch` looks on while it is run.
    """
    specs: list[StudentSpec] = []
    sizes: list[Size] = []
    rejected: dict[str, str] = {}
    for spec in space.candidates(seed):
        try:
            module = space.build(spec, seed)
            size = count_size(module, example, watch and watch(spec, module))
        except Rejected as error:
            rejected[spec.label()] = str(error)
        else:
            specs.append(spec)
            sizes.append(size)
    return make_candidates(specs, sizes), rejected


def make_candidates(specs: Sequence[StudentSpec], sizes: Sequence[Size]) -> tuple[Candidate, ...]:
    """Candidates for specs of known size, in their order."""
    costs = {"params": [float(size.parameters) for size in sizes], "macs": [float(size.macs) for size in sizes]}
    rows = choice_features(specs, costs)
    return tuple(
        Candidate(spec=spec, capacity=max(1.0, (float(size.parameters) * max(size.macs, 1)) ** 0.5), features=row)
        for spec, size, row in zip(specs, sizes, rows, strict=True)
    )
