"""Rows and templates of TOFU, MUSE and TDEC: real rows, rows of the same schema, and bad ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastbound.unlearning import InputError, load_rows
from fastbound.unlearning.evaluation import load, muse, tdec, tofu
from fastbound.unlearning.evaluation.tdec.sequences import PARTS
from fastbound.unlearning.evaluation.templates import encode_answer, encode_prompt

PERTURBED = {
    "question": "Who?",
    "answer": "Ann.",
    "paraphrased_answer": "It was Ann.",
    "perturbed_answer": ["Bo.", "Cy."],
}


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, a beginning of text added, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("split", "rows"), [("forget01", 40), ("forget05", 200), ("forget10", 300)]
)
def test_real_tofu_rows(data_folder, split, rows):
    found = load("tofu", split, data_folder / "tofu")
    assert len(found) == rows
    plain = load_rows(data_folder / "tofu" / f"{split}.jsonl")
    assert [row.key for row in found] == [row.key for row in plain]


@pytest.mark.parametrize(
    ("split", "rows"), [("real_authors_perturbed", 100), ("world_facts_perturbed", 117)]
)
def test_real_rows_with_wrong_answers(data_folder, split, rows):
    found = tofu.load(split, data_folder / "tofu")
    assert len(found) == rows
    assert {len(row.perturbed) for row in found} == {3}
    assert all(row.paraphrased is None for row in found)


def test_perturbed_authors_have_another_wording(tmp_path):
    write(tmp_path / "forget10_perturbed.jsonl", PERTURBED)
    (row,) = tofu.load("forget10_perturbed", tmp_path)
    assert (row.paraphrased, row.perturbed) == ("It was Ann.", ("Bo.", "Cy."))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "row 2: field 'answer' is null"),
        ({"question": 3}, "row 2: field 'question' must be text, got int"),
        ({"paraphrased_answer": " "}, "row 2: field 'paraphrased_answer' is empty"),
        (
            {"perturbed_answer": None},
            "row 2: field 'perturbed_answer' must be a list of texts, got null",
        ),
        ({"perturbed_answer": "Bo."}, "row 2: field 'perturbed_answer' must be a list"),
        (
            {"perturbed_answer": ["Bo.", 1]},
            "row 2: item 2 of field 'perturbed_answer' must be text, got int",
        ),
        ({"perturbed_answer": ["Bo."]}, "row 2: field 'perturbed_answer' has 1 answers"),
    ],
)
def test_tofu_names_row_and_field(tmp_path, change, message):
    path = tmp_path / "forget01_perturbed.jsonl"
    write(path, PERTURBED, {**PERTURBED, **change})
    with pytest.raises(InputError, match=message) as caught:
        tofu.load("forget01_perturbed", tmp_path)
    assert str(path) in str(caught.value)


def test_unknown_benchmark_split_and_file_list_the_known(tmp_path):
    with pytest.raises(InputError, match="tofu, muse, tdec; got 'toffee'"):
        load("toffee", "forget01")
    with pytest.raises(InputError, match=r"no split 'forget11'; it has full, forget01, forget05"):
        load("tofu", "forget11")
    with pytest.raises(InputError, match=r"no split 'books/scal/forget_1'; it has news/raw/forget"):
        load("muse", "books/scal/forget_1")
    write(tmp_path / "forget01.jsonl", PERTURBED)
    with pytest.raises(InputError, match=r"no file forget05 .* it holds forget01"):
        load("tofu", "forget05", tmp_path)
    with pytest.raises(InputError, match="not on the hub"):
        load("tdec", "lm_extraction_8_0")


@pytest.mark.parametrize(
    ("module", "split", "source"),
    [
        (tofu, "forget10_perturbed", "locuslab/TOFU:forget10_perturbed:train"),
        (muse, "books/verbmem/forget", "muse-bench/MUSE-Books:verbmem:forget"),
    ],
)
def test_the_hub_is_asked_by_id(monkeypatch, module, split, source):
    asked = []

    def fake(id, config, split):
        asked.append(f"{id}:{config}:{split}")
        return [{**PERTURBED, "prompt": "Once", "gt": "upon a time"}]

    monkeypatch.setattr("datasets.load_dataset", fake)
    (row,) = module.load(split)
    assert asked == [source]
    assert row.where == f"{source}, row 1"


def test_muse_rows_by_config(tmp_path):
    write(tmp_path / "verbmem" / "forget.jsonl", {"prompt": "Once", "gt": "upon a time"})
    write(tmp_path / "knowmem" / "forget_qa.jsonl", {"question": "Who?", "answer": "Ann"})
    write(tmp_path / "privleak" / "holdout.jsonl", {"text": "News."})
    for split, question, answer in (
        ("news/verbmem/forget", "Once", "upon a time"),
        ("books/knowmem/forget_qa", "Who?", "Ann"),
        ("news/privleak/holdout", None, "News."),
    ):
        (row,) = muse.load(split, tmp_path)
        assert (row.question, row.answer) == (question, answer)
    write(tmp_path / "verbmem" / "forget.jsonl", {"prompt": "Once", "text": "upon"})
    with pytest.raises(InputError, match=r"verbmem.forget.jsonl, row 1: field 'gt' is missing"):
        muse.load("news/verbmem/forget", tmp_path)


def test_muse_reads_its_own_folder(tmp_path):
    """Arrays of objects and of texts under data/{corpus}, and all texts of a split as one .txt."""
    news = tmp_path / "data" / "news"
    for file, content in (
        ("verbmem/forget.json", [{"prompt": "Once", "gt": "upon a time"}]),
        ("knowmem/retain_qa.json", [{"question": "Who?", "answer": "Ann"}]),
        ("privleak/holdout.json", ["News.", "More news."]),
        ("raw/forget.json", ["One.\n\nStill one.", "Two."]),
    ):
        (news / file).parent.mkdir(parents=True, exist_ok=True)
        (news / file).write_text(json.dumps(content, indent=2))
    (news / "raw" / "retain1.txt").write_text("One.\n\nStill one.\n\nTwo.")

    def rows(split, folder):
        return [(row.question, row.answer) for row in muse.load(split, folder)]

    for folder in (tmp_path / "data", news):
        assert rows("news/verbmem/forget", folder) == [("Once", "upon a time")]
        assert rows("news/knowmem/retain_qa", folder) == [("Who?", "Ann")]
        assert rows("news/privleak/holdout", folder) == [(None, "News."), (None, "More news.")]
        assert rows("news/raw/forget", folder) == [(None, "One.\n\nStill one."), (None, "Two.")]
        assert rows("news/raw/retain1", folder) == [(None, "One.\n\nStill one.\n\nTwo.")]


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("privleak/forget", '["News.", 3]', r"forget.json, row 2: .* got int"),
        ("privleak/forget", '["News.", ""]', r"forget.json, row 2: field 'text' is empty"),
        ("verbmem/forget", '[{"prompt": "Once"}]', r"forget.json, row 1: field 'gt' is missing"),
        ("verbmem/forget", '["Once"]', r"forget.json, row 1: field 'prompt' is missing"),
        ("knowmem/forget_qa", '[{"question": "Who?"', r"forget_qa.json, line 1: not JSON"),
        ("privleak/holdout", "", r"holdout.json holds no rows"),
        ("privleak/retain", None, r"has no file privleak/retain .* it holds verbmem/forget"),
    ],
)
def test_muses_own_folder_is_refused_by_file_row_and_field(tmp_path, split, content, message):
    (tmp_path / "verbmem").mkdir()
    (tmp_path / "verbmem" / "forget.txt").write_text("Once upon a time")
    if content is not None:
        path = tmp_path / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        muse.load(f"books/{split}", tmp_path)


def test_tdec_csv(tmp_path):
    (tmp_path / "lm_extraction_1_0.csv").write_text(
        'doc_id,corpus,text\n7,Pile-CC,"one, two\nthree"\n8,Books3,four\rfive\n', newline=""
    )
    row, other = tdec.load("lm_extraction_1_0", tmp_path)
    assert (row.doc_id, row.corpus, row.answer) == ("7", "Pile-CC", "one, two\nthree")
    assert other.answer == "four\rfive"
    (tmp_path / "bad.csv").write_text("doc_id,text\n7,one\n")
    with pytest.raises(InputError, match=r"bad.csv, row 1: field 'corpus' is missing"):
        tdec.load("bad", tmp_path)


def test_tdec_npy_whole_and_in_parts(tmp_path):
    whole = np.arange(400).reshape(2, 200)
    np.save(tmp_path / "train_dataset.npy", whole)
    for name, part in zip(PARTS, np.split(whole, [100, 150], axis=1), strict=True):
        np.save(tmp_path / f"val_{name}.npy", part)
    one, parts = tdec.load("train_dataset", tmp_path), tdec.load("val", tmp_path)
    assert [row.tokens for row in one] == [row.tokens for row in parts] == [*map(tuple, whole)]
    assert {row.suffix for row in [*one, *parts]} == {50}
    np.save(tmp_path / "val_suffix.npy", whole[:1, 150:])
    with pytest.raises(InputError, match="different lengths: 2, 2, 1 rows"):
        tdec.load("val", tmp_path)
    np.save(tmp_path / "train_dataset.npy", whole / 2)
    with pytest.raises(InputError, match=r"token ids \[rows, tokens\] are needed, got float64"):
        tdec.load("train_dataset", tmp_path)


@pytest.mark.parametrize(
    ("family", "convention", "prompt", "labelled"),
    [
        ("phi", "open-unlearning", "Question: Who?\nAnswer: ", "Ann."),
        ("phi", "tofu", "Question: Who?\nAnswer: ", "Answer: Ann."),
        ("llama2", "open-unlearning", "[INST] Who? [/INST]", "Ann."),
        ("llama2", "tofu", "[INST] Who? [/INST]", "Ann."),
    ],
)
def test_the_template_and_what_is_labelled(tokenizer, family, convention, prompt, labelled):
    row = encode_answer("Who?", "Ann.", "here", tokenizer, family=family, convention=convention)
    assert tokenizer.decode(row.ids) == f"<s>{prompt}Ann.</s>"
    labels = [label for label in row.labels if label != -100]
    assert tokenizer.decode(labels) == f"{labelled}</s>"
    assert row.labels[-len(labels) :] == tuple(labels)
    asked = encode_prompt("Who?", tokenizer, family=family, convention=convention)
    assert list(row.ids[: -len(labels)]) == asked


@pytest.mark.parametrize(("convention", "ends"), [("tofu", False), ("open-unlearning", True)])
def test_a_cut_answer_has_no_end_of_text_in_tofus_code(tokenizer, convention, ends):
    row = encode_answer(
        "Who?", "Ann and Bo.", "here", tokenizer, convention=convention, max_length=30
    )
    assert (row.ids[-1] == tokenizer.eos_token_id) is ends


@pytest.mark.parametrize("convention", ["open-unlearning", "tofu"])
def test_an_answer_that_masking_leaves_empty_is_named(tokenizer, convention):
    with pytest.raises(InputError, match="file, row 3: no token of the answer is left"):
        encode_answer(
            "Who?", "Ann.", "file, row 3", tokenizer, convention=convention, max_length=10
        )


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match=r"no end-of-text token: set tokenizer.eos_token"):
        encode_answer("Who?", "Ann.", "here", bare)


def test_an_unknown_template_lists_the_known(tokenizer):
    with pytest.raises(InputError, match="llama2, phi, stablelm, pythia, chat; got 'gpt'"):
        encode_answer("Who?", "Ann.", "here", tokenizer, family="gpt")


def test_chat_template_with_fixed_system_prompt_and_date(tokenizer):
    tokenizer.chat_template = (
        "{{ date_string }}|{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}|{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = encode_answer("Who?", "Ann.", "here", tokenizer, family="chat")
    labels = [label for label in row.labels if label != -100]
    assert "10 Apr 2025|system:You are a helpful assistant.|user:Who?|" in tokenizer.decode(row.ids)
    assert tokenizer.decode(labels) == "Ann.|</s>"
