"""Job files: what is refused and where, what is imported, and the shipped example end to end."""

from __future__ import annotations

import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgekd.cli.main import cli
from edgekd.errors import BudgetError, ConfigError
from edgekd.records import Profile
from edgekd.settings.jobs import Job, load_job
from edgekd.settings.toml_file import parse_toml, to_record

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "digits_job"

JOB = """\
teacher = "{module}:teacher"
task = "classification"
target = "null"

[data]
train = "{module}:split"
validation = "arrays"
test = "{module}:split"

[budget]
latency_ms = 0.5

[student]
factory = "{module}:make_net"
choices = {{ width = [8, 16] }}

[options.train]
epochs = 2
"""

MODULE = """\
import numpy as np

made = []

def teacher():
    made.append("teacher")
    return lambda inputs: inputs

def split():
    return np.zeros((4, 2), dtype=np.float32), np.zeros(4, dtype=np.int64)

def make_net(width):
    raise NotImplementedError

def fits(width):
    return width > 8

nameless = lambda width: None
number = 3
"""


@pytest.fixture
def job_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A job with its own module, whose name no other test uses."""
    name = f"job_{zlib.crc32(request.node.nodeid.encode())}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "job.toml").write_text(JOB.format(module=name))
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "x.npy", np.zeros((6, 2), dtype=np.float32))
    np.save(tmp_path / "arrays" / "targets.npy", np.arange(6))
    return tmp_path / "job.toml"


def arguments(job: Job) -> dict[str, object]:
    with job.first_on_path():
        return job.arguments()


def test_job_is_read_without_importing_anything_of_the_user(job_file: Path) -> None:
    before = set(sys.modules)
    job = load_job(job_file)
    assert not [name for name in set(sys.modules) - before if name.startswith("job_")]
    assert (job.spec.options.train.epochs, job.spec.budget.latency_ms, job.run_dir) == (2, 0.5, job_file.parent.resolve() / "runs" / "job")


def test_names_become_teacher_splits_and_space(job_file: Path) -> None:
    found = arguments(load_job(job_file, ["student.where=" + next(job_file.parent.glob("job_*.py")).stem + ":fits"]))
    module = sys.modules[next(job_file.parent.glob("job_*.py")).stem]
    assert module.made == ["teacher"]
    assert len(found["validation"]) == 6  # type: ignore[arg-type]
    assert [dict(spec.kwargs) for spec in found["student"].candidates(0)] == [{"width": 16}]  # type: ignore[attr-defined]
    assert str(job_file.parent) not in sys.path


def test_overrides_reach_the_job_and_the_profile(job_file: Path) -> None:
    job = load_job(job_file, ["seed=7", "runtime.threads=2", "options.train.loss=mse", "budget.percentile=90"])
    assert (job.spec.seed, job.spec.profile, job.spec.options.train.loss, job.spec.budget.percentile) == (7, {"runtime": {"threads": 2}}, "mse", 90)


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        ("task =", "tasks =", 2, "task (did you mean this?)"),
        ("latency_ms", "latency_s", 11, "latency_ms (did you mean this?)"),
        ("epochs = 2", 'epochs = "two"', 18, "`int`"),
        ("epochs = 2", "epochs = 0", 18, ">= 1"),
        ("epochs = 2", "epoch = 2", 18, "epochs (did you mean this?)"),
        ("[8, 16]", "[8, {}]", 15, "width"),
        ("latency_ms = 0.5", "latency_ms = -1", 10, "positive"),
        ("latency_ms = 0.5", "max_drop = 0.1", 10, "exactly one latency"),
        ("latency_ms = 0.5", "latency_ms = 0.5.1", 11, "not TOML"),
        ("choices", "# choices", 13, "needs choices"),
        ("factory =", 'fixed = "a:b"\nfactory =', 13, "either a factory"),
    ],
)
def test_wrong_line_is_named_with_what_is_allowed(job_file: Path, old: str, new: str, line: int, text: str) -> None:
    content = job_file.read_text()
    assert content.count(old) == 1
    job_file.write_text(content.replace(old, new))
    with pytest.raises((ConfigError, BudgetError)) as caught:
        load_job(job_file)
    assert f"job.toml, line {line}" in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("key", ["teacher", "budget", "student", "data"])
def test_missing_part_is_named_with_an_example(job_file: Path, key: str) -> None:
    text = job_file.read_text()
    job_file.write_text("\n".join(f"# {line}" if line.startswith(f"{key} =") else line for line in text.splitlines()))
    if key != "teacher":
        start = text.index(f"[{key}]")
        end = text.find("\n\n", start)
        job_file.write_text(text[:start] + text[end:])
    with pytest.raises(ConfigError, match=f"'{key}' is missing") as caught:
        load_job(job_file)
    assert caught.value.hint is not None


def test_override_is_named_instead_of_a_line_when_it_is_wrong(job_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set options.train.epochs"):
        load_job(job_file, ["options.train.epochs=none"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("{m}:make_nets", "make_net (did you mean this?)"),
        ("{m}:nameless", "importable by name"),
        ("{m}:number", "importable by name"),
        ("{m}", "not module:name"),
        ("__main__:make_net", "not module:name"),
        ("no_such_module_here:make_net", "or an installed module"),
    ],
)
def test_factory_that_cannot_be_imported_by_name_is_refused_with_its_line(job_file: Path, value: str, text: str) -> None:
    name = next(job_file.parent.glob("job_*.py")).stem
    job_file.write_text(job_file.read_text().replace(f"{name}:make_net", value.replace("{m}", name)))
    with pytest.raises(ConfigError) as caught:
        arguments(load_job(job_file))
    assert "job.toml, line 14" in str(caught.value)
    assert text in str(caught.value)


def test_module_beside_the_job_is_refused_when_another_of_its_name_is_loaded(job_file: Path) -> None:
    (job_file.parent / "json.py").write_text("def teacher(): ...\n")
    job = load_job(job_file, ["teacher=json:teacher"])
    with pytest.raises(ConfigError, match="another module called 'json' is loaded already"):
        arguments(job)


def test_missing_package_of_the_user_s_module_is_told_apart(job_file: Path) -> None:
    (job_file.parent / "needs_more_packages.py").write_text("import no_such_package_here\n")
    with pytest.raises(ConfigError, match="needs 'no_such_package_here'"):
        arguments(load_job(job_file, ["teacher=needs_more_packages:teacher"]))


def test_lines_are_right_behind_multi_line_texts() -> None:
    text = 'name = "x"\ndescription = """\n[runtime]\nthreads = 3\n"""\n[runtime]\noptions = { a = 1,  b = 2 }\nthreads = 0\n'
    with pytest.raises(ConfigError, match=r"p.toml, line 8: the value of 'runtime.threads'"):
        to_record(parse_toml(text, "p.toml"), Profile)


def test_example_job_is_well_formed() -> None:
    job = load_job(EXAMPLE / "job.toml")
    assert (job.spec.budget.latency_share, job.spec.student.factory) == (0.5, "model:make_net")


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.usefixtures("fresh_example_modules")
def test_example_job_runs_from_a_copy_and_continues_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    shutil.copytree(EXAMPLE, tmp_path / "mine", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    monkeypatch.chdir(tmp_path / "mine")
    settings = ["target=null", "options.accept_simulated=true", "options.train.epochs=2", "options.search.rung_epochs=1", "student.choices.blocks=[1]"]
    command = ["compress", "job.toml", *(part for text in settings for part in ("--set", text))]
    planned = CliRunner().invoke(cli, [*command, "--plan"])
    assert planned.exit_code == 0, planned.output
    assert "3 candidates" in planned.stdout
    assert not (tmp_path / "mine" / "runs").exists()
    done = CliRunner().invoke(cli, command)
    assert done.exit_code in (0, 1), done.output
    assert "SIMULATED: null" in done.stdout
    assert (tmp_path / "mine" / "runs" / "digits" / "report.html").is_file()
    again = CliRunner().invoke(cli, command)
    assert again.exit_code == done.exit_code
    assert again.stdout == done.stdout
    assert "distil: reused" in again.stderr
    assert "distil: started" not in again.stderr


def test_a_name_without_its_table_is_answered_with_the_whole_name(job_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"options\.accept_simulated \(did you mean this\?\)"):
        load_job(job_file, ["accept_simulated=true"])
    with pytest.raises(ConfigError, match=r"options\.train\.epochs \(did you mean this\?\)"):
        load_job(job_file, ["epochs=3"])


def test_split_that_is_neither_a_folder_nor_a_function_is_named(job_file: Path) -> None:
    with pytest.raises(ConfigError, match="the folder does not exist") as caught:
        arguments(load_job(job_file, ["data.train=no-such"]))
    assert str(job_file.parent.resolve() / "no-such") in str(caught.value)


def test_options_for_target_and_simulation_reach_a_job() -> None:
    from edgekd.cli.run import _job_overrides

    given = _job_overrides(targets=("profiles/x.toml",), allow_extreme=True, accept_simulated=True)
    job = load_job(EXAMPLE / "job.toml", given)
    assert (job.spec.options.accept_simulated, job.spec.options.allow_extreme) == (True, True)
    assert job.targets == (str(Path("profiles/x.toml").resolve()),)
    several = _job_overrides(targets=("null", "local"), allow_extreme=None, accept_simulated=None)
    assert load_job(EXAMPLE / "job.toml", several).targets == ("null", "local")
