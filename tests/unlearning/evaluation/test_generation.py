"""Greedy continuations are argmax, whatever generation settings a model comes with."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from fastbound.unlearning.evaluation.generation import continuations, stop_tokens

PROMPT, NEW, END = [3, 4, 5, 6], 12, 1


def argmax(model) -> list[int]:
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert END not in ids
    return ids[len(PROMPT) :]


@pytest.fixture
def model(tiny_model):
    """One that repeats itself, so that penalties and blocks would show."""
    model = tiny_model("llama").eval()
    model.generation_config = GenerationConfig(eos_token_id=END)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


SETTINGS = {
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "sequence_bias": [[[7], 50.0]],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 9,
    "min_length": 40,
    "min_new_tokens": 40,
    "max_length": 5,
    "max_time": 1e-9,
    "exponential_decay_length_penalty": (1, 2.0),
    "stop_strings": ["a"],
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 40,
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "guidance_scale": 3.0,
    "renormalize_logits": True,
    "prompt_lookup_num_tokens": 3,
    "cache_implementation": "static",
    "use_cache": False,
}


@pytest.mark.parametrize("name", [*SETTINGS, "bad_words_ids", "suppress_tokens", "all of them"])
def test_a_models_own_generation_settings_change_nothing(model, name):
    wanted = argmax(model)
    settings = {
        **SETTINGS,
        "bad_words_ids": [[wanted[0]]],
        "suppress_tokens": [wanted[0]],
        "begin_suppress_tokens": [wanted[0]],
    }
    for each in settings if name == "all of them" else [name]:
        setattr(model.generation_config, each, settings[each])
    own = copy.deepcopy(model.generation_config.to_dict())
    assert continuations(model, [PROMPT], [NEW], pad=0, end=END) == [wanted]
    assert model.generation_config.to_dict() == own


def test_settings_under_a_peft_adapter_change_nothing_and_come_back(model):
    wanted = argmax(model)
    own = model.generation_config
    own.no_repeat_ngram_size = 1
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert continuations(wrapped, [PROMPT], [NEW], pad=0, end=END) == [wanted]
    assert wrapped.generation_config is own


@pytest.mark.parametrize(("own", "stops"), [(None, {END}), (5, {5}), ([5, 6], {5, 6}), ([], {END})])
def test_the_models_own_end_of_text_counts(model, own, stops):
    model.generation_config.eos_token_id = own
    assert stop_tokens(model, END) == stops


def test_a_row_of_a_batch_runs_no_further_than_it_asks_for():
    """Else a long prompt runs off a table of positions while a short one gets its long answer."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    model = GPT2LMHeadModel(config).eval()
    prompts, most = [list(range(2, 14)), [5]], [3, 14]
    found = continuations(model, prompts, most, pad=0, end=31)
    alone = [
        continuations(model, [p], [m], pad=0, end=31)[0] for p, m in zip(prompts, most, strict=True)
    ]
    assert found == alone and len(found[1]) == 14
