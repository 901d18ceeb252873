"""Every small graph with its findings, after each claim in them was carried out on random parameters."""

from __future__ import annotations

import functools

from attention_graphs import ATTENTION
from oracle import Outcome, analysed, outcomes, randomised
from residual_graphs import RESIDUAL
from small_graphs import CHANNELS

from autoquant.analyzer.findings import Findings

GRAPHS = {**CHANNELS, **ATTENTION, **RESIDUAL}


@functools.cache
def proof(name: str) -> tuple[Findings, tuple[Outcome, ...]]:
    module, *args = GRAPHS[name]()
    module = randomised(module)
    findings = analysed(module, *args)
    return findings, tuple(outcomes(module, lambda m: m(*args), findings))


def reasons(findings: Findings, what: str) -> list[str]:
    """The blocked inputs, but for those that read an input of the whole graph, which nothing could scale."""
    return [
        f"{b.path}: {b.reason} ({b.operator})"
        for b in findings.blocked
        if b.what == what and (b.operator != "aten.constant" or b.reason.startswith("what"))
    ]
