"""`resuscitate doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .application import app, show
from .flags import Device, opt


@app.command()
def doctor(
    device: Device = None,
    json_: Annotated[bool, opt("Print what was found as JSON.", "--json")] = False,
) -> None:
    """Say what there is to work with, check the kernels on it, and what to do about what is amiss: ten seconds."""
    from ..doctor import examine

    found = examine(device)
    if json_:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)
    if not found.well:
        raise typer.Exit(1)
