"""The handlers for open-unlearning, in a stand-in for its registry, loader and trainers.

The stand-in has the documented interface: `model.MODEL_REGISTRY`, `get_model(cfg)` that calls the
handler's `from_pretrained` with the keywords of `model_args`, and trainers that are subclasses of
transformers' own over batches `{"forget": ..., "retain": ...}`, with a deep copy as reference.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import fastbound
from fastbound.unlearning import load_rows, open_unlearning
from fastbound.unlearning.data.encoding import collate, encode_all
from fastbound.unlearning.model import load_pretrained

KINDS = {
    "BoundedCausalLM": {"rank": 4, "bound": "2*rms"},
    "LoraCausalLM": {"rank": 4, "alpha": 8},
}


@pytest.fixture
def model_package(monkeypatch):
    """open-unlearning's package `model`, as far as a handler sees it, with the handlers in it."""
    package = types.ModuleType("model")
    package.MODEL_REGISTRY = {"AutoModelForCausalLM": transformers.AutoModelForCausalLM}

    def get_model(cfg):
        arguments = dict(cfg["model_args"])
        handler = package.MODEL_REGISTRY[cfg.get("model_handler", "AutoModelForCausalLM")]
        return handler.from_pretrained(
            pretrained_model_name_or_path=arguments.pop("pretrained_model_name_or_path"),
            torch_dtype=torch.float32,
            **arguments,
            cache_dir=None,
        )

    package.get_model = get_model
    monkeypatch.setitem(sys.modules, "model", package)
    importlib.reload(open_unlearning)
    return package


@pytest.fixture
def get_model(model_package, user_folder):
    def get(handler, **more):
        arguments = {**KINDS[handler], "pretrained_model_name_or_path": "my-model", **more}
        return model_package.get_model({"model_handler": handler, "model_args": arguments})

    return get


class Pairs(torch.utils.data.Dataset):
    def __init__(self, tokenizer):
        self.sides = {
            side: encode_all(load_rows(f"{side}.jsonl"), tokenizer) for side in ("forget", "retain")
        }

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {side: rows[i % len(rows)] for side, rows in self.sides.items()}


class GradDiff(transformers.Trainer):
    """Gradient difference, with NLL or with KL against a deep copy on the retain rows."""

    kl = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reference = copy.deepcopy(self.model).eval() if self.kl else None

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs["forget"])
        retain = model(**inputs["retain"])
        kept = retain.loss
        if self.reference is not None:
            with torch.no_grad():
                before = self.reference(**inputs["retain"]).logits.log_softmax(-1)
            now = retain.logits.log_softmax(-1)
            kept = nn.functional.kl_div(now, before, reduction="batchmean", log_target=True)
        loss = kept - outputs.loss
        return (loss, outputs) if return_outputs else loss


class KL(GradDiff):
    kl = True


def collated(rows):
    batches = {side: collate([row[side] for row in rows], 1) for side in ("forget", "retain")}
    return {side: vars(batch) for side, batch in batches.items()}


@pytest.fixture
def train(user_folder):
    def run(model, trainer=GradDiff, **more):
        tokenizer = transformers.AutoTokenizer.from_pretrained("my-model")
        settings = transformers.TrainingArguments(
            "out",
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=3e-2,
            weight_decay=0.01,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            **more,
        )
        trainer = trainer(model, settings, train_dataset=Pairs(tokenizer), data_collator=collated)
        trainer.train()
        trainer.save_model("out")
        return trainer

    return run


TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def test_the_import_registers_both_handlers(model_package):
    registry = model_package.MODEL_REGISTRY
    assert list(registry) == ["AutoModelForCausalLM", "BoundedCausalLM", "LoraCausalLM"]
    assert registry["BoundedCausalLM"] is open_unlearning.BoundedCausalLM


def test_a_package_of_another_name_or_kind_is_left_alone(monkeypatch):
    other = types.ModuleType("model")
    monkeypatch.setitem(sys.modules, "model", other)
    importlib.reload(open_unlearning)
    assert not hasattr(other, "MODEL_REGISTRY")
    registry = {}
    open_unlearning.register(registry)
    assert set(registry) == set(KINDS)


@pytest.mark.parametrize("handler", KINDS)
class TestHandlers:
    def test_a_loaded_model_is_its_base_with_factors_alone_to_train(self, get_model, handler):
        model = get_model(handler)
        base = load_pretrained("my-model")[0]
        assert torch.equal(model(TOKENS).logits, base.eval()(TOKENS).logits)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 3 * 2  # A and B of three projections in two layers
        assert all(".adapter." in name or ".lora_" in name for name in trained)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

    @pytest.mark.parametrize("trainer", [GradDiff, pytest.param(KL, marks=pytest.mark.slow)])
    def test_a_trainer_saves_a_plain_model_that_computes_what_was_trained(
        self, get_model, train, user_folder, handler, trainer
    ):
        model = get_model(handler)
        before = model(TOKENS).logits
        train(model, trainer)
        after = model.eval()(TOKENS).logits
        assert (after - before).abs().max() > 1e-3
        saved = loaded("out")
        assert not fastbound_modules(saved)
        torch.testing.assert_close(saved(TOKENS).logits, after, rtol=1e-4, atol=1e-5)
        assert json.loads((user_folder / "out/config.json").read_text())["architectures"] == [
            "LlamaForCausalLM"
        ]
        # What is trained goes on from the factors, which saving has left as they were.
        assert torch.equal(model(TOKENS).logits, after)

    def test_a_checkpoint_is_not_loaded_onto_a_models_own_adapter(self, get_model, train, handler):
        """It holds W + ΔW, to which the model would add its own ΔW (load_best_model_at_end)."""
        model = get_model(handler)
        train(model)
        with pytest.raises(ValueError, match="leave out load_best_model_at_end and resume"):
            model.load_state_dict(load_file("out/model.safetensors"), strict=False)
        model.load_state_dict(model.state_dict())

    def test_gradients_reach_the_factors_under_checkpointing(self, get_model, train, handler):
        model = get_model(handler)
        held = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
        more = {"use_reentrant": True}  # open-unlearning's default, which trains nothing otherwise
        train(model, gradient_checkpointing=True, gradient_checkpointing_kwargs=more)
        moved = [
            n for n, p in model.named_parameters() if n in held and not torch.equal(p, held[n])
        ]
        assert len(moved) == len(held)

    def test_a_deep_copy_stands_still_and_saves_itself(
        self, get_model, train, user_folder, handler
    ):
        model = get_model(handler)
        reference = copy.deepcopy(model)
        before = reference(TOKENS).logits
        train(model)
        assert torch.equal(reference.eval()(TOKENS).logits, before)
        reference.save_pretrained("reference")
        saved = loaded("reference")
        torch.testing.assert_close(saved(TOKENS).logits, before, rtol=1e-4, atol=1e-5)

    def test_a_given_state_dict_is_merged_and_not_the_models_own(self, get_model, handler):
        model = get_model(handler)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(0, 0.3)
        expected = copy.deepcopy(open_unlearning.merged_state(model))
        given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        found = open_unlearning.merged_state(model, given)
        base = load_pretrained("my-model")[0].state_dict()
        assert found.keys() == expected.keys() == base.keys()
        changed = [name for name in found if not torch.equal(found[name], base[name])]
        assert len(changed) == 6 and all(".mlp." in name for name in changed)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name

    def test_a_factor_that_is_not_finite_is_refused(self, get_model, handler):
        model = get_model(handler)
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))
        with pytest.raises(ValueError, match=r"cannot be merged|holds a NaN or an infinity"):
            model.save_pretrained("broken")

    def test_layers_that_are_not_there_are_refused(self, get_model, handler):
        with pytest.raises(ValueError, match="nothing"):
            get_model(handler, target_modules=["nothing"])


def test_the_bounded_factors_lie_beside_the_merged_weights(get_model, train):
    model = get_model("BoundedCausalLM")
    train(model)
    again = load_pretrained("my-model")[0]
    fastbound.load_adapter(again, "out/adapter")
    assert torch.equal(again.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


def test_gpt2s_transposed_weights_are_merged_too(model_package, tiny_model, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    for handler in open_unlearning.HANDLERS:
        model = handler.from_pretrained(str(tmp_path / "gpt2"), rank=2)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(0, 0.3)
        model.save_pretrained(tmp_path / "merged")
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        expected = model.eval()(TOKENS).logits
        torch.testing.assert_close(saved(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def loaded(folder):
    """As open-unlearning's eval.py: transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def fastbound_modules(model):
    return [m for m in model.modules() if type(m).__module__.startswith(("fastbound", "peft"))]
