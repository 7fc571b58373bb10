"""What a repair method is, and the registry of all methods by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from math import inf
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar

from ..engine.probes import Layer, Probe
from ..errors import did_you_mean
from ..network.updates import Update
from ..runtime.options import DEFAULTS

Schedule = Literal["sequential", "parallel"]


class DenseAccess(Enum):
    """What a method needs of the dense network: nothing, the moments of its outputs, or the network itself."""

    NONE = "nothing"
    STATISTICS = "the moments of its outputs"
    MODEL = "the network itself"


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A repair method: what to measure at each layer, and the update that follows. Its fields are its options.

    A subclass is a frozen dataclass with a `name` and a default for each field; it checks its fields in
    `__post_init__`. `schedules`: "sequential" measures a layer when all earlier ones are corrected, "parallel" measures
    all on the unrepaired network.
    """

    name: ClassVar[str]
    dense: ClassVar[DenseAccess] = DenseAccess.STATISTICS
    schedules: ClassVar[Collection[str]] = ("sequential", "parallel")
    skips_first: ClassVar[bool] = True  # by default the first convolution, which reads the image, stays unchanged
    changes_layers: ClassVar[bool] = True  # False: only BatchNorm is re-estimated
    measures_layers: ClassVar[bool] = True  # False: the updates do not depend on images
    finds_weights: ClassVar[bool] = False  # it finds values for weights that are in use but zero
    uses_curvature: ClassVar[bool] = False  # of a layer's outputs, which `compress` measures

    @abstractmethod
    def probe(self, layer: Layer) -> Probe | None:
        """What to measure at this layer; None leaves it unchanged."""

    @abstractmethod
    def solve(self, layer: Layer, found: Any) -> Update:
        """The update that follows from `found`, the statistic that was asked for. It writes nothing."""

    def prepare(self, layers: Mapping[str, Layer]) -> None:
        """Look at all layers before anything is measured; raise LayerError for one that the method cannot take."""
        return

    def skips_last(self, schedule: Schedule, recalibration: Recalibration | None) -> bool:
        """Does a last layer without a BatchNorm, the classifier, stay unchanged by default?

        Where its inputs do not match the dense ones, matching the dense logits costs accuracy.
        """
        return schedule == "parallel" or recalibration is not None


@dataclass(frozen=True, kw_only=True)
class Recalibration(ABC):
    """A way to re-estimate BatchNorm statistics.

    frozen: "keep" leaves a BatchNorm unchanged that is in eval mode while the model trains; or "recalibrate".
    """

    frozen: Literal["keep", "recalibrate"] = "keep"

    name: ClassVar[str]
    in_walk: ClassVar[bool]  # estimated within the walk, before later layers are measured

    @property
    @abstractmethod
    def images(self) -> int | None:
        """How many images it needs; None: all."""


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}
AUTO = "auto"


def register(method: M) -> M:
    """Make a class of methods known by its name, to `repair`, the command line and the recoverability map.

    Raises ValueError for a name that another class has, or a field named like a run-time option; TypeError for a field
    without a default.
    """
    known = _METHODS.get(method.name)
    if method.name == AUTO or (known is not None and known.__qualname__ != method.__qualname__):
        raise ValueError(f"there is a method {method.name!r} already; choose another name")
    for field in fields(method):
        if field.default is MISSING and field.default_factory is MISSING:
            raise TypeError(f"{method.__name__}.{field.name} needs a default: the method is also known by its name")
        if field.name in DEFAULTS:
            raise ValueError(f"{method.__name__}.{field.name} has the name of a run-time option; choose another name")
    _METHODS[method.name] = method
    return method


def registered() -> Mapping[str, type[Method]]:
    """All methods by name, in the order of their registration."""
    return dict(_METHODS)


def method_named(name: object) -> type[Method]:
    """The class of this name. Raises ValueError, listing the names, where there is none."""
    if not isinstance(name, str) or name not in _METHODS:
        if isinstance(name, type) and issubclass(name, Method):
            raise ValueError(f"method={name.__name__} is a class: pass an object, {name.__name__}()")
        known = ", ".join(map(repr, [AUTO, *_METHODS]))
        raise ValueError(f"method={name!r} is unknown; there are {known}{did_you_mean(str(name), _METHODS)}")
    return _METHODS[name]


def option_names() -> set[str]:
    """The names of the fields of all methods."""
    return {field.name for method in _METHODS.values() for field in fields(method)}


def make_method(method: Method | str, options: Mapping[str, Any], auto: str) -> Method:
    """The method: one that is given, or one by its name with some of its options; `auto` is what "auto" stands for.

    Raises ValueError for an unknown name or a value out of range; TypeError for an option that the method lacks.
    """
    if isinstance(method, Method):
        if given := ", ".join(options):
            raise TypeError(f"{given}: give it to the method, method={type(method).__name__}({given}=...)")
        return method
    kind = method_named(auto if method == AUTO else method)
    own = [field.name for field in fields(kind)]
    for option in options:
        if option not in own:
            chosen = ", which 'auto' stands for here," if method == AUTO else ""
            others = [name for name, each in _METHODS.items() if option in {field.name for field in fields(each)}]
            where = f"; it is for {_named(others)}" if others else f"; it has {', '.join(own) or 'none'}"
            raise TypeError(f"method {kind.name!r}{chosen} has no option {option!r}{where}")
    return kind(**options)


def _named(methods: Collection[str]) -> str:
    """method 'a'; methods 'a', 'b' and 'c'."""
    *others, last = map(repr, methods)
    return f"methods {', '.join(others)} and {last}" if others else f"method {last}"


def check_number(
    option: str, value: Any, least: float, *, most: float = inf, whole: bool = False, above: bool = False
) -> None:
    """Raise ValueError unless the value is finite, at least `least` (with `above`: above it) and at most `most`.

    TypeError unless it is a number, with `whole` a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise TypeError(f"{option}={value!r} must be a {'whole ' if whole else ''}number")
    number = float(value)
    if not (least < number if above else least <= number) or not number < inf or number > most:
        bound = f"above {least:g}" if above else f"at least {least:g}"
        raise ValueError(f"{option}={value!r} must be {bound}{f' and at most {most:g}' if most < inf else ''}")
