"""Commands that make something by a run: demo, compress."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.cli.common import FILE, FOLDER, json_option, print_json, print_ledger, print_verdict, require, set_option, target_option

if TYPE_CHECKING:
    from edgekd.fleet import Fleet
    from edgekd.result import Result

_ONLY_ONNX = {
    "data": "name the splits under [data] in the job",
    "latency_ms": "--set budget.latency_ms=0.3",
    "latency_share": "--set budget.latency_share=0.5",
    "percentile": "--set budget.percentile=50",
    "max_drop": "--set budget.max_drop=0.01",
    "size_mb": "--set budget.size_mb=1.5",
    "task": "--set task=classification",
    "seed": "--set seed=1",
}
"""Options that a job does not take, and what says the same there."""


def _result_json(result: Result) -> dict[str, Any]:
    return {
        "verdict": result.verdict.to_builtins(),
        "exit_code": result.exit_code,
        "bundle": None if result.bundle is None else str(result.bundle),
        "report": str(result.report),
        "run_dir": str(result.run_dir),
        "ledger": result.ledger.to_builtins(),
    }


def _print_fleet(fleet: Fleet, as_json: bool) -> int:
    """Every target's result, one line of each verdict, and the report of all."""
    if as_json:
        runs = {name: _result_json(result) for name, result in fleet.results.items()}
        print_json({"outcome": fleet.outcome.value, "exit_code": fleet.exit_code, "report": str(fleet.report), "run_dir": str(fleet.run_dir), "targets": runs})
        return fleet.exit_code
    for name, result in fleet.results.items():
        click.echo(f"== target {name}")
        _print_result(result, as_json=False)
    click.echo("== all targets")
    for name, result in fleet.results.items():
        click.echo(f"{name}: {result.verdict.outcome.value}: {result.verdict.reason}")
    click.echo(f"report of all targets: {fleet.report}")
    return fleet.exit_code


def _print_result(result: Result, as_json: bool) -> int:
    if as_json:
        print_json(_result_json(result))
        return result.exit_code
    print_ledger(result.ledger)
    print_verdict(result.verdict)
    if result.bundle is not None:
        click.echo(_shipped_line(result.bundle))
    click.echo(f"bundle: {result.bundle if result.bundle is not None else 'none, because no artifact was judged'}")
    click.echo(f"report: {result.report}")
    return result.exit_code


def _shipped_line(bundle: Path) -> str:
    """What the bundle holds in one line; it is called shipped only after a pass."""
    from edgekd.bundle import MANIFEST
    from edgekd.records import Manifest, Outcome
    from edgekd.report.words import artifact_words

    manifest = Manifest.load(bundle / MANIFEST)
    words = f"{', '.join(artifact_words(manifest).values())}; judged {manifest.created_at}"
    return f"shipped: {words}" if manifest.verdict.outcome is Outcome.PASS else f"judged, not to be shipped: {words}"


@click.command()
@click.option("--run-dir", type=FOLDER, default=Path("runs/demo"), show_default=True, help="Where outputs go; a killed demo continues there.")
@target_option()
@set_option
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random.")
@click.option("--accept-simulated", is_flag=True, help="Let a simulated target pass or fail; the manifest records it.")
@json_option
def demo(run_dir: Path, target: str, overrides: tuple[str, ...], seed: int, accept_simulated: bool, as_json: bool) -> int:
    """Run the whole pipeline on scikit-learn's handwritten digits: a teacher, and a student under half its latency."""
    require("torch", "distill", "edgekd demo")
    require("sklearn", "demo", "edgekd demo")
    from edgekd.demo import run_demo

    start = time.monotonic()
    result = run_demo(run_dir, seed=seed, target=target, overrides=overrides, accept_simulated=accept_simulated)
    code = _print_result(result, as_json)
    click.echo(f"wall time of the demo: {time.monotonic() - start:.0f} s", err=as_json)
    return code


@click.command()
@click.argument("job", type=FILE, required=False)
@click.option("--plan", "plan_only", is_flag=True, help="Print stages, measurements, minutes and disk, and stop.")
@set_option
@click.option("--run-dir", type=FOLDER, help="Where outputs go. Default: what the job says; runs/NAME of the ONNX file. A killed run continues there.")
@json_option
@click.option("--quantize-only", "model", type=FILE, metavar="MODEL.onnx", help="No job and no training: make this ONNX file as fast as the target allows.")
@click.option("--data", type=FOLDER, help="With --quantize-only: a folder with NAME.npy for each input, and targets.npy if there are labels.")
@click.option("--latency-ms", type=float, help="With --quantize-only: the latency budget in milliseconds.")
@click.option("--latency-share", "--share", type=float, help="With --quantize-only: the budget as a share of the file's own latency, for example 0.6.")
@click.option("--percentile", type=float, help="With --quantize-only: the budget's percentile. Default: 50.")
@click.option("--max-drop", type=float, help="With --quantize-only: the largest drop of the metric, for example 0.01.")
@click.option("--size-mb", type=float, help="With --quantize-only: the size budget in megabytes (10^6 bytes).")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="A profile by name, or the path of its file; several times for several targets. Default: what the job says, or local.",
)
@click.option("--task", type=click.Choice(["classification", "regression"]), help="With --quantize-only: what outputs mean. Default: told from the data.")
@click.option("--seed", type=click.IntRange(min=0), help="With --quantize-only: seed of the split. Default: 0.")
@click.option("--allow-extreme", is_flag=True, default=None, help="Accept a budget above the teacher's latency or below a hundredth of it.")
@click.option("--accept-simulated", is_flag=True, default=None, help="Let a simulated target pass or fail; the manifest records it.")
def compress(job: Path | None, plan_only: bool, overrides: tuple[str, ...], run_dir: Path | None, as_json: bool, model: Path | None, **only: Any) -> int:
    """Make a student that meets a budget: from JOB (a TOML file), or from one ONNX file with --quantize-only.

    The same command continues a run that was killed. Exits 0 on pass, 1 on fail, 2 on refuse; of several targets the worst counts,
    a fail before a refuse.
    """
    if (job is None) == (model is None):
        raise click.UsageError("give a JOB file, or --quantize-only MODEL.onnx --data FOLDER")
    if model is not None:
        if plan_only:
            raise click.UsageError("--plan needs a JOB file")
        return _print_result(_quantize_only(model, overrides, run_dir, **only), as_json)
    place = Path(str(job))
    if place.suffix == ".onnx":
        raise click.UsageError(f"{place} is a model, not a job: edgekd compress --quantize-only {place} --data FOLDER --latency-share 0.6")
    wrong = next((name for name in _ONLY_ONNX if only[name] is not None), None)
    if wrong is not None:
        raise click.UsageError(f"--{wrong.replace('_', '-')} goes with --quantize-only; for a job: {_ONLY_ONNX[wrong]}")
    return _compress_job(place, (*overrides, *_job_overrides(**only)), run_dir, plan_only, as_json)


def _job_overrides(targets: tuple[str, ...], allow_extreme: bool | None, accept_simulated: bool | None, **_: Any) -> list[str]:
    """The options that a job takes too, as overrides. A profile's path is relative to where the command runs, not to the job."""
    found = [f"options.{name}=true" for name, given in (("allow_extreme", allow_extreme), ("accept_simulated", accept_simulated)) if given]
    if targets:
        named = [str(Path(name).resolve()) if "/" in name or name.endswith(".toml") else name for name in targets]
        found.append(f"target={json.dumps(named, ensure_ascii=False)}")
    return found


def _compress_job(path: Path, overrides: tuple[str, ...], run_dir: Path | None, plan_only: bool, as_json: bool) -> int:
    from edgekd.fleet import Fleet
    from edgekd.settings.jobs import load_job

    job = load_job(path, overrides)
    if plan_only:
        made = job.plan(run_dir=run_dir)
        if as_json:
            print_json([one.to_builtins() for one in made] if len(made) > 1 else made[0].to_builtins())
        else:
            click.echo("\n\n".join(one.text() for one in made))
        return 0
    if not job.spec.student.fixed.endswith(".onnx"):
        require("torch", "distill", "edgekd compress with a student that is trained")
    done = job.run(run_dir=run_dir)
    return _print_fleet(done, as_json) if isinstance(done, Fleet) else _print_result(done, as_json)


def _quantize_only(model: Path, overrides: tuple[str, ...], run_dir: Path | None, **only: Any) -> Result:
    if only["data"] is None:
        raise click.UsageError("--quantize-only needs --data FOLDER")
    if len(only["targets"]) > 1:
        raise click.UsageError("--quantize-only takes one --target")
    if (only["latency_ms"] is None) == (only["latency_share"] is None):
        raise click.UsageError("--quantize-only needs one of --latency-ms and --latency-share")
    from edgekd.options import Options
    from edgekd.quantize_only import quantize_only
    from edgekd.records import Budget
    from edgekd.target import connect

    budget = Budget(
        latency_ms=only["latency_ms"],
        latency_share=only["latency_share"],
        percentile=50.0 if only["percentile"] is None else only["percentile"],
        max_drop=only["max_drop"],
        size_mb=only["size_mb"],
    )
    options = Options(allow_extreme=bool(only["allow_extreme"]), accept_simulated=bool(only["accept_simulated"]))
    with connect(*only["targets"] or ("local",), overrides=overrides) as target:
        return quantize_only(
            model,
            only["data"],
            target=target,
            budget=budget,
            run_dir=run_dir or Path("runs") / model.stem,
            seed=only["seed"] or 0,
            options=options,
            task=only["task"],
        )
