"""Makes save_pretrained of transformers keep injected adapters, and PEFT's refuse to lose them.

Neither offers a hook for this, so the methods of the classes are wrapped once they are imported.
Setting an attribute on one model would not cover saving a part of it, or a model around it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from fastbound.hook import after_import


def keep_adapters_in_save_pretrained() -> None:
    """Wrap both classes' `save_pretrained` in the functions of `fastbound.models.saving`."""
    for module, kind, ours in (
        ("transformers.modeling_utils", "PreTrainedModel", "save_pretrained"),
        ("peft.peft_model", "PeftModel", "save_peft_pretrained"),
    ):
        after_import(module, functools.partial(_wrap, module, kind, ours))


def _wrap(module: str, name: str, ours: str) -> None:
    kind = getattr(sys.modules[module], name)
    plain = kind.save_pretrained

    @functools.wraps(plain)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        saving = importlib.import_module("fastbound.models.saving")
        return getattr(saving, ours)(plain, self, *args, **kwargs)

    kind.save_pretrained = save_pretrained
