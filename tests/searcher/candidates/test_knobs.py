from __future__ import annotations

from dataclasses import replace

import pytest
from quantized import PACKAGED, STATIC, config_of, search_task

from autoquant.config.format import Strategy
from autoquant.searcher.candidates.knobs import KNOBS
from autoquant.searcher.judge import Judged, Searcher


@pytest.mark.parametrize(
    ("name", "strategy", "expected"),
    [
        ("clip", STATIC, ["output", "mse", "percentile"]),
        ("clip", Strategy.PER_CHANNEL_PER_TOKEN, []),
        ("rotation", STATIC, ["false", "false", "1", "2", "3"]),
        ("online", STATIC, ["true"]),
        ("descent", STATIC, ["descent"]),
        ("learned", STATIC, ["learned"]),
        ("cache", STATIC, []),
        ("cache", Strategy.PER_CHANNEL_STATIC_KV, ["true", "true"]),
        ("bias", STATIC, ["true"]),
        ("spikes", STATIC, []),
    ],
)
def test_candidates_of_each_knob(name: str, strategy: Strategy, expected: list[str]) -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(search_task(strategy=strategy), held_out=()), lambda line: None)
    judged = Judged(config, (), (), ())
    found = list(KNOBS[name](searcher, judged))
    assert [candidate.choice for candidate in found] == expected
    assert all(candidate.config != config for candidate in found)


def test_spikes_go_to_the_linears_with_the_largest_error() -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(search_task(per_token=2), held_out=()), lambda line: None)
    errors = {f"model.layers.{i}.mlp.down_proj.weight": error for i, error in enumerate((0.1, 0.4, 0.2))}
    one, two = KNOBS["spikes"](searcher, Judged(config, (), (), (), errors))
    assert [entry.path for entry in one.config.quantization.overrides] == ["model.layers.1.mlp.down_proj"]
    assert [entry.path for entry in two.config.quantization.overrides] == [
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ]
    assert two.config.quantization.overrides[0].strategy is Strategy.PER_CHANNEL_PER_TOKEN
    assert "2 linears" in two.cost


def test_alphas_of_groups_and_layers_are_overrides() -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(search_task(), held_out=()), lambda line: None)
    *uniform, each = KNOBS["alpha"](searcher, Judged(config, (), (), ()))
    assert [candidate.choice for candidate in uniform] == ["0.3", "0.4", "0.6", "0.7", "0.8", "0.9"]
    overrides = {group.name: group.overrides for group in each.config.smoothing.groups if group.overrides}
    assert {name.rpartition(".")[2] for name in overrides} == {"v_proj -> o_proj", "up_proj -> down_proj"}
    assert all([entry.layers for entry in entries] == list("01234") for entries in overrides.values())
    alphas = [entry.alpha for entries in overrides.values() for entry in entries]
    assert all(alpha is not None and 0 <= alpha <= 1 for alpha in alphas)
