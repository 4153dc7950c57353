"""The scores of answers say what greedy decoding does, and scoring changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbound.unlearning import collate, encode, evaluate
from fastbound.unlearning.data.encoding import IGNORED, encode_all


def test_score_matches_greedy_decoding(new_model, tokenizer, forget_rows):
    model = new_model().eval()
    row = encode(forget_rows[0], tokenizer)
    prompt = len([label for label in row.labels if label == IGNORED])
    # Trained on one row until greedy decoding repeats it, the score must say so.
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = collate([row], 0)
    for _ in range(60):
        logits = model(input_ids=batch.input_ids).logits
        loss = F.cross_entropy(logits[0, :-1], batch.labels[0, 1:], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    others = encode_all(forget_rows[1:], tokenizer)
    score = evaluate(model, [row, *others], pad=0, batch_size=2)
    assert score.rows == len(forget_rows)
    for each in (row, *others):
        start = sum(label == IGNORED for label in each.labels)
        generated = model.generate(
            input_ids=torch.tensor([each.ids[:start]]),
            max_new_tokens=len(each.ids) - start,
            do_sample=False,
            pad_token_id=0,
        )
        same = generated[0].tolist() == list(each.ids)
        assert same == (evaluate(model, [each], pad=0).exact == 1.0)
    assert score.exact == 1 / len(forget_rows)
    alone = evaluate(model, [row], pad=0)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[0, prompt - 1 : -1]
    expected = F.cross_entropy(logits, torch.tensor(row.ids[prompt:])).item()
    assert alone.loss == pytest.approx(expected, rel=1e-5) and alone.accuracy == 1.0


def test_evaluation_leaves_the_mode_as_it_was(new_model, tokenizer, forget_rows):
    model = new_model().train()
    evaluate(model, encode_all(forget_rows, tokenizer), pad=0)
    assert model.training
