"""Names of layers: comparing two sets of them, and PEFT's patterns over them.

A pattern is `{end of a layer's name, as a regular expression: value}`; exact names take precedence.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from fastbound.errors import InputError

T = TypeVar("T")

# The child's name in wrappers around a part of a model: torch.compile of a layer, FSDP1, and
# torch's checkpoint_wrapper (accelerate's `fsdp_activation_checkpointing`).
COMPILED_OR_FSDP = frozenset({"_orig_mod", "_fsdp_wrapped_module"})
SHELLS = COMPILED_OR_FSDP | {"_checkpoint_wrapped_module"}


def without_shells(name: str, shells: frozenset[str] = SHELLS) -> str:
    """The name that the module has in the model without wrappers around its parts."""
    return ".".join(part for part in name.split(".") if part not in shells)


def kind_of(name: str) -> str:
    """The name with "*" for numbers, so that `layers.0.mlp` and `layers.1.mlp` are of one kind."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def lookup(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value for a layer: by its whole name, or else by the first key that its name ends in."""
    if name in patterns:
        return patterns[name]
    return next((value for key, value in patterns.items() if _matches(key, name)), default)


def unmatched(patterns: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """The keys that match none of the names."""
    names = set(names)
    return [k for k in patterns if k not in names and not any(_matches(k, n) for n in names)]


def exact_targets(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """`target_modules` that makes PEFT, which treats listed names as suffixes, match only these.

    This is the list of names, or a regular expression if another module's name ends in one of them.
    """
    wanted = list(names)
    endings = tuple(f".{name}" for name in wanted)
    all_names = (without_shells(n) for n, _ in model.named_modules(remove_duplicate=False))
    others = (n for n in all_names if n not in set(wanted))
    if any(name.endswith(endings) for name in others):
        return f"^({'|'.join(map(re.escape, wanted))})$"
    return wanted


def _matches(key: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def renamed(names: Iterable[str], saved: Iterable[str]) -> dict[str, str]:
    """Map each layer's name to its name when saved, for models whose names differ in a prefix.

    A saved name maps to itself. Any other name maps to the one saved name that shares the longest
    suffix of whole parts with it. If this is not one to one, every name maps to itself.
    """
    names, saved = list(names), set(saved)
    same = {name: name for name in names}
    if not saved or saved == set(names) or len(saved) != len(names):
        return same
    found = {}
    for name in names:
        lengths = {old: _common_end(name, old) for old in saved}
        longest = max(lengths.values())
        best = [old for old, length in lengths.items() if length == longest]
        if longest == 0 or len(best) > 1:
            return same
        found[name] = best[0]
    return found if len(set(found.values())) == len(names) else same


def _common_end(one: str, other: str) -> int:
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def check_same_names(what: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise InputError, which begins with ``what``, unless both contain the same names."""
    found, wanted = dict.fromkeys(found), dict.fromkeys(wanted)
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing or extra:
        raise InputError(f"{what}: missing {some(missing)}, unexpected {some(extra)}")


def some(names: list[str]) -> str:
    """The first five names, and the number of others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(map(repr, names[:5])) or "none") + more
