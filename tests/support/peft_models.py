"""Models under the PEFT method, with factors that are not near zero."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import nn

import fastbound


@torch.no_grad()
def stirred(model: nn.Module, adapter: str = "default", seed: int = 2) -> nn.Module:
    """Values where the sine is not the identity, the same whatever the model's other parts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".fastbound_ab.{adapter}." in name:
            parameter.normal_(0, 0.3, generator=generator)
    return model


def adapted(model: nn.Module, **settings) -> PeftModel:
    config = fastbound.BoundedConfig(**{"r": 3, "bound": "4*rms", **settings})
    return stirred(get_peft_model(model, config))
