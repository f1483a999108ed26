"""What a user names as `module:name` on the command line and in a job: wrong names and errors of the user's own code are answered, not thrown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgekd.cli.main import cli
from edgekd.errors import ConfigError
from edgekd.settings.jobs import load_job

CODE = {
    "named_well": "import numpy as np\n\n\ndef fails():\n    raise KeyError('nothing here')\n\n\ndef deep():\n    return np.zeros(3).reshape(2, 2)\n\n\n"
    "def wants(width):\n    return width\n\n\ndef ends():\n    raise SystemExit(0)\n\n\nnumber = 3\n",
    "named_raises": "import math\n\nvalue = math.sqrt(-1)\n",
    "named_ends": "import sys\n\nsys.exit(0)\n",
    "named_broken": "def f(:\n    pass\n",
    "named_needs": "x = 1\nimport no_such_package_here\n",
}
WRONG = {
    ":name": ("not module:name", "found: :name"),
    ".mod:name": ("not module:name", "found: .mod:name"),
    "mod:": ("not module:name", "found: mod:"),
    "mod:a..b": ("not module:name",),
    "named_well.py:number": ("not module:name|does not exist", "named_well"),
    "nets/named_well.py:number": ("not module:name", "nets.model"),
    "__main__:cli": ("not module:name",),
    "named_wel:number": ("'named_wel' does not exist", r"named_well \(did you mean this\?\)"),
    "named_well.inner:number": ("'named_well.inner' does not exist",),
    "named_well:numbers": ("no 'numbers'", r"number \(did you mean this\?\)"),
    "named_well:number.part": ("no 'part'",),
    "named_well:wants": ("cannot be called without arguments", "'width'"),
    "named_well:fails": ("'named_well' raises KeyError", r"nothing here.*named_well\.py, line 5\)"),
    "named_well:deep": ("'named_well' raises ValueError", r"reshape.*named_well\.py, line 9\)"),
    "named_well:ends": ("'named_well' raises SystemExit", r"named_well\.py, line 17\)"),
    "named_raises:value": ("'named_raises' raises ValueError", r"named_raises\.py, line 3\)"),
    "named_ends:value": ("'named_ends' raises SystemExit", r"named_ends\.py, line 3\)"),
    "named_broken:f": ("'named_broken' raises SyntaxError", r"invalid syntax.*named_broken\.py, line 1\)"),
    "named_needs:x": ("needs 'no_such_package_here', which is not installed", r"named_needs\.py, line 2\)", "pip install"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules of the user's."""
    for name, text in CODE.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in CODE:
        sys.modules.pop(name, None)


def refused(done: Result, *told: str) -> None:
    assert done.exit_code == 3, done.output
    assert "Traceback" not in done.stderr
    for text in told:
        assert re.search(text, done.stderr), done.stderr


def edgekd(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_name_for_a_model_ends_in_an_error_with_its_remedy(text: str) -> None:
    refused(edgekd("convert", text, "--to", "onnx", "-o", "m.onnx"), *WRONG[text])
    assert not Path("m.onnx").exists()


@pytest.mark.torch
@pytest.mark.parametrize("text", [":name", "named_raises:value", "named_well:fails"])
def test_the_preflight_answers_alike(text: str) -> None:
    pytest.importorskip("torch")
    refused(edgekd("preflight", text, "--example", "x.npy"), *WRONG[text])


@pytest.mark.parametrize("text", ["mod:", "named_ends:value", "named_well:fails", "named_well:wants"])
def test_a_job_names_its_line_too(text: str) -> None:
    data, rest = '{ train = "d", validation = "d", test = "d" }', 'budget = { latency_ms = 1.0 }\nstudent = { fixed = "named_well:number" }\n'
    Path("job.toml").write_text(f'teacher = "{text}"\ndata = {data}\n{rest}')
    job = load_job("job.toml")
    with pytest.raises(ConfigError) as caught, job.first_on_path():
        job.arguments()
    assert "job.toml, line 1: " in caught.value.what
    assert re.search(WRONG[text][0], str(caught.value))
