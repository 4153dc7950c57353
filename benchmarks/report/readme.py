"""Tables for the README from files of gpu_check: nothing in them is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.rows import MIB, markdown_table
from benchmarks.report.summary import Results, kernel_table, software

FORMAT = "fastbound gpu_check 1"

# In the README's order and words.
NAMES = {
    "frozen": "frozen, no adapter",
    "fused": "**fastbound, fused**",
    "split": "fastbound, split",
    "per_layer": "fastbound, layer by layer",
    "addmm": "cuBLAS, then `addmm_`",
    "peft_bf16": "PEFT, bf16 factors",
    "peft_fp32": "PEFT, fp32 factors (its default)",
}


def read_checks(paths: Iterable[Path]) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """Files of gpu_check, folders searched, oldest first; and why others were left out."""
    found: dict[Path, dict[str, Any]] = {}
    refused: dict[Path, str] = {}
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                content = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                refused[file] = f"cannot be read as JSON: {error}"
                continue
            version = content.get("format") if isinstance(content, dict) else None
            if version == FORMAT:
                found[file] = content
            else:
                refused[file] = f"format {version!r}, not {FORMAT!r}"
    order = sorted(found.items(), key=lambda item: item[1]["facts"]["date"])
    return dict(order), refused


def readme_section(results: Results) -> str:
    """One file: what it ran on, layers and blocks against their floor, kernels, correctness."""
    facts = results["facts"]
    driver = facts["readings"].get("driver_version")
    about = [f"{facts['date'][:10]}, commit {facts['commit']}", software(facts)]
    about += [f"driver {driver}"] if driver else []
    sections = [f"### {facts['device']}", ", ".join(about) + "."]
    if results["timings_mean_nothing"]:
        sections.append(
            "**Interpreted on a CPU, at tiny sizes: these times say that the check runs, nothing "
            "else.**"
        )
    ceilings = results.get("ceilings", {})
    if "flops" in ceilings:
        sections.append(
            f"Ceilings measured on it: {ceilings['flops'] / 1e12:.4g} TFLOP/s in a bf16 matmul of "
            f"{ceilings['matmul_size']}, {ceilings['bandwidth'] / 1e12:.3g} TB/s in a copy."
        )
    benchmark = results.get("benchmark", {})
    rows = [r for r in benchmark.get("rows", []) if r["direction"] == "forward+backward"]
    for title, chosen in (
        ("Layers, forward and backward, over the frozen layer", _layers(rows)),
        ("Whole MLP blocks, over the frozen block", _blocks(rows)),
    ):
        if chosen:
            sections += [f"{title}:", over_floor_table(chosen), detail(chosen)]
    kernels = kernel_table(benchmark.get("kernels", []))
    if kernels:
        sections += [
            "Kernels alone, cold cache, and the share of the ceilings they reach:",
            kernels,
        ]
    for report in results.get("profile", {}).get("reports", []):
        place = report["points"][0]["place"]
        sections += [
            f"Time over the frozen one by length, {report['model']}, {place}:",
            length_table(report["points"]),
        ]
    sections.append(_correctness(results))
    return "\n\n".join(sections)


def _layers(rows: Sequence[Results]) -> list[Results]:
    return [row for row in rows if row["projection"] != "mlp"]


def _blocks(rows: Sequence[Results]) -> list[Results]:
    return [row for row in rows if row["projection"] == "mlp"]


def over_floor_table(rows: Sequence[Results]) -> str:
    """A line for each shape and length; ratios of medians."""
    present = {row["competitor"] for row in rows}
    names = [name for name in NAMES if name in present and name != "frozen"]
    medians = {(_place(row), row["M"], row["competitor"]): row["median"] for row in rows}
    lines = []
    for place, M in dict.fromkeys((place, M) for place, M, _ in medians):
        floor = medians.get((place, M, "frozen"))
        if floor is None:
            continue
        cells = [medians.get((place, M, name)) for name in names]
        fused, peft = medians.get((place, M, "fused")), medians.get((place, M, "peft_fp32"))
        gain = "-" if fused is None or peft is None else f"{peft / fused:.2f}"
        ratios = ["-" if cell is None else f"{cell / floor:.3f}" for cell in cells]
        lines.append([place, str(M), f"{floor * 1e3:.3f}", *ratios, gain])
    head = ["", "M", "frozen ms", *names, "PEFT's default / fused"]
    return markdown_table(head, lines)


def detail(rows: Sequence[Results]) -> str:
    """The table of one shape in the README's form: its longest measured length."""
    place = _place(rows[0])
    M = max(row["M"] for row in rows if _place(row) == place)
    members = {r["competitor"]: r for r in rows if (_place(r), r["M"]) == (place, M)}
    floor, peft = members.get("frozen"), members.get("peft_fp32")
    lines = []
    for name, words in NAMES.items():
        if name not in members:
            continue
        row = members[name]
        spread = (row["q3"] - row["q1"]) / row["median"]
        lines.append(
            [
                words,
                f"{row['median'] * 1e3:.3f} ms",
                f"{spread:.1%}",
                _ratio(row, floor),
                _ratio(peft, row),
                f"{row['saved_bytes'] / MIB:.2f} MiB",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:.1f} MiB",
            ]
        )
    head = [
        f"{place}, M={M}, r={rows[0]['rank']}, {rows[0]['dtype']}",
        "time",
        "IQR",
        "over frozen",
    ]
    head += ["PEFT's default over it", "kept for backward", "peak"]
    return markdown_table(head, lines)


def length_table(points: Sequence[Results]) -> str:
    """A line for each length of a profile, a column for each adapter."""
    names = [name for name in dict.fromkeys(p["variant"] for p in points) if name != "frozen"]
    found = {(point["tokens"], point["variant"]): point for point in points}
    lines = []
    for tokens in dict.fromkeys(point["tokens"] for point in points):
        cells = []
        for name in names:
            ratio = found[tokens, name]["over_floor"]
            missing = found[tokens, name]["failure"] or "-"
            cells.append(missing if ratio is None else f"{ratio:.3f}")
        lines.append([str(tokens), *cells])
    return markdown_table(["tokens", *names], lines)


def _place(row: Results) -> str:
    return f"{row['model']}.{row['projection']}"


def _ratio(over: Results | None, under: Results | None) -> str:
    return "-" if over is None or under is None else f"{over['median'] / under['median']:.3f}"


def _correctness(results: Results) -> str:
    outcomes = results.get("correctness", {}).get("outcomes", [])
    passed = sum(outcome["status"] == "passed" for outcome in outcomes)
    failures = len(results["failures"])
    text = f"Correctness: {passed} of {len(outcomes)} cases passed" if outcomes else "Not checked"
    return f"{text}, {failures} failures in all." if failures else f"{text}; no failures."
