"""Chooses the walk: the graph walk where torch.fx traces the networks correctly, else the suspended walk."""

from __future__ import annotations

import logging
from collections.abc import Generator

from .collect import Walk
from .graph_walk import GraphPasses, NoGraphError, graph_walk
from .probes import Measurement
from .suspended_walk import suspended_walk

log = logging.getLogger("resuscitate")


def measurements(walk: Walk) -> Generator[Measurement]:
    """Measure at each request, in the order of execution, when the updates of all earlier modules are made.

    Close the generator to end the walk early. Raises LayerError, ModelMismatchError, NonFiniteError.
    """
    if not walk.requests:
        return
    with walk.bar:
        try:
            passes = [GraphPasses(walk, is_dense) for is_dense in ([False, True] if walk.beside else [False])]
            found, walk.taken = graph_walk(walk, *passes), "graph"
        except NoGraphError as cause:
            log.info("taking the suspended walk, not the graph walk: %s", cause)
            found, walk.taken = suspended_walk(walk), "suspended"
        yield from found
