"""Gate outputs are read back by the parsers that CI systems use, and never look greener than the gate."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from edgekd.errors import ConfigError, DeviceTimeout
from edgekd.gate_output import GateReport, OnRefuse, gate_json, junit_xml, markdown, one_line
from edgekd.records import Check, Outcome, Verdict


def check(name: str, outcome: Outcome, reason: str = "") -> Check:
    return Check(name=name, outcome=outcome, value=0.28, limit=0.3, unit="ms", lower=0.27, upper=0.29, confidence=0.99, n=20, reason=reason)


def report(outcome: Outcome, *checks: Check, on_refuse: OnRefuse = "fail", reason: str = "because", simulated: str = "") -> GateReport:
    verdict = Verdict(outcome=outcome, checks=checks, reason=reason, simulated=simulated)
    return GateReport("digits", verdict, conditions={"device": "a <cpu> | b"}, on_refuse=on_refuse)


def kinds(xml: bytes) -> dict[str, str]:
    root = ET.fromstring(xml)
    return {case.get("name", ""): next((node.tag for node in case if node.tag in ("failure", "error", "skipped")), "ok") for case in root.iter("testcase")}


@pytest.mark.parametrize(
    ("outcome", "on_refuse", "code", "tag"),
    [
        (Outcome.PASS, "fail", 0, "ok"),
        (Outcome.FAIL, "fail", 1, "failure"),
        (Outcome.FAIL, "neutral", 1, "failure"),
        (Outcome.REFUSE, "fail", 2, "failure"),
        (Outcome.REFUSE, "neutral", 0, "skipped"),
    ],
)
def test_outcome_gives_exit_code_and_junit_case(outcome: Outcome, on_refuse: OnRefuse, code: int, tag: str) -> None:
    made = report(outcome, check("latency p50", outcome), check("size", Outcome.PASS), on_refuse=on_refuse)
    assert made.exit_code == code
    assert kinds(junit_xml(made)) == {"latency p50": tag, "size": "ok"}


def test_junit_counts_agree_with_its_cases() -> None:
    root = ET.fromstring(junit_xml(report(Outcome.FAIL, check("a", Outcome.FAIL), check("b", Outcome.PASS), check("c", Outcome.REFUSE), on_refuse="neutral")))
    suite = root.find("testsuite")
    assert suite is not None
    for element in (root, suite):
        assert [element.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["3", "1", "0", "1"]
    assert {item.get("name"): item.get("value") for item in suite.iter("property")} == {"device": "a <cpu> | b"}


def test_junit_adds_a_case_when_the_verdict_is_worse_than_its_checks() -> None:
    made = report(Outcome.REFUSE, check("latency p50", Outcome.PASS), reason="another device", simulated="null")
    assert kinds(junit_xml(made)) == {"latency p50": "ok", "verdict": "failure"}


@pytest.mark.parametrize(("on_refuse", "tag", "code"), [("fail", "failure", 2), ("neutral", "skipped", 0)])
def test_junit_of_a_simulated_fail_agrees_with_the_gate_that_refuses(on_refuse: OnRefuse, tag: str, code: int) -> None:
    checks = (check("latency", Outcome.FAIL), check("size", Outcome.PASS), check("memory", Outcome.REFUSE))
    made = report(Outcome.REFUSE, *checks, on_refuse=on_refuse, reason="simulated (null); accepted it would be a fail", simulated="null")
    assert made.exit_code == code
    assert kinds(junit_xml(made)) == {"latency": tag, "size": "ok", "memory": tag}
    text = markdown(made)
    assert "REFUSE: simulated (null)." in text
    assert "--accept-simulated" in text


def test_junit_of_a_verdict_without_checks_still_has_a_case() -> None:
    assert kinds(junit_xml(report(Outcome.FAIL))) == {"verdict": "failure"}
    assert kinds(junit_xml(report(Outcome.PASS))) == {"verdict": "ok"}


def test_device_error_is_an_error_everywhere_and_exits_3() -> None:
    made = GateReport("digits", None, DeviceTimeout("the board did not answer", found="60 s", hint="check the cable"))
    assert made.exit_code == 3
    assert kinds(junit_xml(made)) == {"gate": "error"}
    body = json.loads(gate_json(made))
    assert (body["outcome"], body["exit_code"], body["error"]["next_step"], body["error"]["kind"]) == ("error", 3, "check the cable", "device or machine")
    assert "ERROR" in markdown(made)


def test_json_holds_the_verdict_record() -> None:
    made = report(Outcome.PASS, check("latency p50", Outcome.PASS))
    body = json.loads(gate_json(made))
    assert made.verdict is not None
    assert Verdict.from_json(json.dumps(body["verdict"])) == made.verdict
    assert (body["exit_code"], body["conditions"]) == (0, {"device": "a <cpu> | b"})


def test_control_characters_and_markup_stay_text_in_xml() -> None:
    made = report(Outcome.FAIL, check("a\x00</testcase><b>", Outcome.FAIL, reason="\x1b[31m"))
    names = [case.get("name") for case in ET.fromstring(junit_xml(made)).iter("testcase")]
    assert names == ["a\ufffd</testcase><b>"]


def test_markdown_table_rows_have_the_header_s_columns_when_names_hold_pipes() -> None:
    text = markdown(report(Outcome.FAIL, check("a|b\n<i>", Outcome.FAIL, reason="x | y")))
    table = [line for line in text.splitlines() if line.startswith("|")][:3]
    assert {line.replace("\\|", "").count("|") for line in table} == {8}
    assert "&lt;i&gt;" in text
    assert "<i>" not in text


def test_markdown_names_the_verdict_s_own_reason_where_every_check_passes() -> None:
    text = markdown(report(Outcome.REFUSE, check("latency", Outcome.PASS), reason="simulated (null); latency: ok", simulated="null"))
    assert "REFUSE: simulated (null)." in text
    assert "--accept-simulated" in text
    assert "does not decide" not in text
    other = markdown(report(Outcome.REFUSE, reason="other device than the bundle was validated on: cpu is A and was B"))
    assert "REFUSE: other device than the bundle was validated on: cpu is A and was B." in other
    assert "--accept-simulated" not in other
    undecided = markdown(report(Outcome.REFUSE, check("latency", Outcome.REFUSE), reason="latency: near"))
    assert "REFUSE: the evidence does not decide." in undecided


def test_one_line_is_one_line_and_carries_simulation_and_neutral_note() -> None:
    line = one_line(report(Outcome.REFUSE, on_refuse="neutral", reason="first\nsecond", simulated="null"))
    assert "\n" not in line
    assert "SIMULATED: null" in line
    assert "--on-refuse=neutral" in line


def test_report_needs_a_verdict_or_an_error_and_not_both() -> None:
    with pytest.raises(ConfigError):
        GateReport("x", None)
