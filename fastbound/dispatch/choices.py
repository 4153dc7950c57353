"""The outcome of a first call: its candidates' times, the chosen one, and those that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastbound.dispatch.entries import typed
from fastbound.dispatch.timing import quartiles

# The part of a layer or block that a key stands for. "whole" asks whether a block runs, forward and
# backward, as one operator or layer by layer.
PARTS = ("forward", "backward", "whole")
LAYOUTS = ("rows", "columns", "strided")
MARGIN = 0.02  # a rival must be faster by more than this fraction
CPU_MARGIN = 0.05  # the same on a CPU, which other processes share


@dataclass(frozen=True)
class Place:
    """The key of a choice, on one card and with one set of software.

    It describes x [M, K] with M rounded up to a power of two, a weight [N, K] stored as ``layout``
    says, and the padded rank R. ``form`` is the form of a block, or "". ``product`` says that the
    adapter has the product form, and ``fills`` that the fused GEMM's blocks fill the card at the
    actual number of rows. ``tiles`` is a digest of the candidates' tiles.
    """

    part: str
    M: int
    N: int
    K: int
    R: int
    dtype: str
    layout: str = "rows"
    form: str = ""
    dropout: bool = False
    over_base: bool = False
    product: bool = False
    fills: bool = True
    tiles: str = ""

    def __str__(self) -> str:
        kind = f"{self.form} block, " if self.form else "over a base, " if self.over_base else ""
        kind += "product form, " if self.product else ""
        return (
            f"{self.part}, {kind}N {self.N}, K {self.K}, {self.M} rows, {self.dtype}, "
            f"rank up to {self.R}"
        )


@dataclass(frozen=True)
class Choice:
    """The strategy chosen for a place.

    ``seconds`` has the three quartiles of each candidate that was timed, and ``faults`` says what
    was wrong with the others. ``origin`` says when and where: "measured <date> on <card>".
    """

    place: Place
    strategy: str
    seconds: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    @property
    def reason(self) -> str:
        """The reason that `explain` gives: the candidates, fastest first, and those that failed."""
        ordered = sorted(self.seconds.items(), key=lambda each: each[1][1])
        said = [f"{name} {1e3 * times[1]:.3g} ms" for name, times in ordered]
        said += [f"{name} does not run here ({why})" for name, why in self.faults.items()]
        return f"{self.origin}: {', '.join(said)}"


def pick(
    samples: Mapping[str, Sequence[float]], order: Sequence[str], margin: float = MARGIN
) -> str:
    """The strategy to choose among those timed; ``order`` has the default first and "fused" last.

    A rival must be faster than the best so far by more than ``margin`` (a fraction) in the median.
    For "fused" and "layers", the rival's upper quartile must also be below the other's lower
    quartile: if noise cannot tell two strategies apart, the default is safer.
    """
    best, *rivals = [name for name in order if name in samples]
    for rival in rivals:
        lower, middle, _ = quartiles(samples[best])
        _, ours, worst = quartiles(samples[rival])
        clear = rival not in ("fused", "layers") or worst < lower
        if (1 + margin) * ours < middle and clear:
            best = rival
    return best


def read_choice(content: Any) -> Choice:
    """A choice from its JSON. Raises KeyError, TypeError or ValueError, saying what is wrong."""
    if not isinstance(content, dict):
        raise TypeError(f"choice {content!r} is not an object")
    place = typed(content, "place", dict)
    kinds = {each.name: {"int": int, "bool": bool, "str": str}[str(each.type)] for each in _PLACE}
    if set(place) != set(kinds):
        raise ValueError(f"a choice's place has the keys {sorted(place)}, not {sorted(kinds)}")
    found = Place(**{name: typed(place, name, kind) for name, kind in kinds.items()})
    if found.part not in PARTS or found.layout not in LAYOUTS:
        raise ValueError(f"a choice has part {found.part!r} and layout {found.layout!r}")
    seconds = {}
    for name, times in typed(content, "seconds", dict).items():
        if not (isinstance(times, list) and len(times) == 3 and all(_is_time(t) for t in times)):
            raise ValueError(f"seconds of {name} are {times!r}, not three quartiles")
        seconds[name] = (times[0], times[1], times[2])
    faults = typed(content, "faults", dict)
    strategy = typed(content, "strategy", str)
    if not all(isinstance(why, str) for why in faults.values()):
        raise TypeError(f"faults are {faults!r}")
    if strategy not in seconds or strategy in faults:
        raise ValueError(f"strategy {strategy!r} is not one of those that were timed")
    return Choice(found, strategy, seconds, faults, typed(content, "origin", str))


_PLACE = fields(Place)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def choice_as_json(choice: Choice) -> dict[str, Any]:
    """The JSON that :func:`read_choice` reads."""
    return asdict(choice)
