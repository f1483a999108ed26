"""The command preflight: which operators of a network or of a job's students a target cannot run, before anything is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.cli.common import given_object, json_option, print_json, print_table, require, set_option

if TYPE_CHECKING:
    from edgekd.operators.report import OperatorSet, PreflightReport


@click.command()
@click.argument("what")
@click.option(
    "--target", "targets", multiple=True, help="A profile by name, or the path of its file; several times for several. Default: what the job says, or local."
)
@click.option("--example", type=click.Path(path_type=Path), help="A .npy file, or a folder with NAME.npy for each input. A job has its validation data.")
@set_option
@json_option
def preflight(what: str, targets: tuple[str, ...], example: Path | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Convert one student of each operator set of WHAT with untrained weights, ask the target, run it there once and compare.

    WHAT is MODULE:NAME of a torch module, of a student space or of a function that makes one, or a job file (.toml). Exits 0 with a table that
    names what is refused and why, and 3 where no student is left.
    """
    require("torch", "distill", "edgekd preflight")
    is_job = what.endswith(".toml")
    if is_job == (example is not None):
        raise click.UsageError("a job has its own data: leave --example out" if is_job else "give --example: a .npy file, or a folder with one for each input")
    found = _of_job(Path(what), targets, overrides) if is_job else _of_module(what, targets or ("local",), example, overrides)
    reports = list(found)
    if as_json:
        print_json([report.to_builtins() for report in reports])
    else:
        for report in reports:
            _print(report)
    for report in reports:
        report.require_some()
    return 0


def _of_module(what: str, targets: tuple[str, ...], example: Path | None, overrides: tuple[str, ...]) -> Iterator[PreflightReport]:
    import edgekd
    from edgekd.settings.named import first_on_path

    if ":" not in what:
        raise click.UsageError(f"{what} is neither MODULE:NAME nor a job file (.toml)")
    with first_on_path(Path.cwd()):  # students are made while the preflight runs
        given: Any = given_object(what)
        for name in targets:
            with edgekd.connect(name, overrides=overrides) as target:
                yield edgekd.preflight(given, target=target, example=example)


def _of_job(path: Path, targets: tuple[str, ...], overrides: tuple[str, ...]) -> Iterator[PreflightReport]:
    from edgekd.operators.preflight import preflight_context
    from edgekd.pipeline import make_context
    from edgekd.settings.jobs import load_job
    from edgekd.stages import StageStore
    from edgekd.target import connect

    job = load_job(path, overrides)
    named = [str(Path(name).resolve()) if "/" in name or name.endswith(".toml") else name for name in targets]
    with job.first_on_path(), tempfile.TemporaryDirectory(prefix="edgekd.preflight.") as work:
        arguments = job.arguments(Path(work))
        run_dir = arguments.pop("run_dir")
        for name in named or job.targets:
            with connect(name, overrides=job.spec.profile) as target:
                yield preflight_context(make_context(store=StageStore(run_dir), target=target, **arguments))


def _print(report: PreflightReport) -> None:
    """The sets as a table, then every refusal in words."""
    simulated = f", SIMULATED: {report.simulated}" if report.simulated else ""
    title = f"Operator sets on {report.target} ({report.format}{simulated}), {report.conversions} conversion{'' if report.conversions == 1 else 's'}"
    print_table(title, ("set", "students", "tried", "result", "module", "operator"), [_row(item) for item in report.sets], numeric=(1,))
    for item in report.sets:
        if not item.passed:
            click.echo(f"refused: {', '.join(item.members)}: {report.diagnosis(item)}")
        elif item.note:
            click.echo(f"note: {item.tried}: {item.note}")
    for label, reason in sorted(report.unbuildable.items()):
        click.echo(f"cannot be built: {label}: {reason}")


def _row(item: OperatorSet) -> tuple[str, ...]:
    bad = item.culprit
    told = ("passed", "-", "-") if bad is None else (f"REFUSED at {bad.step}", bad.module or "(the network)", bad.operator or "-")
    return (item.key[:8], str(len(item.members)), item.tried, *told)
