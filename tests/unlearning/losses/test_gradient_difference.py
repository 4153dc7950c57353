"""Gradient difference: one batch of both sides equals a pass for each side."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbound
from fastbound.unlearning import Encoded, collate, gradient_difference
from fastbound.unlearning.data.encoding import IGNORED


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def random_row(length):
    ids = tuple(torch.randint(3, 64, (length,)).tolist())
    return Encoded(ids, (IGNORED,) * (length // 3) + ids[length // 3 :], "here")


@pytest.mark.parametrize(("forget_weight", "retain_weight"), [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0)])
def test_one_batch_equals_two_passes(tiny_model, forget_weight, retain_weight):
    # GPT-2: its norms compute in fp64, where Llama's go through fp32.
    model = tiny_model("gpt2").double()
    fastbound.inject(model, 4, bound=0.1, adapter_dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, fastbound.BoundedAdapter):
            torch.nn.init.normal_(module.B)
    forget = [random_row(length) for length in (5, 17, 9)]
    retain = [random_row(length) for length in (12, 4, 20, 6)]

    batch = collate([*forget, *retain], 0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    together = gradient_difference(
        logits, batch.labels, 3, forget_weight=forget_weight, retain_weight=retain_weight
    )
    together.loss.backward()
    found = gradients(model)

    model.zero_grad()
    apart = {}
    for side, rows in (("forget", forget), ("retain", retain)):
        part = collate(rows, 0)
        logits = model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
        apart[side] = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), part.labels[:, 1:].flatten(), ignore_index=IGNORED
        )
    loss = retain_weight * apart["retain"] - forget_weight * apart["forget"]
    loss.backward()

    torch.testing.assert_close(together.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.forget, apart["forget"].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(together.retain, apart["retain"].detach(), rtol=1e-12, atol=0)
    expected = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 2 * 2 * 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13)


def test_a_token_beyond_the_ceiling_is_not_pushed():
    torch.manual_seed(0)
    logits = (4 * torch.randn(4, 9, 30, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 30, (4, 9))
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).view(4, 8)
    ceiling = each[:2].median().item()  # half of the forget tokens are beyond it
    expected = each[2:].mean() - each[:2].clamp(max=ceiling).mean()
    (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)

    found = gradient_difference(logits, labels, 2, ceiling=ceiling)
    (gradient,) = torch.autograd.grad(found.loss, logits)

    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)
    pushed = gradient[:, :-1].abs().sum(-1) > 0
    assert torch.equal(pushed[:2], each[:2] <= ceiling) and pushed[2:].all()
    torch.testing.assert_close(found.forget, each[:2].mean().detach(), rtol=1e-12, atol=0)


def test_cross_entropy_is_fp32_for_bf16_logits():
    logits = torch.randn(2, 5, 50).bfloat16()
    labels = torch.randint(0, 50, (2, 5))
    loss = gradient_difference(logits, labels, 1).loss
    exact = gradient_difference(logits.double(), labels, 1).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forget_rows", [0, 2, 3])
def test_refuses_a_batch_with_one_side(forget_rows):
    with pytest.raises(ValueError, match="1 <= forget_rows < 2"):
        gradient_difference(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), forget_rows)
