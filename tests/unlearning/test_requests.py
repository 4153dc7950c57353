"""Requests one after the other: what each forgets, what is left, and taking one back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastbound.unlearning import InputError, UnlearnConfig
from fastbound.unlearning.data.encoding import encode_all, padding
from fastbound.unlearning.metrics.answers import evaluate
from fastbound.unlearning.model import load_pretrained
from fastbound.unlearning.requests import apply_requests, unlearn_requests

CONFIG = UnlearnConfig(lr=3e-2, epochs=12, batch_size=2, bound=0.3, early_stop=False, eval_every=99)


@pytest.fixture(scope="module")
def carried_out(model_folder, tokenizer, forget_rows, retain_rows, tmp_path_factory):
    """Three requests of two rows each, the last third of the retain rows measured as general."""
    folder = tmp_path_factory.mktemp("requests") / "out"
    requests = [forget_rows[k : k + 2] for k in (0, 2, 4)]
    arguments = (lambda: load_pretrained(str(model_folder))[0], tokenizer, requests)
    more = {"output": folder, "general": retain_rows[6:], "progress": False}
    curve = unlearn_requests(*arguments, retain_rows[:6], CONFIG, **more)
    return folder, requests, curve, arguments, more


def accuracy(model, rows, tokenizer):
    encoded = encode_all(rows, tokenizer)
    return evaluate(model, encoded, pad=padding(tokenizer), batch_size=4)


def test_each_request_is_forgotten_and_those_to_come_are_not_yet(carried_out):
    curve = carried_out[2]
    assert [each.requests for each in curve] == [0, 1, 2, 3]
    assert min(score.accuracy for score in curve[0].forget) > 0.9
    for number in (1, 2, 3):
        asked = curve[number].forget[number - 1]
        assert asked.accuracy < 0.6 and asked.loss > curve[0].forget[number - 1].loss + 1
    assert curve[1].forget[2].accuracy > curve[3].forget[2].accuracy
    assert curve[3].retain.accuracy > curve[3].forget[2].accuracy
    assert all(each.general is not None and each.stopped == "all steps" for each in curve[1:])


def test_the_report_holds_the_curve(carried_out):
    folder, _, curve, *_ = carried_out
    held = json.loads((folder / "requests.json").read_text())["curve"]
    assert [each["retain"]["accuracy"] for each in held] == [e.retain.accuracy for e in curve]
    assert (folder / "requests.png").read_bytes().startswith(b"\x89PNG")


def test_all_adapters_give_the_last_model_and_none_the_base(carried_out, new_model, tokenizer):
    folder, requests, curve, *_ = carried_out
    model = apply_requests(new_model(), folder)
    for rows, score in zip(requests, curve[-1].forget, strict=True):
        found = accuracy(model, rows, tokenizer)
        assert found.loss == pytest.approx(score.loss, rel=1e-3)
        assert found.accuracy == score.accuracy
    plain, base = apply_requests(new_model(), folder, []), new_model()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), base.parameters(), strict=True)
    )


def test_a_request_that_is_taken_back_is_known_again(carried_out, new_model, tokenizer):
    folder, requests, curve, *_ = carried_out
    model = apply_requests(new_model(), folder, [1, 2])
    found = [accuracy(model, rows, tokenizer).accuracy for rows in requests]
    last = [score.accuracy for score in curve[-1].forget]
    assert found[2] > last[2] + 0.1
    assert found == [pytest.approx(score.accuracy) for score in curve[2].forget]


def test_adapters_start_from_seeds_of_their_own(carried_out):
    from safetensors.torch import load_file

    folder = carried_out[0]
    first, second = (
        load_file(folder / f"request-{k}/adapter/adapter_model.safetensors") for k in (1, 2)
    )
    A = next(name for name in first if name.endswith(".A"))
    assert not torch.allclose(first[A], second[A], atol=0.05)


def test_a_finished_series_is_taken_up_again_with_the_same_curve(carried_out, retain_rows):
    _, _, curve, arguments, more = carried_out
    with pytest.raises(InputError, match="holds another run: continue it with --resume"):
        unlearn_requests(*arguments, retain_rows[:6], CONFIG, **more)
    again = unlearn_requests(*arguments, retain_rows[:6], CONFIG, resume=True, **more)
    assert [each.retain for each in again] == [each.retain for each in curve]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "give at least one request"),
        ([[0, 1], [1, 2]], "share 1 row"),
        ([[0], []], "and rows for every request"),
    ],
)
def test_requests_that_cannot_be_carried_out(
    new_model, tokenizer, forget_rows, retain_rows, tmp_path, requests, message
):
    rows = [[forget_rows[i] for i in each] for each in requests]
    with pytest.raises(InputError, match=message):
        unlearn_requests(new_model, tokenizer, rows, retain_rows, CONFIG, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_there_is_named(new_model, tmp_path):
    with pytest.raises(InputError, match=r"request-4/adapter does not exist"):
        apply_requests(new_model(), tmp_path, [4])


def test_a_request_is_not_added_twice(carried_out, new_model):
    with pytest.raises(InputError, match="request 2 is given twice"):
        apply_requests(new_model(), carried_out[0], [2, 1, 2])


def test_nothing_is_merged_if_one_of_the_requests_is_not_there(carried_out, new_model):
    model, base = new_model(), new_model()
    with pytest.raises(InputError, match=r"request-9/adapter does not exist"):
        apply_requests(model, carried_out[0], [1, 9])
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)
    )


def test_a_copy_beside_the_requests_is_none_of_them(carried_out, new_model, tmp_path):
    folder = tmp_path / "series"
    for name in ("request-1", "request-1-backup"):
        shutil.copytree(carried_out[0] / "request-1", folder / name)
    model, alone = apply_requests(new_model(), folder), apply_requests(new_model(), folder, [1])
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True)
    )


@pytest.mark.parametrize("side", ["request", "general"])
def test_rows_beyond_the_models_positions_are_refused_first(
    forget_rows, retain_rows, tokenizer, tmp_path, side
):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(n_positions=4, **sizes))
    rows = {"request": forget_rows[:1], "general": None} | {side: forget_rows[1:2]}
    with pytest.raises(InputError, match="more than the 4 positions"):
        unlearn_requests(lambda: model, tokenizer, [rows["request"]], retain_rows[:1],
                         output=tmp_path / "out", general=rows["general"])  # fmt: skip
    assert not (tmp_path / "out" / "requests.json").exists()
