"""The loop: what it trains, when it stops, what it leaves on disk, and what it refuses."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastbound
from fastbound.unlearning import InputError, NonFiniteError, UnlearnConfig, evaluate, unlearn
from fastbound.unlearning.data.encoding import encode_all
from fastbound.unlearning.losses.objective import Objective
from fastbound.unlearning.runs.report import Run, table
from fastbound.unlearning.training.ending import ForgottenWarning, forget_target
from fastbound.unlearning.training.processes import start_processes

FAST = UnlearnConfig(
    bound="4*rms", lr=1e-2, epochs=4, batch_size=3, rank=2, log_every=1, device="cpu"
)


def config(**changes) -> UnlearnConfig:
    return UnlearnConfig(**{**FAST.as_dict(), **changes})


def lines(folder: Path, event: str) -> list[dict]:
    text = (folder / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["event"] == event]


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_raises_forget_loss_through_the_adapter_alone(unlearn_rows, new_model, tmp_path, adapter):
    model = new_model()
    result = unlearn_rows(
        config(adapter=adapter, epochs=30, lr=3e-2, early_stop=False),
        model,
        output=tmp_path / "run",
    )
    assert result.before.forget.loss < 0.2 and result.before.forget.accuracy > 0.98
    assert result.after.forget.loss > max(3.0, 2 * result.after.retain.loss)
    assert result.after.forget.accuracy < result.after.retain.accuracy
    assert result.largest_delta > 0
    steps = lines(tmp_path / "run", "step")
    assert [line["step"] for line in steps] == list(range(1, result.history[-1].step + 1))
    assert steps[result.kept - 1]["largest_delta"] == result.largest_delta
    assert steps[0]["lr"] < max(line["lr"] for line in steps) <= 3e-2 and steps[-1]["lr"] < 2e-3
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"run.json", "log.jsonl", "checkpoint.pt", "adapter", "result.json"}


def test_frozen_weights_do_not_move(unlearn_rows, new_model):
    model = new_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    unlearn_rows(FAST, model)
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name


def test_saved_adapter_reloads_to_the_same_scores(
    unlearn_rows, new_model, tokenizer, forget_rows, tmp_path
):
    result = unlearn_rows(FAST, output=tmp_path)
    fresh = new_model()
    fastbound.load_adapter(fresh, tmp_path / "adapter")
    score = evaluate(fresh, encode_all(forget_rows, tokenizer), pad=tokenizer.pad_token_id)
    assert score.loss == pytest.approx(result.after.forget.loss, rel=1e-6)
    assert result.bound is not None and result.largest_delta <= result.bound


def test_bound_holds_at_an_absurd_rate(unlearn_rows):
    result = unlearn_rows(config(lr=1e3))
    assert result.bound is not None and result.largest_delta <= result.bound * (1 + 1e-6)
    plain = unlearn_rows(config(lr=1e3, adapter="lora"))
    assert plain.bound is None and plain.largest_delta > 100 * result.bound


def test_lora_adapts_the_layers_that_inject_would(unlearn_rows, new_model):
    names = {}
    for adapter in ("bounded", "lora"):
        model = new_model()
        unlearn_rows(config(adapter=adapter, epochs=0.1), model)
        kinds = ("FusedBoundedLinear", "Linear")
        names[adapter] = {
            name
            for name, module in model.named_modules()
            if type(module).__name__ in kinds
            and any(p.requires_grad for p in module.parameters())
            and ("adapter" not in name and "lora_" not in name)
        }
    assert names["bounded"] == names["lora"] and len(names["lora"]) == 6


def test_gradient_checkpointing_changes_nothing(unlearn_rows):
    results = [unlearn_rows(config(gradient_checkpointing=on)) for on in (False, True)]
    assert results[0].after == results[1].after
    assert results[0].largest_delta == results[1].largest_delta > 0


def test_a_step_is_one_mean_over_its_tokens_however_it_is_cut(unlearn_rows, new_model, monkeypatch):
    taken = []

    def keep(optimizer, *args, **kwargs):
        taken.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)

    def first_gradient(batch_size, accumulation):
        taken.clear()
        model = new_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        settings = config(accumulation=accumulation, batch_size=batch_size, epochs=0.1)
        unlearn_rows(settings, model)
        return taken[0]

    whole = first_gradient(4, 1)
    assert any(gradient.abs().max() > 0 for gradient in whole)
    for gradient, cut in zip(whole, first_gradient(1, 4), strict=True):
        torch.testing.assert_close(cut, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"forget_target": 3.0, "retain_slack": 9.0}, "forget_target"),
        ({"forget_target": 3.0, "retain_slack": 9.0, "early_stop": False}, None),
        ({"forget_target": 99.0, "retain_slack": 9.0}, None),
        ({"retain_limit": 0.1}, "retain_limit"),
        ({"retain_slack": 0.0}, None),
    ],
)
def test_stops_early_and_says_why(unlearn_rows, settings, reason):
    result = unlearn_rows(config(epochs=30, eval_every=2, **settings))
    assert result.stopped == (reason or "all steps")
    last = result.history[-1]
    if reason == "forget_target":
        assert last.forget.loss >= 3.0 > result.history[-2].forget.loss
    assert (last.step < 60) == (reason is not None)


@pytest.mark.parametrize("cross_entropy", ["whole", "chunked"])
def test_ascent_ends_near_its_ceiling(unlearn_rows, cross_entropy):
    settings = {"epochs": 40, "lr": 0.03, "cross_entropy": cross_entropy, "early_stop": False}
    settings |= {"eval_every": 20, "forget_target": 6.0}
    results = [unlearn_rows(config(forget_ceiling=c, **settings)) for c in (6.5, "auto", "none")]
    assert [result.forget_ceiling for result in results] == [6.5, 12.0, None]
    low, auto, endless = (result.history[-1].forget.loss for result in results)
    assert 4.0 < low < auto < endless


def test_a_ceiling_below_the_target_is_refused(unlearn_rows, tmp_path):
    with pytest.raises(InputError, match=r"forget_ceiling 5 is below the forget_target of 6 nats"):
        unlearn_rows(config(forget_ceiling=5.0, forget_target=6.0), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_adapter_of_the_best_evaluation_is_kept_also_across_a_resume(
    unlearn_rows, new_model, tokenizer, retain_rows, tmp_path
):
    settings = config(
        epochs=20,
        lr=0.1,
        eval_every=4,
        forget_target=2.0,
        forget_ceiling="none",
        early_stop=False,
    )
    result = unlearn_rows(settings, output=tmp_path / "run")
    forgotten = [each for each in result.history[1:] if each.forget.loss >= 2.0]
    best = min(forgotten, key=lambda each: each.retain.loss)
    assert result.after is best and result.kept == best.step
    assert best.step < result.history[-1].step, "the best is the last: this run shows nothing"
    fresh = new_model()
    fastbound.load_adapter(fresh, tmp_path / "run" / "adapter")
    for model in (fresh, result.model):
        encoded = encode_all(retain_rows, tokenizer)
        score = evaluate(model, encoded, pad=tokenizer.pad_token_id)
        assert score.loss == pytest.approx(best.retain.loss, rel=1e-5)
    (tmp_path / "run" / "result.json").unlink()
    again = unlearn_rows(settings, output=tmp_path / "run", resume=True)
    assert again.kept == result.kept
    score = evaluate(again.model, encode_all(retain_rows, tokenizer), pad=tokenizer.pad_token_id)
    assert score.loss == pytest.approx(best.retain.loss, rel=1e-5)


def test_where_nothing_is_forgotten_the_last_is_kept(unlearn_rows):
    result = unlearn_rows(config(epochs=3, lr=1e-5, eval_every=1))
    assert result.kept == result.history[-1].step == 6
    assert result.forget_target == pytest.approx(math.log(result.model.config.vocab_size))


@pytest.mark.parametrize(
    ("flooding", "changes", "target"),
    [
        (1.0, {}, 0.75 * 2.5),
        ({"weight": 2.0, "level": 4.0}, {}, 3.0),
        ({"weight": 1.0, "level": 4.0}, {"forget_target": 2.0}, 2.0),
        (0.0, {}, math.log(400)),
    ],
)
def test_flooding_brings_its_own_target(new_model, flooding, changes, target):
    given = config(losses={"flooding": flooding, "retain": 1.0}, **changes)
    model = new_model()
    assert model.config.vocab_size == 400
    assert forget_target(given, model) == pytest.approx(target)


def test_rows_that_the_model_does_not_know_are_said_before_the_first_step(unlearn_rows, tmp_path):
    before = unlearn_rows(FAST).before.forget.loss
    told = f"a loss of {before:.4g} nats.* count as forgotten from {0.9 * before:.4g} on"
    with pytest.warns(ForgottenWarning, match=told):
        unlearn_rows(config(forget_target=0.9 * before), output=tmp_path)
    said = "\n".join(table([Run.read(tmp_path)]))
    assert "Before the first step the rows to forget already counted as forgotten." in said
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgottenWarning)
        unlearn_rows(config(forget_target=1.1 * before))
        unlearn_rows(config(forget_target=0.9 * before, early_stop=False))


@pytest.mark.parametrize("seed", [0, 1])
def test_flooding_ends_near_its_level_where_the_ascent_goes_far_beyond(unlearn_rows, seed):
    losses = {"flooding": {"weight": 1.0, "level": 1.0}, "retain": 1.0}
    changes = {"epochs": 40, "early_stop": False, "seed": seed}
    result, ascent = unlearn_rows(config(losses=losses, **changes)), unlearn_rows(config(**changes))
    assert result.before.forget.loss < 0.2
    assert 0.5 < result.after.forget.loss < 1.5  # 0.7 and 0.8: it swings around the level
    assert result.after.retain.loss < 0.3
    assert ascent.after.forget.loss > 5 and ascent.after.retain.loss > 1


def test_a_model_that_does_not_say_its_vocabulary_needs_a_target(unlearn_rows, new_model):
    model = new_model()
    model.config = None
    with pytest.raises(InputError, match=r"no config.vocab_size.*give forget_target a number"):
        unlearn_rows(FAST, model)


def test_non_finite_loss_keeps_the_checkpoint_and_names_the_batch(
    unlearn_rows, tmp_path, monkeypatch
):
    honest, seen = Objective.__call__, []

    def spoiled(*args, **kwargs):
        result = honest(*args, **kwargs)
        seen.append(1)
        return result._replace(loss=result.loss * math.nan) if len(seen) == 4 else result

    monkeypatch.setattr(Objective, "__call__", spoiled)
    with pytest.raises(NonFiniteError) as caught:
        unlearn_rows(config(checkpoint_every=1), output=tmp_path)
    message = str(caught.value)
    assert "step 4 of 8" in message and "Try a lower lr than 0.01" in message
    assert "authors_forget.jsonl, row" in message and "authors_retain.jsonl, row" in message
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["adapter"].values())
    monkeypatch.undo()
    resumed = unlearn_rows(config(checkpoint_every=1), output=tmp_path, resume=True)
    assert resumed.after.step == 8


def test_folder_of_another_run_is_refused(unlearn_rows, tmp_path):
    def start(settings=FAST, **kwargs):
        return unlearn_rows(settings, output=tmp_path / "run", **kwargs)

    first = start()
    kept = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(InputError, match="holds another run: continue it with --resume"):
        start()
    with pytest.raises(InputError, match=r"holds a run with config.lr 0.01, this one has 0.02"):
        start(config(lr=0.02), resume=True)
    with pytest.raises(InputError, match=r"a run with config.losses.npo None, this one has 1.0"):
        start(config(losses={"npo": 1.0, "retain": 1.0}), resume=True)
    assert start(resume=True).after == first.after
    assert (tmp_path / "run" / "log.jsonl").read_text() == kept
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        unlearn_rows(FAST, output=tmp_path / "other")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_leaves_every_module_in_the_mode_that_it_had(unlearn_rows, new_model, adapter, training):
    model = new_model().train(training)
    apart = model.get_input_embeddings().train(not training)
    result = unlearn_rows(config(adapter=adapter, epochs=1), model)
    assert apart.training is not training
    modes = {m.training for m in result.model.modules() if m is not apart}
    assert modes == {training}


def test_a_run_that_fails_leaves_the_mode_as_it_was(unlearn_rows, new_model):
    model = new_model().eval()
    with pytest.raises(NonFiniteError):
        unlearn_rows(config(adapter="lora", lr=1e30, epochs=9), model)
    assert not any(module.training for module in model.modules())


def test_gradients_do_not_depend_on_the_environment(unlearn_rows, tmp_path, monkeypatch):
    unlearn_rows(FAST, output=tmp_path / "one")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    unlearn_rows(FAST, output=tmp_path / "other")
    norms = [
        [line["grad_norm"] for line in lines(tmp_path / name, "step")] for name in ("one", "other")
    ]
    assert norms[0] == norms[1] and min(norms[0]) > 0


def test_nothing_is_written_when_no_layer_matches(unlearn_rows, new_model, tmp_path):
    model = new_model()
    with pytest.raises(InputError, match="target_modules"):
        unlearn_rows(config(target_modules=["up_porj"]), model, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(type(m) is not fastbound.FusedBoundedLinear for m in model.modules())


@pytest.mark.parametrize(
    ("given", "epoch", "interval"), [(None, 1, 5), (None, 5, 5), (None, 50, 50), (2, 50, 2)]
)
def test_an_epoch_of_few_steps_is_not_evaluated_each_time(given, epoch, interval):
    assert config(eval_every=given).evaluation_interval(epoch) == interval


def test_evaluations_lie_that_many_steps_apart(unlearn_rows):
    result = unlearn_rows(config(batch_size=5, epochs=7, early_stop=False))
    assert [each.step for each in result.history] == [0, 5, 9]


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
@pytest.mark.parametrize(
    "changes",
    [
        {"cross_entropy": "liger"},
        {"rank": 5000},
        {"rank": "auto", "rank_budget": 5},
        {"alpha": 1e13},
    ],
    ids=str,
)
def test_what_is_refused_leaves_the_model_as_it_was(
    unlearn_rows, new_model, tmp_path, adapter, changes
):
    model = new_model()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(InputError):
        unlearn_rows(config(adapter=adapter, **changes), model, output=tmp_path / "run")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not (tmp_path / "run").exists()
    unlearn_rows(config(adapter=adapter, epochs=1), model)  # nothing is in its way


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_a_damaged_checkpoint_leaves_the_model_as_it_was(
    unlearn_rows, new_model, tmp_path, adapter
):
    settings = config(adapter=adapter, epochs=1)
    unlearn_rows(settings, output=tmp_path / "run")
    (tmp_path / "run/checkpoint.pt").write_bytes(b"half a file")
    model = new_model()
    names = dict(model.named_parameters()).keys()
    with pytest.raises(InputError, match=r"checkpoint\.pt is damaged"):
        unlearn_rows(settings, model, output=tmp_path / "run", resume=True)
    assert dict(model.named_parameters()).keys() == names


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_layers_that_cannot_be_adapted_are_told(unlearn_rows, tmp_path, adapter):
    targets = r".*\.(up_proj|embed_tokens)"
    result = unlearn_rows(config(adapter=adapter, target_modules=targets), output=tmp_path / "run")
    assert list(result.skipped) == ["model.embed_tokens"]
    printed = table([Run.read(tmp_path / "run")])
    assert f"Skipped model.embed_tokens: {result.skipped['model.embed_tokens']}" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"alpha": -1.0}, "alpha must be positive and finite, got -1.0"),
        ({"bound": math.nan}, "bound must be positive and finite, got nan"),
        ({"bound": math.inf}, "bound must be positive and finite, got inf"),
        ({"bound": "tight"}, "or a positive multiple such as .*, got 'tight'"),
        ({"lr": 0.0}, 'lr, unless "auto", must be positive'),
        ({"forget_ceiling": 0.0}, 'forget_ceiling, unless "auto" or "none", must be positive'),
        ({"forget_ceiling": "off"}, "must be positive and finite, got 'off'"),
        ({"warmup": 1.5}, "warmup is a share"),
        ({"adapter": "dora"}, "adapter must be one of bounded, lora; got 'dora'"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"seed": -1}, "seed must lie between"),
        ({"seed": 1.5}, "seed must lie between .*, got 1.5"),
        ({"warmup": "0.1"}, "warmup is a share .*, got '0.1'"),
        ({"forget_weight": "2"}, "forget_weight must be >= 0 and finite, got '2'"),
        ({"early_stop": "no"}, "early_stop must be True or False, got 'no'"),
        (
            {"losses": {"npo": 1, "retain": 1}, "forget_ceiling": 3.0},
            "3 limits gradient ascent, wh",
        ),
        ({"target_modules": 5}, "target_modules must be a name, .*, got 5"),
        ({"target_modules": []}, r"target_modules must be a name, .*, got \[\]"),
        ({"template": None}, "template must be text, got None"),
        ({"losses": ["npo"]}, "losses must be a dict of names and weights"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_bfloat16_autocast_keeps_masters_in_fp32(unlearn_rows, new_model):
    model: nn.Module = new_model()
    result = unlearn_rows(config(dtype="bfloat16"), model)
    assert result.after.forget.loss > result.before.forget.loss
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_is_an_error(unlearn_rows):
    with pytest.raises(InputError, match="sees no CUDA device"):
        unlearn_rows(config(device="cuda"))


def test_a_row_whose_loss_is_not_finite_is_named_before_the_first_step(
    new_model, unlearn_rows, tmp_path
):
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"row \d+: the loss is not finite; the model is brok"):
        unlearn_rows(UnlearnConfig(), model, output=tmp_path / "run")


def test_a_batch_that_no_memory_holds_is_refused_before_anything_is_written(unlearn_rows, tmp_path):
    for cross_entropy in ("whole", "chunked"):
        config = UnlearnConfig(batch_size=10**9, cross_entropy=cross_entropy)
        with pytest.raises(InputError, match=r"take .* GB, and cpu has .* smaller batch_size"):
            unlearn_rows(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_a_model_that_has_an_adapter_is_refused(
    adapter, new_model, tokenizer, forget_rows, retain_rows
):
    """LoRA would train that adapter, and take the bare base for the reference."""
    model = get_peft_model(new_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="comes with an adapter: merge it first"):
        unlearn(model, tokenizer, forget_rows, retain_rows, config(adapter=adapter))


def test_a_process_that_uses_accelerate_otherwise_is_told_so(monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(InputError, match="unlearn in a process of its own"):
        start_processes(config(device="cpu"))
