"""The product form's counted memory and predicted time."""

from __future__ import annotations

import pytest

from benchmarks.static import product_form
from fastbound.performance.shapes import Shape, linear_shapes

pytest.importorskip("triton", reason="the recorded launches are Triton's")
LLAMA = linear_shapes("llama-3-8b")


@pytest.mark.parametrize("shape", LLAMA, ids=str)
def test_no_part_of_the_weights_size_passes_the_workspace(shape: Shape) -> None:
    """64 MiB, where the weight has 112."""
    held = product_form.largest_workspace(shape)
    assert 2 * shape.N * shape.K > 64 * 2**20 > held > 32 * 2**20


def test_from_the_crossover_on_making_the_weight_takes_its_share_at_most() -> None:
    shape, gpu = LLAMA[0], "h200"
    M = product_form.crossover(shape, gpu)
    making, close = product_form.making(shape, gpu), product_form.CLOSE
    assert making <= close * product_form.gemm(shape, M, gpu)
    assert making > close * product_form.gemm(shape, M - 1, gpu)


@pytest.mark.slow
def test_a_training_step_allocates_a_third_of_the_plain_form_at_most() -> None:
    plain = product_form.step_peak(64, fuse_mlp=False, backend="reference")
    assert product_form.step_peak(64) < plain / 3
