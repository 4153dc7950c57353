"""Rounds that are interleaved, and bytes that are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastbound.dispatch.timing import at_most, interleaved
from fastbound.performance.memory import saved_bytes


def test_every_round_runs_every_step_once_in_a_new_order() -> None:
    calls: list[tuple[str, int]] = []

    def step(name: str) -> Callable[[int], object]:
        return lambda turn: calls.append((name, turn))

    def stopwatch(run: Callable[[], object]) -> float:
        run()
        return float(len(calls))

    names = "abcdef"
    samples = interleaved({n: step(n) for n in names}, rounds=20, stopwatch=stopwatch)
    rounds = [calls[i : i + len(names)] for i in range(0, len(calls), len(names))]
    assert [turn for _, turn in calls] == list(range(20 * len(names)))
    assert all(sorted(name for name, _ in round_) == list(names) for round_ in rounds)
    assert len({tuple(name for name, _ in round_) for round_ in rounds}) > 15
    for name in names:  # the sample of a round is the one its own call got
        assert samples[name] == [turn + 1.0 for called, turn in calls if called == name]


def test_what_the_allocator_holds_unused_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of a training nearly all of a GPU's memory is held so."""
    held = {"mem_get_info": (0, 80 * 2**30), "memory_reserved": 9 * 2**20}
    for name, value in (held | {"memory_allocated": 2**20}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    device = torch.device("cuda", 0)
    assert at_most(2**30, device) == 2**20
    assert at_most(1000, device) == 960


def test_saved_bytes_counts_storages_once_and_leaves_parameters_out() -> None:
    M, K, N = 8, 16, 4
    weight = nn.Parameter(torch.randn(N, K))
    x = torch.randn(M, K, requires_grad=True)

    def twice() -> Tensor:
        return (x @ weight.T).exp() + x[:, :N] * (x @ weight.T)

    # x (once, though saved three times and once as a view), exp's result, the second product.
    assert saved_bytes(twice, [weight]) == 4 * (M * K + M * N + M * N)
    assert saved_bytes(twice, []) == 4 * (M * K + M * N + M * N + N * K)
