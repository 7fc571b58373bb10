"""Where values are spilled that exceed a memory budget: a scratch file, or pinned host memory for a GPU.

A place writes bytes, uint8 (n,), into a new region or over one of the same size, and reads them back onto their device.
"""

from __future__ import annotations

import bisect
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..errors import ResuscitateError
from ..utils.raw_bytes import view_bytes


@dataclass(frozen=True)
class Region:
    """Spilled bytes: where, how many, and of which device."""

    offset: int
    size: int
    device: torch.device


class ScratchFile:
    """Regions of one nameless file, created when first needed; a freed region is used again."""

    def __init__(self, folder: str | Path | None) -> None:
        # /tmp often is memory; /var/tmp is where systems keep large temporary files on disk
        large = "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else None
        self.folder = str(folder or large or tempfile.gettempdir())
        self.file: IO[bytes] | None = None
        self.end = 0
        self.gaps: list[tuple[int, int]] = []  # (size, offset), sorted

    def write(self, data: Tensor, at: Region | None) -> Region:
        region = at or Region(self._allocate(data.numel()), data.numel(), data.device)
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            self.file.seek(region.offset)
            left = view_bytes(data.cpu())
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            remedy = "free some space there, name another with scratch=, or give more memory="
            raise ResuscitateError(f"scratch folder {self.folder}: {error.strerror}; {remedy}") from error
        return region

    def read(self, region: Region, data: Tensor) -> None:
        assert self.file is not None
        self.file.seek(region.offset)
        host = data if data.device.type == "cpu" else torch.empty(data.shape, dtype=data.dtype)
        left = view_bytes(host)
        while left:
            got = self.file.readinto(left)  # type: ignore[attr-defined]
            if not got:
                raise ResuscitateError(f"scratch file in {self.folder} was cut short")
            left = left[got:]
        if host is not data:  # images that the caller has on a GPU
            data.copy_(host)

    def free(self, region: Region) -> None:
        bisect.insort(self.gaps, (region.size, region.offset))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _allocate(self, size: int) -> int:
        index = bisect.bisect_left(self.gaps, (size, -1))
        if index == len(self.gaps):
            self.end += size
            return self.end - size
        room, offset = self.gaps.pop(index)
        if room > size:
            bisect.insort(self.gaps, (room - size, offset + size))
        return offset


class HostMemory:
    """Regions of pinned host memory, for a GPU."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}
        self.next = 0

    def write(self, data: Tensor, at: Region | None) -> Region:
        if at is None:
            at = Region(self.next, data.numel(), data.device)
            self.next += 1
            self.held[at.offset] = torch.empty(at.size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.held[at.offset].copy_(data)
        return at

    def read(self, region: Region, data: Tensor) -> None:
        data.copy_(self.held[region.offset])

    def free(self, region: Region) -> None:
        del self.held[region.offset]

    def close(self) -> None:
        self.held.clear()


def free_disk(folder: str) -> int:
    """Bytes that are free in a folder; 0 where that is unknown."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
