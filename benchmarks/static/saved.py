"""What an MLP block keeps for its backward pass, counted: `python -m benchmarks.static.saved`.

Bytes a token are the difference between two numbers of tokens, exact on any device. What does not
grow with the tokens (PEFT keeps the sines of its factors, and their arguments) stands apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.report.rows import MIB, markdown_table
from benchmarks.rivals.cases import LLAMA_1K, MODEL_BLOCKS, Block, Case
from benchmarks.rivals.competitors import FROZEN, Build, operator, peft, peft_projection
from fastbound.performance.memory import saved_bytes
from fastbound.truth.operands import Operands

BLOCKS = (LLAMA_1K, *(b for b in MODEL_BLOCKS if b.model in ("gpt-neo-125m", "phi-1.5")))
TOKENS = 16
RANK = 16


class Saved(NamedTuple):
    """Bytes for each token, and once."""

    per_token: float
    once: float


def hugging_face(block: Block) -> tuple[nn.Module, dict[str, str]]:
    """transformers' own block of that model in bf16, frozen; its projections' names."""
    import transformers
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi.modeling_phi import PhiMLP

    sizes: dict[str, Any] = {"hidden_size": block.K, "intermediate_size": block.N}
    module: nn.Module
    if block.model.startswith("llama"):
        module = LlamaMLP(transformers.LlamaConfig(**sizes))
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    elif block.model.startswith("gpt-neo"):
        module = GPTNeoMLP(block.N, transformers.GPTNeoConfig(**sizes))
        names = {"up": "c_fc", "down": "c_proj"}
    elif block.model.startswith("phi"):
        module = PhiMLP(transformers.PhiConfig(**sizes))
        names = {"up": "fc1", "down": "fc2"}
    else:
        raise ValueError(f"no block of transformers is known for {block.model!r}")
    return module.to(torch.bfloat16).requires_grad_(False), names


Column = Callable[[Block, Operands], tuple[Callable[[Tensor], Tensor], Any]]


def _hf_frozen(block: Block, o: Operands) -> tuple[Callable[[Tensor], Tensor], Any]:
    module, _ = hugging_face(block)
    return module, module.parameters()


def _hf_peft(adapter_dtype: torch.dtype) -> Column:
    def build(block: Block, o: Operands) -> tuple[Callable[[Tensor], Tensor], Any]:
        module, names = hugging_face(block)
        for name, attribute in names.items():
            setattr(module, attribute, peft_projection(o.projections[name], adapter_dtype))
        return module, module.parameters()

    return build


def _plain(make: Build) -> Column:
    def build(block: Block, o: Operands) -> tuple[Callable[[Tensor], Tensor], Any]:
        contender = make(o)
        return contender.forward, (*o.frozen, *contender.trained)

    return build


# HF is transformers' block itself; the others are the formula with PyTorch's fused activation.
COLUMNS = {
    "frozen HF": _hf_frozen,
    "frozen": _plain(FROZEN.build),
    "fused": _plain(operator()),
    "fused, recompute": _plain(operator(recompute="gate_up")),
    "peft_bf16": _plain(peft(torch.bfloat16)),
    "peft_fp32": _plain(peft(torch.float32)),
    "peft_fp32 HF": _hf_peft(torch.float32),
}


@cache
def saved(block: Block, column: str) -> Saved:
    """What one column keeps of a block on bf16 x."""
    found = []
    for tokens in (TOKENS, 2 * TOKENS):
        o = Case(block, tokens, "bfloat16", RANK).operands(torch.device("cpu"))
        forward, parameters = COLUMNS[column](block, o)
        x = torch.ones(tokens, block.K, dtype=torch.bfloat16, requires_grad=True)
        found.append(saved_bytes(partial(forward, x), parameters))
    per_token = (found[1] - found[0]) / TOKENS
    return Saved(per_token, found[0] - per_token * TOKENS)


def minimum(block: Block) -> int:
    """Bytes a token of x and of what the activation's slope needs: 2K + 4N, or 2K + 2N."""
    return 2 * block.K + (4 if block.gated else 2) * block.N


def document() -> str:
    """Everything `python -m benchmarks.static.saved` prints, as NOTES.md holds it."""
    head = ["KiB a token", "K->N", "x, g, u", *COLUMNS]
    lines, once = [], []
    for block in BLOCKS:
        counted = {column: saved(block, column) for column in COLUMNS}
        shape = [str(block), f"{block.K}->{block.N}"]
        cells = [f"{s.per_token / 1024:.2f}" for s in counted.values()]
        lines.append([*shape, f"{minimum(block) / 1024:.2f}", *cells])
        once.append([*shape, *(f"{s.once / MIB:.2f}" for s in counted.values())])
    return "\n\n".join(
        [
            f"Counted in bf16 with fp32 adapters (bf16 in `peft_bf16`), every projection adapted, "
            f"r={RANK} ({versions()}). `x, g, u` is arithmetic: x and the activation's inputs.",
            markdown_table(head, lines),
            "Kept besides, whatever the number of tokens:",
            markdown_table(["MiB", "K->N", *COLUMNS], once),
        ]
    )


def versions() -> str:
    """What the counts of the rivals depend on."""
    import peft
    import transformers

    torch_version = torch.__version__.split("+")[0]
    return (
        f"torch {torch_version}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.static.saved", description=(__doc__ or "").split("\n")[0]
    ).parse_args(arguments)
    print(document())


if __name__ == "__main__":
    main()
