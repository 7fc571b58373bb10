"""Ranks: processes that each measure their own images, and merge the statistics of each layer.

Every collective is preceded by a status message. If a rank reports a failure, all ranks raise DistributedError; so no
rank waits for another that has failed.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import asr_kernels as ak

from ..errors import DistributedError

log = logging.getLogger("resuscitate")
P = ParamSpec("P")
T = TypeVar("T")


class Ranks:
    """The processes of a `torch.distributed` group; without a group this process alone."""

    failures: ClassVar[int] = 0  # failures that all ranks know of, in this process
    group: Any
    rank: int
    size: int

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise DistributedError("this process is no member of the group; only its members may call")
            on_gpu = dist.get_backend(group) == "nccl"
            self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            log.warning("torch.distributed has %d ranks and group is None: this one works alone", dist.get_world_size())

    def share(self, images: int | None) -> int | None:
        """This rank's part of a number of images, image i to rank i modulo the ranks; None, for all, stays None."""
        return None if images is None else len(range(self.rank, images, self.size))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context that all ranks leave together. An error on one rank raises DistributedError on the others."""
        before = Ranks.failures
        try:
            yield
            self.gather(torch.empty(0))
        except BaseException:
            # report each failure once, also from nested contexts
            if self.size > 1 and before == Ranks.failures:
                Ranks.failures += 1
                with suppress(Exception):
                    self._all_gather(torch.tensor([1, 0]))
            raise

    def gather(self, vector: Tensor) -> list[Tensor]:
        """Every rank's vector (one dtype, any lengths), in the order of the ranks, on the CPU.

        Raises DistributedError if a rank has failed or does not answer.
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

    def exchange(self, value: Any, device: torch.device | None = None) -> list[Any]:
        """Every rank's value, in the order of the ranks: moments, tensors and numbers in tuples, lists and dicts."""
        return [_unpacked(part, device) for part in self.gather(_packed(value))]

    def total(self, *numbers: int) -> list[int]:
        """Sums over the ranks."""
        return self.add(torch.tensor(numbers)).tolist()

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, added up in the order of the ranks."""
        if self.size == 1:
            return tensor
        return torch.stack(self.gather(tensor.flatten())).sum(0).view(tensor.shape).to(tensor.device)

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, on all ranks: what each has computed may differ in rounding between machines."""
        if self.size == 1:
            return tensor
        return self.gather(tensor.flatten())[0].view(tensor.shape).to(tensor.device)

    def broadcast(self, content: bytes) -> bytes:
        """The bytes of rank 0, on all ranks."""
        if self.size == 1:
            return content
        return self.gather(_bytes(b"" if self.rank else content))[0].numpy().tobytes()

    def lend(self, example: Any) -> Any:
        """The small batch of this rank; where that is None, the one of the first rank that has one."""
        if self.size == 1:
            return example
        given = [part for part in self.gather(_bytes(b"") if example is None else _packed(example)) if len(part)]
        if len(given) == self.size and self.rank == 0 and all(torch.equal(part, given[0]) for part in given):
            problem = "all %d ranks begin with the same images; that harms no result, but each should have its own"
            log.warning(problem, self.size)
        return _unpacked(given[0]) if example is None and given else example

    def check_same(self, what: str, digest: str) -> None:
        """Raise DistributedError where the ranks do not hold the same."""
        digests = self.gather(_bytes(digest.encode()))
        for rank, other in enumerate(digests):
            if not torch.equal(other, digests[0]):
                raise DistributedError(f"rank {rank} has {what} other than rank 0; give all ranks the same")

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        mine = tensor.to(self._device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(found, mine, group=self.group)
            return [part.cpu() for part in found]
        except RuntimeError as error:
            Ranks.failures += 1
            problem = f"another rank no longer answers rank {self.rank}, and nothing was changed"
            raise DistributedError(f"{problem}; look at its own output ({str(error).splitlines()[0]})") from error


def fails_on_all(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator for a function with the keyword `group`: an error on one of its ranks is an error on all."""

    @wraps(function)
    def called(*args: P.args, **options: P.kwargs) -> T:
        if options.get("group") is None:
            return function(*args, **options)
        with Ranks(options["group"]).together():
            return function(*args, **options)

    return called


@contextmanager
def launched(timeout: float) -> Iterator[Any]:
    """The group of the processes that `torchrun` started, for as long as the context lasts; None without it.

    NCCL where there are GPUs, one for each local rank, else Gloo. `timeout`: seconds to wait for another rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _packed(value: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return _bytes(buffer.getvalue())


def _unpacked(content: Tensor, device: torch.device | None = None) -> Any:
    with torch.serialization.safe_globals([ak.ChannelMoments, ak.PairedMoments, ak.PatchMoments, ak.RowMoments]):
        return torch.load(io.BytesIO(content.numpy().tobytes()), map_location=device, weights_only=True)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
