"""Profiles on file: the search path, what is checked, what an error says, and overrides."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.errors import ProfileError
from edgekd.records import MeasureConfig, Precision, Profile
from edgekd.settings.profile_fields import OFF, describe_fields
from edgekd.settings.profile_file import list_profiles, load_profile
from edgekd.settings.toml_text import line_of

README = Path(__file__).resolve().parents[2] / "profiles" / "README.md"


def write(folder: Path, text: str, name: str = "board.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(path, overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ shipped


def test_local_has_the_defaults_of_the_record_but_looks_at_the_sentinel_and_says_what_proved_it() -> None:
    profile = load_profile("local")
    defaults = MeasureConfig()
    assert (profile.measure.screen.launch.look_s, profile.measure.verdict.launch.look_s) == (0.002, 0.002)
    assert msgspec.structs.replace(profile.measure, screen=defaults.screen, verdict=defaults.verdict) == defaults
    for plan, default in ((profile.measure.screen, defaults.screen), (profile.measure.verdict, defaults.verdict)):
        launch = msgspec.structs.replace(plan.launch, look_s=0.0, max_time_s=default.launch.max_time_s)
        assert msgspec.structs.replace(plan, launch=launch) == default
    # a launch of a screen waits for calm parts
    assert (profile.measure.screen.launch.max_time_s, profile.measure.verdict.launch.max_time_s) == (10.0, defaults.verdict.launch.max_time_s)
    assert load_profile("litert-local").measure == profile.measure
    assert (profile.transport.kind, profile.runtime.kind, profile.runtime.threads) == ("local", "onnxruntime", 1)
    assert profile.runtime.precisions == (Precision.INT8, Precision.FP32)
    assert profile.proven_on == ("x86_64 avx512 vnni", "x86_64 avx2")
    assert "AVX512-VNNI" in profile.proof


def test_null_is_not_proven_on_hardware() -> None:
    profile = load_profile("null")
    assert profile.proven_on == ()
    assert "simulated" in profile.proof


def test_shipped_profiles_are_listed_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {row.name: row for row in list_profiles()}
    assert {"local", "null"} <= set(rows)
    assert all(row.origin == "shipped" and row.profile is not None and row.profile.description and not row.problem for row in rows.values())


# ------------------------------------------------------------------------------------------ search path


def test_a_project_profile_hides_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "profiles", 'description = "mine"\n', "local.toml")
    write(tmp_path / "profiles", 'description = "broken"\nthreads = 1\n', "broken.toml")
    monkeypatch.chdir(tmp_path)
    assert load_profile("local").description == "mine"
    rows = {row.name: row for row in list_profiles()}
    assert (rows["local"].origin, rows["null"].origin) == ("project", "shipped")
    assert rows["broken"].profile is None
    assert "threads" in rows["broken"].problem


def test_an_explicit_path_is_read_whatever_stands_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 'description = "a file"\n', "local.toml")
    monkeypatch.chdir(tmp_path)
    assert load_profile("local.toml").description == "a file"
    assert load_profile("./local.toml").name == "local"
    assert load_profile(Path("local.toml")).description == "a file"
    assert load_profile("local").description != "a file"


def test_a_profile_called_otherwise_than_its_file_is_refused_on_the_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "profiles", '# first\nname = "other"\ndescription = "d"\n')
    monkeypatch.chdir(tmp_path)
    assert "line 2" in refusal("board")
    assert load_profile(path).name == "other"


def test_an_unknown_name_offers_near_names() -> None:
    assert "local (did you mean this?)" in refusal("locl")
    assert "does not exist" in refusal("./locl.toml")


def test_an_unreadable_file_is_a_profile_error(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b'description = "\xff"\n')
    assert "UTF-8" in refusal(path)
    assert "cannot be read" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("runtime = { thread = 2 }", ("thread", "threads (did you mean this?)")),
        ("runtime.threads = 0", ("found: 0", "integer > 0")),
        ('runtime.threads = "one"', ("'one'", "integer > 0")),
        ("runtime.threads = true", ("True", "integer > 0")),
        ("runtime.threads = 1.5", ("1.5", "integer > 0")),
        ('runtime.precisions = ["int4"]', ("int4", "int8 (did you mean this?)")),
        ("runtime.precisions = []", ("at least one precision",)),
        ('runtime.precisions = ["int8", "int8"]', ("each once",)),
        ('runtime.precisions = "int8"', ("list of",)),
        ("runtime.options = { a = [1] }", ("runtime.options.a", "text or integer")),
        ("runtime.options = 3", ("table of",)),
        ("runtime = 3", ("a table with",)),
        ("transport.port = 70000", ("70000", "<= 65535")),
        ("measure.limits.steal_max = 1.5", ("1.5", "<= 1")),
        ("measure.limits.steal_max = nan", ("nan", "finite")),
        ("measure.cooldown_s = inf", ("inf", "finite")),
        ("measure.cooldown_s = -1", ("-1", ">= 0")),
        ('measure.cooldown_s = "off"', ("'off'", "number")),
        ("measure.verdict.launches = 61", ("61", "max_launches (60)")),
        ("measure.screen.launch.warmup_min_s = 9.0", ("warmup_max_s",)),
        ("measure.limits.steal = 0.1", ("steal_max (did you mean this?)",)),
        ("identity = []", ("at least one field",)),
        ("proven_on = true", ("list of (text)",)),
        ('proven_on = [" "]', ("x86_64 avx512 vnni",)),
        ('type = "edgekd.profile/1"', ("unknown key",)),
    ],
)
def test_a_wrong_value_is_refused_with_line_value_and_what_is_allowed(tmp_path: Path, line: str, says: tuple[str, ...]) -> None:
    message = refusal(write(tmp_path, f'# a board\ndescription = "d"\nproof = """\nmany\nlines"""\n{line}\n'))
    assert "board.toml, line 6" in message
    for text in says:
        assert text in message


def test_a_key_in_a_table_is_found_on_its_line(tmp_path: Path) -> None:
    text = 'description = "threads = 9"\n\n[runtime]\n# threads = 8\nprecisions = [\n  "fp32",\n]\n\nthreads = 0\n'
    assert "line 9" in refusal(write(tmp_path, text))
    assert line_of(text, ("runtime", "precisions")) == 5
    assert line_of(text, ("runtime", "kind")) == 0


@pytest.mark.parametrize(
    ("text", "line"), [('description = "d"\n\nthreads == 1\n', 3), ("description = one\n", 1), ('description = "d"\n[runtime\n', 2), ("a = 1\na = 2\n", 2)]
)
def test_bad_toml_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    assert f"line {line}: this is not TOML" in refusal(write(tmp_path, text))


def test_a_profile_needs_a_description(tmp_path: Path) -> None:
    assert "description" in refusal(write(tmp_path, "[runtime]\nthreads = 1\n"))
    assert "description" in refusal(write(tmp_path, ""))


def test_a_partial_table_keeps_the_other_defaults(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, 'description = "d"\n[measure.screen]\nlaunches = 2\n[measure.limits]\nspread_max = "off"\ncpu_share_min = 1\n'))
    default = MeasureConfig()
    assert profile.measure.screen.launches == 2
    assert profile.measure.screen.launch == default.screen.launch
    assert profile.measure.screen.max_reject_share == default.screen.max_reject_share
    assert profile.measure.limits.spread_max is None
    assert profile.measure.limits.cpu_share_min == 1.0


# ------------------------------------------------------------------------------------------ overrides


def test_overrides_are_toml_and_text_needs_no_quotes() -> None:
    profile = load_profile(
        "null",
        (
            "runtime.threads=2",
            "measure.verdict.launches = 10",
            "transport.host=10.0.0.7",
            "transport.serial=1234",
            'runtime.precisions=["fp32"]',
            "runtime.options.noise=0.02",
            f"measure.limits.steal_max={OFF}",
        ),
    )
    assert (profile.runtime.threads, profile.measure.verdict.launches) == (2, 10)
    assert (profile.transport.host, profile.transport.serial) == ("10.0.0.7", "1234")
    assert profile.runtime.precisions == (Precision.FP32,)
    assert profile.runtime.options == {"noise": 0.02, "speed": 1.0, "seed": 0}
    assert profile.measure.limits.steal_max is None


def test_overrides_may_be_a_mapping() -> None:
    flat, nested = (
        load_profile("local", {"runtime.threads": 2, "runtime.precisions": (Precision.FP32,)}),
        load_profile("local", {"runtime": {"threads": 2, "precisions": ["fp32"]}}),
    )
    assert flat == nested
    assert flat.runtime.threads == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("runtime.thread=1", "threads (did you mean this?)"),
        ("runtim.threads=1", "runtime (did you mean this?)"),
        ("runtime.threads.x=1", "has no fields"),
        ("runtime.threads=0", "integer > 0"),
        ("runtime.threads=many", "integer > 0"),
        ("runtime.threads=", "integer > 0"),
        ("runtime=1", "a table with"),
        ("runtime.threads", "key=value"),
        ("=1", "key=value"),
        ("runtime..threads=1", "key=value"),
        ("measure.verdict.launches=100", "max_launches"),
        ("runtime.threads=1\nname='x'", "integer > 0"),
    ],
)
def test_a_bad_override_is_refused(text: str, says: str) -> None:
    message = refusal("local", text)
    assert says in message
    assert text.splitlines()[0] in message


@given(st.integers(1, 64), st.floats(0, 1), st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1))
def test_an_override_holds_what_was_given(threads: int, share: float, host: str) -> None:
    profile = load_profile("local", (f"runtime.threads={threads}", f"measure.limits.steal_max={share!r}", f"transport.host={host}"))
    assert (profile.runtime.threads, profile.measure.limits.steal_max, profile.transport.host) == (threads, share, host)
    assert Profile.from_json(profile.to_json()) == profile


# ------------------------------------------------------------------------------------------ the README's table


def test_the_readme_lists_every_field_with_type_unit_and_default() -> None:
    rows = [
        tuple(cell.strip().strip("`") for cell in line.strip("| \n").split(" | "))
        for line in README.read_text(encoding="utf-8").partition("## Every field")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    ]
    assert [(row[0], row[1], row[3].strip()) for row in rows] == [(field.key, field.allowed, field.default or "none") for field in describe_fields()]
    for row in rows:
        assert len(row) == 5
        assert row[4]
        if row[0].endswith("_s"):
            assert row[2] == "s", row[0]
        if re.search(r"share|number >= 0 and <= 1", row[0] + row[1]):
            assert row[2] == "share", row[0]


def test_the_example_in_the_readme_is_a_profile(tmp_path: Path) -> None:
    example = README.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    profile = load_profile(write(tmp_path, example))
    assert (profile.runtime.threads, profile.measure.limits.steal_max) == (2, None)
