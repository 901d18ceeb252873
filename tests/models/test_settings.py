from __future__ import annotations

from transformers import AutoConfig

from autoquant.models.settings import settings_digest, settings_of


def test_what_may_change_a_forward_counts() -> None:
    plain = AutoConfig.for_model("olmo")
    for changes in ({"clip_qkv": 8.0}, {"hidden_act": "relu"}, {"attention_bias": True}, {"eps_of_its_own": 1e-5}):
        assert settings_digest(AutoConfig.for_model("olmo", **changes)) != settings_digest(plain), changes
    for same in ({"bos_token_id": 7}, {"dtype": "bfloat16"}, {"id2label": {0: "a"}}, {"attention_dropout": 0.5}):
        assert settings_digest(AutoConfig.for_model("olmo", **same)) == settings_digest(plain), same


def test_parts_count_and_numbers_are_what_they_are_worth() -> None:
    plain = AutoConfig.for_model("qwen2_5_vl")
    other = AutoConfig.for_model("qwen2_5_vl", vision_config={"window_size": 56})
    apart = settings_of(plain).items() ^ settings_of(other).items()
    assert {name for name, _ in apart} == {"vision_config.window_size"}
    rounded = AutoConfig.for_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000})
    assert settings_digest(rounded) == settings_digest(AutoConfig.for_model("llama"))
    rounded.field_that_is_not_set = None
    assert settings_digest(rounded) == settings_digest(AutoConfig.for_model("llama"))
