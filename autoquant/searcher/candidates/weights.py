"""How weights are rounded, and what biases take up of the error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from autoquant.config.format import Rounding, edited
from autoquant.searcher.candidates.candidate import Candidate, with_quantization
from autoquant.searcher.judge import Judged, Searcher


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
    """The mean output error out of the biases."""
    now = best.config.quantization.weights
    if not now.bias_correction:
        changed = edited(now, bias_correction=True)
        cost = "a bias for linears that have none"
        yield Candidate(
            "quantization.weights.bias_correction", "true", with_quantization(best.config, weights=changed), cost
        )
