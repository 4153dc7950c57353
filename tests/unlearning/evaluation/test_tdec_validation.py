"""TDEC's validation sets: rows of each schema, what is refused, and scores by the definition."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tokenizers import processors

from fastbound.unlearning import InputError, metrics
from fastbound.unlearning.evaluation import load
from fastbound.unlearning.evaluation.session import Pieces, Session
from fastbound.unlearning.evaluation.tdec import sets, validation
from fastbound.unlearning.evaluation.tdec.dialogues import dialogue_prompt, normalise_reply

DIALOGUE = ["hi there", "Hello ! I'm Ann . you ?", "bo"]
ARC = {"question": "Why?", "choices": {"text": ["a", "b", "c", "d"], "label": [*"ABCD"]}}
# Set -> a record, as the original's file or the hub's column has it; question, choices, right.
CHOICES = {
    "pubmed_qa": (
        {"pubid": "1", "question": "Is it?", "abstract": "It is.", "final_decision": "maybe"},
        ("Context: It is.\nQuestion: Is it?\nAnswer:", (" yes", " maybe", " no"), 1),
    ),
    "piqa": (
        {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
        ("Open it", (" pull", " push"), 1),
    ),
    "copa": (
        {"premise": "It rained", "choice1": "dry", "choice2": "wet", "label": 1},
        ("It rained", (" dry", " wet"), 1),
    ),
    "hellaswag": (
        {"ctx": "He runs", "endings": ["away", "home", "dry", "up"], "label": "2"},
        ("He runs", (" away", " home", " dry", " up"), 2),
    ),
    "winogrande_s": (
        {"sentence": "Ann saw that _ ran.", "option1": "Bo", "option2": "Cy", "answer": "2"},
        ("Ann saw that", (" Bo ran.", " Cy ran."), 1),
    ),
    "ARC-Easy": ({**ARC, "answerKey": "C"}, ("Why?", (" a", " b", " c", " d"), 2)),
    "ARC-Challenge": ({**ARC, "answerKey": "D"}, ("Why?", (" a", " b", " c", " d"), 3)),
    "math_qa": (
        {
            "Problem": "1 + 1 = ?",
            "options": "a ) 1 , b ) rs . 2 , c ) 3 , d ) 4 , e ) none of these",
            "correct": "b",
        },
        ("1 + 1 = ?", ("1", "rs . 2", "3", "4", "none of these"), 1),
    ),
}


def write(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_dialogues(path, *dialogues):
    path.write_text(json.dumps({"text": {str(i): turns for i, turns in enumerate(dialogues)}}))


def test_texts_and_completions(tmp_path):
    folder = tmp_path / "validation_data"
    folder.mkdir()
    (folder / "pile.csv").write_text('doc_id,text,corpus\n7,"one, two",Pile-CC\n')
    (folder / "wikitext.csv").write_text(",text\n0, = One = \n")
    (folder / "lambada.csv").write_text('id,token_length,text,task\n0,3,"A b\nc d",lambada\n')
    for name, question, answer in (
        ("pile", None, "one, two"),
        ("wikitext", None, " = One = "),
        ("lambada", "A b\nc", " d"),
    ):
        (row,) = load("tdec", name, tmp_path)
        assert (row.question, row.answer, row.where) == (
            question,
            answer,
            f"{folder / name}.csv, row 1",
        )
    assert set(sets.find(tmp_path)) == {"pile", "wikitext", "lambada"}


@pytest.mark.parametrize("name", list(CHOICES))
def test_choices(tmp_path, name):
    record, (question, choices, right) = CHOICES[name]
    write(tmp_path / f"{name}.jsonl", record)
    (row,) = load("tdec", name, tmp_path)
    assert (row.question, row.choices, row.right) == (question, choices, right)
    assert row.answer == choices[right]


def test_every_set_is_known_and_tested():
    dialogues = {"wizard_of_wikipedia", "empathetic_dialogues"}
    dialogues |= {"blended_skill_talk", "wizard_of_internet"}
    assert set(sets.SETS) == {"pile", "wikitext", "lambada", *CHOICES, *dialogues}


def test_questions_of_arc_without_four_choices_are_left_out(tmp_path):
    three = {"question": "Who?", "choices": {"text": [*"abc"], "label": [*"123"]}, "answerKey": "3"}
    write(tmp_path / "ARC-Easy.jsonl", three, {**ARC, "answerKey": "A"})
    assert [row.question for row in load("tdec", "ARC-Easy", tmp_path)] == ["Why?"]


def test_dialogues(tmp_path):
    write_dialogues(tmp_path / "wizard_of_internet.json", DIALOGUE, ["hi", "no more"])
    first, second = load("tdec", "wizard_of_internet", tmp_path)
    assert first.question == "User 1: Hi there.\nUser 2: Hello! I'm ann. You?\nUser 1:"
    assert (first.answer, second.answer) == ("Bo.", "No more.")
    assert second.where == f"{tmp_path / 'wizard_of_internet.json'}, dialogue 1"


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("I LIKE it", "I like it."),
        ("so i do, and i'm glad  , too !", "So I do, and I'm glad, too!"),
        ("yes. no? maybe! (all)", "Yes. No? Maybe! (all)"),
        ("what?", "What?"),
        ('he said "no"', 'He said "no"'),
        ("don't", "Don't."),
        (" a leading blank is no sentence start", "a leading blank is no sentence start."),
        ("", ""),
        ("   ", ""),
    ],
)
def test_a_reply_is_written_as_the_original_does(said, written):
    assert normalise_reply(said) == written


def test_the_prompt_ends_with_whose_turn_it_is():
    assert dialogue_prompt(["a"]).splitlines() == ["User 1: A.", "User 2:"]
    assert dialogue_prompt(["a", "b"]).splitlines()[2] == "User 1:"


@pytest.mark.parametrize(
    ("expected", "generated", "f1"),
    [
        ("The cat sat.", "a cat sat down", 0.8),
        ("no, no! Yes", "no", 0.5),
        ("don't", "DONT", 1.0),
        ("cat", "dog", 0.0),
        ("the", "", 0.0),
    ],
)
def test_unigram_f1_by_hand(expected, generated, f1):
    assert metrics.unigram_f1(expected, generated) == pytest.approx(f1, rel=1e-15)
    assert metrics.exact_match(expected, generated) == (f1 == 1 or expected == "the")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pubmed_qa", {"abstract": None}, "field 'abstract' is null"),
        ("pubmed_qa", {"final_decision": "so"}, "'final_decision' must be one of yes, maybe, no"),
        ("piqa", {"label": 2}, "field 'label' must be one of 0, 1; got 2"),
        ("piqa", {"sol2": " "}, "field 'sol2' is empty"),
        ("copa", {"premise": 3}, "field 'premise' must be text, got int"),
        ("hellaswag", {"endings": "away"}, "field 'endings' must be a list of texts, got 'away'"),
        ("hellaswag", {"label": ""}, "field 'label' must be one of 0, 1, 2, 3; got ''"),
        ("winogrande_s", {"sentence": "Ann ran."}, "field 'sentence' must hold one ' _', got 0"),
        ("ARC-Easy", {"choices": ["a"]}, "field 'choices' must have 'text' and 'label'"),
        (
            "ARC-Easy",
            {"choices": {"text": ["a"], "label": ["A", "B"]}},
            "'choices' has 1 texts, 2 labels",
        ),
        ("ARC-Easy", {"answerKey": "E"}, "field 'answerKey' must be one of A, B, C, D; got 'E'"),
        ("math_qa", {"options": "1 or 2"}, "field 'correct' must be one of ; got 'b'"),
        ("math_qa", {"correct": "f"}, "field 'correct' must be one of a, b, c, d, e; got 'f'"),
    ],
)
def test_a_bad_record_is_named_by_file_row_and_field(tmp_path, name, change, message):
    record, _ = CHOICES[name]
    path = tmp_path / f"{name}.jsonl"
    write(path, record, {**record, **change})
    with pytest.raises(InputError, match=message) as caught:
        load("tdec", name, tmp_path)
    assert f"{path}, row 2: " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pile.csv", "doc_id,corpus\n1,Books3\n", r"pile.csv, row 1: field 'text' is missing"),
        ("lambada.csv", "text\nword\n", r"row 1: field 'text' must be words"),
        ("lambada.csv", "text\ntwo words \n", r"row 1: field 'text' must be words"),
        ("wizard_of_internet.json", "{", r"wizard_of_internet.json, line 1: not JSON"),
        ("wizard_of_internet.json", "[]", r'\{"text": \{id: \[turn, turn, ...\]\}\} is needed'),
        ("wizard_of_internet.json", '{"text": {}}', "is needed"),
        ("wizard_of_internet.json", '{"text": {"a": ["hi"]}}', r"dialogue a: a list of two turns"),
        ("wizard_of_internet.json", '{"text": {"a": ["hi", 3]}}', r"dialogue a: turn 2 must be"),
        ("wizard_of_internet.json", '{"text": {"a": ["hi", " "]}}', r"dialogue a: turn 2 is empty"),
    ],
)
def test_a_bad_file_is_named_by_file_and_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load("tdec", name.partition(".")[0], tmp_path)


def test_a_set_that_is_not_there_lists_what_is(tmp_path):
    write_dialogues(tmp_path / "wizard_of_internet.json", DIALOGUE)
    with pytest.raises(InputError, match=r"has no file blended_skill_talk .* wizard_of_internet"):
        load("tdec", "blended_skill_talk", tmp_path)


def answered(row) -> str:
    return f"Question: {row.question}\nAnswer:"


@pytest.fixture(scope="module")
def folder(forget_rows, retain_rows, tmp_path_factory):
    """What the model has learned, as sets of each kind."""
    folder = tmp_path_factory.mktemp("sets")
    texts = [f"{answered(row)} {row.answer}" for row in forget_rows]
    write(folder / "pile.jsonl", *({"text": text} for text in texts))
    write(folder / "lambada.jsonl", *({"text": text.rstrip(".")} for text in texts))
    write(
        folder / "piqa.jsonl",
        *(
            {"goal": answered(row), "sol1": "By the sea, it is.", "sol2": row.answer, "label": 1}
            for row in forget_rows
        ),
    )
    dialogues = [[row.question, row.answer] for row in retain_rows[:3]]
    write_dialogues(folder / "blended_skill_talk.json", *dialogues, [*dialogues[0], "what ?"])
    return folder


@pytest.fixture(scope="module")
def scored(folder, model_folder, tokenizer):
    from fastbound.unlearning.model import load_pretrained

    model = load_pretrained(str(model_folder))[0].eval()
    session = Session(model, tokenizer, 4, Pieces(), progress=False)
    prepared = validation.prepare(folder, tokenizer)
    log = validation.score(session, prepared)
    return model, log, validation.summarise(log)


@torch.no_grad()
def log_probabilities(model, ids):
    """[tokens after the first, vocabulary], of one row alone."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1)


def continuation(model, tokenizer, question, answer):
    """Summed loss of the answer's tokens, the first choices at their places, the tokens."""
    before = tokenizer(question)["input_ids"]
    after = tokenizer(answer, add_special_tokens=False)["input_ids"]
    scores = log_probabilities(model, before + after)[-len(after) :]
    loss = -sum(scores[i, token].item() for i, token in enumerate(after))
    return loss, scores.argmax(-1).tolist(), after


def test_texts_are_scored_by_their_mean_token_loss(scored, folder, tokenizer):
    model, log, summary = scored
    losses = []
    for i, row in enumerate(load("tdec", "pile", folder)):
        ids = tokenizer(row.answer)["input_ids"]
        own = -log_probabilities(model, ids)[range(len(ids) - 1), ids[1:]]
        assert log["pile"]["loss"][i] == pytest.approx(own.mean().item(), rel=1e-5)
        losses += own.tolist()
    mean = sum(losses) / len(losses)
    assert summary["pile"]["loss"] == pytest.approx(mean, rel=1e-5)
    assert summary["pile"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_completions_are_scored_by_the_first_choices_for_the_last_word(scored, folder, tokenizer):
    model, log, summary = scored
    correct = []
    for i, row in enumerate(load("tdec", "lambada", folder)):
        loss, chosen, after = continuation(model, tokenizer, row.question, row.answer)
        assert log["lambada"]["loss"][i] == pytest.approx(loss, rel=1e-4, abs=1e-5)
        text = tokenizer.decode(chosen).strip()
        correct.append(chosen == after or metrics.exact_match(row.answer, text))
        assert log["lambada"]["f1"][i] == metrics.unigram_f1(row.answer, text)
        assert log["lambada"]["generated_text"][i] == [text, row.answer.strip()]
    assert log["lambada"]["correct"] == correct
    assert summary["lambada"]["accuracy"] == sum(correct) / len(correct) > 0.5


def test_choices_are_scored_by_their_summed_loss(scored, folder, tokenizer):
    model, log, summary = scored
    for i, row in enumerate(load("tdec", "piqa", folder)):
        losses = [continuation(model, tokenizer, row.question, choice)[0] for choice in row.choices]
        assert log["piqa"]["choice_loss"][i] == pytest.approx(losses, rel=1e-4)
        assert log["piqa"]["correct"][i] == (losses[1] < losses[0])
    assert summary["piqa"] == {"rows": 6, "accuracy": 1.0}


def test_dialogues_are_scored_by_the_words_of_the_generated_turn(scored, folder, tokenizer):
    model, log, summary = scored
    found = log["blended_skill_talk"]
    for i, row in enumerate(load("tdec", "blended_skill_talk", folder)):
        loss, _, after = continuation(model, tokenizer, row.question, row.answer)
        assert found["loss"][i] * found["tokens"][i] == pytest.approx(loss, rel=1e-4)
        assert found["tokens"][i] == len(after)
        ids, new = tokenizer(row.question)["input_ids"], []
        while len(new) < 32:  # a whole forward a token
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(new, skip_special_tokens=True).split("\nUser ")[0]
        assert found["generated_text"][i] == [text, row.answer]
        assert found["f1"][i] == metrics.unigram_f1(row.answer, text)
    mean = sum(found["f1"]) / 4
    assert summary["blended_skill_talk"]["f1"] == pytest.approx(mean, rel=1e-12)


def test_a_reply_ends_where_the_next_turn_begins():
    from fastbound.unlearning.evaluation.generation import until

    assert until(" I do.\nUser 1: And", ("\nUser ",)) == " I do."


def test_a_beginning_of_text_stands_before_the_question_alone(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    begin = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, begin)]
    )
    write(tmp_path / "piqa.jsonl", CHOICES["piqa"][0])
    for row in validation.prepare(tmp_path, tokenizer)["piqa"].scored:
        assert row.ids[0] == begin and begin not in row.ids[1:]


def test_what_is_too_long_is_cut_as_the_original_does(tokenizer, monkeypatch, tmp_path):
    """Question and answer to their first tokens each, both together to the last ones."""
    monkeypatch.setattr(validation, "MAX_LENGTH", 8)
    record = {"goal": "a b c d e f g h i j", "sol1": "k l m", "sol2": "n", "label": 0}
    write(tmp_path / "piqa.jsonl", record)
    first, second = validation.prepare(tmp_path, tokenizer)["piqa"].scored
    before = tokenizer("a b c d e f g h i j")["input_ids"][:8]
    after = tokenizer(" k l m", add_special_tokens=False)["input_ids"][:8]
    assert list(first.ids) == (before + after)[-8:]
    labelled = min(len(after), 7)  # nothing predicts the first of all
    assert list(first.labels) == [-100] * (8 - labelled) + list(first.ids)[-labelled:]
    assert second.ids[-1] == tokenizer(" n", add_special_tokens=False)["input_ids"][-1]
