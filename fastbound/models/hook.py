"""Makes transformers' save_pretrained keep injected adapters, once transformers is imported.

transformers offers no hook for this, so the method of the class is wrapped. Setting an attribute on
one model would not cover saving a part of it, or a model around it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from fastbound.hook import after_import


def keep_adapters_in_save_pretrained() -> None:
    """Wrap `PreTrainedModel.save_pretrained` in `fastbound.models.saving.save_pretrained`."""
    after_import("transformers.modeling_utils", _wrap)


def _wrap() -> None:
    kind = sys.modules["transformers.modeling_utils"].PreTrainedModel
    plain = kind.save_pretrained

    @functools.wraps(plain)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        saving = importlib.import_module("fastbound.models.saving")
        return saving.save_pretrained(plain, self, *args, **kwargs)

    kind.save_pretrained = save_pretrained
