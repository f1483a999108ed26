"""The gate: every verdict with its exit code, on the bundle alone, without user code and without torch."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgekd.bundle import MANIFEST, open_bundle, save_evaluation
from edgekd.cli.main import cli
from edgekd.errors import BundleError, InputError
from edgekd.gating import gate, validate
from edgekd.options import Options
from edgekd.records import Budget, Manifest, Outcome
from edgekd.target import connect
from tests.pipeline.bundle_kit import bundle_copy, edit, interpreter, quantized, resealed, shell


def edgekd(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundle_copy(tmp_path / "bundle")


# ------------------------------------------------------------------------------------------ verdicts


def test_gate_passes_on_the_null_target_when_simulation_is_accepted(bundle: Path) -> None:
    result = gate(bundle, accept_simulated=True)
    assert result.verdict.outcome is Outcome.PASS
    assert (result.verdict.simulated, result.verdict.accepted_simulated, result.target) == ("null", True, "null")
    assert result.measurement is not None
    assert len(result.measurement.launches) >= 20
    assert result.teacher_accuracy == 1.0
    assert result.student_accuracy == result.agreement


def test_gate_refuses_simulated_numbers_by_itself(bundle: Path) -> None:
    verdict = validate(bundle)
    assert verdict.outcome is Outcome.REFUSE
    assert verdict.reason.startswith("simulated (null)")
    assert {check.outcome for check in verdict.checks} == {Outcome.PASS}


def test_gate_takes_a_target_that_is_open_and_leaves_it_open(bundle: Path) -> None:
    with connect("null") as live:
        assert validate(bundle, target=live, accept_simulated=True).outcome is Outcome.PASS
        assert validate(bundle, target=live, accept_simulated=True).outcome is Outcome.PASS


def test_gate_takes_the_limit_of_the_manifest_and_fails_above_it(bundle: Path) -> None:
    limit = Manifest.load(bundle / MANIFEST).latency_limit_ms
    verdict = validate(resealed(bundle, latency_limit_ms=limit / 10, latency_limit_upper_ms=None), accept_simulated=True)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.reason.removeprefix("simulated (null), accepted; ").startswith("latency:")
    assert next(check for check in verdict.checks if check.name == "latency").limit == limit / 10
    refused = validate(bundle)
    assert refused.outcome is Outcome.REFUSE, "simulated numbers do not fail either where they are not accepted"
    assert refused.reason.startswith("simulated (null); accepted it would be a fail; latency:")
    assert next(check for check in refused.checks if check.name == "latency").outcome is Outcome.FAIL


def test_gate_fails_when_the_artifact_lost_accuracy(bundle: Path) -> None:
    evaluation = open_bundle(bundle).evaluation()
    wrong = (evaluation.targets + 1) % 4  # the artifact is now wrong where the teacher is right
    teacher = {"y": np.eye(4, dtype=np.float32)[wrong]}
    save_evaluation(bundle / "evaluation", evaluation.inputs, wrong, teacher)
    verdict = validate(resealed(bundle), accept_simulated=True)
    assert verdict.outcome is Outcome.FAIL
    assert "accuracy drop" in verdict.reason


def test_other_device_is_refused_with_what_differs_and_nothing_is_measured(bundle: Path) -> None:
    manifest = Manifest.load(bundle / MANIFEST)
    assert "cpu_model" in manifest.profile.identity
    other = msgspec.structs.replace(manifest.fingerprint, fields=manifest.fingerprint.fields | {"cpu_model": "Cortex-A72"})
    result = gate(resealed(bundle, fingerprint=other), accept_simulated=True)
    assert result.verdict.outcome is Outcome.REFUSE
    assert "other device" in result.verdict.reason
    assert "cpu_model is null and was Cortex-A72" in result.verdict.reason
    assert result.measurement is None


def test_field_that_is_no_identity_may_differ(bundle: Path) -> None:
    manifest = Manifest.load(bundle / MANIFEST)
    field = next(name for name in manifest.fingerprint.fields if name not in manifest.profile.identity)
    other = msgspec.structs.replace(manifest.fingerprint, fields=manifest.fingerprint.fields | {field: "another"})
    assert validate(resealed(bundle, fingerprint=other), accept_simulated=True).outcome is Outcome.PASS


def test_every_line_of_the_budget_is_judged_again(bundle: Path) -> None:
    budget = Budget(latency_ms=1.0, max_drop=0.5, size_mb=1e-6, first_inference_ms=1e3, init_ms=1e-6)
    verdict = validate(resealed(bundle, budget=budget), accept_simulated=True)
    outcomes = {check.name: check.outcome.value for check in verdict.checks}
    assert outcomes == {"latency": "pass", "accuracy drop": "pass", "first inference": "pass", "initialization": "fail", "size": "fail"}
    assert verdict.outcome is Outcome.FAIL


def test_launches_too_short_for_the_percentile_are_an_error_before_anything_runs(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"measure\.verdict\.launch\.min_samples = 662"):
        gate(resealed(bundle, budget=Budget(latency_ms=1.0, percentile=99)))


# ------------------------------------------------------------------------------------------ disturbed devices


@pytest.mark.parametrize(
    "override",
    ["measure.limits.temperature_max_c=30.0", "measure.limits.spread_max=1.000001"],
)
def test_invalid_measurement_is_refused_with_its_reason_and_never_fails(bundle: Path, override: str) -> None:
    limit = Manifest.load(bundle / MANIFEST).latency_limit_ms
    for shrunk in (limit, limit / 10):
        verdict = validate(resealed(bundle, latency_limit_ms=shrunk, latency_limit_upper_ms=None), accept_simulated=True, overrides=(override,))
        assert verdict.outcome is Outcome.REFUSE
        assert "invalid measurement" in verdict.reason
        assert "launches rejected" in verdict.reason


def test_noisy_device_is_refused_near_the_limit_and_not_failed(bundle: Path) -> None:
    result = gate(bundle, accept_simulated=True)
    assert result.measurement is not None
    seen = float(np.median(np.concatenate([launch.samples_ns for launch in result.measurement.launches]))) / 1e6
    noisy = (
        "runtime.options.noise=0.3",
        "measure.limits.spread_max=10.0",
    )
    verdict = validate(resealed(bundle, latency_limit_ms=seen * 1.02, latency_limit_upper_ms=None), accept_simulated=True, overrides=noisy)
    assert verdict.outcome is Outcome.REFUSE
    assert "do not decide" in verdict.reason


# ------------------------------------------------------------------------------------------ evaluation data


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose evaluation data were over the cap; they lie in the run folder."""
    run_dir = tmp_path_factory.mktemp("capped") / "run"
    return quantized(run_dir, options=Options(accept_simulated=True, bundle_data_mb=0.001))


def test_capped_bundle_needs_its_data(capped: Path) -> None:
    assert not (capped / "evaluation").exists()
    with pytest.raises(BundleError, match="--data RUN/evaluation"):
        gate(capped, accept_simulated=True)
    data = capped.parent / "evaluation"
    assert validate(capped, data=data, accept_simulated=True).outcome is Outcome.PASS
    assert edgekd("gate", capped, "--data", data, "--accept-simulated").exit_code == 0
    assert edgekd("gate", capped, "--accept-simulated").exit_code == 3


def test_capped_bundle_takes_no_other_data(capped: Path, tmp_path: Path) -> None:
    other = shutil.copytree(capped.parent / "evaluation", tmp_path / "evaluation")

    def flip(content: bytearray) -> None:
        content[-1] ^= 1

    edit(other / "targets-000.npy", flip)
    with pytest.raises(BundleError, match=r"targets-000\.npy was changed"):
        gate(capped, data=other, accept_simulated=True)
    (other / "index.json").unlink()
    with pytest.raises(BundleError, match=r"index\.json is missing"):
        gate(capped, data=other, accept_simulated=True)


def test_whole_bundle_takes_only_its_own_data(bundle: Path, tmp_path: Path) -> None:
    own = shutil.copytree(bundle / "evaluation", tmp_path / "evaluation")
    assert validate(bundle, data=own, accept_simulated=True).outcome is Outcome.PASS
    (own / "teacher-000.npy").unlink()
    with pytest.raises(BundleError, match="judged on"):
        gate(bundle, data=own, accept_simulated=True)


# ------------------------------------------------------------------------------------------ exit codes and files


def _small(bundle: Path) -> None:
    resealed(bundle, latency_limit_ms=Manifest.load(bundle / MANIFEST).latency_limit_ms / 10, latency_limit_upper_ms=None)


def _moved(bundle: Path) -> None:
    manifest = Manifest.load(bundle / MANIFEST)
    resealed(bundle, fingerprint=msgspec.structs.replace(manifest.fingerprint, fields={}))


def _cut(bundle: Path) -> None:
    (bundle / "ledger.json").unlink()


def _untouched(bundle: Path) -> None:
    return None


CASES = [
    (_untouched, ["--accept-simulated"], 0, "pass"),
    (_untouched, [], 2, "refuse"),
    (_untouched, ["--on-refuse", "neutral"], 0, "refuse"),
    (_untouched, ["--on-refuse", "fail"], 2, "refuse"),
    (_small, ["--accept-simulated"], 1, "fail"),
    (_small, ["--accept-simulated", "--on-refuse", "neutral"], 1, "fail"),
    (_small, [], 2, "refuse"),
    (_small, ["--on-refuse", "neutral"], 0, "refuse"),
    (_moved, ["--accept-simulated"], 2, "refuse"),
    (_moved, ["--accept-simulated", "--on-refuse", "neutral"], 0, "refuse"),
    (_cut, ["--accept-simulated"], 3, "error"),
    (_cut, ["--on-refuse", "neutral"], 3, "error"),
    (_untouched, ["--target", "nul"], 3, "error"),
    (_untouched, ["--set", "runtime.thread=2"], 3, "error"),
    (_untouched, ["--set", "measure.verdict.launch.min_samples=2"], 3, "error"),
    (_untouched, ["--accept-simulated", "--set", "measure.limits.temperature_max_c=30.0"], 2, "refuse"),
]


@pytest.mark.parametrize(("change", "options", "code", "outcome"), CASES)
def test_every_end_of_a_gate_has_its_exit_code_and_writes_its_files(
    bundle: Path, tmp_path: Path, change: Any, options: list[str], code: int, outcome: str
) -> None:
    change(bundle)
    files = {name: tmp_path / "out" / f"gate.{name}" for name in ("junit", "json", "markdown")}
    done = edgekd("gate", bundle, *options, *(item for name, path in files.items() for item in (f"--{name}", path)))
    assert done.exit_code == code, done.output
    body = json.loads(files["json"].read_text())
    assert (body["outcome"], body["exit_code"]) == (outcome, code)
    suite = ET.parse(files["junit"]).getroot()
    counts = {name: int(suite.get(name) or 0) for name in ("tests", "failures", "errors", "skipped")}
    assert counts["tests"] > 0
    assert (counts["failures"] > 0) == (code in (1, 2))
    assert (counts["errors"] > 0) == (code == 3)
    assert outcome.upper() in files["markdown"].read_text().upper()
    assert len(done.stdout.splitlines()) == (0 if code == 3 else 1)


def test_validate_prints_every_check_with_the_same_codes(bundle: Path) -> None:
    assert edgekd("validate", bundle, "--accept-simulated").exit_code == 0
    assert edgekd("validate", bundle).exit_code == 2
    done = edgekd("validate", bundle, "--accept-simulated", "--json")
    assert json.loads(done.stdout)["outcome"] == "pass"
    _small(bundle)
    failed = edgekd("validate", bundle, "--accept-simulated")
    assert failed.exit_code == 1
    assert edgekd("validate", bundle).exit_code == 2
    assert "latency" in failed.stdout


# ------------------------------------------------------------------------------------------ what a gate needs


FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.flat = nn.Flatten()
        self.one = nn.Linear(12, width)
        self.two = nn.Linear(width, width)
        self.three = nn.Linear(width, 3)

    def forward(self, x):
        return self.three(torch.relu(self.two(torch.relu(self.one(self.flat(x))))))


def make_net(width=8):
    torch.manual_seed(0)
    return Net(width)
"""


@pytest.mark.torch
@pytest.mark.slow
def test_bundle_of_a_trained_student_is_judged_without_its_code_and_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.options import QuantizeOptions, TrainOptions
    from edgekd.pipeline import compress
    from edgekd.spaces import Fixed

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_factory_of_a_test.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    import own_factory_of_a_test as own  # type: ignore[import-not-found]

    random = np.random.default_rng(0)
    inputs = random.standard_normal((200, 3, 4)).astype(np.float32)
    targets = inputs[:, :, 0].argmax(axis=1)
    parts = [(inputs[part], targets[part]) for part in (slice(0, 80), slice(80, 120), slice(120, 200))]
    options = Options(
        train=TrainOptions(epochs=1, threads=1, precision="fp32", teacher_outputs="cached"),
        quantize=QuantizeOptions(methods=("minmax",), calibration_size=32),
        accept_simulated=True,
    )
    with connect("null") as live:
        result = compress(
            own.make_net(512),
            task="classification",
            train=parts[0],
            validation=parts[1],
            test=parts[2],
            target=live,
            budget=Budget(latency_share=0.9),
            student=Fixed(own.make_net),
            run_dir=tmp_path / "run",
            options=options,
        )
    assert result.verdict.outcome is Outcome.PASS
    assert result.bundle is not None
    student = open_bundle(result.bundle).manifest.student
    assert student is not None
    assert student.factory == "own_factory_of_a_test:make_net"
    shutil.move(result.bundle, tmp_path / "shipped")
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "code")
    assert shell(interpreter("onnx", "onnxruntime"), "gate", tmp_path / "shipped", "--accept-simulated", cwd=tmp_path).returncode == 0
    sys.modules.pop("own_factory_of_a_test", None)
