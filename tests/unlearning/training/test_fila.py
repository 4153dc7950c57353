"""FILA, LoKU's start of LoRA: against closed forms, and as a setting of a run."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from fastbound.cli import main
from fastbound.unlearning import InputError, UnlearnConfig
from fastbound.unlearning.data.encoding import collate, encode_all, padding
from fastbound.unlearning.losses import answer_tokens
from fastbound.unlearning.model import load_adapter
from fastbound.unlearning.training import loop
from fastbound.unlearning.training.adapters import attach, target_layers
from fastbound.unlearning.training.estimate import estimate
from fastbound.unlearning.training.fila import FLOOR, fila_factors, fila_importance, importance

LAYERS = 6  # MLP projections of the tiny model


def config(**settings) -> UnlearnConfig:
    given = {"adapter": "lora", "lora_start": "fila", "rank": 2, "epochs": 1, "batch_size": 3}
    return UnlearnConfig(**{**given, "device": "cpu", **settings})


def weighted(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W and I in fp64, with one row that has no importance."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(N, K, generator=generator, dtype=torch.float64)
    importance = torch.rand(N, generator=generator, dtype=torch.float64) * 100
    importance[1] = 0
    return W, importance


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("shape", [(9, 7), (7, 11)], ids=["9x7", "7x11"])
def test_no_matrix_of_that_rank_is_nearer_under_the_weights(shape, rank):
    W, weights = weighted(*shape)
    A, B = fila_factors(W, weights, rank, scaling=1.5)
    left = torch.linalg.vector_norm(weights[:, None] * (W - 1.5 * B @ A))
    values = torch.linalg.svdvals(weights[:, None] * W)
    assert float(left**2) == pytest.approx(float(values[rank:].square().sum()), rel=1e-9, abs=1e-16)


def test_the_factors_are_those_of_the_paper():
    """A₀ = sqrt(S / s) Vᵀ and B₀ = diag(I)⁻¹ U sqrt(S / s), apart from signs."""
    W, weights = weighted(9, 7)
    A, B = fila_factors(W, weights, 3, scaling=2.0)
    U, S, Vt = torch.linalg.svd(weights[:, None] * W, full_matrices=False)
    root = (S[:3] / 2.0).sqrt()
    sign = (A * Vt[:3]).sum(1).sign()
    torch.testing.assert_close(A, sign[:, None] * root[:, None] * Vt[:3])
    rows = weights > 0
    torch.testing.assert_close(B[rows], (U[:, :3] * root * sign)[rows] / weights[rows, None])
    assert B.isfinite().all()  # also in the row without importance


def test_a_weight_of_lower_rank_than_the_adapter_is_taken_whole():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(9, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    A, B = fila_factors(left @ right.T, torch.ones(9), 4, scaling=1.0)
    torch.testing.assert_close(B @ A, left @ right.T)


def test_a_large_layer_is_within_a_percent_of_the_best():
    W, weights = weighted(300, 200)  # its singular values fall most slowly
    A, B = fila_factors(W, weights, 8, scaling=1.0)
    left = torch.linalg.vector_norm(weights[:, None] * (W - B @ A))
    best = torch.linalg.svdvals(weights[:, None] * W)[8:].square().sum().sqrt()
    assert best * (1 - 1e-9) <= left < 1.01 * best


def test_importance_is_made_of_squared_gradients_of_single_rows(
    new_model, tokenizer, forget_rows, retain_rows
):
    model = new_model().double()
    layers, _ = target_layers(model, config())
    forget, retain = (encode_all(rows, tokenizer) for rows in (forget_rows, retain_rows))
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = fila_importance(model, layers, forget, retain, padding(tokenizer))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None

    def squares(rows, weight):
        total = torch.zeros_like(weight)
        for row in rows:
            batch = collate([row], padding(tokenizer))
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = answer_tokens(logits, batch.labels).loss.sum()
            total += torch.autograd.grad(loss, weight)[0].square()
        return total / len(rows)

    model.eval()
    assert len(layers) == LAYERS
    for name in list(layers)[::5]:  # the first and the last
        weight = model.get_submodule(name).weight
        F_f, F_r = squares(forget, weight), squares(retain, weight)
        wanted = (F_f / (F_r + FLOOR * F_r.mean())).sum(1).sqrt()
        # A quotient of squares of fp32 gradients, the smallest of which have few right digits.
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-3, atol=0)


def test_a_layer_without_a_gradient_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.ones(2, 3)
    layers = {"0": (4, 3), "1": (2, 4)}

    def losses(model):
        yield model(x).sum() * 0

    with pytest.raises(ValueError, match=r"0: the gradients of the sample are zero or not finite"):
        importance(model, layers, losses, losses)


def _logits(model, tokenizer, rows):
    batch = collate(encode_all(rows, tokenizer), padding(tokenizer))
    with torch.no_grad():
        return model.eval()(batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.fixture
def started(new_model, tokenizer, forget_rows, retain_rows):
    """The adapter of a run from FILA before its first step, and a model as it was."""
    model, settings = new_model(), config(alpha=3.0)
    sides = [encode_all(rows, tokenizer) for rows in (forget_rows, retain_rows)]
    found = fila_importance(model, target_layers(model, settings)[0], *sides, padding(tokenizer))
    return attach(model, settings, 2, found), new_model()


def test_the_start_changes_no_output_and_trains_one_half(started, tokenizer, retain_rows):
    adapter, plain = started
    expected = _logits(plain, tokenizer, retain_rows)
    error = (_logits(adapter.model, tokenizer, retain_rows) - expected).abs().max()
    assert error < 2e-5 * expected.abs().max()
    trained = {n for n, p in adapter.model.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter.frozen()) == 2 * LAYERS and not trained & {*adapter.frozen()}
    assert all(p.abs().max() > 0 for p in adapter.frozen().values())
    assert adapter.delta().largest < 1e-6


def test_switched_off_it_is_the_model_as_it_was(started, tokenizer, retain_rows):
    adapter, plain = started
    with torch.no_grad():
        for parameter in adapter.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with adapter.disabled():
        off = _logits(adapter.model, tokenizer, retain_rows)
    assert torch.equal(off, _logits(plain, tokenizer, retain_rows))
    assert not any(p.requires_grad for p in adapter.frozen().values())
    assert not torch.equal(off, _logits(adapter.model, tokenizer, retain_rows))


@pytest.mark.parametrize("rank", [2, "auto"])
def test_the_adapter_alone_makes_the_trained_model_from_the_original(
    rank, unlearn_rows, new_model, tokenizer, forget_rows, tmp_path
):
    """A LoRA of twice the rank, which PEFT loads onto the base that the run began with."""
    budget = 3 * 480 if rank == "auto" else None
    settings = config(rank=rank, rank_budget=budget, alpha=3.0, lr=1e-2, early_stop=False)
    result = unlearn_rows(settings, output=tmp_path / "run")
    trained = _logits(result.model, tokenizer, forget_rows)
    held = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert held["lora_alpha"] == 6.0
    if rank == "auto":
        assert held["rank_pattern"] == {n: 2 * r for n, r in result.ranks.ranks.items()}
    else:
        assert held["r"] == 4
    assert (trained - _logits(new_model(), tokenizer, forget_rows)).abs().max() > 0.1
    peft = PeftModel.from_pretrained(new_model(), str(tmp_path / "run/adapter"))
    for loaded in (peft, load_adapter(new_model(), tmp_path / "run/adapter")):
        error = (_logits(loaded, tokenizer, forget_rows) - trained).abs().max()
        assert error < 2e-5 * trained.abs().max()
    (inside,) = {p.name for p in (tmp_path / "run/adapter").iterdir() if p.suffix != ".md"} - {
        "adapter_config.json"
    }
    assert inside == "adapter_model.safetensors"


def test_a_reference_of_the_loss_leaves_the_start_frozen(unlearn_rows):
    """KL asks for the model as it was in every step, which switches PEFT's adapters off and on."""
    result = unlearn_rows(config(losses={"gradient_ascent": 1.0, "kl": 1.0}, lr=1e-2))
    trained = {n for n, p in result.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * LAYERS and all(".default." in name for name in trained)
    assert result.largest_delta > 0


def test_a_resumed_run_keeps_its_start(unlearn_rows, stopped_after, tmp_path, monkeypatch):
    def run(output: str, **settings):
        return unlearn_rows(config(epochs=2), output=tmp_path / output, **settings)

    whole = run("whole")
    with stopped_after(3):
        run("stopped")
    monkeypatch.setattr(loop, "fila_importance", lambda *_, **__: pytest.fail("computed again"))
    resumed = run("stopped", resume=True)
    for here, there in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(here, there)
    first, second = (tmp_path / each / "adapter" for each in ("whole", "stopped"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    with pytest.raises(InputError, match=r"config\.lora_start 'fila', this one has 'zero'"):
        unlearn_rows(config(epochs=2, lora_start="zero"), output=tmp_path / "stopped", resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"adapter": "bounded"},
            'the sines of the adapter "bounded" cannot hold: give adapter "lora"',
        ),
        (
            {"lora_start": "filla"},
            "lora_start must be one of zero, fila; got 'filla': did you mean fila",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        config(**settings)


def test_the_estimate_counts_a_copy_of_the_adapted_weights(
    new_model, tokenizer, forget_rows, retain_rows
):
    rows = (forget_rows, retain_rows)
    zero, fila = (
        estimate(new_model().to("meta"), tokenizer, *rows, config(lora_start=start))
        for start in ("zero", "fila")
    )
    # Six layers of 32 x 48 in fp32, and two more matrices of one layer.
    assert (zero.start_memory, fila.start_memory) == (0, (LAYERS + 2) * 4 * 32 * 48)
    more = sum(fila.memory.values()) - sum(zero.memory.values())
    assert more == 4 * fila.parameters == 4 * zero.parameters


def test_the_command_tells_of_the_start_and_reports_it(
    model_folder, write_rows, forget_rows, retain_rows, tmp_path, capsys
):
    arguments = [
        *("unlearn", "--model", str(model_folder), "--output", str(tmp_path / "run")),
        *("--forget", str(write_rows("f.jsonl", forget_rows))),
        *("--retain", str(write_rows("r.jsonl", retain_rows))),
        *("--epochs", "1", "--device", "cpu", "--rank", "2", "--lora-start", "fila"),
    ]
    assert main(arguments) == 2  # bounded, by default
    assert 'give adapter "lora"' in capsys.readouterr().err
    arguments += ["--adapter", "lora"]
    assert main([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "squared gradients of 6 forget and 9 retain rows, one at a time" in told
    assert "frozen start" in told and not (tmp_path / "run").exists()
    assert main(arguments) == 0
    assert "LoRA from fila, learning rate 0.003" in capsys.readouterr().out
