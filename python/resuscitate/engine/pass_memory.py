"""The memory of suspended forward passes: which storages a pass has made and will still read.

While a pass is suspended, storages that it will not read again are freed although its frames refer to them, and others
that a memory budget does not admit are spilled. A storage without its bytes stays the same storage: when the bytes are
back, each tensor over it, also a view, has its values again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..runtime.activations import Store
from ..runtime.passes import RestartError
from ..runtime.spill import Region

Storage = torch.UntypedStorage
SMALL = 1 << 12  # bytes; smaller storages stay in memory
# functions that access a tensor's memory without an operator
RAW = {"numpy", "tolist", "data_ptr", "untyped_storage", "__array__", "__dlpack__"}


def storages(values: Iterable[Any]) -> Iterator[Storage]:
    """The storages of the tensors among some values; a sparse tensor, for one, has none."""
    for x in values:
        if isinstance(x, Tensor):
            with suppress(NotImplementedError, RuntimeError):
                yield x.untyped_storage()


def identities(values: Iterable[Any]) -> set[int]:
    """The identities of these storages."""
    return {storage._cdata for storage in storages(values)}


def is_shared(storage: Storage) -> bool:
    """May another process use it? torch says so of every storage on a GPU, as it could be shared."""
    return storage.device.type == "cpu" and storage.is_shared()


def model_identities(model: nn.Module) -> set[int]:
    """The identities of the storages of a model's parameters and buffers."""
    return identities([*model.parameters(), *model.buffers()])


class Made(TorchDispatchMode):
    """Numbers the storages that operators make while it is active in a thread, without keeping them alive.

    foreign: identities of storages to leave out, such as those of the model's parameters. Storages that operators make
    while `untracked` is set, outside the model's own forward pass, have no number.
    """

    def __init__(self, foreign: Set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.foreign = foreign
        self.made: dict[int, tuple[StorageWeakRef, int | None]] = {}
        self.count = 0
        self.operator_hash = 0  # a hash of the operators that made the numbered storages, in their order
        self.untracked = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would make torch import its compiler (1.7 s, 140 MB); within a repair nothing runs compiled
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = tree_leaves((args, kwargs))
        self.read(values)
        given = identities(values)
        result = func(*args, **(kwargs or {}))
        for storage in storages(tree_leaves(result)):
            if storage._cdata in given or storage._cdata in self.foreign or storage._cdata in self.made:
                continue  # not new: of a view, for one
            self.made[storage._cdata] = StorageWeakRef(storage), None if self.untracked else self.count
            if not self.untracked:
                self.count, self.operator_hash = self.count + 1, hash((self.operator_hash, func))
        return result

    def read(self, values: Iterable[Any]) -> None:
        """Called before an operator, or a function without one, reads these values."""

    def alive(self) -> Iterator[tuple[Storage, int | None]]:
        """The storages that are referred to, and their numbers; the others are forgotten."""
        for key, (reference, number) in list(self.made.items()):
            storage = Storage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                self.forget(key)
            else:
                yield storage, number

    def forget(self, key: int) -> None:
        """A storage is freed; another one may have the same identity from now on."""
        del self.made[key]


class TrialPass(Made):
    """Finds from a forward pass of a small batch how long storages are needed, and the `peak` of bytes in use.

    unread: the result of another trial, to test it: these storages are overwritten. The output then shows whether they
    are read all the same, as by an extension that takes their pointers.
    """

    def __init__(self, foreign: Set[int], unread: Mapping[str, Unread] | None = None) -> None:
        super().__init__(foreign)
        self.tested = unread or {}
        self.peak = self.operators = 0
        self.last_read: dict[int, int] = {}  # by number: after how many operators
        self.suspensions: dict[str, tuple[int, int, int] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, sum(storage.nbytes() for storage, _ in self.alive()))
        return result

    def read(self, values: Iterable[Any]) -> None:
        for storage in storages(values):
            _, number = self.made.get(storage._cdata, (None, None))
            if number is not None:
                self.last_read[number] = self.operators

    def suspend_at(self, name: str, used: Iterable[Any]) -> None:
        """A pass will be suspended at this module; the values `used` are not overwritten."""
        self.suspensions[name] = None if name in self.suspensions else (self.operators, self.count, self.operator_hash)
        if name in self.tested:
            kept = identities(used)
            for storage, number in self.alive():
                if number in self.tested[name].numbers and storage._cdata not in kept and storage.nbytes():
                    _bytes(storage).fill_(255)  # NaN, or -1

    def unread(self) -> dict[str, Unread]:
        """For each module called once at which passes are suspended: the storages that are not read after it.

        Call it after the pass. Storages that something refers to then, such as an attribute of the model, are kept.
        """
        kept = {number for _, number in self.alive()}
        return {
            name: Unread(place[2], {n for n in range(place[1]) if self.last_read.get(n, 0) <= place[0]} - kept)
            for name, place in self.suspensions.items()
            if place is not None
        }


class Unread(NamedTuple):
    """The numbers of storages that a pass suspended at a module need not keep, if its `operator_hash` is the same."""

    operator_hash: int
    numbers: Set[int]


@dataclass
class SharedStore:
    """A store for the storages of suspended passes, and which pass has made which storage. For several threads."""

    store: Store
    owners: dict[int, PassStorages] = field(default_factory=dict)


class PassStorages(Made):
    """The storages of one pass.

    From `put` to `get` no operator may use them. A storage that another pass reads, such as a value that the model
    keeps in an attribute, is read back and stays in memory. `unread`: what need not be kept at each module. A pass that
    reads it all the same, because its control flow differs from that of the trial, raises RestartError.
    """

    def __init__(self, foreign: Set[int], shared: SharedStore, unread: Mapping[str, Unread]) -> None:
        super().__init__(foreign)
        self.shared, self.unread = shared, unread
        self.active, self.at_rest = True, False
        self.error: BaseException | None = None  # unwinds the pass, whose values may be spilled
        self.counted = 0  # bytes that the store has admitted
        self.spilled = dict[int, Region]()
        self.freed, self.owned, self.pinned = set[int](), set[int](), set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.error is not None:
            raise self.error
        if not self.active:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def read(self, values: Iterable[Any]) -> None:
        owners = self.shared.owners
        for storage in storages(values):
            key = storage._cdata
            if key in self.freed:
                raise RestartError
            if owners.get(key, self) is self:
                continue
            with self.shared.store.lock:  # that of another pass stays in memory from now on
                if (owner := owners.pop(key, None)) is not None:
                    owner.owned.discard(key)
                    owner.pinned.add(key)
                    owner._bring(storage, keep=False)

    def forget(self, key: int) -> None:
        super().forget(key)
        self.freed.discard(key)
        self.pinned.discard(key)

    def put(self, name: str, used: Iterable[Any]) -> None:
        """The pass is suspended: free what is unread, count what the store admits, spill the rest.

        used: values that are not unread, whatever the trial says.
        """
        known, used = self.unread.get(name), identities(used)
        unread = known.numbers if known is not None and known.operator_hash == self.operator_hash else frozenset()
        with self.shared.store.lock:
            if self.at_rest:
                return
            self.at_rest = True
            for storage, number in self.alive():
                key, size = storage._cdata, storage.nbytes()
                if key in self.pinned or size < SMALL or not storage.resizable() or is_shared(storage):
                    continue
                self.shared.owners[key] = self
                self.owned.add(key)
                if number in unread and key not in used:
                    storage.resize_(0)
                    self.freed.add(key)
                elif key in self.spilled:
                    storage.resize_(0)
                elif self.shared.store.admit(size):
                    self.counted += size
                else:
                    self.spilled[key] = self.shared.store.write(_bytes(storage))
                    storage.resize_(0)

    def get(self, keep: bool = False) -> None:
        """Read its storages back. keep: none changes before the next `put`, so that the spilled bytes stay valid."""
        with self.shared.store.lock:
            if not self.at_rest:
                return
            self.at_rest = False
            self.shared.store.release(self.counted)
            self.counted = 0
            if self.spilled:
                for storage, _ in self.alive():
                    self._bring(storage, keep)
            if keep:
                return
            for region in self.spilled.values():  # of storages that are gone
                self.shared.store.free(region)
            self.spilled.clear()
            for key in self.owned:
                if self.shared.owners.get(key) is self:
                    del self.shared.owners[key]
            self.owned.clear()

    def finish(self) -> None:
        """The pass has ended: storages that are still referred to stay in memory."""
        self.error, self.active = None, False
        self.get()

    def _bring(self, storage: Storage, keep: bool) -> None:
        region = self.spilled.get(storage._cdata)
        if region is None:
            return
        if not storage.nbytes():
            storage.resize_(region.size)
            self.shared.store.read(region, _bytes(storage))
        if not keep:
            del self.spilled[storage._cdata]
            self.shared.store.free(region)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A context while the pass is suspended and its thread works for others. Then it reads its values back."""
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
