"""What a first call measures: the pick, the checks before it, and the file that keeps it."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastbound.dispatch import first_use
from fastbound.dispatch.card import Card
from fastbound.dispatch.choices import Choice, Place, pick
from fastbound.dispatch.device import Device
from fastbound.dispatch.first_use import DeviceBench, Store, Trial, Unmeasurable, measured
from fastbound.dispatch.tables import read_table
from tests.support.first_use import Clock
from tests.support.plans import planned

CPU = torch.device("cpu")
ORDER = ("split", "torch", "fused")
PLACE = Place("forward", 1024, 256, 128, 16, "bfloat16")
CARD = Card("sm_90", "a card, 700 W", 132, (("torch", "2.13"), ("triton", "3.9.0")))
CHOICE = Choice(PLACE, "split", {"split": (1.0, 1.1, 1.2)}, {"fused": "no such luck"}, "measured")
seconds = st.lists(st.floats(1e-5, 1e-1), min_size=7, max_size=7)


@given(split=seconds, torch_=seconds, fused=seconds)
def test_the_pick_is_never_slower_than_the_best_without_triton_by_more_than_its_margin(
    split: list[float], torch_: list[float], fused: list[float]
) -> None:
    samples = {"split": split, "torch": torch_, "fused": fused}
    taken = samples[pick(samples, ORDER)]
    assert median(taken) <= 1.02 * min(median(split), median(torch_)) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"split": 1.0, "torch": 1.0, "fused": 1.0}, "split"),
        ({"split": 1.0, "torch": 0.99, "fused": 0.985}, "split"),
        ({"split": 1.0, "torch": 0.95, "fused": 0.96}, "torch"),
        ({"split": 1.0, "torch": 1.2, "fused": 0.96}, "fused"),
        ({"torch": 1.0, "fused": 0.96}, "fused"),
        ({"fused": 1.0}, "fused"),
    ],
)
def test_a_rival_is_taken_where_it_is_clearly_faster(times: dict[str, float], taken: str) -> None:
    samples = {name: [t * (1 + i / 7000) for i in range(7)] for name, t in times.items()}
    assert pick(samples, ORDER) == taken


def test_noise_keeps_the_default() -> None:
    """Faster by a tenth in the middle, and the quartiles overlap."""
    samples = {"split": [0.8, 0.9, 1.0, 1.0, 1.1], "fused": [0.7, 0.8, 0.9, 0.95, 1.2]}
    assert pick(samples, ORDER) == "split"


ROWS = torch.arange(0, 64, 8)


def a_trial(changes: Mapping[str, Callable[[Tensor], Tensor | None]] = {}) -> Trial:
    """Of a product and a sum over its rows, by candidates that are right but for ``changes``."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 32, generator=generator).bfloat16() for _ in range(2))

    def run(strategy: str) -> tuple[Tensor | None, ...]:
        y = x @ w.t()
        changed = changes.get(strategy, lambda y: y)(y)
        return changed, None if changed is None else changed.float().sum(0)

    def truth() -> Mapping[int, Tensor]:
        return {0: x[ROWS].double() @ w.double().t()}

    return Trial(run, truth, ROWS, "torch", CPU, torch.bfloat16, 4096)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """On which the fused path is twice as fast."""
    made = Clock(split=1.0, torch=1.1, fused=0.5)
    monkeypatch.setattr(first_use, "bench", made)
    return made


def test_the_choice_holds_its_times_and_where_they_come_from(clock: Clock) -> None:
    found = measured(PLACE, a_trial(), ORDER, "a card")
    assert found.strategy == "fused" and not found.faults and set(found.seconds) == set(ORDER)
    assert "on a card: fused 500 ms, split 1e+03 ms, torch 1.1e+03 ms" in found.reason


def broken(y: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nRequired: 176144, Hardware limit: 101376")


def unwritten(y: Tensor) -> Tensor:
    y[-8:] = float("nan")
    return y


def summed_wrong(y: Tensor) -> Tensor:
    y[1] += 40  # a row that is not looked at: the sum shows it
    return y


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (broken, "RuntimeError: Required: 176144"),
        (unwritten, "result 0 is not finite"),
        (lambda y: y * 1.02, "result 0 is off by"),
        (summed_wrong, "result 1 is off by"),
        (lambda y: y.new_zeros(3), "IndexError"),
    ],
)
@pytest.mark.parametrize("strategy", ["fused", "split"])
def test_what_fails_or_disagrees_is_not_timed_and_named(
    strategy: str, change: Callable[[Tensor], Tensor], why: str, clock: Clock
) -> None:
    found = measured(PLACE, a_trial({strategy: change}), ORDER, "a card")
    assert why in found.faults[strategy] and strategy not in found.seconds
    assert clock.asked == [tuple(name for name in ORDER if name != strategy)]
    assert found.strategy == ("split" if strategy == "fused" else "fused")
    assert f"{strategy} does not run here ({found.faults[strategy]})" in found.reason


def test_a_result_left_unwritten_is_not_taken_for_the_one_before_it(clock: Clock) -> None:
    """The memory that a candidate is given still holds what another has put there."""
    memory = torch.empty(64, 64, dtype=torch.bfloat16)

    def written(y: Tensor) -> Tensor:
        return memory.copy_(y)

    trial = a_trial({"torch": written, "split": written, "fused": lambda y: memory})
    assert "not finite" in measured(PLACE, trial, ORDER, "a card").faults["fused"]


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        (
            a_trial(dict.fromkeys(ORDER, broken)),
            "a correct result: torch: RuntimeError",
        ),
        (a_trial(dict.fromkeys(ORDER, lambda y: -y)), "no candidate gave a correct result"),
        (replace(a_trial(), truth=lambda: {0: torch.zeros(8, 64)}), "were zero or not finite"),
        (replace(a_trial(), truth=lambda: {0: torch.full((8, 64), torch.nan)}), "not finite"),
    ],
    ids=["none runs", "none is right", "zeros", "nan"],
)
def test_what_cannot_be_judged_is_not_measured(trial: Trial, said: str, clock: Clock) -> None:
    with pytest.raises(Unmeasurable, match=said):
        measured(PLACE, trial, ORDER, "a card")
    assert not clock.asked


def test_running_out_of_memory_is_no_fault_of_a_candidate(clock: Clock) -> None:
    def hungry(y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(Unmeasurable, match="memory ran out"):
        measured(PLACE, a_trial({"fused": hungry}), ORDER, "a card")


class TestWhatStandsInTheWayOnAGpu:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = type("Properties", (), {"L2_cache_size": 50 * 2**20})
        for name, value in {
            "is_current_stream_capturing": lambda: False,
            "mem_get_info": lambda device: (600 * 2**20, 80 * 2**30),
            "memory_reserved": lambda device: 300 * 2**20,
            "memory_allocated": lambda device: 100 * 2**20,
            "get_device_properties": lambda device: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def test_a_capture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench, device = DeviceBench(), torch.device("cuda", 0)
        assert bench.obstacle(device, 0) is None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert bench.obstacle(device, 0) == "a CUDA graph was being captured"

    def test_too_little_memory(self) -> None:
        """800 MiB are free, what PyTorch keeps for later among them; the cold cache takes 200."""
        bench, device = DeviceBench(), torch.device("cuda", 0)
        assert bench.obstacle(device, 600 * 2**20) is None
        assert bench.obstacle(device, 601 * 2**20) == "801 MiB were needed and 800 MiB were free"


@pytest.mark.parametrize(
    ("M", "candidates"),
    [
        (511, ()),
        (512, ("split", "torch", "fused")),
        (513, ("split", "torch")),  # one row begins another wave
        (1024, ("split", "torch", "fused")),
        (1025, ("split", "torch")),
    ],
)
def test_rows_are_counted_as_they_are(M: int, candidates: tuple[str, ...]) -> None:
    chosen = planned(Device("sm_80", 4), M, 256, 256, 16, torch.bfloat16)
    assert chosen.candidates == candidates and chosen.strategy == "split"


@pytest.mark.parametrize(
    ("change", "candidates", "said"),
    [
        ({"layout": "strided"}, ("split", "torch"), "strided operands"),
        ({"over_base": True}, ("split", "torch"), "over a base"),
        ({"dtype": torch.float32}, ("split", "torch"), "fp32"),
        ({"part": "backward", "K": 320}, ("split", "torch"), "would fill 0.62"),
        ({"part": "backward", "N": 320}, ("split", "torch", "fused"), "default tiles"),
        ({"backend": "split"}, (), "was asked for"),
        ({"rank": 65}, (), "rank 65"),
    ],
)
def test_a_triton_gemm_is_tried_where_its_blocks_fill_the_device(
    change: dict[str, Any], candidates: tuple[str, ...], said: str
) -> None:
    asked = {"M": 512, "N": 256, "K": 256, "rank": 16, "dtype": torch.bfloat16, **change}
    chosen = planned(Device("sm_80", 4), **asked)
    assert chosen.candidates == candidates and said in chosen.reason


class TestStore:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "measured" / "sm_90-0.json"

    def test_what_is_kept_is_found_by_the_next_process(self, path: Path) -> None:
        Store(path, CARD).keep(CHOICE)
        assert Store(path, CARD).find(PLACE) == CHOICE
        assert Store(path, CARD).find(replace(PLACE, M=2048)) is None
        assert read_table(path).choices == (CHOICE,)

    def test_what_another_process_wrote_since_is_found_too(self, path: Path) -> None:
        first, second = Store(path, CARD), Store(path, CARD)
        assert first.find(PLACE) is None
        second.keep(CHOICE)
        assert first.find(PLACE) == CHOICE
        other = replace(CHOICE, place=replace(PLACE, M=2048))
        first.keep(other)
        assert list(read_table(path).choices) == [CHOICE, other]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda content: "{", "not JSON"),
            (lambda content: {**content, "format": "9"}, "another version"),
            (lambda content: {**content, "choices": [{}]}, "'place' is missing"),
            (lambda content: {**content, "choices": 3}, "is damaged"),
            (lambda content: {**content, "multiprocessors": 114}, "was measured on a card, 700 W"),
            (lambda content: {**content, "device": "a card, 350 W"}, "on a card, 350 W with"),
            (lambda content: {**content, "versions": {"torch": "2.12"}}, "with other software"),
            (lambda content: spoiled(content, "seconds", {"split": [0, 1, 2]}), "three quartiles"),
            (lambda content: spoiled(content, "strategy", "fused"), "not one of those"),
            (lambda content: spoiled(content, "faults", {"torch": 3}), "is damaged"),
            (lambda content: spoiled(content, "place", {"N": 3}), "a choice's place has"),
        ],
    )
    def test_a_file_that_is_damaged_or_of_another_card_is_said_once_and_left_alone(
        self, change: Callable[[Any], Any], said: str, path: Path
    ) -> None:
        Store(path, CARD).keep(CHOICE)
        changed = change(json.loads(path.read_text()))
        before = changed if isinstance(changed, str) else json.dumps(changed)
        path.write_text(before)
        store = Store(path, CARD)
        with pytest.warns(UserWarning) as warned:
            assert store.find(PLACE) is None
            store.keep(CHOICE)
            store.keep(replace(CHOICE, place=replace(PLACE, M=2048)))
        (message,) = [str(each.message) for each in warned]
        assert said in message and "remove that file" in message
        assert path.read_text() == before and store.find(PLACE) == CHOICE

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        self.refused(tmp_path / "measured" / "sm_90.json", "Permission denied")

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "measured").write_text("")
        self.refused(tmp_path / "measured" / "sm_90.json", "is a file")

    def test_a_disk_that_is_full(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(first_use, "write_table", full)
        self.refused(path, "No space left on device")

    def refused(self, path: Path, said: str) -> None:
        store = Store(path, CARD)
        with pytest.warns(UserWarning, match=f"choices are not saved: .*{said}") as warned:
            store.keep(CHOICE)
            store.keep(replace(CHOICE, place=replace(PLACE, M=2048)))
        assert len(warned) == 1 and store.find(PLACE) == CHOICE

    def test_a_home_that_is_not_known(self) -> None:
        store = Store(None, CARD)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store.keep(CHOICE)
        assert store.find(PLACE) == CHOICE

    @pytest.mark.slow
    def test_two_processes_at_once_lose_nothing(self, path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=keep_many, args=(path, i, 20)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
        found = {(c.place.N, c.place.K) for c in read_table(path).choices}
        assert found == {(i + 1, k + 1) for i in range(2) for k in range(20)}

    def test_a_file_that_another_process_holds_is_written_with_the_next_choice(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastbound.files import writing

        monkeypatch.setattr(first_use, "LOCK_SECONDS", 0.1)
        monkeypatch.setattr("fastbound.files._held", set())  # as another process would have it
        store = Store(path, CARD)
        with writing(path.parent):
            monkeypatch.setattr("fastbound.files._held", set())
            store.keep(CHOICE)
            assert not path.exists()
        other = replace(CHOICE, place=replace(PLACE, M=2048))
        store.keep(other)
        assert list(read_table(path).choices) == [CHOICE, other]


def spoiled(content: Any, name: str, value: object) -> Any:
    content["choices"][0][name] = value
    return content


def keep_many(path: Path, number: int, count: int) -> None:
    store = Store(path, CARD)
    for k in range(count):
        store.keep(replace(CHOICE, place=replace(PLACE, N=number + 1, K=k + 1)))
