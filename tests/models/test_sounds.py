"""Layouts of sounds, from configurations alone and as models take them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING

from autoquant.capture.fake_tensors import known_values
from autoquant.library_patches import FakeTensorMode
from autoquant.models.build import build_meta
from autoquant.models.layouts import Values, Wanted
from autoquant.models.repair import find_source
from autoquant.models.sounds import sound_layouts


def layouts(model_type: str, name: str, *names: str) -> list[Values]:
    config = CONFIG_MAPPING[model_type]()
    wanted = Wanted(SimpleNamespace(config=config), (name, *names), vars(config), lambda *shape: torch.empty(shape))
    return [make() for make in sound_layouts(wanted, name)]


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("nemo_speechlm", (1, 64, 128)),  # as its speech recognizer takes, inside the part for sounds
        ("granite_speech", (1, 64, 160)),
    ],
)
def test_spectra_are_as_wide_and_as_long_as_the_configuration_says(model_type: str, shape: tuple[int, ...]) -> None:
    assert shape in [tuple(made["input_features"].shape) for made in layouts(model_type, "input_features")]


def test_masks_are_as_long_as_the_sound() -> None:
    made = layouts("moss_transcribe_diarize", "input_features", "input_features_mask", "padding_mask")[0]
    length = made["input_features"].shape[-1]
    assert {name: value.shape for name, value in made.items() if name.endswith("mask")} == {
        "input_features_mask": (1, length), "padding_mask": (1, length),
    }  # fmt: skip


def test_a_model_that_counts_its_placeholders_is_given_as_many() -> None:
    model = build_meta(find_source("qwen2_audio", layers=1))
    assert int((model.kwargs["input_ids"] == model.config.audio_token_id).sum()) == 8
    assert dict(model.missing) == {}


def test_fills_of_pythons_own_types_are_known_but_for_floats() -> None:
    with FakeTensorMode() as mode, known_values():
        assert torch.ones(2, dtype=bool).tolist() == [True, True]
        assert (
            isinstance(torch.ones(2, dtype=float), type(torch.empty(2)))
            and torch.ones(2, dtype=float).fake_mode is mode
        )
