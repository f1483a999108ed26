"""Commands about the environments that some converters run in: create, list, remove."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekd.cli.common import FOLDER, json_option, print_json, print_table, say

if TYPE_CHECKING:
    from edgekd.conversion.environments import EnvironmentState

_PATH = click.option("--path", type=FOLDER, help="The folder that holds the environments. Default: edgekd/environments in the user's cache folder.")


@click.group()
def env() -> None:
    """Make, list or remove the environments that some converters run in."""


@env.command("create")
@click.argument("name")
@_PATH
@click.option("--python", help="The Python to make it with: a command or a path. Default: the one at hand if it fits, else the newest that does.")
@click.option("--again", is_flag=True, help="Make it anew even if it is ready.")
@json_option
def env_create(name: str, path: Path | None, python: str | None, again: bool, as_json: bool) -> int:
    """Make the environment NAME from its pinned, hashed list of packages. Downloads them from the package index that pip uses."""
    from edgekd.conversion.environments import create_environment, spec_of
    from edgekd.report.words import size_text

    state = create_environment(spec_of(name), path, python=python, again=again, say=say)
    if as_json:
        print_json(state.to_builtins())
    else:
        click.echo(
            f"{name} is ready: {state.folder}, Python {state.python}, {size_text(state.size_bytes)}, made in {state.seconds:.1f} s on {state.created_at}"
        )
    return 0


@env.command("list")
@_PATH
@json_option
def env_list(path: Path | None, as_json: bool) -> int:
    """List the environments: what each is for, whether it is ready, and the line that makes it."""
    from edgekd.conversion.environments import list_environments

    states = list_environments(path)
    if as_json:
        print_json([state.to_builtins() for state in states])
        return 0
    print_environments(states)
    return 0


@env.command("remove")
@click.argument("name")
@_PATH
def env_remove(name: str, path: Path | None) -> int:
    """Remove the environment NAME and everything in it."""
    from edgekd.conversion.environments import environments_folder, remove_environment, spec_of
    from edgekd.report.words import size_text

    spec = spec_of(name)
    was_there = (environments_folder(path) / name).exists()
    size = remove_environment(spec, path)
    click.echo(f"removed {name} ({size_text(size)})" if was_there else f"{name} is not there")
    return 0


def print_environments(states: Iterable[EnvironmentState]) -> None:
    """A table of environments, then the lines that make those that are not ready."""
    from edgekd.report.words import size_text

    rows = tuple(states)
    print_table(
        "Environments of converters",
        ("environment", "state", "Python", "size", "made in", "folder", "for"),
        [
            (
                row.name,
                row.state if not row.problem or row.state == "absent" else f"{row.state}: {row.problem}",
                row.python or f"needs {row.pythons}",
                size_text(row.size_bytes) if row.size_bytes else f"about {row.expected_mb} MB",
                f"{row.seconds:.1f} s" if row.seconds else "-",
                row.folder,
                row.purpose,
            )
            for row in rows
        ],
        numeric=(3, 4),
    )
    for row in rows:
        if row.remedy:
            click.echo(f"environment {row.name} is {row.state}; make it with: {row.remedy}")
