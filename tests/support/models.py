"""What the tests of injection share: blocks, inputs for the tiny models, stirred adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastbound

# What a two-layer model of each architecture has for MLP projections, per layer.
MLP = {
    "gemma": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gemma2": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gemma3": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gemma3_text": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "gpt_neo": ["mlp.c_fc", "mlp.c_proj"],
    "gpt_neox": ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "llama": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "mistral": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "opt": ["fc1", "fc2"],
    "phi": ["mlp.fc1", "mlp.fc2"],
    "phi3": ["mlp.gate_up_proj", "mlp.down_proj"],
    "qwen2": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "qwen3": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "vit": ["mlp.fc1", "mlp.fc2"],
}


def example(model: nn.Module) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(**example(model)).logits


@torch.no_grad()
def stir(model: nn.Module, size: float = 0.3) -> None:
    """Give every A and B values where the sine is not the identity."""
    for name, parameter in model.named_parameters():
        if name.endswith((".A", ".B")):
            parameter.normal_(0, size, generator=torch.Generator().manual_seed(2))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


class Gated(nn.Module):
    """A block that is not from transformers."""

    def __init__(self, act: object = None, K: int = 6, N: int = 10) -> None:
        super().__init__()
        self.gate = nn.Linear(K, N)
        self.up = nn.Linear(K, N)
        self.down = nn.Linear(N, K)
        self.act = nn.SiLU() if act is None else act
        self.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.act(self.gate(x)))


class Plain(nn.Module):
    def __init__(self, act: object = None, K: int = 6, N: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(K, N)
        self.last = nn.Linear(N, K)
        self.act = nn.GELU() if act is None else act
        self.drop = nn.Dropout(0.5)

    def forward(self, h: Tensor) -> Tensor:
        """A docstring changes nothing."""
        h = self.act(self.first(h))
        return self.drop(self.last(h))


class Packed(nn.Module):
    def __init__(self, N: int = 10, bias: bool = True) -> None:
        super().__init__()
        self.both = nn.Linear(6, 2 * N, bias=bias)
        self.down = nn.Linear(10, 6, bias=bias)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


def fused(build: Callable[[], nn.Module], **settings: Any) -> fastbound.FusedBoundedMLP:
    torch.manual_seed(0)
    block = fastbound.FusedBoundedMLP.from_mlp(build(), **{"rank": 3, "bound": 0.5, **settings})
    stir(block)
    return block


def by_layers(block: fastbound.FusedBoundedMLP) -> Callable[[Tensor], Tensor]:
    """The original forward over the same layers."""
    return functools.partial(block.fusion.block_class.forward, block)


def gradients(model: nn.Module, *args: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of every trained parameter."""
    model.zero_grad()
    torch.manual_seed(3)  # the same dropout in every model
    output = model(*args, **inputs)
    output = getattr(output, "logits", output)
    output.float().square().mean().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: nn.Module, other: nn.Module, *args: Any, **inputs: Any) -> None:
    """Outputs and all gradients agree within rounding, and no gradient is zero."""
    output, grads = gradients(one, *args, **inputs)
    expected, expected_grads = gradients(other, *args, **inputs)
    torch.testing.assert_close(output, expected)
    assert set(grads) == set(expected_grads) == trained(one) == trained(other) != set()
    for name, gradient in expected_grads.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(grads[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def pair(build: Callable[[], nn.Module], **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The same model injected with and without fusion, with the same adapters."""
    models = []
    for fuse_mlp in (True, False):
        model = build()
        fastbound.inject(model, **{"rank": 4, "bound": 0.5, **settings}, fuse_mlp=fuse_mlp)
        stir(model)
        models.append(model)
    return models[0], models[1]


def model_of(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind())
