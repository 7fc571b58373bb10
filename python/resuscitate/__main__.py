"""`python -m resuscitate`: the command line."""

from .cli import main

main()
