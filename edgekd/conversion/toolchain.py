"""Which converters lead to the files that a target takes, so that the stages are the same for every format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Converter, StudentSpace, Teacher, Tensors
from edgekd.conversion.formats import HOST_PROFILES
from edgekd.errors import ConfigError, UnsupportedModel
from edgekd.records import Capabilities, Format, Precision, Record
from edgekd.registry import load, table


class Toolchain(Record, tag="edgekd.toolchain/1", frozen=True, kw_only=True):
    """The converters to one format, by their names in the registry; `""` where there is none. `host` is a profile of this machine.

    `exporter` makes a float file from a torch module, `prepare` makes it ready for quantizing, `quantizer` makes it int8.
    """

    format: Format
    exporter: str
    prepare: str
    quantizer: str
    host: str

    @property
    def name(self) -> str:
        """The format, as the names of hops have it."""
        return self.format.value

    @property
    def export_hop(self) -> str:
        """From the torch module to its file."""
        return f"torch -> {self.name}"

    @property
    def quantize_hop(self) -> str:
        """From the float file to the int8 one."""
        return f"{self.name} -> int8"

    @property
    def device_hop(self) -> str:
        """From the file on this machine to the file on the device."""
        return f"{self.name} -> device"

    def converter(self, step: Literal["exporter", "prepare", "quantizer"]) -> Converter:
        """A converter of this toolchain.

        Raises:
            UnsupportedModel: no plug-in makes this step for the format.
        """
        name: str = getattr(self, step)
        if not name:
            raise UnsupportedModel(
                f"no converter is known that serves as {step} for {self.name} files",
                found="none in the registry",
                hint="install a package that has one, or deploy in float" if step != "exporter" else "install a package that has one, or choose another target",
                subject=self.name,
            )
        made: Converter = load("converters", name)()
        return made

    def host_outputs(self, model: StoredArtifact, inputs: Tensors) -> dict[str, Array]:
        """The file's outputs on this machine, all samples: what the exporter made, without the device.

        Raises:
            ConfigError: no profile of this machine runs the format.
        """
        from edgekd.target import connect

        if not self.host:
            raise ConfigError(f"nothing on this machine runs {self.name} files", allowed=", ".join(HOST_PROFILES), subject=self.name)
        with connect(self.host) as live:
            return live.runtime.infer(model, inputs)


def toolchain_of(capabilities: Capabilities) -> Toolchain:
    """The toolchain to the first format of a target. edgekd's own converters come before those of other packages.

    Raises:
        UnsupportedModel: no converter makes that format from a torch module or from itself, so that nothing can be brought to the target.
    """
    wanted = capabilities.formats[0]
    found = {
        "exporter": _find("torch", wanted.value, Precision.FP32),
        "prepare": _find(wanted.value, wanted.value, Precision.FP32),
        "quantizer": _find(wanted.value, wanted.value, Precision.INT8),
    }
    if not found["exporter"]:
        raise UnsupportedModel(
            f"no converter makes {wanted.value} files from a torch module",
            found=", ".join(table("converters")),
            hint="install a package that provides one, or choose another target",
            subject=wanted.value,
        )
    return Toolchain(format=wanted, host=HOST_PROFILES.get(wanted.value, ""), **found)


def require_road(toolchain: Toolchain, teacher: Teacher, space: StudentSpace) -> None:
    """Refuse an ONNX file as teacher or student where the target takes another format, before anything is measured or trained.

    Raises:
        ConfigError: names the converter that makes the target's format from ONNX.
    """
    from edgekd.teachers import OnnxTeacher

    if toolchain.format is Format.ONNX:
        return
    files: dict[str, Any] = {"student": getattr(space, "onnx", None), "teacher": teacher.path if isinstance(teacher, OnnxTeacher) else None}
    for role, path in files.items():
        if path is None:
            continue
        bridge = next((name for name in _names(Format.ONNX.value, toolchain.name)), "")
        if bridge:
            road = f"the road from ONNX is {bridge}, in an environment of its own that `edgekd env` makes: convert the file, then bench it"
        else:
            road = f"no converter from ONNX to {toolchain.name} is known"
        raise ConfigError(
            f"the {role} is an ONNX file, but the target takes {toolchain.name} files, which a run makes from torch modules only",
            found=str(path),
            allowed="a torch module, or a callable as teacher" if role == "teacher" else "a torch module or a factory",
            hint=f"{road}; or choose a target for ONNX files, such as local",
            subject=path,
        )


def _find(source: str, target: str, precision: Precision) -> str:
    return next((name for name in _names(source, target) if precision in load("converters", name).precisions), "")


def _names(source: str, target: str) -> Iterator[str]:
    """Converters along one edge, in the registry's order."""
    for name in table("converters"):
        kind = load("converters", name)
        if (kind.source, kind.target) == (source, target):
            yield name
