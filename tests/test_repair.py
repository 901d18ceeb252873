"""Default configurations that nobody ever built, and what their own fields say they could have been."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from autoquant.errors import AutoQuantError
from autoquant.models import ModelSource, build_meta, resolve
from autoquant.models import repair as repairing
from autoquant.models.repair import Repair, find_repairs

KINDS = [
    # A number is None that the code computes with.
    ("hunyuan_v1_dense", {"head_dim": 128}),
    ("dots1", {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    # A part lacks what the whole has, and clamps to a bound that is None.
    ("dbrx", {"rope_theta": 10000.0, "clip_qkv": 8.0}),
    # One entry for all layers, where one for each kind of layer is looked up.
    ("cohere_compass_text", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
]


@pytest.mark.parametrize(("model_type", "repairs"), KINDS)
def test_a_default_that_cannot_be_built_is_repaired_and_says_so(model_type: str, repairs: dict[str, object]) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    with pytest.raises(AutoQuantError, match="cannot be built"):
        build_meta(ModelSource(model_type, CONFIG_MAPPING[model_type]()))
    source = resolve(model_type, layers=2)
    assert source.repairs == repairs
    assert sum(parameter.numel() for parameter in build_meta(source).module.parameters()) > 0


def test_a_choice_that_is_not_made_is_the_first_of_the_choices() -> None:
    assert resolve("xmod").repairs == {"default_language": "en_XX"}


def test_kinds_of_layers_are_those_that_the_code_names() -> None:
    source = resolve("lfm2_moe")
    assert set(source.repairs["layer_types"]) == {"full_attention", "conv"}
    assert len(source.config.layer_types) == source.config.num_hidden_layers


def test_a_check_that_demands_a_value_gets_it() -> None:
    with contextlib.suppress(Exception):
        CONFIG_MAPPING["gemma4_assistant"]()
        pytest.skip("this transformers' gemma4_assistant demands nothing of its defaults")
    source = resolve("gemma4_assistant")
    assert source.repairs["hidden_size_per_layer_input"] == 0
    assert source.config.text_config.hidden_size_per_layer_input == 0


def test_a_value_that_the_configuration_itself_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Repair(0, "hidden_size", "wide")
    config, proposals = CONFIG_MAPPING["dots1"](), repairing._proposals
    with pytest.raises(Exception, match="hidden_size"):
        refused.apply(config)
    expected = find_repairs(ModelSource("dots1", config))
    monkeypatch.setattr(repairing, "_proposals", lambda *of: itertools.chain([refused], proposals(*of)))
    assert find_repairs(ModelSource("dots1", config)) == expected != ()


def test_what_can_be_built_is_left_alone() -> None:
    source = resolve("mixtral")
    assert source.repairs == {}
    assert source.config.to_dict() == CONFIG_MAPPING["mixtral"]().to_dict()


def test_a_configuration_that_was_given_is_never_repaired(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["dots1"](num_hidden_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    source = resolve(str(tmp_path))
    assert source.repairs == {}
    assert source.config.n_routed_experts is None
    with pytest.raises(AutoQuantError, match=r"cannot be built \(causal-lm\): TypeError"):
        build_meta(source)


def test_where_nothing_helps_the_first_reason_stays() -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=2)
    config.hidden_act = "no_such_function"
    source = ModelSource("odd", config)
    assert find_repairs(source) == ()
    with pytest.raises(AutoQuantError, match="no_such_function"):
        build_meta(source)


@pytest.mark.parametrize(
    ("model_type", "repairs"),
    [
        ("qwen2_5_vl", {"vision_config.out_hidden_size": 8192}),
        ("qwen2_vl", {"vision_config.hidden_size": 8192}),  # beside embed_dim, it is what the tower hands over
        ("voxtral", {"audio_token_id": 131071}),  # nothing said which token stands for sound: the last one
        # The sections of its rotary embedding take up half of a head.
        ("glm4v", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("llava", {}),
    ],
)
def test_what_the_parts_of_a_model_have_in_common(model_type: str, repairs: dict[str, object]) -> None:
    assert resolve(model_type).repairs == repairs
