"""The entry of the command line: commands found by name and imported late, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from edgekd import __version__
from edgekd.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_REFUSE, EdgekdError

_COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("edgekd.cli.device:bench", "Measure the latency of a model on a target."),
    "cache": ("edgekd.cli.store:cache", "List or remove what runs keep for later runs."),
    "compress": ("edgekd.cli.run:compress", "Make a student that meets a budget, from a job file or one ONNX file."),
    "convert": ("edgekd.cli.convert:convert", "Convert a model, and quantize it, by the best road; compared at every hop, no budget."),
    "demo": ("edgekd.cli.run:demo", "Run the whole pipeline on handwritten digits."),
    "doctor": ("edgekd.cli.device:doctor", "Say what is installed, what is missing and which targets can be opened."),
    "env": ("edgekd.cli.env:env", "Make, list or remove the environments that some converters run in."),
    "gate": ("edgekd.cli.gate:gate", "Judge a bundle again on the device, for CI."),
    "preflight": ("edgekd.cli.preflight:preflight", "Say which operators of students a target cannot run, before anything is trained."),
    "profile": ("edgekd.cli.device:profile", "Show target profiles and their fields."),
    "report": ("edgekd.cli.store:report", "Write a run's HTML report again and say where it is."),
    "runs": ("edgekd.cli.store:runs", "List the runs below a folder with their verdicts."),
    "targets": ("edgekd.cli.device:targets", "List the targets that profiles describe."),
    "validate": ("edgekd.cli.gate:validate", "Judge a bundle again on the device and print every check."),
}
"""Command to `module:attribute` and its line in `--help`."""


class EdgekdGroup(click.Group):
    """A group whose commands are imported when they are called, and which turns every end into the right exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            from edgekd.errors import near_names

            raise click.UsageError(f"there is no command {args[0]!r}; allowed: {near_names(args[0], _COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in sorted(_COMMANDS.items())])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and leave the process with its exit code, see `run`."""
        code = run(self, args, prog_name, complete_var, **extra)
        if standalone_mode:
            sys.exit(code)
        return code


def run(group: click.Group, args: Sequence[str] | None, prog_name: str | None, complete_var: str | None = None, **extra: Any) -> int:
    """The exit code of a command: what it gave (pass 0, fail 1, refuse 2), 3 for usage errors, device failures and uncaught
    exceptions, 130 for Ctrl-C."""
    try:
        given = click.Group.main(group, args, prog_name, complete_var, standalone_mode=False, **extra)
        sys.stdout.flush()
        return given if isinstance(given, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show(sys.stderr)
        return EXIT_ERROR
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; what was finished is kept, the same command continues", err=True)
        return EXIT_INTERRUPTED
    except EdgekdError as error:
        show_error(error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader is gone; the interpreter still flushes at its end
        return EXIT_ERROR
    except Exception:  # noqa: BLE001 - the process ends here: the traceback is shown, and Python's own exit code 1 would read as a fail verdict
        traceback.print_exc()
        return EXIT_ERROR


def show_error(error: EdgekdError) -> None:
    """Print an error on standard error: what is wrong, what was found, what is allowed, the next step, one line each.

    A device too disturbed to be measured is no error but a refuse, and is called so.
    """
    click.echo(f"{'REFUSE' if error.exit_code == EXIT_REFUSE else 'error'}: {error.what}", err=True)
    for name, value in (("found", error.found), ("allowed", error.allowed), ("next step", error.hint)):
        if value is not None:
            click.echo(f"  {name}: {value}", err=True)


@click.group(cls=EdgekdGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgekd")
def cli() -> None:
    """From a trained teacher to the most accurate student that meets a latency budget, measured on the device.

    Exit codes: 0 pass, 1 fail, 2 refuse (the evidence does not decide), 3 usage error, device failure or uncaught
    exception, 130 Ctrl-C.
    """


def main() -> None:
    """The console script `edgekd`."""
    cli.main(prog_name="edgekd")
