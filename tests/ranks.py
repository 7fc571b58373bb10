"""A test's process as one rank of a group of Gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def joined(rank: int, size: int, folder: str | Path) -> Iterator[Any]:
    """The group of `size` ranks that meet in a file of `folder`, left at the end.

    A process that ends while it is still in a group of Gloo may abort: `terminate called without an active exception`.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
