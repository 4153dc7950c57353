"""`fastbound evaluate`: TOFU, MUSE and TDEC on a tiny model, after a kill, and on bad input."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbound.cli import main
from fastbound.unlearning import Encoded, InputError, NonFiniteError, metrics
from fastbound.unlearning.benchmarks import score_tdec
from fastbound.unlearning.benchmarks.generation import continuations
from fastbound.unlearning.benchmarks.session import Pieces, Session
from fastbound.unlearning.evaluate_run import LOGS, EvaluationConfig, evaluate_benchmark
from fastbound.unlearning.metrics.logs import FORGET, SECTIONS


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="session")
def data(forget_rows, retain_rows, tmp_path_factory) -> Path:
    """A folder per benchmark with its columns: 4 forget rows, 3 of every other kind."""
    folder = tmp_path_factory.mktemp("data")
    forget, retain = forget_rows[:4], retain_rows[:3]
    plain = {
        name: [{"question": row.question, "answer": row.answer} for row in rows]
        for name, rows in (("forget", forget), ("retain", retain))
    }
    for split, name, wrong in (
        ("forget10_perturbed", "forget", 5),
        ("retain_perturbed", "retain", 5),
        ("real_authors_perturbed", "retain", 3),
        ("world_facts_perturbed", "retain", 3),
    ):
        rows = [{**row, "perturbed_answer": ["It is", "No"] * 2 + ["He"]} for row in plain[name]]
        for row in rows:
            row["perturbed_answer"] = row["perturbed_answer"][:wrong]
            if wrong == 5:
                row["paraphrased_answer"] = "Well, " + str(row["answer"])
        write(folder / "tofu" / f"{split}.jsonl", rows)
    for side, rows in plain.items():
        write(folder / f"muse/knowmem/{side}_qa.jsonl", rows)
        write(folder / f"muse/knowmem/{side}_qa_icl.jsonl", rows[:1])
    verbatim = [{"prompt": row["question"], "gt": row["answer"]} for row in plain["forget"]]
    write(folder / "muse/verbmem/forget.jsonl", verbatim)
    for side, rows in (("forget", plain["forget"]), ("holdout", plain["retain"])):
        texts = [{"text": f"Question: {row['question']}\nAnswer: {row['answer']}"} for row in rows]
        write(folder / f"muse/privleak/{side}.jsonl", texts)
    (folder / "tdec").mkdir()
    with (folder / "tdec" / "two.csv").open("w", newline="") as file:
        rows = [[i, "made up", each.answer] for i, each in enumerate(forget[:2])]
        csv.writer(file).writerows([["doc_id", "corpus", "text"], *rows])
    return folder


@pytest.fixture
def arguments(model_folder, data, tmp_path):
    def make(which: str, *more: str, output: str = "run") -> list[str]:
        split = ("--split", "two", "--n", "2") if which == "tdec" else ()
        return [
            *("evaluate", "--benchmark", which, "--model", str(model_folder)),
            *("--data", str(data / which), "--output", str(tmp_path / output)),
            *("--batch-size", "3", "--device", "cpu", *split, *more),
        ]

    return make


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    status = main(arguments)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and "Traceback" not in said
    return line


def session_of(model, tokenizer, batch_size: int, path: Path | None = None) -> Session:
    return Session(model.eval(), tokenizer, batch_size, Pieces(path), progress=False)


def test_tofu_writes_a_log_that_the_metrics_read(arguments, tmp_path, capsys):
    assert main(arguments("tofu")) == 0
    printed = capsys.readouterr().out
    run = tmp_path / "run"
    log = json.loads((run / LOGS["tofu"]).read_text())
    assert set(log) == set(SECTIONS)
    assert len(log[FORGET]["avg_gt_loss"]) == 4 and len(log["eval_log.json"]["avg_gt_loss"]) == 3
    # The model has learned these rows: it likes its answers, and not the wrong ones.
    assert max(log[FORGET]["avg_gt_loss"]) < 2 < min(map(min, log[FORGET]["average_perturb_loss"]))
    summary = json.loads((run / "summary.json").read_text())
    utility = metrics.model_utility(run / LOGS["tofu"])
    assert summary["model_utility"]["value"] == utility.value
    assert f"{utility.value:.5f}" in printed and "convention      open-unlearning" in printed
    assert "it needs --retain-log" in printed and summary["forget_quality"] is None
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_tofu_against_a_retain_log_and_against_itself(arguments, tmp_path, capsys):
    assert main(arguments("tofu")) == 0
    path = tmp_path / "run" / LOGS["tofu"]
    log = json.loads(path.read_text())
    log[FORGET]["avg_paraphrased_loss"] = [8.0, 9.0, 8.5, 9.5]
    other = tmp_path / "retain.json"
    other.write_text(json.dumps(log))
    capsys.readouterr()
    assert main(arguments("tofu", "--resume", "--retain-log", str(other))) == 0
    said = capsys.readouterr()
    quality = metrics.forget_quality(path, other)
    assert f"{quality.pvalue:.4g} (log10 {quality.log10:.2f}" in said.out
    assert "warning" not in said.err
    assert main(arguments("tofu", "--resume", "--retain-log", str(path))) == 0
    said = capsys.readouterr()
    assert "forget quality compares a model with itself" in said.err


@pytest.mark.parametrize("convention", metrics.MUSE_CONVENTIONS)
def test_muse_with_and_without_a_retain_log(arguments, tmp_path, capsys, convention):
    assert main(arguments("muse", "--convention", convention)) == 0
    run = tmp_path / "run"
    log = json.loads((run / LOGS["muse"]).read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert [len(log["privleak"][side]) for side in ("forget", "holdout")] == [4, 3]
    auc = metrics.membership_auc(**log["privleak"], convention=convention)
    reference = metrics.AUC_RETRAIN["news"] if convention == "muse" else 0.5
    assert summary["privleak"] == metrics.privleak(auc, reference, convention=convention)
    capsys.readouterr()
    retain = ("--retain-log", str(run / LOGS["muse"]))
    assert main(arguments("muse", "--convention", convention, "--resume", *retain)) == 0
    said = capsys.readouterr()
    assert "PrivLeak compares a model with itself" in said.err
    assert "(retain log)" in said.out


def test_tdec_agrees_with_the_plain_definitions(arguments, new_model, tokenizer, data, tmp_path):
    assert main(arguments("tdec")) == 0
    log = json.loads((tmp_path / "run" / LOGS["tdec"]).read_text())
    model = new_model().eval()
    rows = score_tdec.prepare("two", data / "tdec", tokenizer, n=2).sequences
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


def test_a_batch_padded_on_the_left_continues_as_each_row_alone(new_model, tokenizer, forget_rows):
    model = new_model().eval()
    prompts = [tokenizer(row.question)["input_ids"] for row in forget_rows]
    prompts = [prompt[: 2 + 3 * i] for i, prompt in enumerate(prompts)]
    assert len({len(prompt) for prompt in prompts}) > 3
    most = [5 + i for i in range(len(prompts))]
    ends = {"pad": tokenizer.pad_token_id, "end": tokenizer.eos_token_id}
    alone = [
        continuations(model, [prompt], [limit], **ends)[0]
        for prompt, limit in zip(prompts, most, strict=True)
    ]
    assert continuations(model, prompts, most, **ends) == alone
    assert any(len(each) > 3 for each in alone)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("which", list(LOGS))
def test_a_killed_evaluation_resumes_to_the_same_log(arguments, tmp_path, monkeypatch, which):
    assert main(arguments(which, output="whole")) == 0
    put, done = Pieces.put, []

    def put_and_die(self: Pieces, *piece: Any) -> None:
        put(self, *piece)
        done.append(piece[:2])
        if len(done) == 1 + (which != "tdec"):
            with (tmp_path / "run" / "pieces.jsonl").open("a") as file:
                file.write('{"name": "cut in the midd')
            raise Killed

    monkeypatch.setattr(Pieces, "put", put_and_die)
    with pytest.raises(Killed):
        main(arguments(which))
    assert not (tmp_path / "run" / LOGS[which]).exists()
    again = []
    monkeypatch.setattr(
        Pieces, "put", lambda self, *piece: (put(self, *piece), again.append(piece[:2]))
    )
    assert main(arguments(which, "--resume")) == 0
    assert again and not set(again) & set(done)
    whole, resumed = (tmp_path / name / LOGS[which] for name in ("whole", "run"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_text_too_short_for_min_k_is_named(arguments, data, tmp_path, capsys):
    for path in (data / "muse").rglob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        write(tmp_path / "short" / path.relative_to(data / "muse"), records)
    short = tmp_path / "short/privleak/holdout.jsonl"
    write(short, [{"text": "Question"}])
    said = refused(arguments("muse", "--data", str(tmp_path / "short")), capsys)
    assert str(short) in said and "too few to score" in said


def test_what_was_begun_otherwise_is_not_resumed(arguments, capsys):
    assert main(arguments("tdec")) == 0
    assert "--resume" in refused(arguments("tdec"), capsys)
    assert "n 2, this one has 3" in refused(arguments("tdec", "--resume", "--n", "3"), capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--benchmark", "wmdp"), "benchmark must be one of tofu, muse, tdec; got 'wmdp'"),
        (("--split", "forget20"), "forget01, forget05, forget10"),
        (("--split", "forget05"), "has no file forget05_perturbed"),
        (("--convention", "paper"), "open-unlearning, tofu, tofu-paper; got 'paper'"),
        (("--template", "gpt"), "llama2, phi, stablelm, pythia, chat; got 'gpt'"),
        (("--rows", "0"), "rows must be >= 1, got 0"),
        (("--adapter", "nowhere"), "adapter nowhere has no adapter_config.json"),
        (("--retain-log", "none.json"), "log none.json cannot be read"),
    ],
)
def test_wrong_flags_are_one_line_and_write_nothing(arguments, tmp_path, capsys, flags, message):
    assert message in refused(arguments("tofu", *flags), capsys)
    assert not (tmp_path / "run").exists()


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
            {FORGET: {"avg_paraphrased_loss": [1], "average_perturb_loss": [[2]]}},
            "retain log has 1 rows in eval_log_forget.json, forget10 here has 4",
        ),
        ("muse", {"privleak": {"forget": [1.0]}}, "field 'privleak', 'holdout' is missing"),
        ("tdec", {}, "tdec compares with no other model"),
    ],
)
def test_a_bad_retain_log_is_refused_before_the_model_runs(
    arguments, tmp_path, capsys, which, log, message
):
    path = tmp_path / "retain.json"
    path.write_text(json.dumps(log))
    assert message in refused(arguments(which, "--retain-log", str(path)), capsys)
    assert not (tmp_path / "run").exists()


def test_a_row_without_a_field_is_named(arguments, data, tmp_path, capsys):
    folder = tmp_path / "spoiled"
    for path in (data / "tofu").iterdir():
        write(folder / path.name, [json.loads(line) for line in path.read_text().splitlines()])
    spoiled = folder / "forget10_perturbed.jsonl"
    rows = [json.loads(line) for line in spoiled.read_text().splitlines()]
    del rows[2]["paraphrased_answer"]
    write(spoiled, rows)
    said = refused(arguments("tofu", "--data", str(folder)), capsys)
    assert str(spoiled) in said and "3" in said and "paraphrased_answer" in said


@pytest.mark.parametrize("which", list(LOGS))
def test_a_model_that_gives_nan_is_named(new_model, tokenizer, data, tmp_path, which):
    model = new_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    config = EvaluationConfig(which, "two" if which == "tdec" else None, str(data / which), n=2)
    with pytest.raises(NonFiniteError, match="try --dtype float32"):
        evaluate_benchmark(model, tokenizer, config, tmp_path / "run", progress=False)


@pytest.mark.parametrize("which", list(LOGS))
def test_a_tokenizer_without_end_of_text_is_refused(new_model, tokenizer, data, tmp_path, which):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    config = EvaluationConfig(which, "two" if which == "tdec" else None, str(data / which), n=2)
    with pytest.raises(InputError, match="no end-of-text token"):
        evaluate_benchmark(new_model(), tokenizer, config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_losses_do_not_depend_on_the_batch(new_model, tokenizer, forget_rows):
    from fastbound.unlearning.benchmarks.templates import encode_answer

    rows: list[Encoded] = [
        encode_answer(row.question or "", row.answer, row.where, tokenizer) for row in forget_rows
    ]
    model = new_model()
    batched = session_of(model, tokenizer, 4).answers("a", rows)
    alone = session_of(model, tokenizer, 1).answers("a", rows)
    for one, other in zip(batched, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["tokens"] == other["tokens"]
        assert one["exact_memorisation"] == other["exact_memorisation"]
