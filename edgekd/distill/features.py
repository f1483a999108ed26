"""Feature losses between modules tapped by name; projectors belong to the loss, train with the student and are dropped at export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.distill.losses import FEATURE_WEIGHTS, attention_loss, hint_loss
from edgekd.errors import ModelError, near_names
from edgekd.options import FeaturePair


class FeatureTaps:
    """The outputs of named modules during a forward pass, as a context manager; the hooks are removed when it closes.

    `values` holds the last output per name. Of a tuple or list the first tensor is taken (the sequence of an LSTM).
    """

    def __init__(self, module: nn.Module, names: Sequence[str], *, owner: str) -> None:
        known = dict(module.named_modules())
        for name in names:
            if name not in known or not name:
                raise ModelError(
                    f"the {owner} has no module called {name!r}",
                    found=name,
                    allowed=near_names(name, [other for other in known if other]),
                    hint=f"take a name from {owner}.named_modules()",
                    subject=name,
                )
        self.values: dict[str, Tensor] = {}
        self._modules = {name: known[name] for name in dict.fromkeys(names)}
        self._owner = owner
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureTaps:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks; values that were taken stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = output
            while isinstance(value, (tuple, list)) and value:
                value = value[0]
            if not isinstance(value, Tensor):
                raise ModelError(
                    f"the module {name!r} of the {self._owner} gives no tensor", found=type(output).__name__, hint="tap a module inside it", subject=name
                )
            self.values[name] = value

        return keep

    def taken(self) -> dict[str, Tensor]:
        """The features of the last forward pass.

        Raises:
            ModelError: a tapped module did not run.
        """
        for name in self._modules:
            if name not in self.values:
                raise ModelError(f"the module {name!r} of the {self._owner} did not run in the forward pass", hint="tap a module that runs", subject=name)
        return dict(self.values)


def _tokens(value: Tensor) -> Tensor:
    """`(N, C, H, W)` as tokens `(N, H·W, C)`."""
    return value.flatten(2).transpose(1, 2)


class Projector(nn.Module):
    """Brings student features to the teacher's shape: a 1x1 convolution or linear layer where channels differ (as the regressor
    of FitNets, arXiv:1412.6550), adaptive average pooling of the larger one where sizes differ. Equal shapes pass unchanged.

    Maps `(N, C, H, W)`, tokens `(N, T, D)` and vectors `(N, D)` may be mixed: a map against tokens becomes tokens, anything
    against a vector is averaged over its positions. `(N, C, L)` is told from tokens by the axis on which both agree.
    """

    def __init__(self, student: torch.Size, teacher: torch.Size, *, pair: str) -> None:
        super().__init__()
        self.ranks = (len(student), len(teacher))
        if any(rank not in (2, 3, 4) for rank in self.ranks):
            raise ModelError(
                f"the features of {pair} cannot be compared",
                found=f"student {tuple(student)}, teacher {tuple(teacher)}",
                allowed="(N, C, H, W), (N, T, D) or (N, D)",
                subject=pair,
            )
        self.channels_first = self.ranks == (3, 3) and student[2] == teacher[2] and student[1] != teacher[1]
        mine, other = self._channels(student), self._channels(teacher)
        self.project: nn.Module = nn.Identity()
        if mine != other:
            if self.ranks == (4, 4):
                self.project = nn.Conv2d(mine, other, 1)
            elif self.channels_first:
                self.project = nn.Conv1d(mine, other, 1)
            else:
                self.project = nn.Linear(mine, other)

    def _channels(self, shape: torch.Size) -> int:
        if len(shape) == 4 or self.channels_first:
            return shape[1]
        return shape[-1]

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features in one shape, float32."""
        student, teacher = student.float(), teacher.float()
        if self.ranks == (4, 4):
            size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            pooled = [value if tuple(value.shape[2:]) == size else F.adaptive_avg_pool2d(value, size) for value in (student, teacher)]
            return self.project(pooled[0]), pooled[1]
        if self.channels_first:
            return self.project(student), teacher
        student, teacher = (_tokens(value) if value.ndim == 4 else value for value in (student, teacher))
        if 2 in self.ranks:
            student, teacher = (value.mean(dim=1) if value.ndim == 3 else value for value in (student, teacher))
        elif student.shape[1] != teacher.shape[1]:
            length = min(student.shape[1], teacher.shape[1])
            student, teacher = (F.adaptive_avg_pool1d(value.transpose(1, 2), length).transpose(1, 2) for value in (student, teacher))
        return self.project(student), teacher


class FeatureLoss(nn.Module):
    """The sum of feature losses over pairs of modules. Its parameters (the projectors) join the student's optimizer.

    Build it with the features of one example pass; only shapes are read.
    """

    def __init__(self, pairs: Sequence[FeaturePair], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.weights = tuple(FEATURE_WEIGHTS[pair.kind] if pair.weight is None else pair.weight for pair in self.pairs)
        self.projectors = nn.ModuleList()
        for pair in self.pairs:
            mine, other = student[pair.student], teacher[pair.teacher]
            if pair.kind == "hint":
                self.projectors.append(Projector(mine.shape, other.shape, pair=f"{pair.student} -> {pair.teacher}"))
            else:
                attention_loss(mine, other)
                self.projectors.append(nn.Identity())

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of each pair before its weight, by `<kind>:<student>-><teacher>`, scalars in float32."""
        losses = {}
        for pair, projector in zip(self.pairs, self.projectors, strict=True):
            mine, other = student[pair.student], teacher[pair.teacher]
            losses[feature_name(pair)] = hint_loss(*projector(mine, other)) if pair.kind == "hint" else attention_loss(mine, other)
        return losses


def feature_name(pair: FeaturePair) -> str:
    """How a pair is called in curves: `hint:layer1->layer2`."""
    return f"{pair.kind}:{pair.student}->{pair.teacher}"
