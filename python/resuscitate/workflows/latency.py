"""How long a forward pass takes."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import nn

from ..engine.session import Session
from ..runtime.distributed import Ranks
from ..runtime.options import RunOptions

PASSES = 7


def latency(model: nn.Module, batch: Any, run: RunOptions, ranks: Ranks) -> float:
    """Seconds of a forward pass of one batch: the median of seven, after one that is not timed."""
    with Session([model], run, ranks=ranks) as session:
        session.net.run(batch)
        return median(_timed(session, batch) for _ in range(PASSES))


def _timed(session: Session, batch: Any) -> float:
    _wait(session.net.device)
    started = time.perf_counter()
    session.net.run(batch)
    _wait(session.net.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
