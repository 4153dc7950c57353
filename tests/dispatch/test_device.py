"""A GPU is asked what it has; a table answers for those that are not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbound.dispatch import device as devices
from fastbound.dispatch.device import SHARED_LIMIT, Device, compute_capability, describe

CUDA = torch.device("cuda", 0)


def asked(monkeypatch: pytest.MonkeyPatch, hip: str | None = None, **properties: Any) -> Device:
    """What is described of a GPU whose driver answers with these properties."""
    monkeypatch.setattr(torch.version, "hip", hip)
    answer = SimpleNamespace(**properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: answer)
    devices._describe.cache_clear()
    try:
        return describe(CUDA)
    finally:
        devices._describe.cache_clear()


def test_an_nvidia_gpu_says_what_a_block_may_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(
        monkeypatch, major=12, minor=0, multi_processor_count=170,
        shared_memory_per_block=49_152, shared_memory_per_block_optin=101_376,
    )  # fmt: skip
    assert found == Device("sm_120", 170, 101_376) and found.shared_limit == 101_376


def test_an_amd_gpu_has_one_limit_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(
        monkeypatch, hip="6.4", major=9, minor=5, multi_processor_count=256,
        gcnArchName="gfx950:sramecc+:xnack-", shared_memory_per_block=163_840,
    )  # fmt: skip
    assert found == Device("gfx950", 256, 163_840) and found.shared_limit == 163_840


def test_what_a_driver_does_not_say_the_table_does(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(
        monkeypatch, hip="6.2", major=9, minor=4, multi_processor_count=304, gcnArchName="gfx942"
    )
    assert found == Device("gfx942", 304) and found.shared_limit == SHARED_LIMIT["gfx942"]


@pytest.mark.parametrize(
    ("architecture", "limit"),
    [("sm_80", 166_912), ("sm_90", 232_448), ("sm_999", 101_376), ("gfx1201", 65_536), ("cpu", 0)],
)
def test_a_gpu_that_is_not_there_has_what_is_known_of_it_or_the_least(
    architecture: str, limit: int
) -> None:
    assert Device(architecture).shared_limit == limit


def test_matrix_units_and_descriptors_are_told_from_the_architecture() -> None:
    units = ["sm_80", "sm_86", "sm_90", "sm_120", "gfx908", "gfx90a", "gfx942", "gfx950"]
    units += ["gfx1100", "gfx1151", "gfx1201"]
    none = ["sm_70", "sm_75", "gfx906", "gfx1030", "cpu", "mps", "interpreter"]
    assert [name for name in [*units, *none] if Device(name).has_matrix_units] == units
    assert [name for name in units if Device(name).has_descriptors] == ["sm_90", "sm_120"]
    assert [compute_capability(name) for name in ("sm_86", "sm_120", "gfx942")] == [86, 120, 0]
