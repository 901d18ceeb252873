from __future__ import annotations

from typing import Any

import pytest

from autoquant.config.format import Config, Strategy
from autoquant.errors import AutoQuantError
from autoquant.quantizer.strategies import (
    Granularity,
    Scheme,
    kv_granularity,
    needs_calibration,
    plan_linears,
    scheme_of,
)

STATIC, DYNAMIC, TOKEN = Granularity.TENSOR_STATIC, Granularity.TENSOR_DYNAMIC, Granularity.TOKEN_DYNAMIC


def test_the_eight_names_mean_what_they_say() -> None:
    assert {strategy: scheme_of(strategy) for strategy in Strategy} == {
        Strategy.PER_TENSOR_STATIC: Scheme(False, STATIC, None),
        Strategy.PER_CHANNEL_STATIC: Scheme(True, STATIC, None),
        Strategy.PER_CHANNEL_DYNAMIC: Scheme(True, DYNAMIC, None),
        Strategy.PER_CHANNEL_PER_TOKEN: Scheme(True, TOKEN, None),
        Strategy.PER_TENSOR_STATIC_KV: Scheme(False, STATIC, STATIC),
        Strategy.PER_CHANNEL_STATIC_KV: Scheme(True, STATIC, STATIC),
        Strategy.PER_CHANNEL_DYNAMIC_KV: Scheme(True, DYNAMIC, DYNAMIC),
        Strategy.PER_CHANNEL_PER_TOKEN_KV: Scheme(True, TOKEN, TOKEN),
    }


def with_quantization(config: Config, **section: Any) -> Config:
    return Config.model_validate(config.model_dump(by_alias=True) | {"quantization": section}, strict=False)


def test_excluded_linears_and_overridden_layers(example_config: Config) -> None:
    planned = plan_linears(example_config)  # head excluded, out of layer 3 in floating point
    assert [linear.path for linear in planned] == [
        *(f"net.{layer}.qkv" for layer in range(4)),
        *(f"net.{layer}.out" for layer in range(3)),
    ]
    first = planned[0]
    assert (first.weight, first.bias) == ("net.0.qkv.weight", "net.0.qkv.bias")
    assert (first.in_features, first.out_features, first.in_dim, first.stack) == (8, 12, 1, None)
    assert first.scheme == scheme_of(Strategy.PER_CHANNEL_PER_TOKEN)


def test_the_last_override_wins_and_a_single_layer_can_be_named(example_config: Config) -> None:
    config = with_quantization(
        example_config,
        strategy=Strategy.PER_CHANNEL_STATIC_KV,
        exclude=["net.2.out", "head"],
        overrides=[
            {"path": "net.{layer}.qkv", "strategy": None},
            {"path": "net.{layer}.qkv", "layers": "0-2:2", "strategy": Strategy.PER_CHANNEL_DYNAMIC},
            {"path": "net.2.qkv", "strategy": Strategy.PER_TENSOR_STATIC},
        ],
    )
    planned = {linear.path: linear.scheme for linear in plan_linears(config)}
    static = scheme_of(Strategy.PER_CHANNEL_STATIC_KV)
    assert planned == {
        "net.0.qkv": scheme_of(Strategy.PER_CHANNEL_DYNAMIC),
        "net.2.qkv": scheme_of(Strategy.PER_TENSOR_STATIC),
        "net.0.out": static,
        "net.1.out": static,
        "net.3.out": static,
    }
    assert kv_granularity(config) is STATIC
    assert kv_granularity(config, Strategy.PER_CHANNEL_STATIC) is None


def test_another_strategy_replaces_the_default_but_not_overrides(example_config: Config) -> None:
    planned = plan_linears(example_config, Strategy.PER_TENSOR_STATIC)
    assert {linear.scheme for linear in planned} == {scheme_of(Strategy.PER_TENSOR_STATIC)}
    assert "net.3.out" not in {linear.path for linear in planned}


def test_an_unknown_path_is_named_with_the_nearest(example_config: Config) -> None:
    config = with_quantization(example_config, exclude=["net.{layer}.quv"])
    with pytest.raises(
        AutoQuantError, match=r"exclude: no linear 'net.\{layer\}.quv'; did you mean 'net.\{layer\}.qkv'"
    ):
        plan_linears(config)
    config = with_quantization(example_config, overrides=[{"path": "hea", "strategy": None}])
    with pytest.raises(AutoQuantError, match=r"overrides: no linear 'hea'; did you mean 'head'"):
        plan_linears(config)


def test_only_static_scales_need_calibration(example_config: Config) -> None:
    def needs(strategy: Strategy) -> bool:
        return needs_calibration(plan_linears(example_config, strategy), kv_granularity(example_config, strategy))

    assert [strategy for strategy in Strategy if needs(strategy)] == [
        Strategy.PER_TENSOR_STATIC,
        Strategy.PER_CHANNEL_STATIC,
        Strategy.PER_TENSOR_STATIC_KV,
        Strategy.PER_CHANNEL_STATIC_KV,
    ]
