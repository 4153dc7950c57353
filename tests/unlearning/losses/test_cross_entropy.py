"""Losses from hidden states in the loop: the same steps, fewer bytes, a reason for the choice."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastbound
from fastbound.performance.memory import saved_bytes
from fastbound.unlearning import InputError, UnlearnConfig, evaluate
from fastbound.unlearning.data.encoding import IGNORED, Batch, encode_all
from fastbound.unlearning.losses import cross_entropy
from fastbound.unlearning.losses.chunked import CHUNK
from fastbound.unlearning.losses.cross_entropy import WHOLE, choose_cross_entropy
from fastbound.unlearning.losses.objective import Objective
from fastbound.unlearning.runs.report import Run, write_report
from tests.support.models import stir

ROWS, LENGTH = (5, 5, 5), 31
FAST = UnlearnConfig(
    bound="4*rms", lr=1e-2, epochs=4, batch_size=3, rank=2, log_every=1, device="cpu"
)


def config(**changes) -> UnlearnConfig:
    return UnlearnConfig(**{**FAST.as_dict(), **changes})


def batch_of(vocabulary: int) -> Batch:
    """Rows that are padded, with answers of several lengths, in more than one chunk."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (sum(ROWS), LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, 25:] = 0
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[:, :3] = IGNORED
    labels[4, :20] = IGNORED
    assert (labels[:, 1:] != IGNORED).sum() > CHUNK
    return Batch(ids, mask, labels)


def chunked(model: nn.Module, batch: Batch) -> cross_entropy.CrossEntropy:
    positions = batch.labels.numel()
    return choose_cross_entropy("chunked", model, batch, positions=positions)


def loss_of(form, model, batch, weights):
    objective = Objective(weights)
    reference = None
    if objective.needs_reference:
        with torch.no_grad(), fastbound.disable_adapter(model):
            reference = form.answers(model, batch)
    return objective(form.answers(model, batch), batch, ROWS, reference=reference).loss


def loss_and_gradient(form, model, batch, weights):
    model.zero_grad()
    loss = loss_of(form, model, batch, weights)
    loss.backward()
    return loss.detach(), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    )


@pytest.mark.parametrize(
    "weights",
    [
        {"gradient_ascent": 1.0, "retain": 2.0},
        {"npo": 1.0, "retain": 1.0},
        {"simnpo": 0.5, "retain": 1.0},
        {"flooding": 1.0, "retain": 1.0},
        {"dpo": 1.0},
        {"idk": 1.0, "retain": 1.0},
    ],
    ids="+".join,
)
class TestSameAsWhole:
    @pytest.fixture
    def adapted(self, tiny_model):
        def adapted(dtype):
            # GPT-2: its norms compute in fp64, where Llama's go through fp32.
            model = tiny_model("gpt2").to(dtype)
            fastbound.inject(model, 4, bound=0.5, adapter_dtype=dtype)
            stir(model)
            return model

        return adapted

    def test_in_fp64(self, adapted, weights):
        model, batch = adapted(torch.float64), batch_of(64)
        loss, gradient = loss_and_gradient(chunked(model, batch), model, batch, weights)
        expected, expected_gradient = loss_and_gradient(WHOLE, model, batch, weights)
        assert gradient.norm() > 0
        # fp64: the same sums, chunk by chunk
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()

    def test_in_fp32_no_further_from_fp64(self, adapted, weights):
        model, batch = adapted(torch.float32), batch_of(64)
        forms = chunked(model, batch), WHOLE
        (loss, gradient), (whole, whole_gradient) = (
            loss_and_gradient(form, model, batch, weights) for form in forms
        )
        truth, true_gradient = loss_and_gradient(WHOLE, model.double(), batch, weights)
        size = true_gradient.norm()
        assert (loss - truth).abs() <= (whole - truth).abs() + 1e-6 * truth.abs()
        error, whole_error = ((each - true_gradient).norm() for each in (gradient, whole_gradient))
        assert error <= whole_error + 1e-6 * size
        assert whole_error <= 1e-5 * size


@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "phi", "llama", "qwen3", "gemma3"])
def test_other_architectures(tiny_model, kind):
    model, batch = tiny_model(kind), batch_of(60)
    found, expected = (form.answers(model, batch).tokens for form in (chunked(model, batch), WHOLE))
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.correct, expected.correct) and torch.equal(found.row, expected.row)


class _LargestLogits(TorchDispatchMode):
    """Bytes of the largest tensor whose last dimension is the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each.shape[-1:] == (self.vocabulary,):
                self.found = max(self.found, each.nbytes)
        return result


def test_bytes_at_a_vocabulary_of_fifty_thousand():
    import transformers

    vocabulary, width = 50_257, 8
    settings = transformers.GPT2Config(n_embd=width, n_layer=1, n_head=1, n_positions=32)
    assert settings.vocab_size == vocabulary
    model = transformers.GPT2LMHeadModel(settings).eval()
    fastbound.inject(model, 2, bound=0.5)
    batch = batch_of(vocabulary)
    answers = int((batch.labels[:, 1:] != IGNORED).sum())
    weights = {"gradient_ascent": 1.0, "retain": 1.0, "npo": 1.0}
    form = chunked(model, batch)
    saved, largest = [], []
    for each in (WHOLE, form):
        saved.append(
            saved_bytes(lambda each=each: loss_of(each, model, batch, weights), model.parameters())
        )
        with _LargestLogits(vocabulary) as watched:
            loss_and_gradient(each, model, batch, weights)
        largest.append(watched.found)
    assert largest == [batch.labels.numel() * vocabulary * 4, CHUNK * vocabulary * 4]
    assert form.logits_bytes == largest[1]
    # Whole: a log-softmax of each answer token, and a sum of nll_loss. Chunked: hidden states.
    assert saved[0] - saved[1] == answers * (vocabulary - width) * 4 + 4
    assert saved[1] < saved[0] / 100


class TestLoop:
    @pytest.fixture
    def run(self, unlearn_rows):
        def run(model=None, **settings):
            output, resume = settings.pop("output", None), settings.pop("resume", False)
            return unlearn_rows(config(**settings), model, output=output, resume=resume)

        return run

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"adapter": "lora"},
            {"gradient_checkpointing": True, "accumulation": 2},
            {"losses": {"npo": 1.0, "retain": 1.0}},
        ],
        ids=["bounded", "lora", "checkpointing", "npo"],
    )
    def test_a_chunked_run_goes_where_a_whole_one_goes(self, run, settings):
        whole, found = (run(cross_entropy=form, **settings) for form in ("whole", "chunked"))
        assert (whole.cross_entropy.form, found.cross_entropy.form) == ("whole", "chunked")
        assert found.after.step == whole.after.step > 0
        for side in ("forget", "retain"):
            one, other = getattr(found.after, side), getattr(whole.after, side)
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
            assert one.rows == other.rows
        assert found.largest_delta == pytest.approx(whole.largest_delta, rel=1e-3)

    def test_bfloat16_autocast(self, run):
        whole, found = (
            run(cross_entropy=form, dtype="bfloat16", epochs=1) for form in ("whole", "chunked")
        )
        assert found.cross_entropy.logits_bytes == CHUNK * found.model.config.vocab_size * 2
        assert found.before.forget.loss == pytest.approx(whole.before.forget.loss, rel=1e-2)
        assert found.after.forget.loss == pytest.approx(whole.after.forget.loss, rel=1e-2)

    def test_no_pass_forms_whole_logits(self, run, new_model):
        model = new_model()
        vocabulary = model.config.vocab_size
        with _LargestLogits(vocabulary) as watched:
            result = run(model, cross_entropy="chunked", losses={"dpo": 1.0}, epochs=1)
        assert 0 < watched.found <= result.cross_entropy.logits_bytes == CHUNK * vocabulary * 4

    def test_a_chunked_run_resumes_to_the_same_bits(self, run, stopped_after, tmp_path):
        settings = {"cross_entropy": "chunked", "checkpoint_every": 1}
        run(output=tmp_path / "whole", **settings)
        with stopped_after(3):
            run(output=tmp_path / "cut", **settings)
        run(output=tmp_path / "cut", resume=True, **settings)
        name = "adapter/adapter_model.safetensors"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_result_and_report_say_what_was_chosen(self, run, tmp_path):
        run(output=tmp_path / "run", epochs=1)
        held = json.loads((tmp_path / "run" / "result.json").read_text())["cross_entropy"]
        assert held["form"] == "whole" and held["reason"] == "auto, up to 268 MB"
        table = write_report(tmp_path, [Run.read(tmp_path / "run")], about={})
        size = f"{held['logits_bytes'] / 1e6:.4g}"
        line = f"Cross-entropy whole (auto, up to 268 MB); at most {size} MB of logits at once."
        assert line in table.splitlines()

    def test_chunks_that_cannot_be_are_refused_before_anything_is_written(
        self, run, new_model, tmp_path
    ):
        model = new_model()
        model.lm_head.register_forward_hook(lambda *args: None)
        with pytest.raises(InputError, match=r'"chunked": lm_head has hooks .*use "auto"'):
            run(model, cross_entropy="chunked", output=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_whole_logits_of_a_loss_are_refused_with_the_settings(self):
        with pytest.raises(InputError, match=r"which ihl and kl need"):
            config(cross_entropy="chunked", losses={"ihl": 1.0, "kl": 1.0, "retain": 1.0})

    def test_evaluation(self, new_model, tokenizer, forget_rows):
        model, rows = new_model(), encode_all(forget_rows, tokenizer)
        example = Batch(*(torch.tensor([rows[0].ids]) for _ in range(3)))
        form = choose_cross_entropy("chunked", model, example, positions=1)
        found, expected = (
            evaluate(model, rows, pad=0, batch_size=4, cross_entropy=each) for each in (form, WHOLE)
        )
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert (found.accuracy, found.exact) == (expected.accuracy, expected.exact)


class TestAuto:
    @pytest.fixture
    def choose(self, monkeypatch):
        monkeypatch.setattr(cross_entropy, "WHOLE_BYTES", 1000)
        monkeypatch.setattr(cross_entropy, "missing", lambda device: "no liger")

        def choose(model, positions=100, **settings):
            batch = batch_of(60)
            return choose_cross_entropy("auto", model, batch, positions=positions, **settings)

        return choose

    def test_takes_chunks_above_a_size(self, choose, tiny_model):
        model = tiny_model("llama")
        vocabulary = model.config.vocab_size
        small, large = choose(model, 3), choose(model, 4)
        assert (small.form, small.logits_bytes) == ("whole", 3 * vocabulary * 4)
        assert (large.form, large.logits_bytes) == ("chunked", 4 * vocabulary * 4)
        assert large.reason == "auto, whole logits would take 0.001024 MB; no liger"
        assert choose(model, 7, dtype=torch.bfloat16).form == "whole"
        assert choose(model, 10_000).logits_bytes == CHUNK * vocabulary * 4

    def test_leaves_mode_head_and_random_state_as_they_were(self, choose, tiny_model):
        model = tiny_model("llama").train()
        before, held = torch.get_rng_state(), dict(vars(model.lm_head))
        choose(model).answers(model, batch_of(60))
        assert model.training and model.lm_head.training
        assert torch.equal(torch.get_rng_state(), before)
        assert vars(model.lm_head) == held

    def test_capped_logits(self, choose, tiny_model):
        found = choose(tiny_model("gemma2"))
        assert (found.form, found.head) == ("whole", None)
        assert "Gemma2ForCausalLM changes what lm_head returns" in found.reason

    def test_scaled_logits(self, choose, tiny_model, monkeypatch):
        model = tiny_model("llama")
        honest = type(model).forward

        def scaled(*args, **kwargs):
            output = honest(*args, **kwargs)
            output.logits = output.logits * 0.9999
            return output

        monkeypatch.setattr(type(model), "forward", scaled)
        assert "LlamaForCausalLM changes what lm_head returns" in choose(model).reason

    def test_losses_that_take_whole_logits(self, choose, tiny_model):
        found = choose(tiny_model("llama"), whole_logits=["ihl", "kl"])
        assert (found.form, found.reason) == ("whole", "no chunks: ihl and kl take whole logits")

    def test_a_model_that_names_no_head(self, choose, tiny_model, monkeypatch):
        model = tiny_model("llama")
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
        found = choose(model)
        assert "LlamaForCausalLM names no output embedding" in found.reason
        assert found.logits_bytes is None

    def test_an_adapted_head(self, choose, tiny_model):
        model = tiny_model("llama")
        fastbound.inject(model, 2, target_modules=["lm_head"])
        assert "lm_head is FusedBoundedLinear, not a plain nn.Linear" in choose(model).reason

    def test_a_head_with_a_forward_of_its_own(self, choose, tiny_model):
        model = tiny_model("llama")
        model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T
        assert "lm_head has hooks or a forward of its own" in choose(model).reason

    def test_a_head_that_is_not_called(self, choose, tiny_model):
        model = tiny_model("llama")
        model.get_output_embeddings = lambda: model.spare
        model.spare = nn.Linear(16, 64)
        assert choose(model).reason == "no chunks: spare runs 0 times in a pass"

    def test_a_head_under_another_class_product(self, choose, tiny_model, monkeypatch):
        model = tiny_model("llama")
        monkeypatch.setattr(
            nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight) + 1
        )
        assert "lm_head is more than x @ weight.T + bias" in choose(model).reason
