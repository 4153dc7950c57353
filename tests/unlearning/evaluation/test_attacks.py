"""`fastbound evaluate --attack`: what each attack brings back, what it reports, what it refuses."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbound
from fastbound.cli import main, parse
from fastbound.unlearning import InputError, UnlearnConfig, unlearn
from fastbound.unlearning.data.rows import RepeatedRowsWarning
from fastbound.unlearning.evaluation.attacks.command import check_flags
from fastbound.unlearning.evaluation.attacks.quantize import quantized
from fastbound.unlearning.evaluation.attacks.run import attack
from fastbound.unlearning.evaluation.attacks.subject import AttackConfig, recovered
from fastbound.unlearning.metrics.answers import Score
from fastbound.unlearning.model import load_adapter, load_pretrained, merged

PNG = b"\x89PNG"
UNRELATED = [
    {"question": f"How deep is lake {name}?", "answer": f"Lake {name} is {depth} metres deep."}
    for name, depth in (("Ohr", 12), ("Prespa", 54), ("Sild", 7), ("Vaen", 33))
]


@pytest.fixture(scope="module")
def attacked(model_folder, forget_rows, retain_rows, tmp_path_factory):
    """A folder with an adapter that has made the model forget, and rows in TOFU's fields."""
    folder = tmp_path_factory.mktemp("attacked")
    model, tokenizer = load_pretrained(str(model_folder))
    config = UnlearnConfig(lr=3e-2, epochs=8, batch_size=3, bound=0.3, seed=1)
    unlearn(
        model, tokenizer, forget_rows, retain_rows, config, output=folder / "run", progress=False
    )
    forget = [
        {
            "question": row.question,
            "answer": row.answer,
            "paraphrased_question": f"Tell me: {row.question}",
            "paraphrased_answer": f"Well, {row.answer}",
            "perturbed_answer": [f"Well, {other.answer}" for other in retain_rows[:2]],
        }
        for row in forget_rows
    ]
    kept = [{"question": row.question, "answer": row.answer} for row in retain_rows]
    for name, rows in (("forget", forget), ("retain", kept), ("unrelated", UNRELATED)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def command(attacked, model_folder):
    """The command, with the flags that are common to all attacks."""

    def make(output, *more):
        return [
            *("evaluate", "--model", str(model_folder), "--output", str(output)),
            *("--adapter", str(attacked / "run/adapter"), "--device", "cpu"),
            *("--forget", str(attacked / "forget.jsonl")),
            *("--retain", str(attacked / "retain.jsonl")),
            *("--unrelated", str(attacked / "unrelated.jsonl"), *more),
        ]

    return make


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def reported(command, attacked, model_folder, tmp_path_factory):
    """All attacks by the command: attack.json, the folder, and the given files before and after."""
    output = tmp_path_factory.mktemp("out") / "attack"
    given = [model_folder, attacked / "run"]
    before = [digests(each) for each in given]
    flags = ("--attack", "all", "--steps", "5", "--lr", "3e-3", "--reference", str(model_folder))
    assert main(command(output, *flags)) == 0
    return (
        json.loads((output / "attack.json").read_text()),
        output,
        (before, list(map(digests, given))),
    )


def test_the_given_files_are_left_as_they_are(reported):
    before, after = reported[2]
    assert before == after and all(before)


def test_the_config_of_an_attack_gives_its_options_again(reported, attacked):
    again = parse(["evaluate", "--config", str(reported[1] / "config.yaml"), "--output", "again"])
    check_flags(again)  # nothing in it belongs to a benchmark
    assert (again.attack, again.steps, again.lr) == ("relearn,quantize,paraphrase", 5, 3e-3)
    assert again.forget == str(attacked / "forget.jsonl") and again.weights == "all"


def test_relearning_a_tenth_brings_the_other_rows_back_by_step(reported):
    result = reported[0]["relearn"]
    assert result["measured"] == 5  # of six rows one is relearned
    curves = {(c["model"], c["rows"]): c for c in result["curves"]}
    assert set(curves) == {
        (model, rows)
        for model in ("unlearned", "reference")
        for rows in ("forget", "retain", "unrelated")
    }
    assert curves["unlearned", "forget"]["taught"] == 1
    before = result["before"]["accuracy"]
    for (model, _), curve in curves.items():
        steps = [each["step"] for each in curve["steps"]]
        assert steps == [0, 1, 2, 3, 4, 5]
        start = curve["steps"][0]
        if model == "reference":  # which is the model from before here, and forgets what it knew
            assert start["accuracy"] == before and start["recovered"] is None
            continue
        assert start["recovered"] == 0
        for each in curve["steps"]:
            expected = (each["accuracy"] - start["accuracy"]) / (before - start["accuracy"])
            assert each["recovered"] == pytest.approx(expected)
    start, end = (curves["unlearned", "forget"]["steps"][k] for k in (0, -1))
    assert start["accuracy"] < 0.5 < before and start["loss"] > 2
    assert end["loss"] < start["loss"]


def test_quantisation_is_scored_in_full_in_eight_and_in_four_bits(reported):
    rows = reported[0]["quantize"]["models"]
    assert [(each["model"], each["bits"]) for each in rows] == [
        (model, bits) for model in ("unlearned", "before") for bits in (None, 8, 4)
    ]
    by = {(each["model"], each["bits"]): each for each in rows}
    full, eight, four = (by["unlearned", bits] for bits in (None, 8, 4))
    assert full["forget"]["recovered"] == 0
    # Eight bits hardly change a loss, four change it more.
    change = [abs(e["retain"]["loss"] - full["retain"]["loss"]) for e in (eight, four)]
    assert 0 < change[0] < change[1]
    assert by["before", 8]["forget"]["accuracy"] > 0.9 > full["forget"]["accuracy"]


def test_paraphrases_are_scored_beside_the_rows_as_they_were_unlearned(reported):
    result = reported[0]["paraphrase"]
    forms = ["as unlearned", "question in other words", "answer in other words"]
    forms.append("both in other words")
    assert [e["form"] for e in result["models"] if e["model"] == "unlearned"] == forms
    own = {each["form"]: each for each in result["models"] if each["model"] == "unlearned"}
    known = {each["form"]: each for each in result["models"] if each["model"] == "before"}
    assert own["as unlearned"]["recovered"] == 0
    assert known["question in other words"]["accuracy"] > own["question in other words"]["accuracy"]
    assert result["prefers_right"]["before"] > result["prefers_right"]["unlearned"]
    assert result["wrong_answers"] == 2


def test_the_report_is_written_for_people_as_well(reported):
    _, output, _ = reported
    text = (output / "attack.md").read_text()
    for head in ("## relearn", "## quantize", "## paraphrase", "| unlearned | 4 |", "attack.png"):
        assert head in text
    assert "rows: 6 forget, 9 retain, 4 unrelated" in text
    assert (output / "attack.png").read_bytes().startswith(PNG)


def test_a_right_answer_is_preferred_where_its_loss_is_the_lowest(reported, attacked, model_folder):
    """By whole forwards of single rows."""
    model, tokenizer = load_pretrained(str(model_folder))
    model = merged(load_adapter(model, attacked / "run/adapter")).eval()

    def loss(question, answer):
        prompt = f"Question: {question}\nAnswer: "
        ids = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt").input_ids
        labels = ids.clone()
        labels[0, : len(tokenizer(prompt.rstrip()).input_ids)] = -100
        with torch.no_grad():
            return model(ids, labels=labels).loss.item()

    rows = [json.loads(line) for line in (attacked / "forget.jsonl").open()]
    hits = [
        loss(row["question"], row["paraphrased_answer"])
        < min(loss(row["question"], wrong) for wrong in row["perturbed_answer"])
        for row in rows
    ]
    share = reported[0]["paraphrase"]["prefers_right"]["unlearned"]
    assert share == pytest.approx(sum(hits) / len(hits))


class TestRecovered:
    @pytest.mark.parametrize(
        ("now", "before", "expected"),
        [(0.2, 0.9, 0.0), (0.9, 0.9, 1.0), (0.55, 0.9, 0.5), (0.1, 0.7, -0.2), (0.5, 0.2, None)],
    )
    def test_it_is_0_as_unlearned_and_1_as_before(self, now, before, expected):
        scores = [Score(1.0, accuracy, 0.0, 1) for accuracy in (now, 0.2, before)]
        assert recovered(*scores) == (None if expected is None else pytest.approx(expected))

    def test_without_a_model_from_before_it_is_not_known(self):
        assert recovered(Score(1, 0.5, 0, 1), Score(1, 0.2, 0, 1), None) is None


def _linear_with(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


class TestQuantized:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("width", [64, 48, 33])
    def test_weights_are_rounded_to_nearest_by_row_or_group(self, bits, width):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, 32))
        weight, x = model[0].weight.detach().clone(), torch.randn(4, width)
        group = width if bits == 8 else {64: 32, 48: 16, 33: 33}[width]
        with torch.no_grad():
            found = quantized(model, bits)(x)
            rounded = model[0].weight.dequantize()
            expected = torch.nn.functional.linear(x, rounded, model[0].bias)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        blocks, near = weight.view(32, -1, group), rounded.view(32, -1, group)
        scale = blocks.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
        assert ((near - blocks).abs() <= 0.5001 * scale).all()
        levels = near / scale
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert (near - blocks).abs().max() > 0.3 * scale.min()

    def test_the_head_stays_as_it_is(self, tiny_model):
        model = tiny_model("llama")
        head = model.lm_head.weight.data_ptr()
        quantized(model, 8)
        assert model.lm_head.weight.data_ptr() == head
        assert type(model.model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor

    def test_the_transposed_layers_of_gpt2_are_rounded_as_linear_ones(self, tiny_model):
        model = tiny_model("gpt2").eval()
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():
            before = model(ids).logits
            kept = model.transformer.h[0].mlp.c_fc.weight.detach().t().clone()
            near = quantized(model, 8)(ids).logits
        layer = model.transformer.h[0].mlp.c_fc
        assert type(layer) is nn.Linear
        alike = quantized(nn.Sequential(_linear_with(kept)), 8)[0]
        assert torch.equal(layer.weight.dequantize(), alike.weight.dequantize())
        assert 0 < (near - before).abs().max() < 0.05 * before.abs().max()

    def test_other_bits_and_models_without_layers_are_refused(self):
        with pytest.raises(InputError, match="bits must be one of 8, 4, got 3"):
            quantized(nn.Sequential(nn.Linear(4, 4)), 3)
        with pytest.raises(InputError, match=r"has no nn.Linear to quantise"):
            quantized(nn.Sequential(nn.ReLU()), 8)

    def test_without_torchao_the_extra_is_named(self, command, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchao", None)
        assert main(command(tmp_path / "out", "--attack", "quantize")) == 2
        assert 'pip install "fastbound[quantized]"' in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["all", "lora"])
def test_relearning_half_of_the_rows_moves_the_other_half(
    attacked, model_folder, tmp_path, weights
):
    """A stronger attack than the command's default; what LoRA trains is not the model's weights."""

    def load():
        model = load_pretrained(str(model_folder))[0]
        return merged(load_adapter(model, attacked / "run/adapter"))

    config = AttackConfig(("relearn",), steps=40, lr=3e-3, share=0.5, weights=weights, batch_size=5)
    models = {"unlearned": load, "before": lambda: load_pretrained(str(model_folder))[0]}
    attack(
        models,
        load_pretrained(str(model_folder))[1],
        attacked / "forget.jsonl",
        config,
        unrelated=attacked / "unrelated.jsonl",
        output=tmp_path / "out",
    )
    result = json.loads((tmp_path / "out/attack.json").read_text())["relearn"]
    assert result["measured"] == 3 and [c["taught"] for c in result["curves"]] == [3, 4]
    by_rows = {c["rows"]: c["steps"] for c in result["curves"]}
    assert by_rows["forget"][-1]["loss"] < 0.7 * by_rows["forget"][0]["loss"]


def test_a_repeated_row_is_not_both_relearned_and_measured(attacked, model_folder, tmp_path):
    rows = (attacked / "forget.jsonl").read_text().splitlines()
    repeated = tmp_path / "repeated.jsonl"
    repeated.write_text("\n".join([rows[0], rows[1], rows[0], rows[0]]))
    with pytest.warns(RepeatedRowsWarning):
        attack(
            {"unlearned": lambda: load_pretrained(str(model_folder))[0]},
            load_pretrained(str(model_folder))[1],
            repeated,
            AttackConfig(("relearn",), steps=1, share=0.5),
            unrelated=attacked / "unrelated.jsonl",
            output=tmp_path / "out",
        )
    result = json.loads((tmp_path / "out/attack.json").read_text())
    assert result["rows"]["forget"] == 2
    assert result["relearn"]["measured"] == 1 and result["relearn"]["curves"][0]["taught"] == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (
                ("--attack", "melt"),
                "attack must be some of relearn, quantize, paraphrase; got 'mel",
            ),
            (("--attack", "relearn", "--split", "forget01"), "--split is for --benchmark"),
            (("--attack", "relearn", "--steps", "0"), "steps must be an integer >= 1, got 0"),
            (("--attack", "relearn", "--lr", "-1"), "lr must be positive and finite, got -1.0"),
            (
                ("--attack", "relearn", "--weights", "some"),
                "weights must be one of all, lora; got 'some",
            ),
            (("--attack", "relearn", "--resume"), "nothing to --resume"),
            (("--attack", "relearn", "--template", "x"), "template must hold {question}"),
            ((), "--forget is for --attack: add that, or leave it out"),
        ],
    )
    def test_flags(self, command, tmp_path, capsys, flags, message):
        assert main(command(tmp_path / "out", *flags)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_an_attack_without_forget_rows(self, model_folder, tmp_path, capsys):
        flags = ["--model", str(model_folder), "--output", str(tmp_path / "out")]
        assert main(["evaluate", "--attack", "relearn", *flags]) == 2
        said = capsys.readouterr().err
        assert "--attack needs --forget: the rows that the model has unlearned" in said
        assert main(["evaluate", *flags]) == 2
        assert "give --benchmark (tofu, muse or tdec) or --attack" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"--forget": "one"}, "give two different ones at least, got 1"),
            ({"--forget": "plain", "--attack": "paraphrase"}, "needs 'paraphrased_question' or"),
            ({"--unrelated": "retain"}, "--unrelated share 9 rows with retain"),
            ({"--retain": "forget"}, "forget and retain share 6 rows"),
        ],
    )
    def test_rows(self, command, attacked, tmp_path, capsys, change, message):
        rows = [json.loads(line) for line in (attacked / "forget.jsonl").open()]
        files = {
            "one": rows[:1],
            "plain": [{k: row[k] for k in ("question", "answer")} for row in rows],
        }
        flags = ["--attack", "relearn"]
        for flag, value in change.items():
            path = tmp_path / f"{value}.jsonl"
            if value in files:
                path.write_text("".join(json.dumps(row) + "\n" for row in files[value]))
            else:
                path = attacked / f"{value}.jsonl"
            flags += [flag, value if flag == "--attack" else str(path)]
        assert main(command(tmp_path / "out", *flags)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_the_shipped_authors_are_not_unrelated_where_they_were_unlearned(
        self, command, tmp_path, capsys
    ):
        arguments = command(tmp_path / "out", "--attack", "relearn")
        place = arguments.index("--unrelated")
        assert main([*arguments[:place], *arguments[place + 2 :]]) == 2
        assert "the shipped authors share 9 rows with retain" in capsys.readouterr().err

    def test_a_folder_in_use(self, command, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/notes.txt").write_text("mine")
        assert main(command(tmp_path / "mine", "--attack", "paraphrase")) == 2
        assert "is not empty and holds no run" in capsys.readouterr().err

    def test_weights_that_cannot_take_the_adapter(self):
        with pytest.raises(InputError, match=r"holds a NaN"):
            model = nn.Sequential(nn.Linear(4, 4))
            fastbound.inject(model, 1, target_modules="all-linear")
            for module in model.modules():
                if isinstance(module, fastbound.BoundedAdapter):
                    module.B.data.fill_(float("nan"))
            merged(model)


@pytest.mark.parametrize("fault", ["no list", "too long"])
def test_a_row_that_the_last_attack_cannot_use_is_refused_before_the_first(
    attacked, model_folder, tmp_path, fault
):
    rows = [json.loads(line) for line in (attacked / "forget.jsonl").read_text().splitlines()]
    if fault == "no list":
        rows[-1]["perturbed_answer"] = None
    else:
        rows[-1]["paraphrased_answer"] = "so " * 300
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"unlearned": lambda: pytest.fail("a model was loaded")}
    tokenizer = load_pretrained(str(model_folder))[1]
    with pytest.raises(InputError, match=r"must be a list of texts|more than the 256"):
        attack(models, tokenizer, tmp_path / "rows.jsonl", output=tmp_path / "out",
               retain=attacked / "retain.jsonl",
               unrelated=attacked / "unrelated.jsonl")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_loaded_anew_is_refused_and_an_adapter_merged(
    attacked, model_folder, tmp_path
):
    model, tokenizer = load_pretrained(str(model_folder))
    config = AttackConfig(("relearn",), steps=1)
    settings = {"retain": attacked / "retain.jsonl", "unrelated": attacked / "unrelated.jsonl"}
    forget = attacked / "forget.jsonl"
    with pytest.raises(InputError, match="let it load the model anew each time"):
        attack({"unlearned": lambda: model}, tokenizer, forget, config, output=tmp_path / "same",
               **settings)  # fmt: skip

    def adapted():
        return load_adapter(load_pretrained(str(model_folder))[0], attacked / "run/adapter")

    def whole():
        return merged(adapted())

    found = []
    for name, load in {"adapted": adapted, "merged": whole}.items():
        attack({"unlearned": load}, tokenizer, forget, config, output=tmp_path / name, **settings)
        curves = json.loads((tmp_path / name / "attack.json").read_text())["relearn"]["curves"]
        found.append([step["loss"] for curve in curves for step in curve["steps"]])
    # AdamW's first step is the sign of each gradient, which rounding decides where it is near 0.
    assert found[0] == pytest.approx(found[1], rel=1e-3)
