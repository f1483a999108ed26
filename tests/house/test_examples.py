"""The examples and the benchmark scripts work as they are shipped. The script's own run on the null target is in `test_readme`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.settings.jobs import load_job
from edgekd.stats import tolerance_factor

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
DOCUMENTS = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md", ROOT / "CHANGELOG.md"])
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
"""Tests share their machine."""


def run(words: list[str], cwd: Path) -> str:
    """What a Python script printed; it must end with 0."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=ONE_THREAD, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.usefixtures("fresh_example_modules")
def test_job_example_makes_teacher_space_and_splits_that_fit() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    job = load_job(ROOT / "examples" / "digits_job" / "job.toml")
    with job.first_on_path():
        made = job.arguments()
    specs = made["student"].candidates(0)
    assert len(specs) == 6
    images, labels = made["test"]
    assert images.shape == (719, 1, 8, 8)
    assert (made["teacher"](__import__("torch").from_numpy(images)).argmax(1).numpy() == labels).mean() > 0.9


@pytest.mark.slow
@pytest.mark.torch
def test_own_model_gives_its_help_and_its_teacher_knows_its_classes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script = str(ROOT / "examples" / "own_model.py")
    assert "--accept-simulated" in run([script, "--help"], tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import own_model, torch\n"
        "images, labels = own_model.test()\n"
        "print(float((own_model.teacher()(torch.from_numpy(images)).argmax(1) == torch.from_numpy(labels)).float().mean()))\n"
    )
    assert float(run(["-c", code, str(ROOT / "examples")], tmp_path)) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_benchmark_script_gives_its_help(script: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    assert "usage:" in run([str(script), "--help"], tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_benchmark_script_is_named_in_the_readme_beside_it(script: Path) -> None:
    assert f"`{script.name}`" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_measure_overhead_prints_its_tables_with_conditions_on_the_null_target(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    printed = run([str(ROOT / "benchmarks" / "measure_overhead.py"), "--target", "null"], tmp_path)
    assert len(re.findall(r"^\| \d+ layers of \d+ \| ", printed, flags=re.MULTILINE)) == 3
    assert "Conditions: " in printed
    assert "SIMULATED (null)" in printed


def test_verdict_rates_agrees_with_the_document(tmp_path: Path) -> None:
    printed = run([str(ROOT / "benchmarks" / "verdict_rates.py"), "--replicates", "4000"], tmp_path)
    text = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
    for n in (20, 40, 60):
        (row,) = re.findall(rf"^\| {n} \|.*$", printed, flags=re.MULTILINE)
        assert row in text
        assert f"| {n} | {tolerance_factor(n):.2f} |" in row
    for correlation in ("0.3", "0.6"):
        seen = [float(cell.rstrip("% ")) for cell in re.findall(rf"^\| {correlation} \|(.*)\|$", printed, flags=re.MULTILINE)[0].split("|")][:3]
        stated = [float(cell.rstrip("% ")) for cell in re.findall(rf"^\| {correlation} \|(.*)\|$", text, flags=re.MULTILINE)[0].split("|")[:3]]
        for a, b in zip(seen, stated, strict=True):
            assert abs(a - b) < 4 * 100 * (b / 100 * (1 - b / 100) / 4000) ** 0.5 + 0.5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_that_a_document_names_exists(document: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL))
    paths = [span for span in spans if re.fullmatch(r"(?:edgekd|targets|converters|profiles|tests|benchmarks|docs|examples)/[\w./-]*", span)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    names = [span for span in spans if re.fullmatch(r"_[a-z_]+|[A-Z][A-Z_]{3,}", span)]
    sources = "\n".join(path.read_text(encoding="utf-8") for folder in ("edgekd", "targets", "converters") for path in (ROOT / folder).rglob("*.py"))
    assert [name for name in names if not re.search(rf"\b{name}\b", sources)] == []


def test_architecture_lists_the_stages_as_the_table_does() -> None:
    from edgekd.stages import STAGES

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\w, -]+) \| .* \|$", text, flags=re.MULTILINE)
    known = [(name, tuple(part for part in parents.split(", ") if part != "-")) for name, parents in rows if name != "stage"]
    assert known == [(stage.name, stage.parents) for stage in STAGES]


def test_measuring_states_the_limits_of_the_records() -> None:
    from edgekd.records import Limits, MeasurePlan

    text = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    limits, plan = Limits(), MeasurePlan()
    for stated in (
        f"at least {limits.cpu_share_min}",
        f"| {limits.steal_max:.0%} |".replace("%", " %"),
        f"| {limits.spread_max} |",
        f"| {limits.temperature_rise_max_c:.0f} K |",
        f"{plan.launches} valid; {plan.launches + plan.step} and {plan.max_launches}",
        f"more than {plan.max_reject_share:.0%} of a verdict's".replace("%", " %"),
    ):
        assert stated in text, stated


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_scripts_have_a_docstring_that_says_what_they_are_for(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
