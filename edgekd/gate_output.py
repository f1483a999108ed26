"""What a gate hands to the machine around it: JUnit XML, JSON, a Markdown summary, and one line of reason."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgekd.errors import EXIT_FAIL, EXIT_PASS, EXIT_REFUSE, ConfigError, EdgekdError, InputError
from edgekd.records import Check, Outcome, Verdict
from edgekd.report.words import check_text, interval_text, next_step, outcome_text, unit_text, verdict_text

OnRefuse = Literal["fail", "neutral"]

_EXIT = {Outcome.PASS: EXIT_PASS, Outcome.FAIL: EXIT_FAIL, Outcome.REFUSE: EXIT_REFUSE}
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class GateReport:
    """What the outputs are made from: a verdict, or the error that came instead of one.

    `conditions` are shown as they are, for example `{"device": "AMD EPYC", "artifact": "sha256 3f2a..."}`.
    """

    name: str
    verdict: Verdict | None
    error: EdgekdError | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    on_refuse: OnRefuse = "fail"

    def __post_init__(self) -> None:
        if (self.verdict is None) == (self.error is None):
            raise ConfigError("a gate's output is about a verdict or about an error", found=f"verdict={self.verdict}, error={self.error}")

    @property
    def outcome(self) -> str:
        """`pass`, `fail`, `refuse` or `error`."""
        return self.verdict.outcome.value if self.verdict is not None else "error"

    @property
    def exit_code(self) -> int:
        """The exit code of the gate: pass 0, fail 1, refuse 2 (0 when refusals are neutral), error as the error says."""
        if self.error is not None:
            return self.error.exit_code
        return gate_exit_code(self.verdict.outcome, self.on_refuse) if self.verdict is not None else EXIT_REFUSE


def gate_exit_code(outcome: Outcome, on_refuse: OnRefuse = "fail") -> int:
    """The exit code of an outcome. Only a fail gives 1; a refuse gives 2, or 0 when `on_refuse` is `neutral`."""
    return EXIT_PASS if outcome is Outcome.REFUSE and on_refuse == "neutral" else _EXIT[outcome]


def one_line(report: GateReport) -> str:
    """The outcome and its reason in one line, with a plain note when a refusal was let through."""
    if report.verdict is None:
        return "ERROR: " + " ".join(str(report.error).split())
    line = verdict_text(report.verdict)
    if report.verdict.outcome is Outcome.REFUSE and report.on_refuse == "neutral":
        line += " (not proven; let through by --on-refuse=neutral)"
    return line


def junit_xml(report: GateReport) -> bytes:
    """JUnit XML with one test case per check.

    A failed check is a `failure`, or refused where the verdict is (simulated numbers). A refused one is `skipped` when refusals are
    neutral, else a `failure` of type `refuse`.
    An error is one test case with an `error`. A verdict that is worse than each of its checks (a simulated target, another
    device) adds the case `verdict`, so that the suite is never greener than the gate.
    """
    suite = ET.Element("testsuite", name=_clean(f"edgekd gate {report.name}"))
    properties = ET.SubElement(suite, "properties")
    for key, value in report.conditions.items():
        ET.SubElement(properties, "property", name=_clean(key), value=_clean(value))
    if report.verdict is None:
        case = _case(suite, report, "gate")
        node = ET.SubElement(case, "error", type=type(report.error).__name__, message=_clean(one_line(report)))
        node.text = _clean(str(report.error))
    else:
        for check in report.verdict.checks:
            case = _case(suite, report, check.name)
            _outcome_node(case, _as_judged(check, report.verdict), check_text(check), report.on_refuse)
            ET.SubElement(case, "system-out").text = _clean(_evidence(check))
        if report.verdict.outcome is not Outcome.PASS and report.verdict.outcome not in {_as_judged(check, report.verdict) for check in report.verdict.checks}:
            _outcome_node(_case(suite, report, "verdict"), report.verdict.outcome, verdict_text(report.verdict), report.on_refuse)
        elif not report.verdict.checks:
            _case(suite, report, "verdict")
    root = ET.Element("testsuites", name="edgekd gate")
    for key, path in (("tests", "testcase"), ("failures", "testcase/failure"), ("errors", "testcase/error"), ("skipped", "testcase/skipped")):
        for element in (root, suite):
            element.set(key, str(len(suite.findall(path))))
    root.append(suite)
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _case(suite: ET.Element, report: GateReport, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=_clean(f"edgekd.gate.{report.name}"), name=_clean(name))


def _as_judged(check: Check, verdict: Verdict) -> Outcome:
    """A check's outcome; one that failed in a verdict that is no fail (simulated numbers) is a refuse, so that the suite agrees with the gate."""
    return verdict.outcome if check.outcome is Outcome.FAIL else check.outcome


def _outcome_node(case: ET.Element, outcome: Outcome, message: str, on_refuse: OnRefuse) -> None:
    if outcome is Outcome.PASS:
        return
    if outcome is Outcome.REFUSE and on_refuse == "neutral":
        ET.SubElement(case, "skipped", message=_clean(message))
        return
    node = ET.SubElement(case, "failure", type=outcome.value, message=_clean(message))
    node.text = _clean(message)


def _evidence(check: Check) -> str:
    return f"value {unit_text(check.value, check.unit)}, limit {unit_text(check.limit, check.unit)}, interval {interval_text(check)}, n = {check.n}"


def _clean(text: str) -> str:
    """The text without the characters that XML 1.0 forbids; each becomes U+FFFD."""
    return _NOT_XML.sub("\ufffd", text)


def gate_json(report: GateReport) -> bytes:
    """One JSON object: `outcome`, `exit_code`, `reason`, `verdict` (the record) or `error`, and `conditions`."""
    body = {
        "name": report.name,
        "outcome": report.outcome,
        "exit_code": report.exit_code,
        "on_refuse": report.on_refuse,
        "reason": one_line(report),
        "verdict": None if report.verdict is None else report.verdict.to_builtins(),
        "error": None if report.error is None else error_fields(report.error),
        "conditions": dict(report.conditions),
    }
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def error_fields(error: EdgekdError) -> dict[str, str | None]:
    """An error as texts: its class, kind (`input`, `device`), what, found, allowed and the next step."""
    return {
        "class": type(error).__name__,
        "kind": "input" if isinstance(error, InputError) else "device or machine",
        "what": error.what,
        "found": None if error.found is None else str(error.found),
        "allowed": None if error.allowed is None else str(error.allowed),
        "next_step": error.hint,
    }


def markdown(report: GateReport) -> str:
    """A summary for a pull request or a job page: the outcome as a heading, the checks and the conditions as tables."""
    lines = [f"### edgekd gate: {_cell(report.name)}: {report.outcome.upper()}", "", _cell(one_line(report)), ""]
    if report.verdict is not None:
        lines += [f"{_cell(outcome_text(report.verdict))}.", ""]
        if step := next_step(report.verdict):
            lines += [f"Next step: {_cell(step)}.", ""]
        if report.verdict.checks:
            lines += ["| check | outcome | value | limit | interval | n | note |", "|---|---|---|---|---|---|---|"]
            for check in report.verdict.checks:
                cells = (
                    check.name,
                    check.outcome.value,
                    unit_text(check.value, check.unit),
                    unit_text(check.limit, check.unit),
                    interval_text(check),
                    str(check.n),
                    check.reason or "-",
                )
                lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
            lines.append("")
    if report.conditions:
        lines += ["| condition | value |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in report.conditions.items()]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that stays inside a table cell and is not markup: one line, with HTML and Markdown signs escaped."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
