"""PEFT's patterns: `{end of a layer's name, as a regular expression: value}`, exact names first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value for a layer: that of its whole name, else of the first key that it ends in."""
    if name in patterns:
        return patterns[name]
    return next((value for key, value in patterns.items() if _matches(key, name)), default)


def unmatched(patterns: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """The keys that fit none of the names."""
    names = set(names)
    return [k for k in patterns if k not in names and not any(_matches(k, n) for n in names)]


def _matches(key: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None
