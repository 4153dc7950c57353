"""The shapes that are measured and tuned for: MLP projections and MLP blocks of four models."""

from __future__ import annotations

from dataclasses import dataclass

from fastbound.dispatch.entries import block_form
from fastbound.errors import did_you_mean


@dataclass(frozen=True)
class Shape:
    """One linear layer, weight `[N, K]`, named after its place in a model."""

    model: str
    projection: str
    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.model}.{self.projection}"


@dataclass(frozen=True)
class Block:
    """One MLP block: `down(f(gate(x)) * up(x))` if gated, else `down(f(up(x)))`.

    Weights of gate and up `[N, K]`, of down `[K, N]`; every projection has a bias, or none has.
    """

    model: str
    K: int
    N: int
    activation: str
    gated: bool
    bias: bool
    projection: str = "mlp"

    def __str__(self) -> str:
        return f"{self.model}.{self.projection}"

    @property
    def form(self) -> str:
        """As a table of plans names it."""
        return block_form(self.activation, self.gated)


MODEL_SHAPES = (
    Shape("gpt-neo-125m", "c_fc", 768, 3072),
    Shape("gpt-neo-125m", "c_proj", 3072, 768),
    Shape("phi-1.5", "fc1", 2048, 8192),
    Shape("phi-1.5", "fc2", 8192, 2048),
    Shape("llama-2-7b", "gate_up", 4096, 11008),
    Shape("llama-2-7b", "down", 11008, 4096),
    Shape("llama-3-8b", "gate_up", 4096, 14336),
    Shape("llama-3-8b", "down", 14336, 4096),
)
MODEL_BLOCKS = (
    Block("gpt-neo-125m", 768, 3072, "gelu_tanh", gated=False, bias=True),
    Block("phi-1.5", 2048, 8192, "gelu_tanh", gated=False, bias=True),
    Block("llama-2-7b", 4096, 11008, "silu", gated=True, bias=False),
    Block("llama-3-8b", 4096, 14336, "silu", gated=True, bias=False),
)


def known_models() -> list[str]:
    """The names that :func:`linear_shapes` and :func:`block_of` take."""
    return [block.model for block in MODEL_BLOCKS]


def linear_shapes(model: str) -> list[Shape]:
    """A model's MLP projections.

    Raises ValueError for a name that is not known.
    """
    found = [shape for shape in MODEL_SHAPES if shape.model == model]
    if not found:
        raise ValueError(
            f"unknown model shape {model!r}; choose from {', '.join(known_models())}"
            f"{did_you_mean(model, known_models())}"
        )
    return found


def block_of(model: str) -> Block:
    """A model's MLP block; raises as :func:`linear_shapes`."""
    linear_shapes(model)
    return next(block for block in MODEL_BLOCKS if block.model == model)


def parse_tokens(text: str) -> list[int]:
    """Numbers of tokens, ascending: "4096", "4k", "1k,8k", or "1k:128k" for its powers of two.

    A range starts at its first number and doubles up to its last. Raises ValueError for all else.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, colon, last = part.partition(":")
        low = _number(first, text)
        high = _number(last, text) if colon else low
        if high < low:
            raise ValueError(f"tokens {text!r}: the range {part.strip()} runs backwards")
        while low <= high:
            found.add(low)
            low *= 2
    return sorted(found)


def _number(text: str, whole: str) -> int:
    digits = text.strip().lower()
    thousands = digits.endswith("k")
    digits = digits.removesuffix("k")
    if not (digits.isascii() and digits.isdigit() and 0 < int(digits) < 2**31):
        raise ValueError(
            f"tokens {whole!r}: {text.strip()!r} is no number of tokens; give 4096 or 4k, a list "
            "1k,8k, or a range 1k:128k of its doublings"
        )
    return int(digits) * (1024 if thousands else 1)
