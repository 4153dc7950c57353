"""A profile as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastbound.figures import adapter_colour, new_figure, save_figure, within_reach
from fastbound.files import replace_files
from fastbound.performance.profiling.profile import FLAT_FROM, FLOOR, OUT_OF_MEMORY, ProfilePoint

FORMAT = "fastbound profile 1"
MIB = 2**20
TRIAL = "Trial run of few, short rounds: it shows that profiling works, not what adapters cost\n"
JSON, PICTURE, TRACE = "profile.json", "profile.png", "trace.json"
# What the benchmarks and profiles compare, under names that a reader knows.
NAMES = {
    "frozen": "frozen, no adapter",
    "fused": "fastbound",
    "auto": "fastbound, kernels chosen by measuring",
    "split": "fastbound, cuBLAS's GEMM",
    "per_layer": "fastbound, layer by layer",
    "product": "fastbound, product form",
    "addmm": "PyTorch's GEMM, then addmm_",
    "peft_fp32": "PEFT LoRA, fp32 factors (default)",
    "peft_bf16": "PEFT LoRA, bf16 factors",
    "compiled": "plain formula, torch.compile",
    "plain": "plain formula, autograd",
    "trained": "no adapter, the weight trained",
}
_LIGHTER = {"auto": 0.3, "split": 0.5, "per_layer": 0.65}
_OTHERS = {"addmm": "#009E73", "compiled": "#666666", "trained": "#444444"}
_MARKERS = {"frozen": "", "fused": "o", "peft_fp32": "s", "peft_bf16": "^"}


@dataclass(frozen=True)
class Profile:
    """Everything that was measured, and on what."""

    model: str
    mode: str
    what: str
    device: str
    dtype: str
    rank: int
    rounds: int
    versions: Mapping[str, str]
    points: Sequence[ProfilePoint] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        return list(dict.fromkeys(point.place for point in self.points))

    @property
    def on_gpu(self) -> bool:
        return any(point.peak_bytes is not None for point in self.points)

    def of(self, place: str, variant: str) -> list[ProfilePoint]:
        """By length."""
        found = [p for p in self.points if (p.place, p.variant) == (place, variant)]
        return sorted(found, key=lambda point: point.tokens)

    def variants(self, place: str) -> list[str]:
        return list(dict.fromkeys(p.variant for p in self.points if p.place == place))


def colour(name: str) -> str:
    """The colour of what is compared: of its adapter, lighter for fastbound's other ways to run."""
    if name in _LIGHTER:
        return adapter_colour("fused", _LIGHTER[name])
    return _OTHERS.get(name) or adapter_colour(name)


def length(tokens: int) -> str:
    """1536 or 2k."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def table(profile: Profile) -> str:
    """One line for each length: the frozen module's time, then times over it, then memory."""
    sections = []
    for place in profile.places:
        names = profile.variants(place)
        memory = "peak" if profile.on_gpu else "saved"
        head = ["tokens", "frozen ms", *(f"{n} x" for n in names if n != FLOOR)]
        head += [f"{n} {memory} MiB" for n in names]
        by_name = {name: {p.tokens: p for p in profile.of(place, name)} for name in names}
        lines = []
        for tokens in by_name[FLOOR]:
            found = {name: by_name[name][tokens] for name in names}
            lines.append([length(tokens), _time(found[FLOOR])])
            lines[-1] += [_ratio(found[name]) for name in names if name != FLOOR]
            lines[-1] += [_memory(found[name]) for name in names]
        sections.append(f"{profile.model}, {place}\n{_aligned(head, lines)}")
    return "\n\n".join(sections)


def _time(point: ProfilePoint) -> str:
    return _failure(point) if point.median is None else f"{point.median * 1e3:.3f}"


def _ratio(point: ProfilePoint) -> str:
    if point.median is None:
        return _failure(point)
    return "-" if point.over_floor is None else f"{point.over_floor:.3f}"


def _memory(point: ProfilePoint) -> str:
    held = bytes_of(point)
    return "-" if held is None else f"{held / MIB:.1f}"


def _failure(point: ProfilePoint) -> str:
    return point.failure or "-"


def bytes_of(point: ProfilePoint) -> int | None:
    """The peak on a GPU, else what is kept for backward."""
    return point.saved_bytes if point.peak_bytes is None else point.peak_bytes


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *lines)
    )


def flatness(profile: Profile) -> str:
    """For each adapter: its least and largest ratio to the floor, and how far they are apart.

    From 4k tokens on where there are two such lengths, else over all; a ratio that does not grow
    with the sequence stays within a few per cent.
    """
    lines = []
    for place in profile.places:
        for name in profile.variants(place):
            ratios = {p.tokens: p.over_floor for p in profile.of(place, name) if p.over_floor}
            long = {tokens: ratio for tokens, ratio in ratios.items() if tokens >= FLAT_FROM}
            ratios = long if len(long) > 1 else ratios
            if name == FLOOR or len(ratios) < 2:
                continue
            low, high = min(ratios.values()), max(ratios.values())
            lines.append(
                f"{place}, {name}: {low:.3f} to {high:.3f} x the frozen one, "
                f"±{(high - low) / (high + low):.1%} from {length(min(ratios))} to "
                f"{length(max(ratios))} tokens"
            )
    return "\n".join(lines)


def write(profile: Profile, folder: Path) -> None:
    """``profile.json`` and ``profile.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, **asdict(profile)}
    replace_files({folder / JSON: (json.dumps(content, indent=1) + "\n").encode()})
    draw(profile, folder / PICTURE)


def draw(profile: Profile, path: Path) -> None:
    """A row for each place: time over the frozen module, and memory, against the length."""
    places = profile.places
    figure, panels = new_figure(len(places), 2, (11, 1.3 + 3.5 * len(places)), grid=0.3)
    for place, (left, right) in zip(places, panels, strict=True):
        lengths = sorted({p.tokens for p in profile.points if p.place == place})
        left.set_title(
            f"{profile.model}, {place}: time over the frozen module", fontsize=10, loc="left"
        )
        memory = "peak memory of a step" if profile.on_gpu else "kept for backward"
        right.set_title(f"{profile.model}, {place}: {memory}", fontsize=10, loc="left")
        for name in profile.variants(place):
            points = profile.of(place, name)
            _draw_time(left, name, points)
            _draw_memory(right, name, points)
        left.set_ylabel("time / frozen")
        _limit(left, [p for p in profile.points if p.place == place and p.over_floor])
        _mark_failures(left, profile, place)
        right.set_yscale("log", base=2)
        right.yaxis.set_major_formatter(
            lambda mib, _: f"{mib:g} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"
        )
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [length(M) for M in lengths])
            axes.minorticks_off()
            axes.set_xlabel("tokens")
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    trial = profile.rounds < 5 and max(point.tokens for point in profile.points) < 512
    figure.suptitle(
        f"{TRIAL if trial else ''}{profile.what}\n"
        f"{profile.device}, {profile.dtype}, rank {profile.rank}, medians of "
        f"{profile.rounds} interleaved rounds with quartiles",
        fontsize=10,
    )
    save_figure(figure, path)


def _draw_time(axes: Any, name: str, points: Sequence[ProfilePoint]) -> None:
    if name == FLOOR:
        axes.axhline(1, color=colour(name), lw=1.2, ls=":")
        return
    known = [(p, p.median, p.q1, p.q3) for p in points if p.over_floor is not None]
    ratios = [p.over_floor for p, *_ in known]
    below = [_scaled(p, m - q1) for p, m, q1, _ in known if m is not None and q1 is not None]
    above = [_scaled(p, q3 - m) for p, m, _, q3 in known if m is not None and q3 is not None]
    axes.errorbar(
        [p.tokens for p, *_ in known],
        ratios,
        (below, above),
        color=colour(name),
        marker=_MARKERS[name],
        ms=5,
        lw=1.6,
        capsize=2,
        elinewidth=0.8,
    )


def _limit(axes: Any, points: Sequence[ProfilePoint]) -> None:
    """Leave points far above the others outside the panel, and name them at its upper edge."""
    ratios = [point.over_floor or 1.0 for point in points] or [1.0]
    low, high = min([*ratios, 1.0]), max(within_reach(ratios), 1.0)
    space = 0.12 * (high - low) or 0.1
    axes.set_ylim(low - space, high + space)
    for point in points:
        if (point.over_floor or 0.0) > high + space:
            axes.annotate(
                f"↑ {point.over_floor:.1f}",
                (point.tokens, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                color=colour(point.variant),
                fontsize=8,
            )


def _scaled(point: ProfilePoint, seconds: float) -> float:
    """A part of this point's median, in units of the floor."""
    return seconds / (point.median or 1.0) * (point.over_floor or 0.0)


def _draw_memory(axes: Any, name: str, points: Sequence[ProfilePoint]) -> None:
    known = [(p.tokens, held / MIB) for p in points if (held := bytes_of(p))]
    axes.plot(
        [tokens for tokens, _ in known],
        [held for _, held in known],
        color=colour(name),
        marker=_MARKERS[name],
        ls=":" if name == FLOOR else "-",
        ms=5,
        lw=1.6,
        label=NAMES[name],
    )


def _mark_failures(axes: Any, profile: Profile, place: str) -> None:
    """A cross at the top of the panel, one below the other where several fail at one length."""
    fallen: dict[int, int] = {}
    for name in profile.variants(place):
        for point in profile.of(place, name):
            if point.failure is None:
                continue
            depth = fallen.get(point.tokens, 0)
            fallen[point.tokens] = depth + 1
            axes.annotate(
                "×",
                (point.tokens, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, -8 - 11 * depth),
                textcoords="offset points",
                ha="center",
                va="center",
                color=colour(name),
                fontsize=13,
                fontweight="bold",
            )
    if fallen:
        broken = any(point.broken for point in profile.points)
        axes.text(
            1,
            1.01,
            "× failed" if broken else f"× {OUT_OF_MEMORY}",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=8,
            color="0.35",
        )
