"""The published codes that define the metrics differ; a convention names whose definition holds."""

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

EPSILON = 1e-10  # what open-unlearning adds to its denominators


def check_convention(convention: str, known: Sequence[str] = TOFU_CONVENTIONS) -> None:
    """Raise `InputError`, with the list, for a convention that is not known."""
    one_of("convention", convention, known)
