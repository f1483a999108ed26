"""What the commands share: options, tables, progress, and how results are printed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from edgekd.records import Ledger, Verdict

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
_PIPE_WIDTH = 200


def set_option(function: F) -> F:
    """The repeatable option `--set NAME=VALUE`."""
    return click.option(
        "--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Override a field of the profile or job, for example runtime.threads=1. Repeatable."
    )(function)


def target_option(default: str | None = "local") -> Callable[[F], F]:
    """The option `--target NAME`."""
    return click.option("--target", default=default, show_default=default is not None, help="A profile by name, or the path of its file.")


def json_option(function: F) -> F:
    """The flag `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there.")(function)


def console(*, err: bool = False) -> Console:
    """A console that prints text as it is: no markup from names; where nobody looks, lines as wide as COLUMNS says, else wide ones."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else shutil.get_terminal_size((_PIPE_WIDTH, 24)).columns
    return Console(stderr=err, markup=False, highlight=False, emoji=False, soft_wrap=False, width=width)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = ()) -> None:
    """A table on standard output, its title on a line of its own, without blanks at the ends of lines."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if index in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out = console()
    out.print(Text(title, style="bold"))
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as drawn:
        out.print(table)
    click.echo("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    click.echo(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


def say(text: str) -> None:
    """A line on standard error, for progress."""
    click.echo(text, err=True)


def launch_progress(label: str, done: int, total: int) -> None:
    """Progress of a measurement as a line on standard error: rewritten in a terminal, every tenth launch elsewhere."""
    if sys.stderr.isatty():
        click.echo(f"\r{label}: {done} of {total} launches", err=True, nl=done >= total)
    elif done >= total or done % 10 == 0:
        say(f"{label}: {done} of {total} launches")


def print_verdict(verdict: Verdict) -> None:
    """The checks as a table, then the verdict in one line, then what to do where something can be done."""
    from edgekd.report.words import interval_text, next_step, unit_text, verdict_text

    if verdict.checks:
        print_table(
            "Checks",
            ("check", "outcome", "value", "limit", "interval (confidence)", "n", "note"),
            (
                (
                    check.name,
                    check.outcome.value,
                    unit_text(check.value, check.unit),
                    unit_text(check.limit, check.unit),
                    interval_text(check),
                    str(check.n),
                    check.reason or "-",
                )
                for check in verdict.checks
            ),
            numeric=(2, 3, 4, 5),
        )
    click.echo(verdict_text(verdict))
    if step := next_step(verdict):
        click.echo(f"next step: {step}")


def print_ledger(ledger: Ledger) -> None:
    """Every step: decision, then before and after, and why."""
    from edgekd.report.words import change_cells

    kinds = {row.simulated for row in ledger.rows}
    everywhere = kinds.pop() if len(kinds) == 1 else ""
    rows = []
    for row in ledger.rows:
        step = row.step if row.simulated == everywhere else f"{row.step} [simulated: {row.simulated or 'no'}]"
        latency, score, size, precision = change_cells(row)
        changes = [latency, *([f"score {score}"] if score != "-" else []), size, precision]
        change = ", ".join(cell for cell in changes if cell != "-")
        rows.append((row.stage, step, row.decision, ": ".join(part for part in (change, row.reason) if part)))
    title = "Ledger (before → after)" + (f", SIMULATED: {everywhere}" if everywhere else "")
    print_table(title, ("stage", "step", "decision", "what and why"), rows)


def require(module: str, extra: str, purpose: str) -> None:
    """Refuse to start a command whose package is missing.

    Raises:
        MissingDependency: the module is not installed; names the line that installs it.
    """
    import importlib.util

    from edgekd.errors import MissingDependency

    if importlib.util.find_spec(module) is None:
        raise MissingDependency(module, extra, purpose=purpose)


def given_object(text: str) -> Any:
    """The object called `module:name` in the current folder or an installed package; of a function without arguments, or a class, what it gives.

    Raises:
        ConfigError: there is none of this name, or its code raises.
    """
    import inspect

    from edgekd.settings.named import first_on_path, made_by, named_object

    here = Path.cwd()
    with first_on_path(here):
        found = named_object(text, here)
        return made_by(found, text) if inspect.isroutine(found) or inspect.isclass(found) else found
