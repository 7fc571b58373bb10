"""The report of a repair, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from ..errors import MODEL
from .agreement import Agreement
from .base import UndoableReport, terminal_table


@dataclass
class LayerReport:
    """One layer, or one BatchNorm, of a repair.

    `status` is one of `STATUSES`; `reason` is a sentence about it, or "". `dead` counts the channels whose weights are
    all zero. `variance_before` and `variance_after` are the variance of the pruned outputs over that of the dense ones,
    both summed over channels, before and after the correction (1 is ideal; None for a BatchNorm, and where the dense
    outputs are constant). `gain` is the least and the greatest gain, None for a refit. `shift_into` says what took the
    shift. `explained`, with diagnostics, is the part of the dense variance that a gain and a shift for each channel can
    restore (the squared correlation before it, weighted by the dense variance). Of a refit it is the part that the
    refit explains, and `ridge` is the ridge of the refit. `error_before` and `error_after`, of a refit, are the
    standard deviation of the layer's outputs less the targets over that of the dense outputs, all channels together:
    with the pruned weights on the inputs that the layer now has, and with the new weights. The targets are the dense
    outputs, or where a ReLU reads the layer, the nearest outputs that it maps to the dense values.
    """

    name: str
    kind: str
    channels: int
    status: str
    reason: str = ""
    dead: int = 0
    variance_before: float | None = None
    variance_after: float | None = None
    gain: tuple[float, float] | None = None
    shift_into: str | None = None
    explained: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    ridge: float | None = None

    def summary(self) -> str:
        """What was done, in a few words, without the name."""
        for what, before, after in (
            ("error", self.error_before, self.error_after),
            ("variance", self.variance_before, self.variance_after),
        ):
            if before is not None and after is not None:
                return f"{what} {before:.3f} -> {after:.3f}"
        return self.status

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LayerReport:
        """The row again, from `dataclasses.asdict` by way of JSON."""
        return cls(**{**plain, "gain": plain["gain"] and tuple(plain["gain"])})


# given a gain; new weights; means of pruned weights; a BatchNorm with new statistics; not changed though selected; not
# selected by default
STATUSES = ("repaired", "refitted", "replaced", "re-estimated", "unchanged", "skipped")
# of the table on a terminal: the title and the value. Columns without values are not shown, and of a layer with errors
# no other number decides that
NUMBERS = {
    "error before": "error_before",
    "error after": "error_after",
    "variance before": "variance_before",
    "variance after": "variance_after",
    "gain from": "gain_least",
    "to": "gain_greatest",
    "explained": "explained",
}
COLUMNS = [*(field.name for field in fields(LayerReport) if field.name != "gain"), "gain_least", "gain_greatest"]


@dataclass
class RepairReport(UndoableReport):
    """The result of `repair`: its settings, a row for each layer, the images used, the seconds taken.

    `options` are the fields of the method. `images` counts the images behind the gains, `batchnorm_images` those behind
    the BatchNorm statistics, `skipped` those left out for non-finite activations, each over all ranks. `target` says
    what the outputs were matched to. `walk` is "graph", "suspended" or "none". `bytes_spilled` counts the bytes that
    did not fit the memory budget, `resumed` the updates that came from a journal. `stages` has the seconds of each
    stage. `agreement` is that of the outputs with the dense network's: None without one, and where they cannot be
    compared. `undone`: it fell, and so the repair was undone.
    """

    work: ClassVar[str] = "repair"
    columns: ClassVar[Sequence[str]] = COLUMNS

    method: str
    schedule: str
    recalibrate: str | None
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    images: int = 0
    batchnorm_images: int = 0
    skipped: int = 0
    target: str = "none"
    walk: str = "none"
    bytes_spilled: int = 0
    ranks: int = 1
    resumed: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    agreement: Agreement | None = None
    undone: bool = False

    def belongs_to(self, whole: str) -> None:
        """Make this a step of `whole`, which alone can be undone; `undo` then says so."""
        self._undo = partial(_refuse, whole)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each layer; the least and the greatest gain have a column each."""
        ends = ("gain_least", "gain_greatest")
        return [{**vars(each), **dict(zip(ends, each.gain or (None, None), strict=True))} for each in self.layers]

    def __rich_console__(self, *_: object) -> Iterator[Any]:
        from rich.markup import escape

        statistics = self.recalibrate or "as in the dense model"
        undone = "; undone: below is what was undone" if self.undone else ""
        yield f"[bold]{self.method}[/], {self.schedule}, BatchNorm: {statistics}{undone}"
        rows = self.rows()
        others = [row for row in rows if row["error_before"] is None]
        shown = {
            title: key
            for title, key in NUMBERS.items()
            if any(row[key] is not None for row in (rows if key.startswith("error") else others))
        }
        cells = [
            [row["name"] or MODEL, row["kind"], row["status"], str(row["channels"]), str(row["dead"])]
            + ["" if row[key] is None else f"{row[key]:.3f}" for key in shown.values()]
            for row in rows
        ]
        yield terminal_table(["layer", "kind", "status"], ["channels", "dead", *shown], cells)
        parts = [f"{self.images} images measured"] if self.images else []
        parts += [f"{self.batchnorm_images} images for BatchNorm"] if self.batchnorm_images else []
        parts += [f"{self.skipped} images skipped"] if self.skipped else []
        parts += [f"target: {self.target}"] if self.target != "none" else []
        parts += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        parts += [f"{self.bytes_spilled / 2**20:,.0f} MiB spilled"] if self.bytes_spilled else []
        parts += [f"{self.resumed} updates from the journal"] if self.resumed else []
        yield escape("; ".join([*parts, f"{self.walk} walk", f"{self.seconds:.2f} s"]))
        yield from (escape(f"{row.name or MODEL}: {row.status}, {row.reason}") for row in self.layers if row.reason)
        yield from map(escape, [*self.outcome(), *self.notes])


def _refuse(whole: str) -> None:
    raise RuntimeError(f"this repair is one step of {whole}, and a step is not undone alone: call undo() of the whole")
