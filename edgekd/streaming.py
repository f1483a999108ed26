"""Streaming: from a network over sequences to a cell that takes one step and its state, proven on real sequences to compute the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.contracts import Array, Tensors
from edgekd.errors import ConversionRejected, DataError, MissingDependency, ModelError, ParityRejected, near_names
from edgekd.parity.compare import BASE_DEPTH, compare_hop, tolerance_for
from edgekd.records import HopParity, IOSpec, Precision, StatePair, TensorSpec
from edgekd.teachers import MODEL_ERRORS, tensors_of
from edgekd.tree import first_line, flatten_outputs

if TYPE_CHECKING:
    import torch

_BATCH = "batch"
_FEWEST_STEPS = 3


@dataclass(frozen=True)
class StreamingCell:
    """One step of a recurrent network. `module` takes the step's inputs `(batch, ...)` and the states, and gives the step's outputs and the
    new states; `iospec` describes both, and its `state` says which output is which input at the next step.

    A state is called after its layer, `rnn.h` and `rnn.c`, is `(batch, layers, hidden)` and starts at zero; the output that becomes it is
    `rnn.h.next`. `parity` is the comparison of the cell, step by step, with the network over the whole sequences of the example.
    """

    module: torch.nn.Module
    iospec: IOSpec
    parity: HopParity
    time_axis: int
    static: tuple[str, ...] = ()

    @property
    def initial(self) -> dict[str, Array]:
        """The states before the first step, zeros `(1, layers, hidden)`."""
        return {name: np.zeros((1, *_tail(self.iospec, name)), np.float32) for name in self.iospec.state_inputs}

    def sequences(self, arrays: Any) -> dict[str, Array]:
        """Inputs laid out as the network takes them, as `(samples, steps, ...)` by name: what `Runtime.infer` takes for an artifact with state.

        Raises:
            DataError: an input is missing, or the inputs differ in samples or steps.
        """
        return _by_step(_given(arrays, self.iospec.step_inputs), self.time_axis, self.static)

    def run(self, arrays: Any) -> dict[str, Array]:
        """What the cell gives in torch for inputs laid out as the network takes them, step by step from the initial state.

        Outputs and states by name, `(samples, steps, ...)`.
        """
        return _stepped(self.module, self.iospec, self.sequences(arrays))

    def steps(self, arrays: Any) -> dict[str, Array]:
        """Every step as a sample of its own: the inputs, and the states before the step as the float cell has them, `(samples * steps, ...)`.

        This is what a conversion of the cell is compared and calibrated on: `edgekd.convert(cell.module, calibration=cell.steps(x), ...)`.
        """
        fed = self.sequences(arrays)
        found = _stepped(self.module, self.iospec, fed)
        for pair in self.iospec.state:
            after = found[pair.output]
            fed[pair.input] = np.concatenate([np.zeros_like(after[:, :1]), after[:, :-1]], axis=1)
        return {tensor.name: fed[tensor.name].reshape(-1, *fed[tensor.name].shape[2:]) for tensor in self.iospec.inputs}


def streaming_cell(module: torch.nn.Module, example: Any, *, time_axis: int = 1, static: Sequence[str] = (), written_out: bool | None = None) -> StreamingCell:
    """One step of a network whose recurrent layers are `nn.LSTM`, `nn.GRU` or `nn.RNN` of one direction, with the state as inputs and outputs.

    `example` holds real sequences, as the network takes them (an array, several in the order of its arguments, or a mapping by name): at least
    three steps. `time_axis` is the axis of the steps in its inputs, 0 for `(steps, batch, ...)`; inputs named in `static` have none and go in whole at
    every step. With `written_out` a step is matrix products, which int8 reaches, where it is one recurrent operator otherwise (`None`: only for
    a `proj_size`, which ONNX's LSTM does not have).

    The network runs as it is on a sequence of one step, in a copy whose recurrent layers have their state from outside. This is right where
    everything else in it works step by step. Whether it does is found by running it: each output must be, at every step of the example,
    what the network gives for the whole sequences; one that the network gives for the last step only, at the last step and the one before.

    Raises:
        ConversionRejected: a layer looks into the future, is called twice, or starts from a state that is not zero; the network has no recurrent layer,
            or does not run on one step; names the layer.
        ParityRejected: something else in the network looks at more than one step; names the first output that differs, and the step.
        ModelError, DataError: an output has no batch axis, or the example does not fit.
        MissingDependency: torch is not installed.
    """
    try:
        import torch

        from edgekd.models.recurrent_step import Cell, make_step, next_name, state_sizes
    except ImportError as error:
        raise MissingDependency("torch", "distill", purpose="making a streaming cell") from error
    net = _copied(module)
    names = _argument_names(net, example)
    arrays = _checked(_given(example, names), time_axis, static)
    layers = _recurrent_layers(net)
    whole = _outputs(net, arrays, layers)
    used = {path: layer for path, layer in layers.items() if _calls(layer)}
    if not used:
        raise _no_layers(net)
    shorter = _outputs(net, _cut(arrays, time_axis, static), {})
    squeezed = {name: _time_of(name, whole[name].shape, shorter[name].shape) if name in shorter else _missing(name) for name in whole}
    for layer in used.values():
        make_step(layer, written=bool(layer.proj_size) if written_out is None else written_out)
    sizes = {path: {f"{path or 'state'}.{kind}": size for kind, size in state_sizes(layer).items()} for path, layer in used.items()}
    cell = Cell(net, [None if name in static else time_axis for name in names], squeezed, {path: tuple(own) for path, own in sizes.items()}).eval()
    fed = _by_step(arrays, time_axis, static)
    states = {name: size for own in sizes.values() for name, size in own.items()}
    first = [*tensors_of({name: array[:, 0] for name, array in fed.items()}), *_zeros(states, len(next(iter(fed.values()))))]
    try:
        with torch.no_grad():
            answer = cell(*first)
    except MODEL_ERRORS as error:
        raise ConversionRejected(
            f"{type(module).__name__} does not run on a sequence of one step",
            found=first_line(error),
            hint="everything outside its recurrent layers must work step by step",
            subject=type(module).__name__,
        ) from error
    iospec = IOSpec(
        inputs=tuple(
            [TensorSpec(name=name, dtype=array.dtype.name, shape=(_BATCH, *array.shape[2:])) for name, array in fed.items()]
            + [TensorSpec(name=name, dtype="float32", shape=(_BATCH, *size)) for name, size in states.items()]
        ),
        outputs=tuple(_output_spec(name, value, len(next(iter(fed.values())))) for name, value in answer.items()),
        state=tuple(StatePair(output=next_name(name), input=name) for name in states),
        static_binding={_BATCH: 1},
    )
    cell.iospec = iospec  # type: ignore[assignment]
    parity = _proven(_stepped(cell, iospec, fed), whole, shorter, squeezed)
    return StreamingCell(cell, iospec, parity, time_axis, tuple(static))


def _stepped(module: torch.nn.Module, iospec: IOSpec, fed: Tensors) -> dict[str, Array]:
    """Outputs and states of a cell, `(samples, steps, ...)`, for inputs of that layout; the states start at zero."""
    import torch

    samples, count = next(iter(fed.values())).shape[:2]
    pairs = {pair.input: pair.output for pair in iospec.state}
    states = {name: torch.zeros((samples, *_tail(iospec, name))) for name in pairs}
    parts: dict[str, list[Array]] = {tensor.name: [] for tensor in iospec.outputs}
    with torch.no_grad():
        for step in range(count):
            now = tensors_of({name: array[:, step] for name, array in fed.items()})
            given = {**dict(zip(fed, now, strict=True)), **states}
            answer = module(*(given[tensor.name] for tensor in iospec.inputs))
            states = {name: answer[output] for name, output in pairs.items()}
            for name, value in answer.items():
                parts[name].append(value.numpy())
    return {name: np.stack(pieces, axis=1) for name, pieces in parts.items()}


def _copied(module: Any) -> torch.nn.Module:
    """A copy in evaluation mode, in float32, on the CPU."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ModelError("a streaming cell is made from a torch.nn.Module", found=type(module).__name__)
    try:
        made: torch.nn.Module = copy.deepcopy(module).eval().cpu().float()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConversionRejected("the module cannot be copied", found=first_line(error), hint="keep no tensors of a graph on the module") from error
    return made


def _argument_names(net: torch.nn.Module, example: Any) -> tuple[str, ...]:
    from edgekd.teachers import forward_names

    names = forward_names(net)
    if names:
        return names
    return tuple(str(name) for name in example) if isinstance(example, Mapping) else ("input",)


def _given(arrays: Any, names: Sequence[str]) -> dict[str, Array]:
    """Arrays by name, in order; floats in float32.

    Raises:
        DataError: others than the network's inputs.
    """
    from edgekd.conversion.inputs import named_arrays

    if isinstance(arrays, (str, Path)):
        raise DataError("sequences are arrays, not a path", found=str(arrays), hint="load them with numpy.load")
    found = named_arrays(arrays, tuple(names), "sequences")
    if sorted(found) != sorted(names):
        raise DataError("the sequences have other inputs than the network", found=sorted(found), allowed=sorted(names), subject="sequences")
    return {name: found[name].astype(np.float32) if found[name].dtype.kind == "f" else found[name] for name in names}


def _checked(arrays: dict[str, Array], time_axis: int, static: Sequence[str]) -> dict[str, Array]:
    """The example, after making sure that it can prove something: several steps that differ."""
    for name in static:
        if name not in arrays:
            raise DataError(f"static names no input: {name!r}", found=name, allowed=near_names(name, arrays), subject=name)
    moving = {name: array for name, array in arrays.items() if name not in static}
    if not moving:
        raise DataError("every input is static", found=", ".join(static), hint="leave the sequence out of static", subject="static")
    for name, array in moving.items():
        if not 0 <= time_axis < max(array.ndim, 2) or array.ndim < 2:
            raise DataError(f"the input {name!r} has no axis {time_axis} of steps", found=array.shape, hint="set time_axis, or name it in static", subject=name)
        if array.shape[time_axis] < _FEWEST_STEPS:
            raise DataError(f"the example of {name!r} is too short", found=array.shape[time_axis], allowed=f"at least {_FEWEST_STEPS} steps", subject=name)
    steps = _by_step(arrays, time_axis, static)
    if all(np.array_equal(steps[name], np.broadcast_to(steps[name][:, :1], steps[name].shape)) for name in moving):
        raise DataError("the example is the same at every step, so that it proves nothing", hint="give real sequences", subject="example")
    return arrays


def _by_step(arrays: Tensors, time_axis: int, static: Sequence[str]) -> dict[str, Array]:
    """Every input as `(samples, steps, ...)`; a static one is repeated.

    Raises:
        DataError: the inputs differ in samples or steps.
    """
    moved = {name: _moved(array, time_axis) for name, array in arrays.items() if name not in static}
    count = next(iter(moved.values())).shape[1]
    out = {name: moved[name] if name in moved else np.repeat(array[:, None], count, axis=1) for name, array in arrays.items()}
    if len({array.shape[:2] for array in out.values()}) > 1 or 0 in next(iter(out.values())).shape[:2]:
        raise DataError("the sequences differ in samples or steps, or hold none", found={name: array.shape[:2] for name, array in out.items()})
    return out


def _moved(array: Array, axis: int) -> Array:
    """The array with its samples first and its steps second."""
    return np.swapaxes(array, 0, 1) if axis == 0 else np.moveaxis(array, axis, 1)


def _cut(arrays: Tensors, time_axis: int, static: Sequence[str]) -> dict[str, Array]:
    """The sequences without their last step."""
    return {name: array if name in static else np.delete(array, -1, axis=time_axis) for name, array in arrays.items()}


def _recurrent_layers(net: torch.nn.Module) -> dict[str, torch.nn.RNNBase]:
    """The recurrent layers by path.

    Raises:
        ConversionRejected: one of them cannot be run step by step.
    """
    import torch

    from edgekd.models.recurrent_step import STEPS

    layers = {path: layer for path, layer in net.named_modules() if isinstance(layer, torch.nn.RNNBase)}
    for path, layer in layers.items():
        label = path or type(layer).__name__
        if layer.bidirectional:
            raise ConversionRejected(
                f"the layer {label} is bidirectional: its backward direction needs the future of the sequence, which a stream does not have",
                found=f"{type(layer).__name__}(bidirectional=True)",
                allowed="layers of one direction",
                hint="train a student of one direction, or deploy the network over whole sequences",
                subject=label,
            )
        if type(layer) not in STEPS:
            raise ConversionRejected(
                f"the layer {label} is a recurrent layer of its own kind",
                found=f"{type(layer).__module__}.{type(layer).__qualname__}",
                allowed=", ".join(sorted(kind.__name__ for kind in STEPS)),
                subject=label,
            )
    return layers


def _no_layers(net: torch.nn.Module) -> ConversionRejected:
    return ConversionRejected(
        f"{type(net).__name__} runs no recurrent layer, so that there is no state",
        found=", ".join(sorted({type(part).__name__ for part in net.modules()})[:8]),
        allowed="nn.LSTM, nn.GRU, nn.RNN",
        hint="convert the network as it is",
        subject=type(net).__name__,
    )


def _calls(layer: torch.nn.RNNBase) -> int:
    return int(vars(layer).pop("edgekd_calls", 0))


def _outputs(net: torch.nn.Module, arrays: Tensors, watched: Mapping[str, torch.nn.RNNBase]) -> dict[str, Array]:
    """What the network gives for whole sequences; the layers in `watched` are counted and held to what a cell can do.

    Raises:
        ConversionRejected: the network fails, or calls a layer in a way that no step can follow.
    """
    import torch

    def watch(path: str, layer: torch.nn.RNNBase) -> Any:
        def look(_: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            vars(layer)["edgekd_calls"] = vars(layer).get("edgekd_calls", 0) + 1
            values, state = [*given, named.get("input")][0], named.get("hx", given[1] if len(given) > 1 else None)
            if vars(layer)["edgekd_calls"] > 1:
                raise _unusable(path, "is called twice, and each call would need a state of its own", "use a layer for each call")
            if not isinstance(values, torch.Tensor) or values.ndim != 3:
                found = "a packed sequence" if not isinstance(values, torch.Tensor) else f"shape {tuple(values.shape)}"
                raise _unusable(path, f"takes {found}", "give it a tensor with batch, steps and features")
            if state is not None and any(bool(part.any()) for part in (state if isinstance(state, tuple) else (state,))):
                raise _unusable(path, "starts from a state that is not zero", "leave the initial state out of its call")

        return layer.register_forward_pre_hook(look, with_kwargs=True)

    handles = [watch(path or type(layer).__name__, layer) for path, layer in watched.items()]
    try:
        with torch.no_grad():
            found = flatten_outputs(net(*tensors_of(arrays)))
    except MODEL_ERRORS as error:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ConversionRejected(
            f"{type(net).__name__} fails on its example", found=first_line(error), hint=f"check the inputs: {shapes}", subject=type(net).__name__
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: value.numpy() for name, value in found.items()}


def _unusable(path: str, why: str, hint: str) -> ConversionRejected:
    return ConversionRejected(f"the layer {path} {why}", hint=hint, subject=path)


def _missing(name: str) -> int | None:
    raise ModelError(f"the output {name!r} depends on the length of the sequence", hint="return the same outputs for every length", subject=name)


def _time_of(name: str, whole: tuple[int, ...], shorter: tuple[int, ...]) -> int | None:
    """The axis of an output's steps: the one that is shorter for a sequence without its last step; `None` where there is none.

    Raises:
        ModelError: more than one axis is.
    """
    axes = [at for at, (long, short) in enumerate(zip(whole, shorter, strict=False)) if long != short]
    if len(whole) != len(shorter) or len(axes) > 1 or any(whole[at] != shorter[at] + 1 for at in axes):
        raise ModelError(
            f"the output {name!r} is neither one value for each step nor one for the last step",
            found=f"{whole} for the example, {shorter} for one step less",
            hint="leave it out of what the network returns",
            subject=name,
        )
    return axes[0] if axes else None


def _zeros(states: Mapping[str, tuple[int, int]], samples: int) -> list[torch.Tensor]:
    import torch

    return [torch.zeros((samples, *size)) for size in states.values()]


def _tail(iospec: IOSpec, name: str) -> tuple[int, ...]:
    """The sizes of an input behind its batch."""
    shape = next(tensor.shape for tensor in iospec.inputs if tensor.name == name)
    return tuple(int(axis) for axis in shape[1:])


def _output_spec(name: str, value: Any, samples: int) -> TensorSpec:
    if value.ndim == 0 or value.shape[0] != samples:
        raise ModelError(
            f"the output {name!r} of a step does not hold one entry for each sequence",
            found=f"shape {tuple(value.shape)} for {samples} sequences",
            allowed="(batch, ...)",
            hint="leave it out of what the network returns; the cell gives the states by itself",
            subject=name,
        )
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=(_BATCH, *value.shape[1:]))


def _proven(found: Tensors, whole: Tensors, shorter: Tensors, squeezed: Mapping[str, int | None]) -> HopParity:
    """The comparison of the cell with the network, after making sure that they agree.

    Raises:
        ParityRejected: an output differs; names it and the first step.
    """
    count = next(iter(found.values())).shape[1]
    tolerance = tolerance_for(Precision.FP32, BASE_DEPTH).value
    expected: dict[str, Array] = {}
    compared: dict[str, Array] = {}
    for name, axis in squeezed.items():
        last = np.stack([shorter[name], whole[name]], axis=1) if axis is None else None
        expected[name] = _moved(whole[name], axis) if axis is not None else np.asarray(last)
        compared[name] = found[name] if axis is not None else found[name][:, -2:]
    for name, reference in expected.items():
        steps = reference.shape[1]
        errors = np.abs(reference.astype(np.float64) - compared[name]).reshape(len(reference), steps, -1).max(axis=(0, 2))
        largest = max(float(np.abs(reference).max()), float(np.finfo(np.float32).tiny))
        bad = np.flatnonzero(~(errors <= tolerance * largest))
        if bad.size:
            at = int(bad[0])
            raise ParityRejected(
                f"the network does not work step by step: its output {name!r} is another at step {count - steps + at + 1} of {count}",
                found=f"an error of {errors[at] / largest:.2e} of the largest value",
                allowed=f"{tolerance:.1e}",
                hint="outside the recurrent layers nothing may look at other steps: no pooling, attention, convolution or norm over time",
                subject=name,
            )
    return compare_hop("sequence -> cell", expected, compared, precision=Precision.FP32)
