"""How weights are rounded, and what biases take up of the error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from autoquant.config.format import Rounding, edited
from autoquant.quantizer.strategies import plan_linears
from autoquant.searcher.candidates.candidate import Candidate, with_overrides, with_quantization
from autoquant.searcher.judge import ANYWHERE, Judged, Searcher


def rounding(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Clipping and rounding of weights."""
    now = best.config.quantization.weights
    choices: tuple[tuple[Rounding, Literal["absmax", "mse"]], ...] = (
        (Rounding.NEAREST, "mse"),
        (Rounding.GPTQ, "absmax"),
        (Rounding.QRONOS, "absmax"),
        (Rounding.QRONOS, "mse"),
    )
    for rounding, clip in choices:
        changed = edited(now, rounding=rounding, clip=clip)
        if changed != now:
            yield Candidate(
                "quantization.weights",
                f"rounding {rounding.value}, clip {clip}",
                with_quantization(best.config, weights=changed),
            )


def bias(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """The mean output error out of the biases: of all linears, and of those that have one."""
    task, now, where = searcher.task, best.config.quantization.weights, "quantization.weights.bias_correction"
    if now.bias_correction:
        return
    changed = edited(now, bias_correction=True)
    config = with_quantization(best.config, weights=changed)
    yield Candidate(where, "true", config, "a bias for linears that have none")
    planned = plan_linears(best.config, task.strategy)
    biased = [linear for linear in planned if linear.bias is not None and linear.stack is None]
    if task.served is not ANYWHERE and 0 < len(biased) < len(planned):
        config = with_overrides(best.config, biased, weights=changed)
        yield Candidate(where, f"true for the {len(biased)} linears that have a bias", config)
