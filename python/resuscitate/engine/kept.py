"""Statistics kept for several repairs: in memory up to the budget of a store, beyond it spilled."""

from __future__ import annotations

from ..runtime.activations import Frame, Store
from ..statistics.base import Place, Statistic


class KeptStatistics:
    """Statistics by the name of the layer, in a `Store`, for as long as that is open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[str, tuple[type[Statistic], Frame]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def add(self, found: Statistic) -> None:
        """Keep a statistic under the name of its layer."""
        frame = Frame(self._store)
        frame.close({0: found.state()})
        self._kept[found.place.name] = type(found), frame

    def get(self, place: Place) -> Statistic:
        """The statistic of a layer as a new object, for the layer as it is now."""
        kind, frame = self._kept[place.name]
        state = frame.open([0])[0]
        frame.close({}, keep=[0])
        return kind.of_state(place, state)
