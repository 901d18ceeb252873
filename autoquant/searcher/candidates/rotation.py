"""Rotations: whether, which, at inference, learned."""

from __future__ import annotations

from collections.abc import Iterator

from autoquant.config.format import Config, RotationMethod, edited
from autoquant.searcher.candidates.candidate import Candidate, with_rotation
from autoquant.searcher.judge import Judged, Searcher


def rotation(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """No rotation, R1 without R2, other random signs."""
    rotation = best.config.rotation
    if not rotation.spaces:
        return
    yield Candidate("rotation.enable", "false", with_rotation(best.config, enable=False))
    without = tuple(edited(space, enable=False) if space.kind == "R2" else space for space in rotation.spaces)
    if without != rotation.spaces:
        yield Candidate("rotation.spaces[R2].enable", "false", with_rotation(best.config, spaces=without))
    for seed in range(1, 4):
        yield Candidate(
            "rotation.seed", str(rotation.seed + seed), with_rotation(best.config, seed=rotation.seed + seed)
        )


def online(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Online R4: the inputs of down projections are rotated at inference (QuaRot, Ashkboos et al. 2024)."""
    yield from online_candidates(best.config, "R4", "a Hadamard transform before each of these linears")


def online_candidates(config: Config, kind: str, cost: str) -> Iterator[Candidate]:
    """All online rotations of one ``kind``, R3 or R4, where some are left out."""
    old = config.rotation.online
    new = tuple(edited(entry, enable=True) if entry.kind == kind else entry for entry in old)
    if new != old:
        yield Candidate(f"rotation.online[{kind}].enable", "true", with_rotation(config, online=new), cost, online=True)


def learned(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """The residual's rotation, learned (SpinQuant, Liu et al. 2024)."""
    spaces = tuple(
        edited(space, method=RotationMethod.LEARNED) if space.kind == "R1" else space
        for space in best.config.rotation.spaces
    )
    layer_norms = any(
        space.centre or any(read.norm is not None and read.norm.kind == "layer" for read in space.reads)
        for space in spaces
        if space.kind == "R1"
    )
    if best.config.rotation.enable and spaces != best.config.rotation.spaces and not layer_norms:
        yield Candidate("rotation.spaces[R1].method", "learned", with_rotation(best.config, spaces=spaces))
