"""What a run will take, from its rows and the shapes of its model, without weights or training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from fastbound.errors import InputError
from fastbound.models.ranks import EVEN
from fastbound.unlearning.config import SAMPLE_ROWS, UnlearnConfig
from fastbound.unlearning.data.encoding import Encoded, answer_length, encode, padding
from fastbound.unlearning.data.limits import check_fits
from fastbound.unlearning.data.rows import Row, check_disjoint
from fastbound.unlearning.data.sampling import Pairing
from fastbound.unlearning.losses.chunked import CHUNK
from fastbound.unlearning.losses.cross_entropy import WHOLE_BYTES, check_cross_entropy
from fastbound.unlearning.losses.objective import Objective, refusals
from fastbound.unlearning.training.adapters import target_layers
from fastbound.unlearning.training.ending import forget_ceiling
from fastbound.unlearning.training.sides import Sides

_LONGEST = 64  # a row of more than so many times max_length is not measured


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        sides: the rows as tokens, those beyond `max_length` included.
        too_long: the rows beyond `max_length`, which a run refuses.
        model_parameters: of the frozen model.
        layers: names of the layers to adapt.
        skipped: name -> reason, for layers that match `target_modules` but cannot be adapted.
        parameters: trained elements of all A and B; the most for `rank="auto"`.
        steps: the most steps; a run may end before.
        eval_every: steps between two evaluations.
        processes: how many share a step.
        memory: bytes by what holds them, at the peak of a training step in one process.
        start_memory: bytes of the squared gradients from which "fila" finds its start, in each
            process before the first step; 0 for the start "zero".
        unknown: why the activations are not among them, or None.
    """

    config: UnlearnConfig
    sides: Sides
    too_long: Sequence[Encoded]
    model_parameters: int
    layers: Sequence[str]
    skipped: Mapping[str, str]
    parameters: int
    steps: int
    eval_every: int
    processes: int
    memory: dict[str, int]
    start_memory: int
    unknown: str | None

    def lines(self) -> list[str]:
        """For the terminal."""
        config = self.config
        pairs = config.batch_size * config.accumulation * self.processes
        rank = "chosen per layer" if config.rank == "auto" else f"rank {config.rank}"
        most = "at most " if config.rank == "auto" else ""
        first, last = self.layers[0], self.layers[-1]
        parts = ", ".join(f"{name} {_size(held)}" for name, held in self.memory.items())
        lines = [
            ("model", f"{self.model_parameters:,} parameters in {config.dtype}"),
            ("forget rows", _side(self.sides.forget)),
            ("retain rows", _side(self.sides.retain)),
            (
                "too long",
                f"{len(self.too_long)} rows of more than {config.max_length} tokens (--max-length)",
            ),
            ("adapted", f"{len(self.layers)} layers, {first} to {last}"),
            *(("skipped", f"{name}: {reason}") for name, reason in self.skipped.items()),
            ("trained", f"{most}{self.parameters:,} parameters, {rank}, adapter {config.adapter}"),
            (
                "steps",
                f"at most {self.steps}, each of {pairs} forget and {pairs} retain rows; evaluated "
                f"every {self.eval_every} steps",
            ),
            ("memory", f"about {_size(sum(self.memory.values()))} per process: {parts}"),
            ("", "(an estimate for one training step; PyTorch and its libraries come on top)"),
        ]
        if self.start_memory:
            rows = [min(SAMPLE_ROWS, len(side)) for side in (self.sides.forget, self.sides.retain)]
            lines.insert(
                -2,
                (
                    "start",
                    f"fila, by the squared gradients of {rows[0]} forget and {rows[1]} retain "
                    f"rows, one at a time: {_size(self.start_memory)} before the first step",
                ),
            )
        if self.unknown is not None:
            lines.append(("", f"(without activations, which are not known: {self.unknown})"))
        return [f"{name:13}{text}" for name, text in lines]

    def check(self) -> None:
        """Raise the InputError that a run would end with, if rows are too long."""
        if self.too_long:
            longest = max(self.too_long, key=lambda row: len(row.ids))
            raise InputError(
                f"{len(self.too_long)} rows take more than the {self.config.max_length} tokens of "
                f"max_length, most of all {longest.where}: raise it to {len(longest.ids)} or "
                "shorten the rows"
            )


def estimate(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Row],
    retain: Sequence[Row],
    config: UnlearnConfig,
    *,
    processes: int = 1,
) -> Estimate:
    """Estimate a run of `fastbound.unlearning.unlearn` with the same arguments.

    Args:
        model: on the meta device, in the dtype of its weights; its parameters are frozen.

    Raises:
        InputError: what the run itself would refuse of rows and settings, apart from rows that are
            too long, which `Estimate.check` refuses.
    """
    ceiling = forget_ceiling(config, model)
    objective = Objective(config.weighted_losses, config.seed, ceiling=ceiling)
    objective.layer(model)
    cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    check_cross_entropy(config.cross_entropy, model, device)
    check_disjoint(forget, retain)
    refused = refusals(forget) if objective.needs_refusals else ()
    encoded = [[_encode(row, tokenizer, config) for row in rows] for rows in (forget, retain)]
    sides = Sides(
        encoded[0],
        encoded[1],
        [_encode(row, tokenizer, config) for row in refused],
        padding(tokenizer),
    )
    fitting = [row for side in encoded for row in side if len(row.ids) <= config.max_length]
    too_long = [row for side in encoded for row in side if len(row.ids) > config.max_length]
    check_fits(model, tokenizer, fitting)
    layers, skipped = target_layers(model, config, loaded=False)
    rank = EVEN if config.rank == "auto" else config.rank
    parameters = sum(rank * sum(shape) for shape in layers.values())
    if config.rank_budget is not None:
        parameters = config.rank_budget
    pairing = Pairing(
        len(forget),
        len(retain),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        processes=processes,
        seed=config.seed,
    )
    model_parameters = sum(p.numel() for p in model.parameters())
    memory, unknown = _memory(model, sides, config, layers, parameters)
    sizes = [4 * N * K for N, K in layers.values()]
    return Estimate(
        config,
        sides,
        too_long,
        model_parameters,
        tuple(layers),
        skipped,
        parameters,
        pairing.steps(config.epochs),
        config.evaluation_interval(pairing.steps(1)),
        processes,
        memory,
        sum(sizes) + 2 * max(sizes) if config.lora_start == "fila" else 0,
        unknown,
    )


def _encode(row: Row, tokenizer: Any, config: UnlearnConfig) -> Encoded:
    return encode(row, tokenizer, max_length=_LONGEST * config.max_length, template=config.template)


def _memory(
    model: nn.Module,
    sides: Sides,
    config: UnlearnConfig,
    layers: dict[str, tuple[int, int]],
    parameters: int,
) -> tuple[dict[str, int], str | None]:
    """Bytes at the peak of a step by what holds them, and why activations are not among them."""
    size = (torch.bfloat16 if config.dtype == "bfloat16" else torch.float32).itemsize
    longest = min(config.max_length, _longest(sides))
    rows = sides.most_positions(config.batch_size) // _longest(sides)
    positions = rows * longest
    text: Any = model.config
    text = text.get_text_config()
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "adapter with gradient and AdamW": 4 * 4 * parameters,
    }
    if config.lora_start == "fila":
        memory["frozen start"] = 4 * parameters
    unknown = None
    try:
        kept = _kept_by(model, rows, longest)
    except Exception as error:  # whatever the model's own code raises without values to compute on
        unknown = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    # Layers of one parent with the same K, such as gate_proj and up_proj, share their x.
    inputs = {(name.rpartition(".")[0], K) for name, (_, K) in layers.items()}
    if unknown is None:
        kept += sum(positions * K * size for _, K in inputs)
        if config.gradient_checkpointing:
            depth = text.num_hidden_layers
            kept = kept // depth + depth * positions * text.hidden_size * size
        memory["activations"] = kept
    whole = positions * text.vocab_size * size
    chunked = config.cross_entropy in ("chunked", "liger") or (
        config.cross_entropy == "auto" and whole > WHOLE_BYTES
    )
    if chunked and not Objective(config.weighted_losses).whole_logits:
        positions = min(CHUNK, positions)
    # The logits, their logarithms of probabilities in float32, and the gradient.
    memory["logits"] = positions * text.vocab_size * (2 * size + 4)
    return memory, unknown


def _kept_by(model: nn.Module, rows: int, length: int) -> int:
    """Bytes that a pass of the frozen model without its head keeps for the backward pass.

    It runs on fake tensors, which have shapes alone. The embeddings ask for a gradient, as if the
    first layer were adapted.
    """
    body: Any = model.base_model
    hook = body.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_()
    )
    held: dict[StorageWeakRef, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        key = StorageWeakRef(tensor.untyped_storage())
        if key not in own:
            held[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    body.train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a model's own constants
    state: dict[str, Tensor] = {
        name: mode.from_tensor(tensor.detach())
        for name, tensor in chain(body.named_parameters(), body.named_buffers())
    }
    own = {StorageWeakRef(tensor.untyped_storage()) for tensor in state.values()}
    try:
        with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
            given = {"input_ids": tokens, "use_cache": False}
            torch.func.functional_call(body, state, kwargs=given)
    finally:
        hook.remove()
    return sum(held.values())


def _longest(sides: Sides) -> int:
    return max(len(row.ids) for side in (sides.forget, sides.retain, sides.refused) for row in side)


def _side(rows: Sequence[Encoded]) -> str:
    tokens = sum(len(row.ids) for row in rows)
    answers = sum(map(answer_length, rows))
    longest = max(len(row.ids) for row in rows)
    return (
        f"{len(rows):,}, {tokens:,} tokens, {answers:,} of them in answers; longest row {longest}"
    )


def _size(held: int) -> str:
    return f"{held / 1e9:.2f} GB" if held >= 1e9 else f"{held / 1e6:.1f} MB"
