"""Commands that make something: demo, compress, convert."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.cli.common import FILE, FOLDER, json_option, print_json, print_ledger, print_table, print_verdict, require, say, set_option, target_option

if TYPE_CHECKING:
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


def _print_result(result: Result, as_json: bool) -> int:
    if as_json:
        print_json(
            {
                "verdict": result.verdict.to_builtins(),
                "exit_code": result.exit_code,
                "bundle": None if result.bundle is None else str(result.bundle),
                "report": str(result.report),
                "run_dir": str(result.run_dir),
                "ledger": result.ledger.to_builtins(),
            }
        )
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
@click.option("--target", help="A profile by name, or the path of its file. Default: what the job says; local with --quantize-only.")
@click.option("--task", type=click.Choice(["classification", "regression"]), help="With --quantize-only: what outputs mean. Default: told from the data.")
@click.option("--seed", type=click.IntRange(min=0), help="With --quantize-only: seed of the split. Default: 0.")
@click.option("--allow-extreme", is_flag=True, default=None, help="Accept a budget above the teacher's latency or below a hundredth of it.")
@click.option("--accept-simulated", is_flag=True, default=None, help="Let a simulated target pass or fail; the manifest records it.")
def compress(job: Path | None, plan_only: bool, overrides: tuple[str, ...], run_dir: Path | None, as_json: bool, model: Path | None, **only: Any) -> int:
    """Make a student that meets a budget: from JOB (a TOML file), or from one ONNX file with --quantize-only.

    The same command continues a run that was killed. Exits 0 on pass, 1 on fail, 2 on refuse.
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


def _job_overrides(target: str | None, allow_extreme: bool | None, accept_simulated: bool | None, **_: Any) -> list[str]:
    """The options that a job takes too, as overrides. A profile's path is relative to where the command runs, not to the job."""
    found = [f"options.{name}=true" for name, given in (("allow_extreme", allow_extreme), ("accept_simulated", accept_simulated)) if given]
    if target is not None:
        is_path = "/" in target or target.endswith(".toml")
        found.append(f"target={json.dumps(str(Path(target).resolve()) if is_path else target, ensure_ascii=False)}")
    return found


def _compress_job(path: Path, overrides: tuple[str, ...], run_dir: Path | None, plan_only: bool, as_json: bool) -> int:
    from edgekd.jobs import load_job

    job = load_job(path, overrides)
    if plan_only:
        made = job.plan(run_dir=run_dir)
        if as_json:
            print_json(made.to_builtins())
        else:
            click.echo(made.text())
        return 0
    if not job.spec.student.fixed.endswith(".onnx"):
        require("torch", "distill", "edgekd compress with a student that is trained")
    return _print_result(job.run(run_dir=run_dir), as_json)


def _quantize_only(model: Path, overrides: tuple[str, ...], run_dir: Path | None, **only: Any) -> Result:
    if only["data"] is None:
        raise click.UsageError("--quantize-only needs --data FOLDER")
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
    with connect(only["target"] or "local", overrides=overrides) as target:
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


@click.command()
@click.argument("model", type=FILE)
@click.option("--to", "to_format", type=click.Choice(["onnx"]), default="onnx", show_default=True, help="The format to convert to.")
@click.option("--precision", type=click.Choice(["fp32", "int8"]), default="fp32", show_default=True, help="The arithmetic to convert to.")
@click.option("--calibration", type=FOLDER, help="For int8: a folder with NAME.npy for each input, (samples, ...).")
@click.option("--method", type=click.Choice(["minmax", "percentile", "entropy"]), default="minmax", show_default=True, help="How ranges are taken.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The file to write (.onnx), or a folder for a model with external data.")
@target_option()
@set_option
def convert(model: Path, to_format: str, precision: str, calibration: Path | None, method: str, out: Path, target: str, overrides: tuple[str, ...]) -> int:
    """Convert MODEL (.onnx) with its batch bound to 1; to int8 in the scheme that suits the target.

    Makes no claim about latency or accuracy: `edgekd bench` and `edgekd compress` do. The outputs are compared on the
    calibration inputs.
    """
    if (precision == "int8") != (calibration is not None):
        raise click.UsageError("--calibration FOLDER goes with --precision int8, and int8 needs it")
    import tempfile

    from edgekd.onnx_io import import_onnx
    from edgekd.storage import copy_file

    with tempfile.TemporaryDirectory(prefix="edgekd-convert-") as name:
        made = import_onnx(model, Path(name) / "float")
        if calibration is not None:
            made = _to_int8(made, Path(name) / "int8", calibration, method, target, overrides)
        extra = sorted(set(made.record.files) - {made.record.entry})
        if out.suffix == ".onnx" and extra:
            raise click.UsageError(f"the model has external data ({', '.join(extra)}): give a folder to -o, not a file")
        if out.suffix == ".onnx":
            copy_file(made.entry, out)
        else:
            made.copy_to(out)
            made.record.save(out / "artifact.json")
    click.echo(f"{out}: {to_format}, {made.record.precision.value}, {made.record.size_bytes} bytes, SHA-256 {made.record.files[made.record.entry]}")
    return 0


def _to_int8(source: Any, folder: Path, calibration: Path, method: str, target: str, overrides: tuple[str, ...]) -> Any:
    """The int8 artifact, after printing how its outputs compare with the source's on the calibration inputs."""
    from edgekd.contracts import ConvertRequest
    from edgekd.errors import UnsupportedModel
    from edgekd.npy import load_inputs
    from edgekd.parity import compare_hop
    from edgekd.parity_graph import output_ranges
    from edgekd.quantize.calibrate import calibration_set
    from edgekd.quantize.recipes import candidate_schemes, make_recipe
    from edgekd.records import Precision
    from edgekd.registry import load

    inputs = load_inputs(calibration, source.record.iospec)
    data = calibration_set(inputs, split=f"folder {calibration.name}")
    folder.mkdir()
    with connect_to(target, overrides) as live:
        schemes = candidate_schemes(live.capabilities)
        if not schemes:
            raise UnsupportedModel("the target runs no int8", found=live.name, hint="edgekd doctor TARGET lists what it can do", subject=live.name)
        say(f"calibrating scheme {schemes[0]} by {method} on {len(next(iter(inputs.values())))} samples of {calibration}")
        request = ConvertRequest(
            source=source,
            folder=folder,
            iospec=source.record.iospec,
            example={key: value[:1] for key, value in inputs.items()},
            recipe=make_recipe(schemes[0], method, data),
            calibration=data,
            infer=live.runtime.infer if live.capabilities.taps else None,
        )
        made = load("converters", "qdq-from-onnx")().convert(request)
        some = {key: value[:32] for key, value in inputs.items()}
        hop = compare_hop(
            "float -> int8",
            live.runtime.infer(source, some),
            live.runtime.infer(made, some),
            precision=Precision.INT8,
            depth=int(made.record.metadata.get("depth", "50")),
            limits=output_ranges(made),
        )
        rows = [
            (item.name, "within tolerance" if item.passed else f"DIFFERS: {item.reason}", f"{item.sqnr_db:.1f} dB", f"{item.cosine:.6f}", f"{item.max_abs:.3g}")
            for item in hop.tensors
        ]
        mark = f", SIMULATED ({live.simulated})" if live.simulated else ""
        print_table(
            f"Outputs against the source on {hop.samples} samples, run on {live.name}{mark}",
            ("output", "result", "signal to error", "cosine", "largest error"),
            rows,
            numeric=(2, 3, 4),
        )
        return made


def connect_to(target: str, overrides: tuple[str, ...]) -> Any:
    """The target, not yet open."""
    from edgekd.target import connect

    return connect(target, overrides=overrides)
