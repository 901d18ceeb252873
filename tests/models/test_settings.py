from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from autoquant.models.settings import settings_digest, settings_digests, settings_of


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


@pytest.mark.parametrize("name", ["llama", "deepseek_v4", "gemma3", "qwen3_5", "timm_wrapper"])
def test_a_configuration_is_the_same_in_memory_and_read_from_a_file(name: str, tmp_path: Path) -> None:
    """The first names its type by its class, the second itself; so do their parts."""
    made = AutoConfig.for_model(name)
    made.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert settings_of(read) == settings_of(made)
    assert settings_of(made)["model_type"] == f'"{name}"'
    assert settings_digests(read) == settings_digests(made)


def test_the_type_counts_and_that_of_each_part() -> None:
    plain = AutoConfig.for_model("gemma3")
    assert settings_of(plain)["text_config.model_type"] == '"gemma3_text"'
    other = AutoConfig.for_model("gemma3")
    other.text_config.model_type = "another"
    assert settings_digest(other) != settings_digest(plain)
    assert settings_digests(plain) == (settings_digest(plain),), "no form in which the types of parts are not compared"
    assert len(settings_digests(AutoConfig.for_model("llama"))) == 2


def test_a_set_is_the_same_in_every_process() -> None:
    """The order of a set's text is drawn anew by each."""
    code = (
        "from transformers import AutoConfig; from autoquant.models.settings import settings_digest;"
        "plain = AutoConfig.for_model('llama'); plain.some = {'a', 'bc', 'def', 'ghij', 'k'};"
        "print(settings_digest(plain))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != "", runs[0].stderr
