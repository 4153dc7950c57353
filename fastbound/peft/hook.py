"""Registers the PEFT method as soon as both fastbound and PEFT are imported, in either order.

PEFT has no entry point for third-party methods: a method exists once it has been put into PEFT's
tables. Importing PEFT here would take seconds and import torch, so we wait until someone else does.
"""

from __future__ import annotations

import importlib

from fastbound.hook import after_import


def register_with_peft() -> None:
    """Register now if PEFT is already imported, otherwise right after its import."""
    after_import("peft", _register)


def _register() -> None:
    importlib.import_module("fastbound.peft.method")
