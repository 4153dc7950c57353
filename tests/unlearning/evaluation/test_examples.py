"""Questions that are shown with the model's own answers before and after."""

from __future__ import annotations

import pytest

from fastbound.unlearning import UnlearnConfig
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.evaluation.examples import (
    answers,
    chosen,
    examples,
    examples_of,
    lines_of,
)

CONFIG = UnlearnConfig()


def test_a_model_that_knows_its_rows_answers_with_them(
    new_model, tokenizer, forget_rows, retain_rows
):
    rows = chosen(forget_rows, retain_rows)
    assert [len(each) for each in rows.values()] == [5, 5]
    found = answers(new_model(), tokenizer, rows, CONFIG)
    right = sum(
        answer.strip() == row.answer.strip()
        for side, each in rows.items()
        for row, answer in zip(each, found[side], strict=True)
    )
    assert right >= 9, found  # its loss is below 0.2 nats per token, not zero


def test_what_is_shown_is_each_question_with_both_answers(forget_rows, retain_rows):
    rows = chosen(forget_rows[:2], retain_rows[:1])
    before = {side: [row.answer for row in each] for side, each in rows.items()}
    after = {"forget": ["I do not know", "Nor this " + 40 * "word "], "retain": before["retain"]}
    held = examples(rows, before, after)
    assert [each["side"] for each in held] == ["forget", "forget", "retain"]
    assert held[0]["after"] == "I do not know" and held[0]["answer"] == forget_rows[0].answer
    shown = lines_of({"after": held})
    assert [line for line in shown if line.startswith("  W")]
    assert max(map(len, shown)) <= 100
    assert sum(line.startswith("    after:  ") for line in shown) == 3


def test_answers_after_several_runs_stand_below_one_question(forget_rows):
    rows = chosen(forget_rows[:2], [])
    before = {"forget": ["b1", "b2"], "retain": []}
    runs = {
        name: examples(rows, before, {"forget": [f"{name} 1", f"{name} 2"], "retain": []})
        for name in ("bounded", "LoRA")
    }
    said = [line.strip() for line in lines_of(runs)]
    at = said.index("before:  b2")
    assert said[at - 1].startswith(forget_rows[1].question[:20])
    assert said[at + 1 : at + 3] == ["bounded: bounded 2", "LoRA:    LoRA 2"]


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_the_answers_before_are_those_of_the_model_before(
    unlearn_rows, new_model, tokenizer, forget_rows, retain_rows, adapter
):
    rows = chosen(forget_rows, retain_rows)
    before = answers(new_model(), tokenizer, rows, CONFIG)
    result = unlearn_rows(UnlearnConfig(adapter=adapter, lr=0.1, epochs=4, rank=2, device="cpu"))
    held = examples_of(result, tokenizer, forget_rows, retain_rows)
    assert [each["before"] for each in held] == [*before["forget"], *before["retain"]]
    assert [each["after"] for each in held] != [each["before"] for each in held]


def test_rows_of_plain_text_are_not_asked(new_model, tokenizer):
    rows = chosen([Row(None, "A text.", "here")], [])
    assert rows == {"forget": [], "retain": []}
    assert answers(new_model(), tokenizer, rows, CONFIG) == {"forget": [], "retain": []}
    assert lines_of({"after": examples(rows, rows, rows)}) == []
