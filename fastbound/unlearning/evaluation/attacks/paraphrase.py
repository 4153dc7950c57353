"""Paraphrase: the forget rows asked, and answered, in other words than those that were unlearned.

TOFU's perturbed splits hold `paraphrased_question`, `paraphrased_answer` and `perturbed_answer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastbound.errors import InputError
from fastbound.unlearning.data.encoding import Encoded
from fastbound.unlearning.data.rows import Row, text_field, texts_field
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.evaluation.attacks.subject import (
    BEFORE,
    REFERENCE,
    UNLEARNED,
    Records,
    Subject,
    as_dict,
    percent,
    recovered,
)
from fastbound.unlearning.evaluation.picture import BLUE, GREY, LEGEND, RED

NAME = "paraphrase"
FIELDS = ("paraphrased_question", "paraphrased_answer")
_COLOURS = {UNLEARNED: RED, BEFORE: BLUE, REFERENCE: GREY}


def forms(records: Records) -> dict[str, list[Row]]:
    """The rows as they stand, and by every field in which all of them have other words.

    Raises InputError where they have none, naming what they have.
    """
    if not any(field in record for _, record in records for field in FIELDS):
        where, record = records[0]
        raise InputError(
            f"{where}: attack paraphrase needs {' or '.join(map(repr, FIELDS))}, as in TOFU's "
            f"perturbed splits; found {', '.join(map(repr, record))}"
        )
    found: dict[str, list[Row]] = {
        "as unlearned": [
            Row(text_field(r, "question", where), text_field(r, "answer", where), where)
            for where, r in records
        ]
    }
    for name, fields in {
        "question in other words": ("paraphrased_question", "answer"),
        "answer in other words": ("question", "paraphrased_answer"),
        "both in other words": FIELDS,
    }.items():
        if all(field in record for _, record in records for field in fields):
            found[name] = [
                Row(text_field(r, fields[0], where), text_field(r, fields[1], where), where)
                for where, r in records
            ]
    return found


def check(subject: Subject, records: Records) -> None:
    """Raise InputError for rows without other words, and for any that cannot be encoded."""
    for each in (*forms(records).values(), *wrong_answers(records)):
        subject.encode(each)


def wrong_answers(records: Records) -> list[list[Row]]:
    """The wrong answers of each row; none where a row has none."""
    if not all("perturbed_answer" in record for _, record in records):
        return []
    return [
        [Row(text_field(r, "question", where), text, where)
         for text in texts_field(r, "perturbed_answer", where)]
        for where, r in records
    ]  # fmt: skip


def run(
    subject: Subject,
    rows: Mapping[str, Sequence[Encoded]],
    records: Records,
) -> dict[str, Any]:
    """Every form of the forget rows, of each model there is.

    Args:
        records: those of the forget rows.

    Raises InputError for rows without other words.
    """
    records = evenly(records, subject.config.rows)
    encoded = {name: subject.encode(each) for name, each in forms(records).items()}
    wrong = [subject.encode(each) for each in wrong_answers(records)]
    every = [row for each in (*encoded.values(), *wrong) for row in each]
    scores, preferred = {}, {}
    for name in (UNLEARNED, BEFORE, REFERENCE):
        if name in subject.models:
            model = subject.load(name, every)
            scores[name] = {form: subject.score(model, each) for form, each in encoded.items()}
            if wrong:
                right = encoded.get("answer in other words", encoded["as unlearned"])
                preferred[name] = _prefers(subject, model, right, wrong)
    base = scores[UNLEARNED]["as unlearned"]
    known = scores.get(BEFORE)
    return {
        "measured": len(records),
        "models": [
            {
                "model": name,
                "form": form,
                **as_dict(
                    score,
                    recovered(score, base, known["as unlearned"])
                    if name == UNLEARNED and known is not None
                    else None,
                ),
            }
            for name, by_form in scores.items()
            for form, score in by_form.items()
        ],
        "prefers_right": preferred,
        "wrong_answers": len(wrong[0]) if wrong else 0,
    }


def _prefers(
    subject: Subject,
    model: nn.Module,
    right: Sequence[Encoded],
    wrong: Sequence[Sequence[Encoded]],
) -> float:
    """The share of rows whose right answer is likelier, per token, than every wrong one."""
    best = iter(subject.losses(model, [row for each in wrong for row in each]))
    hits = [
        own < min(next(best) for _ in others)
        for own, others in zip(subject.losses(model, right), wrong, strict=True)
    ]
    return sum(hits) / len(hits)


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """Head and lines: a model and a form each."""
    found = [["model", "asked", "loss", "accuracy", "recovered"]]
    for each in result["models"]:
        found.append(
            [
                each["model"],
                each["form"],
                f"{each['loss']:.3f}",
                percent(each["accuracy"]),
                percent(each["recovered"]),
            ]
        )
    for name, share in result["prefers_right"].items():
        among = f"right above {result['wrong_answers']} wrong answers"
        found.append([name, among, "", percent(share), ""])
    return found


def draw(panel: Any, result: Mapping[str, Any]) -> None:
    """Accuracy by form and model."""
    names = list(dict.fromkeys(each["model"] for each in result["models"]))
    labels = list(dict.fromkeys(each["form"] for each in result["models"]))
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        each = {e["form"]: e["accuracy"] for e in result["models"] if e["model"] == name}
        panel.barh(
            [k + place * height for k in range(len(labels))],
            [each[form] for form in labels],
            height * 0.9,
            color=_COLOURS[name],
            label=name,
        )
    panel.set_yticks([k + (len(names) - 1) * height / 2 for k in range(len(labels))], labels)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.02)
    panel.set_title(f"Paraphrase: {result['measured']} forget rows")
    panel.set_xlabel("share of answer tokens right")
    panel.legend(**LEGEND)
