"""Chunked cross-entropy gives the plain one's values and gradients, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastbound.unlearning import losses
from fastbound.unlearning.losses.chunked import chunked_answer_tokens

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 33, 8, 500


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(ROWS, LENGTH, WIDTH).requires_grad_()
    weight, bias = normal(VOCABULARY, WIDTH).requires_grad_(), normal(VOCABULARY).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[:, :9] = -100
    return hidden, weight, labels, bias


def _plain(hidden, weight, labels, bias):
    return losses.answer_tokens(F.linear(hidden, weight, bias), labels)


def _gradients(tokens, wanted):
    rates = torch.linspace(-1, 2, len(tokens.loss), dtype=torch.float64)
    return torch.autograd.grad((rates * tokens.loss).sum(), wanted)


@pytest.mark.parametrize("chunk", [1, 7, 96, 1000])
def test_values_and_gradients_are_the_plain_ones(head, chunk):
    wanted = [head[0], head[1], head[3]]
    plain, chunked = _plain(*head), chunked_answer_tokens(*head, chunk=chunk)
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(chunked.correct, plain.correct) and torch.equal(chunked.row, plain.row)
    for found, expected in zip(_gradients(chunked, wanted), _gradients(plain, wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_no_logits_are_saved_for_backward(head):
    def saved(compute):
        kept = {}  # a storage is counted once, however many chunks save it

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tokens = compute()
        sizes = {place: storage.nbytes() for place, storage in kept.items()}
        for parameter in (weight, bias):  # the model holds them anyway
            sizes.pop(parameter.data_ptr(), None)
        assert tokens.loss.requires_grad
        return sum(sizes.values())

    hidden, weight, labels, bias = head
    frozen = (hidden, weight.detach(), labels, bias.detach())
    labelled = int((labels[:, 1:] != -100).sum())
    logits = labelled * VOCABULARY * 8
    assert saved(lambda: _plain(*frozen)) >= logits
    assert saved(lambda: chunked_answer_tokens(*frozen, chunk=16)) < logits / 10


def test_only_answer_tokens_meet_the_head_three_times(head):
    hidden, weight, labels, bias = head
    frozen = (hidden, weight.detach(), labels, bias.detach())
    answers = int((labels[:, 1:] != -100).sum())
    product = 2 * WIDTH * VOCABULARY  # of one position with the head

    def flops(compute):
        with FlopCounterMode(display=False) as counted:
            compute(*frozen).loss.sum().backward()
        return counted.get_total_flops()

    assert flops(_plain) == 2 * labels.numel() * product
    assert flops(chunked_answer_tokens) == 3 * answers * product


def test_at_most_a_chunk_of_logits_exists(head, monkeypatch):
    heights = []
    linear = F.linear

    def watched(hidden, weight, bias):
        heights.append(len(hidden))
        return linear(hidden, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    chunked_answer_tokens(*head, chunk=20).loss.sum().backward()
    labelled = int((head[2][:, 1:] != -100).sum())
    assert max(heights) == 20 and sum(heights) == 2 * labelled


def test_a_chunk_of_nothing_is_refused(head):
    with pytest.raises(ValueError, match="chunk must be at least 1 token, got 0"):
        chunked_answer_tokens(*head, chunk=0)
