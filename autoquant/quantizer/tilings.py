"""Into which tiles an int8 product on a GPU can be cut, by its number of rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """Extents of a tile in T, O and I, warps and pipeline stages of a program, and into how many parts I is split.

    ``swap``: the weight is the left factor. ``tma``: tiles come through Hopper's copy engine. ``group``: rows of tiles
    that are gone through together. ``chunks``: x is taken in so many, one quantized while another is multiplied.
    ``rows`` = 1 is the single kernel for one row; its ``depth`` counts words of four. ``specialized``: the kernel for
    Hopper alone whose warps fetch or multiply, in so many ``programs`` (None: one for each processor of the card).
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    split: int = 1
    swap: bool = False
    tma: bool = False
    group: int = 8
    chunks: int = 1
    specialized: bool = False
    programs: int | None = None


ONE_ROW = (Tiling(1, 8, 256, 4, 3), Tiling(1, 16, 256, 4, 1), Tiling(1, 8, 256, 4, 1))
MEDIUM = (
    Tiling(128, 128, 128, 8, 4, tma=True),
    Tiling(128, 128, 128, 4, 3, tma=True),
    Tiling(128, 64, 256, 4, 4, tma=True),
    Tiling(64, 64, 256, 4, 4, tma=True),
    Tiling(128, 256, 128, 8, 4, tma=True),
    Tiling(128, 128, 128, 4, 6, tma=True, specialized=True),
    Tiling(128, 256, 128, 4, 4, tma=True, specialized=True),
)
LARGE = (
    Tiling(128, 256, 128, 4, 4, tma=True, specialized=True),
    Tiling(256, 128, 128, 4, 4, tma=True, specialized=True),
    Tiling(128, 256, 128, 8, 4, tma=True),
    Tiling(256, 128, 128, 8, 4, tma=True),
)
LARGEST = (
    Tiling(128, 256, 128, 4, 4, tma=True, specialized=True, chunks=4),
    Tiling(256, 128, 128, 4, 4, tma=True, specialized=True, chunks=4),
    Tiling(128, 256, 128, 8, 4, tma=True, chunks=4),
)
"""Beside LARGE, where x in chunks still fills the card."""
OLDER = (Tiling(128, 128, 64, 8, 3), Tiling(64, 64, 64, 4, 3))
"""For cards before Hopper: less shared memory, no tensor descriptors."""


def tilings(rows: int, outputs: int, hopper: bool) -> tuple[Tiling, ...]:
    """Candidates for a product of ``rows`` rows, the one to use unmeasured first."""
    if rows == 1:
        return ONE_ROW
    if rows <= 64:
        tall = max(16, power_of_two(rows))
        parts = (1, 2, 4) if outputs >= 64 * 90 else (4, 2, 1)  # enough programs to keep the memory busy
        return tuple(Tiling(tall, 64, 256, 4, 4 if hopper else 2, split=split, swap=True) for split in parts)
    if not hopper:
        return OLDER
    return MEDIUM if rows <= 768 else LARGE if rows <= 4096 else LARGE + LARGEST


def power_of_two(n: int) -> int:
    """Least power of two of n or more; 0 for 0."""
    return 0 if n == 0 else 1 << (n - 1).bit_length()
