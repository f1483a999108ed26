"""Modules that round activations and weights to int8 and back while gradients pass, with activation ranges that are observed, then learned."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import ConfigError
from edgekd.quantize.recipes import Scheme

_MOMENTUM = 0.9
"""Share of the old range that a warm-up batch keeps."""

_STEPS = 255
_SYMMETRIC_BOUND = 127
_TINY = 1e-12


class Phase(str, Enum):
    """What fake quantization does. `off`: nothing. `observe`: rounds, and ranges follow the training batches by an exponential moving average.
    `learn`: rounds, and ranges are trained. `freeze`: rounds with constants, which is what exporters write out."""

    OFF = "off"
    OBSERVE = "observe"
    LEARN = "learn"
    FREEZE = "freeze"


def _rounded(values: Tensor) -> Tensor:
    """Rounded half to even; the gradient passes straight through (Bengio et al., arXiv:1308.3432)."""
    return values + (values.round() - values).detach()


class FakeQuantize(nn.Module):
    """One tensor in 8 bits, per tensor: symmetric with zero point 0, or with 255 steps between two ends with zero among them.

    The ends are learned as logarithms of their magnitude, so that they keep their sign (Jain et al., "Trained Quantization Thresholds",
    arXiv:1903.08066). With straight-through rounding the gradient of the step is that of LSQ, and scaled as there by one over the square root
    of elements times levels (Esser et al., arXiv:1902.08153); the lower end follows as the offset of LSQ+ does (Bhalgat et al., arXiv:2004.09576).
    An end at zero stays there: a tensor behind a ReLU has no values below.
    """

    log_low: nn.Parameter
    log_high: nn.Parameter
    below: Tensor
    above: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.symmetric, self.signed = scheme.symmetric_activations, scheme.signed_activations
        self.phase = Phase.OBSERVE
        self.log_low, self.log_high = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.register_buffer("below", torch.ones(()))
        self.register_buffer("above", torch.ones(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def set_range(self, low: float, high: float) -> None:
        """Start from a range; zero is taken in, and an empty range becomes 0 to 1.

        Raises:
            ConfigError: the ends are not finite, or in the wrong order.
        """
        if not (float("-inf") < low <= high < float("inf")):
            raise ConfigError("an activation range needs two finite ends in order", found=(low, high))
        least, most = max(-low, 0.0), max(high, 0.0)
        if self.symmetric:
            least = most = max(least, most)
        if least == most == 0.0:
            most, least = 1.0, 1.0 if self.symmetric else 0.0
        with torch.no_grad():
            for end, log, there in ((least, self.log_low, self.below), (most, self.log_high, self.above)):
                there.fill_(float(end > 0.0))
                log.fill_(float(torch.log(torch.tensor(max(end, _TINY), dtype=torch.float64))))
            self._settle()

    def ends(self) -> tuple[float, float]:
        """Lowest and highest value that the 8 bits represent, zero exactly among the steps: what a converter takes as the tensor's range."""
        with torch.no_grad():
            step, zero = self._grid(1.0)
        if self.symmetric:
            return -float(step) * _SYMMETRIC_BOUND, float(step) * _SYMMETRIC_BOUND
        return -float(zero) * float(step), (_STEPS - float(zero)) * float(step)

    def forward(self, values: Tensor, track: bool = True) -> Tensor:
        """The values as 8 bits represent them. With `track` false a warm-up does not look at them: another place has the same range."""
        if self.phase is Phase.OFF:
            return values
        if self.phase is Phase.FREEZE:
            least = -128 if self.signed else 0
            frozen: Tensor = torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, least, least + _STEPS)
            return frozen
        if self.phase is Phase.OBSERVE and self.training and track:
            self._follow(values.detach())
        step, zero = self._grid((values[0].numel() * _SYMMETRIC_BOUND) ** -0.5 if values.ndim else 1.0)
        if self.phase is Phase.OBSERVE:
            step, zero = step.detach(), zero.detach()
        least, most = (-_SYMMETRIC_BOUND - 1, _SYMMETRIC_BOUND) if self.symmetric else (0, _STEPS)
        made: Tensor = (torch.clamp(_rounded(values / step) + zero, least, most) - zero) * step
        return made

    def set_phase(self, phase: Phase) -> None:
        """Go over to a phase; freezing takes the ranges as they are."""
        self.phase = phase
        self._settle()

    def _grid(self, gradient: float) -> tuple[Tensor, Tensor]:
        """Step and zero point as the ends give them; gradients of the ends are scaled by `gradient`."""
        low, high = (log * gradient + (log * (1.0 - gradient)).detach() for log in (self.log_low, self.log_high))
        if self.symmetric:
            return torch.exp(high) / _SYMMETRIC_BOUND, torch.zeros_like(high)
        least, most = torch.exp(low) * self.below, torch.exp(high) * self.above
        step = (least + most) / _STEPS
        return step, _rounded(least / step)

    def _follow(self, values: Tensor) -> None:
        low, high = self.ends()
        kept = _MOMENTUM
        self.set_range(kept * low + (1 - kept) * min(float(values.min()), 0.0), kept * high + (1 - kept) * max(float(values.max()), 0.0))

    def _settle(self) -> None:
        with torch.no_grad():
            step, zero = self._grid(1.0)
            self.scale.copy_(step)
            self.zero_point.copy_(zero - (128 if self.signed and not self.symmetric else 0))


WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
"""Layers whose weights are rounded."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class QuantWeighted(nn.Module):
    """A convolution or linear layer whose weight is rounded to symmetric int8, one scale for each output channel.

    The scale follows the weight's largest magnitude, which is how the quantizers of edgekd take it from the trained float weight, so that
    both roads give the same integers. The bias stays in float: its 32 bits lose nothing that 8 bits show.
    """

    def __init__(self, layer: nn.Module, scheme: Scheme) -> None:
        super().__init__()
        self.layer = layer
        self.phase = Phase.OBSERVE
        self.bound = 64 if scheme.reduced_weights else _SYMMETRIC_BOUND
        self.axis = 1 if isinstance(layer, _TRANSPOSED) else 0
        self.register_buffer("scale", self._scale().clone())

    @property
    def weight(self) -> Tensor:
        """The weight that is trained, not rounded."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)  # the layers of WEIGHTED have one
        return weight

    def rounded(self) -> Tensor:
        """The weight as int8 represents it."""
        if self.phase is Phase.OFF:
            return self.weight
        if self.phase is Phase.FREEZE:
            scale = self.get_buffer("scale")
            zeros = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
            frozen: Tensor = torch.fake_quantize_per_channel_affine(self.weight, scale, zeros, self.axis, -128, 127)
            return frozen
        shape = [1] * self.weight.ndim
        shape[self.axis] = -1
        scale = self._scale().reshape(shape)
        return _rounded(self.weight / scale) * scale

    def forward(self, values: Tensor) -> Tensor:
        """The layer's output with the rounded weight."""
        layer, weight = self.layer, self.rounded()
        if isinstance(layer, nn.Linear):
            return F.linear(values, weight, layer.bias)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
            made: Tensor = convolve(values, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            return made
        assert isinstance(layer, _TRANSPOSED)
        spread = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
        assert not isinstance(layer.padding, str)  # transposed convolutions know numbers only
        out: Tensor = spread(values, weight, layer.bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return out

    def set_phase(self, phase: Phase) -> None:
        """Go over to a phase; freezing takes the weights as they are."""
        self.phase = phase
        self.get_buffer("scale").copy_(self._scale())

    def _scale(self) -> Tensor:
        """A constant of each step: gradients pass through the division and the product alone."""
        weight = self.weight.detach()
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        largest = weight.abs().amax(dim=others)
        return torch.where(largest > 0, largest, torch.ones_like(largest)) / self.bound


def quantizable(layer: nn.Module) -> bool:
    """Whether the layer is one whose weight is rounded here: padding with other values than zeros is not, nor grouped transposed convolutions."""
    if not isinstance(layer, WEIGHTED):
        return False
    if isinstance(layer, _TRANSPOSED) and layer.groups > 1:
        return False
    return getattr(layer, "padding_mode", "zeros") == "zeros"
