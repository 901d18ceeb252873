"""Results in a terminal: whatever its width, no column is lost."""

from __future__ import annotations

import pytest

from autoquant.evaluation.perplexity import Estimate, Evaluation
from autoquant.report.results import Evaluated

NAME = "/data/models/a-folder-with-a-long-name/int8"


def evaluated() -> Evaluated:
    full = Evaluation(
        1000, 4, Estimate(3.0, 0.01), Estimate(0.02, 0.001), Estimate(0.97, 0.002), Estimate(0.01, 0.0005)
    )
    return Evaluated({NAME: full, "b": full}, {})


@pytest.mark.parametrize("width", [140, 80, 40])
def test_every_figure_of_eval_is_there(width: int) -> None:
    lines = evaluated().lines(width)
    text = "\n".join(lines)
    for cell in (
        NAME,
        "1,000",
        "20.086 ± 0.201",
        "1.01005 ± 0.00051",
        "3.00000 ± 0.01000",
        "0.02000 ± 0.00100",
        "0.97000",
    ):
        assert text.count(cell) == (1 if cell == NAME else 2), cell
    for title in ("tokens", "windows", "perplexity", "perplexity ratio", "nll", "kl", "top1 agreement"):
        assert title in text
    assert all(len(line) <= width or line == NAME for line in lines)


def test_a_paragraph_for_each_model_where_a_table_is_too_wide() -> None:
    lines = evaluated().lines(40)
    assert lines[lines.index("b") :] == [
        "b",
        "  tokens: 1,000",
        "  windows: 4",
        "  perplexity: 20.086 ± 0.201",
        "  perplexity ratio: 1.01005 ± 0.00051",
        "  nll: 3.00000 ± 0.01000",
        "  kl: 0.02000 ± 0.00100",
        "  top1 agreement: 0.97000 ± 0.00200",
    ]
