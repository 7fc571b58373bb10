"""A journal of a repair: what each layer was given, appended as it happens, so that a killed run can go on.

A file of records, each with its length and checksum before it; the first says which model, images and options the rest
belong to. A record that a kill left half written is cut off. Nothing is pickled: records are safetensors.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor

from ..errors import JournalError
from ..utils.digest import fingerprint
from ..utils.files import open_locked
from .distributed import Ranks

MAGIC = b"resuscitate journal 1\n"
HEAD = struct.Struct("<QI")  # length, crc32
Entry = tuple[dict[str, Tensor], dict[str, object]]  # the tensors and the row of the report


def fingerprints(values: Mapping[str, Any]) -> dict[str, object]:
    """Values by name, as an identity holds them."""
    return {name: fingerprint(value) for name, value in values.items()}


class Journal(AbstractContextManager["Journal"]):
    """What is known of a run: entries by the name of the layer or BatchNorm. Without a path, for this run only.

    Rank 0 reads and writes the file; the others know what it knows. Raises JournalError for a file that is no journal,
    or the journal of something else: `identity`, that of rank 0, says part by part of what it must be.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, object], ranks: Ranks) -> None:
        self.entries: dict[str, Entry] = {}
        self._file: IO[bytes] | None = None
        self._path = path
        if path is None:
            return
        if ranks.rank == 0:
            if Path(path).is_dir():
                raise JournalError(f"{path} is a folder, and resume= takes a file here; `compress` takes a folder")
            try:
                self._file = open_locked(Path(path))
            except BlockingIOError as error:
                raise JournalError(f"{path} is another run's, which still goes on; name another file") from error
        try:
            content = ranks.broadcast(b"" if self._file is None else self._file.read())
            wanted = ranks.broadcast(json.dumps(identity).encode())
            records = list(_records(path, content))
            if records and (differ := _differing(json.loads(records[0]), json.loads(wanted))):
                problem = f"{path} is the journal of another run: {', '.join(differ)} differ"
                raise JournalError(f"{problem}; give the same again, or name another")
            for record in records[1:]:
                length = int.from_bytes(record[:8], "little")  # of the header of safetensors
                metadata = json.loads(record[8 : 8 + length])["__metadata__"]
                self.entries[metadata["name"]] = decode(record), json.loads(metadata["row"])
            if self._file is not None:
                self._file.truncate(len(MAGIC) + sum(HEAD.size + len(record) for record in records) if records else 0)
                self._file.seek(0, os.SEEK_END)
                if not records:
                    self._file.write(MAGIC)
                    self._append(wanted)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been said
                self._file.close()

    def add(self, name: str, tensors: Mapping[str, Tensor], row: Mapping[str, object]) -> None:
        """Append what became of one layer: tensors (on any device) and plain values."""
        if self._file is not None:
            plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            self._append(encode(plain, {"name": name, "row": json.dumps(row)}))

    def _append(self, record: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(HEAD.pack(len(record), zlib.crc32(record)) + record)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def _records(path: str | Path, content: bytes) -> Iterator[bytes]:
    """The whole records, up to the first that a kill cut short or that does not match its checksum."""
    if not content.startswith(MAGIC) and not MAGIC.startswith(content):
        raise JournalError(f"{path} is not a journal; name a file that does not exist yet")
    at = len(MAGIC)
    while at + HEAD.size <= len(content):
        length, checksum = HEAD.unpack_from(content, at)
        record = content[at + HEAD.size : at + HEAD.size + length]
        if len(record) < length or zlib.crc32(record) != checksum:
            return
        yield record
        at += HEAD.size + length


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The names of the parts that differ; of a part that has parts, which of those."""
    names = []
    for key in {**found, **wanted}:
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{key} ({', '.join(parts)})"] if (parts := _differing(old, new)) else []
        elif old != new:
            names.append(key)
    return names
