"""What an MLP block keeps for backward, counted, and NOTES.md's tables of blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rivals.cases import LLAMA_1K, Block
from benchmarks.static import floor, notes, recorded, saved
from fastbound.performance.shapes import MODEL_SHAPES, Shape

THIN = 3 * 16 * 2  # bytes a token of S of gate, up and down, bf16 and rank 16


@pytest.fixture(scope="module", params=saved.BLOCKS, ids=str)
def block(request: pytest.FixtureRequest) -> Block:
    return request.param


def test_fused_keeps_x_the_activations_inputs_and_the_thin_pieces(block: Block) -> None:
    thin = THIN if block.gated else THIN * 2 // 3
    assert saved.saved(block, "fused") == (saved.minimum(block) + thin, 0)


def test_recompute_keeps_x_and_the_thin_pieces(block: Block) -> None:
    thin = THIN if block.gated else THIN * 2 // 3
    assert saved.saved(block, "fused, recompute") == (2 * block.K + thin, 0)


def test_llama_keeps_less_than_the_frozen_block_and_far_less_than_peft() -> None:
    ours, bare, peft = (
        saved.saved(LLAMA_1K, column).per_token for column in ("fused", "frozen HF", "peft_fp32 HF")
    )
    assert ours < bare == 6 * LLAMA_1K.N
    assert peft / ours > 2.7


def test_the_formula_keeps_no_more_than_the_models_own_block(block: Block) -> None:
    """So that the timed floor is no easier to reach than the block it stands for."""
    for plain, own in (("frozen", "frozen HF"), ("peft_fp32", "peft_fp32 HF")):
        assert saved.saved(block, plain).per_token <= saved.saved(block, own).per_token


@pytest.mark.parametrize("shape", MODEL_SHAPES[:4], ids=str)
def test_a_layer_keeps_x_and_S_and_pefts_default_keeps_them_wide(shape: Shape) -> None:
    assert saved.saved(shape, "frozen") == (0, 0)
    for name in ("fused", "addmm"):
        assert saved.saved(shape, name) == (2 * (shape.K + 16), 0)
    assert saved.saved(shape, "peft_bf16").per_token == 2 * (shape.K + 16)
    assert saved.saved(shape, "peft_fp32").per_token == 4 * (shape.K + 16)


def test_a_block_without_a_model_is_named() -> None:
    with pytest.raises(ValueError, match="no block of transformers is known for 'other'"):
        saved.hugging_face(Block("other", 8, 16, "silu", gated=True, bias=False))


@pytest.mark.slow
def test_notes_hold_the_saved_bytes_that_the_script_prints(repository: Path) -> None:
    text = (repository / "benchmarks" / "NOTES.md").read_text()
    if saved.versions() not in text:
        pytest.skip(f"NOTES.md counts other versions than {saved.versions()}")
    assert saved.document() in text, "run `python -m benchmarks.static.notes`"


def test_notes_hold_the_floor_of_blocks_that_the_script_prints(repository: Path) -> None:
    pytest.importorskip("triton", reason="the workspaces are those of Triton's tiles")
    text = (repository / "benchmarks" / "NOTES.md").read_text()
    if recorded.versions() not in text:
        pytest.skip(f"NOTES.md records the calls of other versions than {recorded.versions()}")
    assert floor.blocks_document() in text, "run `python -m benchmarks.static.notes`"


def test_one_section_of_the_notes_is_replaced() -> None:
    text = "a\n\n<!-- one: by x -->\n\nold\n\n<!-- end of one -->\n\nz <!-- two: by x -->"
    assert notes.with_section(text, "one", "new\\1") == text.replace("old", "new\\1")
    with pytest.raises(ValueError, match="one section 'two' between its comments, found 0"):
        notes.with_section(text, "two", "new")
