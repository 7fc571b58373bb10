"""The application: errors as one line, how files are written and results are shown."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn
from typer.core import TyperGroup

from ..deploy.checkpoints import provenance, write_state_dict
from ..errors import ResuscitateError
from ..network.masks import Masks
from ..reports.base import console_width
from ..runtime.options import DEFAULTS
from ..utils.files import atomic
from ..version import __version__
from .flags import Options, opt
from .inputs import Images
from .keywords import as_flags, warnings_with_flags
from .method_options import load_methods
from .summary import size_of, summarise


def _say(error: Exception, keywords: Collection[str] = ()) -> int:
    """Write an error on one line of standard error, with these keywords as flags; the exit code."""
    message = as_flags(str(error), keywords)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    # a value that the library refuses is a mistake in the command, all else one in the files
    return 1 if isinstance(error, ResuscitateError | OSError) else 2


class _PlainErrors(TyperGroup):
    """Turns the errors that a user can cause into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        resumes = any(word.startswith("--resume") for word in ctx.args)
        keywords = {str(option.name) for command in self.commands.values() for option in command.params}
        try:
            with warnings_with_flags(keywords):
                return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            typer.echo("Interrupted" + (": the same command goes on from its journal" if resumes else ""), err=True)
            raise typer.Exit(130) from None
        except (ResuscitateError, OSError, TypeError, ValueError) as error:
            raise typer.Exit(_say(error, keywords)) from error


app = typer.Typer(
    name="resuscitate",
    cls=_PlainErrors,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Repair a collapsed pruned network from a few unlabelled images.",
)


def main() -> None:
    """Run the command line, with the methods that it names by package.module:Class."""
    try:
        load_methods(sys.argv[1:])
    except ResuscitateError as error:
        raise SystemExit(_say(error)) from error
    app(prog_name="resuscitate")


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


def options_of(found: Mapping[str, Any]) -> Options:
    """The options of a command by name.

    found: its `locals()`, before it assigns a variable. The empty list of a repeatable option that is not given is
    None.
    """
    options = {**found, **found["given"]}
    _check_written(options)
    return {name: None if value == [] else value for name, value in options.items() if name != "given"}


def _check_written(options: Options) -> None:
    """Refuse to write over a file that the command reads, but for the pruned weights, which their repair replaces."""
    files = {name: Path(value).resolve() for name, value in options.items() if isinstance(value, str | Path)}
    # the commands that take pruned weights read --masks, the others write them
    written = {"output", "report", "write_masks" if "pruned" in options else "masks"}
    for name, other in product(files.keys() & written, files):
        if files[name] == files[other] and name != other and {name, other} != {"output", "pruned"}:
            both = " and ".join(f"--{each.replace('_', '-')}" for each in (other, name))
            raise typer.BadParameter(f"{both} name one file, {options[name]}, which would be overwritten")


def run_time_options(options: Options) -> Options:
    """Of the options of a command, those of every function that measures."""
    return {name: value for name, value in options.items() if name in DEFAULTS}


def call(function: Callable[..., Any], options: Options, **others: Any) -> Any:
    """Call a function of the library with the options of a command, which are named like its keywords, and others."""
    return function(**keywords(function, options) | others)


def keywords(function: Callable[..., Any], options: Options) -> Options:
    """The options of a command that are keywords of a function of the library."""
    own = {name: options[name] for name in inspect.signature(function).parameters if name in options}
    return own | run_time_options(options)


def made_by(command: str, options: Options) -> dict[str, Any]:
    """The metadata of what a command writes; without the options that say only where the results go."""
    unsaid = ("output", "report", "json_", "timeout")
    said = {name: value for name, value in options.items() if name not in unsaid}
    return provenance(command, {name: str(v) if isinstance(v, Path) else v for name, v in said.items()})


def finish(
    name: str, network: nn.Module, options: Options, done: Any, images: Images, masks: Path | None = None, **more: Any
) -> None:
    """Write masks, weights and report, and print the report; after an error, no report of weights that are not there.

    done: the report of the library, of which a .csv has the rows. more: further parts of the report.
    """
    about, report, output = made_by(name, options), options["report"], options["output"]
    kept = [row._asdict() for row in Masks.from_zeros(network).table()]
    document = {"masks": kept, **done.to_dict(), **more, "size": size_of(network, kept)}
    document |= {"calibration": images.measured, "output": str(output), "provenance": about}
    with ExitStack() as stack:
        if report is not None and report.suffix == ".json":
            stack.enter_context(atomic(report)).write_text(json.dumps(document, indent=2) + "\n")
        if masks is not None:
            done.save(masks, about)
        write_state_dict(output, network.state_dict(), about)
    if report is not None and report.suffix == ".csv":
        done.save(report)
    if options["json_"]:
        typer.echo(json.dumps(document, indent=2))
    else:
        show(done, images.describe(), "", *summarise(document, options))


def show(*parts: Any) -> None:
    """Print strings or renderables to standard output, at a width that cuts nothing off where that is no terminal."""
    console = Console(width=console_width(), highlight=False)
    for part in parts:
        console.print(part, markup=not isinstance(part, str), soft_wrap=isinstance(part, str))
