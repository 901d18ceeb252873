"""What stands between queries and cached keys."""

from __future__ import annotations

from collections.abc import Iterator

from autoquant.config.format import SmoothingKind, edited
from autoquant.quantizer.strategies import scheme_of
from autoquant.searcher.candidates.candidate import Candidate
from autoquant.searcher.candidates.rotation import online_candidates
from autoquant.searcher.judge import Judged, Searcher


def key_cache(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Keys: scales between queries and keys, or a rotation of both (R3)."""
    if scheme_of(searcher.task.strategy).kv_cache is None:
        return
    smoothing = best.config.smoothing
    groups = tuple(
        edited(group, enable=True) if group.kind is SmoothingKind.QUERY_KEY else group for group in smoothing.groups
    )
    if groups != smoothing.groups:
        changed = edited(best.config, smoothing=edited(smoothing, groups=groups))
        yield Candidate("smoothing.groups[query_key].enable", "true", changed)
    yield from online_candidates(best.config, "R3", "a Hadamard transform of queries and keys")
