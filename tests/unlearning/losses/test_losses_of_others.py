"""WGA, SatImp, UNDIAL, CE-U, PDU and RMU: closed forms, options, and what they move in a run."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import transformers

from fastbound.cli import main
from fastbound.unlearning import InputError, UnlearnConfig, load_rows, losses, unlearn
from fastbound.unlearning.data.encoding import Batch, collate, encode_all
from fastbound.unlearning.losses.cross_entropy import WHOLE
from fastbound.unlearning.losses.hidden import decoder_layers, layer_at
from fastbound.unlearning.losses.objective import Answers, Objective, described
from fastbound.unlearning.training.step import Training

EXACT = {"rel": 1e-12, "abs": 0}


@pytest.fixture
def drawn():
    """Logits now and before, and labels with a question of two tokens and padding."""
    generator = torch.Generator().manual_seed(3)
    now, before = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 7, (3, 6), generator=generator)
    labels[:, :2] = -100
    labels[1, 5:] = -100
    return now, before, labels


def positions(labels):
    """Row and place of every label, one after the other."""
    return [(i, t) for i, row in enumerate(labels.tolist()) for t, v in enumerate(row) if v != -100]


def softmax(scores):
    top = max(scores)
    parts = [math.exp(each - top) for each in scores]
    return [part / sum(parts) for part in parts]


class TestClosedForms:
    @pytest.mark.parametrize(("beta1", "beta2"), [(5.0, 1.0), (1.0, 0.0), (0.5, 2.0)])
    def test_satimp_weighs_each_token_by_its_own_probability(self, drawn, beta1, beta2):
        now, _, labels = drawn
        likely = [softmax(now[i, t - 1].tolist())[labels[i, t]] for i, t in positions(labels)]
        expected = sum(p**beta1 * (1 - p) ** beta2 * math.log(p) for p in likely) / len(likely)
        nll = losses.answer_tokens(now, labels).loss
        found = losses.satimp(nll, beta1=beta1, beta2=beta2)
        assert found.item() == pytest.approx(expected, **EXACT)

    def test_the_weights_of_wga_and_satimp_carry_no_gradient(self):
        nll = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
        losses.wga(nll, beta=2.0).backward()
        assert nll.grad.tolist() == pytest.approx([-math.exp(-2 * n) / 2 for n in (0.5, 2.0)])

    def test_wga_without_a_weight_is_gradient_ascent(self, drawn):
        now, _, labels = drawn
        nll = losses.answer_tokens(now, labels).loss
        assert torch.equal(losses.wga(nll, beta=0.0), -nll.mean())

    @pytest.mark.parametrize("level", [0.7, 2.5])
    def test_flooding_is_the_distance_of_each_rows_mean_from_the_level(self, drawn, level):
        now, _, labels = drawn
        rows: dict[int, list[float]] = {}
        for i, t in positions(labels):
            rows.setdefault(i, []).append(-math.log(softmax(now[i, t - 1].tolist())[labels[i, t]]))
        expected = sum(abs(sum(row) / len(row) - level) for row in rows.values()) / len(rows)
        nll, lengths = losses.row_likelihoods(losses.answer_tokens(now, labels), len(labels))
        found = losses.flooding(nll, lengths, level=level)
        assert found.item() == pytest.approx(expected, **EXACT)

    def test_flooding_raises_a_row_below_the_level_and_lowers_one_above(self):
        nll = torch.tensor([2.0, 30.0], dtype=torch.float64, requires_grad=True)
        losses.flooding(nll, torch.tensor([4.0, 5.0]), level=2.5).backward()
        assert nll.grad.tolist() == pytest.approx([-1 / (2 * 4), 1 / (2 * 5)])

    @pytest.mark.parametrize("beta", [10.0, 0.5])
    def test_undial_is_the_cross_entropy_with_the_label_lowered_before(self, drawn, beta):
        now, before, labels = drawn
        expected = []
        for i, t in positions(labels):
            lowered = before[i, t - 1].tolist()
            lowered[labels[i, t]] -= beta
            wanted, found = softmax(lowered), softmax(now[i, t - 1].tolist())
            expected.append(-sum(q * math.log(p) for q, p in zip(wanted, found, strict=True)))
        value = losses.undial(now, before, labels, beta=beta)
        assert value.item() == pytest.approx(sum(expected) / len(expected), **EXACT)

    def test_undial_has_no_gradient_where_its_target_is_reached(self, drawn):
        _, before, labels = drawn
        reached = before.clone()
        for i, t in positions(labels):
            reached[i, t - 1, labels[i, t]] -= 10.0
        reached.requires_grad_(True)
        losses.undial(reached, before, labels).backward()
        assert reached.grad.abs().max() < 1e-15

    @pytest.mark.parametrize("skip", [0, 1, 2])
    def test_ceu_is_the_cross_entropy_to_the_others_renormalised(self, drawn, skip):
        now, _, labels = drawn
        expected = []
        seen: dict[int, int] = {}
        for i, t in positions(labels):
            seen[i] = seen.get(i, 0) + 1
            if seen[i] > skip:
                p = softmax(now[i, t - 1].tolist())
                label = int(labels[i, t])
                rest = [q for v, q in enumerate(p) if v != label]
                expected.append(-sum(q / (1 - p[label]) * math.log(q) for q in rest))
        value = losses.ceu(now, labels, skip=skip)
        assert value.item() == pytest.approx(sum(expected) / len(expected), **EXACT)

    def test_ceu_of_answers_that_are_skipped_whole_is_zero(self, drawn):
        now, _, labels = drawn
        now.requires_grad_(True)
        value = losses.ceu(now, labels, skip=9)
        value.backward()
        assert value.item() == 0 and not now.grad.any()

    def test_pdu_is_the_squared_margin_of_the_largest_logit(self, drawn):
        now, _, labels = drawn
        scores = [now[i, t - 1].tolist() for i, t in positions(labels)]
        expected = sum((max(each) - sum(each) / 7) ** 2 for each in scores) / len(scores)
        assert losses.pdu(now, labels).item() == pytest.approx(expected, **EXACT)
        assert losses.pdu(torch.full_like(now, 2.5), labels).item() == 0

    def test_rmu_is_a_mean_of_rows_of_answer_tokens_of_the_width(self, drawn):
        states, _, labels = drawn
        target = losses.control_vector(7, steering=2.0).double()
        rows = []
        for i, row in enumerate(labels.tolist()):
            places = [t for t, label in enumerate(row) if label != -100]
            each = [((states[i, t] - target) ** 2).sum().item() / 7 for t in places]
            rows.append(sum(each) / len(each))
        value = losses.rmu(states, target, labels)
        assert value.item() == pytest.approx(sum(rows) / len(rows), **EXACT)

    def test_the_control_vector_has_the_steering_as_its_length_and_no_negative_entry(self):
        vector = losses.control_vector(64, steering=6.5, seed=1)
        assert vector.norm().item() == pytest.approx(6.5, rel=1e-6) and (vector >= 0).all()
        assert torch.equal(vector, losses.control_vector(64, steering=6.5, seed=1))
        assert not torch.equal(vector, losses.control_vector(64, steering=6.5, seed=2))


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("npo", {"beta": 0.5}),
            ("simnpo", {"beta": 2, "delta": 0.1}),
            ("flooding", {"level": 1}),
            ("wga", {"beta": 3}),
            ("satimp", {"beta1": 1, "beta2": 3}),
            ("undial", {"beta": 3}),
            ("ceu", {"skip": 0}),
            ("rmu", {"steering": 1}),
        ],
    )
    def test_an_option_reaches_its_formula(self, drawn, name, options):
        now, before, labels = drawn
        batch = Batch(labels, torch.ones_like(labels), labels)
        both = [Answers.of(each, labels)._replace(hidden=each) for each in (now, before)]
        of_rows = [
            losses.row_likelihoods(losses.answer_tokens(each[:2], labels[:2]), 2)
            for each in (now, before)
        ]
        nll = losses.answer_tokens(now[:2], labels[:2]).loss
        direct = {
            "npo": lambda: losses.npo(of_rows[0][0], of_rows[1][0], **options),
            "simnpo": lambda: losses.simnpo(*of_rows[0], **options),
            "flooding": lambda: losses.flooding(*of_rows[0], **options),
            "wga": lambda: losses.wga(nll, **options),
            "satimp": lambda: losses.satimp(nll, **options),
            "undial": lambda: losses.undial(now[:2], before[:2], labels[:2], **options),
            "ceu": lambda: losses.ceu(now[:2], labels[:2], **options),
            "rmu": lambda: losses.rmu(
                now[:2], losses.control_vector(7, seed=5, **options).double(), labels[:2]
            ),
        }[name]()
        found, default = (
            Objective({name: given}, seed=5)(both[0], batch, (2, 1), reference=both[1]).loss
            for given in (options, 1.0)
        )
        torch.testing.assert_close(found, direct, rtol=1e-12, atol=0)
        assert abs(found - default) > 1e-3

    def test_weights_and_options_are_told_as_they_were_given(self):
        given = {"rmu": {"weight": 2, "layer": 3.0}, "retain": 0.5}
        assert described(UnlearnConfig(losses=given).losses) == "2 rmu (layer 3) + 0.5 retain"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"ihl": {"beta": 1}}, "the loss ihl has no option 'beta': it has none"),
            ({"npo": {"gamma": 1}}, "the loss npo has no option 'gamma': it has beta"),
            (
                {"flooding": {"level": 0}},
                "level of the loss flooding must be finite and > 0, got 0",
            ),
            ({"npo": {"beta": 0}}, "option beta of the loss npo must be finite and > 0, got 0"),
            ({"satimp": {"beta1": math.nan}}, "beta1 of the loss satimp must be finite and >= 0"),
            ({"rmu": {"layer": 1.5}}, "layer of the loss rmu must be a whole number >= 0, got 1.5"),
            ({"rmu": {"layer": -1}}, "layer of the loss rmu must be a whole number >= 0, got -1"),
            ({"rmu": {"weight": "much"}}, "the weight of rmu must be >= 0 and finite, got 'much'"),
            ({"pdu": {"step": 1.0}, "retain": 1.0}, "give limit as well"),
            (
                {"pdu": {"limit": 0.1}},
                "adjusts the weight of the loss retain: give retain a weight",
            ),
            (
                {"rmu": {"layer": 1}, "rmu_retain": 1.0},
                "give both the same option layer, got 1, No",
            ),
        ],
    )
    def test_what_does_not_apply_is_refused(self, given, message):
        with pytest.raises(InputError, match=message):
            UnlearnConfig(losses=given)

    @pytest.mark.parametrize("form", ["chunked", "liger"])
    def test_chunks_are_refused_for_losses_of_whole_logits(self, form):
        with pytest.raises(InputError, match="which undial and ceu and pdu need"):
            UnlearnConfig(losses=dict.fromkeys(("undial", "ceu", "pdu"), 1.0), cross_entropy=form)

    def test_the_command_takes_options_after_commas(self, user_folder, capsys):
        rows = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--output", "out"]
        flags = ["--loss", "wga=1,beta=0.5", "--loss", "retain", "--epochs", "1"]
        assert main(["unlearn", "--model", "my-model", *rows, *flags]) == 0
        assert "Minimised: 1 wga (beta 0.5) + 1 retain" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("wga=1,beta", "OPTION=NUMBER after commas; got 'wga=1,beta'"),
            ("wga=1,beta=1,beta=2", "--loss names an option twice: wga=1,beta=1,beta=2"),
            ("wga=2,weight=3", "--loss gives two weights: wga=2,weight=3"),
            ("wga=1,layer=1", "the loss wga has no option 'layer': it has beta"),
            ("rmu=1,layer=2", "no layer 2: the model has 2, numbered 0 to 1"),
        ],
    )
    def test_the_command_refuses_before_any_work(self, user_folder, capsys, flag, message):
        rows = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--output", "out"]
        assert main(["unlearn", "--model", "my-model", *rows, "--loss", flag]) == 2
        assert message in capsys.readouterr().err
        assert not (user_folder / "out").exists()


class TestHiddenStates:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
    def test_the_layer_is_the_decoders_own(self, tiny_model, kind):
        model = tiny_model(kind)
        assert len(decoder_layers(model)) == 2
        assert layer_at(model, None) is decoder_layers(model)[0]
        assert layer_at(model, 1) is decoder_layers(model)[1]

    def test_the_default_layer_is_the_papers_seventh_of_32(self):
        model = torch.nn.Sequential(torch.nn.ModuleList(torch.nn.Identity() for _ in range(32)))
        assert layer_at(model, None) is model[0][7]

    def test_a_model_without_a_list_of_layers_is_refused(self):
        with pytest.raises(InputError, match="Linear has no list of layers"):
            layer_at(torch.nn.Linear(2, 2), None)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_pass_gives_the_hidden_states_of_its_layer(self, tiny_model, chunked):
        model = tiny_model("llama")
        tokens = torch.arange(3, 15).view(2, 6)
        batch = Batch(tokens, torch.ones_like(tokens), tokens)
        form = dataclasses.replace(WHOLE, layer=layer_at(model, 0))
        if chunked:
            form = dataclasses.replace(form, form="chunked", head=model.lm_head)
        expected = model(tokens, output_hidden_states=True).hidden_states[1]
        hooks = len(layer_at(model, 0)._forward_hooks)
        assert torch.equal(form.answers(model, batch).hidden, expected)
        assert len(layer_at(model, 0)._forward_hooks) == hooks

    @pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("adapter", ["bounded", "lora"])
    def test_rmu_steers_the_layer_and_keeps_it_on_the_other_rows(
        self, user_folder, adapter, checkpointing
    ):
        steered = {"rmu": {"layer": 1, "steering": 2.0}}
        alone = self._moved(steered, adapter, checkpointing)
        kept = self._moved(
            {**steered, "rmu_retain": {"layer": 1, "weight": 100.0}}, adapter, checkpointing
        )
        assert alone["left"] < 0.9
        assert 0 < kept["retain"] < 0.2 * alone["retain"]

    def _moved(self, given, adapter, checkpointing):
        """How far the retain rows moved, and how much of the way to the vector is left."""
        model = transformers.AutoModelForCausalLM.from_pretrained("my-model")
        tokenizer = transformers.AutoTokenizer.from_pretrained("my-model")
        config = UnlearnConfig(
            adapter=adapter,
            losses=given,
            bound=None if adapter == "lora" else 8.0,
            lr=3e-2,
            epochs=40,
            batch_size=2,
            gradient_checkpointing=checkpointing,
        )
        result = unlearn(model, tokenizer, "forget.jsonl", "retain.jsonl", config, progress=False)
        form = dataclasses.replace(WHOLE, layer=layer_at(result.model, 1))
        found = []
        for side in ("forget", "retain"):
            batch = collate(encode_all(load_rows(f"{side}.jsonl"), tokenizer), 1)
            with torch.no_grad():
                after = form.answers(result.model, batch).hidden
                with result.disabled():
                    before = form.answers(result.model, batch).hidden
            target = losses.control_vector(16, 2.0, config.seed)
            way = [losses.rmu(each, target, batch.labels).item() for each in (before, after)]
            found.append((way[1] / way[0], losses.rmu(after, before, batch.labels).item()))
        return {"left": found[0][0], "retain": found[1][1]}


class TestPrimalDual:
    def test_the_multiplier_follows_the_retain_loss_and_never_falls_below_zero(self):
        objective = Objective({"pdu": {"limit": 0.5, "step": 2.0}, "retain": 1.0})
        objective.after_step(0.75)
        assert objective.weights["retain"] == pytest.approx(1.5)
        assert objective.state() == {"retain_weight": pytest.approx(1.5)}
        for _ in range(5):
            objective.after_step(0.0)
        assert objective.weights["retain"] == 0.0

    def test_without_a_limit_the_weights_stand_still(self):
        objective = Objective({"pdu": 1.0, "retain": 1.0})
        objective.after_step(100.0)
        assert objective.weights["retain"] == 1.0 and objective.state() == {}

    def test_a_run_logs_it_and_goes_on_with_it_after_a_kill(self, user_folder, monkeypatch):
        config = UnlearnConfig(
            losses={"pdu": {"limit": 0.1}, "retain": 1.0},
            epochs=4,
            batch_size=1,
            checkpoint_every=2,
        )

        def run(output, resume=False):
            model = transformers.AutoModelForCausalLM.from_pretrained("my-model")
            tokenizer = transformers.AutoTokenizer.from_pretrained("my-model")
            rows = ("forget.jsonl", "retain.jsonl")
            more = {"output": output, "resume": resume, "progress": False}
            unlearn(model, tokenizer, *rows, config, **more)

        def weights(output):
            lines = [json.loads(line) for line in (user_folder / output / "log.jsonl").open()]
            return [
                (line["retain_loss"], line["retain_weight"])
                for line in lines
                if line["event"] == "step"
            ]

        run("whole")
        weight = 1.0
        for loss, found in weights("whole"):
            weight += loss - 0.1
            assert found == pytest.approx(weight, rel=1e-6)

        update, taken = Training.update, []

        def killed(self, losses):
            taken.append(1)
            if len(taken) == 6:
                raise KeyboardInterrupt
            return update(self, losses)

        monkeypatch.setattr(Training, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
        monkeypatch.setattr(Training, "update", update)
        run("cut", resume=True)
        assert weights("cut") == weights("whole") and len(weights("whole")) == 8
