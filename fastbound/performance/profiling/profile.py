"""What an adapter costs compared with the frozen module: time and memory per sequence length.

Compares fused adapters with PEFT's unfused ones on one layer, one MLP block or a stack of decoder
layers. All share the same weights and are timed in rounds, in an order drawn anew for each round,
with a cold cache.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastbound
from fastbound.dispatch.timing import interleaved, kernel_stopwatch, quartiles
from fastbound.errors import did_you_mean
from fastbound.files import replace_files
from fastbound.performance.memory import peak_bytes, saved_bytes
from fastbound.performance.profiling.baselines import inject_peft
from fastbound.performance.shapes import Block, block_of, linear_shapes

MODES = ("linear", "mlp", "step")
FLOOR = "frozen"
STACK = 2  # the decoder layers of mode "step"
FLAT_FROM = 4096  # tokens; below, the cost of launches and half-filled devices shows


@dataclass(frozen=True)
class Subject:
    """What is profiled: a frozen module with inputs [M, K] and outputs [M, N], and its adapters.

    ``build`` makes the module, ``call`` runs it, and ``targets`` are the names of the layers that
    get an adapter.
    """

    place: str
    K: int
    N: int
    targets: tuple[str, ...]
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)


OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class ProfilePoint:
    """One variant at one length: the seconds of a forward and backward, bytes, or why it failed.

    ``median``, ``q1`` and ``q3`` are in seconds. ``over_floor`` is the median divided by that of
    the frozen module. ``saved_bytes`` are the bytes saved for backward. ``peak_bytes``, on a GPU
    only, are the most bytes allocated beyond those allocated before.
    """

    place: str
    tokens: int
    variant: str
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    over_floor: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    failure: str | None = None

    @property
    def broken(self) -> bool:
        """Whether it failed, and not for lack of memory."""
        return self.failure not in (None, OUT_OF_MEMORY)


def subjects(mode: str, model: str) -> list[Subject]:
    """The subjects of a mode: a model's MLP layers one by one, its block, or a stack of decoders.

    Raises ValueError for an unknown mode or model.
    """
    block = block_of(model)
    if mode == "linear":
        return [
            Subject(
                shape.projection,
                shape.K,
                shape.N,
                ("layer",),
                partial(_linear, shape.K, shape.N, block.bias),
            )
            for shape in linear_shapes(model)
        ]
    targets = ("gate_proj", "up_proj", "down_proj") if block.gated else ("fc1", "fc2")
    if mode == "mlp":
        return [Subject("mlp", block.K, block.K, targets, partial(_mlp, block))]
    if mode == "step":
        place = f"{STACK} decoder layers"
        return [Subject(place, block.K, block.K, targets, partial(_stack, block), _run_stack)]
    raise ValueError(
        f"unknown mode {mode!r}; choose one of {', '.join(MODES)}{did_you_mean(mode, MODES)}"
    )


def describe_mode(mode: str) -> str:
    """One sentence about a mode, for the report."""
    return {
        "linear": "One adapted layer, forward and backward.",
        "mlp": "One MLP block with every projection adapted, forward and backward.",
        "step": f"Forward and backward of {STACK} decoder layers over one sequence, including "
        "attention with frozen projections, but without embeddings, head and optimiser.",
    }[mode]


def _linear(K: int, N: int, bias: bool) -> nn.Module:
    module = nn.Sequential()
    module.add_module("layer", nn.Linear(K, N, bias=bias))
    return module


def _mlp(block: Block) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi.modeling_phi import PhiMLP

    made = LlamaMLP if block.gated else PhiMLP
    module = nn.Sequential()
    module.add_module("mlp", made(_config(block)))
    return module


def _stack(block: Block) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_config(_config(block), trust_remote_code=False)


def _run_stack(module: nn.Module, x: Tensor) -> Tensor:
    hidden: Tensor = module(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
    return hidden


def _config(block: Block) -> Any:
    from transformers import LlamaConfig, PhiConfig

    head = 128 if block.K >= 2048 and block.K % 128 == 0 else 64
    # The activation as a single PyTorch operation, which sets a stricter bar for the fused block.
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(block.activation, block.activation)
    kind = LlamaConfig if block.gated else PhiConfig
    return kind(
        vocab_size=8,
        hidden_size=block.K,
        intermediate_size=block.N,
        num_hidden_layers=STACK,
        num_attention_heads=block.K // head,
        hidden_act=activation,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def variants(
    subject: Subject, rank: int, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """The frozen module and its adapted variants by name, all with the same weights."""
    with torch.device(device):
        module = subject.build().to(dtype).requires_grad_(False)
    forms = {FLOOR: module, "fused": _shared_copy(module), "peft_fp32": _shared_copy(module)}
    if dtype is torch.bfloat16:
        forms["peft_bf16"] = _shared_copy(module)
    targets = list(subject.targets)
    fastbound.inject(forms["fused"], rank, bound="auto", target_modules=targets)
    for name, adapter_dtype in (("peft_fp32", torch.float32), ("peft_bf16", torch.bfloat16)):
        if name in forms:
            forms[name] = inject_peft(
                forms[name],
                rank,
                bound="auto",
                target_modules=targets,
                adapter_dtype=adapter_dtype,
            ).base_model.model
    for form in forms.values():
        for parameter in form.parameters():
            if parameter.requires_grad:  # B starts at zero, and zeros run faster
                nn.init.normal_(parameter, std=0.02)
    return forms


def _shared_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def profile(
    subject: Subject,
    forms: Mapping[str, nn.Module],
    tokens: Sequence[int],
    device: torch.device,
    *,
    rounds: int,
    step: Callable[[str], object] = lambda doing: None,
) -> list[ProfilePoint]:
    """Measure every variant at every length. A point that fails holds why, and the others go on.

    ``tokens`` are the lengths. ``step`` is called once per length, with what is done next.
    """
    stopwatch = kernel_stopwatch(device)
    points: list[ProfilePoint] = []
    for M in tokens:
        step(f"{subject.place} at {M} tokens")
        points += _at_length(subject, forms, M, device, rounds, stopwatch)
        _release(device)
    return points


def _at_length(
    subject: Subject,
    forms: Mapping[str, nn.Module],
    M: int,
    device: torch.device,
    rounds: int,
    stopwatch: Callable[[Callable[[], object]], float],
) -> list[ProfilePoint]:
    held: dict[str, tuple[int, int | None]] = {}
    failures: dict[str, str] = {}
    steps: dict[str, Callable[[int], object]] = {}
    try:
        dtype = next(forms[FLOOR].parameters()).dtype
        x = torch.randn(M, subject.K, device=device, dtype=dtype).requires_grad_()
        dy = torch.randn(M, subject.N, device=device, dtype=dtype)
    except Exception as error:
        reason = _reason(error)
        return [ProfilePoint(subject.place, M, name, failure=reason) for name in forms]
    for name, form in forms.items():
        run = partial(_forward_and_backward, subject, form, x, dy)
        try:
            for turn in range(2):
                run(turn)
            saved = saved_bytes(partial(subject.call, form, x), form.parameters())
            held[name] = saved, peak_bytes(partial(run, 0), device)
        except Exception as error:
            failures[name] = _reason(error)
        else:
            steps[name] = run
        if name in failures:  # only now nothing holds the frames of the error and their tensors
            _release(device)
    try:
        samples = interleaved(steps, rounds=rounds, stopwatch=stopwatch)
    except Exception as error:
        failures.update(dict.fromkeys(steps, _reason(error)))
        samples = {}
    medians = {name: quartiles(taken) for name, taken in samples.items()}
    floor = medians[FLOOR][1] if FLOOR in medians else None
    points = []
    for name in forms:
        if name in failures:
            points.append(ProfilePoint(subject.place, M, name, failure=failures[name]))
            continue
        q1, median, q3 = medians[name]
        over = None if floor is None else median / floor
        points.append(ProfilePoint(subject.place, M, name, median, q1, q3, over, *held[name]))
    return points


def _forward_and_backward(
    subject: Subject, form: nn.Module, x: Tensor, dy: Tensor, turn: int
) -> tuple[Tensor, ...]:
    trained = [p for p in form.parameters() if p.requires_grad]
    return torch.autograd.grad(subject.call(form, x), (x, *trained), dy)


def _reason(error: Exception) -> str:
    """The failure to record: `OUT_OF_MEMORY`, or the first line of the error."""
    message = str(error)
    on_cpu = "can't allocate memory" in message or "not enough memory" in message
    if isinstance(error, torch.OutOfMemoryError) or on_cpu:
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {message.strip().partition(chr(10))[0]}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def write_trace(
    subject: Subject, form: nn.Module, M: int, device: torch.device, path: Path
) -> None:
    """Write a Chrome trace of one forward and backward, after one to warm up."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    dtype = next(form.parameters()).dtype
    x = torch.randn(M, subject.K, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(M, subject.N, device=device, dtype=dtype)
    _forward_and_backward(subject, form, x, dy, 0)
    with torch.profiler.profile(activities=activities) as recorded:
        _forward_and_backward(subject, form, x, dy, 0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    replace_files({path: lambda part: recorded.export_chrome_trace(str(part))})
