"""Messages of the library in the words of the shell: keywords as flags."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

# a keyword, unless a parenthesis opens before it, and its value: True or False, a word, a number or nothing; where the
# value is a list or a call, nothing matches
KEYWORD = re.compile(r"(?<![\w.(])(\w+)=(?:(True|False)\b|'([^']*)'|(-?\d[\w.-]*)|(?![\w\[{('-]))")


def as_flags(message: str, names: Collection[str]) -> str:
    """The message with `keep_worse=True` as `--keep-worse` and `memory=` as `--memory`, for keywords of these names."""

    def flag(found: re.Match[str]) -> str:
        name, switch, word, number = found.groups()
        if name not in names:
            return found[0]
        value = word or number
        return f"--{'no-' if switch == 'False' else ''}{name.replace('_', '-')}{f' {value}' if value else ''}"

    return KEYWORD.sub(flag, message)


@contextmanager
def warnings_with_flags(names: Collection[str]) -> Iterator[None]:
    """Within this context the package's log is written by `as_flags`."""

    def rewrite(record: logging.LogRecord) -> bool:
        record.msg, record.args = as_flags(record.getMessage(), names), ()
        return True

    log = logging.getLogger("resuscitate")
    log.addFilter(rewrite)
    try:
        yield
    finally:
        log.removeFilter(rewrite)
