"""MUSE: news articles or books to forget, with questions, verbatim passages and held-out text.

Shi et al. 2024, `muse-bench/MUSE-News` and `muse-bench/MUSE-Books` on the hub. A split is
`corpus/config/split`, for example `news/verbmem/forget`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbound.unlearning.benchmarks.records import check_split, records
from fastbound.unlearning.data import Row, text_field

HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
CORPORA = tuple(HUB)
_SUCCESSIVE = tuple(f"forget_{number}" for number in range(1, 5))
# Config -> its splits; the last two exist for news only.
CONFIGS: Mapping[str, tuple[str, ...]] = {
    "raw": ("forget", "retain1", "retain2", "holdout"),
    "verbmem": ("forget",),
    "knowmem": ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl"),
    "privleak": ("forget", "retain", "holdout"),
    "scal": _SUCCESSIVE,
    "sust": _SUCCESSIVE,
}
SPLITS = tuple(
    f"{corpus}/{config}/{split}"
    for corpus in CORPORA
    for config, splits in CONFIGS.items()
    if corpus == "news" or config not in ("scal", "sust")
    for split in splits
)


def load(split: str, data: str | Path | None = None) -> list[Row]:
    """Rows of one of `SPLITS`: question and answer, prompt and its true continuation, or text.

    A verbatim row has its prompt as `question` and its continuation (`gt`) as `answer`.

    Args:
        data: folder of one corpus with `config/split.jsonl` and the like; None takes the hub.

    Raises:
        InputError: an unknown split, a missing file, or a row without the split's fields.
    """
    check_split("muse", split, SPLITS)
    corpus, config, name = split.split("/")
    found = records("muse", f"{config}/{name}", data, f"{HUB[corpus]}:{config}:{name}")
    return [_row(record, config, where) for where, record in found]


def _row(record: Mapping[str, Any], config: str, where: str) -> Row:
    if config == "knowmem":
        question = text_field(record, "question", where)
        return Row(question, text_field(record, "answer", where), where)
    if config == "verbmem":
        prompt = text_field(record, "prompt", where)
        return Row(prompt, text_field(record, "gt", where), where)
    return Row(None, text_field(record, "text", where), where)
