"""Networks that cannot be in several forward passes at a time, because they keep values of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ..errors import ResuscitateError
from ..network.runner import Network
from ..network.wiring import same_output
from ..runtime.passes import Pass, PassRunner, end, suspend
from .suspension import thread_context


def check_interleaved(net: Network, batches: Sequence[Any]) -> None:
    """Raise ResuscitateError where passes of these batches, suspended in turn at each layer, give other outputs.

    So it is where the network keeps a value of a batch, for example a feature in an attribute, and reads it behind a
    layer. A network whose outputs differ from run to run in any case is not refused.
    """
    alone = [net.run(batch) for batch in batches]
    if same_output(alone, _interleaved(net, batches)) or not same_output(alone, [net.run(batch) for batch in batches]):
        return
    raise ResuscitateError(
        "the model keeps a value of a batch, as in an attribute or by a hook, and reads it behind a layer. Several "
        "passes are in the model at a time, and it would read that of another batch. Give all images in one batch "
        "(batch_size=, or a loader with one batch), or pass the value from module to module"
    )


def _interleaved(net: Network, batches: Sequence[Any]) -> list[Any]:
    """The outputs of passes that are suspended in turn at each layer; None for one that fails."""
    outputs: list[Any] = [None] * len(batches)
    context = thread_context(net.device)

    def run(index: int) -> None:
        with ExitStack() as stack:
            for enter in context:
                stack.enter_context(enter())
            outputs[index] = net.run(batches[index])

    passes = [Pass(partial(run, index), outputs) for index in range(len(batches))]
    try:
        with net.hooked(net.observed(), lambda name, x: suspend()):
            while left := [each for each in passes if not each.ended]:
                PassRunner(1).run([iter(left)])
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # the model's own, about a value of another batch
        return [None] * len(batches)
    finally:
        end(passes)
    return outputs
