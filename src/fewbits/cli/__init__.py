"""The `fewbits` command. One file per subcommand.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a check failed, 2 bad usage or
input, 130 interrupted.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer

import fewbits
from fewbits.cli.common import FailedCheckError
from fewbits.cli.compare import compare
from fewbits.cli.demo import demo
from fewbits.cli.doctor import doctor
from fewbits.cli.finalize import finalize
from fewbits.cli.generate import generate
from fewbits.cli.inspect import inspect
from fewbits.cli.merge import merge
from fewbits.cli.plan import plan
from fewbits.cli.quantize import quantize
from fewbits.cli.verify import verify

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="fewbits",
    help="Language models in few bits.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what the user can mend into one line on stderr and exit code 2, a failed check into 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FailedCheckError as error:
            typer.echo(f"failed: {_one_line(error)}", err=True)
            raise typer.Exit(1) from error
        except (ValueError, OSError) as error:
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error

    return wrapped


def _one_line(error: Exception) -> str:
    """The message of an error, without what a terminal would take for more than text: names are foreign."""
    words = " ".join(str(error).split())
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in words)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fewbits {fewbits.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Language models in few bits."""


# In the order of use, which `fewbits --help` shows.
COMMANDS = (demo, plan, quantize, finalize, inspect, verify, compare, generate, merge, doctor)
for _command in COMMANDS:
    app.command()(plain_errors(_command))


def main() -> None:
    """Entry point of the `fewbits` script."""
    # As Ctrl-C: whatever was started is ended, whatever is temporary removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name="fewbits")
