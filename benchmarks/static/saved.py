"""Count what layers and blocks save for backward: `python -m benchmarks.static.saved`.

Bytes per token are the difference between two numbers of tokens, and exact on any device. What does
not grow with the tokens (PEFT saves the sines of its factors and their arguments) is listed apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.report.rows import MIB, markdown_table
from benchmarks.rivals.cases import LLAMA_1K
from benchmarks.rivals.competitors import (
    FROZEN,
    LAYER_COMPETITORS,
    Build,
    operator,
    peft,
    peft_projection,
)
from benchmarks.static import recorded
from benchmarks.static.floor import TYPICAL_TOKENS
from benchmarks.static.recorded import blank_operands
from fastbound.performance.memory import saved_bytes
from fastbound.performance.prediction import RANK
from fastbound.performance.shapes import MODEL_SHAPES, Block, Shape, block_of
from fastbound.truth.operands import Operands

BLOCKS = (LLAMA_1K, block_of("gpt-neo-125m"), block_of("phi-1.5"))
TOKENS = 16

# A forward pass, and its parameters, which do not count as saved.
Built: TypeAlias = tuple[Callable[[Tensor], Tensor], Iterable[Tensor]]


class Saved(NamedTuple):
    """Bytes per token, and bytes that do not depend on the tokens."""

    per_token: float
    once: float


def hugging_face(block: Block) -> tuple[nn.Module, dict[str, str]]:
    """transformers' own block of the model in bf16, frozen, and the names of its projections."""
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


def _hf_frozen(block: Block, o: Operands) -> Built:
    module, _ = hugging_face(block)
    return module, module.parameters()


def _hf_peft(block: Block, o: Operands) -> Built:
    module, names = hugging_face(block)
    for name, attribute in names.items():
        setattr(module, attribute, peft_projection(o.projections[name], torch.float32))
    return module, module.parameters()


def _plain(make: Build) -> Callable[[Any, Any], Built]:
    def build(place: Shape | Block, o: Operands) -> Built:
        contender = make(o)
        return contender.forward, (*o.frozen, *contender.trained)

    return build


Columns: TypeAlias = Mapping[str, Callable[[Any, Any], Built]]

# "HF" is transformers' own block; the others are the formula with PyTorch's fused activation.
BLOCK_COLUMNS: Columns = {
    "frozen HF": _hf_frozen,
    "frozen": _plain(FROZEN.build),
    "fused": _plain(operator()),
    "fused, recompute": _plain(operator(recompute="gate_up")),
    "peft_bf16": _plain(peft(torch.bfloat16)),
    "peft_fp32": _plain(peft(torch.float32)),
    "peft_fp32 HF": _hf_peft,
}
_LAYERS = {competitor.name: _plain(competitor.build) for competitor in LAYER_COMPETITORS}
LAYER_COLUMNS: Columns = {
    name: _LAYERS[name] for name in ("frozen", "fused", "addmm", "peft_bf16", "peft_fp32")
}


@cache
def saved(place: Shape | Block, column: str) -> Saved:
    """What one column saves for a layer or a block on bf16 x."""
    columns = BLOCK_COLUMNS if isinstance(place, Block) else LAYER_COLUMNS
    found = []
    for tokens in (TOKENS, 2 * TOKENS):
        forward, parameters = columns[column](place, blank_operands(place, tokens, "cpu"))
        x = torch.ones(tokens, place.K, dtype=torch.bfloat16, requires_grad=True)
        found.append(saved_bytes(partial(forward, x), parameters))
    per_token = (found[1] - found[0]) / TOKENS
    return Saved(per_token, found[0] - per_token * TOKENS)


def minimum(block: Block) -> int:
    """Bytes per token of x and of the activation's inputs: 2K + 4N if gated, else 2K + 2N."""
    return 2 * block.K + (4 if block.gated else 2) * block.N


def document() -> str:
    """Everything that `python -m benchmarks.static.saved` prints, and NOTES.md contains."""
    lines, once = [], []
    for block in BLOCKS:
        counted = [saved(block, column) for column in BLOCK_COLUMNS]
        place = [str(block), f"{block.K}->{block.N}"]
        cells = [f"{s.per_token / 1024:.2f}" for s in counted]
        lines.append([*place, f"{minimum(block) / 1024:.2f}", *cells])
        once.append([*place, *(f"{s.once / MIB:.2f}" for s in counted)])
    layers = [
        [
            str(shape),
            *(f"{saved(shape, c).per_token * TYPICAL_TOKENS / MIB:.2f}" for c in LAYER_COLUMNS),
        ]
        for shape in MODEL_SHAPES
    ]
    return "\n\n".join(
        [
            f"Counted in bf16 with fp32 adapters (bf16 in `peft_bf16`) on every projection, "
            f"r={RANK} ({versions()}). `x, g, u` is arithmetic: x and the activation's inputs.",
            markdown_table(["KiB per token", "K->N", "x, g, u", *BLOCK_COLUMNS], lines),
            "Saved in addition, whatever the number of tokens:",
            markdown_table(["MiB", "K->N", *BLOCK_COLUMNS], once),
            f"Saved by one layer, in MiB for {TYPICAL_TOKENS} tokens (`split` saves what `fused` "
            "does):",
            markdown_table(["layer", *LAYER_COLUMNS], layers),
        ]
    )


def versions() -> str:
    """The versions on which the counts of the competitors depend."""
    return f"transformers {version('transformers')}, {recorded.versions()}"


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.static.saved", description=(__doc__ or "").split("\n")[0]
    ).parse_args(arguments)
    print(document())


if __name__ == "__main__":
    main()
