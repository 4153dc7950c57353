"""Registers the PEFT method as soon as both fastbound and PEFT are imported, in either order.

PEFT has no entry point for methods of others: a method exists once something has put it into PEFT's
tables. Importing PEFT here would cost seconds and pull in torch: the method waits for its import.
"""

from __future__ import annotations

import importlib

from fastbound.hook import after_import


def register_with_peft() -> None:
    """Register now where PEFT is imported, else when it is."""
    after_import("peft", _register)


def _register() -> None:
    importlib.import_module("fastbound.peft.method")
