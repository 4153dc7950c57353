"""Tile shapes: what a launcher needs to know besides its tensors. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass

DESCRIPTOR_ALIGNMENT = 16  # bytes: of the base address and of every stride but the last
FEW_ROWS = 256  # up to here a kernel cannot fill a GPU, and another launch costs more than it gains


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tall matrix that a program takes at a time; how it is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class GemmTile:
    """The output block, the step along the reduction, and how the GEMM is compiled.

    ``descriptors`` selects the persistent form on tensor descriptors (TMA), where the operands'
    alignment allows it. ``stores`` (1, 2 or 4) is the number of parts, cut by columns, in which it
    stores its output block: the buffer for a part is smaller, which leaves room for a stage.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    descriptors: bool = False
    stores: int = 1

    @property
    def volume(self) -> int:
        """Products of a step."""
        return self.block_m * self.block_n * self.block_k

    def __str__(self) -> str:
        form = "descriptors" if self.descriptors else "pointers"
        form += f", {self.stores} stores" if self.stores > 1 else ""
        shape = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{shape}, {self.warps} warps, {self.stages} stages, {form}"


# Element by element loads, of rows that are no multiple of 16 bytes or of strides that descriptors
# cannot have: neither TMA nor asynchronous copies, and with larger tiles the addresses spill.
ELEMENTWISE = GemmTile(128, 128, 32, 8, 2)
