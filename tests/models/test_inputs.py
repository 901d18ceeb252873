"""Which auto class a configuration belongs to, and inputs made from signatures and configurations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from autoquant.errors import AutoQuantError
from autoquant.models import build as building
from autoquant.models import inputs, sizes
from autoquant.models import reduce as reduction
from autoquant.models.auto_classes import auto_class, kind_of, kinds_of, registered_types
from autoquant.models.build import build_meta
from autoquant.models.defaults import fit_parts_
from autoquant.models.inputs import make_inputs, masks_beside
from autoquant.models.load import load_weights
from autoquant.models.reduce import small
from autoquant.models.repair import find_source
from autoquant.models.sizes import fewer_positions, given_layers, given_sooner, reductions
from autoquant.models.source import ModelSource
from autoquant.models.tasks import KINDS


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ("causal-lm",)),
        ("t5", ("seq2seq-lm",)),
        ("bart", ("seq2seq-lm", "causal-lm")),  # an encoder-decoder is taken whole
        ("whisper", ("speech-seq2seq", "causal-lm")),
        ("llava", ("image-text-to-text",)),
        ("gemma3", ("causal-lm", "image-text-to-text")),  # one class for both
        ("llama4", ("image-text-to-text", "causal-lm")),  # the causal one is for the text alone
    ],
)
def test_kinds_are_read_off_the_mappings(name: str, kinds: tuple[str, ...]) -> None:
    config = CONFIG_MAPPING[name]()
    assert kinds_of(config) == kinds
    assert kind_of(config) == kinds[0]
    assert all(name in registered_types(kind) for kind in kinds_of(config))


def test_the_class_that_made_a_checkpoint_comes_first() -> None:
    config = CONFIG_MAPPING["bart"](architectures=["BartForCausalLM"])
    assert kind_of(config) == "causal-lm"
    config = CONFIG_MAPPING["llama"]()
    config.auto_map = {"AutoModelForSeq2SeqLM": "code.Model"}
    assert kind_of(config) == "seq2seq-lm"
    assert auto_class(KINDS[0]).__name__ == "AutoModelForCausalLM"


def test_a_type_of_no_kind_is_one_line() -> None:
    with pytest.raises(AutoQuantError, match=r"^type 'vit' is no language model: it is registered for none of Auto"):
        kind_of(CONFIG_MAPPING["vit"]())


def test_the_kind_can_be_chosen() -> None:
    whole, decoder = (build_meta(find_source("bart", layers=1, kind=kind)) for kind in (None, "causal-lm"))
    assert set(whole.kwargs) == {"input_ids", "decoder_input_ids"}
    assert set(decoder.kwargs) == {"input_ids"}
    assert (whole.config.encoder_layers, whole.config.decoder_layers) == (1, 1)


def test_an_image_takes_as_many_tokens_as_it_has_features() -> None:
    model = build_meta(find_source("llava", layers=1))
    ids, pixels = model.kwargs["input_ids"], model.kwargs["pixel_values"]
    assert pixels.is_meta and pixels.shape == (1, 3, 56, 56)
    assert int((ids == model.config.image_token_id).sum()) == 16, "four patches by four"
    assert (model.known, dict(model.missing)) == (("input_ids",), {})
    assert model.module.model.vision_tower.embeddings.position_embedding.num_embeddings == 577, "its own size"
    short: Any = model.short
    assert short.model.vision_tower.embeddings.position_embedding.num_embeddings == 17
    blind = make_inputs(short, torch.device("meta"), (1, 3), torch.float32, without={"pixel_values"})
    assert (set(blind.kwargs), blind.missing) == ({"input_ids"}, {})


def test_a_tower_is_asked_once_how_many_vectors_it_makes_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    run = inputs._Maker.run

    def counted(maker: Any, kwargs: Any, function: Any = None) -> Any:
        asked.extend(["tower"] if function is not None else ["model"])
        return run(maker, kwargs, function)

    monkeypatch.setattr(inputs._Maker, "run", counted)
    source = find_source("llava", layers=2)
    made = build_meta(source)
    assert "tower" in asked and asked[-1] == "model", "how many vectors it was run with is known"
    maker = inputs._Maker(made.short, torch.device("meta"), torch.float32, torch.Generator())
    image = made.kwargs["pixel_values"]
    count, before = maker._features("image", {"pixel_values": image}), len(asked)
    assert maker._features("image", {"pixel_values": image}) == count == made.kwargs["input_ids"].shape[1] - 3
    assert len(asked) == before  # the same
    assert maker._features("image", {"pixel_values": torch.cat([image, image])}) == 2 * count  # another one
    assert len(asked) == before + 1


def test_what_is_too_long_is_looked_for_again_only_where_depth_makes_it_shorter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = find_source("llava")
    made = build_meta(source)
    assert made.missing == {} and made.kwargs["input_ids"].shape[1] > 3
    searched: list[int] = []
    make = building.make_inputs

    def counted(module: Any, *of: Any, **options: Any) -> Any:
        searched.extend([len(module.model.language_model.layers)] if options.get("media", True) else [])
        return make(module, *of, **options)

    monkeypatch.setattr(building, "make_inputs", counted)
    monkeypatch.setattr(building, "_MOST_TOKENS", 10)
    too_long = build_meta(source)
    assert searched == [2]  # the whole depth runs on them as they are
    assert too_long.missing == {"pixel_values": "it takes 19 tokens, more than 10"} and too_long.unseen
    assert too_long.kwargs["input_ids"].shape == (1, 3)
    monkeypatch.setattr(building, "runs_on", lambda *of: False)
    build_meta(source)
    assert searched == [2, 2, 32]


def test_attention_in_both_directions_is_told_the_types_of_tokens() -> None:
    source = find_source("paligemma", layers=1)
    made = build_meta(source)
    assert made.known == ("input_ids", "token_type_ids")
    types, ids = made.kwargs["token_type_ids"], made.kwargs["input_ids"]
    assert torch.equal(types == 1, ids == made.config.image_token_id)
    assert int(types.sum()) == 16
    causal = find_source("paligemma", layers=1)
    causal.config.text_config.use_bidirectional_attention = False
    assert set(build_meta(causal).kwargs) == {"input_ids", "pixel_values"}


def test_sound_is_as_long_as_the_encoder_takes() -> None:
    model = small(find_source("whisper"))
    assert model.config.max_source_positions == 16
    assert model.kwargs["input_features"].shape == (1, 80, 32)
    assert model.kwargs["input_features"].dtype is torch.float64
    assert set(model.kwargs) == {"input_features", "decoder_input_ids"}


def test_sound_in_a_text_takes_as_many_tokens_as_it_has_features() -> None:
    """The outer method says nothing of what it takes; the mask of its tokens is spread over their channels."""
    model = build_meta(find_source("voxtral", layers=1))
    ids, sound = model.kwargs["input_ids"], model.kwargs["input_features"]
    assert sound.is_meta and sound.shape == (1, 128, 32)
    assert int((ids == model.config.audio_token_id).sum()) == 4
    assert dict(model.missing) == {}


def test_what_cannot_be_made_is_named() -> None:
    config = CONFIG_MAPPING["llava"]()
    config.image_token_id = None
    model = build_meta(ModelSource("blind", config))
    assert set(model.missing) == {"pixel_values"}
    assert set(model.kwargs) == {"input_ids"} and model.known == ()


def test_reduction_keeps_what_the_parts_share() -> None:
    text = {"hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 4}
    vision = {"embed_dim": 1280, "hidden_size": 2048, "num_heads": 16, "depth": 8}
    config = CONFIG_MAPPING["qwen2_vl"](text_config=text, vision_config=vision)
    changes = reductions(config)
    assert changes["vision_config.hidden_size"] == changes["text_config.hidden_size"] < 2048
    assert changes["vision_config.embed_dim"] % changes["vision_config.num_heads"] == 0
    assert changes["vision_config.depth"] == 2
    kept = reductions(config, keep_heads=True)
    assert kept["text_config.hidden_size"] // kept["text_config.num_attention_heads"] == 128
    assert fewer_positions(CONFIG_MAPPING["llava"]()) == {"vision_config.image_size": 56}


def test_what_is_too_large_with_a_layer_of_every_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "_LARGEST_WHOLE", 10_000)
    with pytest.raises(
        AutoQuantError, match=r"^llama: its small model has [\d,]+ parameters in 2 layers, more than 10,000$"
    ):
        small(find_source("llama"))


def test_weights_are_loaded_by_the_class_that_made_them(tmp_path: Any) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1, "vocab_size": 32}
    model = auto_class("seq2seq-lm").from_config(CONFIG_MAPPING["t5"](**sizes))
    model.save_pretrained(tmp_path)
    loaded = load_weights(tmp_path)
    assert type(loaded.module).__name__ == type(model).__name__
    assert set(loaded.kwargs) == {"input_ids", "decoder_input_ids"}


def test_a_model_need_not_say_where_its_tables_are_but_must_have_a_vocabulary() -> None:
    model = build_meta(find_source("llama", layers=1)).module

    def nowhere() -> None:
        raise NotImplementedError

    model.get_input_embeddings = nowhere  # type: ignore[assignment]  # as a class of transformers may have it
    shape = (1, 3)
    inputs = make_inputs(model, torch.device("meta"), shape, torch.float32)
    assert tuple(inputs.kwargs["input_ids"].shape) == shape
    model.config.get_text_config = lambda: object()
    with pytest.raises(AutoQuantError, match=r"takes no tokens: its configuration has no vocab_size$"):
        make_inputs(model, torch.device("meta"), shape, torch.float32)


def test_what_predicts_no_tokens_says_what_it_computes_from() -> None:
    model = build_meta(find_source("llama", layers=1)).module
    model.config.get_text_config = lambda: object()

    def demanding(state: object, input_ids: object = None) -> None: ...

    model.forward = demanding  # type: ignore[method-assign]  # as of a model of actions
    with pytest.raises(AutoQuantError, match=r"takes no tokens: its configuration has no vocab_size$"):  # it has a head
        make_inputs(model, torch.device("meta"), (1, 3), torch.float32)
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    with pytest.raises(
        AutoQuantError, match=r"predicts no tokens: it has no output embeddings, and computes from state$"
    ):
        make_inputs(model, torch.device("meta"), (1, 3), torch.float32)


def test_a_decoder_that_is_not_told_its_words_is_given_some() -> None:
    source = known_type("diffusion_gemma")
    assert source.config.is_encoder_decoder is False
    assert set(build_meta(source).kwargs) == {"input_ids", "decoder_input_ids"}
    assert set(build_meta(known_type("blip-2")).kwargs) == {"input_ids", "pixel_values"}  # its language model alone


def known_type(name: str) -> ModelSource:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    return find_source(name, layers=1)


def test_patches_lie_in_rows_behind_their_places() -> None:
    model = build_meta(known_type("pix2struct"))
    patches = model.kwargs["flattened_patches"]
    assert patches.shape == (1, 16, 2 + model.config.vision_config.patch_embed_hidden_size)
    assert dict(model.missing) == {}


def test_sound_that_is_projected_first_is_as_wide_as_that_takes() -> None:
    model = build_meta(replace(known_type("seamless_m4t_v2"), kind="speech-seq2seq"))
    assert model.kwargs["input_features"].shape[-1] == model.config.feature_projection_input_dim == 160
    assert dict(model.missing) == {}


def test_where_sound_is_added_to_the_tokens_there_is_one_for_each() -> None:
    model = build_meta(known_type("voxtral_realtime"))
    assert model.kwargs["input_ids"].shape == (1, 8)
    assert dict(model.missing) == {}


def test_every_token_sees_the_image_that_stands_beside_the_text() -> None:
    model = build_meta(known_type("idefics"))
    mask, ids = model.kwargs["image_attention_mask"], model.kwargs["input_ids"]
    assert mask.shape == (1, ids.shape[1], 1) and bool((mask == 1).all())
    assert dict(model.missing) == {}


def test_an_image_may_be_asked_about_in_words_of_its_own() -> None:
    model = small(known_type("instructblip"))
    words = model.kwargs["qformer_input_ids"]
    assert words.shape == (1, 3) and int(words.max()) < model.config.qformer_config.vocab_size == 128
    assert int((model.kwargs["input_ids"] == model.config.image_token_index).sum()) == model.config.num_query_tokens
    assert dict(model.missing) == {}


def test_a_film_has_tokens_where_there_are_none_for_images() -> None:
    source = known_type("instructblipvideo")
    assert source.repairs == {"video_token_index": source.config.text_config.vocab_size - 1}
    model = build_meta(source)
    assert model.kwargs["pixel_values"].shape == (1, 1, 3, 56, 56)
    assert int((model.kwargs["input_ids"] == source.config.video_token_index).sum()) == source.config.num_query_tokens
    both = CONFIG_MAPPING["llava_onevision"]()  # images are made for it: what stands for a film is left as it is
    both.video_token_id = None
    assert fit_parts_(both) == {} and both.video_token_id is None


def test_a_film_stands_beside_the_image_where_a_tower_is_for_films() -> None:
    source = known_type("video_llava")
    model = build_meta(source)
    assert model.kwargs["pixel_values"].shape == (1, 3, 56, 56)
    assert model.kwargs["pixel_values_videos"].shape == (1, 2, 3, 56, 56)
    counts = [int((model.kwargs["input_ids"] == token).sum()) for token in (model.config.image_token_id, 32001)]
    assert model.config.video_token_id == 32001
    assert counts == [16, 2 * 17], "of each frame, its first vector too"
    assert dict(model.missing) == {}


def test_a_film_that_takes_the_places_of_an_image_is_not_made() -> None:
    model = build_meta(known_type("llava")).short
    model.video_tower = nn.Linear(2, 2)
    forward = model.forward
    model.forward = lambda pixel_values_videos=None, input_ids=None, pixel_values=None, **more: forward(
        input_ids=input_ids, pixel_values=pixel_values, **more
    )
    made = make_inputs(model, torch.device("meta"), (1, 3), torch.float32)
    assert set(made.kwargs) == {"input_ids", "pixel_values"}
    assert made.missing == {"pixel_values_videos": "in a text it takes the places of an image, which is there instead"}


def test_where_values_say_what_is_read_no_further_layout_is_tried() -> None:
    error = RuntimeError("The tensor has a non-zero number of elements, but its data is not allocated yet.\nIf you")
    assert inputs._said(error) == inputs._BY_VALUES
    assert inputs._said(RuntimeError("no\n such size")) == "RuntimeError: no such size"
    assert inputs._said(AutoQuantError("it needs pillow")) == "it needs pillow"
    made = build_meta(known_type("llava")).short
    made.model.vision_tower.forward = lambda x, **_: x[(tuple(x[0, 0, 0].long()),)]
    assert make_inputs(made, torch.device("meta"), (1, 3), torch.float32).missing == {"pixel_values": inputs._BY_VALUES}


def test_an_image_is_made_where_values_say_how_many_tokens_an_expert_gets() -> None:
    """A loop over the experts that occur, behind the tower, whose features have found their places by then."""
    model = build_meta(known_type("llava")).short
    experts = model.model.language_model.layers[0].mlp
    experts.forward = lambda x: x[:, (x[0, :, 0] > 0).nonzero()[:, 0]]
    made = make_inputs(model, torch.device("meta"), (1, 3), torch.float32)
    assert made.kwargs["pixel_values"].shape == (1, 3, 56, 56) and made.missing == {}
    assert int((made.kwargs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert inputs.runs_on(model, made)


def test_an_image_is_not_made_where_values_say_what_the_tower_reads() -> None:
    model = build_meta(known_type("llava")).short
    model.model.vision_tower.forward = lambda x, **_: x[:, (x[0, :, 0] > 0).nonzero()[:, 0]]
    made = make_inputs(model, torch.device("meta"), (1, 3), torch.float32)
    assert set(made.kwargs) == {"input_ids"} and made.unseen
    assert "DynamicOutputShapeException" in made.missing["pixel_values"]


def test_a_mask_may_say_where_the_image_goes() -> None:
    model = build_meta(known_type("kosmos-2"))
    mask = model.kwargs["image_embeds_position_mask"]
    assert mask.shape == model.kwargs["input_ids"].shape == (1, 3 + 64)
    assert int(mask.sum()) == model.config.latent_query_num == 64
    assert model.known == ("input_ids", "image_embeds_position_mask")


def test_tokens_of_a_page_have_their_places_on_it() -> None:
    model = small(known_type("udop"))
    places, ids = model.kwargs["bbox"], model.kwargs["input_ids"]
    assert places.shape == (*ids.shape, 4) and places.is_floating_point()
    assert 0 < float(places.min()) < float(places.max()) < 1
    whole = build_meta(known_type("udop"))
    places = whole.kwargs["bbox"]
    assert "bbox" in whole.known and 0 < float(places.min()) < float(places.max()) < 1, (
        "they choose patches of the image"
    )
    assert (dict(whole.missing), whole.kwargs["pixel_values"].shape) == ({}, (1, 3, 64, 64))
    assert make_inputs(whole.module, torch.device("meta"), (1, 3), torch.float32, media=False).kwargs["bbox"].is_meta


@pytest.mark.parametrize(
    ("name", "kind", "ids", "shape"),
    [
        ("dia", "speech-seq2seq", "decoder_input_ids", (1, 3, 9)),
        ("kyutai_speech_to_text", "speech-seq2seq", "input_ids", (1, 3, 33)),
    ],
)
def test_a_token_is_as_many_ids_as_there_are_codebooks(name: str, kind: Any, ids: str, shape: Any) -> None:
    model = build_meta(replace(known_type(name), kind=kind))
    assert model.kwargs[ids].shape == shape


def test_what_a_part_reads_is_as_wide_as_the_part_that_makes_it() -> None:
    changes = reductions(CONFIG_MAPPING["blip-2"]())
    assert changes["qformer_config.encoder_hidden_size"] == changes["vision_config.hidden_size"] == 64
    assert changes["qformer_config.hidden_size"] != 64
    other = CONFIG_MAPPING["blip-2"]()
    other.qformer_config.encoder_hidden_size = 1000  # no other part's width: a size of its own
    assert not sizes._INWARD.search("image_size")  # pixels, whatever width a part may have
    assert reductions(other)["qformer_config.encoder_hidden_size"] not in (64, 1000)


def test_a_part_that_hands_over_its_own_vectors_stays_as_wide_as_the_language_model() -> None:
    config = CONFIG_MAPPING["idefics2"]()
    assert config.perceiver_config.hidden_size == config.text_config.hidden_size
    own, together = reductions(config), reductions(config, as_wide=True)
    assert own["perceiver_config.hidden_size"] != own["text_config.hidden_size"]
    assert together["perceiver_config.hidden_size"] == together["text_config.hidden_size"]
    model = small(find_source("idefics2"))
    assert (dict(model.missing), model.kwargs["pixel_values"].shape[2:]) == ({}, (3, 128, 128))


def test_what_is_handed_over_shrinks_with_the_part_that_makes_or_reads_it() -> None:
    config = known_type("deepseek_ocr2").config
    config.vision_config.sam_config.downsample_channels = [512, config.vision_config.encoder_config.hidden_size]
    changes = reductions(config)
    wide = changes["vision_config.encoder_config.hidden_size"]
    assert changes["vision_config.sam_config.downsample_channels"] == [512, wide]
    config.vision_config.sam_config.downsample_channels = [512, 896]  # no part's width
    assert "vision_config.sam_config.downsample_channels" not in reductions(config)
    config = known_type("muse_glimmer").config
    changes = reductions(config)
    assert changes["out_hidden_size"] == 4 * changes["vision_config.hidden_size"]
    config.out_hidden_size += 1
    assert "out_hidden_size" not in reductions(config)


def test_a_tower_keeps_the_layers_whose_outputs_are_read() -> None:
    config = known_type("molmo2").config
    assert config.adapter_config.vision_feature_layer == [24, 18]
    assert reductions(config).get("vision_config.num_hidden_layers", 25) == 25
    config.adapter_config.vision_feature_layer = [-3, 1]
    assert reductions(config)["vision_config.num_hidden_layers"] == 3


def test_a_small_language_model_keeps_the_layers_that_an_image_goes_into() -> None:
    known_type("granite4_vision")
    config = CONFIG_MAPPING["granite4_vision"](deepstack_layer_map=[[-4, 15], [1, 9]])
    assert given_layers(config) == {
        "deepstack_layer_map": [(-4, 15), (1, 9)],
        "spatial_target_layers": [12, 15, 18, 21],
    }
    changes, depth = given_sooner(config)
    assert changes == {"deepstack_layer_map": [[-4, 3], [1, 1]], "spatial_target_layers": [2, 3, 4, 5]}
    assert depth == 7, "one that nothing goes into before and behind"
    assert reductions(config)["vision_config.num_hidden_layers"] == 4, "the fourth from the end is read"
    config.deepstack_layer_map, config.spatial_target_layers = [], [0, 2, 32]
    assert given_sooner(config) == ({"spatial_target_layers": [0, 1, 32]}, 3), "there is no layer 32"
    config.spatial_target_layers = None
    assert given_sooner(config) == ({}, 0)
    model = small(find_source("granite4_vision"))
    assert (model.config.spatial_target_layers, model.config.text_config.num_hidden_layers) == ([1, 2, 3, 4], 6)
    assert (dict(model.missing), tuple(model.kwargs["pixel_values"].shape)) == ({}, (1, 4, 3, 128, 128))


def test_a_token_by_another_name_is_lowered_into_the_vocabulary() -> None:
    config = known_type("molmo2").config
    assert type(config).attribute_map["image_token_id"] == "image_patch_id"
    reduction._lower_token_ids_([config], 128)
    assert sorted([config.image_patch_id, config.image_start_token_id]) == [125, 127]
    assert not reduction._is_token(config, "patch_size")


class Reader(nn.Module):
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
    ) -> None: ...


def test_masks_beside_token_ids_let_every_token_count() -> None:
    ids = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "decoder_input_ids": torch.tensor([[1, 2, 3]])}
    found = masks_beside(Reader(), ids)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "attention_mask": [[1, 1, 1, 1]],
        "decoder_attention_mask": [[1, 1, 1]],
    }
    assert list(masks_beside(Reader(), ids | {"attention_mask": ids["input_ids"]})) == ["decoder_attention_mask"]
    assert masks_beside(nn.Linear(2, 2), ids) == {}


def test_an_image_is_found_where_the_experts_have_no_shapes_in_float32() -> None:
    """Of a grouped product the stand-in without memory knows half precision alone; traced, it is another operator."""
    model = build_meta(replace(known_type("qwen3_vl_moe"), kind="image-text-to-text"))
    assert dict(model.missing) == {}
    assert int((model.kwargs["input_ids"] == model.config.image_token_id).sum()) == 4
    assert not torch.compiler.is_compiling()
