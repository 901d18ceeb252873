"""Default configurations that nobody ever built, and what their own fields say they could have been."""

from __future__ import annotations

import contextlib
import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from transformers import CONFIG_MAPPING, PreTrainedConfig

from autoquant.errors import AutoQuantError
from autoquant.models import repair as repairing
from autoquant.models.build import build_meta
from autoquant.models.repair import Repair, find_repairs, find_source
from autoquant.models.source import ModelSource

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
    source = find_source(model_type, layers=2)
    assert source.repairs == repairs
    assert sum(parameter.numel() for parameter in build_meta(source).module.parameters()) > 0


def test_a_choice_that_is_not_made_is_the_first_of_the_choices() -> None:
    assert find_source("xmod").repairs == {"default_language": "en_XX"}


def test_kinds_of_layers_are_those_that_the_code_names() -> None:
    source = find_source("lfm2_moe")
    assert set(source.repairs["layer_types"]) == {"full_attention", "conv"}
    assert len(source.config.layer_types) == source.config.num_hidden_layers


def test_a_check_that_demands_a_value_gets_it() -> None:
    with contextlib.suppress(Exception):
        CONFIG_MAPPING["gemma4_assistant"]()
        pytest.skip("this transformers' gemma4_assistant demands nothing of its defaults")
    source = find_source("gemma4_assistant")
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
    source = find_source("mixtral")
    assert source.repairs == {}
    assert source.config.to_dict() == CONFIG_MAPPING["mixtral"]().to_dict()


def test_a_configuration_that_was_given_is_never_repaired(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["dots1"](num_hidden_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    source = find_source(str(tmp_path))
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
    assert find_source(model_type).repairs == repairs


ROTARY = {"rope_theta": 10000.0, "rope_type": "default"}
IMAGES = [
    # A number of heads that does not divide the width, in a tower and in a language model that shares its keys.
    ("aya_vision", {"num_attention_heads": 16}),
    (
        "qwen3_omni_moe_thinker",
        {"audio_config.output_dim": 2048, "vision_config.out_hidden_size": 2048, "num_attention_heads": 32},
    ),
    # A mapping and a list that are looked into, and a text whose documentation gives an example (not for images).
    ("chameleon", {"image_token_id": 65535, "vocabulary_map": {}}),
    ("granite4_vision", {"deepstack_layer_map": [], "downsample_rate": "2/4"}),
    # Kinds of layers for which the library has a list of their own.
    (
        "deepseek_ocr2",
        {
            "mlp_layer_types": ["sparse", "dense"] * 16,
            "num_experts_per_tok": 2,
            "vision_config.sam_config.downsample_channels": [512, 4096],
        },
    ),
    # Sections of rotary embeddings: too large for the heads that follow from the width, and not given at all.
    ("glm4v_moe", {"head_dim": 128}),
    ("hunyuan_vl", {"head_dim": 128, "rope_parameters": {**ROTARY, "mrope_section": [16, 16, 16, 16]}}),
    # A window that only other kinds of layers would look through.
    ("step3p7", {"sliding_window": 128000}),
]


@pytest.mark.parametrize(("model_type", "repairs"), IMAGES)
def test_what_a_model_of_several_parts_lacks(model_type: str, repairs: dict[str, object]) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    source = find_source(model_type, kind="image-text-to-text")
    if not source.repairs and Version(version("transformers")) < Version("5.23"):
        pytest.skip(f"{model_type} has other parts by default before transformers 5.23")
    assert source.repairs == repairs
    assert repairing.refusal(source, source.config) is None


class Described(PreTrainedConfig):
    """Fields that nobody set.

    first (`str`, *optional*):
        Has no example.
    second (`str`, *optional*):
        How much, e.g. `"1/4"`.
    """

    first: str | None = None
    second: str | None = None
    third: dict[str, int] | None = None
    fourth: list[int] | None = None


def test_an_empty_value_is_of_the_kind_that_was_missed_and_an_example_is_the_fields_own() -> None:
    config = Described()
    mapping = AttributeError("'NoneType' object has no attribute 'get'")
    listing = TypeError("object of type 'NoneType' has no len()")
    text = AttributeError("'NoneType' object has no attribute 'split'")
    found = {
        error: {name: list(repairing._empty(config, name, error)) for name in ("first", "second", "third", "fourth")}
        for error in (mapping, listing, text)
    }
    assert found[mapping] == {"first": [], "second": ["1/4"], "third": [{}], "fourth": []}
    assert found[listing] == {"first": [], "second": ["1/4"], "third": [], "fourth": [[]]}
    assert found[text] == {"first": [], "second": ["1/4"], "third": [], "fourth": []}
    assert list(repairing._empty(config, "architectures", listing)) == []  # the library's own, no part of a model


class Tower(PreTrainedConfig):
    """A tower of another library.

    architecture (`str`, *optional*, defaults to `"narrow"`):
        What to make.
    sizes (`dict`, *optional*):
        Other sizes, e.g. `sizes={"depth": 3}`
        for `house/wide` to have three blocks.
    """

    model_type = "tower"
    architecture: str = "narrow"
    sizes: dict[str, int] | None = None


def looked_up(config: Any) -> TypeError:
    """What comes of a line of a model's code that looks into a mapping that is not set."""
    with pytest.raises(TypeError) as raised:
        config.vision_config.sizes["embed_dim"]
    return raised.value


def test_a_size_that_is_looked_up_is_what_the_part_calls_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING["llava"]()
    config.vision_config = Tower()
    error = looked_up(config)
    number = next(number for number, part in enumerate(repairing._parts(config)) if part is config.vision_config)
    known = {"wide": 24}
    monkeypatch.setattr(repairing, "_size_called", lambda part, name: known.get(part.architecture))
    (found,) = repairing._looked_up(config, error)
    assert found == Repair(number, "sizes", {"embed_dim": 24}, Repair(number, "architecture", "wide"))
    assert found.changes() == {"architecture": "wide", "sizes": {"embed_dim": 24}}
    repaired = found.apply(config).vision_config
    assert (repaired.architecture, repaired.sizes) == ("wide", {"embed_dim": 24})
    assert (config.vision_config.architecture, config.vision_config.sizes) == ("narrow", None)
    known["narrow"] = 8  # as it is, first
    assert next(iter(repairing._looked_up(config, error))) == Repair(number, "sizes", {"embed_dim": 8})
    assert list(repairing._looked_up(config, ValueError(str(error)))) == []
    config.vision_config.sizes = {"depth": 3}
    assert list(repairing._looked_up(config, error)) == []  # it is set
    config.vision_config = CONFIG_MAPPING["clip_vision_model"]()
    assert list(repairing._looked_up(config, error)) == []  # no such field


def test_a_size_is_read_off_what_is_built() -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=1, hidden_size=64, intermediate_size=96, vocab_size=32)
    assert repairing._size_called(config, "intermediate_size") == 96
    assert repairing._size_called(config, "no_such_size") is None
    assert repairing._size_called(config, "training") is None  # no size
    config.hidden_act = "no_such_function"
    assert repairing._size_called(config, "intermediate_size") is None


def test_a_tower_of_another_library_is_one_that_its_projector_fits() -> None:
    pytest.importorskip("timm")
    source = find_source("perception_lm", kind="image-text-to-text")
    assert source.repairs["model_args"] == {"embed_dim": 768}
    assert build_meta(source).missing == {}


def test_heads_are_left_alone_where_they_make_up_the_width_or_are_not_what_the_error_is_about() -> None:
    error = ValueError("embed_dim must be divisible by num_heads (got `embed_dim`: 100 and `num_heads`: 7)")
    config: Any = CONFIG_MAPPING["llama"](num_hidden_layers=2)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 100, 7, 5
    assert list(repairing._even(config, error)) == []  # the size of a head is set: they need not make it up
    config.head_dim = None
    assert list(repairing._even(config, error)) == [Repair(0, "num_attention_heads", 5)]
    assert list(repairing._even(config, RuntimeError("The size of tensor a (14) must match"))) != []  # 100 // 7
    assert list(repairing._even(config, ValueError("embed_dim must be divisible by num_heads (64 and 5)"))) == []
    assert list(repairing._even(config, ValueError("100 and 7"))) == []
    config.num_attention_heads = 10
    assert list(repairing._even(config, ValueError("must be divisible by: 100 and 10"))) == []
