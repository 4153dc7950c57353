"""The short tables of one gpu_check file, most important last, where an output is looked at.

python -m benchmarks.report.summary results/FILE.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.report.rows import markdown_table

SHOWN_TILES = 2  # of each pass and length, besides the default and the bare GEMM

Results = Mapping[str, Any]


def summary(results: Results, *, brief: bool = False) -> str:
    """Tiles, calls, kernels, layers, ceilings, correctness, failures: what is there of them.

    ``brief`` leaves the forward direction alone out.
    """
    layers = results.get("benchmark", {}).get("rows", [])
    if brief:
        layers = [row for row in layers if row["direction"] != "forward"]
    sections = [
        tile_table(results.get("tiles", {}).get("rows", [])),
        call_table(results.get("benchmark", {}).get("calls", [])),
        kernel_table(results.get("benchmark", {}).get("kernels", [])),
        layer_table(layers),
        *(report["flatness"] for report in results.get("profile", {}).get("reports", [])),
        verdict(results),
    ]
    return "\n\n".join(section for section in sections if section)


def layer_table(rows: Sequence[Results]) -> str:
    """Times over the frozen layer's; its own in ms."""
    names = [n for n in dict.fromkeys(row["competitor"] for row in rows) if n != "frozen"]
    lines = []
    for (model, projection, M), group in groupby(rows, key=itemgetter("model", "projection", "M")):
        medians = {(row["competitor"], row["direction"]): row["median"] for row in group}
        for direction in dict.fromkeys(direction for _, direction in medians):
            floor = medians.get(("frozen", direction))
            line = [
                f"{model}.{projection}",
                str(M),
                direction,
                "-" if floor is None else f"{floor * 1e3:.3f}",
            ]
            for name in names:
                median = medians.get((name, direction))
                line.append("-" if floor is None or median is None else f"{median / floor:.3f}")
            lines.append(line)
    if not lines:
        return ""
    return markdown_table(["layer", "M", "direction", "frozen ms", *names], lines)


def kernel_table(rows: Sequence[Results]) -> str:
    """Rates, and the share of the measured ceilings that each kernel reaches."""
    lines = [
        [
            row["kernel"],
            str(row["M"]),
            f"{row['median'] * 1e6:.1f}",
            f"{row['nbytes'] / row['median'] / 1e9:.0f}",
            f"{row['flops'] / row['median'] / 1e12:.1f}",
            "-" if row["ceiling"] is None else f"{row['ceiling'] / row['median']:.0%}",
        ]
        for row in rows
    ]
    head = ["kernel", "M", "us", "GB/s", "TFLOP/s", "of ceiling"]
    return markdown_table(head, lines) if lines else ""


def call_table(rows: Sequence[Results]) -> str:
    """Microseconds of one forward+backward."""
    lines = [
        [row["case"], row["competitor"], row["how"], f"{row['median'] * 1e6:.1f}"] for row in rows
    ]
    return markdown_table(["case", "competitor", "clock", "us"], lines) if lines else ""


def tile_table(rows: Sequence[Results]) -> str:
    """The fastest of each sweep, its default and its floor."""
    lines = []
    for (name, M), group in groupby(rows, key=lambda row: (row["name"], row["M"])):
        members = list(group)
        shown = [r for i, r in enumerate(members) if i < SHOWN_TILES or r["is_default"]]
        shown += [r for r in members if r["candidate"] == "cuBLAS" and r not in shown]
        for row in shown:
            over = [row[name] for name in ("over_default", "over_floor")]
            lines.append(
                [
                    name,
                    str(M),
                    row["candidate"] + (" (default)" if row["is_default"] else ""),
                    f"{row['median'] * 1e6:.1f}",
                    *("-" if each is None else f"{each:.3f}" for each in over),
                ]
            )
    head = ["pass", "M", "tile", "us", "x default", "x cuBLAS"]
    return markdown_table(head, lines) if lines else ""


def software(facts: Results) -> str:
    """The packages and their versions."""
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def verdict(results: Results) -> str:
    """Ceilings, how far everything came, and what failed."""
    facts = results["facts"]
    lines = [f"{facts['device']}, {software(facts)}, {facts['commit']}, {results['seconds']:.0f} s"]
    if results["timings_mean_nothing"]:
        lines.append("Interpreted on a CPU: the times above mean nothing.")
    measured = results.get("ceilings")
    if measured and "bandwidth" in measured:
        lines.append(
            f"copy {measured['bandwidth'] / 1e9:.0f} GB/s, "
            f"bf16 matmul {measured['flops'] / 1e12:.1f} TFLOP/s"
        )
    checked = results.get("correctness", {})
    if "outcomes" in checked:
        counts = Counter(outcome["status"] for outcome in checked["outcomes"])
        found = ", ".join(f"{count} {status}" for status, count in counts.items())
        lines.append(f"correctness: {found} of {checked['cases']} cases")
        if "sanitizer" in checked:
            lines.append(f"memory checker: {checked['sanitizer']['status']}")
    for stage in ("benchmark", "tune", "profile", "tiles"):
        late = results.get(stage, {}).get("not_reached", [])
        if late:
            lines.append(f"{stage}: not reached: {late if late is True else len(late)}")
    failures = results["failures"]
    for failure in failures:
        first, *others = failure.splitlines()
        lines.append(f"FAILED {first} ... {others[-1].strip()}" if others else f"FAILED {first}")
    lines.append(f"{len(failures)} failures" if failures else "no failures")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    for name in arguments:
        print(summary(json.loads(Path(name).read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
