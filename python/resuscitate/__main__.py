"""`python -m resuscitate`: the command line."""

from .cli import app

app(prog_name="resuscitate")
