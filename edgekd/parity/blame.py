"""Whose fault it is that a file computes something else than its source: the exporter's or the device's, and which fault explains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Tensors
from edgekd.parity.compare import BASE_DEPTH
from edgekd.parity.faults import Run, diagnose
from edgekd.parity.graph import depth_told
from edgekd.records import HopParity

if TYPE_CHECKING:
    from edgekd.conversion.toolchain import Toolchain

Compare = Callable[[str, Tensors, Tensors], HopParity]
"""Compares a hop by its name, the reference's outputs and those of the file."""


def blame(parity: HopParity, model: StoredArtifact, run: Run, inputs: Tensors, *, toolchain: Toolchain, device: Run, compare: Compare) -> HopParity:
    """A failed comparison between a source and the device as that of the hop that is to blame, with the faults that explain it, if a known one does.

    The file is run on the host, too: where it agrees with `run`, the source, the device computes something else; else the exporter does. Where no
    runtime of the host has the format, the hop stays as it is named.
    """

    def host(given: Tensors) -> Tensors:
        return toolchain.host_outputs(model, given)

    found, infer = parity, device
    if toolchain.host:
        exported = compare(parity.hop, run(inputs), host(inputs))
        found, infer = (msgspec.structs.replace(parity, hop=toolchain.device_hop), device) if exported.passed else (exported, host)
    named = diagnose(run, infer, inputs, specs=model.record.iospec.inputs, depth=max(BASE_DEPTH, depth_told(model, BASE_DEPTH)), hop=found.hop)
    return msgspec.structs.replace(found, findings=named.annotated().findings)
