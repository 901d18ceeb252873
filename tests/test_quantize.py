from __future__ import annotations

import dataclasses

import pytest
import torch
from quantized import PACKAGED, STATIC_KV, config_of, windows
from torch import nn

from autoquant.config import Strategy
from autoquant.errors import AutoQuantError
from autoquant.executor.inventory import take_inventory
from autoquant.preopt import parse_preopt
from autoquant.quantize import (
    Selected,
    Sweep,
    needs_sweep,
    quantize_model_,
    rotate_,
    select,
    smooth_,
    smoothed,
    smoothing_scales,
    sweep,
    swept_weights,
)
from autoquant.quantize_checkpoint import load_float32

PREOPTS = ["smooth:0.5+fc_fc:0.7", "fc_fc:0.5+rotation", "smooth:0.85"]


def prepared(preopt: str) -> tuple[nn.Module, Selected, Sweep]:
    """The rotated model and its sweep."""
    model, config = load_float32(PACKAGED), config_of(PACKAGED)
    selected = select(config, take_inventory(model), parse_preopt(preopt))
    rotate_(model, selected)
    return model, selected, sweep(model, swept_weights(config, selected), windows(), cache=True)


@pytest.mark.parametrize("preopt", PREOPTS)
@torch.no_grad()
def test_maxima_after_smoothing_are_those_of_a_second_sweep(preopt: str) -> None:
    model, selected, before = prepared(preopt)
    logits = model(windows()[0]).logits
    after = smooth_(model, selected, before)
    torch.testing.assert_close(model(windows()[0]).logits, logits, rtol=1e-3, atol=1e-3)
    again = sweep(model, swept_weights(config_of(PACKAGED), selected), windows(), cache=True)
    assert set(after.inputs) == set(again.inputs)
    for name, maximum in again.inputs.items():
        torch.testing.assert_close(after.inputs[name], maximum, rtol=1e-3, atol=1e-5)
    for kind in ("key", "value"):
        for layer, maximum in again.cache[kind].items():
            torch.testing.assert_close(after.cache[kind][layer], maximum, rtol=1e-3, atol=1e-5)
    smoothed_down = "model.layers.1.mlp.down_proj.weight"
    changed = not torch.allclose(after.inputs[smoothed_down], before.inputs[smoothed_down], rtol=0.1)
    values_changed = not torch.allclose(after.cache["value"][1], before.cache["value"][1], rtol=0.1)
    assert changed == values_changed == ("fc_fc" in preopt), "the test sees whether anything was smoothed"


def test_values_that_may_be_scaled_by_an_unknown_rule_are_refused() -> None:
    model, selected, before = prepared("fc_fc:0.5")
    scales = smoothing_scales(selected, before, model.get_parameter)
    blind = dataclasses.replace(selected, value_heads=())
    with pytest.raises(AutoQuantError, match=r"v_proj -> o_proj \(layer 0\): may scale the cached values"):
        smoothed(blind, before, scales)
    smoothed(blind, Sweep(before.inputs), scales)  # without a cache nothing is unknown


def test_what_is_selected() -> None:
    config, inventory = config_of(PACKAGED), take_inventory(load_float32(PACKAGED))

    def kinds(preopt: str) -> tuple[set[str], set[str], set[float]]:
        resolved = select(config, inventory, parse_preopt(preopt)).resolved
        names = {group.name.rpartition(" -> ")[2] for group in resolved.groups}
        return {space.kind for space in resolved.spaces}, names, {group.alpha for group in resolved.groups}

    fc_fc = {"o_proj", "down_proj"}
    assert kinds("none") == (set(), set(), set())
    assert kinds("fc_fc:0.3+rotation") == ({"R1", "R2"}, fc_fc, {0.3})
    assert kinds("fc_fc+rotation:R1") == ({"R1"}, fc_fc, {config.smoothing.alpha})
    assert kinds("smooth:0.2+rotation")[1] == set(), "the gains went into the rotated readers"
    spaces, names, _ = kinds("smooth:0.2+fc_fc")
    assert not spaces and names > fc_fc and "lm_head" not in names, "the head stays in floating point"


@torch.no_grad()
def test_every_strategy_runs_and_stays_near_the_float_model() -> None:
    reference = load_float32(PACKAGED)(windows()[0]).logits
    for strategy in Strategy:
        model, selected, swept = prepared("fc_fc:0.5+rotation")
        quantize_model_(model, config_of(PACKAGED), strategy, smooth_(model, selected, swept))
        logits = model(windows()[0]).logits
        error = ((logits - reference).square().mean() / reference.var()).sqrt().item()
        assert 1e-3 < error < 0.25, f"{strategy}: {error}"


def test_what_needs_a_sweep() -> None:
    config, inventory = config_of(PACKAGED), take_inventory(load_float32(PACKAGED))
    plain, fc_fc = (select(config, inventory, parse_preopt(text)) for text in ("rotation", "fc_fc"))
    assert not needs_sweep(config, Strategy.PER_CHANNEL_PER_TOKEN_KV, plain)
    assert needs_sweep(config, Strategy.PER_CHANNEL_PER_TOKEN_KV, fc_fc)
    assert needs_sweep(config, Strategy(STATIC_KV), plain)
