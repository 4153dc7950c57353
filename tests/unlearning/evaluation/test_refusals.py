"""What `fastbound evaluate` refuses: one line that names the thing, before the model runs."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastbound.cli import main
from fastbound.unlearning import InputError, NonFiniteError
from fastbound.unlearning.evaluation import BENCHMARKS
from fastbound.unlearning.evaluation.run import EvaluationConfig, evaluate_benchmark
from fastbound.unlearning.metrics.sections import FORGET


@pytest.fixture
def refused(evaluate_arguments, tmp_path, capsys):
    """Runs the command, which must write nothing, and returns its one line."""

    def run(which, *flags):
        status = main(evaluate_arguments(which, tmp_path / "run", *flags))
        said = capsys.readouterr().err
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2 and "Traceback" not in said
        assert not (tmp_path / "run").exists()
        return line

    return run


@pytest.mark.parametrize(
    ("which", "flags", "message"),
    [
        ("tofu", ("--benchmark", "wmdp"), "benchmark must be one of tofu, muse, tdec; got 'wmdp'"),
        ("tofu", ("--split", "forget20"), "'forget20'; it has forget01, forget05, forget10"),
        ("tofu", ("--split", "forget05"), "has no file forget05_perturbed"),
        ("muse", ("--split", "papers"), "muse --split must be one of news, books; got 'papers'"),
        ("tdec", ("--split", "three"), "has no file three (.csv, .jsonl, .npy) for tdec; it holds"),
        ("tofu", ("--convention", "muse"), "open-unlearning, tofu, tofu-paper; got 'muse'"),
        ("muse", ("--convention", "tofu"), "open-unlearning, muse; got 'tofu'"),
        ("tofu", ("--template", "gpt"), "llama2, phi, stablelm, pythia, chat; got 'gpt'"),
        ("tofu", ("--template", "chat"), "the tokenizer has no chat template"),
        ("tofu", ("--n", "4"), "--n is for tdec, tofu does not read it"),
        ("muse", ("--template", "llama2"), "--template is for tofu, muse does not read it"),
        ("tofu", ("--rows", "0"), "rows must be an integer >= 1, got 0"),
        ("tofu", ("--batch-size", "0"), "batch_size must be an integer >= 1, got 0"),
        ("tdec", ("--n", "500"), "are too few for EL_500: lower --n"),
        ("tofu", ("--benchmark", "tdec"), "tdec needs --split"),
        ("tofu", ("--device", "tpu"), "device must be one of"),
        ("tofu", ("--data", "nowhere"), "data nowhere is not a folder"),
        ("tofu", ("--adapter", "nowhere"), "adapter nowhere does not exist"),
        ("tofu", ("--retain-log", "none.json"), "log none.json cannot be read"),
    ],
)
def test_wrong_flags(refused, which, flags, message):
    assert message in refused(which, *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ("", "line 1: not JSON"),
        ("[]", "holds list: a JSON object is needed"),
        ("[" * 100_000, "too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "field 'a' is an integer of more than 4300 digits"),
        ('{"a": 1, "a": 2}', "field 'a' is given more than once"),
        (
            f'{{"{FORGET}": {{"avg_paraphrased_loss": [{"9" * 400}]}}}}',
            "needs one number per row, or the same number of them in every row",
        ),
    ],
)
def test_a_retain_log_that_cannot_be_read(refused, tmp_path, text, message):
    (tmp_path / "retain.json").write_text(text)
    said = refused("tofu", "--retain-log", str(tmp_path / "retain.json"))
    assert "log" in said and message in said


@pytest.mark.parametrize(
    ("which", "log", "message"),
    [
        ("tofu", {}, "retain log: section 'eval_log_forget.json' is missing"),
        ("tofu", {FORGET: {"avg_paraphrased_loss": [1]}}, "'average_perturb_loss' is missing"),
        (
            "tofu",
            {FORGET: {"avg_paraphrased_loss": [1], "average_perturb_loss": [[math.nan]]}},
            "average_perturb_loss, row 0: [nan] is not finite",
        ),
        (
            "tofu",
            {FORGET: {"avg_paraphrased_loss": [1, 2], "average_perturb_loss": [[2]]}},
            "fields of different lengths (avg_paraphrased_loss 2, average_perturb_loss 1)",
        ),
        (
            "tofu",
            {FORGET: {"avg_paraphrased_loss": [1], "average_perturb_loss": [[2]]}},
            "retain log has 1 rows in eval_log_forget.json, forget10 here has 4",
        ),
        (
            "tofu",
            {FORGET: {"avg_paraphrased_loss": 1, "average_perturb_loss": 2}},
            "avg_paraphrased_loss: needs one number per row, got 1",
        ),
        ("muse", {}, "retain log: section 'privleak' is missing"),
        (
            "muse",
            {"privleak": {"forget": [[1.0]] * 4, "holdout": [1.0] * 3}},
            "privleak, forget: needs one number per row, got lists",
        ),
        ("muse", {"privleak": {"forget": [1.0]}}, "privleak: field 'holdout' is missing"),
        (
            "muse",
            {"privleak": {"forget": [1.0, math.nan], "holdout": [1.0]}},
            "retain log, privleak, forget, row 1: nan is not finite",
        ),
        (
            "muse",
            {"privleak": {"forget": [1.0] * 4, "holdout": [1.0] * 4}},
            "retain log has 4 rows in privleak, holdout, news here has 3",
        ),
        ("tdec", {}, "tdec compares with no other model"),
    ],
)
def test_a_retain_log_that_does_not_fit(refused, tmp_path, which, log, message):
    path = tmp_path / "retain.json"
    path.write_text(json.dumps(log))
    assert message in refused(which, "--retain-log", str(path))


def _without_field(row):
    del row["paraphrased_answer"]


def _without_room(row):
    row["question"] = "word " * 600


def _too_short(row):
    row["text"] = "Question"


@pytest.mark.parametrize(
    ("which", "file", "spoil", "message"),
    [
        ("tofu", "forget10_perturbed", _without_field, "field 'paraphrased_answer' is missing"),
        ("tofu", "retain_perturbed", _without_room, "no token of the answer is left to score"),
        ("muse", "privleak/holdout", _too_short, "has too few to score"),
    ],
)
def test_a_row_that_cannot_be_used(refused, evaluation_data, tmp_path, which, file, spoil, message):
    shutil.copytree(evaluation_data / which, tmp_path / "data")
    path = tmp_path / "data" / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    spoil(rows[2])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(which, "--data", str(tmp_path / "data"))
    assert f"{path}, row 3" in said and message in said


def test_a_bad_validation_set_of_tdec(refused, evaluation_data, tmp_path):
    shutil.copytree(evaluation_data / "tdec", tmp_path / "data")
    path = tmp_path / "data" / "validation_data" / "pile.csv"
    path.write_text("doc_id,corpus\n1,Books3\n")
    said = refused("tdec", "--data", str(tmp_path / "data"))
    assert f"{path}, row 1: field 'text' is missing" in said


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}"
            "{% endif %}",
            "fails (TemplateError: No system role)",
        ),
        ("{{ messages[1].content }}:", "omits or changes what the assistant says"),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            "with an answer the tokenizer's own does not begin as it does without",
        ),
    ],
)
def test_a_chat_template_that_cannot_ask_and_answer(
    new_model, tokenizer, evaluation_data, tmp_path, chat, message
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat
    config = EvaluationConfig("tofu", data=str(evaluation_data / "tofu"), template="chat")
    said = rf'retain_perturbed.jsonl, row 1: template "chat": .*{re.escape(message)}'
    with pytest.raises(InputError, match=said):
        evaluate_benchmark(new_model(), tokenizer, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("which", "positions", "message"),
    [
        ("tofu", 20, r"perturbed.jsonl, row 1: takes \d+ tokens, more than the 20 positions"),
        ("tofu", 200, r"row 1: takes \d+ tokens and up to 200 new ones, more than the 200 pos"),
        ("muse", 120, r"verbmem/forget.jsonl, row 1: takes \d+ tokens and up to 128 new ones"),
        ("tdec", 9, r"two.csv, row 1: takes \d+ tokens, more than the 9 positions"),
    ],
)
def test_rows_and_continuations_beyond_the_models_positions(
    tokenizer, evaluation_data, tmp_path, which, positions, message
):
    shape = GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=2, n_positions=positions)
    with pytest.raises(InputError, match=message):
        evaluate_benchmark(
            GPT2LMHeadModel(shape), tokenizer, settings(which, evaluation_data), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def settings(which, evaluation_data):
    split = "data/main/two" if which == "tdec" else None
    return EvaluationConfig(which, split, str(evaluation_data / which), n=2)


@pytest.mark.parametrize(
    ("which", "where"),
    [
        ("tofu", r"retain_perturbed.jsonl, row \d"),
        ("muse", r"forget.jsonl, row \d"),
        ("tdec", r"two.csv, row \d"),
    ],
)
def test_a_model_that_gives_nan(new_model, tokenizer, evaluation_data, tmp_path, which, where):
    model = new_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"{where}.* try --dtype float32"):
        evaluate_benchmark(
            model, tokenizer, settings(which, evaluation_data), tmp_path / "run", progress=False
        )


@pytest.mark.parametrize("which", list(BENCHMARKS))
def test_a_tokenizer_without_end_of_text(new_model, tokenizer, evaluation_data, tmp_path, which):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        evaluate_benchmark(
            new_model(), tokenizer, settings(which, evaluation_data), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
