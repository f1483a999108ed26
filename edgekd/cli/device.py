"""Commands about devices: doctor, targets, profile, bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekd.cli.common import FOLDER, json_option, launch_progress, print_json, print_table, say, set_option, target_option
from edgekd.cli.env import print_environments

if TYPE_CHECKING:
    from edgekd.benching import BenchResult
    from edgekd.doctor import TargetRow


def _state(row: TargetRow) -> str:
    if row.problem:
        return row.problem if not row.remedy or row.remedy in row.problem else f"{row.problem}; next step: {row.remedy}"
    return "not tried" if not row.tried else f"ready, SIMULATED ({row.simulated})" if row.simulated else "ready"


@click.command()
@click.argument("target", required=False)
@set_option
@json_option
def doctor(target: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Say what is installed, what is missing with the line that installs it, and which targets can be opened.

    With TARGET, open that one and print what it is and what it can do; a target that cannot be opened is an error (exit 3).
    """
    if target is not None:
        return _doctor_target(target, overrides, as_json)
    if overrides:
        raise click.UsageError("--set needs a TARGET: edgekd doctor TARGET --set runtime.threads=2")
    from edgekd.doctor import diagnose
    from edgekd.extras import extra_sizes

    found = diagnose()
    if as_json:
        print_json(found.to_builtins())
        return 0
    click.echo(f"edgekd {found.edgekd}, Python {found.python}, {found.machine}")
    if found.problem:
        click.echo(f"problem: {found.problem}")
    rows = [(extra.extra, item.package, item.wanted or "any", item.version or "-", item.problem or "ok") for extra in found.extras for item in extra.packages]
    print_table("Packages", ("extra", "package", "wanted", "installed", "state"), rows)
    print_table(
        "Extras",
        ("extra", "adds", "on disk", "state"),
        [
            (row.extra, row.about, "-" if row.size_mb is None else f"{row.size_mb:.0f} MB", "complete" if row.complete else "not complete")
            for row in found.extras
        ],
        numeric=(2,),
    )
    sizes = extra_sizes()
    click.echo(f"edgekd alone takes {sizes.base_mb:.0f} MB; extras share packages, so that sizes do not add up (measured on {sizes.measured_on}, {sizes.date})")
    for extra in found.extras:
        if extra.remedy:
            click.echo(f"extra {extra.extra} is not complete; install it with: {extra.remedy}")
    print_table(
        "Targets",
        ("target", "transport", "runtime", "state", "ran on hardware"),
        [(row.profile, row.transport, row.runtime, _state(row), row.hardware) for row in found.targets],
    )
    print_environments(found.environments)
    return 0


def _doctor_target(name: str, overrides: tuple[str, ...], as_json: bool) -> int:
    from edgekd.target import connect, hardware_text

    with connect(name, overrides=overrides) as live:
        snapshot = live.runtime.snapshot()
        if as_json:
            body = {"profile": live.profile, "fingerprint": live.fingerprint, "capabilities": live.capabilities, "snapshot": snapshot}
            print_json({key: record.to_builtins() for key, record in body.items()})
            return 0
        able = live.capabilities
        click.echo(f"{live.name} is ready{f', SIMULATED ({live.simulated}): its numbers come from no device' if live.simulated else ''}")
        print_table("Device", ("field", "value"), sorted(live.fingerprint.fields.items()))
        state = [(key, str(getattr(snapshot, key))) for key in snapshot.__struct_fields__ if getattr(snapshot, key) is not None]
        print_table("State now", ("field", "value"), state)
        print_table(
            "What it can do",
            ("capability", "value"),
            [
                ("formats", ", ".join(item.value for item in able.formats)),
                ("precisions", ", ".join(item.value for item in able.precisions)),
                ("int8 schemes, best first", ", ".join(able.schemes) or "none"),
                ("samples", able.samples),
                ("clocks", ", ".join(item.value for item in able.clocks)),
                ("inner tensors", "yes" if able.taps else "no"),
                ("op times", "yes" if able.op_times else "no"),
                ("ran on hardware", hardware_text(live.profile, live)),
            ],
        )
    return 0


@click.command()
@json_option
def targets(as_json: bool) -> int:
    """List the targets that profiles describe: shipped ones and those in ./profiles. Opens none of them."""
    from edgekd.doctor import check_targets

    rows = check_targets(open_them=False)
    if as_json:
        print_json([row.to_builtins() for row in rows])
        return 0
    print_table(
        "Targets",
        ("target", "from", "transport", "runtime", "precisions", "threads", "ran on hardware", "description"),
        [
            (row.profile, row.origin, row.transport, row.runtime, ", ".join(row.precisions), str(row.threads), row.hardware, row.problem or row.description)
            for row in rows
        ],
        numeric=(5,),
    )
    return 0


@click.group()
def profile() -> None:
    """Show target profiles and their fields."""


@profile.command("list")
@json_option
@click.pass_context
def profile_list(context: click.Context, as_json: bool) -> int:
    """List the profiles on the search path; the same as `edgekd targets`."""
    code: int = context.invoke(targets, as_json=as_json)
    return code


@profile.command("fields")
def profile_fields() -> int:
    """List every field that a profile may set, what it takes, and its default."""
    from edgekd.settings.profile_fields import describe_fields

    print_table("Fields of a profile", ("field", "takes", "default"), [(row.key, row.allowed, row.default or "(must be given)") for row in describe_fields()])
    return 0


@profile.command("show")
@click.argument("name")
@set_option
@json_option
def profile_show(name: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Print a profile with every default and override applied. NAME is a name or the path of a file."""
    from edgekd.records import Record
    from edgekd.settings.profile_file import load_profile

    found = load_profile(name, overrides)
    if as_json:
        print_json(found.to_builtins())
        return 0
    rows: list[tuple[str, str]] = []

    def walk(record: Record, prefix: str) -> None:
        for key in record.__struct_fields__:
            value = getattr(record, key)
            if isinstance(value, Record):
                walk(value, f"{prefix}{key}.")
            elif isinstance(value, tuple):
                rows.append((prefix + key, ", ".join(str(getattr(item, "value", item)) for item in value)))
            else:
                rows.append((prefix + key, "off" if value is None else str(getattr(value, "value", value))))

    walk(found, "")
    print_table(f"Profile {found.name}", ("field", "value"), rows)
    if not found.proven_on:
        click.echo("never ran on real hardware")
    return 0


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@target_option()
@set_option
@click.option("--percentile", type=float, default=50.0, show_default=True, help="A percentile to print beside p50, p90 and p99.")
@click.option("--inputs", type=FOLDER, help="A folder with NAME.npy for each input, (samples, ...). Default: seeded random inputs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs and of the order of launches.")
@click.option("--verdict-grade", is_flag=True, help="Take as many launches as a verdict does (minutes) instead of a screening.")
@click.option("--ops", type=int, default=10, show_default=True, help="How many of the slowest operators to list.")
@json_option
def bench(
    model: Path,
    target: str,
    overrides: tuple[str, ...],
    percentile: float,
    inputs: Path | None,
    seed: int,
    verdict_grade: bool,
    ops: int,
    as_json: bool,
) -> int:
    """Measure the latency of MODEL (.onnx, .tflite, or a folder with artifact.json) on a target. Exits 2 when the measurement is not valid.

    A model with state is measured per step, its state fed back.
    """
    from edgekd.benching import bench as run_bench
    from edgekd.errors import EXIT_PASS, EXIT_REFUSE
    from edgekd.target import connect

    with connect(target, overrides=overrides) as live:
        say(f"measuring {model} on {live.name}")
        result = run_bench(model, target=live, percentile=percentile, inputs=inputs, seed=seed, verdict_grade=verdict_grade, progress=launch_progress)
    if as_json:
        measurement = result.measurement.to_builtins()
        print_json(
            {
                "summary_ms": result.summary,
                "state": list(result.iospec.state_inputs),
                "file_notes": result.file_notes,
                "measurement": measurement,
                "op_times": [item.to_builtins() for item in result.op_times],
            }
        )
    else:
        _print_bench(model, result, ops, "random (seeded)" if inputs is None else str(inputs))
    return EXIT_PASS if result.measurement.valid else EXIT_REFUSE


def _what(result: BenchResult) -> str:
    state = result.iospec.state_inputs
    return f"per step, state fed back ({', '.join(state)})" if state else "one inference"


def _print_bench(model: Path, result: BenchResult, ops: int, inputs: str) -> None:
    from edgekd.report.words import ms_text
    from edgekd.stats import min_samples

    taken = result.measurement
    fields = taken.fingerprint.fields
    samples, aside = sum(len(launch.samples_ns) for launch in taken.launches), sum(launch.set_aside for launch in taken.launches)
    if taken.simulated:
        click.echo(f"SIMULATED ({taken.simulated}): these times come from no device")
    if not taken.valid:
        click.echo(f"INVALID: {taken.reason}; the numbers below say nothing about the model")
    if result.summary:
        print_table(
            f"Latency of {model.name}, {_what(result)}, end to end",
            ("clock", "latency"),
            [
                (name, ms_text(value) + ("" if samples >= min_samples(float(name[1:])) else " (too few samples)"))
                for name, value in result.summary.items()
                if name.startswith("p")
            ]
            + [(words, ms_text(result.summary[key])) for key, words in (("init", "initialization"), ("first", "first inference")) if key in result.summary],
            numeric=(1,),
        )
    launch = taken.protocol
    print_table(
        "Conditions",
        ("condition", "value"),
        [
            ("device", fields.get("cpu_model", fields.get("device", "unknown"))),
            ("runtime", f"{fields.get('runtime', '?')} {fields.get('runtime_version', '')}".strip()),
            ("threads", fields.get("threads", "?")),
            ("precision", result.precision.value),
            ("inputs", inputs),
            ("grade", f"{taken.grade.value}, {taken.mode}"),
            ("launches", f"{len(taken.launches)} valid, {len(taken.rejected)} rejected, each a fresh process; {samples} inferences"),
            *([("set aside", f"{aside} inferences more, beside a slow sentinel")] if aside else []),
            ("protocol", f"at least {launch.min_samples} inferences and {launch.min_time_s:g} s a launch, warm-up at least {launch.warmup_min_s:g} s"),
            ("validity", "valid" if taken.valid else f"INVALID: {taken.reason}"),
            ("simulated", taken.simulated or "no"),
            ("date", taken.taken_at or "not recorded"),
            ("artifact", taken.artifact[:16]),
        ],
    )
    if result.note:
        click.echo(result.note)
    for name, text in result.file_notes.items():
        click.echo(f"in the file: {name}: {text}")
    for rejected in taken.rejected:
        click.echo(f"launch {rejected.index} rejected: {rejected.invalid}")
    slowest = sorted(result.op_times, key=lambda item: -item.time_ns)[: max(0, ops)]
    if slowest:
        rows = [(item.name, item.op_type, ms_text(item.time_ns / 1e6), f"{item.share:.1%}", item.provider or "-") for item in slowest]
        print_table(
            f"Slowest {len(slowest)} of {len(result.op_times)} operators (by the runtime's profiler)",
            ("operator", "type", "time", "share", "provider"),
            rows,
            numeric=(2, 3),
        )
