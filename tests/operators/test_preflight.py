"""The preflight asked directly: which sets there are, how many real conversions that takes, and who is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgekd
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.operators.report import Culprit, OperatorSet, PreflightReport
from tests.operators.converter_kit import install_counting

pytest.importorskip("torch")
import torch
from torch import nn

from tests.operators import nets

pytestmark = pytest.mark.torch
IMAGES = {"image": np.random.default_rng(0).standard_normal((6, 1, 8, 8)).astype(np.float32)}
ROWS = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)


def answer(given: object, example: object, *overrides: str) -> PreflightReport:
    with edgekd.connect("null", overrides=overrides) as target:
        return edgekd.preflight(given, target=target, example=example)


def line_of(text: str) -> str:
    """`file:line` of a line of the tests' networks."""
    lines = Path(nets.__file__).read_text(encoding="utf-8").splitlines()
    return f"nets.py:{next(number for number, line in enumerate(lines, 1) if text in line)}"


def the_culprit(report: PreflightReport) -> Culprit:
    (refused,) = [item for item in report.sets if not item.passed]
    assert refused.culprit is not None
    return refused.culprit


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install_counting(tmp_path / "plugin", monkeypatch)


@pytest.mark.slow
def test_one_conversion_for_each_set_whatever_the_number_of_students(notes: Path) -> None:
    def make(width: int, pool: str) -> nn.Module:
        kind = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}[pool]
        return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), kind(2), nn.Flatten(), nn.Linear(16 * width, 4))

    space = edgekd.Family(make, width=[16, 4, 8, 12], pool=["max", "avg"])
    report = answer(space, IMAGES, "runtime.kind=keras-only", 'runtime.precisions=["fp32"]')
    assert report.passed
    assert [len(item.members) for item in report.sets] == [4, 4]
    assert {item.tried for item in report.sets} == {"pool=max width=4", "pool=avg width=4"}
    assert notes.read_text().split() == ["Sequential"] * 2
    assert (report.conversions, report.format, report.simulated) == (2, "keras", "null")


@pytest.mark.slow
def test_the_culprit_is_found_two_levels_down_with_its_line_and_the_operator() -> None:
    report = answer(nets.net(4, "masked"), IMAGES)
    culprit = the_culprit(report)
    assert culprit.module == "stages.0.act"
    assert culprit.kind.endswith("nets.InPlaceMask")
    assert culprit.step == "convert"
    assert "index_put" in culprit.operator
    assert culprit.place == line_of("scores[:, torch.triu")
    (reason,) = report.refused().values()
    for part in ("stages.0.act", "index_put", "null", culprit.place, "use instead"):
        assert part in reason


@pytest.mark.slow
def test_a_functional_operator_is_put_down_to_the_module_whose_forward_holds_it() -> None:
    culprit = the_culprit(answer(nets.Inside(), ROWS))
    assert (culprit.module, culprit.kind.rpartition(".")[2]) == ("", "Inside")
    assert culprit.place.startswith("nets.py:")


@pytest.mark.slow
def test_control_flow_on_values_is_named_and_has_a_replacement() -> None:
    culprit = the_culprit(answer(nets.net(4, "branch"), IMAGES))
    assert culprit.module == "stages.0.act"
    assert "torch.where" in culprit.replacement
    assert culprit.place == line_of("x * 2.0 if")


@pytest.mark.slow
def test_what_the_target_does_not_support_is_traced_to_its_module(notes: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.GELU()), nn.Linear(8, 4))
    culprit = the_culprit(answer(module, ROWS, "runtime.kind=picky", 'runtime.precisions=["fp32"]'))
    assert (culprit.module, culprit.step, culprit.operator) == ("1.1", "support", "Erf")
    assert "no kernel" in culprit.reason


@pytest.mark.slow
def test_a_wrong_lowering_is_found_and_traced_to_its_module(notes: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Linear(8, 4))
    report = answer(module, 3.0 * ROWS, "runtime.kind=keras-only", 'runtime.precisions=["fp32"]')
    culprit = the_culprit(report)
    assert (culprit.module, culprit.step, culprit.operator) == ("1.1", "parity", "aten.tanh")
    assert "largest error" in culprit.reason
    assert "computes something else on the target null" in report.diagnosis(report.sets[0])
    report.require_some(or_differing=True)  # a run judges it at its hop
    with pytest.raises(ModelError, match="computes something else"):
        report.require_some()


@pytest.mark.slow
def test_a_part_that_is_called_with_keywords_tuples_and_another_first_axis_can_be_tried() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(4, 4)
            self.bad = nets.Branch(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            steps = x.reshape(-1, 2, 4).transpose(0, 1)
            out, last = self.cell(steps, hx=torch.zeros(1, steps.shape[1], 4))
            return self.bad(x=torch.cat([out[-1], last[0]], 1))  # type: ignore[no-any-return]

    assert the_culprit(answer(Recurrent(), ROWS)).module == "bad"


@pytest.mark.slow
def test_a_part_inside_a_list_of_the_users_own_kind_is_named() -> None:
    class Heads(nn.ModuleList):
        """Holds layers, and is never called itself."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = Heads([nn.RReLU(), nn.Linear(8, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.heads
            return second(first(x).cumprod(1))  # type: ignore[no-any-return]

    culprit = the_culprit(answer(Held(), ROWS))
    assert culprit.module in ("", "heads.0")
    assert culprit.place.startswith("test_preflight.py:")


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (lambda: nn.Conv2d(4, 8, 3), lambda: nn.Conv2d(4, 16, 3), True),
        (lambda: nn.Conv2d(4, 4, 3), lambda: nn.Conv2d(4, 4, 3, groups=4), False),
        (lambda: nn.Conv2d(4, 4, 3), lambda: nn.Conv2d(4, 4, 3, groups=2), False),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), lambda: nn.Conv2d(4, 4, 3, groups=4), False),
        (lambda: nn.Conv2d(4, 4, 3, padding=2), lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2), False),
        (lambda: nn.Conv2d(4, 4, 3), lambda: nn.ConvTranspose2d(4, 4, 3), False),
        (lambda: nn.Upsample(scale_factor=2), lambda: nn.Upsample(scale_factor=2, mode="bilinear"), False),
        (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), False),
        (lambda: nn.AdaptiveAvgPool2d(4), lambda: nn.AdaptiveAvgPool2d(2), True),
        (lambda: nn.AdaptiveAvgPool2d(4), lambda: nn.AdaptiveAvgPool2d(3), False),
        (lambda: nn.Softmax(1), lambda: nn.Softmax(-1), False),
        (lambda: nn.LSTM(8, 4, batch_first=True), lambda: nn.LSTM(8, 6, batch_first=True), True),
        (lambda: nn.LSTM(8, 4, batch_first=True), lambda: nn.LSTM(8, 4, batch_first=True, bidirectional=True), False),
        (lambda: nn.LSTM(8, 4, batch_first=True), lambda: nn.LSTM(8, 4, batch_first=True, proj_size=2), False),
        (lambda: nn.LSTM(8, 4, batch_first=True), lambda: nn.GRU(8, 4, batch_first=True), False),
        (nets.Inside, lambda: nn.Linear(8, 8), False),
    ],
)
def test_a_set_is_told_by_what_decides_the_conversion_and_not_by_sizes(first: Callable[[], nn.Module], second: Callable[[], nn.Module], same: bool) -> None:
    from edgekd.operators.sets import OperatorWatch

    found = []
    for make in (first, second):
        module = make().eval()
        recurrent = isinstance(module, nn.RNNBase)
        flat = isinstance(module, (nn.Linear, nets.Inside))
        x = torch.ones(1, 8) if flat else torch.ones(1, 3, 8) if recurrent else torch.ones(1, 4, 8, 8)
        with torch.no_grad(), OperatorWatch(module) as watch:
            module(x)
        found.append(watch.found)
    assert (found[0] == found[1]) is same


def test_members_that_cannot_be_built_are_listed_and_nothing_is_converted_for_them() -> None:
    def make(width: int) -> nn.Module:
        raise ValueError("unlucky")

    report = answer(edgekd.Family(make, width=[4, 8]), IMAGES)
    assert (report.sets, report.conversions, report.passed) == ((), 0, False)
    assert set(report.unbuildable) == {"width=4", "width=8"}
    with pytest.raises(ModelError, match="unlucky"):
        report.require_some()


@pytest.mark.slow
def test_an_operator_without_a_kernel_behind_a_batch_norm_is_a_refusal() -> None:
    class Glowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            made = self.fc(self.norm(rows))
            return torch.onnx.ops.symbolic("example.glow::Glow", (made,), dtype=torch.float32, shape=made.shape, version=1)

    culprit = the_culprit(answer(Glowing(), ROWS))
    assert culprit.step == "support"
    assert "example.glow" in culprit.reason


def test_an_untrained_network_that_gives_nan_is_converted_but_not_compared() -> None:
    class Nan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(-torch.abs(x) - 1.0)

    (only,) = answer(Nan(), ROWS).sets
    assert only.passed
    assert "not compared" in only.note


def test_a_file_and_a_wrong_example_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edgekd bench"):
        answer("model.onnx", ROWS)
    with pytest.raises(ConfigError, match="example"):
        answer(nn.Linear(8, 4), None)
    with pytest.raises(DataError, match="no sample"):
        answer(nn.Linear(8, 4), np.zeros((0, 8), np.float32))
    np.save(tmp_path / "rows.npy", ROWS.astype(np.float64))
    assert answer(nn.Linear(8, 4), tmp_path / "rows.npy").passed


def test_the_report_is_stored_and_read_back(tmp_path: Path) -> None:
    culprit = Culprit(module="a.b", kind="own.Act", place="own.py:3", step="convert", operator="aten.x", reason="no")
    item = OperatorSet(key="k", operators=("aten.x",), modules=(), members=("width=4",), tried="width=4", culprit=culprit)
    report = PreflightReport(target="null", format="onnx", sets=(item,), conversions=3)
    report.save(tmp_path / "report.json")
    assert PreflightReport.load(tmp_path / "report.json") == report
    assert "no replacement is known" in report.refused()["width=4"]
