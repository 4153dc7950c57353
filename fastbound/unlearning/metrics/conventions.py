"""Conventions: published codes define the metrics differently; choose whose to use."""

from __future__ import annotations

from collections.abc import Sequence

from fastbound.errors import one_of

OPEN_UNLEARNING = "open-unlearning"
TOFU = "tofu"
TOFU_PAPER = "tofu-paper"
MUSE = "muse"

# Truth ratio, forget quality, model utility.
TOFU_CONVENTIONS = (OPEN_UNLEARNING, TOFU, TOFU_PAPER)
# Verbatim and knowledge memorisation, Min-K %, PrivLeak.
MUSE_CONVENTIONS = (OPEN_UNLEARNING, MUSE)

EPSILON = 1e-10  # added to denominators by open-unlearning


def check_convention(convention: str, known: Sequence[str] = TOFU_CONVENTIONS) -> None:
    """Raise `InputError`, which lists the known ones, for an unknown convention."""
    one_of("convention", convention, known)
