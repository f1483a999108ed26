"""Numbers and outcomes in words, the same in the terminal, the report and the gate's outputs."""

from __future__ import annotations

from edgekd.records import Budget, Check, LedgerRow, Manifest, Outcome, Score, StudentSpec, TensorParity, Verdict

OUTCOME_WORDS = {
    Outcome.PASS: "PASS: every budget is met",
    Outcome.FAIL: "FAIL: a budget is missed",
    Outcome.REFUSE: "REFUSE: the evidence does not decide",
}


def _decided(verdict: Verdict) -> bool:
    """Whether the checks by themselves come to a pass or a fail."""
    outcomes = {check.outcome for check in verdict.checks}
    return Outcome.FAIL in outcomes or Outcome.REFUSE not in outcomes


def outcome_text(verdict: Verdict) -> str:
    """The outcome in words. A refuse that no check asked for (simulated numbers, another device) names its own reason."""
    own = verdict.outcome is Outcome.REFUSE and verdict.reason and _decided(verdict)
    return f"REFUSE: {' '.join(verdict.reason.split()).split('; ')[0]}" if own else OUTCOME_WORDS[verdict.outcome]


def next_step(verdict: Verdict) -> str:
    """What turns a refuse that is only about simulated numbers into a verdict; empty for every other verdict."""
    if verdict.outcome is not Outcome.REFUSE or not verdict.simulated or verdict.accepted_simulated or not (verdict.checks and _decided(verdict)):
        return ""
    return "take a real target, or accept the simulation: --accept-simulated (in a job: options.accept_simulated = true)"


def artifact_name(student: StudentSpec | None) -> str:
    """What an artifact was made from: the student's choices, the given file, or the teacher where there is no student."""
    if student is None:
        return "the teacher in int8, no student used"
    return "the given ONNX file" if student.kind == "fixed-onnx" else student.label()


def artifact_words(manifest: Manifest) -> dict[str, str]:
    """What a bundle holds, part by part: what it is, its precision, latency, size and score."""
    latency = next((check for check in manifest.verdict.checks if check.name == "latency"), None)
    words = {"artifact": artifact_name(manifest.student), "precision": manifest.artifact.precision.value}
    if latency is not None and latency.value is not None:
        mark = f", simulated ({manifest.verdict.simulated})" if manifest.verdict.simulated else ""
        words["latency"] = f"{percentile_text(manifest.budget.percentile)} {ms_text(latency.value)}{mark}"
    words["size"] = size_text(manifest.artifact.size_bytes)
    teacher = manifest.teacher.get("accuracy")
    if manifest.accuracy is not None:
        against = f" (teacher {teacher:.4f})" if isinstance(teacher, (int, float)) else ""
        words["score"] = f"{manifest.metric or 'score'} {manifest.accuracy:.4f}{against} on the test split"
    return words


def tolerance_text(tensor: TensorParity) -> str:
    """A parity tolerance with what it is relative to; the bare number where the record does not tell its kind."""
    if tensor.tolerance_kind == "sqnr":
        return f"signal to error at least {tensor.tolerance:.1f} dB"
    if tensor.tolerance_kind == "relative":
        return f"error at most {tensor.tolerance:.1e} of the largest value"
    return f"{tensor.tolerance:.3g}"


def ms_text(value: float | None) -> str:
    """A latency with its unit, four decimals below 1 ms and four figures above: `0.3125 ms`, `12.41 ms`."""
    if value is None:
        return "not measured"
    size = abs(value)
    return f"{value:.{4 if size < 1 else 3 if size < 10 else 2 if size < 100 else 1}f} ms"


def size_text(size_bytes: float | None) -> str:
    """A size with its unit, in powers of ten: `812 B`, `14.2 kB`, `3.10 MB`."""
    if size_bytes is None:
        return "unknown"
    if size_bytes < 1000:
        return f"{size_bytes:.0f} B"
    return f"{size_bytes / 1e3:.1f} kB" if size_bytes < 1e6 else f"{size_bytes / 1e6:.2f} MB"


def unit_text(value: float | None, unit: str) -> str:
    """A value in a unit as checks use them: milliseconds and sizes get their own form, the rest four decimals."""
    if value is None:
        return "-"
    if unit == "ms":
        return ms_text(value)
    return f"{value:.4f} {unit}".rstrip() if abs(value) < 1000 else f"{value:,.0f} {unit}".rstrip()


def interval_text(check: Check) -> str:
    """The confidence interval of a check with its level, one-sided ones as such; `-` without one."""
    if check.lower is None and check.upper is None:
        return "-"
    level = f" ({check.confidence:.0%})" if check.confidence is not None else ""
    if check.lower is None:
        return f"at most {unit_text(check.upper, check.unit)}{level}"
    if check.upper is None:
        return f"at least {unit_text(check.lower, check.unit)}{level}"
    return f"{unit_text(check.lower, check.unit)} to {unit_text(check.upper, check.unit)}{level}"


def check_text(check: Check) -> str:
    """A check in one line: `latency p50: 0.2810 ms against 0.3000 ms, pass`."""
    line = f"{check.name}: {unit_text(check.value, check.unit)} against {unit_text(check.limit, check.unit)}, {check.outcome.value}"
    return f"{line} ({check.reason})" if check.reason else line


def verdict_text(verdict: Verdict) -> str:
    """The verdict in one line, its reason and any simulation included; never more than one line."""
    mark = f" [SIMULATED: {verdict.simulated}{', accepted' if verdict.accepted_simulated else ''}]" if verdict.simulated else ""
    reason = " ".join(verdict.reason.split())
    return f"{verdict.outcome.value.upper()}{mark}: {reason}" if reason else f"{verdict.outcome.value.upper()}{mark}"


def percentile_text(percentile: float) -> str:
    """`p50`, `p99.9`."""
    return f"p{percentile:g}"


def budget_text(budget: Budget, limit_ms: float | None = None) -> str:
    """A budget in one line, units included; `limit_ms` is what a share came to."""
    where = f"{percentile_text(budget.percentile)}, {budget.clock.value.replace('_', ' ')}"
    if budget.latency_ms is not None:
        parts = [f"latency at most {ms_text(budget.latency_ms)} ({where})"]
    else:
        came_to = f", {ms_text(limit_ms)}" if limit_ms is not None else ""
        parts = [f"latency at most {budget.latency_share:g} of the teacher's{came_to} ({where})"]
    for name, words, unit in (
        ("max_drop", "drop at most", ""),
        ("accuracy_floor", "score at least", ""),
        ("size_mb", "size at most", " MB"),
        ("memory_mb", "peak memory at most", " MB"),
        ("first_inference_ms", "first inference at most", " ms"),
        ("init_ms", "initialization at most", " ms"),
    ):
        value = getattr(budget, name)
        if value is not None:
            parts.append(f"{words} {value:g}{unit}")
    return "; ".join(parts)


def score_cells(score: Score | None) -> tuple[str, str, str, str]:
    """Latency with its half width, score, size and precision of a ledger row's side; `-` for what is absent."""
    if score is None:
        return "-", "-", "-", "-"
    latency = "-" if score.latency_ms is None else ms_text(score.latency_ms)
    if score.latency_ms is not None and score.latency_error_ms is not None:
        latency = f"{latency.removesuffix(' ms')} ± {ms_text(score.latency_error_ms)}"
    return (
        latency,
        "-" if score.accuracy is None else f"{score.accuracy:.4f}",
        "-" if score.size_bytes is None else size_text(score.size_bytes),
        score.precision or "-",
    )


def change_cells(row: LedgerRow) -> tuple[str, str, str, str]:
    """Before and after of a ledger row, per column: `1.20 ms → 0.61 ms`; one value where both sides agree or one is absent."""
    before, after = score_cells(row.before), score_cells(row.after)
    cells = []
    for old, new in zip(before, after, strict=True):
        if old == new or old == "-":
            cells.append(new)
        elif new == "-":
            cells.append(old)
        else:
            cells.append(f"{old} → {new}")
    return cells[0], cells[1], cells[2], cells[3]
