"""A trained student is stored as safetensors weights and a JSON description, and comes back from the two, checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekd.contracts import Tensors
from edgekd.errors import InputError, MissingDependency, ModelError
from edgekd.identity.provenance import code_hash
from edgekd.records import Probe, StudentSpec, TensorSpec
from edgekd.spaces import call_factory
from edgekd.storage import write_atomic
from edgekd.teachers import tensors_of

if TYPE_CHECKING:
    import torch

_PROBED = 256
"""At most this many values of an output are kept in a probe, evenly spaced over the flattened tensor."""


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependency("safetensors", "distill", purpose="storing and loading a student's weights") from error
    return safetensors


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    import torch

    state = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in module.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"the student keeps something in its state that is no tensor: {name}", found=type(value).__name__, hint="keep it as a buffer", subject=name
            )
    return state


def _shared(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Every name to the first name of the same memory (tied weights), or to itself."""
    first: dict[tuple[object, ...], str] = {}
    owners = {}
    for name, value in state.items():
        key = (value.device.type, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype) if value.numel() else (name,)
        owners[name] = first.setdefault(key, name)
    return owners


def save_weights(module: torch.nn.Module, path: Path) -> None:
    """Write the module's parameters and buffers as safetensors, whole or not at all.

    Tied weights are stored once; the file's header maps the other names to the stored one.

    Raises:
        ModelError: the state holds something that is no tensor.
        StorageError: the disk is full or the path is not writable.
    """
    safetensors = _safetensors()
    state = _state(module)
    owners = _shared(state)
    held = {name: value.cpu().contiguous().clone() for name, value in state.items() if owners[name] == name}
    aliases = {name: owner for name, owner in owners.items() if owner != name}
    write_atomic(path, safetensors.torch.save(held, metadata={"format": "pt", **{f"tied:{name}": owner for name, owner in aliases.items()}}))


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Load what `save_weights` wrote into `module`, in place: every name, every shape, every type must agree.

    Raises:
        InputError: the file is missing or no safetensors file.
        ModelError: a tensor is missing, left over, of another shape or type, or tied differently.
    """
    import torch

    safetensors = _safetensors()
    if not path.is_file():
        raise InputError(f"{path} does not exist", hint="check the path of the weights", subject=path)
    try:
        with safetensors.safe_open(str(path), framework="pt") as handle:
            header = handle.metadata() or {}
            held = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (the handle is no mapping)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} cannot be read as safetensors", found=str(error), hint="restore the file: it was cut off or changed", subject=path) from error
    aliases = {key.removeprefix("tied:"): owner for key, owner in header.items() if key.startswith("tied:")}
    state = _state(module)
    owners = _shared(state)
    found, expected = set(held) | set(aliases), set(state)
    if found != expected:
        raise ModelError(
            "the weights do not belong to this student",
            found=f"missing: {sorted(expected - found)[:5]}, left over: {sorted(found - expected)[:5]}",
            hint="rebuild with the weights that were stored beside this description",
            subject=path,
        )
    for name, owner in aliases.items():
        if owner not in held or owners[name] != owners[owner]:
            raise ModelError(f"{name} and {owner} share their memory in the file, but not in the rebuilt student", hint="restore the factory", subject=name)
    for name, value in state.items():
        tensor = held[aliases.get(name, name)]
        if tensor.shape != value.shape or tensor.dtype != value.dtype:
            raise ModelError(
                f"the tensor {name} does not fit the rebuilt student",
                found=f"{tuple(tensor.shape)} {tensor.dtype}",
                allowed=f"{tuple(value.shape)} {value.dtype}",
                subject=name,
            )
        if owners[name] != name and name in held and not torch.equal(tensor, held[aliases.get(owners[name], owners[name])]):
            raise ModelError(f"{name} is tied to {owners[name]} in the student, but differs from it in the file", hint="restore the factory", subject=name)
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(held[aliases.get(name, name)])


def _describe_inputs(example: Tensors) -> tuple[TensorSpec, ...]:
    specs = []
    for name, array in example.items():
        values = np.asarray(array)
        if values.ndim == 0 or values.size == 0:
            raise ModelError(f"the example of the input {name!r} is empty", found=values.shape, hint="give one batch per input, batch first", subject=name)
        low, high = (0.0, 1.0) if values.dtype == np.bool_ else (float(values.min()), float(values.max()))
        specs.append(TensorSpec(name=name, dtype=values.dtype.name, shape=(1, *values.shape[1:]), value_range=(low, high)))
    return tuple(specs)


def probe_inputs(specs: tuple[TensorSpec, ...], seed: int) -> dict[str, NDArray[Any]]:
    """One seeded sample per input, `(1, ...)`, uniform over the range seen in the example (integers: both ends included)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    made: dict[str, NDArray[Any]] = {}
    for spec in specs:
        low, high = spec.value_range or (0.0, 1.0)
        shape = spec.sizes({})
        dtype = np.dtype(spec.dtype)
        if dtype.kind in "iub":
            made[spec.name] = generator.integers(int(low), int(high), size=shape, endpoint=True).astype(dtype)
        else:
            made[spec.name] = generator.uniform(low, high, size=shape).astype(dtype)
    return made


def _probe_outputs(module: torch.nn.Module, inputs: Tensors) -> dict[str, NDArray[np.float64]]:
    import torch

    from edgekd.tree import flatten_outputs

    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            outputs = flatten_outputs(module(*tensors_of(inputs)))
    finally:
        module.train(training)
    kept = {}
    for name, value in outputs.items():
        flat = value.detach().to(torch.float64).reshape(-1).numpy()
        kept[name] = flat if flat.size <= _PROBED else flat[np.linspace(0, flat.size - 1, _PROBED).astype(np.int64)]
    return kept


def complete_spec(spec: StudentSpec, module: torch.nn.Module, input_example: Tensors, seed: int) -> StudentSpec:
    """The spec with the names, shapes and types of all tensors, and a probe: a seeded input and what `module` answers.

    `input_example` holds one batch per input, batch first, in the order of the module's arguments; the probe's input is
    drawn from its range. An output of more than 256 values is probed at 256 evenly spaced ones. Values are rounded to 1e-6.

    Raises:
        ModelError: an output is not finite, or the state holds something that is no tensor.
    """
    inputs = _describe_inputs(input_example)
    outputs = _probe_outputs(module, probe_inputs(inputs, seed))
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise ModelError(f"the student's output {name!r} is not finite on the probe", hint="the training diverged; lower the learning rate", subject=name)
    probe = Probe(input_seed=seed, inputs=inputs, outputs={name: tuple(round(float(value), 6) for value in values) for name, values in outputs.items()})
    state = {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in _state(module).items()}
    return msgspec.structs.replace(spec, state=state, probe=probe)


def check_probe(spec: StudentSpec, module: torch.nn.Module) -> None:
    """Run the probe; the largest difference may be `tolerance` times the output's largest value (at least 1).

    Raises:
        InputError: the spec has no probe.
        ModelError: an output differs; names it, with the difference.
    """
    probe = spec.probe
    if probe is None:
        raise InputError("the description of the student has no probe", hint="it comes from a run that ended before the student was trained")
    found = _probe_outputs(module, probe_inputs(probe.inputs, probe.input_seed))
    if set(found) != set(probe.outputs):
        raise ModelError("the rebuilt student has other outputs", found=sorted(found), allowed=sorted(probe.outputs))
    for name, expected in probe.outputs.items():
        reference = np.asarray(expected, dtype=np.float64)
        values = found[name]
        allowed = probe.tolerance * max(1.0, float(np.abs(reference).max(initial=0.0)))
        worst = float(np.abs(values - reference).max(initial=0.0)) if values.shape == reference.shape else float("inf")
        if not worst <= allowed:
            raise ModelError(
                f"the rebuilt student computes something else: output {name!r} differs on the probe",
                found=f"{worst:.3g}",
                allowed=f"{allowed:.3g}",
                hint="restore the factory's code and its settings as they were at training",
                subject=name,
            )


def rebuild(
    spec: StudentSpec,
    weights: Path,
    *,
    factory: Callable[..., torch.nn.Module] | None = None,
    teacher_module: torch.nn.Module | None = None,
    allow_changed: bool = False,
) -> torch.nn.Module:
    """The student in evaluation mode, from its factory and its weights; nothing is unpickled, and nothing is imported because the spec names it.

    `factory` is the one that the run was given, imported by you; `spec.factory` says its name. A student that was given as a module is a copy of
    `teacher_module`, filled. Names, shapes and types are compared with the spec, then with the file; at last the probe must answer as recorded.
    `allow_changed=True` accepts a factory whose source changed.

    Raises:
        ConfigError: the factory cannot be identified by its source.
        InputError: neither factory nor module is given, the factory is another or was changed, the weights cannot be read, or the student was
            pruned (its own space rebuilds it).
        ModelError: names, shapes or the probe do not agree.
    """
    if spec.keep:
        raise InputError(
            f"this student was cut out of a larger network; only the space {spec.kind!r} that wrote the cuts can rebuild it",
            found=f"{len(spec.keep)} cuts",
            hint="use the float file of the bundle, or that space's own rebuild",
            subject=spec.kind,
        )
    if factory is not None:
        digest = "" if allow_changed else code_hash(factory)
        if not allow_changed and digest != spec.factory_hash:
            raise InputError(
                f"this factory, or its source, is not the one that was recorded{f' as {spec.factory}' if spec.factory else ''}",
                found=digest[:16],
                allowed=spec.factory_hash[:16] or "no factory: the student was given as a module",
                hint="restore it, or pass allow_changed=True: names, shapes and the probe are checked all the same",
                subject=spec.factory,
            )
        module = call_factory(factory, spec.kwargs, 0)
    elif teacher_module is not None:
        module = copy.deepcopy(teacher_module)
    else:
        raise InputError(
            "a student is rebuilt with what made it, and a description imports no code",
            found=spec.factory or spec.rebuildable,
            hint="import the factory yourself and hand it in with factory=" if spec.factory_hash else "hand in the module with teacher_module=",
            subject=spec.factory or spec.kind,
        )
    made = {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in _state(module).items()}
    expected = {name: (tuple(shape), dtype) for name, (shape, dtype) in spec.state.items()}
    if made != expected:
        wrong = sorted(name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name))
        raise ModelError(
            "the factory makes another network than the one that was stored",
            found=f"{wrong[0]}: {made.get(wrong[0], 'absent')}",
            allowed=str(expected.get(wrong[0], "absent")),
            hint="restore the factory",
            subject=wrong[0],
        )
    load_weights(module, weights)
    module.eval()
    check_probe(spec, module)
    return module
