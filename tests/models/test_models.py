"""What MODEL may be."""

import json
import sys
from pathlib import Path

import pytest
import torch
from model_types import TYPES as TABLE
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from autoquant.errors import AutoQuantError
from autoquant.models.build import build_meta
from autoquant.models.checkpoint_source import checkpoint_folder
from autoquant.models.reduce import small
from autoquant.models.repair import find_source
from autoquant.models.source import (
    ModelSource,
    call_factory,
    layer_count,
    limit_layers,
    one_line,
    what_failed,
)

TYPES = [*TABLE, "gpt_oss"]
FACTORY = """
import torch
from torch import nn

def positional():
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), (torch.zeros(1, 3, 8),)

def named():
    return nn.Bilinear(2, 3, 4), {"input1": torch.zeros(1, 2), "input2": torch.zeros(1, 3)}

def large():
    return nn.Linear(20_000, 20_000), (torch.zeros(1, 20_000),)

def wrong():
    return nn.Linear(2, 2)

def wrong_inputs():
    return nn.Linear(2, 2), 3

def failing():
    raise RuntimeError("two\\nlines")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_for_tests.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "made_for_tests", raising=False)
    return "made_for_tests"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_config(directory: Path, **changes: object) -> Path:
    config = CONFIG_MAPPING["llama"](hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=3)
    file = directory / "config.json"
    file.write_text(json.dumps({**config.to_dict(), **changes}))
    return file


def test_a_model_type_means_its_default_configuration() -> None:
    source = find_source("llama")
    assert (source.config.model_type, source.config.hidden_size, source.checkpoint) == ("llama", 4096, None)
    assert find_source("llama", layers=2).config.num_hidden_layers == 2
    assert find_source("gpt2", layers=2).config.n_layer == 2
    assert len(find_source("gemma2", layers=3).config.layer_types) == 3


def test_a_directory_or_file_is_read(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    for model in (file, tmp_path):
        source = find_source(str(model))
        assert (source.config.hidden_size, source.checkpoint) == (32, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON: Expecting property name"),
        ("[]", "expected a JSON object with a model_type"),
        ('{"model_type": "lama"}', "model_type: transformers knows no 'lama' (nearest: 'llama')"),
        (
            '{"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}',
            "knows no 'kimi_k2'; its class DeepseekV3ForCausalLM is that of the model_type 'deepseek_v3'",
        ),
        (
            '{"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoConfig": "c.C"}}',
            "(c.py); read it, and give --trust-remote-code to run it; its class DeepseekV3ForCausalLM is that of",
        ),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid configuration: "),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(AutoQuantError) as error:
        find_source(str(file))
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("offline")
def test_an_unknown_name_says_what_was_tried_and_the_nearest_type(tmp_path: Path) -> None:
    for name, nearest in (
        ("lama", " (nearest: 'llama')"),
        ("nobody/qwen-3-moe", " (nearest: 'qwen3_moe')"),
        ("zzzzz", ""),
    ):
        with pytest.raises(AutoQuantError) as error:
            find_source(name)
        assert str(error.value).startswith(f"{name}: not a folder, not a model type{nearest}, and not to be had from")
        assert "\n" not in str(error.value)
    with pytest.raises(AutoQuantError, match="no such file or directory"):
        find_source(str(tmp_path / "nowhere"))
    with pytest.raises(AutoQuantError, match=r"expected a config.json in this directory"):
        find_source(str(tmp_path))
    with pytest.raises(AutoQuantError, match="--layers: expected a positive number, got 0"):
        find_source("llama", layers=0)


def test_a_type_that_is_no_causal_language_model() -> None:
    with pytest.raises(AutoQuantError, match=r"^vit: type 'vit' is no language model: [^\n]*$"):
        build_meta(find_source("vit"))


def test_factories(factories: str) -> None:
    path = list(sys.path)
    model = build_meta(find_source(f"{factories}:positional"))
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    assert (len(model.args), model.kwargs, model.args[0].device.type) == (1, {}, "meta")
    assert not model.module.training
    model = small(find_source(f"{factories}:named"))
    assert model.module(*model.args, **model.kwargs).dtype is torch.float64
    assert sys.path == path


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("made_for_test:positional", "cannot import made_for_test: ModuleNotFoundError"),
        ("made_for_tests:positonal", "has no callable 'positonal' (nearest: 'positional')"),
        ("made_for_tests:wrong", "expected (nn.Module, example_inputs), got Linear"),
        ("made_for_tests:wrong_inputs", "example inputs: expected a tuple or a dict, got int"),
        ("made_for_tests:failing", "RuntimeError: two lines"),
        ("made_for_tests:large", "expected at most 100,000,000 parameters"),
    ],
)
@pytest.mark.usefixtures("factories")
def test_a_bad_factory_is_one_clear_line(factory: str, message: str) -> None:
    with pytest.raises(AutoQuantError) as error:
        small(find_source(factory))
    assert str(error.value).startswith(factory)
    assert message in str(error.value)
    with pytest.raises(AutoQuantError, match="a factory, which alone decides"):
        find_source("made_for_tests:named", layers=2)


def test_build_meta_takes_no_memory_and_changes_nothing() -> None:
    source = find_source("llama")
    before, state = source.config.to_dict(), torch.get_rng_state()
    model = build_meta(source)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "sdpa"
    assert not model.module.training
    assert source.config.to_dict() == before
    small(source)
    assert source.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() is torch.float32
    assert build_meta(find_source("mamba", layers=1)).config._attn_implementation == "eager"


@pytest.mark.parametrize("model_type", TYPES)
def test_small_models_run_in_float64_and_depend_on_every_token(model_type: str) -> None:
    model = small(find_source(model_type))
    parameters = list(model.module.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float64}
    assert sum(parameter.numel() for parameter in parameters) < 2_500_000
    assert all(parameter.numel() < 2 or float(parameter.detach().std()) > 0 for parameter in parameters)
    with torch.no_grad():
        logits = model.module(**model.kwargs).logits
    assert logits.isfinite().all()
    assert 0.3 < float(logits.std()) < 30


def test_a_directory_named_like_a_type_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_source("opt").config.model_type == "opt"
    CONFIG_MAPPING["gpt2"]().save_pretrained(tmp_path / "opt")
    assert find_source("opt").config.model_type == "gpt2"


def test_a_configuration_without_a_layer_count_is_refused_by_layers() -> None:
    with pytest.raises(AutoQuantError, match=r"^--layers: a configuration of type 'blt' has no num_hidden_layers$"):
        find_source("blt", layers=2)


def test_a_type_whose_defaults_are_refused_by_its_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError("widths\ndiffer")

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "contrary", refuse)
    with pytest.raises(
        AutoQuantError, match=r"^contrary: has no valid default configuration: ValueError: widths differ$"
    ):
        find_source("contrary")


def default_of_several_parts() -> PreTrainedConfig:
    try:
        return CONFIG_MAPPING["musicgen"]()
    except Exception as error:  # as of transformers 5.17
        pytest.skip(f"this transformers' musicgen has no default configuration: {one_line(error)}")


def test_of_several_language_models_the_one_that_the_registered_class_takes_is_meant() -> None:
    default_of_several_parts()
    source = find_source("musicgen", layers=2)
    made = build_meta(source)
    assert type(made.module).__name__ == "MusicgenForCausalLM"
    assert made.module.config.model_type == source.config.decoder.model_type
    assert len(made.module.model.decoder.layers) == source.config.decoder.num_hidden_layers == 2
    assert made.kwargs["input_ids"].shape == (source.config.decoder.num_codebooks, 3)  # a row for each codebook


def test_a_configuration_of_several_language_models_is_one_clear_line() -> None:
    config = default_of_several_parts()
    config.audio_encoder = config.decoder
    expected = r"^a configuration of type 'musicgen' holds several language models .*Multiple valid text configs"
    with pytest.raises(AutoQuantError, match=expected):
        build_meta(ModelSource("two decoders", config))


def test_layers_are_counted_by_the_only_field_that_counts_any() -> None:
    config = CONFIG_MAPPING["longcat_flash"](num_layers=5)
    if "num_hidden_layers" in vars(config):
        pytest.skip("this transformers' longcat_flash also has the standard field")
    assert layer_count(config) == 5
    limit_layers(config, 2)
    assert config.num_layers == 2
    assert layer_count(CONFIG_MAPPING["blt"]()) is None  # it has one for each of its parts


def test_layers_that_a_property_counts_are_cut_where_they_are_set() -> None:
    config = CONFIG_MAPPING["prophetnet"]()  # whose num_hidden_layers cannot be set
    config.is_encoder_decoder = False
    limit_layers(config, 2)
    assert (config.num_encoder_layers, config.num_decoder_layers, layer_count(config)) == (2, 2, 2)


def test_layers_that_no_field_sets_are_refused() -> None:
    class Fixed(type(CONFIG_MAPPING["prophetnet"]())):  # type: ignore[misc]  # a class made at run time
        @property
        def num_hidden_layers(self) -> int:
            return 7

        @num_hidden_layers.setter
        def num_hidden_layers(self, value: int) -> None:
            raise NotImplementedError("seven it is")

    with pytest.raises(AutoQuantError, match=r"^--layers: .*: NotImplementedError: seven it is$"):
        limit_layers(Fixed(), 2)


def test_lists_of_layer_numbers_are_cut_with_the_layers() -> None:
    config = CONFIG_MAPPING["zamba2"]()
    assert config.hybrid_layer_ids == [6, 12, 18, 24, 30, 36, 42, 47, 51]
    limit_layers(config, 20)
    assert config.hybrid_layer_ids == [6, 12, 18]
    limit_layers(config, 5)  # none is left: as they were, as for a model that has none of them
    assert config.hybrid_layer_ids == [6, 12, 18]


def test_a_folder_with_an_adapter_alone_is_named_as_that(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AutoQuantError, match=r"holds an adapter \(LoRA\) and no model; merge it into its base first"):
        find_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "said"), [("llama", "is a model type, which has no weights"), ("a.b:make", "is a factory's, which has no")]
)
def test_what_has_no_weights_is_named_as_that(name: str, said: str) -> None:
    with pytest.raises(AutoQuantError, match=f"{name}: {said}.*name a folder or a hub id"):
        checkpoint_folder(name)


class Turned(nn.Module):
    """DeepSeek's table of angles: whole positions, rates of a float arange, and a complex buffer of both."""

    def __init__(self) -> None:
        super().__init__()
        rates = 1.0 / 100.0 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8)
        angles = torch.outer(torch.arange(6), rates)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))


def test_a_factory_may_mix_integers_and_floats_on_the_meta_device() -> None:
    source = ModelSource("turned", factory=lambda: (Turned(), (torch.arange(3)[None],)))
    made = call_factory(source, torch.device("meta"))
    assert made.module.turns.is_meta and made.module.turns.is_complex() and made.module.turns.shape == (6, 4)
    assert call_factory(source, torch.device("cpu")).module.turns.abs().allclose(torch.ones(6, 4))


def test_packages_that_a_tower_wants_are_named_once() -> None:
    said = (
        "A requires the PIL library but it was not found. A requires the timm library but. B requires the PIL library"
    )
    expected = "it needs PIL and timm: pip install 'autoquant[multimodal]', or these packages"
    assert what_failed(ImportError(said), PreTrainedConfig()) == expected
    assert what_failed(ImportError("no module"), PreTrainedConfig()) == "ImportError: no module"
