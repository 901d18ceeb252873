"""What MODEL may be, and small models of the same structure."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_types import TYPES as TABLE
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from autoquant.capture.routes import capture, module_path
from autoquant.errors import AutoQuantError
from autoquant.models import reduce as reduction
from autoquant.models import sizes as model_sizes
from autoquant.models.build import build_meta
from autoquant.models.checkpoint_source import checkpoint_folder
from autoquant.models.reduce import float64_throughout, grouped_experts, layer_kinds, randomise_, small
from autoquant.models.repair import find_source
from autoquant.models.source import (
    LoadedModel,
    ModelSource,
    call_factory,
    layer_count,
    limit_depth,
    limit_layers,
    one_line,
    what_failed,
)

TYPES = [*TABLE, "gpt_oss"]
# Copies: where layouts and types allow it, they do not appear.
COPIES = {"contiguous", "clone", "_to_copy", "to"}
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
        assert str(error.value).startswith(
            f"{name}: not a directory, not a model type{nearest}, and not to be had from"
        )
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


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "deepseek_v3", "falcon", "mamba"])
def test_small_models_have_the_graph_of_the_large_one(model_type: str) -> None:
    little = small(find_source(model_type))
    large = build_meta(find_source(model_type, layers=little.config.num_hidden_layers))

    def operators(model: LoadedModel) -> Counter[tuple[str, str]]:
        inputs = {name: tokens[:1, :3] for name, tokens in model.kwargs.items()}
        with grouped_experts(model):
            graph = capture(model.module, (), inputs, "export").subgraphs[0].graph.graph
        calls = [node for node in graph.nodes if node.op == "call_function"]
        return Counter(
            (name, module_path(node)) for node in calls if (name := node.target.__name__).split(".")[0] not in COPIES
        )

    assert operators(little) == operators(large)


def test_reduced_sizes_keep_their_relations() -> None:
    config = small(find_source("qwen3_moe")).config
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert (config.num_experts_per_tok, config.num_local_experts) == (2, 8)
    config = small(find_source("gemma")).config
    assert config.hidden_size != config.num_attention_heads * config.head_dim
    config = small(find_source("bamba")).config
    assert config.mamba_n_heads * config.mamba_d_head == config.mamba_expand * config.hidden_size
    sizes = reduction.reductions(find_source("zamba2").config)
    assert sizes["n_mamba_heads"] * sizes["mamba_headdim"] == 2 * sizes["hidden_size"]
    config = small(find_source("deepseek_v3")).config
    assert config.qk_head_dim == config.qk_nope_head_dim + config.qk_rope_head_dim


def test_windows_that_become_one_token_are_short_in_what_is_traced_and_proved() -> None:
    """With three tokens a window of four is never full, and what reads it would not be in the graph."""
    source = find_source("deepseek_v4")
    assert model_sizes.shorter_windows(source.config) == {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 2}
    }
    loaded = build_meta(source)
    assert loaded.short is not None
    assert loaded.kwargs["input_ids"].shape == (1, 5)
    names = ["model.layers.0.self_attn.compressor.position_bias", "model.layers.0.self_attn.compressor.kv_proj.weight"]
    assert [tuple(loaded.module.get_parameter(name).shape) for name in names] == [(128, 512), (512, 4096)]
    assert [tuple(loaded.short.get_parameter(name).shape) for name in names] == [(2, 512), (512, 4096)]
    assert small(source).config.compress_rates["heavily_compressed_attention"] == 2
    assert small(source).config.index_topk == 2  # of four windows: what chooses them counts
    assert build_meta(find_source("llama")).short is None


def test_a_window_is_a_number_or_one_for_each_kind_of_layer() -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=2)
    config.compress_ratio, config.kv_compress_stride, config.compress_ratios = 16, 2, [4, 128]
    assert model_sizes.shorter_windows(config) == {"compress_ratio": 2}  # of a list each layer's kind may be told


def test_queries_still_share_keys_where_a_layer_has_twice_as_many() -> None:
    def heads(queries: int, keys: int) -> tuple[int, int]:
        changes = reduction.reductions(CONFIG_MAPPING["llama"](num_attention_heads=queries, num_key_value_heads=keys))
        return changes["num_attention_heads"], changes["num_key_value_heads"]

    assert heads(64, 4) == (8, 2)
    assert heads(32, 4) == (4, 2)  # no more than eight queries each: the smallest that is grouped
    assert "num_key_value_heads" not in reduction.reductions(CONFIG_MAPPING["llama"](num_key_value_heads=1))
    model = small(find_source("mimo_v2_flash"))
    attention = [layer.self_attn for layer in model.module.model.layers]
    assert {part.num_key_value_groups for part in attention} == {4, 2}  # of two kinds of layers, neither is 1


def test_every_kind_of_layer_stays() -> None:
    model = small(find_source("gemma3_text"))
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    model = small(find_source("deepseek_v3"))  # three dense layers, then experts
    assert layer_kinds(model.module, model.config) == [0, 0, 0, 3]
    model = build_meta(find_source("gemma2", layers=4))
    assert layer_kinds(model.module, model.config) == [0, 1, 0, 1]
    model = build_meta(find_source("qwen3_next", layers=8))  # every fourth layer attends, and numbers itself
    assert layer_kinds(model.module, model.config) == [0, 0, 0, 3, 0, 0, 0, 3]


def test_two_layers_of_every_kind_stay_where_they_are_asked_for() -> None:
    assert small(find_source("deepseek_v3"), each=2).config.num_hidden_layers == 5
    kinds = [0, 0, 2, 0, 0, 0, 2, 0, 2]
    assert [reduction._shown(kinds, each) for each in (1, 2, 3, 4)] == [3, 7, 9, 9]
    assert reduction._shown([0, 1, 0, 0], 2) == 3  # of the second kind there is one
    assert reduction._shown([], 2) == 0


def test_a_tower_keeps_every_kind_of_its_layers() -> None:
    def depth(kinds: list[str] | list[int]) -> int:
        tower = PreTrainedConfig(hidden_size=256, num_hidden_layers=len(kinds), kinds=kinds)
        text = CONFIG_MAPPING["llama"]()
        config = CONFIG_MAPPING["llava"](text_config=text)
        config.vision_config = tower
        return reduction.reductions(config)["vision_config.num_hidden_layers"]

    assert depth(["conv", "conv", "full_attention", "conv", "full_attention"]) == 3
    assert depth(["conv"] * 5) == 2
    assert depth([8, 16, 32, 64, 128]) == 2  # sizes, which are no kinds


def test_a_codebook_and_a_stack_of_convolutions_become_no_larger() -> None:
    codebook = PreTrainedConfig(embed_dim=8, latent_channels=256, base_channels=128, projection_dim=2048)
    changes = reduction.reductions(codebook)
    assert changes == {"embed_dim": 8, "latent_channels": 16, "base_channels": 32, "projection_dim": 64}
    few = reduction.reductions(PreTrainedConfig(embed_dim=8, base_channels=16))
    assert few == {"embed_dim": 8, "base_channels": 16}  # no more than there were
    convolutions = PreTrainedConfig(hidden_size=64, num_filters=32, kernel_size=7)
    assert reduction.reductions(convolutions) == {"hidden_size": 64, "num_filters": 8}


def test_experts_are_set_behind_an_outer_model_that_has_none() -> None:
    text = CONFIG_MAPPING["mixtral"](num_hidden_layers=1)
    source = ModelSource("outer", CONFIG_MAPPING["llava"](text_config=text), kind="image-text-to-text")
    model = reduction.build_module(source, source.config, torch.device("meta"), torch.float32)
    inner = model.model.language_model

    def chosen() -> str:
        return str(inner.get_experts_implementation()[""])

    default = chosen()
    model.set_experts_implementation(None)
    assert (default, chosen()) == ("grouped_mm", "eager")  # what the outer model hands on
    loaded = LoadedModel(model, (), config=source.config)
    with reduction.grouped_experts(loaded):
        assert chosen() == "grouped_mm"
    assert chosen() == "eager"


def test_what_cannot_be_reduced_keeps_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # A reduction that is wrong on purpose: seven key heads do not divide four query heads.
    right = reduction.reductions

    def wrong(config: object, *, keep_heads: bool = False) -> dict[str, int]:
        return right(config, keep_heads=keep_heads) | {"num_key_value_heads": 7}

    monkeypatch.setattr(reduction, "reductions", wrong)
    config = small(ModelSource("odd", CONFIG_MAPPING["llama"](num_attention_heads=4, num_key_value_heads=4))).config
    assert config.num_key_value_heads == 4
    assert config.hidden_size < 4096
    monkeypatch.setattr(reduction, "_LARGEST", 10)
    with pytest.raises(AutoQuantError, match=r"^llama: no small model of it can be built: .*more than 10$"):
        small(find_source("llama"))


def test_randomise_is_reproducible_and_leaves_no_constant() -> None:
    def made(seed: int) -> nn.Module:
        module = nn.Sequential(nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 200))
        randomise_(module, seed)
        return module

    state = torch.get_rng_state()
    first, second, other = made(1).state_dict(), made(1).state_dict(), made(2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    norm = first["1.weight"]
    assert 0.5 <= float(norm.min()) < 0.7 < 1.3 < float(norm.max()) <= 1.5
    assert abs(float(first["1.bias"].std()) - 0.3) < 0.1
    assert abs(float(first["2.weight"].std()) * 8 - 1) < 0.05
    assert abs(float(first["0.weight"].std()) - 1) < 0.05
    randomise_(made(1), 1)
    # Building layers above drew from the global generator; randomising did not.
    torch.set_rng_state(state)
    module = nn.Linear(2, 2)
    after = torch.get_rng_state()
    randomise_(module, 0)
    assert torch.equal(torch.get_rng_state(), after)


def test_float64_throughout_takes_the_rounding_out() -> None:
    model = small(find_source("llama"))

    def change() -> float:
        with torch.no_grad():
            before = model.module(**model.kwargs).logits
            attention = model.module.model.layers[0].self_attn
            attention.v_proj.weight.mul_(3)
            attention.o_proj.weight.div_(3)
            after = model.module(**model.kwargs).logits
        return float((after - before).abs().max() / before.abs().max())

    with float64_throughout():
        assert change() < 1e-14
    assert change() < 1e-6


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


def test_a_small_model_that_loses_an_input_is_refused() -> None:
    """Text alone may run where the experts of a tower do not: that would prove less than is claimed."""
    whole = LoadedModel(torch.nn.Identity(), ())
    assert reduction._lost(whole) is None
    error = reduction._lost(replace(whole, missing={"pixel_values": "no kernel", "input_features": "no size"}))
    assert str(error) == "no input_features: no size"


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


def test_a_small_tower_shows_the_first_of_the_layers_that_are_listed_by_number() -> None:
    config = CONFIG_MAPPING["qwen3_vl"]()
    vision = config.vision_config
    assert (vision.depth, [*vision.deepstack_visual_indexes]) == (27, [8, 16, 24])
    assert reduction.reductions(config)["vision_config.depth"] == 9
    limit_depth(vision, "depth", 9)
    assert (vision.depth, [*vision.deepstack_visual_indexes]) == (9, [8])


def test_a_model_that_notes_what_it_did_to_its_weights_is_left_so() -> None:
    class Rescales(nn.Linear):
        rescaled = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.rescaled:
                self.weight.div_(2)
                self.rescaled = True
            return super().forward(x)

    model, x = Rescales(2, 2, bias=False), torch.ones(1, 2)
    half = model.weight.detach().clone() / 2
    for _ in range(2):
        assert reduction.failure_of(LoadedModel(model, (x,), {}, config=CONFIG_MAPPING["llama"]())) is None
    assert model.rescaled and torch.equal(model.weight, half)
