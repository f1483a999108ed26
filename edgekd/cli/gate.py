"""Commands that judge a shipped bundle again: validate for people, gate for CI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from edgekd.cli.common import FOLDER, json_option, launch_progress, print_json, print_table, print_verdict, say, set_option, target_option
from edgekd.errors import EdgekdError

if TYPE_CHECKING:
    from edgekd.gate_output import GateReport
    from edgekd.gating import GateResult

_OUT = click.Path(path_type=Path, dir_okay=False)
_DATA = click.option("--data", type=FOLDER, help="Evaluation data, where the bundle holds none.")
_TASK = click.option(
    "--task",
    metavar="MODULE:NAME",
    help="Your own task, where the bundle was judged by one. It is imported because you name it; a bundle's word is not enough.",
)
_SIMULATED = click.option("--accept-simulated", is_flag=True, help="Let a null, emulated or fake target pass or fail; otherwise it refuses.")


@click.command()
@click.argument("bundle", type=FOLDER)
@target_option(None)
@set_option
@_DATA
@_TASK
@_SIMULATED
@json_option
def validate(bundle: Path, target: str | None, overrides: tuple[str, ...], data: Path | None, task: str | None, accept_simulated: bool, as_json: bool) -> int:
    """Judge BUNDLE again on the device (default: by the profile in the bundle) and print every check.

    Exits 0 on pass, 1 on fail, 2 on refuse.
    """
    from edgekd.gate_output import gate_exit_code
    from edgekd.gating import gate as run_gate

    result = run_gate(bundle, target=target, data=data, accept_simulated=accept_simulated, overrides=overrides, task=task, progress=launch_progress)
    if as_json:
        print_json(result.verdict.to_builtins())
    else:
        print_verdict(result.verdict)
        print_table("Conditions", ("condition", "value"), list(conditions(bundle, result).items()))
    return gate_exit_code(result.verdict.outcome)


@click.command()
@click.argument("bundle", type=FOLDER)
@target_option(None)
@set_option
@_DATA
@_TASK
@_SIMULATED
@click.option(
    "--on-refuse",
    type=click.Choice(["fail", "neutral"]),
    default="fail",
    show_default=True,
    help="When the evidence does not decide. fail: exit 2, a failure in JUnit. neutral: exit 0 with a note, skipped in JUnit.",
)
@click.option("--junit", type=_OUT, help="Write JUnit XML here, one test case per check.")
@click.option("--json", "json_path", type=_OUT, help="Write the verdict with its evidence as JSON here.")
@click.option("--markdown", type=_OUT, help="Write a summary in Markdown here, for a job page or a merge request.")
def gate(
    bundle: Path,
    target: str | None,
    overrides: tuple[str, ...],
    data: Path | None,
    task: str | None,
    accept_simulated: bool,
    on_refuse: Literal["fail", "neutral"],
    junit: Path | None,
    json_path: Path | None,
    markdown: Path | None,
) -> int:
    """Judge BUNDLE again on the device, for CI: one line of reason, and files for the machine around it.

    Exits 0 on pass, 1 on fail only, 2 on refuse (0 with --on-refuse=neutral), 3 on errors. The files are also written
    when the gate ends in an error.
    """
    from edgekd.gate_output import GateReport, one_line
    from edgekd.gating import gate as run_gate

    place = bundle.resolve()
    name = f"{place.parent.name}/{place.name}"
    paths = {"junit": junit, "json": json_path, "markdown": markdown}
    try:
        result = run_gate(bundle, target=target, data=data, accept_simulated=accept_simulated, overrides=overrides, task=task, progress=launch_progress)
    except EdgekdError as error:
        _write(GateReport(name, None, error, {"bundle": str(bundle)}, on_refuse), paths)
        raise
    report = GateReport(name, result.verdict, None, conditions(bundle, result), on_refuse)
    _write(report, paths)
    say(f"judged by {result.judged_by}" + (f"; the profile differs: {'; '.join(result.differences)}" if result.differences else ""))
    click.echo(one_line(report))
    return report.exit_code


def _write(report: GateReport, paths: dict[str, Path | None]) -> None:
    from edgekd.gate_output import gate_json, junit_xml, markdown
    from edgekd.storage import write_atomic

    makers: dict[str, Callable[[GateReport], bytes]] = {"junit": junit_xml, "json": gate_json, "markdown": lambda known: markdown(known).encode()}
    for name, path in paths.items():
        if path is not None:
            write_atomic(path, makers[name](report))


def conditions(bundle: Path, result: GateResult) -> dict[str, str]:
    """What a reader needs to trust a gate's numbers: device, runtime, precision, protocol, scores, date, hash."""
    manifest, taken = result.manifest, result.measurement
    fields = (manifest.fingerprint if taken is None else taken.fingerprint).fields
    found = {
        "bundle": str(bundle),
        "target": result.target,
        "judged by": result.judged_by,
        "task": result.task,
        "device": fields.get("cpu_model", fields.get("device", "unknown")),
        "runtime": f"{fields.get('runtime', '?')} {fields.get('runtime_version', '')}".strip(),
        "threads": fields.get("threads", "?"),
        "precision": manifest.artifact.precision.value,
        "ran on hardware": "yes" if manifest.proven_on_hardware else "never ran on real hardware",
        "artifact": manifest.artifact.content_hash()[:16],
        "bundle made": f"{manifest.created_at} by edgekd {manifest.edgekd}",
    }
    if result.differences:
        found["profile differs"] = "; ".join(result.differences)
    if taken is not None:
        found |= {
            "measured": taken.taken_at or "date not recorded",
            "launches": f"{len(taken.launches)} valid, {len(taken.rejected)} rejected, each a fresh process",
            "protocol": f"{taken.grade.value}, {taken.mode}, SHA-256 {taken.protocol.digest()[:12]}",
            "validity": "valid" if taken.valid else f"INVALID: {taken.reason}",
            "simulated": taken.simulated or "no",
        }
    for name, value in (("student score", result.student_accuracy), ("teacher score", result.teacher_accuracy), ("agreement", result.agreement)):
        if value is not None:
            found[name] = f"{value:.4f}"
    return found
