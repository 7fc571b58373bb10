"""What a repair did, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MODEL
from ..utils.files import write_rows

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass
class LayerReport:
    """One layer, or one BatchNorm, that the walk came by.

    `variance_before` and `variance_after` are the pruned outputs' variance over the dense ones', both summed over
    channels, just before and just after this layer's own correction (1 is ideal; None for a BatchNorm, and where the
    dense layer's outputs are constant). `dead` counts
    the channels whose weights are all zero. `gain` is the least and the greatest gain. `shift_into` says what took
    the shift. `explained`, where correlations were asked for, is the share of the dense variance that any gain and
    shift per channel could bring back: the squared correlation before the correction, weighted by the dense variance.
    Of a layer that was refitted it is the share that the refit explains; `gain` is then None. `ridge` is that of its
    least squares.
    """

    name: str
    kind: str
    channels: int
    action: str
    dead: int = 0
    variance_before: float | None = None
    variance_after: float | None = None
    gain: tuple[float, float] | None = None
    shift_into: str | None = None
    explained: float | None = None
    ridge: float | None = None

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LayerReport:
        """The row again, from `dataclasses.asdict` by way of JSON."""
        gain = plain.get("gain")
        return cls(**{**plain, "gain": None if gain is None else (gain[0], gain[1])})


RE_ESTIMATED = "re-estimated"  # the action of a BatchNorm's row; all others are layers'
ENDINGS = (".json", ".csv", ".safetensors")  # of a report that has masks
COLUMNS = [*(field.name for field in fields(LayerReport) if field.name != "gain"), "gain_least", "gain_greatest"]


@dataclass
class RepairReport:
    """The outcome of `repair`: the settings in force, what became of every layer, images used, seconds taken.

    `images` counts the images behind the gains, `batchnorm_images` those behind the BatchNorm statistics, `skipped`
    those left out for non-finite activations. `target` says what the outputs were matched to. `walk` is "node" (by the
    graph), "suspended" (by suspended forward passes) or "none"; `scratch` counts the bytes that did not fit the memory
    budget, and `resumed` the layers and BatchNorms whose correction came from a journal. Under ranks, images are those
    of all ranks together. `stages` has the seconds of each stage.
    """

    method: str
    schedule: str
    recalibrate: str | None
    layers: list[LayerReport] = field(default_factory=list)
    images: int = 0
    batchnorm_images: int = 0
    skipped: int = 0
    target: str = "none"
    walk: str = "none"
    scratch: int = 0
    ranks: int = 1
    resumed: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Put the model back as it was before the repair, bit for bit.

        Raises RuntimeError the second time, and for a step of `compress` or `regrow`: only the whole is undone.
        """
        if self._undo is None:
            raise RuntimeError("this repair has been undone already")
        self._undo()
        self._undo = None

    def belongs_to(self, whole: str) -> None:
        """Make this a step of `whole`, which alone can be undone: `undo` says so from now on."""
        self._undo = partial(_refuse, whole)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        undo, self._undo = self._undo, None
        try:
            plain = asdict(self)
        finally:
            self._undo = undo
        del plain["_undo"]
        return plain

    def save(self, path: str | Path) -> None:
        """Write .json (everything) or .csv (a row for each layer), whole or not at all. Raises OSError, ValueError."""
        write_rows(path, self.to_dict(), COLUMNS, self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """What a table of the layers holds, under `COLUMNS`: the least and the greatest gain apart."""
        found = []
        for layer in self.layers:
            least, greatest = layer.gain or (None, None)
            found.append({**vars(layer), "gain_least": least, "gain_greatest": greatest})
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape  # here, for it takes longer to import than all the rest
        from rich.table import Table

        schedule = "" if self.method == "bn" else f", {self.schedule}"
        yield f"[bold]{self.method}[/]{schedule}, BatchNorm: {self.recalibrate or 'kept as the dense model has it'}"
        table = Table("layer", "kind", "action", box=None, header_style="bold")
        paired = any(layer.explained is not None for layer in self.layers)
        titles = ("channels", "dead", "variance before", "after", "gain from", "to", *["explained"] * paired)
        for title in titles:
            table.add_column(title, justify="right")
        for layer in self.layers:
            low, high = layer.gain or (None, None)
            numbers = (layer.variance_before, layer.variance_after, low, high, *[layer.explained] * paired)
            table.add_row(
                escape(layer.name or MODEL),
                escape(layer.kind),
                escape(layer.action),
                str(layer.channels),
                str(layer.dead),
                *("" if number is None else f"{number:.3f}" for number in numbers),
            )
        yield table
        extras = [f"target: {self.target}"] if self.target != "none" else []
        extras += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        extras += [f"{self.scratch / 2**20:,.0f} MiB through scratch"] if self.scratch else []
        extras += [f"{self.resumed} corrections from the journal"] if self.resumed else []
        yield escape(
            f"{self.images} images for gains, {self.batchnorm_images} for BatchNorm, {self.skipped} skipped; "
            f"{'; '.join([*extras, f'{self.walk} walk', f'{self.seconds:.2f} s'])}"
        )
        yield from map(escape, self.notes)


def _refuse(whole: str) -> None:
    raise RuntimeError(
        f"this repair is one step of {whole}, and steps are not undone one by one: call undo() of the whole"
    )
