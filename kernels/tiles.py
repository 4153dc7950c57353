"""Tile shapes and compiler options, which a launcher needs besides its tensors; needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass

DESCRIPTOR_ALIGNMENT = 16  # bytes, for the base address and for every stride but the last
FEW_ROWS = 256  # up to here a kernel cannot fill a GPU, and a second launch would not pay


@dataclass(frozen=True)
class Tile:
    """The block of a tall matrix that a program takes at a time, and compiler options."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class GemmTile:
    """The GEMM's output block, its step along the reduction, and compiler options.

    ``descriptors`` selects the persistent kernel with tensor descriptors (TMA) if the operands'
    alignment allows it. That kernel stores its output block as ``stores`` (1, 2 or 4) groups of
    columns: the buffer for one group is smaller, which can leave room for another stage.
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
        """The multiplications per step."""
        return self.block_m * self.block_n * self.block_k

    def __str__(self) -> str:
        form = "descriptors" if self.descriptors else "pointers"
        form += f", {self.stores} stores" if self.stores > 1 else ""
        shape = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{shape}, {self.warps} warps, {self.stages} stages, {form}"


# For loads element by element: rows whose size is not a multiple of 16 bytes, or strides that
# descriptors cannot have, allow neither TMA nor asynchronous copies, and in larger tiles the
# addresses spill.
ELEMENTWISE = GemmTile(128, 128, 32, 8, 2)
