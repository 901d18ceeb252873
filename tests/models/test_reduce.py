"""Small models of the same structure: which sizes are reduced, and how."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from autoquant.capture.routes import capture, module_path
from autoquant.errors import AutoQuantError
from autoquant.models import reduce as reduction
from autoquant.models import sizes as model_sizes
from autoquant.models.build import build_meta
from autoquant.models.reduce import float64_throughout, grouped_experts, layer_kinds, randomise_, small
from autoquant.models.repair import find_source
from autoquant.models.source import LoadedModel, ModelSource, limit_depth

# Copies: where layouts and types allow it, they do not appear.
COPIES = {"contiguous", "clone", "_to_copy", "to"}


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


def test_a_width_of_each_layer_is_reduced_like_one_of_all() -> None:
    config = CONFIG_MAPPING["gemma3n_text"](intermediate_size=[4096] * 30 + [3000] * 5)
    changes = reduction.reductions(config)
    assert config.hidden_size == 2048
    wide = changes["hidden_size"]
    assert changes["intermediate_size"] == [2 * wide] * 30 + [3000 * wide // 2048 // 8 * 8] * 5
    assert small(ModelSource("each", config)).module.model.layers[0].mlp.gate_proj.out_features == 2 * wide
    for value in ([4096] * 34, [4096.0] * 35, [4096] * 34 + [1]):  # for other layers, no widths, and one that is off
        config.__dict__["intermediate_size"] = value
        assert "intermediate_size" not in reduction.reductions(config)


def test_a_part_as_wide_as_the_language_model_may_stay_so() -> None:
    config = CONFIG_MAPPING["fun_asr_nano"]()
    assert config.adaptor_config.hidden_size == config.text_config.hidden_size == 1024
    alike, apart = model_sizes.reductions(config, as_wide=True), model_sizes.reductions(config)
    wide = alike["text_config.hidden_size"]
    assert alike["adaptor_config.hidden_size"] == wide != apart["adaptor_config.hidden_size"]
    assert alike["adaptor_config.intermediate_size"] == wide // 4  # as its own check demands
    assert alike["audio_config.hidden_size"] == apart["audio_config.hidden_size"]  # of another width
    llava = CONFIG_MAPPING["llava"]()
    assert model_sizes.reductions(llava, as_wide=True) == model_sizes.reductions(llava)


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


def test_what_a_configuration_computes_of_reduced_fields_is_computed_again() -> None:
    config = CONFIG_MAPPING["dots3_note"]()
    audio = config.audio_config
    assert audio.conv_output_size == audio.downsample_hidden_size * 16  # no argument: of 128 bands
    changes = reduction.reductions(config)
    bands = (changes["audio_config.feature_size"] + 7) // 8
    size = changes["audio_config.downsample_hidden_size"] * bands
    assert reduction._computed(config, changes) == {"audio_config.conv_output_size": size}
    assert next(reduction._fewer(config, changes)) == {**changes, "audio_config.conv_output_size": size}
    audio.conv_output_size = 77  # chosen, and not what the class makes of the others
    assert reduction._computed(config, changes) == {}


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

    def wrong(config: object, **options: bool) -> dict[str, int]:
        return right(config, **options) | {"num_key_value_heads": 7}

    monkeypatch.setattr(reduction, "reductions", wrong)
    config = small(ModelSource("odd", CONFIG_MAPPING["llama"](num_attention_heads=4, num_key_value_heads=4))).config
    assert config.num_key_value_heads == 4
    assert config.hidden_size < 4096
    for bound in ("_LARGEST", "_LARGEST_WHOLE"):
        monkeypatch.setattr(reduction, bound, 10)
    with pytest.raises(AutoQuantError, match=r"^llama: no small model of it can be built: .*more than 10$"):
        small(find_source("llama"))


def test_a_part_that_nothing_makes_smaller_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source("llama")
    changes = reduction.reductions(source.config)
    assert reduction._allowed(source, changes) == reduction._LARGEST
    unknown = changes | {"no.such.part": 1}  # refused later, with its reason
    assert reduction._allowed(source, unknown) == reduction._LARGEST
    least = reduction._size(source, reduction._two_layers(source.config, changes))
    assert 50_000 < least < reduction._LARGEST
    monkeypatch.setattr(reduction, "_LARGEST", 50_000)
    assert reduction._allowed(source, changes) == least + 50_000
    monkeypatch.setattr(reduction, "_LARGEST_WHOLE", least + 7)
    assert reduction._allowed(source, changes) == least + 7


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


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.decay


def test_a_seed_gives_one_small_model() -> None:
    source = ModelSource("drawn", factory=lambda: (Drawn(), (torch.ones(2, 4),)))
    state = torch.get_rng_state()
    first = small(source).module.decay
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(small(source).module.decay, first)
    mamba = find_source("mamba2", layers=1)  # dt_bias is drawn
    first = small(mamba).module.state_dict()
    torch.rand(1)
    second = small(mamba).module.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], held) for name, held in small(mamba, 1).module.state_dict().items())


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


def test_a_small_model_that_loses_an_input_is_refused() -> None:
    """Text alone may run where the experts of a tower do not: that would prove less than is claimed."""
    whole = LoadedModel(torch.nn.Identity(), ())
    assert reduction._lost(whole) is None
    error = reduction._lost(replace(whole, missing={"pixel_values": "no kernel", "input_features": "no size"}))
    assert str(error) == "no input_features: no size"


def test_a_small_tower_shows_the_first_of_the_layers_that_are_listed_by_number() -> None:
    config = CONFIG_MAPPING["qwen3_vl"]()
    vision = config.vision_config
    assert (vision.depth, [*vision.deepstack_visual_indexes]) == (27, [8, 16, 24])
    assert reduction.reductions(config)["vision_config.depth"] == 9
    limit_depth(vision, "depth", 9)
    assert (vision.depth, [*vision.deepstack_visual_indexes]) == (9, [8])


@pytest.mark.parametrize(("number", "depth"), [(6, 8), (25, 27), (26, 27), (27, 2), (-1, 2), (0, 2)])
def test_a_small_tower_goes_on_behind_the_layer_that_a_field_numbers(number: int, depth: int) -> None:
    """What stands behind that layer alone would else be claimed and not be proved."""
    config = CONFIG_MAPPING["qwen3_vl"]()
    config.vision_config.deepstack_visual_indexes = []
    config.vision_config.insert_layer_id = number
    assert reduction.reductions(config)["vision_config.depth"] == depth


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
