"""The command line as a shell sees it: exit codes, messages with their remedy, output files, and what is not imported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgekd.cli.main import _COMMANDS, EdgekdGroup, cli
from edgekd.errors import DeviceTimeout, MeasurementInvalid

ROOT = Path(__file__).resolve().parents[2]


def edgekd(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], env={"COLUMNS": "200"})


def shell(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "edgekd", *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `net.onnx`, two convolutions and a linear layer, and 60 samples in `data/x.npy`."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    folder = tmp_path_factory.mktemp("model")
    generator = np.random.default_rng(0)
    weights = {"w1": (16, 1, 3, 3), "w2": (64, 16, 3, 3), "w3": (64, 4)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], name="pool"),
        helper.make_node("Flatten", ["e"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w3"], ["y"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array((generator.standard_normal(shape) * 0.3).astype(np.float32), name) for name, shape in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    (folder / "data").mkdir()
    np.save(folder / "data" / "x.npy", generator.standard_normal((60, 1, 8, 8)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def run_dir(model: Path) -> Path:
    """A finished run of `compress --quantize-only` on the null target."""
    pytest.importorskip("onnxruntime")
    place = model / "runs" / "net"
    budget = ("--latency-share", 0.9, "--max-drop", 0.5)
    done = edgekd("compress", "--quantize-only", model / "net.onnx", "--data", model / "data", *budget, "--target", "null", "--run-dir", place)
    assert done.exit_code == 2, done.output
    assert "SIMULATED: null" in done.output
    assert "next step: take a real target, or accept the simulation: --accept-simulated (in a job: options.accept_simulated = true)" in done.stdout
    assert "judged, not to be shipped: the given ONNX file, " in done.stdout
    assert "nothing to train" in done.stderr
    assert "train the student" not in done.stderr
    assert not [line for line in done.stdout.splitlines() if line != line.rstrip()]
    return place


# ------------------------------------------------------------------------------------------ start and help


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edgekd.cli.main import cli\n"
        "try:\n    cli.main(['--help'], prog_name='edgekd')\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'scipy', 'onnx', 'onnxruntime', 'msgspec', 'rich', 'matplotlib', 'jinja2', 'sklearn'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "heavy: []" in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in _COMMANDS)


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_command_has_help_that_agrees_with_its_line(name: str) -> None:
    done = edgekd(name, "--help")
    assert done.exit_code == 0
    assert f"edgekd {name}" in done.output or f"cli {name}" in done.output


@pytest.mark.parametrize("command", [("targets",), ("profile", "show", "null"), ("doctor", "null"), ("profile", "fields"), ("runs", "tests")])
def test_command_runs_without_importing_torch(command: tuple[str, ...]) -> None:
    code = (
        f"import sys\nfrom edgekd.cli.main import cli\ntry:\n    cli.main({list(command)!r})\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print('torch' in sys.modules, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False False\n")


def test_module_and_version_work_from_the_shell() -> None:
    done = shell("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "edgekd,")


# ------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("args", "remedy"),
    [
        (("bencj",), "bench (did you mean this?)"),
        (("bench",), "MODEL"),
        (("bench", "x.onnx", "--nope"), "--nope"),
        (("compress",), "--quantize-only"),
        (("compress", "--quantize-only", "x.onnx"), "--data"),
        (("compress", "--quantize-only", "x.onnx", "--data", "."), "--latency-ms"),
        (("compress", "--quantize-only", "x.onnx", "--plan"), "JOB"),
        (("compress", "job.toml", "--latency-ms", "1"), "--set budget.latency_ms"),
        (("compress", "job.toml", "--seed", "1"), "--set seed=1"),
        (("compress", "net.onnx"), "compress --quantize-only net.onnx --data FOLDER"),
        (("compress", "no-such-job.toml"), "check the path"),
        (("convert", "x.onnx", "-o", "y.onnx", "--precision", "int8"), "--calibration"),
        (("convert", "x.onnx"), "--plan"),
        (("convert", "x.onnx", "-o", "y.onnx"), "check the path"),
        (("convert", "no_such_module:net", "-o", "y.onnx"), "run from the folder that holds it"),
        (("convert", "json:JSONEncoder", "--to", "tflit", "--plan"), "tflite (did you mean this?)"),
        (("gate", "no-such-bundle"), "manifest.json"),
        (("bench", "no-such.onnx", "--target", "null"), "check the path"),
        (("bench", "x.onnx", "--target", "nul"), "null (did you mean this?)"),
        (("bench", "x.onnx", "--target", "null", "--set", "runtime.thread=2"), "threads (did you mean this?)"),
        (("doctor", "--set", "a=1"), "TARGET"),
        (("report", "tests"), "edgekd runs"),
    ],
)
def test_wrong_use_exits_3_and_names_the_remedy(args: tuple[str, ...], remedy: str) -> None:
    done = edgekd(*args)
    assert done.exit_code == 3, done.output
    assert remedy in done.stderr
    assert done.stdout == ""


def test_usage_error_exits_3_from_the_shell() -> None:
    done = shell("bench")
    assert (done.returncode, done.stdout) == (3, "")


def test_error_shows_what_was_found_what_is_allowed_and_the_next_step() -> None:
    done = edgekd("profile", "show", "locall")
    assert done.exit_code == 3
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()] == ["error", "found", "allowed", "next step"]


def group_with(end: BaseException) -> EdgekdGroup:
    @click.group(cls=EdgekdGroup)
    def group() -> None:
        raise end

    return group


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        (DeviceTimeout("the board is silent", hint="check the cable"), 3, "next step: check the cable"),
        (MeasurementInvalid("no launch was valid"), 2, "no launch was valid"),
        (ValueError("a bug"), 3, "Traceback"),
        (KeyboardInterrupt(), 130, "the same command continues"),
        (click.Abort(), 130, "interrupted"),
    ],
)
def test_every_end_has_its_exit_code(end: BaseException, code: int, text: str) -> None:
    done = CliRunner().invoke(group_with(end), ["targets"])
    assert done.exit_code == code
    assert text in done.stderr


def test_ctrl_c_exits_130_from_the_shell(model: Path) -> None:
    command = [sys.executable, "-m", "edgekd", "bench", str(model / "net.onnx"), "--verdict-grade"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert "measuring" in process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert out == ""


# ------------------------------------------------------------------------------------------ commands


def test_bench_prints_percentiles_conditions_and_separate_clocks(model: Path) -> None:
    done = edgekd("bench", model / "net.onnx", "--target", "null", "--ops", 2)
    assert done.exit_code == 0, done.output
    for part in ("SIMULATED (null)", "p50", "p90", "p99", "initialization", "first inference", "device", "runtime", "threads", "precision", "fp32", "protocol"):
        assert part in done.stdout, part
    assert "Slowest 2 of" in done.stdout


def test_bench_json_holds_the_raw_measurement(model: Path) -> None:
    done = edgekd("bench", model / "net.onnx", "--target", "null", "--json", "--inputs", model / "data")
    body = json.loads(done.stdout)
    assert body["measurement"]["simulated"] == "null"
    assert len(body["measurement"]["launches"][0]["samples_ns"]) > 0
    assert {"p50", "p90", "p99", "init", "first"} <= set(body["summary_ms"])


def test_targets_and_profiles_say_what_never_ran_on_hardware() -> None:
    listed = json.loads(edgekd("targets", "--json").stdout)
    assert {"local", "null"} <= {row["profile"] for row in listed}
    assert "never ran on real hardware" in edgekd("targets").stdout
    shown = json.loads(edgekd("profile", "show", "null", "--set", "runtime.threads=3", "--json").stdout)
    assert shown["runtime"]["threads"] == 3


def test_tables_are_as_wide_as_columns_says_when_piped() -> None:
    def widest(columns: int) -> int:
        done = CliRunner().invoke(cli, ["targets"], env={"COLUMNS": str(columns)})
        return max(len(line) for line in done.stdout.splitlines())

    assert widest(90) <= 90 < widest(160) <= 160


def test_targets_mark_a_profile_whose_runtime_no_plugin_provides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "odd.toml").write_text('description = "odd"\n[runtime]\nkind = "no-such-npu"\n')
    monkeypatch.chdir(tmp_path)
    (row,) = [row for row in json.loads(edgekd("targets", "--json").stdout) if row["profile"] == "odd"]
    assert row["problem"] == "no plug-in provides the runtime 'no-such-npu'"
    assert "no-such-npu" in edgekd("targets").stdout


def test_folder_with_inputs_that_is_not_there_is_named(model: Path) -> None:
    done = edgekd("bench", model / "net.onnx", "--target", "null", "--inputs", model / "nowhere")
    assert done.exit_code == 3
    assert "folder with the inputs does not exist" in done.stderr


def test_percentile_below_one_is_taken_for_a_share(model: Path) -> None:
    budget = ("--latency-share", 0.9, "--percentile", 0.9)
    done = edgekd("compress", "--quantize-only", model / "net.onnx", "--data", model / "data", *budget, "--target", "null", "--run-dir", model / "p")
    assert done.exit_code == 3
    assert "percentiles go from 0 to 100; did you mean 90?" in done.stderr


def test_passing_run_says_what_ships(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    words = ("--latency-share", 0.9, "--max-drop", 0.5, "--target", "null", "--accept-simulated", "--run-dir", tmp_path / "run")
    done = edgekd("compress", "--quantize-only", model / "net.onnx", "--data", model / "data", *words)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("shipped: ")]
    manifest = json.loads((tmp_path / "run" / "bundle" / "manifest.json").read_text())
    latency = next(check["value"] for check in manifest["verdict"]["checks"] if check["name"] == "latency")
    for part in ("the given ONNX file, int8, ", f"p50 {latency:.4f} ms, simulated (null)", f"{manifest['accuracy']:.4f} (teacher ", manifest["created_at"]):
        assert part in line, part
    card = (tmp_path / "run" / "bundle" / "MODEL_CARD.md").read_text()
    for part in ("| input | `x` | float32 | (1, 1, 8, 8) |", "| file to load | artifact/model.onnx |", "drop at most 0.5", "| threads | 1 |"):
        assert part in card, part
    snippet = card.split("```python\n")[1].split("```")[0]
    ran = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path / "run" / "bundle", capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "(1, 4)\n"


def test_convert_to_int8_writes_a_model_and_compares_it(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "int8.onnx"
    words = ("--precision", "int8", "--scheme", "u8s8_reduced", "--calibration", model / "data", "--target", "null")  # right on an x86 without VNNI, too
    done = edgekd("convert", model / "net.onnx", *words, "-o", out)
    assert done.exit_code == 0, done.output
    assert "signal to error" in done.stdout
    assert out.is_file()
    again = edgekd("convert", out, "-o", tmp_path / "folder")
    assert "int8" in again.stdout
    assert (tmp_path / "folder" / "artifact.json").is_file()


def test_fastest_refuses_what_one_road_only_can_promise(model: Path, tmp_path: Path) -> None:
    done = edgekd("convert", model / "net.onnx", "--fastest", "--target", "null", "--channel-last", "-o", tmp_path / "m.onnx")
    assert done.exit_code == 3
    assert "--via tflite-from-torch" in done.output
    assert not (tmp_path / "m.onnx").exists()


def test_fastest_passes_on_what_convert_takes(model: Path, tmp_path: Path) -> None:
    words = ("convert", model / "net.onnx", "--to", "onnx", "--precision", "fp16", "--fastest", "--target", "null", "-o", tmp_path / "m.onnx")
    wrong = edgekd(*words, "--outputs", "z")
    assert wrong.exit_code == 3
    assert "y" in wrong.stderr.partition("allowed: ")[2]
    negative = edgekd(*words, "--max-transposes", "-1")
    assert negative.exit_code == 3
    assert "0 or more" in negative.stderr
    assert not (tmp_path / "m.onnx").exists()
    (tmp_path / "after.toml").write_text('[[outputs]]\nkind = "softmax"\nwhere = "inside"\n')
    done = edgekd(*words, "--outputs", "y", "--max-transposes", "0", "--processing", tmp_path / "after.toml")
    assert done.exit_code == 0, done.output
    assert "fastest" in done.stdout
    assert "softmax" in done.stdout.partition("in the file: processing: ")[2]


def test_convert_plan_lists_the_roads_with_what_is_missing_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    done = edgekd("convert", model / "net.onnx", "--to", "tflite", "--precision", "int8", "--environments", none, "--plan", "--json")
    assert done.exit_code == 0, done.output
    roads = json.loads(done.stdout)["routes"]
    assert roads[0]["converters"] == ["tflite-from-onnx"]
    assert f"edgekd env create onnx2tf --path {none}" in roads[0]["missing"]
    shown = edgekd("convert", model / "net.onnx", "--precision", "int8", "--plan")
    assert "->  " in shown.stdout
    assert "onnx --qdq-from-onnx--> onnx int8" in shown.stdout
    assert not none.exists()


def test_run_is_listed_and_its_report_is_written_again(run_dir: Path) -> None:
    listed = json.loads(edgekd("runs", run_dir.parent.parent, "--json").stdout)
    assert [(row["run"], row["verdict"]) for row in listed] == [(str(run_dir), "refuse (simulated: null)")]
    before = (run_dir / "report.html").read_bytes()
    (run_dir / "report.html").unlink()
    done = edgekd("report", run_dir)
    assert (done.exit_code, done.stdout.strip()) == (0, str(run_dir / "report.html"))
    assert (run_dir / "report.html").read_bytes() == before
    assert b"SIMULATED" in before


def test_unfinished_run_is_listed_with_its_stage(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    (tmp_path / "cut" / "events.jsonl").write_text("\n".join(lines[:1]) + "\n")
    listed = json.loads(edgekd("runs", tmp_path, "--json").stdout)
    assert listed[0]["verdict"] == "unfinished: baseline started"


def test_gate_refuses_simulation_and_passes_when_it_is_accepted(run_dir: Path, tmp_path: Path) -> None:
    bundle = run_dir / "bundle"
    files = ("--junit", tmp_path / "j.xml", "--json", tmp_path / "g.json", "--markdown", tmp_path / "m.md")
    refused = edgekd("gate", bundle, *files)
    assert refused.exit_code == 2, refused.output
    assert len(refused.stdout.splitlines()) == 1
    suite = ET.parse(tmp_path / "j.xml").getroot()
    assert suite.get("failures") == "1"
    body = json.loads((tmp_path / "g.json").read_text())
    assert (body["outcome"], body["exit_code"], body["conditions"]["simulated"]) == ("refuse", 2, "null")
    assert "REFUSE" in (tmp_path / "m.md").read_text()
    neutral = edgekd("gate", bundle, *files, "--on-refuse", "neutral")
    assert (neutral.exit_code, ET.parse(tmp_path / "j.xml").getroot().get("skipped")) == (0, "1")
    assert "let through by --on-refuse=neutral" in neutral.stdout
    accepted = edgekd("gate", bundle, "--accept-simulated")
    assert accepted.exit_code == 0, accepted.output
    assert "SIMULATED: null, accepted" in accepted.stdout


def test_validate_prints_checks_and_scores(run_dir: Path) -> None:
    done = edgekd("validate", run_dir / "bundle", "--accept-simulated")
    assert done.exit_code == 0, done.output
    assert "accuracy drop" in done.stdout
    assert "teacher score" in done.stdout


def test_gate_on_a_changed_byte_is_an_error_in_every_file(run_dir: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "changed"
    shutil.copytree(run_dir / "bundle", bundle)
    file = bundle / "artifact" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    done = edgekd("gate", bundle, "--junit", tmp_path / "j.xml", "--json", tmp_path / "g.json")
    assert done.exit_code == 3
    assert "model.onnx was changed" in done.stderr
    assert ET.parse(tmp_path / "j.xml").getroot().get("errors") == "1"
    assert json.loads((tmp_path / "g.json").read_text())["error"]["class"] == "BundleError"


def test_cache_is_listed_and_removed_while_runs_stay(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir.parent, tmp_path / "runs")
    entries = json.loads(edgekd("cache", "ls", tmp_path, "--json").stdout)
    assert entries
    assert all(Path(entry["path"]).exists() and entry["size_bytes"] > 0 for entry in entries)
    assert edgekd("cache", "rm", tmp_path, "--yes", "--older-than", 1).stdout == "nothing to remove\n"
    declined = CliRunner().invoke(cli, ["cache", "rm", str(tmp_path)], input="n\n")
    assert declined.exit_code == 130
    assert f"removed {len(entries)} entries" in edgekd("cache", "rm", tmp_path, "--yes").stdout
    assert json.loads(edgekd("cache", "ls", tmp_path, "--json").stdout) == []
    assert (tmp_path / "runs" / "net" / "bundle" / "manifest.json").is_file()


def test_disturbed_device_is_called_a_refuse_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    from edgekd.cli.main import show_error
    from edgekd.errors import MeasurementInvalid, ModelError

    show_error(MeasurementInvalid("the teacher could not be measured", found="6 contended"))
    show_error(ModelError("the file is no model"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "REFUSE: the teacher could not be measured"
    assert lines[-1] == "error: the file is no model"
