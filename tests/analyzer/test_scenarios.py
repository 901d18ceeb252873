"""Small models that tempt to claims which the traced run alone bears out: none is written, what is planted is found.

``AUTOQUANT_SCENARIOS=200 AUTOQUANT_FUZZ_SEED=5000`` runs other and more of them; ``benchmarks/fuzz.py`` counts them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import scenario_check
import torch
from scenario_axes import AXES, experts, lengths
from scenario_check import SHARP, judge, run, springs

from autoquant.analyzer import analyze as analysis

MODELS = int(os.environ.get("AUTOQUANT_SCENARIOS", "1"))
FIRST_SEED = int(os.environ.get("AUTOQUANT_FUZZ_SEED", "0"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("axis", AXES)
def test_what_is_written_holds_in_other_runs_too(axis: str) -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + MODELS):
        judged = run(axis, seed)
        assert judged.failures == (), f"{axis} {seed}"
        assert judged.counts["found"] == judged.counts["planted"]
        assert judged.counts["traps refused"] == judged.counts["traps"]
        assert judged.counts["carried out"] > 0


@pytest.mark.parametrize("axis", AXES)
def test_every_trap_leads_to_a_claim_that_is_false(axis: str) -> None:
    found = [(seed, change) for seed in range(25) for change in springs(AXES[axis](seed))]
    assert len(found) > 5
    assert [seed for seed, change in found if not change > SHARP] == []


@pytest.fixture
def _believing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither a second reading nor a proof."""
    monkeypatch.setattr(analysis, "longer_inputs", lambda loaded: iter(()))
    monkeypatch.setattr(scenario_check, "certify", lambda analyzed, source: analyzed.config)
    yield


@pytest.mark.usefixtures("_believing")
def test_the_judge_sees_what_holds_at_the_traced_length_alone() -> None:
    seed = next(seed for seed in range(50) if any("branch (" in word for word in lengths(seed).words))
    judged = judge(lengths(seed))
    assert judged.counts["traps refused"] < judged.counts["traps"]
    assert judged.counts["wrong"] > 0
    assert any(failure.startswith("trapped") for failure in judged.failures)
    assert any("tokens)" in failure for failure in judged.failures if failure.startswith("wrong"))


def test_the_same_seed_is_the_same_model() -> None:
    one, other = experts(3), experts(3)
    assert one.words == other.words
    assert (one.plants, one.traps) == (other.plants, other.traps)
