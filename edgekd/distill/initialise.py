"""A student that starts from its teacher: tensors of the same name and shape, and evenly spaced blocks of a deeper trunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distill.record import InitReport
from edgekd.errors import ModelError, near_names


def _copy(student: nn.Module, teacher: nn.Module, names: Mapping[str, str]) -> InitReport:
    """Copy the student's tensors from the teacher's, by `names` (student's to teacher's); what does not match is left and listed."""
    mine, other = student.state_dict(), teacher.state_dict()
    copied: dict[str, str] = {}
    left: dict[str, str] = {}
    values = 0
    with torch.no_grad():
        for name, tensor in mine.items():
            source = names.get(name)
            if source is None or source not in other:
                left[name] = "the teacher has no tensor of this name" if source is None else f"the teacher has no tensor {source!r}"
            elif other[source].shape != tensor.shape:
                left[name] = f"shape {tuple(tensor.shape)}, the teacher's {tuple(other[source].shape)}"
            else:
                tensor.copy_(other[source])
                copied[name] = source
                values += tensor.numel()
    total = sum(tensor.numel() for tensor in mine.values())
    return InitReport(copied=copied, left=left, share=values / total if total else 0.0)


def initialise_from_teacher(student: nn.Module, teacher: nn.Module) -> InitReport:
    """What was copied into `student` (in place) from `teacher`: every parameter and buffer of equal name and shape."""
    names = teacher.state_dict().keys()
    return _copy(student, teacher, {name: name for name in student.state_dict() if name in names})


def spaced_indices(few: int, many: int) -> tuple[int, ...]:
    """`few` of the indices 0 to `many - 1`, evenly spaced, the first and the last among them; all in order if `few >= many`.

    One block is the first: it is the one that changes width and resolution in residual trunks.
    """
    if few >= many:
        return tuple(range(many))
    if few == 1:
        return (0,)
    return tuple((2 * number * (many - 1) + few - 1) // (2 * (few - 1)) for number in range(few))


def _container(module: nn.Module, name: str, owner: str) -> list[str]:
    known = dict(module.named_modules())
    if name not in known:
        raise ModelError(f"the {owner} has no module called {name!r}", found=name, allowed=near_names(name, [other for other in known if other]), subject=name)
    blocks = [child for child, _ in known[name].named_children()]
    if not blocks:
        raise ModelError(f"the {owner}'s module {name!r} holds no blocks", found=type(known[name]).__name__, allowed="Sequential or ModuleList", subject=name)
    return blocks


def evenly_spaced_blocks(student: nn.Module, teacher: nn.Module, container_names: Sequence[str]) -> InitReport:
    """What was copied into a student with the same trunk but fewer blocks in some containers.

    Each container (an `nn.Sequential` or `nn.ModuleList`, for example `["stage1", "stage2"]`) of the student takes evenly spaced
    blocks of the teacher's; everything else is copied by name. Tensors whose shapes differ are left, and listed with the reason.

    Raises:
        ModelError: one of the models has no such container.
    """
    renamed: dict[str, str] = {}
    for container in container_names:
        mine, other = _container(student, container, "student"), _container(teacher, container, "teacher")
        for block, position in zip(mine, spaced_indices(len(mine), len(other)), strict=False):
            renamed[f"{container}.{block}."] = f"{container}.{other[position]}."
    known = teacher.state_dict().keys()
    names: dict[str, str] = {}
    for name in student.state_dict():
        prefix = max((old for old in renamed if name.startswith(old)), key=len, default="")
        if prefix:
            names[name] = renamed[prefix] + name[len(prefix) :]
        elif name in known and not any(name.startswith(f"{container}.") for container in container_names):
            names[name] = name
    return _copy(student, teacher, names)


def initialise_student(student: nn.Module, teacher: nn.Module, hook: Callable[[nn.Module, nn.Module], Any] | None = None) -> InitReport:
    """What the student took over: by the user's `hook(student, teacher)`, which changes the student in place, or by name and shape.

    After a hook the report lists the tensors that it changed; where they came from is the hook's own matter (`"(hook)"`).
    """
    if hook is None:
        return initialise_from_teacher(student, teacher)
    before: dict[str, Tensor] = {name: value.detach().clone() for name, value in student.state_dict().items()}
    hook(student, teacher)
    after = student.state_dict()
    if {name: value.shape for name, value in after.items()} != {name: value.shape for name, value in before.items()}:
        raise ModelError("the init hook changed the student's architecture", hint="a hook copies values into the student's tensors, in place")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    total = sum(value.numel() for value in after.values())
    return InitReport(
        copied={name: "(hook)" for name in after if name in changed},
        left={name: "not changed by the hook" for name in after if name not in changed},
        share=sum(after[name].numel() for name in changed) / total if total else 0.0,
    )
