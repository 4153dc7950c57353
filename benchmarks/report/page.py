"""One page about a card for somebody who has not read the rest: is it right, and is it fast.

python -m benchmarks.report.page results/FILE.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.report.rows import markdown_table
from benchmarks.report.summary import software

COLUMNS = ("auto", "split", "fused", "addmm", "per_layer", "peft_fp32", "peft_bf16")
SHOWN = 12  # failures, and what was not reached

Results = Mapping[str, Any]


def page(results: Results) -> str:
    """Markdown: the machine, what was right, what was chosen, what it costs, what is missing."""
    parts = [*_machine(results), *_right(results), *_chosen(results), *_times(results)]
    return "\n\n".join([*parts, *_missing(results)]) + "\n"


def _machine(results: Results) -> Iterator[str]:
    facts = results["facts"]
    yield f"# fastbound on {facts['device']}"
    said = [
        f"{facts['architecture']}, {facts['multiprocessors']} multiprocessors",
        software(facts),
        f"commit {facts['commit']}",
        f"{facts['date']}, {results['seconds'] / 60:.1f} minutes",
    ]
    readings = facts["readings"]
    for name, called in (("driver_version", "driver"), ("power.limit", "power limit")):
        if name in readings:
            said.insert(2, f"{called} {readings[name]}")
    yield "; ".join(said) + "."
    if results["timings_mean_nothing"]:
        yield "**Interpreted on a CPU: no time on this page means anything.**"
    measured = results.get("ceilings", {})
    if "bandwidth" in measured:
        yield (
            f"Measured here, the card copies {measured['bandwidth'] / 1e9:.0f} GB/s and multiplies "
            f"bf16 matrices at {measured['flops'] / 1e12:.0f} TFLOP/s."
        )


def _right(results: Results) -> Iterator[str]:
    yield "## Are the results right?"
    checked = results.get("correctness", {})
    if "outcomes" not in checked:
        yield "Not looked at in this run."
        return
    counts = Counter(outcome["status"] for outcome in checked["outcomes"])
    said = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    yield (
        f"Of {checked['cases']} cases, held against the formula in fp64 and run twice for equal "
        f"bits: {said}. "
        f"Memory checker: {checked.get('sanitizer', {}).get('status', 'not reached')}."
    )
    skipped = [o for o in checked["outcomes"] if o["status"] == "skipped"]
    if skipped:
        yield _bullets(f"skipped: {o['case']}: {o['message']}" for o in skipped[:SHOWN])
    failures = results["failures"]
    if failures:
        firsts = [failure.strip().splitlines() for failure in failures[:SHOWN]]
        yield _bullets(f"**FAILED** {lines[0]} {lines[-1].strip()}" for lines in firsts)
        if len(failures) > SHOWN:
            yield f"and {len(failures) - SHOWN} more failures, in the file beside this page."
    else:
        yield "Nothing failed."


def _chosen(results: Results) -> Iterator[str]:
    rows = results.get("choices", {}).get("rows", [])
    if not rows:
        return
    yield "## Which kernels does `auto` choose here?"
    yield (
        "It measures on the first call of a shape: `split` leaves the GEMM to cuBLAS, `fused` is "
        "Triton's, `torch` is PyTorch alone; a whole block runs as one operator (`block`) or layer "
        "by layer (`layers`)."
    )
    taken = Counter((row["part"], row["strategy"]) for row in rows)
    said = [f"{part}: {name} {count} times" for (part, name), count in sorted(taken.items())]
    yield "; ".join(said) + "."
    lines = [
        [row["case"], row["part"], row["strategy"], row["reason"].split(";")[0]]
        for row in rows[: 2 * SHOWN]
    ]
    yield markdown_table(["case", "part", "taken", "why"], lines)
    seconds = {row["case"]: row["seconds"] for row in rows}
    yield (
        f"A first forward and backward took {min(seconds.values()):.1f} to "
        f"{max(seconds.values()):.1f} s, compiling and measuring among it."
    )


def _times(results: Results) -> Iterator[str]:
    rows = results.get("benchmark", {}).get("rows", [])
    both = [row for row in rows if row["direction"] == "forward+backward"]
    for title, wanted in (("a layer", False), ("a whole MLP block", True)):
        table = _over_frozen([row for row in both if (row["projection"] == "mlp") is wanted])
        if table:
            yield f"## What does {title} cost, over the frozen one?"
            yield (
                "Forward and backward, medians, as a multiple of those of the bare frozen one. "
                "`addmm` is the usual way by hand, `peft_*` are PEFT's layers."
            )
            yield table


def _over_frozen(rows: Sequence[Results]) -> str:
    present = {row["competitor"] for row in rows}
    names = [name for name in COLUMNS if name in present]
    lines = []
    for place, group in groupby(rows, key=itemgetter("model", "projection", "M")):
        medians = {row["competitor"]: row["median"] for row in group}
        floor = medians.get("frozen")
        if floor is None:
            continue
        over = [f"{medians[name] / floor:.2f}" if name in medians else "-" for name in names]
        model, projection, M = place
        lines.append([f"{model} {projection}", str(M), f"{1e3 * floor:.3f}", *over])
    return markdown_table(["", "tokens", "frozen ms", *names], lines) if lines else ""


def _missing(results: Results) -> Iterator[str]:
    late: list[str] = []
    for stage in ("correctness", "ceilings", "choices", "benchmark", "tune", "profile", "tiles"):
        found = results.get(stage)
        if found is None or found.get("not_reached") is True:
            late.append(f"{stage}: not reached")
        elif found.get("not_reached"):
            late.append(f"{stage}: {len(found['not_reached'])} steps not reached")
        late += [f"{stage}: {text}" for text in (found or {}).get("out_of_memory", [])]
    yield "## What is missing?"
    yield _bullets(late[:SHOWN]) if late else "Every step was reached."


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def main(arguments: Sequence[str]) -> None:
    for name in arguments:
        print(page(json.loads(Path(name).read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
