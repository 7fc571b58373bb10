"""The memory of suspended forward passes: which storages a pass has made and will still read.

While a pass is suspended, what it will not read again is freed although its frames refer to it, and what a memory
budget does not admit is moved out. A storage without its bytes stays the same storage: once they are back, every tensor
over it, a view too, has its values again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..runtime.activations import Store
from ..runtime.passes import RestartError
from ..runtime.spill import Region

Storage = torch.UntypedStorage
SMALL = 1 << 12  # bytes; smaller storages stay in memory
# functions that give access to a tensor's memory without an operator
RAW = {"numpy", "tolist", "data_ptr", "untyped_storage", "__array__", "__dlpack__"}


def storage_of(x: Any) -> Storage | None:
    """The storage of a tensor; None for what has none, such as a sparse tensor."""
    if not isinstance(x, Tensor):
        return None
    try:
        return x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def identities(tensors: Iterable[Any]) -> set[int]:
    """The identities of the storages of some tensors."""
    return {storage._cdata for x in tensors if (storage := storage_of(x)) is not None}


class Made(TorchDispatchMode):
    """Numbers the storages that operators make while it is active in a thread, without keeping them alive.

    foreign: identities of storages that do not count, such as those of the model's parameters. While `aside` is set,
    operators run that the forward pass by itself would not: the storages that they make have no number.
    """

    def __init__(self, foreign: Set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.foreign = foreign
        self.made: dict[int, tuple[StorageWeakRef, int | None]] = {}
        self.count = 0
        self.trail = 0  # a hash of the operators that made what has a number, in their order
        self.aside = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would make torch import its compiler (1.7 s, 140 MB); within a repair nothing runs compiled
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = tree_leaves((args, kwargs))
        self.read(values)
        given = identities(values)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = storage_of(leaf)
            if (
                storage is None or storage._cdata in given or storage._cdata in self.foreign
            ):  # a view is of a storage that is known, or of another's
                continue
            if storage._cdata not in self.made:
                self.made[storage._cdata] = StorageWeakRef(storage), None if self.aside else self.count
                if not self.aside:
                    self.count, self.trail = self.count + 1, hash((self.trail, func))
        return result

    def read(self, values: Iterable[Any]) -> None:
        """An operator, or a function without one, is about to read these values."""

    def alive(self) -> Iterator[tuple[Storage, int | None]]:
        """The storages that something refers to, and their numbers; the others are forgotten."""
        for key, (reference, number) in list(self.made.items()):
            storage = Storage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                self.forget(key)
            else:
                yield storage, number

    def forget(self, key: int) -> None:
        """A storage is gone; another one may have the same identity from now on."""
        del self.made[key]


class Rehearsal(Made):
    """Learns from a forward pass of a small batch how long storages are needed.

    `peak` is the most bytes that were in use at once after an operator.
    """

    def __init__(self, foreign: Set[int]) -> None:
        super().__init__(foreign)
        self.peak = self.operators = 0
        self.last_read: dict[int, int] = {}  # by number: after how many operators
        self.stops: dict[str, tuple[int, int, int] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, sum(storage.nbytes() for storage, _ in self.alive()))
        return result

    def read(self, values: Iterable[Any]) -> None:
        for x in values:
            known = self.made.get(storage._cdata) if (storage := storage_of(x)) is not None else None
            if known is not None and known[1] is not None:
                self.last_read[known[1]] = self.operators

    def stop(self, name: str, used: Iterable[Any]) -> None:
        """A pass is to be suspended here."""
        self.stops[name] = None if name in self.stops else (self.operators, self.count, self.trail)

    def spent(self) -> dict[str, Spent]:
        """By stop: what is read no more behind it. Of one that came twice, none. Asked once the pass has ended.

        What something refers to then, such as an attribute of the model, is not spent.
        """
        kept = {number for _, number in self.alive()}
        return {
            name: Spent(place[2], {n for n in range(place[1]) if self.last_read.get(n, 0) <= place[0]} - kept)
            for name, place in self.stops.items()
            if place is not None
        }


class Spent(NamedTuple):
    """The numbers of storages that need not be kept at a stop, by a pass that has come there by the same `trail`."""

    trail: int
    numbers: Set[int]


class Trial(Made):
    """Tries what a rehearsal found: overwrites, where a pass is to be suspended, what it is said to read no more.

    The output shows whether something reads it all the same, unseen, such as an extension that takes its pointer.
    """

    def __init__(self, foreign: Set[int], spent: Mapping[str, Spent]) -> None:
        super().__init__(foreign)
        self.spent = spent

    def stop(self, name: str, used: Iterable[Any]) -> None:
        """A pass is to be suspended here; `used` are values that are not overwritten."""
        kept, spent = identities(used), self.spent[name].numbers if name in self.spent else frozenset()
        for storage, number in self.alive():
            if number in spent and storage._cdata not in kept and storage.nbytes():
                _bytes(storage).fill_(255)  # NaN, or -1


class Shelf:
    """A store for what suspended passes have in memory, and which pass has made which storage. For several threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.owners: dict[int, Live] = {}


class Live(Made):
    """The storages of one pass.

    From `put` to `get` no operator may use them. A storage that another pass reads, such as a value that the model
    keeps in an attribute, is brought back and stays in memory.

    spent: by stop, what need not be kept there; where a pass reads it all the same, for its control flow behind the
    stop differs from that of the rehearsal, it raises RestartError.
    """

    def __init__(self, foreign: Set[int], shelf: Shelf, spent: Mapping[str, Spent]) -> None:
        super().__init__(foreign)
        self.shelf, self.spent = shelf, spent
        self.active, self.at_rest = True, False
        self.error: BaseException | None = None  # that unwinds the pass, whose values may be away
        self.counted = 0  # bytes that the store has admitted
        self.away: dict[int, Region] = {}
        self.freed: set[int] = set()
        self.owned: set[int] = set()
        self.pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.error is not None:
            raise self.error
        if not self.active:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def read(self, values: Iterable[Any]) -> None:
        for x in values:
            storage = storage_of(x)
            if storage is None:
                continue
            if storage._cdata in self.freed:
                raise RestartError
            if self.shelf.owners.get(storage._cdata, self) is not self:
                self._pin(storage)

    def forget(self, key: int) -> None:
        super().forget(key)
        self.freed.discard(key)
        self.pinned.discard(key)

    def _pin(self, storage: Storage) -> None:
        """Have a storage of another pass in memory for good."""
        with self.shelf.store.lock:
            owner = self.shelf.owners.pop(storage._cdata, None)
            if owner is not None:
                owner.owned.discard(storage._cdata)
                owner.pinned.add(storage._cdata)
                owner._bring(storage, keep=False)

    def put(self, stop: str, used: Iterable[Any]) -> None:
        """The pass is suspended: free what is spent, count what the store admits, move the rest out.

        used: values that are not spent, whatever the rehearsal says.
        """
        known, used = self.spent.get(stop), identities(used)
        spent = known.numbers if known is not None and known.trail == self.trail else frozenset()
        with self.shelf.store.lock:
            if self.at_rest:
                return
            self.at_rest = True
            for storage, number in self.alive():
                key, size = storage._cdata, storage.nbytes()
                if key in self.pinned or size < SMALL or not storage.resizable() or storage.is_shared():
                    continue
                self.shelf.owners[key] = self
                self.owned.add(key)
                if number in spent and key not in used:
                    storage.resize_(0)
                    self.freed.add(key)
                elif key in self.away:
                    storage.resize_(0)
                elif self.shelf.store.admit(size):
                    self.counted += size
                else:
                    self.away[key] = self.shelf.store.write(_bytes(storage))
                    storage.resize_(0)

    def get(self, keep: bool = False) -> None:
        """Bring its storages back. keep: none changes before the next `put`, so that what is written out stays."""
        with self.shelf.store.lock:
            if not self.at_rest:
                return
            self.at_rest = False
            self.shelf.store.release(self.counted)
            self.counted = 0
            if self.away:
                for storage, _ in self.alive():
                    self._bring(storage, keep)
            if keep:
                return
            for region in self.away.values():  # of storages that are gone
                self.shelf.store.free(region)
            self.away.clear()
            for key in self.owned:
                if self.shelf.owners.get(key) is self:
                    del self.shelf.owners[key]
            self.owned.clear()

    def finish(self) -> None:
        """The pass has ended: what something still refers to stays in memory."""
        self.error, self.active = None, False
        self.get()

    def _bring(self, storage: Storage, keep: bool) -> None:
        region = self.away.get(storage._cdata)
        if region is None:
            return
        if not storage.nbytes():
            storage.resize_(region.size)
            self.shelf.store.read(region, _bytes(storage))
        if not keep:
            del self.away[storage._cdata]
            self.shelf.store.free(region)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """While a pass is suspended its thread works for others; then it has its values again, or is unwound."""
        self.active = False
        try:
            yield
        except BaseException as error:
            self.error = error
            raise
        self.get()
        self.active = True


def _bytes(storage: Storage) -> Tensor:
    """The bytes of a storage as a tensor over it, uint8 (n,)."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
