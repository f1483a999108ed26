"""Bad input from end to end: the right class, exit code 3, a message with the remedy, and nothing already won is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgekd.bundle import open_bundle
from edgekd.cli.main import cli
from edgekd.doctor import architecture_problem
from edgekd.errors import EXIT_ERROR, BudgetError, DataError, EdgekdError, InputError, ModelError
from edgekd.settings.jobs import load_job
from tests.pipeline.bundle_kit import ROOT, bundle_copy, edit, home, interpreter, save_inputs, shell


def edgekd(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


MODULE = """
import numpy as np
import torch
from torch import nn

CASE = {case!r}


def make_net(width=8, channels=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 4, 3))


def make_teacher():
    net = make_net(16, 3 if CASE == "teacher shape" else 1)
    if CASE == "teacher nan":
        with torch.no_grad():
            net[0].weight.fill_(float("nan"))
    return net


def split(seed, special):
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((24, 1, 4, 4)).astype(np.float32)
    targets = random.integers(0, 3, 24)
    if special:
        if CASE == "nan":
            inputs[5, 0, 1, 1] = np.nan
        if CASE == "range":
            targets[3] = 3
        if CASE == "float labels":
            targets = targets.astype(np.float64)
        if CASE == "label shape":
            targets = targets[:, None]
        if CASE == "dtype":
            inputs = inputs.astype(np.float64)
        if CASE == "random":
            return Drawing(inputs, targets)
        if CASE == "empty":
            inputs, targets = inputs[:0], targets[:0]
    data = torch.utils.data.TensorDataset(torch.from_numpy(inputs), torch.from_numpy(targets))
    return torch.utils.data.DataLoader(data, batch_size=8)


class Drawing(torch.utils.data.Dataset):
    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.random = inputs, targets, np.random.default_rng(0)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index] + self.random.standard_normal((1, 4, 4)).astype(np.float32), self.targets[index]


def train():
    return split(1, CASE in ("range train",))


def validation():
    return split(2, CASE in ("nan", "float labels", "label shape", "dtype"))


def test():
    return split(3, CASE in ("range", "empty", "random"))
"""

CASES: list[tuple[str, type[EdgekdError], tuple[str, ...]]] = [
    ("teacher shape", ModelError, ("does not accept the data", "float32 (8, 1, 4, 4)", "next step")),
    ("teacher nan", ModelError, ("'output' on the validation data is not finite", "weights")),
    ("nan", DataError, ("validation data hold NaN", "item 5", "drop the item")),
    ("range", DataError, ("the labels of the test split are outside the classes", "0 to 3", "allowed: 0 to 2", "label encoding")),
    ("float labels", DataError, ("must be integers", "float64", "Regression")),
    ("label shape", ModelError, ("labels (24, 1)", "allowed: labels (24,)")),
    ("dtype", ModelError, ("float64 (8, 1, 4, 4)", "shape and dtype")),
    ("random", DataError, ("test data must be the same at every reading", "augment=")),
    ("empty", DataError, ("test data are empty", "0 items", "check the loader")),
]


def write_job(folder: Path, case: str, budget: str = "latency_share = 0.5") -> Path:
    module = f"own_{folder.name.replace('-', '_')}_{case.replace(' ', '_')}"
    (folder / f"{module}.py").write_text(MODULE.format(case=case))
    job = folder / "job.toml"
    job.write_text(
        f'teacher = "{module}:make_teacher"\ntarget = "null"\n\n'
        f'[data]\ntrain = "{module}:train"\nvalidation = "{module}:validation"\ntest = "{module}:test"\n\n'
        f'[budget]\n{budget}\n\n[student]\nfixed = "{module}:make_net"\n'
    )
    return job


@pytest.mark.torch
@pytest.mark.parametrize(("case", "error", "texts"), CASES, ids=[case for case, _, _ in CASES])
def test_bad_data_or_teacher_stop_a_job_before_anything_is_trained(case: str, error: type[EdgekdError], texts: tuple[str, ...], tmp_path: Path) -> None:
    job = write_job(tmp_path, case)
    with pytest.raises(error) as caught:
        load_job(job).run()
    assert type(caught.value) is error
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    done = edgekd("compress", job)
    assert done.exit_code == EXIT_ERROR
    assert f"error: {caught.value.what}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs" / "job" / "stages").iterdir())


# ------------------------------------------------------------------------------------------ budgets, profiles


BUDGETS = [
    (("--latency-ms", "0"), "must be a positive number", "milliseconds"),
    (("--latency-ms", "-1"), "must be a positive number", "milliseconds"),
    (("--latency-ms", "nan"), "must be a positive number", "milliseconds"),
    (("--latency-share", "1.5"), "share of the teacher", "(0, 1]"),
    (("--latency-ms", "0.03", "--percentile", "100"), "percentile", "90 for p90"),
    (("--latency-ms", "0.03", "--percentile", "99"), "too few inferences", "min_samples = 662"),
    (("--latency-ms", "0.03", "--max-drop", "-0.1"), "max_drop", "0.02 allows two points"),
    (("--latency-ms", "0.03", "--size-mb", "0"), "size_mb", "megabytes"),
    (("--latency-ms", "300"), "above the teacher", "0.3 ms, not 300 us"),
    (("--latency-ms", "0.00003"), "below a hundredth", "0.0003 s"),
    (("--latency-ms", "0.1", "--latency-share", "0.5"), "one of --latency-ms and --latency-share", ""),
]


@pytest.mark.parametrize(("options", "what", "remedy"), BUDGETS, ids=[" ".join(options) for options, _, _ in BUDGETS])
def test_budget_without_meaning_exits_3_with_the_remedy(options: tuple[str, ...], what: str, remedy: str, tmp_path: Path) -> None:
    net = ("compress", "--quantize-only", home() / "net.onnx", "--data", home() / "data", "--target", "null")
    done = edgekd(*net, *options, "--run-dir", tmp_path / "run")
    assert done.exit_code == EXIT_ERROR, done.output
    assert what in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("budget", "text"),
    [("latency_ms = 0.0", "positive"), ("latency_ms = 0.1\nlatency_share = 0.5", "exactly one latency"), ("max_drop = 0.1", "exactly one latency")],
)
def test_budget_of_a_job_is_checked_when_the_job_is_read(budget: str, text: str, tmp_path: Path) -> None:
    job = write_job(tmp_path, "none", budget)
    with pytest.raises(BudgetError, match=text):
        load_job(job)
    assert edgekd("compress", job, "--plan").exit_code == EXIT_ERROR


def test_unknown_key_of_a_profile_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('name = "board"\ndescription = "a board"\n\n[transport]\nkind = "local"\n\n[runtime]\nkind = "null"\nthread = 2\n')
    done = edgekd("bench", home() / "net.onnx", "--target", path)
    assert done.exit_code == EXIT_ERROR
    assert "board.toml, line 9" in done.stderr
    assert "threads (did you mean this?)" in done.stderr


def test_unknown_profile_lists_what_there_is() -> None:
    done = edgekd("bench", home() / "net.onnx", "--target", "lokal")
    assert done.exit_code == EXIT_ERROR
    assert "local (did you mean this?)" in done.stderr


# ------------------------------------------------------------------------------------------ missing packages, machines


def test_missing_runtime_names_the_line_that_installs_it(tmp_path: Path) -> None:
    python = interpreter("onnx")
    for target in ("local", "null"):
        done = shell(python, "bench", home() / "net.onnx", "--target", target, cwd=tmp_path)
        assert done.returncode == EXIT_ERROR, done.stderr
        assert "'onnxruntime', which is not installed" in done.stderr
        assert 'pip install "edgekd[x86]"' in done.stderr
        assert "Traceback" not in done.stderr
    gated = shell(python, "gate", bundle_copy(tmp_path / "bundle"), "--json", tmp_path / "gate.json", cwd=tmp_path)
    assert gated.returncode == EXIT_ERROR
    assert json.loads((tmp_path / "gate.json").read_text())["error"]["class"] == "MissingDependency"


@pytest.mark.parametrize(("system", "machine"), [("Linux", "riscv64"), ("Linux", "armv7l"), ("Darwin", "arm64"), ("Windows", "AMD64")])
def test_architecture_without_wheels_is_a_problem_with_a_way_out(system: str, machine: str) -> None:
    problem = architecture_problem(system, machine)
    assert f"{system} on {machine}" in problem
    assert "next step" in problem
    assert architecture_problem("Linux", "x86_64") == architecture_problem("Linux", "aarch64") == ""


# ------------------------------------------------------------------------------------------ bundles


def _flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


@pytest.mark.parametrize("name", ["artifact/model.onnx", "evaluation/targets-000.npy", "ledger.json"])
def test_bundle_with_a_changed_byte_exits_3_from_gate_and_validate(name: str, tmp_path: Path) -> None:
    bundle = bundle_copy(tmp_path / "bundle")
    edit(bundle / name, _flip)
    for command in ("gate", "validate"):
        done = edgekd(command, bundle, "--accept-simulated")
        assert done.exit_code == EXIT_ERROR
        assert f"{name} was changed" in done.stderr
        assert "restore the bundle" in done.stderr


def test_bundle_with_a_loosened_limit_or_an_extra_or_missing_file_exits_3(tmp_path: Path) -> None:
    bundle = bundle_copy(tmp_path / "limit")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["latency_limit_ms"] *= 10
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    extra = bundle_copy(tmp_path / "extra")
    (extra / "run.sh").write_text("true")
    missing = bundle_copy(tmp_path / "missing")
    (missing / "float" / "model.onnx").unlink()
    for place, text in ((bundle, "manifest.json was changed"), (extra, "run.sh"), (missing, "float/model.onnx")):
        done = edgekd("gate", place, "--accept-simulated")
        assert (done.exit_code, text in done.stderr) == (EXIT_ERROR, True), done.stderr


# ------------------------------------------------------------------------------------------ full disks

LIMITED = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\ndel sys.argv[1]\n"
"""No file of this process may grow above so many bytes: a write beyond fails as on a full disk."""


def limited(limit: int, code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED + code, str(limit), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_disk_that_fills_while_the_bundle_is_written_loses_nothing(tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data", samples=3000)  # the evaluation data are then the largest file of the run
    arguments = ["compress", "--quantize-only", home() / "net.onnx", "--data", data, "--target", "null", "--accept-simulated"]
    arguments += ["--latency-share", "0.9", "--max-drop", "0.5", "--run-dir"]
    whole = edgekd(*arguments, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    stages = {path.name.split("-")[0]: max(sizes(path)) for path in (tmp_path / "whole" / "stages").iterdir()}
    before, bundle = max(size for name, size in stages.items() if name != "bundle"), stages["bundle"]
    assert before < bundle, "the bundle must hold the largest file, or the disk is full before"
    run = tmp_path / "cut"
    done = limited((before + bundle) // 2, "from edgekd.cli.main import main\nmain()", *arguments, run)
    assert done.returncode == EXIT_ERROR, done.stdout + done.stderr
    assert "no space left" in done.stderr
    assert "run the same command again: finished stages are kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / "bundle").exists()
    assert not (run / "run.json").exists()
    kept = {path.name.split("-")[0] for path in (run / "stages").iterdir()}
    assert kept == set(stages) - {"bundle"}, "whole stages only, and no temporary folder"
    again = edgekd(*arguments, run)
    assert again.exit_code == 0, again.output
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    second = events[max(index for index, event in enumerate(events) if event["stage"] == "baseline") :]
    assert [event["stage"] for event in second if event["kind"] == "started"] == ["bundle"]
    assert open_bundle(run / "bundle").manifest.verdict.outcome.value == "pass"


def test_short_write_of_an_array_is_told_as_a_full_disk(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nimport numpy as np\nfrom edgekd.bundle import save_evaluation\nfrom edgekd.errors import StorageError\n"
        "from edgekd.storage import folder_atomic\nplace = Path(sys.argv[1])\n"
        "try:\n"
        "    with folder_atomic(place) as folder:\n"
        "        save_evaluation(folder, {'x': np.zeros((100, 100))}, np.zeros(100), {'y': np.zeros((100, 2))})\n"
        "except StorageError as error:\n    print(error)\n"
    )
    done = limited(20_000, code, tmp_path / "data")
    assert "no space left" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_copy_that_does_not_fit_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"new" * 20_000)
    (tmp_path / "kept").write_bytes(b"old")
    code = (
        "from pathlib import Path\nfrom edgekd.errors import StorageError\nfrom edgekd.storage import copy_file\nplace = Path(sys.argv[1])\n"
        "try:\n    copy_file(place / 'large', place / 'kept')\nexcept StorageError as error:\n    print(error)\n"
    )
    assert "no space left" in limited(20_000, code, tmp_path).stdout
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "large"]


def test_file_that_the_data_miss_is_not_told_as_a_full_disk(tmp_path: Path) -> None:
    from edgekd.storage import folder_atomic

    with pytest.raises(FileNotFoundError), folder_atomic(tmp_path / "stage"):
        (Path("/") / "no-such-folder" / "image.png").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_samples_that_are_too_few_exit_3_from_the_shell(tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data", samples=12)
    done = edgekd("compress", "--quantize-only", home() / "net.onnx", "--data", data, "--latency-share", 0.5, "--target", "null", "--run-dir", tmp_path / "run")
    assert (done.exit_code, "at least 30" in done.stderr) == (EXIT_ERROR, True)
    np.save(data / "x.npy", np.full((40, 1, 8, 8), np.inf, dtype=np.float32))
    done = edgekd("compress", "--quantize-only", home() / "net.onnx", "--data", data, "--latency-share", 0.5, "--target", "null", "--run-dir", tmp_path / "run")
    assert (done.exit_code, "NaN or infinity" in done.stderr) == (EXIT_ERROR, True)


def test_every_error_of_the_users_input_exits_3() -> None:
    todo, seen = [InputError], []
    while todo:
        kind = todo.pop()
        seen.append(kind)
        todo += kind.__subclasses__()
    assert {kind.exit_code for kind in seen} == {EXIT_ERROR}
    assert len(seen) >= 9
