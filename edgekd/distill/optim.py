"""The optimizer's parts that are formulas: parameter groups, learning-rate schedule, moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.options import TrainOptions


def parameter_groups(modules: tuple[nn.Module, ...], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: parameters with two axes or more decay; norms, biases and other vectors do not. Frozen parameters are left out.

    Raises:
        ModelError: nothing can be trained.
    """
    unique = {id(value): value for module in modules for value in module.parameters() if value.requires_grad}
    if not unique:
        raise ModelError("the student has no parameter that can be trained", hint="set requires_grad on the parameters that should learn")
    matrices = [value for value in unique.values() if value.ndim > 1]
    vectors = [value for value in unique.values() if value.ndim <= 1]
    return [{"params": params, "weight_decay": decay} for params, decay in ((matrices, weight_decay), (vectors, 0.0)) if params]


def make_optimizer(modules: tuple[nn.Module, ...], options: TrainOptions) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW (Loshchilov and Hutter, arXiv:1711.05101), as the options say."""
    groups = parameter_groups(modules, options.weight_decay)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.learning_rate)
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.momentum > 0.0)


def learning_rate(step: int, steps: int, base: float, warmup_share: float) -> float:
    """The rate of a step (from 0): linear warm-up to `base` over `warmup_share` of all steps, then half a cosine towards 0.

    Source of the cosine: Loshchilov and Hutter, arXiv:1608.03983, one cycle without restart.
    """
    warmup = round(warmup_share * steps)
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Ema:
    """An exponential moving average of weights and float buffers; other buffers are copied.

    The decay after `n` updates is `min(decay, (1 + n) / (10 + n))`, so that the first epochs are not the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def update(self, module: nn.Module, updates: int) -> None:
        """Take in the weights after update number `updates` (from 0)."""
        decay = min(self.decay, (1.0 + updates) / (10.0 + updates))
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    self.values[name].lerp_(value.detach(), 1.0 - decay)
                else:
                    self.values[name].copy_(value)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the average to stored values."""
        for name, value in values.items():
            self.values[name].copy_(value)


@contextmanager
def weights_swapped(module: nn.Module, values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The module with other weights within the block (`None`: with its own)."""
    if values is None:
        yield
        return
    own = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.load_state_dict(values)
    try:
        yield
    finally:
        module.load_state_dict(own)
