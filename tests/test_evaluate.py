"""`fastbound evaluate` end to end on a tiny model: real TOFU rows, made rows of MUSE and TDEC."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

import fastbound
from fastbound.cli import main
from fastbound.unlearning import InputError, NonFiniteError, load_rows, metrics
from fastbound.unlearning.benchmarks import score_tofu
from fastbound.unlearning.benchmarks import session as session_module
from fastbound.unlearning.benchmarks.generation import continuations
from fastbound.unlearning.benchmarks.score_tdec import first_choices, prefix_continuations
from fastbound.unlearning.benchmarks.session import Pieces, Session
from fastbound.unlearning.evaluate_run import EvaluationConfig, evaluate_benchmark, load_adapter
from fastbound.unlearning.lab import LabConfig, learn
from fastbound.unlearning.pretrained import load_pretrained

TINY = LabConfig(
    hidden_size=32,
    intermediate_size=48,
    heads=2,
    vocabulary=500,
    lr=1e-2,
    batch_size=2,
    known_loss=0.3,
    most_epochs=60,
)
PNG = b"\x89PNG"


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def tofu_folder(data_folder, tmp_path_factory):
    """Real rows; the perturbed sets of the authors, which are not there, in the same schema."""
    folder = tmp_path_factory.mktemp("tofu")
    for target, source in (("forget01_perturbed", "forget01"), ("retain_perturbed", "retain")):
        rows = load_rows(data_folder / "tofu" / f"{source}.jsonl")[:6]
        answers = [row.answer for row in rows]
        write(
            folder / f"{target}.jsonl",
            [
                {
                    "question": row.question,
                    "answer": row.answer,
                    "paraphrased_answer": f"It is so: {row.answer}",
                    "perturbed_answer": [answers[(i + j) % 6] for j in range(1, 4)],
                }
                for i, row in enumerate(rows)
            ],
        )
    for name in ("real_authors_perturbed", "world_facts_perturbed"):
        text = (data_folder / "tofu" / f"{name}.jsonl").read_text()
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def model_folder(data_folder, tmp_path_factory):
    """A model that has learnt the first rows of forget01."""
    rows = load_rows(data_folder / "tofu" / "forget01.jsonl")[:6]
    learned = learn(
        rows, TINY, max_length=512, template="[INST] {question} [/INST]{answer}", progress=False
    )
    folder = tmp_path_factory.mktemp("model")
    learned.model.save_pretrained(folder)
    learned.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def learned(model_folder):
    return load_pretrained(str(model_folder))


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    """200 tokens a text are minutes."""
    monkeypatch.setattr(score_tofu, "GENERATED", 40)


def tofu(folder, **changes):
    settings = {"split": "forget01", "rows": 4, "batch_size": 4, "template": "llama2", **changes}
    return EvaluationConfig("tofu", data=str(folder), **settings)


def adapted(model_folder, path):
    model, _ = load_pretrained(str(model_folder))
    fastbound.inject(model, rank=4, bound=0.5)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            generator = torch.Generator().manual_seed(0)
            parameter.data.normal_(0, 0.5, generator=generator)
    fastbound.save_adapter(model, path)
    return path


def test_tofu_from_the_command_line(model_folder, tofu_folder, tmp_path, capsys):
    common = [
        "evaluate",
        "--benchmark",
        "tofu",
        "--split",
        "forget01",
        "--rows",
        "6",
        "--template",
        "llama2",
    ]
    common += ["--model", str(model_folder), "--data", str(tofu_folder), "--device", "cpu"]
    retain, output = tmp_path / "retain", tmp_path / "run"
    adapter = adapted(model_folder, tmp_path / "adapter")
    assert main([*common, "--adapter", str(adapter), "--output", str(retain)]) == 0
    assert "forget quality  not known: it needs --retain-log" in capsys.readouterr().out
    log_file = retain / "eval_log_aggregated.json"
    arguments = [*common, "--retain-log", str(log_file), "--output", str(output)]
    assert main([*arguments, "--convention", "tofu"]) == 0
    out = capsys.readouterr().out
    assert "convention      tofu\n" in out
    log = json.loads((output / "eval_log_aggregated.json").read_text())
    summary = json.loads((output / "summary.json").read_text())
    quality = metrics.forget_quality(log, log_file, convention="tofu")
    assert summary["forget_quality"]["pvalue"] == quality.pvalue
    assert f"{quality.pvalue:.4g} (log10" in out
    assert summary["model_utility"]["value"] == pytest.approx(
        metrics.model_utility(log, convention="tofu").value
    )
    assert len(summary["model_utility"]["components"]) == 9
    forget = log["eval_log_forget.json"]
    assert set(log) == set(metrics.logs.SECTIONS)
    assert len(forget["avg_gt_loss"]) == len(forget["rougeL_recall"]) == 6
    assert np.array(forget["average_perturb_loss"]).shape == (6, 3)
    # It has learnt these rows, and the stirred adapter has undone that.
    undone = json.loads(log_file.read_text())["eval_log_forget.json"]
    assert np.mean(forget["avg_gt_loss"]) < 0.5 < np.mean(undone["avg_gt_loss"])
    assert np.mean(forget["rougeL_recall"]) > 0.6 > np.mean(undone["rougeL_recall"])
    assert (output / "evaluation.png").read_bytes()[:4] == PNG


def test_a_row_scores_alone_as_it_does_in_a_batch(learned, tofu_folder, tmp_path):
    model, tokenizer = learned
    logs = []
    for size in (1, 5):
        output = tmp_path / str(size)
        evaluate_benchmark(
            model, tokenizer, tofu(tofu_folder, batch_size=size), output, progress=False
        )
        logs.append(json.loads((output / "eval_log_aggregated.json").read_text()))
    for section in logs[0]:
        for field, values in logs[0][section].items():
            if "loss" in field:
                np.testing.assert_allclose(values, logs[1][section][field], rtol=1e-4)
            else:
                assert values == logs[1][section][field], (section, field)


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


class Killed(BaseException):
    pass


@pytest.mark.parametrize("batches", [1, 7])
def test_a_killed_evaluation_goes_on_with_what_it_has(
    learned, tofu_folder, tmp_path, monkeypatch, batches
):
    model, tokenizer = learned
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = tofu(tofu_folder)
    evaluate_benchmark(model, tokenizer, config, whole, progress=False)
    put, calls = Pieces.put, []

    def dying(self, name, batch, values):
        if len(calls) == batches:
            raise Killed
        calls.append(name)
        put(self, name, batch, values)

    monkeypatch.setattr(Pieces, "put", dying)
    with pytest.raises(Killed):
        evaluate_benchmark(model, tokenizer, config, killed, progress=False)
    with (killed / "pieces.jsonl").open("a") as file:
        file.write('{"name": "log answers", "ba')  # the line that the kill cut off
    computed = []
    monkeypatch.setattr(Pieces, "put", lambda *args: (computed.append(args[1]), put(*args))[-1])
    with pytest.raises(InputError, match="continue it with --resume"):
        evaluate_benchmark(model, tokenizer, config, killed, progress=False)
    evaluate_benchmark(model, tokenizer, config, killed, resume=True, progress=False)
    pieces = (whole / "pieces.jsonl").read_text()
    assert len(computed) == len(pieces.splitlines()) - batches
    assert (killed / "pieces.jsonl").read_text() == pieces
    name = "eval_log_aggregated.json"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(InputError, match="holds a run with convention 'open-unlearning'"):
        evaluate_benchmark(
            model, tokenizer, tofu(tofu_folder, convention="tofu"), killed, resume=True
        )


def test_a_retain_log_of_the_same_model_is_named(learned, tofu_folder, tmp_path):
    model, tokenizer = learned
    run = {"config": tofu(tofu_folder), "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_benchmark(model, tokenizer, output=tmp_path / "a", **run)
    log = tmp_path / "a" / "eval_log_aggregated.json"
    with pytest.warns(
        metrics.SameModelWarning, match="forget quality compares a model with itself"
    ):
        evaluate_benchmark(model, tokenizer, output=tmp_path / "b", retain_log=log, **run)


def test_a_loss_that_is_not_finite_ends_the_evaluation(learned, tofu_folder, tmp_path):
    model, tokenizer = learned
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"retain_perturbed.jsonl, row \d: the loss is nan"):
        evaluate_benchmark(model, tokenizer, tofu(tofu_folder), tmp_path / "run", progress=False)


def test_refusals_come_before_the_model_runs(learned, tofu_folder, tmp_path, monkeypatch):
    model, tokenizer = learned
    monkeypatch.setattr(session_module, "forward", None)
    for change, message in (
        ({"benchmark": "toffee"}, "tofu, muse, tdec; got 'toffee'"),
        ({"split": "forget02"}, "no split 'forget02'; it has forget01, forget05, forget10"),
        ({"split": "forget10"}, "no file forget10_perturbed"),
        ({"convention": "muse"}, "open-unlearning, tofu, tofu-paper; got 'muse'"),
        ({"template": "gpt"}, "llama2, phi, stablelm, pythia, chat; got 'gpt'"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"benchmark": "tdec", "split": None}, "tdec needs --split"),
    ):
        settings = {"benchmark": "tofu", "split": "forget01", **change}
        with pytest.raises(InputError, match=message):
            config = EvaluationConfig(data=str(tofu_folder), **settings)
            evaluate_benchmark(model, tokenizer, config, tmp_path / "run", progress=False)
    for log, message in (
        ({}, "retain log: section 'eval_log_forget.json' is missing"),
        (
            {"eval_log_forget.json": {"avg_paraphrased_loss": [1], "average_perturb_loss": [[2]]}},
            "retain log has 1 rows .* forget01 here has 4",
        ),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_benchmark(
                model, tokenizer, tofu(tofu_folder), tmp_path / "run", retain_log=log
            )
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        evaluate_benchmark(model, tokenizer, tofu(tofu_folder), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_adapters_of_peft_load_too(model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = load_pretrained(str(model_folder))
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    )
    peft.save_pretrained(tmp_path / "lora")
    ids = torch.tensor([[3, 4, 5]])
    expected = peft.eval()(ids).logits
    plain, _ = load_pretrained(str(model_folder))
    torch.testing.assert_close(load_adapter(plain, tmp_path / "lora").eval()(ids).logits, expected)
    with pytest.raises(InputError, match=r"has no adapter_config.json"):
        load_adapter(plain, tmp_path)


@pytest.fixture
def muse_folder(tmp_path):
    folder = tmp_path / "muse"
    towns = ["Arl", "Bem", "Cor", "Dun"]
    write(
        folder / "verbmem" / "forget.jsonl",
        [{"prompt": f"The author of {town}", "gt": "was born in Kuwait City."} for town in towns],
    )
    for name in ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl"):
        write(
            folder / "knowmem" / f"{name}.jsonl",
            [{"question": f"Where is {town}?", "answer": "By the sea"} for town in towns],
        )
    for side, words in (("forget", "author in"), ("holdout", "a town by the sea of")):
        write(
            folder / "privleak" / f"{side}.jsonl",
            [{"text": f"The {words} {town} and Kuwait, {i}."} for i, town in enumerate(towns)],
        )
    return folder


@pytest.mark.parametrize("convention", metrics.MUSE_CONVENTIONS)
def test_muse(learned, muse_folder, tmp_path, convention):
    model, tokenizer = learned
    config = EvaluationConfig("muse", data=str(muse_folder), convention=convention, batch_size=3)
    table = evaluate_benchmark(model, tokenizer, config, tmp_path / "run", progress=False)
    log = json.loads((tmp_path / "run" / "muse_log.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    auc = metrics.membership_auc(**log["privleak"], convention=convention)
    reference = 0.4772 if convention == "muse" else 0.5
    assert summary["privleak"] == metrics.privleak(auc, reference, convention=convention)
    assert f"convention          {convention} (AUC is" in table
    for name in ("forget_verbmem", "forget_knowmem", "retain_knowmem"):
        assert summary[name] == pytest.approx(np.mean(log[name]["rougeL_f1"]))
        assert all("\nQuestion" not in text for text, _ in log[name]["generated_text"][4:])
    assert (tmp_path / "run" / "evaluation.png").read_bytes()[:4] == PNG
    other = tmp_path / "other"
    with pytest.warns(metrics.SameModelWarning, match="PrivLeak"):
        evaluate_benchmark(model, tokenizer, config, other, retain_log=log, progress=False)
    assert json.loads((other / "summary.json").read_text())["privleak"] == pytest.approx(
        0, abs=1e-6
    )


def test_tdec_by_generations_of_every_prefix(learned, data_folder, tmp_path):
    model, tokenizer = learned
    rows = load_rows(data_folder / "tofu" / "forget01.jsonl")[:2]
    folder = tmp_path / "tdec"
    folder.mkdir()
    lines = "".join(f'{i},TOFU,"{row.answer}"\n' for i, row in enumerate(rows))
    (folder / "few.csv").write_text(f"doc_id,corpus,text\n{lines}")
    config = EvaluationConfig("tdec", split="few", data=str(folder), n=3, batch_size=7)
    table = evaluate_benchmark(model, tokenizer, config, tmp_path / "run", progress=False)
    assert "EL_3" in table and "convention knowledge-unlearning" in table
    log = json.loads((tmp_path / "run" / "tdec_log.json").read_text())
    for i, row in enumerate(rows):
        ids = tokenizer(row.answer)["input_ids"]
        found = [
            continuations(model, [ids[:k]], [len(ids) - k], pad=0, end=1)[0]
            for k in range(1, len(ids))
        ]
        assert log["extraction_likelihood"][i] == metrics.extraction_likelihood(found, ids, 3)
        predicted = [
            model(torch.tensor([ids[:k]])).logits[0, -1].argmax() for k in range(1, len(ids))
        ]
        assert log["memorisation_accuracy"][i] == metrics.memorisation_accuracy(predicted, ids)


def test_only_prefixes_that_the_model_gets_wrong_are_generated(learned):
    model, tokenizer = learned
    ids = tokenizer("Author Basil Mahfouz Al-Kuwaiti is male.")["input_ids"]
    session = Session(model, tokenizer, 4, Pieces(), progress=False)
    predicted = first_choices(session, ids)
    asked = sum(p != t for p, t in zip(predicted, ids[1:], strict=True))
    assert 0 < asked < len(ids) - 1
    # As if the model were always right: nothing to generate, and every continuation is the text.
    assert prefix_continuations(session, ids, ids[1:]) == [ids[i:] for i in range(1, len(ids))]
