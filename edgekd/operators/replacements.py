"""What to use instead of an operator that a converter or a runtime is known to refuse; every row is proven by a conversion in the tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Replacement(NamedTuple):
    """One piece of advice: for what (`operators` by name without overload, `kinds` of modules by the start of their name with all `settings`), in
    which formats it is needed, and what to write instead."""

    name: str
    formats: tuple[str, ...]
    advice: str
    operators: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


REPLACEMENTS: tuple[Replacement, ...] = ()
"""In order: the first row that fits is taken."""


def replacement_for(operators: Iterable[str], kind: str, format: str) -> str:
    """The advice for a part of the kind `kind` with these operators, or an empty text.

    Operators are given in any spelling: `aten.sort`, `aten::sort`, `aten.sort.default`.
    """
    names = {_plain(operator) for operator in operators if operator}
    name, _, told = kind.partition("(")
    settings = {setting.partition("=")[0].strip() for setting in told.rstrip(")").split(",")}
    for row in REPLACEMENTS:
        if format not in row.formats:
            continue
        if name in row.kinds and set(row.settings) <= settings:
            return row.advice
        if names & {_plain(operator) for operator in row.operators}:
            return row.advice
    return ""


def _plain(operator: str) -> str:
    """The operator's own name: `sort` of `aten::sort`, `torch.ops.aten._sort` and `aten.sort_.default`."""
    parts = operator.replace("::", ".").split(".")
    return (parts[parts.index("aten") + 1] if "aten" in parts[:-1] else parts[0]).strip("_")
