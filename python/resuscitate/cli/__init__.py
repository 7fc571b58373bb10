"""The command line: `resuscitate demo | prune | repair | compress | regrow | stats | map | report | export | doctor`.

Every option has the name of its Python keyword. Results go to standard output; progress, where it is a terminal, and
errors to standard error. Exit codes: 0 done, 1 failed (a message of one line says why), 2 the command makes no sense.
"""

from . import compress, demo, doctor, export, map, prune, regrow, repair, report  # noqa: F401 - each adds its commands, in the order of the help
from .application import app, main

__all__ = ["app", "main"]
