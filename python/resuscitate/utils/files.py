"""Files that are written completely or not at all, and a lock for files that grow."""

from __future__ import annotations

import csv
import errno
import glob
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A context with a temporary path beside `path`; that file replaces `path` if the block ends without an error.

    Otherwise it is removed, and `path` stays as it was. Temporary files that killed processes of this machine left are
    removed too. Raises OSError as `check_writable` does.
    """
    check_writable(path)
    target, machine = Path(path).resolve(), re.sub(r"\W", "", platform.node())
    before = f".{target.name}.{machine}."
    for left in target.parent.glob(f"{glob.escape(before)}*.tmp"):
        process = left.name.removeprefix(before).removesuffix(".tmp")
        if process.isdecimal() and not _runs(int(process)):
            with suppress(OSError):
                left.unlink()
    temporary = target.with_name(f"{before}{os.getpid()}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a private file in its place
        temporary.replace(target)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write .safetensors, whole or not at all, with metadata as strings or JSON.

    Raises OSError; ValueError for another ending.
    """
    check_ending(path, ".safetensors")
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    with atomic(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata)
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


def write_rows(
    path: str | Path, document: Mapping[str, Any], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Write .json (document) or .csv (rows), whole or not at all. Raises OSError; ValueError for another ending."""
    ending = check_ending(path, ".json", ".csv")
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        if ending == ".json":
            json.dump(document, file, indent=1)
            file.write("\n")
        else:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def check_ending(path: str | Path, *endings: str) -> str:
    """Which of the endings the path has. Raises ValueError, naming them, for another: nothing is written under it."""
    if (ending := Path(path).suffix) not in endings:
        raise ValueError(f"{path}: it is written as {' or '.join(endings)}")
    return ending


def check_writable(path: str | Path) -> None:
    """Raise OSError if no file can be written there: call it before the long work."""
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(target.parent))
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "exists and is not a regular file", str(path))
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        reason = f"cannot write into this folder ({error.strerror})"
        raise PermissionError(error.errno, reason, str(target.parent)) from error


def open_locked(path: Path) -> IO[bytes]:
    """Open a file to read and write, created if missing, and lock it, where there are locks, until it is closed.

    Raises BlockingIOError if another process holds the lock.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def _runs(process: int) -> bool:
    if os.name == "nt":
        return True  # on Windows os.kill(process, 0) sends a Ctrl-C
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process
        pass
    return True
