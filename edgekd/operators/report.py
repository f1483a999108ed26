"""What a preflight found, as it is stored and shown: every operator set with its members, and for a refused one the culprit."""

from __future__ import annotations

from edgekd.errors import ModelError
from edgekd.records import HopParity, Record
from edgekd.records.model import NonNegative


class Culprit(Record, tag="edgekd.culprit/1", frozen=True, kw_only=True):
    """The smallest part of the user's network that fails by itself.

    `module` is its path (empty: the network's own forward), `kind` its class, `place` the file and line of its forward or of the operator in it.
    `step` is where it fails: `convert`, `support` (the target refuses the file), `run`, or `parity` (the file computes something else).
    `operator` is what the converter or the target blames; where they tell nothing, the operators that no passing part has.
    """

    module: str
    kind: str
    place: str
    step: str
    operator: str
    reason: str
    replacement: str = ""


class OperatorSet(Record, tag="edgekd.operator_set/1", frozen=True, kw_only=True):
    """The students that are made of the same operators and modules; `tried` is the one that was converted, `culprit` is absent when it passed.

    `parity` is the comparison of `tried` with torch where that failed, at the hop that is to blame.
    """

    key: str
    operators: tuple[str, ...]
    modules: tuple[str, ...]
    members: tuple[str, ...]
    tried: str
    note: str = ""
    culprit: Culprit | None = None
    parity: HopParity | None = None

    @property
    def passed(self) -> bool:
        """Whether the target runs what the converter makes of these operators, with the same results."""
        return self.culprit is None


class PreflightReport(Record, tag="edgekd.preflight/1", frozen=True, kw_only=True):
    """The answer of one target. `unbuildable` holds the members that could not be built or run at all: label -> reason."""

    target: str
    format: str
    simulated: str = ""
    sets: tuple[OperatorSet, ...]
    conversions: NonNegative
    unbuildable: dict[str, str] = {}

    @property
    def passed(self) -> bool:
        """Whether every set passed, and every member could be built."""
        return not self.unbuildable and all(item.passed for item in self.sets)

    def refused(self) -> dict[str, str]:
        """The members that the target cannot run, each with the diagnosis of its set."""
        return {label: self.diagnosis(item) for item in self.sets if not item.passed for label in item.members}

    def diagnosis(self, item: OperatorSet) -> str:
        """One refused set in words: module, operator, target, reason and what to use instead."""
        bad = item.culprit
        assert bad is not None
        where = f"the module {bad.module!r}" if bad.module else "the network itself"
        verb = {
            "convert": f"cannot be converted to {self.format} for the target {self.target}",
            "support": f"is refused by the target {self.target}",
            "run": f"does not run on the target {self.target}",
            "parity": f"computes something else on the target {self.target}, at the hop {item.parity.hop if item.parity else self.format!r}",
        }[bad.step]
        at = f" ({bad.kind}{f', {bad.place}' if bad.place else ''})"
        operator = f"; operator: {bad.operator}" if bad.operator else ""
        instead = f"; use instead: {bad.replacement}" if bad.replacement else "; no replacement is known"
        reason = "; ".join((bad.reason, *(item.parity.findings if item.parity else ())))
        return f"{where}{at} {verb}{operator}; {reason}{instead}"

    def summary(self) -> str:
        """One line: sets found, passed and refused, and what they were tried by."""
        good = [item for item in self.sets if item.passed]
        members = sum(len(item.members) for item in good)
        left_out = sum(len(item.members) for item in self.sets) - members
        count = len(self.sets)
        text = f"{count} operator set{'' if count == 1 else 's'}, each tried by one real conversion: {len(good)} passed ({members} students)"
        notes = "".join(f"; {item.tried}: {item.note}" for item in self.sets if item.note)
        return text + f", {count - len(good)} refused ({left_out} students)" + notes

    @property
    def parity(self) -> tuple[HopParity, ...]:
        """The comparisons that failed."""
        return tuple(item.parity for item in self.sets if item.parity is not None)

    def counts(self) -> dict[str, float | int | str | bool]:
        """Sets found, passed and refused, the students that are left out, and conversions made, for the ledger."""
        passed = sum(item.passed for item in self.sets)
        return {
            "sets": len(self.sets),
            "passed": passed,
            "refused": len(self.sets) - passed,
            "students refused": len(self.refused()),
            "conversions": self.conversions,
        }

    def require_some(self, *, or_differing: bool = False) -> None:
        """Refuse where no student is left; with `or_differing` one is enough that runs on the target, but computes something else.

        Raises:
            ModelError: there is none; the message is the diagnosis, the subject the path of the first culprit.
        """
        if any(item.passed or (or_differing and item.parity is not None) for item in self.sets):
            return
        found = [self.diagnosis(item) for item in self.sets] or [f"{label}: {reason}" for label, reason in self.unbuildable.items()]
        culprit = next((item.culprit for item in self.sets if item.culprit is not None), None)
        raise ModelError(
            "no candidate of the space can be built and run on the target",
            found="; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""),
            hint=culprit.replacement if culprit is not None and culprit.replacement else "replace what is named, or choose another space or target",
            subject=None if culprit is None else culprit.module or culprit.kind,
        )
