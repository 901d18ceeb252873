from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from quantized import PACKAGED, STATIC_KV, config_of, gpt2, windows
from torch import nn

from autoquant.calibration.observers import Sweep, sweep
from autoquant.checkpoint.quantize import load_float32
from autoquant.config.format import Config, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.models.structure import structure_of
from autoquant.pipeline.quantize import (
    Selected,
    needs_sweep,
    quantize_model_,
    rotate_,
    select,
    smooth_,
    smoothed,
    smoothing_scales,
    swept_weights,
)
from autoquant.pipeline.select import Transforms

TRANSFORMS = ["smooth:0.5+fc_fc:0.7", "fc_fc:0.5+rotation", "smooth:0.85"]


def prepared(transforms: str) -> tuple[nn.Module, Selected, Sweep]:
    """The rotated model and its sweep."""
    model, config = load_float32(PACKAGED), config_of(PACKAGED)
    selected = select(config, structure_of(model), Transforms.parse(transforms))
    rotate_(model, selected)
    return model, selected, sweep(model, swept_weights(config, selected), windows(), cache=True)


@pytest.mark.parametrize("transforms", TRANSFORMS)
@torch.no_grad()
def test_maxima_after_smoothing_are_those_of_a_second_sweep(transforms: str) -> None:
    model, selected, before = prepared(transforms)
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
    assert changed == values_changed == ("fc_fc" in transforms), "the test sees whether anything was smoothed"


def test_values_that_may_be_scaled_by_an_unknown_rule_are_refused() -> None:
    model, selected, before = prepared("fc_fc:0.5")
    scales = smoothing_scales(selected, before, model.get_parameter)
    blind = dataclasses.replace(selected, value_heads=())
    with pytest.raises(AutoQuantError, match=r"v_proj -> o_proj \(layer 0\): may scale the cached values"):
        smoothed(blind, before, scales)
    smoothed(blind, Sweep(before.inputs), scales)  # without a cache nothing is unknown


def test_what_is_selected() -> None:
    config, inventory = config_of(PACKAGED), structure_of(load_float32(PACKAGED))

    def kinds(transforms: str) -> tuple[set[str], set[str], set[float]]:
        resolved = select(config, inventory, Transforms.parse(transforms)).resolved
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
    config, inventory = config_of(PACKAGED), structure_of(load_float32(PACKAGED))
    plain, fc_fc = (select(config, inventory, Transforms.parse(text)) for text in ("rotation", "fc_fc"))
    assert not needs_sweep(config, Strategy.PER_CHANNEL_PER_TOKEN_KV, plain)
    assert needs_sweep(config, Strategy.PER_CHANNEL_PER_TOKEN_KV, fc_fc)
    assert needs_sweep(config, Strategy(STATIC_KV), plain)


@pytest.mark.parametrize("kind", ["packaged", "gpt2"])
@torch.no_grad()
def test_query_key_scales_flatten_the_cached_keys(kind: str, tmp_path: Path) -> None:
    source = PACKAGED if kind == "packaged" else gpt2(tmp_path)
    config, model = enabled(config_of(source)), load_float32(source)
    selected = select(config, structure_of(model), Transforms.parse("fc_fc"))
    logits = model(windows()[0]).logits
    before = sweep(model, swept_weights(config, selected), windows(), cache=True)
    after = smooth_(model, selected, before)
    torch.testing.assert_close(model(windows()[0]).logits, logits, rtol=1e-3, atol=1e-3)
    again = sweep(model, swept_weights(config, selected), windows(), cache=True)
    for layer, maximum in again.cache["key"].items():
        torch.testing.assert_close(after.cache["key"][layer], maximum, rtol=1e-3, atol=1e-5)
        spread = [float(m.max() / m.mean()) for m in (before.cache["key"][layer], maximum)]
        assert spread[1] < min(spread[0], 1.5), "flatter"
    with pytest.raises(AutoQuantError, match=r"layer 0\): no cached keys were observed"):
        smoothing_scales(selected, Sweep(before.inputs), model.get_parameter)


def test_query_key_scales_and_an_online_rotation_of_the_keys_exclude_each_other() -> None:
    config, model = enabled(config_of(PACKAGED), "R3"), load_float32(PACKAGED)
    selected = select(config, structure_of(model), Transforms.parse("fc_fc+rotation"))
    rotate_(model, selected)
    swept = sweep(model, swept_weights(config, selected), windows(), cache=True)
    with pytest.raises(AutoQuantError, match="R3 rotates what the group scales"):
        smoothing_scales(selected, swept, model.get_parameter)


def enabled(config: Config, online: str = "") -> Config:
    """The config with its query-key groups, and one kind of online rotations."""
    groups = tuple(
        edited(group, enable=True) if group.kind == "query_key" else group for group in config.smoothing.groups
    )
    turned = tuple(edited(o, enable=o.kind == online) for o in config.rotation.online)
    smoothing = edited(config.smoothing, groups=groups)
    rotation = edited(config.rotation, online=turned)
    return edited(config, smoothing=smoothing, rotation=rotation)
