"""transformers' Trainer and TRL's SFTTrainer over an adapted model, as they come."""

from __future__ import annotations

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

import fastbound
from tests.support.models import stir, trained

DATA = [
    {"input_ids": tokens, "labels": tokens}
    for tokens in torch.randint(3, 60, (8, 7), generator=torch.Generator().manual_seed(1))
]


@pytest.fixture(params=["fused", "by layers", "peft"])
def adapted(request, tiny_model):
    """Builds the same adapted Llama each time."""

    def build() -> torch.nn.Module:
        model = tiny_model("llama")
        if request.param == "peft":
            model = peft.get_peft_model(model, fastbound.BoundedConfig(r=4, bound=0.5))
        else:
            fastbound.inject(model, 4, bound=0.5, fuse_mlp=request.param == "fused")
        stir(model)
        return model

    return build


def trainer(model, folder, **settings) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA)


def losses(run: Trainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if name.endswith((".A", ".B"))}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            1e-6,
        ),
        ({"bf16": True}, 1e-2),
    ],
    ids=["checkpointing", "reentrant", "bf16"],
)
def test_trains_as_in_the_plain_settings(adapted, tmp_path, settings, tolerance):
    torch.compiler.reset()
    plain, other = (trainer(adapted(), tmp_path, save_strategy="no", **s) for s in ({}, settings))
    before = factors(other.model)
    plain.train()
    other.train()
    assert len(losses(plain)) == 4
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)
    after = factors(other.model)
    assert trained(other.model) == set(after)
    for name, factor in after.items():
        assert factor.dtype is torch.float32 and not torch.equal(factor, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("adapted", ["fused", "peft"], indirect=True)
def test_compiled_it_trains_as_uncompiled(adapted, tmp_path, monkeypatch, request):
    # TrainingArguments sets it for good, accelerate's state keeps it: a later Accelerator in this
    # process would compile as well.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    request.addfinalizer(AcceleratorState._reset_state)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    test_trains_as_in_the_plain_settings(adapted, tmp_path, compiled, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", ["fused", "peft"], indirect=True)
def test_compiled_it_evaluates_as_uncompiled(adapted, tmp_path, monkeypatch, request):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    request.addfinalizer(AcceleratorState._reset_state)
    torch.compiler.reset()
    expected = trainer(adapted(), tmp_path).evaluate()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    got = trainer(adapted(), tmp_path, **compiled).evaluate()
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_resumes_to_the_bits_of_an_uninterrupted_run(adapted, tmp_path):
    whole = trainer(adapted(), tmp_path)
    whole.train()
    resumed = trainer(adapted(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    wanted = factors(whole.model)
    for name, factor in factors(resumed.model).items():
        assert torch.equal(factor, wanted[name]), name


def test_the_best_model_is_loaded_at_the_end(adapted, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # The highest loss counts as the best, so that it is not the last.
    run = trainer(adapted(), tmp_path, **settings, greater_is_better=True)
    seen = {}
    save = run._save_checkpoint

    def watched(model, trial):
        seen[run.state.global_step] = factors(model)
        save(model, trial)

    run._save_checkpoint = watched
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    for name, factor in factors(run.model).items():
        assert torch.equal(factor, seen[2][name]) and not torch.equal(factor, seen[4][name]), name


@pytest.mark.parametrize("how", ["inject", "peft_config"])
def test_sft_trainer_trains_the_adapters(user_folder, how):
    trl = pytest.importorskip("trl", reason="TRL is a test extra")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("my-model")
    if how == "inject":
        assert len(fastbound.inject(model, 4, bound="auto").fused) == 2
    data = datasets.load_dataset("json", data_files="forget.jsonl", split="train")
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    run = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig("out", max_steps=2, **settings),
        train_dataset=data.map(
            lambda row: {"prompt": row["question"], "completion": " " + row["answer"]},
            remove_columns=["question", "answer"],
        ),
        processing_class=AutoTokenizer.from_pretrained("my-model"),
        peft_config=fastbound.BoundedConfig(r=4, bound="auto") if how == "peft_config" else None,
    )
    before = factors(run.model)
    run.train()
    after = factors(run.model)
    assert trained(run.model) == set(after) and len(after) == 12
    assert all(not torch.equal(after[n], before[n]) for n in after if n.endswith(".B"))
    fresh = AutoModelForCausalLM.from_pretrained("my-model")
    if how == "inject":
        fastbound.save_adapter(run.model, "trained")
        fastbound.load_adapter(fresh, "trained")
    else:
        run.save_model("trained")
        fresh = peft.PeftModel.from_pretrained(fresh, "trained")
    for name, factor in factors(fresh).items():
        assert torch.equal(factor, after[name])
