"""docs/troubleshooting.md quotes errors as they are raised: each is provoked here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastbound
from fastbound.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^### `(.+)`$", PAGE, flags=re.M)
ELSEWHERE = ["KeyError: 'FASTBOUND'"]  # in a process of its own, by tests/models/test_saving.py
FILES = {"--model": "my-model", "--forget": "forget.jsonl", "--retain": "retain.jsonl"}


def unlearn(**changed: str) -> Callable[[], object]:
    """The command on the user's files with some options changed."""
    options = {
        **FILES,
        "--output": "run",
        **{f"--{name}": value for name, value in changed.items()},
    }
    words = [word for option in options.items() for word in option]
    return lambda: main(["unlearn", *words])


def with_row(row: dict[str, str]) -> Callable[[], object]:
    def run() -> object:
        Path("rows.jsonl").write_text(json.dumps(row))
        return unlearn(forget="rows.jsonl")()

    return run


def twice(*more: str) -> Callable[[], object]:
    """A run, and another one in its folder."""

    def run() -> object:
        words = [word for option in FILES.items() for word in option]
        first = ["unlearn", *words, "--output", "run", "--epochs", "1", "--batch-size", "2"]
        assert main(first) == 0
        return main([*first, *more])

    return run


def model_with_config(config: dict[str, object]) -> Callable[[], object]:
    def run() -> object:
        Path("other-model").mkdir()
        Path("other-model/config.json").write_text(json.dumps(config))
        return unlearn(model="other-model")()

    return run


def model() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained("my-model")


def injected() -> nn.Module:
    adapted = model()
    fastbound.inject(adapted, rank=2)
    return adapted


def beside_an_adapter() -> object:
    injected().save_pretrained("with-adapter")
    for file in Path("my-model").glob("tokenizer*"):
        shutil.copy(file, "with-adapter")
    return unlearn(model="with-adapter")()


def trained_weight() -> object:
    layer = fastbound.FusedBoundedLinear(8, 8, rank=2)
    layer.weight.requires_grad_(True)
    return layer(torch.randn(2, 8))


def another_model() -> object:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=2, **sizes))
    return fastbound.load_adapter(other, "my-adapter")


def merge_hooked() -> object:
    hooked = model()
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    fastbound.inject(hooked, rank=2)
    return fastbound.merge(hooked)


PROVOKED: dict[str, Callable[[], object]] = {
    "no-such-folder": unlearn(model="no/such/folder"),
    "empty-config": model_with_config({}),
    "model-with-code": model_with_config(
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    ),
    "other-columns": with_row({"q": "Who?", "a": "He"}),
    "no-answer": with_row({"question": "Who?"}),
    "shared-rows": unlearn(retain="forget.jsonl"),
    "long-row": with_row({"question": "Where " * 200, "answer": "In the town"}),
    "used-folder": twice(),
    "other-settings": twice("--resume", "--lr", "0.5"),
    "bound": unlearn(bound="wide"),
    "misspelt-target": lambda: fastbound.inject(model(), target_modules=["q_porj"]),
    "unknown-model": lambda: fastbound.inject(nn.Sequential(nn.Linear(4, 4)), rank=2),
    "injected-twice": lambda: fastbound.inject(injected(), rank=2),
    "dtypes": lambda: fastbound.FusedBoundedLinear(8, 8, rank=2)(torch.randn(2, 8).bfloat16()),
    "trained-weight": trained_weight,
    "another-model": another_model,
    "nothing-to-merge": lambda: fastbound.merge(model()),
    "beside-an-adapter": beside_an_adapter,
    "hooked-merge": merge_hooked,
}
if not torch.cuda.is_available():
    PROVOKED["no-gpu"] = unlearn(device="cuda")
    PROVOKED["tune-without-gpu"] = lambda: main(["tune"])


def quoted_by(said: str) -> list[str]:
    """The headings that quote this; … stands for anything."""
    patterns = {each: ".*".join(map(re.escape, each.split("…"))) for each in QUOTED}
    return [each for each, pattern in patterns.items() if re.fullmatch(pattern, said)]


@pytest.mark.parametrize("name", PROVOKED)
def test_the_page_quotes_the_error(name, user_folder, capfd):
    try:
        status = PROVOKED[name]()
    except (TypeError, ValueError) as error:
        said = str(error)
    else:
        assert status
        said = capfd.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")
    assert len(quoted_by(said)) == 1, said


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="two of the errors need a machine without GPU"
)
def test_every_quoted_error_is_provoked():
    assert len(set(QUOTED)) == len(QUOTED) == len(PROVOKED) + len(ELSEWHERE)
    assert set(ELSEWHERE) <= set(QUOTED)
