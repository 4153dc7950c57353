"""Fetch a pretrained model, teach it rows, and map how each adapter unlearns some of them.

    python -m benchmarks.real_model --forget forget01.jsonl --retain retain.jsonl --output map

The output folder holds the models (`pretrained`; `full`, which knows all rows; `retain`, which
never saw the rows to forget) and the map. Whatever is already there is not made again. Every flag
that is not named here is passed to `fastbound lab`, such as --general, --adapters, --lr, --steps
and --workers. Reading the fetched weights needs the package `gguf`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.real_model.fetch import fetch, save
from benchmarks.real_model.teach import EPOCHS, teach
from fastbound.cli import main as fastbound
from fastbound.unlearning.data.rows import Row, load_rows
from fastbound.unlearning.model import load_pretrained


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--forget", required=True, metavar="FILE")
    parser.add_argument("--retain", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="DIR", type=Path)
    parser.add_argument(
        "--retain-rows", type=int, metavar="N", default=200, help="the first N (200)"
    )
    parser.add_argument("--teach-epochs", type=int, metavar="N", default=EPOCHS, help=f"({EPOCHS})")
    parser.add_argument("--teach-dtype", choices=("float32", "bfloat16"), default="float32")
    given, others = parser.parse_known_args(arguments)
    forget, retain = load_rows(given.forget), load_rows(given.retain)[: given.retain_rows]
    output: Path = given.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "pretrained").exists():
        fetch(output / "pretrained")
    dtype = torch.bfloat16 if given.teach_dtype == "bfloat16" else None
    for name, rows in (("full", [*forget, *retain]), ("retain", retain)):
        if not (output / name).exists():
            model, tokenizer = load_pretrained(str(output / "pretrained"))
            loss = teach(model, tokenizer, rows, epochs=given.teach_epochs, dtype=dtype)
            print(f"{name}: {len(rows)} rows learned to {loss:.3f} nats per token")
            save(model, tokenizer, output / name)
    kept = output / "retain.jsonl"
    save_rows(kept, retain)
    resume = ["--resume"] if (output / "map" / "lab.json").exists() else []
    files = ["--forget", given.forget, "--retain", str(kept), "--model", str(output / "full")]
    return fastbound(["lab", *files, "--output", str(output / "map"), *resume, *others])


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as JSON lines."""
    lines = (json.dumps({"question": row.question, "answer": row.answer}) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
