"""Layers that compute x Wᵀ themselves: quantised, hooked, parametrised, pruned, offloaded."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

K, N = 64, 128  # bitsandbytes quantises in blocks of 64


def plain(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N).to(dtype)


def linear4bit() -> nn.Module:
    source = plain()
    layer = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu")


def linear4bit_in_bf16() -> nn.Module:
    layer = linear4bit()
    layer.compute_dtype = torch.bfloat16  # the result comes back in x's dtype
    return layer


def linear8bit() -> nn.Module:
    layer = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu")


def int8() -> nn.Module:
    model = nn.Sequential(plain())
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def float8() -> nn.Module:
    model = nn.Sequential(plain())
    quantize_(model, Float8WeightOnlyConfig())
    return model[0]


def subclass() -> nn.Module:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    return Doubled(K, N)


def with_hook() -> nn.Module:
    layer = plain()
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def with_weight_norm() -> nn.Module:
    return parametrizations.weight_norm(plain())


def with_old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(plain())


def pruned() -> nn.Module:
    return prune.l1_unstructured(plain(), "weight", 0.5)


def offloaded() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(nn.Sequential(plain()), torch.device("cpu"))[0]


QUANTISED = {
    linear4bit: "base is Linear4bit",
    linear4bit_in_bf16: "base is Linear4bit",
    linear8bit: "base is Linear8bitLt",
    int8: "base holds its weight as Int8Tensor",
    float8: "base holds its weight as Float8Tensor",
}
BASES = {
    **QUANTISED,
    subclass: "base is Doubled",
    with_hook: "base has hooks",
    with_weight_norm: "base has a parametrization",
    with_old_weight_norm: "base has WeightNorm",
    pruned: "base has L1Unstructured",
    offloaded: "base has accelerate's AlignDevicesHook",
}
