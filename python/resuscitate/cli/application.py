"""The application: errors in plain words, how reports are written and results are shown."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import ResuscitateError
from ..version import __version__
from .flags import opt

if TYPE_CHECKING:
    from rich.console import RenderableType


def _say(error: Exception) -> None:
    """Write an error on one line of standard error."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    typer.echo(f"Error: {' '.join(message.split())}", err=True)


class _PlainErrors(TyperGroup):
    """Turns the errors that a user can cause into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ResuscitateError, OSError, TypeError, ValueError) as error:
            _say(error)
            # a value that the library refuses is a mistake in the command, all else one in the files
            raise typer.Exit(1 if isinstance(error, ResuscitateError | OSError) else 2) from error


app = typer.Typer(
    name="resuscitate",
    cls=_PlainErrors,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Repair a collapsed pruned network from a few unlabelled images.",
)


def main(words: list[str] | None = None) -> None:
    """Run the command line, with the methods that it names by package.module:Class."""
    from .method_options import load_methods

    words = sys.argv[1:] if words is None else words
    try:
        load_methods(words)
    except ResuscitateError as error:
        _say(error)
        raise SystemExit(1) from error
    app(words, prog_name="resuscitate")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"resuscitate {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[bool, opt("Log what is done, on standard error.", "--verbose", "-v")] = False,
    show: Annotated[bool, opt("Show the version.", "--version", callback=_version, is_eager=True)] = False,
) -> None:
    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("resuscitate").setLevel(logging.INFO)


def write_report(stack: ExitStack, path: Path | None, report: Any, document: Mapping[str, Any]) -> None:
    """Write a report when the stack closes without an error: as CSV its rows, as JSON the document."""
    if path is None:
        return
    from ..utils.files import atomic

    if path.suffix == ".csv":
        report.save(path)
    else:
        stack.enter_context(atomic(path)).write_text(json.dumps(document, indent=2) + "\n")


def options_of(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a command, ready for JSON, less those that say only where its results go."""
    return {
        name: str(value) if isinstance(value, Path) else value or None if isinstance(value, list) else value
        for name, value in given.items()
        if name not in ("output", "report", "json_", "timeout", "chosen")
    }


def show(*parts: RenderableType) -> None:
    """Print to standard output, at a width that cuts nothing off where that is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, highlight=False)
    for part in parts:
        console.print(part, markup=not isinstance(part, str), soft_wrap=isinstance(part, str))
