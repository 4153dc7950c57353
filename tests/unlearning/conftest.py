"""A tiny Llama with a tokenizer of its own words, in memory and as a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fastbound.unlearning import Row, authors, load_rows
from fastbound.unlearning.lab import LabConfig, learn
from fastbound.unlearning.pretrained import load_pretrained

TINY = LabConfig(
    hidden_size=32,
    intermediate_size=48,
    heads=2,
    vocabulary=400,
    lr=1e-2,
    batch_size=5,
    known_loss=0.2,
)


@pytest.fixture(scope="session")
def forget_rows() -> list[Row]:
    return load_rows(authors("forget"))[:6]


@pytest.fixture(scope="session")
def retain_rows() -> list[Row]:
    return load_rows(authors("retain"))[:9]


@pytest.fixture(scope="session")
def model_folder(
    forget_rows: list[Row], retain_rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model that has learned the rows, with dropout, so that random state matters."""
    learned = learn([*forget_rows, *retain_rows], TINY, progress=False)
    assert learned.loss < 0.2
    learned.model.config.attention_dropout = 0.1
    folder = tmp_path_factory.mktemp("model")
    learned.model.save_pretrained(folder)
    learned.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    return load_pretrained(str(model_folder))[1]


@pytest.fixture
def new_model(model_folder: Path) -> Callable[[], nn.Module]:
    """Loads the same model anew each time."""
    return lambda: load_pretrained(str(model_folder))[0]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Iterable[Row | Mapping[str, Any]]], Path]:
    """Writes rows, or any records, as JSON lines and returns the path."""

    def write(name: str, rows: Iterable[Row | Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        records = (
            {"question": row.question, "answer": row.answer} if isinstance(row, Row) else row
            for row in rows
        )
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
