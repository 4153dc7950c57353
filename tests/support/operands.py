"""What the operator's tests share: operands, truth and the measures of error."""

from __future__ import annotations

from fastbound.truth.operands import (
    GRADIENTS,
    Operands,
    assert_as_exact_as_the_formula,
    operands,
    run,
)

__all__ = ["GRADIENTS", "Operands", "assert_as_exact_as_the_formula", "operands", "run"]
