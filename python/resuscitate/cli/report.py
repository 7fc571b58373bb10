"""`resuscitate report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ResuscitateError
from ..reports.page import render
from ..utils.files import atomic, check_writable
from .application import app, show
from .flags import opt


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="What --report of repair, compress or regrow wrote.")],
    output: Annotated[Path, opt("The .html file to write.", "--output", "-o")] = Path("report.html"),
) -> None:
    """Make one page of HTML from a report, which works offline: figures, tables, and how it was made."""
    if output.suffix != ".html":
        raise typer.BadParameter(f"a page is written as .html: name it {output.with_suffix('.html')}")
    check_writable(output)
    try:
        document = json.loads(run.read_text())
    except ValueError as error:
        raise ResuscitateError(f"{run}: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise ResuscitateError(f"{run}: this is no report; give what --report wrote")
    page = render(document)
    with atomic(output) as temporary:
        temporary.write_text(page)
    show(f"written to {output}")
