"""A pytest plugin for PEFT's own tests: BoundedConfig is LoraConfig, and no other case runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import peft
import pytest

import fastbound

peft.LoraConfig = fastbound.BoundedConfig


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = (item for item in items if set(_configs(item)) == {fastbound.BoundedConfig})
    items[:] = [item for item in ours if _has_its_options(item)]


def _configs(item: pytest.Item) -> Iterator[type]:
    """The kinds of config among a test's parameters."""
    spec = getattr(item, "callspec", None)
    for value in spec.params.values() if spec else ():
        kind = value if inspect.isclass(value) else type(value)
        if issubclass(kind, peft.PeftConfig):
            yield kind


def _has_its_options(item: pytest.Item) -> bool:
    """Whether it is no case of an option that only LoRA has, which BoundedConfig refuses."""
    spec = getattr(item, "callspec", None)
    for name, value in spec.params.items() if spec else ():
        if name.startswith("config_kwargs"):
            try:
                fastbound.BoundedConfig(**value)
            except (TypeError, ValueError):
                return False
    return True
