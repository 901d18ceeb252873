"""Tokens that every sequence begins with."""

from __future__ import annotations

from collections.abc import Iterator

from autoquant.algorithms.prefix_search import find_prefix
from autoquant.errors import AutoQuantError
from autoquant.quantizer.strategies import plan_linears
from autoquant.searcher.candidates.candidate import Candidate, with_quantization
from autoquant.searcher.judge import Judged, Searcher


def prefix(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Sinks: a prefix in floating point takes their spikes out of every later token (PrefixQuant, CushionCache)."""
    task = searcher.task
    try:
        with searcher.float_model("prefix") as found:
            searcher.progress("prefix: find", 0, 0)
            planned = plan_linears(best.config, task.strategy)
            prefix = find_prefix(found.model, planned, task.bos, task.fit, found.runner, found.through)
    except AutoQuantError as error:  # a model that can have none
        searcher.tell(f"prefix: {error.message}")
        return
    if prefix and prefix != best.config.quantization.prefix:
        cost = "the prefix's keys and values, stored in floating point"
        yield Candidate("quantization.prefix", str(list(prefix)), with_quantization(best.config, prefix=prefix), cost)
