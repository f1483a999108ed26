"""A bundle's terms: its own profile judges, nothing in it names code, a path or a host, and a task of one's own is named by the call."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgekd.bundle import MANIFEST, open_bundle
from edgekd.cli.main import cli
from edgekd.errors import BundleError, ConfigError, ProfileError
from edgekd.gating import gate, validate
from edgekd.options import Options
from edgekd.quantize_only import quantize_only
from edgekd.records import Budget, Ledger, Manifest, Outcome, RuntimeConfig, TransportConfig
from edgekd.result import RunSummary
from edgekd.target import connect
from edgekd.tasks import Classification, MultiTask, Regression
from edgekd.teachers import OnnxTeacher
from edgekd.terms import own_code
from tests.pipeline.bundle_kit import bundle_copy, home, quantized, resealed, save_inputs


def edgekd(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundle_copy(tmp_path / "bundle")


# ------------------------------------------------------------------------------------------ the profile

SHORTER = ("measure.verdict.launches=12", "runtime.threads=2")


@pytest.fixture(scope="module")
def overridden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a run whose profile was overridden in the call."""
    return quantized(tmp_path_factory.mktemp("overridden") / "run", target="null", overrides=SHORTER)


def test_profile_in_the_bundle_judges_without_being_given_again(overridden: Path) -> None:
    result = gate(overridden, accept_simulated=True)
    assert result.verdict.outcome is Outcome.PASS
    assert result.measurement is not None
    assert (len(result.measurement.launches), result.measurement.fingerprint.fields["threads"]) == (12, "2")
    assert result.judged_by == "the bundle's own profile 'null'"
    assert result.differences == (
        "measure.verdict.launches is 20, in the bundle 12",
        "runtime.threads is 1, in the bundle 2",
    )


def test_target_and_overrides_of_the_call_go_before_the_profile_in_the_bundle(overridden: Path) -> None:
    today = gate(overridden, target="null", accept_simulated=True)
    assert today.verdict.outcome is Outcome.REFUSE
    assert "threads is 1 and was 2" in today.verdict.reason
    assert today.judged_by == "the profile 'null' named in the call"
    changed = gate(overridden, overrides=("measure.verdict.launches=14",), accept_simulated=True)
    assert changed.measurement is not None
    assert len(changed.measurement.launches) == 14
    assert changed.judged_by == "the bundle's own profile 'null', with measure.verdict.launches=14"
    with connect("null") as live, pytest.raises(ConfigError, match="live target"):
        gate(overridden, target=live, overrides=SHORTER)


def test_outputs_say_which_profile_judged(overridden: Path, tmp_path: Path) -> None:
    done = edgekd("gate", overridden, "--accept-simulated", "--json", tmp_path / "gate.json")
    assert done.exit_code == 0
    assert "judged by the bundle's own profile 'null'; the profile differs: measure.verdict.launches is 20, in the bundle 12" in done.stderr
    conditions = json.loads((tmp_path / "gate.json").read_text())["conditions"]
    assert conditions["judged by"] == "the bundle's own profile 'null'"
    assert conditions["profile differs"].endswith("runtime.threads is 1, in the bundle 2")
    assert "the bundle's own profile 'null'" in edgekd("validate", overridden, "--accept-simulated").stdout


def test_ledger_card_and_manifest_say_what_never_ran_on_hardware(overridden: Path) -> None:
    (row,) = [row for row in Ledger.load(overridden / "ledger.json").rows if row.step == "hardware"]
    assert row.reason == "never ran on real hardware"
    assert "| ran on hardware | never ran on real hardware |" in (overridden / "MODEL_CARD.md").read_text()
    assert not open_bundle(overridden).manifest.proven_on_hardware


def with_profile(bundle: Path, **changes: Any) -> Path:
    """The bundle with fields of its profile changed: what a person with the tools could ship."""
    return resealed(bundle, profile=msgspec.structs.replace(Manifest.load(bundle / MANIFEST).profile, **changes))


@pytest.mark.parametrize("name", ["board-7", "../../profiles/board", "/etc/board.toml", "./board.toml"])
def test_profile_s_name_in_a_bundle_is_a_word_and_never_a_path(bundle: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "board.toml").write_text('description = "d"\n[runtime]\nkind = "null"\nthreads = 7\n')
    result = gate(with_profile(bundle, name=name), accept_simulated=True)
    assert result.verdict.outcome is Outcome.PASS
    assert result.differences == (), "no file of that name was opened"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transport": TransportConfig(kind="ssh", host="10.0.0.7")}, 'transport.kind = "ssh"'),
        ({"transport": TransportConfig(kind="local", host="10.0.0.7", user="root")}, "transport.host, transport.user"),
        ({"transport": TransportConfig(python="/tmp/python")}, "transport.python"),
        ({"transport": TransportConfig(workdir="/root/.ssh")}, "transport.workdir"),
        ({"runtime": RuntimeConfig(kind="onnxruntime", options={"lock": "/etc/passwd"})}, "runtime.options.lock"),
    ],
)
def test_bundle_brings_no_host_and_no_path_and_a_target_of_the_call_helps(bundle: Path, changes: dict[str, Any], says: str) -> None:
    before = sorted(path.name for path in bundle.rglob("*"))
    changed = with_profile(bundle, **changes)
    with pytest.raises(BundleError, match="--target NAME") as caught:
        gate(changed, accept_simulated=True)
    assert says in str(caught.value)
    with pytest.raises(BundleError, match="--target NAME"):
        gate(changed, overrides=("runtime.threads=1",), accept_simulated=True)
    assert validate(changed, target="null", accept_simulated=True).outcome is Outcome.PASS
    assert sorted(path.name for path in bundle.rglob("*")) == before


def test_runtime_that_no_plug_in_provides_is_named(bundle: Path) -> None:
    with pytest.raises(ProfileError, match=r"os\.path:join"):
        gate(with_profile(bundle, runtime=RuntimeConfig(kind="os.path:join")))


def test_profile_of_a_bundle_is_checked_like_a_file(bundle: Path) -> None:
    with pytest.raises(ProfileError, match="at least one field"):
        gate(with_profile(bundle, identity=()))


def test_what_may_not_travel_stays_behind_and_the_ledger_names_it(tmp_path: Path) -> None:
    bundle = quantized(tmp_path / "run", overrides=(f"transport.workdir={tmp_path / 'device'}", "transport.host=board-7.lan"))
    manifest = open_bundle(bundle).manifest
    assert manifest.profile.transport == TransportConfig()
    assert str(tmp_path) not in (bundle / MANIFEST).read_text()
    (row,) = [row for row in Ledger.load(tmp_path / "run" / "ledger.json").rows if row.step == "profile of a gate"]
    assert row.reason.startswith("not in the bundle: transport.host, transport.workdir")
    assert validate(bundle, accept_simulated=True).outcome is Outcome.PASS


# ------------------------------------------------------------------------------------------ a task of one's own

TASK = """
import numpy as np

from edgekd import Classification


class TopTwo(Classification):
    def scores(self, outputs, targets):
        best = np.argsort(outputs["y"], axis=1)[:, -2:]
        return (best == np.asarray(targets)[:, None]).any(axis=1).astype(np.float64)


def top_two():
    return TopTwo()


class TopK(Classification):
    def __init__(self, k=1):
        super().__init__()
        self.k = k

    def scores(self, outputs, targets):
        best = np.argsort(outputs["y"], axis=1)[:, -self.k:]
        return (best == np.asarray(targets)[:, None]).any(axis=1).astype(np.float64)


class Strict(TopK):
    def __init__(self, k):
        super().__init__(k)


class Learns(TopTwo):
    def check(self, outputs, targets, split=""):
        super().check(outputs, targets, split)
        self.shape = outputs["y"].shape


made = TopK(2)


def make():
    return TopK(k=2)


print("imported")
"""


@pytest.fixture(params=["top_two"])
def judged_by_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A bundle that was judged by a user's own task, whose module lies in the current folder, which is not on the path."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "own_task_of_a_test.py").write_text(TASK)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(code))
        task = getattr(importlib.import_module("own_task_of_a_test"), request.param)()
        data = save_inputs(tmp_path / "data")
        np.save(data / "targets.npy", np.argsort(OnnxTeacher(home() / "net.onnx").outputs({"x": np.load(data / "x.npy")})["y"], axis=1)[:, -2])
        run = tmp_path / "run"
        with connect("null") as live:
            quantize_only(
                home() / "net.onnx",
                data,
                target=live,
                task=task,
                budget=Budget(latency_share=0.9, max_drop=0.5),
                run_dir=run,
                options=Options(accept_simulated=True),
            )
    sys.modules.pop("own_task_of_a_test")
    monkeypatch.chdir(code)
    yield run
    sys.modules.pop("own_task_of_a_test", None)


def test_own_task_is_named_when_the_bundle_is_made(judged_by_own_task: Path) -> None:
    run = judged_by_own_task
    (row,) = [row for row in Ledger.load(run / "ledger.json").rows if row.step == "task of a gate"]
    assert "own_task_of_a_test:TopTwo" in row.reason
    assert "--task" in row.reason
    assert row.reason in [json.loads(line)["text"] for line in (run / "events.jsonl").read_text().splitlines()], "told at once, and so printed by the command"


def test_own_task_is_not_imported_because_a_bundle_names_it(judged_by_own_task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BundleError, match="--task own_task_of_a_test:TopTwo"):
        gate(judged_by_own_task / "bundle", accept_simulated=True)
    assert "own_task_of_a_test" not in sys.modules
    assert "imported" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["TopTwo", "top_two"])
def test_own_task_judges_when_the_call_names_it(judged_by_own_task: Path, name: str) -> None:
    before = list(sys.path)
    result = gate(judged_by_own_task / "bundle", task=f"own_task_of_a_test:{name}", accept_simulated=True)
    assert result.verdict.outcome is Outcome.PASS
    assert result.teacher_accuracy == 1.0, "a plain classification would find every item wrong"
    assert result.task == "own_task_of_a_test:TopTwo, given in the call"
    assert sys.path == before
    assert edgekd("gate", judged_by_own_task / "bundle", "--task", f"own_task_of_a_test:{name}", "--accept-simulated").exit_code == 0


def test_another_task_or_another_source_is_refused(judged_by_own_task: Path) -> None:
    bundle = judged_by_own_task / "bundle"
    with pytest.raises(BundleError, match="not the task"):
        gate(bundle, task=Classification(), accept_simulated=True)
    Path("task_that_ends_a_test.py").write_text("raise SystemExit(0)\n")
    for wrong, says in (
        ("own_task_of_a_test", "module:function|module:name"),
        (".own_task_of_a_test:TopTwo", "module:name"),
        ("no_such_module_here:T", "does not exist"),
        ("task_that_ends_a_test:T", r"raises SystemExit.*task_that_ends_a_test\.py, line 1"),
        ("own_task_of_a_test:TopTow", "TopTwo"),
    ):
        with pytest.raises(ConfigError, match=says):
            gate(bundle, task=wrong, accept_simulated=True)
    sys.modules.pop("own_task_of_a_test", None)
    importlib.invalidate_caches()
    source = Path("own_task_of_a_test.py")
    source.write_text(TASK.replace("-2:", "-3:"))
    with pytest.raises(BundleError, match="If its source changed"):
        gate(bundle, task="own_task_of_a_test:TopTwo", accept_simulated=True)


@pytest.mark.parametrize("judged_by_own_task", ["make"], indirect=True)
def test_own_task_made_with_other_arguments_is_refused(judged_by_own_task: Path) -> None:
    bundle = judged_by_own_task / "bundle"
    with pytest.raises(BundleError, match="made it with arguments: --task module:name of an object"):
        gate(bundle, task="own_task_of_a_test:TopK", accept_simulated=True)
    with pytest.raises(ConfigError, match="function without arguments"):
        gate(bundle, task="own_task_of_a_test:Strict", accept_simulated=True)
    module = importlib.import_module("own_task_of_a_test")
    with pytest.raises(BundleError, match="what it was made with"):
        gate(bundle, task=module.TopK(3), accept_simulated=True)
    used = module.TopK(2)
    used.check({"y": np.zeros((2, 3, 4))}, np.zeros((2, 4), dtype=np.int64))
    assert not used.binary
    for same in ("own_task_of_a_test:made", "own_task_of_a_test:make", used):
        assert gate(bundle, task=same, accept_simulated=True).teacher_accuracy == 1.0, "with k = 1 every item would be wrong"


@pytest.mark.parametrize("judged_by_own_task", ["Learns"], indirect=True)
def test_own_task_that_learns_while_it_is_used_is_the_one_that_the_run_was_given(judged_by_own_task: Path) -> None:
    result = gate(judged_by_own_task / "bundle", task="own_task_of_a_test:Learns", accept_simulated=True)
    assert result.teacher_accuracy == 1.0


def test_multi_task_with_a_part_of_one_s_own_is_told_by_its_part_and_hashed_whole() -> None:
    class Mine(Classification):
        """A part of the user's own."""

    assert own_code(MultiTask({"a": Classification(), "b": Regression()})) == ("", "")
    (name, one), (_, other) = (own_code(MultiTask({"a": Classification(), "b": Mine(labels=labels)})) for labels in (["x"], ["y"]))
    assert name.endswith("Mine")
    assert one != other


def test_no_code_is_imported_from_inside_a_bundle(judged_by_own_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = judged_by_own_task / "bundle"
    (bundle / "own_task_of_a_test.py").write_text(TASK)
    monkeypatch.chdir(bundle)
    with pytest.raises(ConfigError, match="from another folder"):
        gate(resealed(bundle), task="own_task_of_a_test:TopTwo", accept_simulated=True)
    assert "own_task_of_a_test" not in sys.modules


def test_edgekd_s_own_task_needs_no_name_and_takes_only_its_like(bundle: Path) -> None:
    assert gate(bundle, accept_simulated=True).task == "edgekd's classification"
    with pytest.raises(BundleError, match="not the task"):
        gate(bundle, task=Regression(), accept_simulated=True)


# ------------------------------------------------------------------------------------------ what a run leaves


@pytest.mark.slow
@pytest.mark.torch
def test_bundle_of_an_earlier_run_is_removed_when_a_run_ends_without_an_artifact(tmp_path: Path) -> None:
    from tests.pipeline import pipeline_kit as kit

    run = tmp_path / "run"
    over = kit.options(bundle_data_mb=0.001, allow_extreme=True)
    first = kit.run("classification", run, student=kit.fixed("classification"), options=over)
    assert first.bundle == run / "bundle"
    assert (run / "bundle").is_dir()
    assert (run / "evaluation").is_dir()
    ended = kit.run("classification", run, student=kit.family("classification", width=[8, 16]), budget=Budget(latency_ms=1e-4), options=over)
    assert ended.bundle is None
    assert ended.verdict.outcome is not Outcome.PASS
    assert not (run / "bundle").exists()
    assert not (run / "evaluation").exists()
    assert RunSummary.load(run / "run.json").bundle == ""
