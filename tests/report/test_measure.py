from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autoquant import api
from autoquant.config.format import Config, Strategy
from autoquant.report import measure as module
from autoquant.report.measure import Inputs, _int8_input, _int8_weight, seen_linears

MODEL = Path(__file__).parents[2] / "autoquant" / "data" / "wikinano1m"
PER_TOKEN, STATIC = Strategy.PER_CHANNEL_PER_TOKEN, Strategy.PER_TENSOR_STATIC


def test_the_worst_channel_and_token_against_the_median() -> None:
    x_TI = torch.tensor([[1.0, -2.0, 1.0], [1.0, 8.0, 4.0], [1.0, 2.0, 1.0]])
    found = Inputs(x_TI.abs().amax(0), [x_TI.abs().amax(1)], [float(x_TI.abs().median())])
    assert [found.measure(name) for name in module.MEASURES] == [2.0, 4.0, 8.0, 1.0]


def test_signal_to_noise_in_decibels() -> None:
    found = Inputs(torch.ones(1), signal=1000.0, noise={PER_TOKEN: 1.0})
    assert found.decibels(PER_TOKEN) == pytest.approx(30)


def test_int8_of_inputs_and_weights() -> None:
    x_TI = torch.tensor([[127.0, 1.4], [1.27, 0.014]])
    assert _int8_input(x_TI, PER_TOKEN, torch.tensor(127.0)).tolist() == [[127.0, 1.0], pytest.approx([1.27, 0.01])]
    assert _int8_input(x_TI, STATIC, torch.tensor(127.0)).tolist() == [[127.0, 1.0], [1.0, 0.0]]
    assert _int8_weight(x_TI, STATIC).tolist() == [[127.0, 1.0], [1.0, 0.0]]


def test_routers_and_heads_are_not_looked_at(example_config: Config) -> None:
    seen = list(seen_linears(example_config))
    assert {one.layer for one in seen} == {0, 1, 2, 3} and all("{layer}" not in one.path for one in seen)
    assert {one.row for one in seen} == {one.path.split(".", 2)[2] for one in seen}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    taken: dict[str, Any] = {}

    def keep(config: Config, found: dict[str, Any], compared: None) -> str:
        taken.update(found)
        return ""

    folder = tmp_path_factory.mktemp("measured")
    config = api.analyze(str(MODEL)).config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoquant.report.page.page", keep)
        patch.setattr(module, "COSTLY", 2)
        patch.setattr("autoquant.api.pages.HELD_OUT", 2)
        api.write_page(config, folder / "o.html", model=MODEL, sequences=2, length=64)
    return taken


def test_the_sink_is_seen_and_goes(measured: dict[str, Any]) -> None:
    assert measured["text"][0] == "<s>" and measured["layers"] == [0, 1, 2, 3, 4]
    row = measured["linears"].index("self_attn.q_proj")
    before, after = (measured[side]["channel"][row] for side in ("before", "after"))
    assert min(before) > 2 * max(after)  # the rotation spreads what one channel had


def test_per_token_is_quieter_than_static(measured: dict[str, Any]) -> None:
    row = measured["linears"].index("self_attn.q_proj")
    quiet, loud = (measured["snr"][one.value]["before"][row] for one in (PER_TOKEN, Strategy.PER_CHANNEL_STATIC))
    assert all(a > b for a, b in zip(quiet, loud, strict=True))
    assert set(measured["snr"]) == {one.value for one in module.LINEAR_STRATEGIES} and len(measured["snr"]) == 4


def test_what_single_linears_cost(measured: dict[str, Any]) -> None:
    costs = [one["percent"] for one in measured["cost"]]
    assert len(costs) == 2 and costs == sorted(costs, reverse=True) and all(abs(cost) < 20 for cost in costs)
