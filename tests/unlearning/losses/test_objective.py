"""Every loss against the original repositories' values, its closed form, and in the loop."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

import fastbound
from fastbound.cli import main
from fastbound.unlearning import InputError, Row, UnlearnConfig, losses, unlearn
from fastbound.unlearning.data.encoding import Batch
from fastbound.unlearning.losses.objective import LOSSES, Answers, Objective, refusals

# The original functions ran in fp32.
FP32 = {"rel": 3e-7, "abs": 3e-7}


@pytest.fixture(scope="module")
def given(data_folder):
    pairs = json.loads((data_folder / "metric_refs.json").read_text())["losses"]
    sides = {
        side: (
            torch.tensor(pairs["input"][side]["logits"], dtype=torch.float64),
            torch.tensor(pairs["input"][side]["labels"]),
        )
        for side in ("forget", "retain")
    }
    reference = torch.tensor(pairs["input"]["ref_logits"], dtype=torch.float64)
    return sides["forget"], sides["retain"], reference, pairs["output"]


def _rows(logits, labels):
    return losses.row_likelihoods(losses.answer_tokens(logits, labels), len(labels))


def _mean(logits, labels):
    return losses.answer_tokens(logits, labels).loss.mean()


class TestReferencePairs:
    @pytest.mark.parametrize(
        ("gamma", "alpha", "name"),
        [(1.0, 1.0, "graddiff_nll"), (0.5, 2.0, "graddiff_gamma0.5_alpha2")],
    )
    def test_gradient_difference(self, given, gamma, alpha, name):
        (logits, labels), (kept, kept_labels), _, expected = given
        found = losses.gradient_difference(
            torch.cat([logits, kept]),
            torch.cat([labels, kept_labels]),
            len(labels),
            forget_weight=gamma,
            retain_weight=alpha,
        )
        assert found.loss.item() == pytest.approx(expected[name], **FP32)

    def test_wga(self, given):
        (logits, labels), _, _, expected = given
        found = losses.wga(losses.answer_tokens(logits, labels).loss, beta=1.0)
        assert found.item() == pytest.approx(expected["wga_forget_beta1"], **FP32)

    def test_likelihood_of_each_row(self, given):
        (logits, labels), _, _, expected = given
        assert _rows(logits, labels)[0].tolist() == pytest.approx(
            expected["batch_nll_sum_per_seq"], **FP32
        )

    def test_kl(self, given):
        _, (logits, _), reference, expected = given
        found = losses.retain_kl(logits, reference)
        assert found.item() == pytest.approx(expected["retain_kl_batchmean"], **FP32)

    def test_npo(self, given):
        (logits, labels), _, reference, expected = given
        found = losses.npo(_rows(logits, labels)[0], _rows(reference, labels)[0], beta=0.1)
        assert found.item() == pytest.approx(expected["npo_beta0.1"], **FP32)

    def test_simnpo(self, given):
        (logits, labels), retain, _, expected = given
        found = 0.125 * losses.simnpo(*_rows(logits, labels), beta=4.5) + _mean(*retain)
        assert found.item() == pytest.approx(expected["simnpo_b4.5_g0.125"], **FP32)

    def test_ihl(self, given):
        (logits, labels), _, _, expected = given
        assert losses.ihl(logits, labels).item() == pytest.approx(expected["loku_ihl"], **FP32)


class TestClosedForms:
    def test_reference_inputs_in_fp64(self, given):
        """Token by token from softmax, where the original values stop at fp32."""
        (logits, labels), (kept, _), before, _ = given

        def likelihoods(scores):
            return [
                [-math.log(F.softmax(scores[i, t - 1], -1)[labels[i, t]]) for t in places]
                for i, places in enumerate(rows)
            ]

        rows = [[t for t in range(1, labels.shape[1]) if row[t] != -100] for row in labels]
        now, then = likelihoods(logits), likelihoods(before)
        drop = [sum(a) - sum(b) for a, b in zip(now, then, strict=True)]
        count = len(rows)
        npo = sum(20 * math.log1p(math.exp(-0.1 * d)) for d in drop) / count
        simnpo = sum(2 / 4.5 * math.log1p(math.exp(-4.5 * sum(r) / len(r))) for r in now) / count
        hinge = []
        for i, places in enumerate(rows):
            for t in places:
                p = F.softmax(logits[i, t - 1], -1).tolist()
                label = p.pop(labels[i, t])
                hinge.append(max(0.0, 1 + label - max(p)))
        p, q = F.softmax(before, -1), F.softmax(kept, -1)
        kl = (p * (p / q).log()).sum() / p[..., 0].numel()
        nll, lengths = _rows(logits, labels)
        exact = {"rel": 1e-9, "abs": 0}
        assert losses.npo(nll, _rows(before, labels)[0]).item() == pytest.approx(npo, **exact)
        assert losses.simnpo(nll, lengths).item() == pytest.approx(simnpo, **exact)
        assert losses.ihl(logits, labels).item() == pytest.approx(sum(hinge) / len(hinge), **exact)
        assert losses.retain_kl(kept, before).item() == pytest.approx(kl.item(), **exact)

    def test_dpo_is_the_logistic_loss_of_the_margin(self):
        wanted, wanted_before, unwanted, before = torch.tensor(
            [[3.0, 1.0], [4.0, 2.5], [7.0, 2.0], [5.0, 3.0]], dtype=torch.float64
        )
        found = losses.dpo(wanted, wanted_before, unwanted, before, beta=0.1)
        margins = [(7 - 5) - (3 - 4), (2 - 3) - (1 - 2.5)]
        expected = sum(2 / 0.1 * math.log1p(math.exp(-0.1 * m)) for m in margins) / 2
        assert found.item() == pytest.approx(expected, rel=1e-12)

    def test_npo_of_an_unmoved_model_is_two_log_two_over_beta(self):
        nll = torch.rand(4, dtype=torch.float64)
        assert losses.npo(nll, nll, beta=0.1).item() == pytest.approx(20 * math.log(2), rel=1e-12)

    def test_ihl_lies_between_zero_and_two(self):
        labels = torch.tensor([[-100, 1, 1]])
        sure = torch.full((1, 3, 4), -100.0, dtype=torch.float64)
        sure[..., 1] = 100.0
        assert losses.ihl(sure, labels).item() == pytest.approx(2, rel=1e-12)
        assert losses.ihl(-sure, labels).item() == pytest.approx(2 / 3, rel=1e-12)

    def test_kl_leaves_padding_out(self):
        logits, reference = torch.randn(2, 2, 3, 5, dtype=torch.float64)
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        p, q = (F.softmax(t, -1)[mask.bool()] for t in (reference, logits))
        expected = (p * (p / q).log()).sum() / 3
        torch.testing.assert_close(losses.retain_kl(logits, reference, mask), expected)
        assert losses.retain_kl(logits, logits, mask).abs() < 1e-15


def test_a_weighted_sum_is_the_sum_of_its_parts():
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 6, 5, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (6, 5), generator=generator)
    labels[:, :2] = -100
    batch = Batch(labels, torch.ones_like(labels), labels)
    states = torch.randn(2, 6, 5, 7, generator=generator, dtype=torch.float64)
    now, before = (
        Answers.of(each, labels)._replace(hidden=state)
        for each, state in zip((logits, reference), states, strict=True)
    )

    def value(weights):
        return Objective(weights)(now, batch, (2, 2, 2), reference=before).loss

    weights = {name: 0.5 + (number * 0.7) % 3 for number, name in enumerate(LOSSES)}
    parts = sum(weight * value({name: 1.0}) for name, weight in weights.items())
    torch.testing.assert_close(value(weights), parts, rtol=1e-12, atol=0)
    assert len({round(value({name: 1.0}).item(), 9) for name in LOSSES}) == len(LOSSES)


@pytest.mark.parametrize(("name", "rows"), [("idk", (2, 2)), ("dpo", (1, 3)), ("retain", (2, 3))])
def test_rows_that_are_not_those_of_the_batch_are_refused(name, rows):
    """Without refusals idk would be dropped, and dpo NaN."""
    labels = torch.randint(0, 9, (4, 5))
    answers = Answers.of(torch.randn(4, 5, 9), labels)
    batch = Batch(labels, torch.ones_like(labels), labels)
    with pytest.raises(ValueError, match="rows must be the numbers of rows of forget"):
        Objective({name: 1.0})(answers, batch, rows, reference=answers)


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_every_loss_trains_in_the_loop(user_folder, adapter):
    import transformers

    for name in LOSSES:
        model = transformers.AutoModelForCausalLM.from_pretrained("my-model")
        tokenizer = transformers.AutoTokenizer.from_pretrained("my-model")
        given = {name: 1.0, "rmu": 1.0} if name == "rmu_retain" else {name: 1.0}
        config = UnlearnConfig(
            adapter=adapter, losses=given, lr=1e-2, epochs=4, batch_size=2, clip=1.0
        )
        result = unlearn(model, tokenizer, "forget.jsonl", "retain.jsonl", config, progress=False)
        first, last = result.history[0], result.history[-1]
        side = "retain" if name in ("retain", "kl") else "forget"
        moved = getattr(last, side).loss - getattr(first, side).loss
        assert result.largest_delta > 0 or name == "kl", name
        if name in ("gradient_ascent", "npo", "simnpo", "dpo", "wga", "undial", "ceu"):
            assert moved > 0, name
        if name == "retain":
            assert moved < 0
        if name == "kl":  # where it began, nothing pulls but rounding, which Adam magnifies
            assert abs(moved) < 1e-3


def test_the_default_is_gradient_difference(user_folder):
    import transformers

    def run(**settings):
        model = transformers.AutoModelForCausalLM.from_pretrained("my-model")
        tokenizer = transformers.AutoTokenizer.from_pretrained("my-model")
        config = UnlearnConfig(epochs=2, batch_size=2, **settings)
        return unlearn(
            model, tokenizer, "forget.jsonl", "retain.jsonl", config, progress=False
        ).history

    assert run() == run(losses={"gradient_ascent": 1.0, "retain": 1.0})


class TestReference:
    @pytest.mark.parametrize("fuse_mlp", [True, False])
    def test_a_disabled_adapter_gives_the_base_to_the_bit(self, tiny_model, fuse_mlp):
        tokens = torch.arange(3, 15).view(2, 6)
        base = tiny_model("llama")(tokens).logits
        model = tiny_model("llama")
        fastbound.inject(model, 4, bound=0.5, fuse_mlp=fuse_mlp)
        for module in model.modules():
            if isinstance(module, fastbound.BoundedAdapter):
                torch.nn.init.normal_(module.B)
        moved = model(tokens).logits
        with fastbound.disable_adapter(model):
            assert torch.equal(model(tokens).logits, base)
            assert {row.plan.strategy for row in fastbound.explain(model)} == {"base"}
        assert torch.equal(model(tokens).logits, moved) and not torch.equal(moved, base)

    def test_a_model_without_adapters_is_refused(self, tiny_model):
        with pytest.raises(ValueError, match="holds no FusedBoundedLinear"):
            fastbound.disable_adapter(tiny_model("llama")).__enter__()


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"losses": {"nop": 1.0}}, "unknown loss 'nop'; choose from gradient_ascent, retain"),
            ({"losses": {}}, "losses is empty"),
            ({"losses": {"npo": math.inf}}, "weight of npo must be >= 0 and finite, got inf"),
            ({"losses": {"npo": -1.0}}, "weight of npo must be >= 0 and finite, got -1.0"),
            ({"losses": {"npo": 1.0}, "retain_weight": 2.0}, "not both"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(InputError, match=message):
            UnlearnConfig(**settings)

    def test_a_text_cannot_be_refused(self):
        with pytest.raises(InputError, match=r"a\.jsonl:3: the losses idk and dpo need a question"):
            refusals([Row(None, "text", "a.jsonl:3")])

    def test_the_command_names_a_weight_that_is_none(self, user_folder, capsys):
        rows = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
        assert main(["unlearn", "--model", "my-model", *rows, "--loss", "npo=x"]) == 2
        said = capsys.readouterr().err
        assert "must be NAME or NAME=WEIGHT, and OPTION=NUMBER after commas; got 'npo=x'" in said


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"retain": math.nan}, "the weight of retain must be >= 0 and finite, got nan"),
        ({"npo": math.inf, "retain": 1.0}, "the weight of npo must be >= 0 and finite, got inf"),
        ({"npo": -1.0}, "the weight of npo must be >= 0 and finite, got -1.0"),
        ({"gradient_ascent": 0.0, "retain": 0}, "every weight is 0 .gradient_ascent, retain.: "),
        ({}, "losses is empty"),
    ],
)
def test_an_objective_of_weights_that_say_nothing_is_refused(weights, message):
    with pytest.raises(InputError, match=message):
        Objective(weights)
