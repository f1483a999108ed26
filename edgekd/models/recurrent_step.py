"""One step of a recurrent network in torch: layers that are given their state and give it back, and the module around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from edgekd.tree import flatten_outputs

States = tuple[torch.Tensor, ...]


class Slot:
    """What a layer is given before the network runs, and what it has taken when the network ended: states `(batch, layers, hidden)`.

    No module and no tensor, so that exporters take it for what it is: a value that is handed through.
    """

    __slots__ = ("given", "taken")

    def __init__(self) -> None:
        self.given: States = ()
        self.taken: States = ()


class _Step:
    """Mixed into a layer: it starts from the state in its slot, whatever the network passes, and leaves the new one there."""

    def _step(self, values: torch.Tensor, whole: Any) -> tuple[torch.Tensor, Any]:
        layer = cast(nn.RNNBase, self)
        slot: Slot = vars(self)["slot"]
        given = tuple(state.transpose(0, 1) for state in slot.given)
        if vars(self)["written_out"]:
            output, taken = written_out(layer, values, given)
        else:
            output, new = whole(values, given if len(given) > 1 else given[0])
            taken = new if isinstance(new, tuple) else (new,)
        slot.taken = tuple(state.transpose(0, 1) for state in taken)
        return output, taken if len(taken) > 1 else taken[0]


class StepLSTM(_Step, nn.LSTM):
    """A `torch.nn.LSTM` with its state in a slot."""

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """As the layer's own."""
        return self._step(input, super().forward)


class StepGRU(_Step, nn.GRU):
    """A `torch.nn.GRU` with its state in a slot."""

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """As the layer's own."""
        return self._step(input, super().forward)


class StepRNN(_Step, nn.RNN):
    """A `torch.nn.RNN` with its state in a slot."""

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """As the layer's own."""
        return self._step(input, super().forward)


STEPS: Mapping[type[nn.Module], type[nn.Module]] = {nn.LSTM: StepLSTM, nn.GRU: StepGRU, nn.RNN: StepRNN}
"""Layer to what it becomes in a cell."""


def make_step(layer: nn.RNNBase, *, written: bool) -> None:
    """Turn a layer of one of the kinds in `STEPS`, in place, into one that has its state in a slot; `written`: as matrix products."""
    layer.__class__ = STEPS[type(layer)]  # type: ignore[assignment]
    vars(layer)["slot"], vars(layer)["written_out"] = Slot(), written


def state_sizes(layer: nn.RNNBase) -> dict[str, tuple[int, int]]:
    """The states of a layer, `h` and for an LSTM `c`, with their sizes `(layers, hidden)`."""
    sizes = {"h": (layer.num_layers, layer.proj_size or layer.hidden_size)}
    return sizes | ({"c": (layer.num_layers, layer.hidden_size)} if isinstance(layer, nn.LSTM) else {})


def written_out(layer: nn.RNNBase, values: torch.Tensor, given: States) -> tuple[torch.Tensor, States]:
    """One step by the equations in torch's documentation of LSTM, GRU and RNN; states `(layers, batch, hidden)`."""
    axis = 1 if layer.batch_first else 0
    x = values.squeeze(axis)
    taken: list[States] = []
    for number in range(layer.num_layers):
        h = given[0][number]
        from_x, from_h = (_linear(layer, source, name, number) for source, name in ((x, "ih"), (h, "hh")))
        if isinstance(layer, nn.LSTM):
            into, keep, new, out = (from_x + from_h).chunk(4, 1)
            c = torch.sigmoid(keep) * given[1][number] + torch.sigmoid(into) * torch.tanh(new)
            h = torch.sigmoid(out) * torch.tanh(c)
            if layer.proj_size:
                h = functional.linear(h, layer.get_parameter(f"weight_hr_l{number}"))
            taken.append((h, c))
        elif isinstance(layer, nn.GRU):
            (reset_x, update_x, new_x), (reset_h, update_h, new_h) = from_x.chunk(3, 1), from_h.chunk(3, 1)
            update = torch.sigmoid(update_x + update_h)
            h = (1.0 - update) * torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h) + update * h
            taken.append((h,))
        else:
            h = torch.relu(from_x + from_h) if getattr(layer, "nonlinearity", "tanh") == "relu" else torch.tanh(from_x + from_h)
            taken.append((h,))
        x = h
    return x.unsqueeze(axis), tuple(torch.stack(states) for states in zip(*taken, strict=True))


def _linear(layer: nn.RNNBase, values: torch.Tensor, name: str, number: int) -> torch.Tensor:
    bias = layer.get_parameter(f"bias_{name}_l{number}") if layer.bias else None
    return functional.linear(values, layer.get_parameter(f"weight_{name}_l{number}"), bias)


class Cell(nn.Module):
    """A network for one step: inputs without their time axis, then the states; outputs of the step by name, then the new states.

    `axes` tells the axis of each input's time, `None` for one that has none; `squeezed` that of each output. `states` maps the path of a
    recurrent layer to the names of its states.
    """

    def __init__(self, net: nn.Module, axes: Sequence[int | None], squeezed: Mapping[str, int | None], states: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.net = net
        self.axes, self.squeezed, self.states = tuple(axes), dict(squeezed), {path: tuple(names) for path, names in states.items()}

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """The step's outputs and the new states."""
        slots = [vars(self.net.get_submodule(path))["slot"] for path in self.states]
        waiting = list(tensors[len(self.axes) :])
        for slot, names in zip(slots, self.states.values(), strict=True):
            slot.given, waiting = tuple(waiting[: len(names)]), waiting[len(names) :]
        fed = [value if axis is None else value.unsqueeze(axis) for value, axis in zip(tensors, self.axes, strict=False)]
        answer: dict[str, torch.Tensor] = {}
        for name, value in flatten_outputs(self.net(*fed)).items():
            axis = self.squeezed[name]
            answer[name] = value if axis is None else value.squeeze(axis)
        for slot, names in zip(slots, self.states.values(), strict=True):
            answer.update({next_name(name): value for name, value in zip(names, slot.taken, strict=True)})
            slot.given = slot.taken = ()
        return answer


def next_name(state: str) -> str:
    """What the output is called that becomes the state at the next step."""
    return f"{state}.next"
