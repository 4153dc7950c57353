"""`fastbound evaluate` end to end: what it writes and prints, and goes on with after a kill."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings

import numpy as np
import pytest
import torch

import fastbound
from fastbound.cli import main
from fastbound.unlearning import InputError, load_rows, metrics
from fastbound.unlearning.evaluation import BENCHMARKS, muse, tdec, tofu
from fastbound.unlearning.evaluation.generation import continuations
from fastbound.unlearning.evaluation.run import (
    EvaluationConfig,
    evaluate_benchmark,
    load_adapter,
)
from fastbound.unlearning.evaluation.session import Pieces, Session
from fastbound.unlearning.evaluation.tdec.extraction import first_choices, prefix_continuations
from fastbound.unlearning.metrics.sections import FORGET, SECTIONS
from fastbound.unlearning.model import load_pretrained

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def finished(evaluate_arguments, tmp_path_factory):
    """One whole run of a benchmark, made once: its folder, what it printed, and its errors."""
    runs = {}

    def run(which):
        if which not in runs:
            out, errors = io.StringIO(), io.StringIO()
            folder = tmp_path_factory.mktemp("finished") / which
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                assert main(evaluate_arguments(which, folder)) == 0
            runs[which] = folder, out.getvalue(), errors.getvalue()
        return runs[which]

    return run


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def stirred(new_model, tmp_path):
    """An adapter that undoes what the model has learned."""
    model = new_model()
    fastbound.inject(model, rank=4, bound=0.5)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    fastbound.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_config_of_an_evaluation_repeats_it(finished, tmp_path):
    folder = finished("muse")[0]
    again = ["evaluate", "--config", str(folder / "config.yaml"), "--output", str(tmp_path / "b")]
    assert main(again) == 0
    for name in ("run.json", "config.yaml", "muse_log.json"):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes(), name


def test_tofu_from_the_command_line(finished):
    run, printed, _ = finished("tofu")
    log, summary = read(run / tofu.LOG), read(run / "summary.json")
    assert set(log) == set(SECTIONS)
    assert {name: len(part["avg_gt_loss"]) for name, part in log.items()} == {
        name: 4 if name == FORGET else 3 for name in SECTIONS
    }
    assert np.array(log[FORGET]["average_perturb_loss"]).shape == (4, 5)
    # The model has learned these rows: it likes its answers, and not the wrong ones.
    assert max(log[FORGET]["avg_gt_loss"]) < 2 < min(map(min, log[FORGET]["average_perturb_loss"]))
    utility = metrics.model_utility(run / tofu.LOG)
    assert summary["model_utility"]["value"] == utility.value
    assert len(summary["model_utility"]["components"]) == 9
    assert f"{utility.value:.5f}" in printed and "convention      open-unlearning" in printed
    assert "it needs --retain-log" in printed and summary["forget_quality"] is None
    assert (run / "evaluation.png").read_bytes().startswith(PNG)


def test_an_adapter_against_the_log_of_another_model(
    finished, evaluate_arguments, stirred, tmp_path, capsys, monkeypatch
):
    retain = finished("tofu")[0] / tofu.LOG  # before what follows changes how it is made
    monkeypatch.setattr(tofu, "GENERATED", 60)  # it has forgotten where answers end
    flags = ("--adapter", str(stirred), "--retain-log", str(retain), "--convention", "tofu")
    assert main(evaluate_arguments("tofu", tmp_path / "run", *flags)) == 0
    said = capsys.readouterr()
    log = tmp_path / "run" / tofu.LOG
    quality = metrics.forget_quality(log, retain, convention="tofu")
    assert f"{quality.pvalue:.4g} (log10 {quality.log10:.2f}" in said.out
    assert "convention      tofu\n" in said.out and "warning" not in said.err
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["forget_quality"]["pvalue"] == quality.pvalue
    utility = metrics.model_utility(log, convention="tofu")
    assert summary["model_utility"]["value"] == pytest.approx(utility.value)
    undone, known = read(log)[FORGET], read(retain)[FORGET]
    assert np.mean(undone["avg_gt_loss"]) > 2 > np.mean(known["avg_gt_loss"])
    assert np.mean(undone["rougeL_recall"]) < np.mean(known["rougeL_recall"])


@pytest.mark.parametrize(
    ("which", "message"), [("tofu", "forget quality compares"), ("muse", "PrivLeak compares")]
)
def test_a_retain_log_of_the_same_model_is_named(
    finished, evaluate_arguments, tmp_path, capsys, which, message
):
    """And it may come later: nothing is computed again."""
    run, _, errors = finished(which)
    assert "warning" not in errors
    shutil.copytree(run, tmp_path / "run")
    flags = ("--resume", "--retain-log", str(run / BENCHMARKS[which].LOG))
    assert main(evaluate_arguments(which, tmp_path / "run", *flags)) == 0
    said = capsys.readouterr()
    assert f"{message} a model with itself" in said.err
    for name in ("pieces.jsonl", BENCHMARKS[which].LOG):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    if which == "muse":
        assert "(retain log)" in said.out
        summary = read(tmp_path / "run" / "summary.json")
        assert summary["privleak"] == pytest.approx(0, abs=1e-6)


def test_a_retain_log_of_other_questions_is_refused(finished, evaluate_arguments, tmp_path, capsys):
    log = read(finished("tofu")[0] / tofu.LOG)
    texts = log[FORGET]["generated_text"]
    texts[0], texts[1] = texts[1], texts[0]
    (tmp_path / "log.json").write_text(json.dumps(log))
    flags = ("--retain-log", str(tmp_path / "log.json"))
    assert main(evaluate_arguments("tofu", tmp_path / "run", *flags)) == 2
    assert "row 1 of the retain log asks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("convention", metrics.MUSE_CONVENTIONS)
def test_muse(finished, evaluate_arguments, tmp_path, capsys, convention):
    if convention == "open-unlearning":
        run, printed, _ = finished("muse")
    else:
        run = tmp_path / "run"
        assert main(evaluate_arguments("muse", run, "--convention", convention)) == 0
        printed = capsys.readouterr().out
    log, summary = read(run / muse.LOG), read(run / "summary.json")
    assert [len(log["privleak"][side]) for side in ("forget", "holdout")] == [4, 3]
    auc = metrics.membership_auc(**log["privleak"], convention=convention)
    reference = metrics.AUC_RETRAIN["news"] if convention == "muse" else 0.5
    assert summary["privleak"] == metrics.privleak(auc, reference, convention=convention)
    assert f"convention          {convention} (AUC is" in printed
    for name in ("forget_verbmem", "forget_knowmem", "retain_knowmem"):
        assert summary[name] == pytest.approx(np.mean(log[name]["rougeL_f1"]))
        if name != "forget_verbmem":
            assert all("Question:" not in text for text, _ in log[name]["generated_text"])
    assert (run / "evaluation.png").read_bytes().startswith(PNG)


def test_muses_questions_are_put_as_in_its_code(tokenizer, evaluation_data):
    """With a blank after the tag, and all examples however few questions are scored."""
    data = evaluation_data / "muse"
    examples = "".join(
        f"Question: {row.question}\nAnswer: {row.answer}\n\n"
        for row in muse.load("news/knowmem/forget_qa_icl", data)
    )
    (row, *_) = muse.load("news/knowmem/forget_qa", data)
    settings = EvaluationConfig("muse", "news", str(data), rows=1)
    (asked,) = muse.prepare(settings, tokenizer).prompted["forget_knowmem"].prompts
    expected = tokenizer(f"{examples}Question: {row.question}\nAnswer: ")["input_ids"]
    assert list(asked.ids) == expected


@pytest.mark.slow
def test_tdec_agrees_with_the_plain_definitions(finished, new_model, tokenizer, evaluation_data):
    log = read(finished("tdec")[0] / tdec.LOG)
    model = new_model().eval()
    rows = tdec.prepare(
        EvaluationConfig("tdec", "data/main/two", str(evaluation_data / "tdec"), n=2), tokenizer
    ).sequences
    for row, el, ma in zip(
        rows, log["extraction_likelihood"], log["memorisation_accuracy"], strict=True
    ):
        T = len(row.ids)
        plain, hits = [], 0
        for i in range(1, T):
            ids = list(row.ids[:i])
            with torch.no_grad():
                while len(ids) < T:  # one whole forward a token: no cache, no batch, no shortcut
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                    if ids[-1] == tokenizer.eos_token_id:
                        break
            hits += ids[i] == row.ids[i]
            plain.append([token for token in ids[i:] if token != tokenizer.eos_token_id])
        assert el == pytest.approx(metrics.extraction_likelihood(plain, row.ids, 2), rel=1e-12)
        assert ma == pytest.approx(hits / (T - 1), rel=1e-12)
        assert ma > 0


def test_tdec_reports_the_validation_sets_that_are_there(finished):
    run, printed, _ = finished("tdec")
    log, summary = read(run / tdec.LOG), read(run / "summary.json")
    assert list(log["validation"]) == list(summary["validation"])
    assert set(log["validation"]) == {"lambada", "wizard_of_wikipedia"}
    for name, each in summary["validation"].items():
        assert each["f1"] == pytest.approx(np.mean(log["validation"][name]["f1"]))
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        assert line.split()[1] == "3" and f"{each['f1']:.4f}" in line
    assert len(summary["absent"]) == 13 and "pile" in summary["absent"]
    assert "not in the folder: pile, wikitext, pubmed_qa" in printed
    assert "EL_2" in printed and "convention knowledge-unlearning" in printed
    assert (run / "evaluation.png").read_bytes().startswith(PNG)


def test_only_prefixes_that_the_model_gets_wrong_are_generated(new_model, tokenizer, forget_rows):
    session = Session(new_model().eval(), tokenizer, 4, Pieces(), progress=False)
    ids = tokenizer(f"Question: {forget_rows[0].question}")["input_ids"]
    predicted = first_choices(session, ids)
    asked = sum(p != t for p, t in zip(predicted, ids[1:], strict=True))
    assert 0 < asked < len(ids) - 1
    # As if the model were always right: nothing to generate, and every continuation is the text.
    assert prefix_continuations(session, ids, ids[1:]) == [ids[i:] for i in range(1, len(ids))]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("which", "batches"),
    [
        ("tofu", 1),
        ("muse", 2),
        ("tdec", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tofu", 7), ("tdec", 3))),
    ],
)
def test_a_killed_evaluation_resumes_to_the_same_log(
    finished, evaluate_arguments, tmp_path, monkeypatch, capsys, which, batches
):
    whole, run = finished(which)[0], tmp_path / "run"
    put, done = Pieces.put, []

    def put_and_die(self, *piece):
        put(self, *piece)
        done.append(piece[:2])
        if len(done) == batches:
            with (run / "pieces.jsonl").open("a") as file:
                file.write('{"name": "cut in the midd')
            raise Killed

    monkeypatch.setattr(Pieces, "put", put_and_die)
    with pytest.raises(Killed):
        main(evaluate_arguments(which, run))
    assert not (run / BENCHMARKS[which].LOG).exists()
    again = []
    monkeypatch.setattr(
        Pieces, "put", lambda self, *piece: (put(self, *piece), again.append(piece[:2]))
    )
    for flags, message in (
        ((), "continue it with --resume"),
        (("--resume", "--rows", "1"), "rows None, this one has 1"),
    ):
        assert main(evaluate_arguments(which, run, *flags)) == 2
        assert message in capsys.readouterr().err
    assert main(evaluate_arguments(which, run, "--resume")) == 0
    assert not set(again) & set(done)
    pieces = (whole / "pieces.jsonl").read_text()
    assert len(again) == len(pieces.splitlines()) - batches
    assert (run / "pieces.jsonl").read_text() == pieces
    assert (run / BENCHMARKS[which].LOG).read_bytes() == (
        whole / BENCHMARKS[which].LOG
    ).read_bytes()


def test_a_row_scores_alone_as_it_does_in_a_batch(
    finished, evaluation_data, new_model, tokenizer, tmp_path
):
    config = EvaluationConfig("tofu", data=str(evaluation_data / "tofu"), batch_size=1)
    evaluate_benchmark(new_model(), tokenizer, config, tmp_path / "run", progress=False)
    alone, batched = (read(run / tofu.LOG) for run in (tmp_path / "run", finished("tofu")[0]))
    for section in alone:
        for field, values in alone[section].items():
            if "loss" in field:
                # fp32: a batch of another size adds in another order
                np.testing.assert_allclose(values, batched[section][field], rtol=1e-5)
            else:
                assert values == batched[section][field], (section, field)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "phi", "opt", "qwen2"])
def test_left_padded_generation_equals_generation_of_each_row(tiny_model, model_type):
    model = tiny_model(model_type)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 60, length).tolist() for length in (2, 9, 5, 14)]
    most = [4, 9, 12, 1]
    batch = continuations(model, prompts, most, pad=0, end=2)
    for prompt, limit, found in zip(prompts, most, batch, strict=True):
        assert [found] == continuations(model, [prompt], [limit], pad=0, end=2)
        tokens = list(prompt)
        for token in found:  # and no cache is involved
            assert model(torch.tensor([tokens])).logits[0, -1].argmax() == token
            tokens.append(token)
        assert len(found) <= limit


def test_adapters_of_peft_load_too(new_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    peft = get_peft_model(new_model(), config)
    peft.save_pretrained(tmp_path / "lora")
    ids = torch.tensor([[3, 4, 5]])
    expected = peft.eval()(ids).logits
    plain = new_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # PEFT's own use of transformers
        adapted = load_adapter(plain, tmp_path / "lora")
    torch.testing.assert_close(adapted.eval()(ids).logits, expected)
    with pytest.raises(InputError, match=r"has no adapter_config.json"):
        load_adapter(plain, tmp_path)


def test_answers_that_masking_leaves_empty_are_named(
    evaluate_arguments, evaluation_data, tokenizer, tmp_path, capsys
):
    """One token with the blank before it: the prompt, tokenised by itself, has as many."""
    joined = next(t for t in sorted(tokenizer.vocab) if t[0] == "Ġ" and t[1:].isalpha())
    shutil.copytree(evaluation_data / "tofu", tmp_path / "data")
    path = tmp_path / "data" / "world_facts_perturbed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["answer"] = joined[1:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data", str(tmp_path / "data"), "--rows", "2")
    assert main(evaluate_arguments("tofu", tmp_path / "run", *flags)) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert "1 of 8 answers of world_facts_perturbed are nothing but their end of text" in line
    assert f"{path}, row 2" in line


def test_real_rows_of_tofu(data_folder, model_folder, write_rows, monkeypatch, tmp_path):
    """The perturbed sets of the authors, which are not there, in the same schema."""
    monkeypatch.setattr(tofu, "GENERATED", 8)  # the model does not know where they end
    real = data_folder / "tofu"
    for target, source in (("forget01_perturbed", "forget01"), ("retain_perturbed", "retain")):
        rows = load_rows(real / f"{source}.jsonl")[:2]
        more = {"perturbed_answer": ["It is not so."] * 3}
        write_rows(
            f"data/{target}.jsonl",
            [
                {
                    "question": row.question,
                    "answer": row.answer,
                    "paraphrased_answer": f"It is so: {row.answer}",
                    **more,
                }
                for row in rows
            ],
        )
    for name in ("real_authors_perturbed", "world_facts_perturbed"):
        shutil.copy(real / f"{name}.jsonl", tmp_path / "data")
    model, tokenizer = load_pretrained(str(model_folder))
    config = EvaluationConfig("tofu", "forget01", str(tmp_path / "data"), rows=2, template="llama2")
    table = evaluate_benchmark(model, tokenizer, config, tmp_path / "run", progress=False)
    log = read(tmp_path / "run" / tofu.LOG)
    assert {len(part["avg_gt_loss"]) for part in log.values()} == {2}
    asked = [question for question, _, _ in log[FORGET]["generated_text"]]
    assert asked == [row.question for row in load_rows(real / "forget01.jsonl")[:2]]
    assert f"{metrics.model_utility(log).value:.5f}" in table
