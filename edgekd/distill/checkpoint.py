"""Checkpoints of a training: safetensors and JSON in one folder, written whole, so that a kill at any moment loses seconds at most."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from edgekd.distill.record import TrainState
from edgekd.errors import InputError, ModelError
from edgekd.storage import folder_atomic

_PREFIX = "checkpoint-"

Scalars = dict[str, float | int | bool]
Groups = tuple[dict[str, float | int | bool | str | None], ...]


@dataclass
class Checkpoint:
    """Everything that a training needs to go on: `tensors` maps a part (`model`, `optimizer`, `ema`, `best`, `projectors`, `rng`)
    to its named tensors."""

    state: TrainState
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached, contiguous copies on the CPU, each with its own memory (tied weights are stored once per name)."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Scalars, Groups]:
    """An optimizer's state as named tensors, named scalars, and its groups without their parameters."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: Scalars = {}
    for number, values in packed["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            elif value is not None:
                scalars[f"{number}.{name}"] = value
    groups = []
    for group in packed["param_groups"]:
        row: dict[str, float | int | bool | str | None] = {}
        for name, value in group.items():
            if name == "params":
                continue
            if isinstance(value, (tuple, list)):
                row |= {f"{name}.{position}": part for position, part in enumerate(value)}
            else:
                row[name] = value
        groups.append(row)
    return plain(tensors), scalars, tuple(groups)


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Scalars, groups: Groups) -> None:
    """Load what `pack_optimizer` gave.

    Raises:
        ModelError: the optimizer has other groups.
    """
    fresh = optimizer.state_dict()
    if len(groups) != len(fresh["param_groups"]):
        raise ModelError("a checkpoint belongs to another optimizer", found=f"{len(groups)} groups", allowed=f"{len(fresh['param_groups'])}")
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *scalars.items()]:
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    for group, saved in zip(fresh["param_groups"], groups, strict=True):
        for name, old in group.items():
            if name == "params":
                continue
            group[name] = tuple(saved[f"{name}.{position}"] for position in range(len(old))) if isinstance(old, (tuple, list)) else saved[name]
    fresh["state"] = state
    optimizer.load_state_dict(fresh)


def pack_rng(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators (CPU, and the device's own)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def unpack_rng(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to what `pack_rng` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint beside the last one, then remove the last one.

    Raises:
        StorageError: the disk is full; the last checkpoint is still there.
    """
    older = _found(folder)
    final = folder / f"{_PREFIX}{checkpoint.state.step:09d}-{checkpoint.state.epoch:06d}"
    with folder_atomic(final) as work:
        for part, tensors in checkpoint.tensors.items():
            (work / f"{part}.safetensors").write_bytes(save(tensors))  # save_file hides a full disk behind an error of its own
        (work / "state.json").write_bytes(msgspec.json.format(checkpoint.state.to_json(), indent=1))
    for path in older:
        if path != final:
            shutil.rmtree(path)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or `None`. Leftovers of a killed writer are removed.

    Raises:
        InputError: the checkpoint was changed or damaged.
    """
    for leftover in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover)
    found = _found(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        tensors = {path.stem: load_file(path) for path in sorted(newest.glob("*.safetensors"))}
    except SafetensorError as error:
        raise InputError("a checkpoint is damaged", found=f"{newest}: {error}", hint="remove this folder; the training starts anew", subject=newest) from error
    return Checkpoint(TrainState.load(newest / "state.json"), tensors)


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint; called when the training is finished."""
    for path in [*_found(folder), *folder.glob(f".{_PREFIX}*")]:
        shutil.rmtree(path)


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "state.json").is_file())
