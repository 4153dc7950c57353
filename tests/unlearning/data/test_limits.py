"""What a model has no room for is named by row before it runs: positions, embeddings, length."""

from __future__ import annotations

import tracemalloc

import pytest
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastbound.unlearning import InputError, Row, UnlearnConfig, unlearn
from fastbound.unlearning.data.encoding import Encoded, beginning, encode
from fastbound.unlearning.data.limits import check_fits


def gpt2(positions: int = 32, vocabulary: int = 400) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=2, n_positions=positions,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama(positions: int = 32, **settings) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=positions, **settings,
        )
    )  # fmt: skip


def row(tokens: int, highest: int = 5) -> Encoded:
    return Encoded((highest, *[3] * (tokens - 1)), (), "f.jsonl, row 7")


@pytest.mark.parametrize("model", [gpt2, llama])
def test_a_row_beyond_the_positions_is_named(tokenizer, model):
    check_fits(model(), tokenizer, [row(32)])
    with pytest.raises(
        InputError, match=r"f.jsonl, row 7: takes 33 tokens, more than the 32 positions .* shorten"
    ):
        check_fits(model(), tokenizer, [row(8), row(33)])


def test_tokens_to_come_count_where_positions_are_a_table(tokenizer):
    check_fits(gpt2(), tokenizer, [row(30)], [3])  # nothing follows the last
    with pytest.raises(InputError, match=r"row 7: takes 30 tokens and up to 4 new ones, more than"):
        check_fits(gpt2(), tokenizer, [row(30)], [4])
    check_fits(llama(), tokenizer, [row(30)], [200])


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    ],
)
def test_stretched_positions_are_the_models_own(tokenizer, scaling):
    model = llama(rope_parameters={"rope_theta": 10000.0, **scaling})
    check_fits(model, tokenizer, [row(64)])
    with pytest.raises(InputError, match="more than the 64 positions"):
        check_fits(model, tokenizer, [row(65)])


def test_a_model_without_positions_has_no_limit(tokenizer):
    model = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=8, n_layer=1, n_head=2))
    check_fits(model, tokenizer, [row(5000)])
    check_fits(nn.Linear(2, 2), tokenizer, [row(5000)])


def test_a_token_without_an_embedding_is_named(tokenizer):
    last = len(tokenizer) - 1
    model = gpt2(vocabulary=last)
    with pytest.raises(
        InputError,
        match=rf"row 7: token {last} \('.+'\) has no embedding: the tokenizer has {last + 1} "
        rf"tokens, the model {last}: call model.resize_token_embeddings\({last + 1}\)",
    ):
        check_fits(model, tokenizer, [row(4), row(4, highest=last)])
    model.resize_token_embeddings(last + 1, mean_resizing=False)
    check_fits(model, tokenizer, [row(4, highest=last)])


def test_a_padding_token_without_an_embedding_is_named(tokenizer):
    with pytest.raises(InputError, match=r"the padding token: token \d+ .* has no embedding"):
        check_fits(gpt2(vocabulary=tokenizer.pad_token_id), tokenizer, [])


@pytest.mark.parametrize(("positions", "vocabulary"), [(12, 400), (64, 100)])
def test_unlearning_refuses_before_anything_is_done(tokenizer, tmp_path, positions, vocabulary):
    model = gpt2(positions, vocabulary)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [Row("Who wrote it?", "Ann wrote all of it in one long winter by the sea.", "f, row 1")]
    other = [Row("What is it?", "A book.", "r, row 1")]
    with pytest.raises(InputError, match="f, row 1: "):
        unlearn(model, tokenizer, rows, other, UnlearnConfig(), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())


@pytest.mark.parametrize("text", ["word " * 2_000_000, "a" * 10_000_000])
def test_a_row_far_too_long_is_refused_without_tokenising_it(tokenizer, text):
    tracemalloc.start()
    with pytest.raises(InputError, match=r"f, row 1: .* 512 tokens \(10000000 characters\), more"):
        encode(Row(None, text, "f, row 1"), tokenizer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_a_long_text_of_few_tokens_is_not_too_long(tokenizer):
    class Blank:
        """Blanks cost nothing."""

        def __call__(self, text, **settings):
            return {"input_ids": text.split()}

    text = "a" + " " * 100_000 + "b"
    assert beginning(text, Blank(), 8) == text
    assert beginning("a " * 100_000, Blank(), 8) == "a " * 256
