"""Rows: what is read, what is refused and in which words, and how they become tokens."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import normalizers

from fastbound.unlearning import InputError, Row, authors, collate, encode, load_rows
from fastbound.unlearning.data.encoding import IGNORED, encode_all
from fastbound.unlearning.data.rows import check_disjoint
from fastbound.unlearning.data.sampling import Pairing


def test_shipped_authors_are_twenty_with_ten_questions_and_two_to_forget():
    names = {}
    for split in ("forget", "retain"):
        lines = authors(split).read_text(encoding="utf-8").splitlines()
        names[split] = Counter(json.loads(line)["author"] for line in lines)
        assert set(names[split].values()) == {10}
        # The question names its author, so that what is to be forgotten is well defined.
        for line in map(json.loads, lines):
            assert line["author"] in line["question"]
    assert len(names["forget"]) == 2 and len(names["retain"]) == 18
    check_disjoint(load_rows(authors("forget")), load_rows(authors("retain")))


def test_reads_json_lines_csv_and_text(tmp_path: Path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"question": "Q?", "answer": "A.", "more": 1}\n\n{"text": "T"}\n')
    assert load_rows(lines) == [
        Row("Q?", "A.", f"{lines}, row 1"),
        Row(None, "T", f"{lines}, row 3"),
    ]
    table = tmp_path / "rows.csv"
    table.write_text('question,answer\nQ?,"A, and\nmore"\n')
    assert load_rows(str(table)) == [Row("Q?", "A, and\nmore", f"{table}, row 1")]


def test_reads_one_array_of_objects_or_of_texts(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(["T", {"question": "Q?", "answer": "A."}], indent=1))
    assert load_rows(path) == [
        Row(None, "T", f"{path}, row 1"),
        Row("Q?", "A.", f"{path}, row 2"),
    ]


def test_a_carriage_return_in_a_csv_belongs_to_its_text(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,n\none\rtwo,1\n"three\rfour\r\nfive",2\n')
    assert [row.answer for row in load_rows(path)] == ["one\rtwo", "three\rfour\r\nfive"]
    path.write_bytes(b"text,n\r\none,1\r\n")
    assert [row.answer for row in load_rows(path)] == ["one"]


def test_reads_a_data_set_by_id_config_and_split(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "Q?", "answer": "A."}\n')
    source = f"{folder}:default:train"
    assert load_rows(source) == [Row("Q?", "A.", f"{source}, row 1")]
    with pytest.raises(InputError, match=r"cannot load .*:default:test: .*check id, config, split"):
        load_rows(f"{folder}:default:test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", "", "holds no rows"),
        ("r.jsonl", "\n \n", "holds no rows"),
        ("r.jsonl", '{"question": "Q"}\n', "row 1: field 'answer' is missing"),
        ("r.jsonl", '{"text": "T"}\n{"answer": "A"}\n', "row 2: field 'question' is missing"),
        ("r.jsonl", '{"question": "Q", "answer": 3}\n', "row 1: field 'answer' must be text"),
        ("r.jsonl", '{"question": "Q", "answer": " "}\n', "row 1: field 'answer' is empty"),
        ("r.jsonl", '{"prompt": "Q"}\n', "row 1: needs 'question' and 'answer', or 'text'; found"),
        ("r.jsonl", '{"text": "T"}\n{"text": \n', "row 2: not JSON .*one object per line"),
        ("r.jsonl", "3\n", "row 1: expected a JSON object, got int"),
        ("r.json", "[]", "holds no rows"),
        ("r.json", '[{"text": "T"}, 3]', "row 2: expected an object or a text .*, got int"),
        ("r.json", '["T", " "]', "row 2: field 'text' is empty"),
        ("r.json", '["T",\n "U"', "line 2: not JSON .*write one array, or one object per line"),
        ("r.csv", "question,answer\n", "holds no rows"),
        ("r.csv", "question,answer\nQ\n", "row 1: field 'answer' is missing"),
        ("r.csv", "question,answer\nQ,A,B\n", "row 1: more fields than the header"),
        ("r.txt", "text", "must end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .jsonl.gz"),
    ],
)
def test_names_row_and_field_of_malformed_input(
    tmp_path: Path, name: str, content: str, message: str
):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_rows(path)


def test_refuses_what_is_no_source(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"neither a file .* nor id:config:split"):
        load_rows("no-such-thing")
    (tmp_path / "latin.csv").write_bytes(b"text\n\xe9\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        load_rows(tmp_path / "latin.csv")


def test_refuses_rows_on_both_sides():
    forget = [Row("Q", "A", "f, row 1"), Row("Who?", "She  did.", "f, row 2")]
    retain = [Row("Q", "B", "r, row 1"), Row("Who? ", "She did.", "r, row 2")]
    with pytest.raises(InputError, match=r"share 1 row .*f, row 2 is also r, row 2.*remove"):
        check_disjoint(forget, retain)


def test_labels_answer_and_end_of_text_only(tokenizer):
    row = encode(Row("Who was it?", "A ferry pilot.", "here"), tokenizer)
    labelled = [i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(labelled[:-1]) == " A ferry pilot."
    assert labelled[-1] == tokenizer.eos_token_id == row.ids[-1]
    assert tokenizer.decode(row.ids[:-1]) == "Question: Who was it?\nAnswer: A ferry pilot."
    whole = tokenizer("Question: Who was it?\nAnswer: A ferry pilot.")["input_ids"]
    assert list(row.ids[:-1]) == whole


def test_labels_every_token_of_plain_text(tokenizer):
    row = encode(Row(None, "A ferry pilot.", "here"), tokenizer)
    assert row.ids == row.labels


def test_uses_the_chat_template_of_the_tokenizer(tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        encode(Row("Q?", "A.", "here"), tokenizer, template="chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}:"
    try:
        row = encode(Row("Q?", "A.", "here"), tokenizer, template="chat")
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(row.ids[:-1]) == "<Q?>:A."


@pytest.mark.parametrize("ending", ["\n", "\n\n", ":\n", " ", ""])
def test_labels_no_token_of_a_chat_prompt(tokenizer, ending):
    tokenizer = copy.deepcopy(tokenizer)
    shown = ending.replace("\n", "\\n")
    tokenizer.chat_template = "{{ messages[0].content + '|assistant" + shown + "' }}"
    row = encode(Row("Q?", "A ferry pilot.", "here"), tokenizer, template="chat")
    prompt = [i for i, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
    labelled = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(row.ids[:-1]) == f"Q?|assistant{ending}A ferry pilot."
    assert tokenizer.decode(labelled[:-1]) == "A ferry pilot."
    assert tokenizer.decode(prompt) == f"Q?|assistant{ending}"


BROKEN_CHATS = {
    "{{ messages[0].content | nothing }}": r"fails \(TemplateAssertionError: No filter named",
    "{% for m in messages %}{{ m.content }}": r"fails \(TemplateSyntaxError: Unexpected end",
    "{{ raise_exception('System role not supported') }}": r"fails \(TemplateError: System role",
    "{{ messages[0].content + 1 }}": r"fails \(TypeError: ",
    "{{ messages[7].content.strip() }}": r"fails \(UndefinedError: ",
    "<user>:": "omits or changes what the user says",
    "{{ messages[0].content | upper }}": "omits or changes what the user says",
}


@pytest.mark.parametrize("chat", list(BROKEN_CHATS))
def test_names_the_row_at_which_a_chat_template_fails(tokenizer, chat):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat
    rows = [Row(None, "T", "f, row 1"), Row("Q, you?", "A.", "f, row 2")]
    said = (
        f'f, row 2: template "chat": the tokenizer\'s template {BROKEN_CHATS[chat]}.*; '
        "give a text template"
    )
    with pytest.raises(InputError, match=said):
        encode_all(rows, tokenizer, template="chat")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("Q?", "A \ud83d", "f, row 1"), "row 1: the answer holds half of a surrogate pair"),
        (Row("Q\udc00?", "A", "f, row 1"), "row 1: the question holds half of a surrogate pair"),
        (Row("Q?", " ", "f, row 1"), "row 1: the answer is empty"),
    ],
)
def test_names_a_row_made_by_hand_that_no_tokenizer_takes(tokenizer, row, message):
    with pytest.raises(InputError, match=message):
        encode(row, tokenizer)


def test_names_an_answer_of_which_the_tokenizer_makes_nothing(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("é", "")
    with pytest.raises(InputError, match="row 1: the tokenizer makes no token of the answer 'éé'"):
        encode(Row("Q?", "éé", "f, row 1"), tokenizer, template="{question}{answer}")


def test_row_longer_than_max_length_is_named_with_the_remedy(tokenizer):
    rows = [Row("Q?", "A.", "f.jsonl, row 1"), Row("Q?", "word " * 40, "f.jsonl, row 2")]
    with pytest.raises(InputError, match=r"f.jsonl, row 2: .* of max_length: raise it to \d+"):
        encode_all(rows, tokenizer, max_length=32)


@pytest.mark.parametrize("template", ["{answer}", "{question} {answer}!", "{question}{question}"])
def test_refuses_a_template_without_its_parts(tokenizer, template):
    with pytest.raises(InputError, match="template must"):
        encode_all([Row("Q?", "A.", "here")], tokenizer, template=template)


def test_refuses_a_tokenizer_without_end_of_text(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"no end-of-text token: set tokenizer.eos_token"):
        encode(Row("Q?", "A.", "here"), tokenizer)


def test_padding_is_masked_and_not_labelled(tokenizer):
    rows = encode_all([Row("Q?", "A.", "1"), Row("Q?", "A longer answer.", "2")], tokenizer)
    batch = collate(rows, tokenizer.eos_token_id)
    short, full = len(rows[0].ids), len(rows[1].ids)
    assert batch.input_ids.shape == (2, full)
    assert batch.attention_mask.sum(1).tolist() == [short, full]
    assert (batch.labels[0, short:] == IGNORED).all()
    assert batch.labels[0, short - 1] == tokenizer.eos_token_id


def test_pairing_depends_on_seed_and_step_alone():
    def batches(pairing: Pairing, steps: range) -> list[tuple[list[int], list[int]]]:
        return [pairing.batch(step, 0) for step in steps]

    straight = Pairing(7, 11, batch_size=3, seed=5)
    assert batches(straight, range(9))[4:] == batches(
        Pairing(7, 11, batch_size=3, seed=5), range(4, 9)
    )
    assert batches(straight, range(9)) != batches(Pairing(7, 11, batch_size=3, seed=6), range(9))


def test_pairing_takes_every_row_before_any_again():
    pairing = Pairing(6, 10, batch_size=2, accumulation=3, processes=5)
    forget, retain = [], []
    for step in range(2):
        for part in range(3):
            for process in range(5):
                pair = pairing.batch(step, part, process)
                forget += pair[0]
                retain += pair[1]
    assert Counter(forget) == dict.fromkeys(range(6), 10)
    assert Counter(retain) == dict.fromkeys(range(10), 6)
    assert pairing.steps(10) == 2 and pairing.steps(0.01) == 1
