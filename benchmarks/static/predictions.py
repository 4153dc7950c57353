"""Predictions beside measurements, for every shape: `python -m benchmarks.static.predictions`.

Predictions are those of `performance.prediction`: the recorded calls follow one another, and each
takes the longer of its operations and its bytes at the ceilings. Files written by gpu_check contain
measured ceilings and times. Without them the ceilings come from a datasheet and no card exceeds
them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report.facts import ROOT
from benchmarks.report.readme import read_checks
from benchmarks.report.rows import markdown_table
from benchmarks.static.floor import calls_table
from benchmarks.static.recorded import predictions, ratio, rivals_of
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import DATASHEET, RANK, Ceilings
from fastbound.performance.shapes import MODEL_BLOCKS, MODEL_SHAPES, Block, Shape, linear_shapes

RESULTS = ROOT / "benchmarks" / "results"
TOKENS = (1024, 4096, 8192, 32768)
SIZES = {
    "a100-80gb": Device("sm_80", 108),
    "h100": Device("sm_90", 132),
    "h200": Device("sm_90", 132),
    "mi300x": Device("gfx942", 304),
}


class Setting(NamedTuple):
    """What to predict for; ``measured`` maps (layer or block, M, competitor) to a ratio."""

    title: str
    ceilings: Ceilings
    device: Device
    measured: dict[tuple[str, int, str], float]


def setting_of(results: dict[str, Any]) -> Setting:
    """The setting of a gpu_check file. Raises ValueError if the file has no ceilings."""
    facts, ceilings = results["facts"], results.get("ceilings", {})
    if "flops" not in ceilings:
        raise ValueError("its ceilings were not measured")
    medians = {
        (f"{row['model']}.{row['projection']}", row["M"], row["competitor"]): row["median"]
        for row in results.get("benchmark", {}).get("rows", [])
        if row["direction"] == "forward+backward" and row["rank"] == RANK
    }
    ratios = {
        (layer, M, name): median / medians[layer, M, "frozen"]
        for (layer, M, name), median in medians.items()
        if (layer, M, "frozen") in medians
    }
    reached = f"{ceilings['flops'] / 1e12:.0f} TFLOP/s, {ceilings['bandwidth'] / 1e12:.2f} TB/s"
    return Setting(
        f"{facts['device']}, {facts['commit']}: measured ceilings {reached}",
        Ceilings(ceilings["flops"], ceilings["bandwidth"]),
        Device(facts["architecture"], facts["multiprocessors"]),
        ratios,
    )


def datasheet_setting(gpu: str) -> Setting:
    ceilings = DATASHEET[gpu]
    stated = f"{ceilings.flops / 1e12:g} TFLOP/s, {ceilings.bandwidth / 1e12:g} TB/s"
    return Setting(f"{gpu}: ceilings from its datasheet, {stated}", ceilings, SIZES[gpu], {})


def ratio_table(places: Sequence[Shape | Block], tokens: Sequence[int], setting: Setting) -> str:
    """Forward plus backward divided by that of the frozen one: predicted / measured."""
    rivals = rivals_of(places[0])
    lines = []
    for place in places:
        for M in tokens:
            cells = []
            for name in rivals:
                found = setting.measured.get((str(place), M, name))
                measured = "" if found is None else f" / {found:.3f}"
                cells.append(f"{_predicted(name, place, M, setting):.3f}{measured}")
            lines.append([str(place), str(M), *cells])
    return markdown_table(["", "M", *rivals], lines)


def _predicted(name: str, place: Shape | Block, M: int, setting: Setting) -> float:
    return ratio(name, place, M, setting.ceilings, RANK, setting.device)


def misses(setting: Setting) -> str:
    """How far the predictions are from the measurements, by competitor."""
    places: dict[str, Shape | Block] = {str(p): p for p in (*MODEL_SHAPES, *MODEL_BLOCKS)}
    off: dict[str, list[float]] = {}
    for (place, M, name), measured in setting.measured.items():
        if place in places and name in rivals_of(places[place]):
            predicted = _predicted(name, places[place], M, setting)
            off.setdefault(name, []).append(measured / predicted - 1)
    lines = [
        [name, str(len(found)), f"{sum(found) / len(found):+.1%}", f"{max(found, key=abs):+.1%}"]
        for name, found in off.items()
    ]
    head = ["measured over predicted", "points", "mean", "farthest"]
    return markdown_table(head, lines) if lines else "Nothing was measured at a known shape."


def document(setting: Setting, tokens: Sequence[int]) -> str:
    llama = linear_shapes("llama-3-8b")[0]
    measured = sorted({M for _, M, _ in setting.measured})
    lengths = sorted({*tokens, *measured})
    sections = [
        f"## {setting.title}",
        f"Forward plus backward divided by that of the frozen layer, bf16, r={RANK}: predicted"
        + (" / measured." if setting.measured else "; nothing has been measured yet."),
        ratio_table(MODEL_SHAPES, lengths, setting),
        "Divided by that of the frozen block:",
        ratio_table(MODEL_BLOCKS, lengths, setting),
    ]
    for name in ("fused", "split"):
        found = predictions(name, llama, 8192, RANK, setting.device)
        sections += [f"{llama} at 8192 tokens, {name}:", calls_table(found, setting.ceilings)]
    if setting.measured:
        sections.append(misses(setting))
    return "\n\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.predictions", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument(
        "results", nargs="*", type=Path, help="files written by gpu_check, or folders of them"
    )
    parser.add_argument(
        "--gpu", choices=DATASHEET, default="h200", help="GPU to predict without files (h200)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args(arguments)
    if any(M < 1 for M in options.tokens):
        parser.error(f"--tokens must be >= 1, got {min(options.tokens)}")
    found, refused = read_checks(options.results or ([RESULTS] if RESULTS.is_dir() else []))
    settings = []
    for path, results in found.items():
        if results["timings_mean_nothing"]:
            refused[path] = "its times mean nothing, as it ran on a CPU"
            continue
        try:
            settings.append(setting_of(results))
        except ValueError as error:
            refused[path] = str(error)
    for path, reason in refused.items():
        print(f"{path} left out: {reason}", file=sys.stderr)
    if not settings:
        where = ", ".join(str(path) for path in options.results or [RESULTS])
        print(f"No measurements: there is no usable file of gpu_check in {where}.\n")
        settings = [datasheet_setting(options.gpu)]
    print("\n\n".join(document(setting, options.tokens) for setting in settings))
    return 2 if options.results and refused else 0


if __name__ == "__main__":
    sys.exit(main())
