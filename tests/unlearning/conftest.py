"""A tiny Llama with a tokenizer of its own words, and rows of every benchmark's columns for it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fastbound.unlearning import (
    Row,
    UnlearnConfig,
    UnlearnResult,
    authors,
    load_rows,
    unlearn,
)
from fastbound.unlearning.demo.small_model import learn
from fastbound.unlearning.model import load_pretrained
from fastbound.unlearning.training import loop
from tests.support.arguments import replaced
from tests.support.small_model import TINY_MODEL


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
    learned = learn([*forget_rows, *retain_rows], TINY_MODEL, progress=False)
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
def unlearn_rows(
    new_model: Callable[[], nn.Module],
    tokenizer: Any,
    forget_rows: list[Row],
    retain_rows: list[Row],
) -> Callable[..., UnlearnResult]:
    """A run over the small rows, of a model made anew unless one is given."""

    def run(config: UnlearnConfig, model: nn.Module | None = None, **options: Any) -> UnlearnResult:
        model = model or new_model()
        return unlearn(
            model, tokenizer, forget_rows, retain_rows, config, progress=False, **options
        )

    return run


def write(path: Path, rows: Iterable[Row | Mapping[str, Any]]) -> Path:
    """Rows, or any records, as JSON lines."""
    records = (
        {"question": row.question, "answer": row.answer} if isinstance(row, Row) else row
        for row in rows
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def stopped_after(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int], AbstractContextManager[None]]:
    """Within this context a run is stopped by Ctrl-C after so many steps."""
    step = loop._Run._take_step

    @contextmanager
    def stopped(steps: int) -> Iterator[None]:
        def stopping(run: loop._Run) -> None:
            if run.step == steps:
                raise KeyboardInterrupt
            step(run)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop._Run, "_take_step", stopping)
            yield

    return stopped


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Iterable[Row | Mapping[str, Any]]], Path]:
    """Writes rows, or any records, as JSON lines and returns the path."""
    return lambda name, rows: write(tmp_path / name, rows)


@pytest.fixture(scope="session")
def evaluation_data(
    forget_rows: list[Row], retain_rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folders tofu, muse and tdec: 4 forget rows, 3 of every other kind; 2 sequences of TDEC."""
    folder = tmp_path_factory.mktemp("data")
    forget, retain = forget_rows[:4], retain_rows[:3]
    for split, rows, wrong in (
        ("forget10_perturbed", forget, 5),
        ("retain_perturbed", retain, 5),
        ("real_authors_perturbed", retain, 3),
        ("world_facts_perturbed", retain, 3),
    ):
        reworded = {"paraphrased_answer": "Well, {}"} if wrong == 5 else {}
        write(
            folder / "tofu" / f"{split}.jsonl",
            [
                {
                    "question": row.question,
                    "answer": row.answer,
                    "perturbed_answer": ["It is", "No", "It is", "No", "He"][:wrong],
                    **{name: text.format(row.answer) for name, text in reworded.items()},
                }
                for row in rows
            ],
        )
    for side, rows in (("forget", forget), ("retain", retain)):
        write(folder / f"muse/knowmem/{side}_qa.jsonl", rows)
        write(folder / f"muse/knowmem/{side}_qa_icl.jsonl", rows[:1])
    verbatim = [{"prompt": row.question, "gt": row.answer} for row in forget]
    write(folder / "muse/verbmem/forget.jsonl", verbatim)
    for side, rows in (("forget", forget), ("holdout", retain)):
        texts = [f"Question: {row.question}\nAnswer: {row.answer}" for row in rows]
        write(folder / f"muse/privleak/{side}.jsonl", [{"text": text} for text in texts])
    _write_tdec(folder / "tdec", forget, retain)
    return folder


def _write_tdec(folder: Path, forget: list[Row], retain: list[Row]) -> None:
    """As the original repository: data/main, and two of the validation sets."""
    for name in ("data/main", "validation_data"):
        (folder / name).mkdir(parents=True)
    with (folder / "data/main/two.csv").open("w", newline="") as file:
        rows = [[i, "made up", row.answer] for i, row in enumerate(forget[:2])]
        csv.writer(file).writerows([["doc_id", "corpus", "text"], *rows])
    with (folder / "validation_data/lambada.csv").open("w", newline="") as file:
        texts = [[i, f"Question: {r.question}\nAnswer: {r.answer}"] for i, r in enumerate(retain)]
        csv.writer(file).writerows([["id", "text"], *texts])
    dialogues = {"text": {str(i): [row.question, row.answer] for i, row in enumerate(retain)}}
    (folder / "validation_data/wizard_of_wikipedia.json").write_text(json.dumps(dialogues))


@pytest.fixture(scope="session")
def evaluate_arguments(model_folder: Path, evaluation_data: Path) -> Callable[..., list[str]]:
    """The command that evaluates the model on one of the benchmarks into a folder."""

    def make(which: str, output: Path, *more: str) -> list[str]:
        split = ("--split", "data/main/two", "--n", "2") if which == "tdec" else ()
        base = [
            *("evaluate", "--benchmark", which, "--model", str(model_folder)),
            *("--data", str(evaluation_data / which), "--output", str(output)),
            *("--batch-size", "3", "--device", "cpu", *split),
        ]
        return replaced(base, *more)

    return make
