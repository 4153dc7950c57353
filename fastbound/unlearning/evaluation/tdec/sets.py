"""TDEC's validation sets: what a model should still be able to do after it has forgotten.

Jang et al. 2023, `validation_data/` of their repository: texts (pile, wikitext), completions
(lambada), choices (pubmed_qa) and four sets of dialogues. The other choices come from the hub
there; here they are files with the hub's columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.unlearning.data.files import SUFFIXES
from fastbound.unlearning.data.records import file_of
from fastbound.unlearning.data.rows import Row, read_records, text_field, texts_field
from fastbound.unlearning.evaluation.tdec.dialogues import read_dialogues

Record = Mapping[str, Any]
Choice = tuple[str, tuple[str, ...], int]  # question, choices, place of the right one

TEXTS = ("pile", "wikitext")
COMPLETIONS = ("lambada",)
DIALOGUES = (
    "wizard_of_wikipedia",
    "empathetic_dialogues",
    "blended_skill_talk",
    "wizard_of_internet",
)
FOLDER = "validation_data"  # the original repository's name for it


@dataclass(frozen=True)
class ChoiceRow(Row):
    """A question with several answers, of which `answer` is the right one.

    Attributes:
        choices: every answer, as it is appended to the question.
        right: place of the right one.
    """

    choices: tuple[str, ...] = ()
    right: int = 0


def find(data: str | Path | None) -> dict[str, Path]:
    """The files of the `SETS` that the folder, or its `validation_data`, holds; of None none."""
    found: dict[str, Path] = {}
    if data is None:
        return found
    for name in SETS:
        for folder in (Path(data), Path(data) / FOLDER):
            for suffix in _suffixes(name):
                if name not in found and (folder / f"{name}{suffix}").is_file():
                    found[name] = folder / f"{name}{suffix}"
    return found


def load(name: str, data: str | Path) -> list[Row]:
    """Rows of one of `SETS` in the folder `data` or its `validation_data`, as `read` gives them."""
    return read(name, find(data).get(name) or file_of("tdec", name, data, _suffixes(name)))


def read(name: str, path: Path) -> list[Row]:
    """Rows of the set `name` in the file `path`.

    A text is a row's `answer`. A completion has all but its last word as `question`, that word as
    `answer`; a dialogue the prompt, and the last turn. Choices are `ChoiceRow`.

    Raises:
        InputError: the file is missing or malformed, or a row does not have the fields of its set.
    """
    if name in DIALOGUES:
        return read_dialogues(path)
    if name in TEXTS:
        return [Row(None, text_field(r, "text", where), where) for where, r in read_records(path)]
    if name in COMPLETIONS:
        return [_completion(record, where) for where, record in read_records(path)]
    rows = [_choice(CHOICES[name](record, where), where) for where, record in read_records(path)]
    # As there: the few questions of ARC with three choices or five are left out.
    return [row for row in rows if not name.startswith("ARC") or len(row.choices) == 4]


def _choice(choice: Choice, where: str) -> ChoiceRow:
    question, choices, right = choice
    return ChoiceRow(question, choices[right], where, choices, right)


def _suffixes(name: str) -> tuple[str, ...]:
    return (".json",) if name in DIALOGUES else SUFFIXES


def _completion(record: Record, where: str) -> Row:
    before, _, word = text_field(record, "text", where).rpartition(" ")
    if not before.strip() or not word.strip():
        raise InputError(f"{where}: field 'text' must be words of which the last is to be guessed")
    return Row(before, f" {word}", where)


def _pubmed_qa(record: Record, where: str) -> Choice:
    decisions = ("yes", "maybe", "no")
    abstract, question = (text_field(record, name, where) for name in ("abstract", "question"))
    return (
        f"Context: {abstract}\nQuestion: {question}\nAnswer:",
        _spaced(decisions),
        _place(record, "final_decision", decisions, where),
    )


def _piqa(record: Record, where: str) -> Choice:
    choices = _spaced([text_field(record, name, where) for name in ("sol1", "sol2")])
    return text_field(record, "goal", where), choices, _place(record, "label", range(2), where)


def _copa(record: Record, where: str) -> Choice:
    choices = _spaced([text_field(record, name, where) for name in ("choice1", "choice2")])
    return text_field(record, "premise", where), choices, _place(record, "label", range(2), where)


def _hellaswag(record: Record, where: str) -> Choice:
    endings = texts_field(record, "endings", where)
    right = _place(record, "label", range(len(endings)), where)
    return text_field(record, "ctx", where), _spaced(endings), right


def _arc(record: Record, where: str) -> Choice:
    choices = record.get("choices")
    if not isinstance(choices, Mapping):
        raise InputError(f"{where}: field 'choices' must have 'text' and 'label', got {choices!r}")
    texts, labels = (texts_field(choices, name, where) for name in ("text", "label"))
    if len(texts) != len(labels):
        raise InputError(f"{where}: field 'choices' has {len(texts)} texts, {len(labels)} labels")
    right = _place(record, "answerKey", labels, where)
    return text_field(record, "question", where), _spaced(texts), right


def _winogrande(record: Record, where: str) -> Choice:
    parts = text_field(record, "sentence", where).split(" _")
    if len(parts) != 2:
        raise InputError(f"{where}: field 'sentence' must hold one ' _', got {len(parts) - 1}")
    options = [text_field(record, name, where) + parts[1] for name in ("option1", "option2")]
    return parts[0], _spaced(options), _place(record, "answer", (1, 2), where)


def _math_qa(record: Record, where: str) -> Choice:
    # "a ) 38 , b ) 27 , ... , e ) none": an option ends at its first ", ", the last at the end.
    options = text_field(record, "options", where)
    found = re.findall(r"[abcd] \) (.*?), |e \) (.*)$", options)
    choices = tuple((first or last).rstrip(" ,") for first, last in found)
    right = _place(record, "correct", "abcde"[: len(choices)], where)
    return text_field(record, "Problem", where), choices, right


# Name -> how a record becomes a question, its choices and the place of the right one.
CHOICES: Mapping[str, Callable[[Record, str], Choice]] = {
    "pubmed_qa": _pubmed_qa,
    "hellaswag": _hellaswag,
    "winogrande_s": _winogrande,
    "copa": _copa,
    "ARC-Easy": _arc,
    "ARC-Challenge": _arc,
    "piqa": _piqa,
    "math_qa": _math_qa,
}
SETS = (*TEXTS, *COMPLETIONS, *CHOICES, *DIALOGUES)


def _spaced(choices: Sequence[str]) -> tuple[str, ...]:
    return tuple(f" {choice}" for choice in choices)


def _place(record: Record, name: str, known: Sequence[object], where: str) -> int:
    names = [str(each) for each in known]
    if str(record.get(name)) not in names:
        raise InputError(
            f"{where}: field {name!r} must be one of {', '.join(names)}; got {record.get(name)!r}"
        )
    return names.index(str(record[name]))
