"""What a first call found: its candidates' times, which of them is taken, and which failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastbound.dispatch.entries import typed
from fastbound.dispatch.timing import quartiles

# Of a key's place in a layer or a block. "whole" asks how a block runs, forward and backward: as
# one operator, or layer by layer.
PARTS = ("forward", "backward", "whole")
LAYOUTS = ("rows", "columns", "strided")
MARGIN = 0.02  # a rival must be faster by more than this share
CPU_MARGIN = 0.05  # where other processes take their turns


@dataclass(frozen=True)
class Place:
    """What a choice is found by, on one card and with one set of software.

    x [M, K], M a power of two, and a weight [N, K] that lies as ``layout`` says; padded rank R.
    ``product``: an adapter of that form. ``fills``: the fused GEMM's blocks fill the card at the
    real number of rows. ``form`` is a block's. ``tiles`` names the tiles of the candidates.
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
    """The strategy taken at a place.

    ``seconds`` has the quartiles of each candidate that was timed, ``faults`` what was wrong with
    the others; ``origin`` when and where: "measured <date> on <card>".
    """

    place: Place
    strategy: str
    seconds: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    @property
    def reason(self) -> str:
        """As `explain` has it: the candidates, the fastest first, and those that failed."""
        ordered = sorted(self.seconds.items(), key=lambda each: each[1][1])
        said = [f"{name} {1e3 * times[1]:.3g} ms" for name, times in ordered]
        said += [f"{name} does not run here ({why})" for name, why in self.faults.items()]
        return f"{self.origin}: {', '.join(said)}"


def pick(
    samples: Mapping[str, Sequence[float]], order: Sequence[str], margin: float = MARGIN
) -> str:
    """The strategy to take of those timed; ``order`` has the default first and the fused last.

    What leaves the GEMM to cuBLAS is taken by its median alone, where it is faster by more than the
    margin. "fused" and "layers" must also be faster quartile against quartile: of two that noise
    cannot tell apart the default is the safer.
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
        raise TypeError(f"choice {content!r} is no object")
    place = typed(content, "place", dict)
    kinds = {each.name: {"int": int, "bool": bool, "str": str}[str(each.type)] for each in _PLACE}
    if set(place) != set(kinds):
        raise ValueError(f"a choice's place has {sorted(place)}, not {sorted(kinds)}")
    found = Place(**{name: typed(place, name, kind) for name, kind in kinds.items()})
    if found.part not in PARTS or found.layout not in LAYOUTS:
        raise ValueError(f"a choice of {found.part!r} in layout {found.layout!r}")
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
        raise ValueError(f"strategy {strategy!r} is none of those that were timed")
    return Choice(found, strategy, seconds, faults, typed(content, "origin", str))


_PLACE = fields(Place)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def choice_as_json(choice: Choice) -> dict[str, Any]:
    """What :func:`read_choice` reads."""
    return asdict(choice)
