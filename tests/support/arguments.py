"""Command lines of tests: a base, and options that take the place of its own."""

from __future__ import annotations

from collections.abc import Sequence


def replaced(arguments: Sequence[str], *more: str) -> list[str]:
    """`arguments` without the options that `more` gives, each with its one value, then `more`."""
    given = {each for each in more if each.startswith("--")}
    kept: list[str] = []
    skip = False
    for each in arguments:
        if not skip and each not in given:
            kept.append(each)
        skip = not skip and each in given
    return [*kept, *more]
