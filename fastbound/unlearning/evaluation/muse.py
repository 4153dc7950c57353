"""MUSE: news articles or books to forget, with questions, verbatim passages and held-out text.

Shi et al. 2024, `muse-bench/MUSE-News` and `muse-bench/MUSE-Books` on the hub. A split is
`corpus/config/split`, for example `news/verbmem/forget`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbound.unlearning.data.records import Records, check_split, file_of
from fastbound.unlearning.data.rows import SUFFIXES, Row, read_records, read_text, text_field

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
        data: folder of one corpus, or one that holds `news` and `books`, with `config/split.jsonl`
            and the like, or MUSE's own files: arrays in `config/split.json`, `raw/split.txt`. A
            .txt is one row, for it does not say where a text ends; None takes the hub.

    Raises:
        InputError: an unknown split, a missing file, or a row without the split's fields.
    """
    check_split("muse", split, SPLITS)
    corpus, config, name = split.split("/")
    if data is None:
        found = read_records(f"{HUB[corpus]}:{config}:{name}")
    else:
        found = _of_folder(Path(data), corpus, f"{config}/{name}")
    return [_row(record, config, where) for where, record in found]


def _of_folder(folder: Path, corpus: str, split: str) -> Records:
    if (folder / corpus).is_dir():
        folder = folder / corpus
    path = file_of("muse", split, folder, (*SUFFIXES, ".txt"))
    if path.suffix == ".txt":
        return [(str(path), {"text": read_text(path)})]
    return read_records(path)


def _row(record: Mapping[str, Any], config: str, where: str) -> Row:
    if config == "knowmem":
        question = text_field(record, "question", where)
        return Row(question, text_field(record, "answer", where), where)
    if config == "verbmem":
        prompt = text_field(record, "prompt", where)
        return Row(prompt, text_field(record, "gt", where), where)
    return Row(None, text_field(record, "text", where), where)
