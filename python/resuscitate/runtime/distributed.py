"""Ranks: each process walks its own images; at every stop they merge what they measured, or all give up together.

Every meeting begins with the same small message, in which a rank that has failed says so in place of joining in. So the
failure of one is the failure of all, and no rank waits for another that will not come.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

import asr_kernels as ak

from ..engine.probes import Calls, Visit, merge_calls, merge_folds
from ..errors import DistributedError

log = logging.getLogger("resuscitate")


@dataclass
class Ranks:
    """The processes of a `torch.distributed` group; without one, this process alone, for which all is trivial."""

    group: Any = None
    rank: int = field(init=False, default=0)
    size: int = field(init=False, default=1)
    failures: ClassVar[int] = 0  # that all ranks have heard of, in this process

    def __post_init__(self) -> None:
        if self.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            log.warning("torch.distributed has %d ranks and group is None: this one works alone", dist.get_world_size())
        if self.group is not None:
            self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
            if self.rank < 0:
                raise DistributedError("this process is no member of the group; only its members may call")
            backend = dist.get_backend(self.group)
            self._device = (
                torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
            )

    def share(self, images: int | None) -> int | None:
        """This rank's part of a number of images that are dealt out one by one; None for all stays None."""
        return None if images is None else len(range(self.rank, images, self.size))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave only when every rank has come this far; raise, on all, when one has not.

        Raises DistributedError on the ranks that did not fail themselves.
        """
        before = Ranks.failures
        try:
            yield
            self.gather(torch.empty(0))
        except BaseException:
            # once for each failure, also where a meeting stands within another
            if self.size > 1 and before == Ranks.failures:
                Ranks.failures += 1
                with suppress(Exception):
                    self._all_gather(torch.tensor([1, 0]))
            raise

    def gather(self, vector: Tensor) -> list[Tensor]:
        """Every rank's vector, in the order of the ranks: one dtype, any lengths. On the CPU.

        Raises DistributedError when a rank has failed or does not answer.
        """
        if self.size == 1:
            return [vector.cpu()]
        lengths = [(int(failed), int(length)) for failed, length in self._all_gather(torch.tensor([0, len(vector)]))]
        if failed := [rank for rank, (failure, _) in enumerate(lengths) if failure]:
            Ranks.failures += 1
            raise DistributedError(f"rank {failed[0]} failed, and its own message says why; nothing was changed")
        longest = max(length for _, length in lengths)
        if not longest:
            return [vector.cpu()] * self.size
        padded = torch.cat([vector.cpu(), vector.new_zeros(longest - len(vector), device="cpu")])
        return [part[:length] for part, (_, length) in zip(self._all_gather(padded), lengths, strict=True)]

    def total(self, *numbers: int) -> list[int]:
        """Sums over the ranks."""
        return torch.stack(self.gather(torch.tensor(numbers))).sum(0).tolist()

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, added up in the order of the ranks."""
        if self.size == 1:
            return tensor
        return torch.stack(self.gather(tensor.flatten())).sum(0).view(tensor.shape).to(tensor.device)

    def broadcast(self, content: bytes, source: int = 0) -> bytes:
        """One rank's bytes, on all of them."""
        own = content if self.rank == source or self.size == 1 else b""
        return self.gather(_bytes(own))[source if self.size > 1 else 0].numpy().tobytes()

    def lend(self, example: Any) -> Any:
        """A small batch for a rank that has none of its own, None, from the first rank that has one."""
        if self.size == 1:
            return example
        buffer = io.BytesIO()
        if example is not None:
            torch.save(example, buffer)
        given = [part for part in self.gather(_bytes(buffer.getvalue())) if len(part)]
        if len(given) == self.size and self.rank == 0 and all(torch.equal(part, given[0]) for part in given):
            log.warning(
                "all %d ranks begin with the same images; that harms no result, but each should have its own", self.size
            )
        found = given[0] if given else None
        if example is not None or found is None:
            return example
        return torch.load(io.BytesIO(found.numpy().tobytes()), weights_only=True)

    def check_same(self, what: str, digest: str) -> None:
        """Raise DistributedError where the ranks do not hold the same."""
        digests = self.gather(_bytes(digest.encode()))
        for rank, other in enumerate(digests):
            if not torch.equal(other, digests[0]):
                raise DistributedError(f"rank {rank} has {what} other than rank 0; give all ranks the same")

    def merge(self, visit: Visit, device: torch.device) -> Visit:
        """The visit with the moments of all ranks, merged in the order of the ranks: the same bits on each."""
        if self.size == 1:
            return visit
        merged = Visit(visit.name, correct=visit.correct, aim=visit.aim)
        for vector in self.gather(_pack(visit)):
            calls, dense, pairs = _unpack(vector.to(device))
            merged.calls = merge_calls(merged.calls, calls)
            merged.dense = merge_calls(merged.dense, dense)
            merged.pairs = merge_calls(merged.pairs, pairs)
        for vector in self.gather(_pack_folds(visit.folds)):
            merged.folds = merge_folds(merged.folds, _unpack_folds(vector.to(device)))
        return merged

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        mine = tensor.to(self._device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(found, mine, group=self.group)
            return [part.cpu() for part in found]
        except RuntimeError as error:
            Ranks.failures += 1
            reason = str(error).splitlines()[0]
            raise DistributedError(
                f"another rank no longer answers rank {self.rank}, and nothing was changed; look at its own output "
                f"({reason})"
            ) from error


@contextmanager
def launched(timeout: float) -> Iterator[Any]:
    """The group of the processes that `torchrun` started, for as long as the context lasts; None without it.

    NCCL where there are GPUs, one for each local rank, else Gloo. `timeout`: seconds to wait for another rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _pack(visit: Visit) -> Tensor:
    """The visit's numbers as one float64 vector."""
    numbers: list[Tensor] = [torch.tensor([len(visit.calls), len(visit.dense), len(visit.pairs)], dtype=torch.float64)]
    pairs = [part for pair in visit.pairs for part in (pair.dense, pair.pruned)]
    for moments in [*visit.calls, *visit.dense, *pairs]:
        numbers += [torch.tensor([moments.count, moments.channels], dtype=torch.float64), moments.mean, moments.m2]
    numbers += [pair.comoment for pair in visit.pairs]
    return torch.cat([part.cpu() for part in numbers])


def _pack_folds(folds: dict[int, ak.PatchMoments]) -> Tensor:
    """Fold by fold: its number, the count, the shape of `xy`, and all numbers; float64."""
    numbers: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
    for fold, found in folds.items():
        numbers += [torch.tensor([fold, found.count, *found.xy.shape], dtype=torch.float64)]
        numbers += [part.cpu().flatten() for part in (found.mean, found.target, found.xx, found.xy, found.yy)]
    return torch.cat(numbers)


def _unpack_folds(vector: Tensor) -> dict[int, ak.PatchMoments]:
    folds = {}
    while len(vector):
        fold, count, G, K, O = (int(number) for number in vector[:5])
        shapes = [(G, K), (G, O), (G, K, K), (G, K, O), (G, O)]
        *parts, vector = vector[5:].split([*map(math.prod, shapes), len(vector) - 5 - sum(map(math.prod, shapes))])
        folds[fold] = ak.PatchMoments(count, *(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
    return folds


def _unpack(vector: Tensor) -> tuple[Calls, Calls, list[ak.PairedMoments]]:
    calls, dense, pairs = (int(number) for number in vector[:3])
    moments, at = Calls(), 3
    for _ in range(calls + dense + 2 * pairs):
        count, channels = (int(number) for number in vector[at : at + 2])
        mean, m2 = vector[at + 2 : at + 2 + 2 * channels].split(channels)
        moments.append(ak.ChannelMoments(count, mean, m2))
        at += 2 + 2 * channels
    paired = []
    for index in range(calls + dense, len(moments), 2):
        channels = moments[index].channels
        paired.append(ak.PairedMoments(moments[index], moments[index + 1], vector[at : at + channels]))
        at += channels
    return moments[:calls], moments[calls : calls + dense], paired
