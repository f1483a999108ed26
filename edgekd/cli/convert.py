"""The command convert: a model in another format and precision, by the best road or the one that is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.cli.common import FILE, FOLDER, given_object, json_option, print_json, print_table, say, set_option, target_option

if TYPE_CHECKING:
    from edgekd.conversion.convert import Conversion
    from edgekd.conversion.formats import Route

_ENDINGS = {".onnx": "onnx", ".tflite": "tflite"}


@click.command()
@click.argument("model")
@click.option("--to", "to_format", help="The format to convert to: onnx, tflite or saved_model. Default: by the ending of -o, else that of MODEL.")
@click.option("--precision", help="The arithmetic to convert to: fp32, fp16 or int8. Default: that of MODEL.")
@click.option("--calibration", type=FOLDER, help="For int8: a folder with NAME.npy for each input, (samples, ...).")
@click.option("--inputs", type=FOLDER, help="A folder with NAME.npy for each input, to compare hops on. Default: those of --calibration, else random.")
@click.option("--via", default="", help="Converters or formats that the road must pass, in order, with commas between.")
@click.option("--plan", is_flag=True, help="List the roads, best first, with what is missing for each, and stop.")
@click.option("--fastest", is_flag=True, help="Convert by every road that is ready, measure them in turn on --target, and keep the fastest that is right.")
@click.option("--scheme", help="For int8: the quantization scheme. Default: the first of the target that runs the last format.")
@click.option("--method", type=click.Choice(["minmax", "percentile", "entropy", "mse"]), default="minmax", show_default=True, help="How ranges are taken.")
@click.option("--iospec", type=FILE, help="For a Keras file or a SavedModel: a JSON file that says what it takes and gives.")
@click.option("--outputs", default="", help="The outputs to keep, with commas between; the others are cut with what only fed them. Default: all.")
@click.option("--max-transposes", type=int, help="Refuse a file with more transpositions. Default for TFLite: those that MODEL asks for, and the borders.")
@click.option("--channel-last", is_flag=True, help="For a torch module to TFLite: take and give images as NHWC.")
@click.option("--processing", type=FILE, help="A TOML or JSON file: normalisation, softmax, nms, labels, each inside or outside the file.")
@click.option("--environments", type=FOLDER, help="The folder of the converters' environments, as in `edgekd env --path`.")
@click.option("--allow-divergence", is_flag=True, help="Write the file although a hop computes something else.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The file to write, or a folder for a model of several files.")
@target_option(None)
@set_option
@json_option
def convert(
    model: str,
    to_format: str | None,
    precision: str | None,
    calibration: Path | None,
    inputs: Path | None,
    via: str,
    plan: bool,
    fastest: bool,
    scheme: str | None,
    method: str,
    iospec: Path | None,
    outputs: str,
    max_transposes: int | None,
    channel_last: bool,
    processing: Path | None,
    environments: Path | None,
    allow_divergence: bool,
    out: Path | None,
    target: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Convert MODEL, with its batch bound to 1, by the best road that is ready here; every hop is compared.

    MODEL is a file (.onnx, .tflite, .keras), a SavedModel folder, or MODULE:NAME of a torch module or a function that makes it. Makes no claim
    about latency or accuracy, but with --fastest: `edgekd bench` and `edgekd compress` do. Nothing is written when a hop computes something else.
    """
    steps = _names(via)
    if plan:
        return _plan(model, to_format or _to(out), precision, steps, environments, as_json)
    if out is None:
        raise click.UsageError("say where the result goes: -o FILE, or --plan to list the roads only")
    if overrides and target is None:
        raise click.UsageError("--set needs --target")
    if (precision == "int8") != (calibration is not None):
        raise click.UsageError("--calibration FOLDER goes with --precision int8, and int8 needs it")
    import edgekd
    from edgekd.conversion.inputs import source_format
    from edgekd.records import IOSpec

    source: Any = given_object(model) if _is_named(model) else Path(model)
    wanted = to_format or _to(out) or source_format(source)
    given: dict[str, Any] = {
        "calibration": calibration,
        "example": inputs,
        "out": out,
        "scheme": scheme,
        "method": method,
        "target": target,
        "overrides": overrides,
        "iospec": None if iospec is None else IOSpec.load(iospec),
        "environments": environments,
        "outputs": _names(outputs) or None,
        "max_transposes": max_transposes,
        "processing": processing,
        "progress": say,
    }
    if fastest:
        if target is None or steps or allow_divergence:
            raise click.UsageError("--fastest needs --target, and goes with neither --via nor --allow-divergence")
        if channel_last:
            raise click.UsageError("--fastest does not take --channel-last, which one road only can promise: name that road with --via tflite-from-torch")
        return _fastest(source, wanted, as_json, precision=precision or "fp32", **given)
    made = edgekd.convert(
        source,
        wanted,
        precision=precision,
        via=steps,
        options={"tflite-from-torch": {"channel_last": True}} if channel_last else None,
        allow_divergence=allow_divergence,
        **given,
    )
    if as_json:
        print_json(made.to_builtins())
    else:
        _print(made)
    return 0


def _fastest(source: Any, to: str, as_json: bool, **given: Any) -> int:
    """Convert by every road, print what each took, then what was kept."""
    from edgekd.conversion.fastest import fastest
    from edgekd.report.words import ms_text

    found = fastest(source, to, **given)
    if as_json:
        print_json(found.to_builtins())
        return 0
    if found.simulated:
        click.echo(f"SIMULATED ({found.simulated}): these times come from no device")
    rows = [
        (
            " -> ".join(road.route),
            road.outcome,
            "-" if road.latency_ms is None else ms_text(road.latency_ms),
            "-" if road.lower_ms is None or road.upper_ms is None else f"{ms_text(road.lower_ms)} to {ms_text(road.upper_ms)}",
            "-" if road.size_bytes is None else str(road.size_bytes),
            road.reason or "-",
        )
        for road in found.roads
    ]
    title = f"Roads to {to}, p{found.percentile:g} on {found.target}, inputs {found.inputs}"
    print_table(title, ("road", "result", "latency", "99 % bounds", "bytes", "why"), rows, numeric=(2, 4))
    _print(found.conversion)
    return 0


def _to(out: Path | None) -> str | None:
    return None if out is None else _ENDINGS.get(out.suffix)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _is_named(model: str) -> bool:
    return ":" in model and not Path(model).exists()


def _print(made: Conversion) -> None:
    """The comparison of every hop as a table, then what was written."""
    from edgekd.models.notes import HELD, shown_notes

    rows = [
        (
            hop.hop,
            item.name,
            "within tolerance" if item.passed else f"DIFFERS: {item.reason}",
            f"{item.sqnr_db:.1f} dB",
            f"{item.cosine:.6f}",
            f"{item.max_abs:.3g}",
        )
        for hop in made.parity
        for item in hop.tensors
    ]
    if rows:
        places = ", ".join(f"{name} on {place}" for name, place in made.ran_on.items())
        title = f"Hops compared on {made.inputs}; run: {places}"
        print_table(title, ("hop", "output", "result", "signal to error", "cosine", "largest error"), rows, numeric=(3, 4, 5))
    for note in made.notes:
        click.echo(f"note: {note}")
    record = made.artifact
    if made.layout_ops is not None:
        click.echo(f"layout operators: {made.layout_ops}, of which {made.transposes} move a tensor")
    if record.format.value in HELD:
        for name, text in shown_notes(made.stored.entry).items():
            click.echo(f"in the file: {name}: {text}")
    click.echo(f"{made.out}: {record.format.value}, {record.precision.value}, {record.size_bytes} bytes, SHA-256 {record.files[record.entry]}")


def _plan(model: str, to: str | None, precision: str | None, via: tuple[str, ...], environments: Path | None, as_json: bool) -> int:
    """Print the roads, best first; the first that is ready is the one that would be taken."""
    from edgekd.conversion.formats import TORCH, load_graph
    from edgekd.conversion.inputs import source_format
    from edgekd.records import Precision

    source = TORCH if _is_named(model) else source_format(Path(model))
    wanted = precision or Precision.FP32.value
    graph = load_graph()
    found = graph.routes(source, to or source, wanted, via)
    if not found:
        raise graph.no_route(source, to or source, Precision(wanted), via)
    if as_json:
        print_json({"routes": [{"converters": list(route.converters), "missing": list(route.missing(environments))} for route in found]})
        return 0

    def state(route: Route) -> str:
        lines = route.missing(environments)
        return f"needs: {'; '.join(lines)}" if lines else "ready"

    taken = next((route for route in found if not route.missing(environments)), None)
    rows = [("->" if route is taken else "", str(route), state(route)) for route in found]
    print_table(f"Roads from {source} to {to or source} in {wanted}, best first", ("taken", "road", "state"), rows)
    return 0
