"""The same model by every road that leads to a format, measured side by side on the target: the fastest that is right is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Target
from edgekd.conversion.convert import Conversion, convert, print_line, write_artifact
from edgekd.conversion.formats import Route, load_graph
from edgekd.conversion.inputs import source_format
from edgekd.conversion.running import Options, Say
from edgekd.errors import (
    ConfigError,
    ConversionRejected,
    EdgekdError,
    EnvironmentFailed,
    InputError,
    MeasurementInvalid,
    MissingDependency,
    MissingEnvironment,
    ParityRejected,
    Rejected,
    RunnerFailed,
    UnsupportedModel,
    near_names,
)
from edgekd.records import Format, Precision, Record
from edgekd.target import connect, require_support

if TYPE_CHECKING:
    import torch

    from edgekd.measuring.screening import Screened


_ENDS_A_ROAD = (Rejected, InputError, EnvironmentFailed, RunnerFailed)
"""What one road may end in while the others go on; a lost device or a full disk ends them all."""


class RoadTime(Record, tag="edgekd.road_time/1", frozen=True, kw_only=True):
    """What became of one road. `outcome` is `fastest`, `slower`, `differs`, `refused`, `failed` or `not ready`; `reason` says why.

    Latencies are in milliseconds at the asked percentile, with bounds that are one-sided at 99 %; `None` where nothing was measured.
    """

    route: tuple[str, ...]
    formats: tuple[str, ...]
    outcome: str
    reason: str = ""
    latency_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    size_bytes: int | None = None
    ops: str = ""


class Fastest(Record, tag="edgekd.fastest/1", frozen=True, kw_only=True):
    """The conversion that was kept, and every road in the order of its latency. All latencies come from one screen, launch by launch in turn."""

    conversion: Conversion
    roads: tuple[RoadTime, ...]
    target: str
    percentile: float
    inputs: str
    simulated: str = ""


def fastest(
    model: torch.nn.Module | StoredArtifact | Path | str,
    to: str,
    *,
    target: Target | str,
    out: Path | str,
    roads: Sequence[Sequence[str]] | None = None,
    precision: Precision | str = Precision.FP32,
    percentile: float = 50.0,
    options: Options | None = None,
    environments: Path | str | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    progress: bool | Say = True,
    **given: Any,
) -> Fastest:
    """The model in another format by the road whose file is the fastest on the target, written to `out` as `edgekd.convert` does.

    By default every road that is ready on this machine is tried; `roads` names some, each as `via` does: `[["tflite-from-torch"],
    ["onnx-from-torch", "tflite-from-onnx"]]`. Each is converted and compared hop by hop as by `edgekd.convert`, which takes the further arguments
    `given`; one that is refused, differs or fails is left out, with the reason. The others are measured on `target` in one screen (`docs/measuring.md`) on
    seeded random inputs, a state fed back step by step. `options` go to the roads that take the converter.

    Raises:
        ConfigError: no road exists, none is ready, or options are for a converter of none. InputError: what ends every road alike. ConversionRejected:
            every road is refused, differs or fails; lists the reasons.
        UnsupportedModel: the target does not run the format. MeasurementInvalid: the device was disturbed, so that no road is known to be the fastest.
    """
    say: Say = progress if callable(progress) else print_line if progress else _silent
    folder_of = None if environments is None else Path(environments)
    chosen = _routes(source_format(model), to, precision, roads)
    taken: list[RoadTime] = [_row(route, "not ready", "; ".join(route.missing(folder_of))) for route in chosen if route.missing(folder_of)]
    ready = [route for route in chosen if not route.missing(folder_of)]
    if not ready:
        raise ConfigError(f"no road to {to} is ready on this machine", found=" | ".join(f"{row.route}: {row.reason}" for row in taken), subject=to)
    _check_options(options or {}, chosen)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekd-fastest-")))
        live = _opened(stack, target, overrides)
        if Format(to) not in live.capabilities.formats:
            runs = ", ".join(item.value for item in live.capabilities.formats)
            raise UnsupportedModel(f"the target {live.name!r} does not run {to}", found=runs, hint="name a target that does", subject=live.name)
        made: dict[str, tuple[Route, Conversion]] = {}
        ends: list[EdgekdError] = []
        for number, route in enumerate(ready):
            say(f"road {number + 1} of {len(ready)}: {route}")
            own = {name: values for name, values in (options or {}).items() if name in route.converters}
            try:
                done = convert(
                    model,
                    to,
                    precision=precision,
                    via=route.converters,
                    out=scratch / f"road-{number}",
                    target=live,
                    options=own,
                    environments=environments,
                    seed=seed,
                    progress=say,
                    **given,
                )
                require_support(live, done.stored, live.name)
            except _ENDS_A_ROAD as error:
                ends.append(error)
                taken.append(_row(route, _outcome(error), str(error)))
                say(f"{taken[-1].outcome}: {error}")
                continue
            made[" -> ".join(route.converters)] = (route, done)
        if not made:
            raise _no_road_left(to, taken, ends)
        screened = _screened(live, {label: done.stored for label, (_, done) in made.items()}, percentile, seed, say)
        order = sorted(screened, key=lambda label: screened[label].latency_ms)
        best = made[order[0]][1]
        measured = [_timed(*made[label], screened[label], screened[order[0]]) for label in order]
        kept = write_artifact(best.stored, Path(out))
        say(f"fastest: {order[0]}; written: {out}")
        return Fastest(
            conversion=msgspec.structs.replace(best, out=str(Path(out)), artifact=kept.record),
            roads=(*measured, *taken),
            target=live.name,
            percentile=percentile,
            inputs=f"random (seed {seed})",
            simulated=live.simulated,
        )


def _routes(source: str, to: str, precision: Precision | str, roads: Sequence[Sequence[str]] | None) -> tuple[Route, ...]:
    graph = load_graph()
    if roads is None:
        found = graph.routes(source, to, precision)
        if not found:
            raise graph.no_route(source, to, Precision(precision))
        return found
    chosen = []
    for via in roads:
        through = graph.routes(source, to, precision, via)
        if not through:
            raise graph.no_route(source, to, Precision(precision), via)
        chosen.append(through[0])
    if not chosen or len({route.converters for route in chosen}) < len(chosen):
        raise ConfigError("roads are named once each, one at least", found=[list(via) for via in roads], subject="roads")
    return tuple(chosen)


def _check_options(options: Options, routes: Sequence[Route]) -> None:
    known = sorted({name for route in routes for name in route.converters})
    for name in options:
        if name not in known:
            raise ConfigError(f"options are given for a converter that no road takes: {name!r}", allowed=near_names(name, known), subject=name)


def _outcome(error: EdgekdError) -> str:
    if isinstance(error, ParityRejected):
        return "differs"
    if isinstance(error, (MissingDependency, MissingEnvironment)):
        return "not ready"
    return "refused" if isinstance(error, Rejected) else "failed"


def _no_road_left(to: str, rows: Sequence[RoadTime], ends: Sequence[EdgekdError]) -> EdgekdError:
    """The error after the last road: a wrong input that ended every one alike is told as it is."""
    if all(isinstance(error, InputError) for error in ends) and len({str(error) for error in ends}) == 1:
        return ends[0]
    reasons = " | ".join(f"{' -> '.join(row.route)}: {row.outcome}: {row.reason}" for row in rows)
    return ConversionRejected(f"no road to {to} leads to a file that is right", found=reasons, hint="mend one of the reasons, or name other roads", subject=to)


def _opened(stack: ExitStack, target: Target | str, overrides: Sequence[str]) -> Target:
    if not isinstance(target, str):
        return target
    return stack.enter_context(connect(target, overrides=overrides))


def _screened(target: Target, models: Mapping[str, StoredArtifact], percentile: float, seed: int, say: Say) -> Mapping[str, Screened]:
    """All models in one screen, launch by launch in turn.

    Raises:
        MeasurementInvalid: the measurement of one of them is not valid.
    """
    from edgekd.benching import random_inputs, step_spec
    from edgekd.measuring.launching import new_nonce
    from edgekd.measuring.measure import Subject, calibrate_limits, screen

    rotation, nonce = target.profile.measure.screen.launch.rotation, new_nonce()
    subjects = [Subject(label, model, random_inputs(step_spec(model.record.iospec), samples=rotation, seed=seed)) for label, model in models.items()]
    say(f"measuring {len(subjects)} of them in turn on {target.name}")
    limits = calibrate_limits(target, subjects[0], cache_dir=None, seed=seed, nonce=nonce)
    found = screen(target, subjects, percentile=percentile, limits=limits, seed=seed, nonce=nonce)
    for label, one in found.items():
        if not one.measurement.valid:
            raise MeasurementInvalid(
                f"which road is the fastest is not known: {label} could not be measured",
                found=one.measurement.reason,
                hint="keep the device free of other work and try again",
                subject=label,
            )
    return found


def _row(route: Route, outcome: str, reason: str) -> RoadTime:
    return RoadTime(route=route.converters, formats=route.formats, outcome=outcome, reason=reason)


def _timed(route: Route, done: Conversion, own: Screened, best: Screened) -> RoadTime:
    reason = ""
    if own is not best and own.lower_ms <= best.upper_ms:
        reason = "the bounds overlap with those of the fastest: the two are not told apart"
    return RoadTime(
        route=route.converters,
        formats=route.formats,
        outcome="fastest" if own is best else "slower",
        reason=reason,
        latency_ms=own.latency_ms,
        lower_ms=own.lower_ms,
        upper_ms=own.upper_ms,
        size_bytes=done.artifact.size_bytes,
        ops=done.artifact.metadata.get("op_total", ""),
    )


def _silent(_: str) -> None:
    """No progress."""


__all__ = ["Fastest", "RoadTime", "fastest"]
