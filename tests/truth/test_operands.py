"""Operands of layers and blocks, and the truth of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.rivals.competitors import (
    FROZEN,
)
from fastbound.truth import formula
from fastbound.truth.exactness import exact
from fastbound.truth.operands import block_operands, layer_operands, run

CPU = torch.device("cpu")


def test_truths_of_a_block_sum_over_all_rows_and_keep_the_first() -> None:
    """In parts of 1024 rows: the whole is what one call over all rows gives."""
    o = block_operands((2500, 6), 10, (3, 3, 3), torch.float32, activation="gelu")
    truths = exact(o, slice(0, 300))
    whole = run(o.to(torch.float64), formula.bounded_mlp)
    whole |= {name: whole[name][:300] for name in ("y", "dx")}
    names = [f"d{factor} {p}" for p in ("gate", "up", "down") for factor in "AB"]
    assert list(truths) == list(whole) == ["y", "dx", *names]
    for name, expected in whole.items():
        torch.testing.assert_close(truths[name], expected)
    bare = exact(o.changed(lambda name, t: t, scaling=0.0), slice(0, 300))
    torch.testing.assert_close(bare["y"].float(), FROZEN.build(o).forward(o.x)[:300])


def test_a_block_runs_its_projections_in_order() -> None:
    def projection(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: x * {"gate": 2.0, "up": 3.0, "down": 5.0}[name]

    one = torch.tensor(1.0)
    layers = {name: projection(name) for name in ("gate", "up", "down")}
    assert formula.mlp(one, **layers, activation="relu") == 5 * (2 * 3)
    del layers["gate"]
    assert formula.mlp(-one, **layers, activation="relu") == 0


def test_the_truth_of_a_layer_is_the_formula_s_over_all_rows() -> None:
    """The rows beyond the checked ones leave x Wᵀ out, which no gradient of A, B and b needs."""
    o = layer_operands((2500, 6), 10, 3, torch.float32)
    whole = run(o.to(torch.float64), formula.bounded_linear)
    chosen = torch.tensor([3, 1, 2499])
    truth = exact(o, chosen)
    assert list(truth) == list(whole)
    for name, value in truth.items():
        expected = whole[name][chosen] if name in ("y", "dx") else whole[name]
        torch.testing.assert_close(value, expected)


def test_operands_on_meta_hold_no_data_and_have_the_sizes_of_others() -> None:
    for make in (
        partial(layer_operands, (3, 6), 10, 2, torch.bfloat16),
        partial(block_operands, (3, 6), 10, (2, 0, 2), torch.bfloat16),
    ):
        meta, drawn = make(device="meta"), make()
        assert meta.x.is_meta and all(t.is_meta for t in meta.trained.values())
        found, expected = (
            [(t.shape, t.dtype) for t in (o.x, o.dy, *o.frozen, *o.trained.values())]
            for o in (meta, drawn)
        )
        assert found == expected
