"""Commands about what lies on disk: report, runs, cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from edgekd.caches import CACHE_NAME, CacheEntry, cache_entries, remove_entries
from edgekd.cli.common import FOLDER, json_option, print_json, print_table


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--open/--no-open", "open_it", default=False, show_default=True, help="Show it in the web browser.")
def report(run: Path, open_it: bool) -> int:
    """Write the HTML report of RUN again from its record, and print its path. A bundle's own report is printed as it is.

    For a folder with runs on several targets, the report of all of them.
    """
    from edgekd.errors import InputError

    if (run / "fleet.json").is_file():
        from edgekd.fleet import report_fleet

        report_fleet(run)
    elif (run / "report.json").is_file():
        from edgekd.report.data import ReportData
        from edgekd.report.render import write_report

        write_report(ReportData.load(run / "report.json"), run / "report.html")
    elif not (run / "report.html").is_file():
        raise InputError("there is no report in this folder", found=str(run), hint="`edgekd runs` lists runs; an unfinished one has no report yet", subject=run)
    click.echo(str(run / "report.html"))
    if open_it:
        click.launch((run / "report.html").resolve().as_uri())
    return 0


def find_below(folder: Path, name: str) -> Iterator[Path]:
    """Files and folders called `name` below `folder`, sorted; hidden folders (other than `name`) and links are not entered."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name == name:
            yield path
        elif path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from find_below(path, name)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True), default=Path("."))
@json_option
def runs(folder: Path, as_json: bool) -> int:
    """List the runs below FOLDER (default: here) with their verdicts; unfinished ones say where they stand."""
    import json

    from edgekd.result import RunSummary

    found: list[dict[str, str]] = []
    for journal in find_below(folder, "events.jsonl"):
        run = journal.parent
        if (run / "run.json").is_file():
            summary = RunSummary.load(run / "run.json")
            outcome = summary.verdict.outcome.value + (f" (simulated: {summary.verdict.simulated})" if summary.verdict.simulated else "")
            bundle = str(run / summary.bundle) if summary.bundle else "none"
            found.append(
                {"run": str(run), "date": summary.created_at, "verdict": outcome, "target": summary.target, "student": summary.student, "bundle": bundle}
            )
        else:
            lines = journal.read_text(encoding="utf-8").splitlines()
            last = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {}
            state = f"unfinished: {last.get('stage', 'not started')} {last.get('kind', '')}".rstrip()
            found.append({"run": str(run), "date": "-", "verdict": state, "target": "-", "student": "-", "bundle": "none"})
    if as_json:
        print_json(found)
    elif not found:
        click.echo(f"no runs below {folder}")
    else:
        print_table("Runs", tuple(found[0]), [tuple(row.values()) for row in found])
    return 0


def _caches(folder: Path) -> list[Path]:
    return [folder] if folder.name == CACHE_NAME else [path for path in find_below(folder, CACHE_NAME) if path.is_dir()]


@click.group()
def cache() -> None:
    """List or remove what runs keep for later runs: teacher outputs, screening measurements."""


_WHERE = click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True), default=Path("."))


@cache.command("ls")
@_WHERE
@click.option("--all", "every", is_flag=True, help="List every entry instead of one line per cache and kind.")
@json_option
def cache_ls(folder: Path, every: bool, as_json: bool) -> int:
    """List the caches (.edgekd-cache) below FOLDER (default: here) with their sizes."""
    from edgekd.report.words import size_text

    entries = [entry for place in _caches(folder) for entry in cache_entries(place)]
    if as_json:
        print_json([{"path": str(entry.path), "kind": entry.kind, "size_bytes": entry.size_bytes, "age_days": round(entry.age_days, 3)} for entry in entries])
        return 0
    if not entries:
        click.echo(f"no cache below {folder}")
        return 0
    groups: dict[Path, list[CacheEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.path if every else entry.path.parent, []).append(entry)
    rows = [
        (group[0].kind, str(path), str(len(group)), size_text(sum(entry.size_bytes for entry in group)), f"{min(entry.age_days for entry in group):.1f} days")
        for path, group in groups.items()
    ]
    print_table("Cache", ("kind", "path", "entries", "size", "last written"), rows, numeric=(2, 3, 4))
    click.echo(f"{len(entries)} entries, {size_text(sum(entry.size_bytes for entry in entries))}")
    return 0


@cache.command("rm")
@_WHERE
@click.option("--older-than", type=click.FloatRange(min=0), default=0.0, metavar="DAYS", help="Only entries untouched for this many days. Default: all.")
@click.option("--kind", help="Only entries of this kind, as `cache ls` names it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def cache_rm(folder: Path, older_than: float, kind: str | None, yes: bool) -> int:
    """Remove entries of the caches below FOLDER. Runs and bundles stay; a later run computes what it needs again."""
    from edgekd.report.words import size_text

    entries = [entry for place in _caches(folder) for entry in cache_entries(place) if entry.age_days >= older_than and kind in (None, entry.kind)]
    size = size_text(sum(entry.size_bytes for entry in entries))
    if not entries:
        click.echo("nothing to remove")
        return 0
    if not yes:
        click.confirm(f"remove {len(entries)} entries ({size})?", abort=True)
    remove_entries(entries)
    click.echo(f"removed {len(entries)} entries ({size})")
    return 0
