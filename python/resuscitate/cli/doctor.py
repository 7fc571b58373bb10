"""`resuscitate doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..doctor import examine
from .application import app, show
from .flags import opt


@app.command()
def doctor(
    device: Annotated[str | None, opt("Where to check, such as cuda.")] = None,
    json_: Annotated[bool, opt("Print what was found as JSON.", "--json")] = False,
) -> None:
    """List what is installed, check the kernels, and say what to do about each problem: ten seconds."""
    found = examine(device)
    if json_:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)
    if not found.well:
        raise typer.Exit(1)
