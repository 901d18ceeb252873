"""Layouts of sounds, from configurations alone and as models take them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING

from autoquant.capture.fake_tensors import known_values
from autoquant.library_patches import FakeTensorMode
from autoquant.models.build import build_meta
from autoquant.models.layouts import Values, Wanted
from autoquant.models.repair import find_source
from autoquant.models.sizes import reductions
from autoquant.models.sounds import hears_nothing, sound_layouts
from autoquant.models.source import ModelSource


def layouts(model_type: str, name: str, *names: str) -> list[Values]:
    config = CONFIG_MAPPING[model_type]()
    wanted = Wanted(SimpleNamespace(config=config), (name, *names), vars(config), lambda *shape: torch.empty(shape))
    return [make() for make in sound_layouts(wanted, name)]


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("qwen3_asr", (1, 128, 100)),  # a multiple of two windows
        ("nemo_speechlm", (1, 64, 128)),  # as its speech recognizer takes, inside the part for sounds
        ("granite_speech", (1, 64, 160)),
        ("fun_asr_nano", (1, 64, 560)),  # frames of 80 bins, seven stacked
        ("gemma3n", (1, 64, 128)),
        ("pop2piano", (1, 64, 512)),  # no size of a spectrum: as wide as the embedding of a token
    ],
)
def test_spectra_are_as_wide_and_as_long_as_the_configuration_says(model_type: str, shape: tuple[int, ...]) -> None:
    assert shape in [tuple(made["input_features"].shape) for made in layouts(model_type, "input_features")]


@pytest.mark.parametrize(("model_type", "shape"), [("muse_spark", (1, 3840)), ("vibevoice_asr", (1, 1, 6400))])
def test_samples_fill_whole_tokens(model_type: str, shape: tuple[int, ...]) -> None:
    assert shape in [tuple(made["input_values"].shape) for made in layouts(model_type, "input_values")]


def test_masks_are_as_long_as_the_sound_and_nothing_is_drawn() -> None:
    first = layouts("vibevoice", "input_values", "padding_mask", "sample")[0]
    assert first["padding_mask"].shape == (1, first["input_values"].shape[-1]) and bool(
        (first["padding_mask"] == 1).all()
    )
    assert not first["sample"]
    kinds = {
        made["padding_mask"].dtype for made in layouts("vibevoice", "input_values", "padding_mask") if len(made) > 1
    }
    assert kinds == {torch.int64, torch.bool}


def owned(method: Callable[..., None], *names: str) -> list[set[str]]:
    """What goes with each layout of a model with a method of its own for sounds."""
    config = CONFIG_MAPPING["granite_speech"]()
    model = SimpleNamespace(config=config, get_audio_features=method)
    wanted = Wanted(model, ("input_features", *names), vars(config), lambda *shape: torch.empty(shape))
    return [set(make()) - {"input_features"} for make in sound_layouts(wanted, "input_features")]


def test_a_mask_that_a_model_s_own_method_does_not_take_is_of_its_vectors() -> None:
    def of_sound(input_features: object) -> None: ...

    def of_both(input_features: object, input_features_mask: object = None) -> None: ...

    def of_both_always(input_features: object, input_features_mask: object) -> None: ...

    mask = {"input_features_mask"}
    assert owned(of_sound, *mask, "sample")[0] == {"sample"}
    assert owned(of_both, *mask)[0] == mask and owned(of_both, *mask)[-1] == set()
    assert all(beside == mask for beside in owned(of_both_always, *mask))


def test_an_encoder_takes_a_sound_instead_of_tokens() -> None:
    inputs = build_meta(find_source("pop2piano"))
    assert {name: tuple(value.shape) for name, value in inputs.kwargs.items()} == {
        "decoder_input_ids": (1, 3),
        "input_features": (1, 64, 512),
    }


def test_chunks_are_counted_in_samples() -> None:
    made = layouts("dots3_note", "input_features", "chunk_sample_lengths")[0]
    hop = CONFIG_MAPPING["dots3_note"]().audio_config.hop_length
    assert made["chunk_sample_lengths"].tolist() == [made["input_features"].shape[-1] * hop]


@pytest.mark.parametrize("model_type", ["qwen2_audio", "musicflamingo"])
def test_a_model_that_counts_its_placeholders_is_given_as_many(model_type: str) -> None:
    """One has no method of its own for sounds, the other's takes the text with the placeholders."""
    model = build_meta(find_source(model_type, layers=1))
    assert int((model.kwargs["input_ids"] == model.config.audio_token_id).sum()) == 8
    assert dict(model.missing) == {}


def test_each_layer_of_a_tower_may_make_a_sound_shorter() -> None:
    """Inputs are looked for on two layers, of which this one makes five moments of a hundred; the third makes one."""
    config = CONFIG_MAPPING["muse_spark"](
        text_config={"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        audio_config={"patch_sizes": (5, 4, 4), "hidden_sizes": (8, 8, 8), "depths": (1, 1, 1), "num_hidden_layers": 3}
        | {"out_hidden_size": 16},
        image_token_id=50,
        video_token_id=51,
        audio_token_id=52,
        out_hidden_size=64,
    )
    model = build_meta(ModelSource("muse_spark", config))
    assert dict(model.missing) == {}
    assert int((model.kwargs["input_ids"] == 52).sum()) == model.kwargs["input_values"].shape[-1] // 80


def test_a_size_of_heads_without_heads_is_that_of_a_tower() -> None:
    config = CONFIG_MAPPING["musicflamingo"]()
    assert config.head_dim == config.audio_config.hidden_size
    changes = reductions(config)
    assert changes["head_dim"] == changes["audio_config.hidden_size"] < 160


def test_a_chunk_of_samples_stays_as_long() -> None:
    config = CONFIG_MAPPING["vibevoice_asr"]()
    assert "acoustic_tokenizer_chunk_size" not in reductions(config)


def test_fills_of_pythons_own_types_are_known_but_for_floats() -> None:
    with FakeTensorMode() as mode, known_values():
        assert torch.ones(2, dtype=bool).tolist() == [True, True]
        assert (
            isinstance(torch.ones(2, dtype=float), type(torch.empty(2)))
            and torch.ones(2, dtype=float).fake_mode is mode
        )


def test_a_configuration_may_leave_out_the_part_for_sound() -> None:
    assert hears_nothing({"audio_config": None, "vision_config": object()})
    assert not hears_nothing({"audio_config": object()})
    assert not hears_nothing({"num_mel_bins": 80}), "it is about sound as a whole"
