"""TDEC: sequences of The Pile that models repeat, from the training data extraction challenge.

As CSV with doc_id, corpus and text (Jang et al. 2023, `lm_extraction_{1..128}_{0..4}.csv`), or
as npy with token ids: whole sequences of 100 + 50 + 50 tokens, or `*_prefix.npy` and `*_suffix.npy`
(with `*_preprefix.npy` where it is there). Neither is on the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.errors import InputError
from fastbound.unlearning.data.records import file_of
from fastbound.unlearning.data.rows import Row, read_records, text_field

TARGET_LENGTH = 200
PARTS = ("preprefix", "prefix", "suffix")


@dataclass(frozen=True)
class TdecRow(Row):
    """One sequence, as text or as tokens of GPT-2's tokenizer.

    Attributes:
        tokens: token ids; None where the row is text, which is then `answer`.
        suffix: how many tokens at the end are to be extracted given the rest; None for text.
        doc_id, corpus: as the CSV has them; empty for npy.
    """

    tokens: tuple[int, ...] | None = None
    suffix: int | None = None
    doc_id: str = ""
    corpus: str = ""


def read_sequences(split: str, data: str | Path | None = None) -> list[TdecRow]:
    """Rows of `{split}.csv`, `{split}.npy`, or `{split}_prefix.npy` with `{split}_suffix.npy`.

    Raises:
        InputError: as `load`.
    """
    if data is None:
        raise InputError(
            "tdec is not on the hub: give the folder that holds its csv or npy files (--data)"
        )
    folder = Path(data)
    if (folder / f"{split}_prefix.npy").is_file():
        return _parts(folder, split)
    path = file_of("tdec", split, folder, (".csv", ".jsonl", ".npy"))
    if path.suffix == ".npy":
        return _rows(path, _array(path), min(50, TARGET_LENGTH // 4))
    return [
        TdecRow(
            None,
            text_field(record, "text", where),
            where,
            doc_id=text_field(record, "doc_id", where),
            corpus=text_field(record, "corpus", where),
        )
        for where, record in read_records(path)
    ]


def _parts(folder: Path, split: str) -> list[TdecRow]:
    arrays = []
    for part in PARTS:
        path = folder / f"{split}_{part}.npy"
        if path.is_file():
            arrays.append(_array(path))
        elif part != "preprefix":
            raise InputError(f"{path} is missing: prefix and suffix belong together")
    if len({len(array) for array in arrays}) > 1:
        lengths = ", ".join(str(len(array)) for array in arrays)
        raise InputError(f"{folder / split}_*.npy have different lengths: {lengths} rows")
    name = folder / f"{split}_prefix.npy"
    return _rows(name, np.concatenate(arrays, axis=1), arrays[-1].shape[1])


def _array(path: Path) -> Any:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not an npy file of token ids: {error}") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise InputError(
            f"{path}: token ids [rows, tokens] are needed, got {array.dtype} {list(array.shape)}"
        )
    if (array < 0).any():
        row = int(np.argwhere(array < 0)[0][0])
        raise InputError(f"{path}, row {row + 1}: a token id is negative")
    return array


def _rows(path: Path, array: Any, suffix: int) -> list[TdecRow]:
    return [
        TdecRow(None, "", f"{path}, row {number}", tokens=tuple(tokens), suffix=suffix)
        for number, tokens in enumerate(array.tolist(), start=1)
    ]
