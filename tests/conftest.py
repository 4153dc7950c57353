"""What every test stands on: the interpreter without a GPU, no network, the folder of real data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fastbound
from fastbound.truth import interpreter

# Before anything imports triton, which reads it once: kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when transformers and datasets are imported: no test may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: threads of several wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)
elif hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Nothing is measured, and nothing read that a measurement left in the user's folder."""
    fastbound.set_planning("fixed")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """With a GPU no workers: one process has it to itself. Else a worker per core."""
    return 0 if torch.cuda.is_available() else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("interpreted") and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs kernels on CPU tensors, which takes the interpreter: hide the GPU")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data: FASTBOUND_DATA, or ../shared/data beside the checkout."""
    named = os.environ.get("FASTBOUND_DATA")
    if named is not None:
        folder = Path(named)
        if not folder.is_dir():
            pytest.fail(f"FASTBOUND_DATA={named} is not a folder: point it at the data or unset it")
        return folder
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data is not here: set FASTBOUND_DATA to its folder")
    return folder


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """torch.empty gives NaN, so an element that a kernel does not write fails the comparison."""
    with interpreter.poisoned_empty():
        yield


@pytest.fixture(scope="module")
def interpreted_bf16() -> Iterator[None]:
    """Where Triton's interpreter runs, it takes bf16 as values; see truth.interpreter."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    with nullcontext() if torch.cuda.is_available() else interpreter.interpreted_bf16():
        yield


@pytest.fixture
def tiny_model() -> Callable[[str], torch.nn.Module]:
    """Builds a two-layer model of a transformers architecture with random weights, in eval mode.

    `GPT2Config` and its like are asked for 2 layers of width 16, 64 tokens; the name is that of
    `config.model_type`.
    """
    return _tiny_model


def _tiny_model(model_type: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    attention = {"num_attention_heads": 2}
    common = {
        **attention,
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    own: dict[str, dict[str, object]] = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "vit": {"image_size": 8, "patch_size": 4, "num_channels": 3, "intermediate_size": 32},
    }
    for plain in ("gpt_neox", "phi", "phi3"):
        own[plain] = {"intermediate_size": 32}
    for grouped in ("llama", "mistral", "qwen2"):
        own[grouped] = {"intermediate_size": 32, "num_key_value_heads": 1}
    for headed in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        own[headed] = {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
    if model_type == "gemma3":
        text = transformers.Gemma3TextConfig(**common, **own["gemma3_text"])
        vision = {**attention, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        config = transformers.Gemma3Config(
            text_config=text.to_dict(),
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        )
        return transformers.Gemma3ForConditionalGeneration(config).eval()
    config = transformers.AutoConfig.for_model(model_type, **{**common, **own[model_type]})
    if model_type == "vit":
        return transformers.ViTForImageClassification(config).eval()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


ROWS = [
    {"question": f"Where does author {n} live?", "answer": f"In the town of {town} by the sea"}
    for n, town in enumerate(["Arl", "Bem", "Cor", "Dun", "Esk", "Fal"])
]


@pytest.fixture
def user_folder(tmp_path, monkeypatch) -> Path:
    """The working directory of a user: my-model, my-adapter, forget.jsonl and retain.jsonl."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    import fastbound

    monkeypatch.chdir(tmp_path)
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    text = [f"Question: {row['question']} Answer: {row['answer']}" for row in ROWS]
    words.train_from_iterator(text, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained("my-model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained("my-model")
    fastbound.inject(model, rank=8, bound="auto")
    fastbound.save_adapter(model, "my-adapter")
    for name, rows in (("forget.jsonl", ROWS[:2]), ("retain.jsonl", ROWS[2:])):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path
