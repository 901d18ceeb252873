"""Default configurations whose parts are made to fit: by what their fields say, or by a try with an image."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from autoquant.models import defaults
from autoquant.models.build import changed
from autoquant.models.defaults import changes_for_images, fit_parts_
from autoquant.models.repair import find_source
from autoquant.models.source import ModelSource


def default(name: str) -> Any:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    return CONFIG_MAPPING[name]()


def test_what_a_part_says_of_the_language_models_width_is_that_width() -> None:
    config = default("molmo2")
    assert fit_parts_(config) == {"adapter_config.text_hidden_size": config.text_config.hidden_size}
    assert config.adapter_config.text_hidden_size == 4096
    assert fit_parts_(config) == {}, "now they fit"


def test_what_a_projector_takes_is_as_wide_as_merged_patches() -> None:
    config = default("muse_glimmer")
    assert config.out_hidden_size == 4 * config.vision_config.hidden_size != config.text_config.hidden_size
    assert fit_parts_(config) == {}
    config.out_hidden_size += 1  # then it is what the tower hands over, and does not fit
    assert fit_parts_(config) == {"out_hidden_size": config.text_config.hidden_size}


def test_what_a_tower_projects_to_is_found_with_an_image() -> None:
    default("janus")
    source = find_source("janus")
    assert source.repairs == {"vision_config.projection_dim": source.config.text_config.hidden_size}
    assert source.config.vision_config.projection_dim == 4096


def test_a_value_is_kept_where_it_helps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default("janus")
    made: dict[int, tuple[str, ...]] = {2048: ("pixel_values",), 4096: ()}
    monkeypatch.setattr(defaults, "_not_made", lambda source, config: made[config.vision_config.projection_dim])
    source = ModelSource("janus", config)
    assert changes_for_images(source) == {"vision_config.projection_dim": 4096}
    made[4096] = made[2048]
    assert changes_for_images(source) == {}, "it does not help either"
    made[2048] = ()
    assert changes_for_images(source) == {}, "there is nothing to mend"


def test_nothing_is_tried_where_nothing_may_be_meant_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "_not_made", lambda source, config: pytest.fail("it takes seconds"))
    config = default("llava")
    assert config.vision_config.projection_dim != config.text_config.hidden_size, "of a tower that others use too"
    assert changes_for_images(ModelSource("llava", config)) == {}


def test_what_a_part_reads_is_as_wide_as_another_part(monkeypatch: pytest.MonkeyPatch) -> None:
    known = CONFIG_MAPPING["granite_speech"]()
    assert known.projector_config.encoder_hidden_size == 1408 and known.encoder_config.hidden_size == 1024
    source = ModelSource("granite_speech", known, kind="speech-seq2seq")

    def not_made(_: ModelSource, config: Any) -> tuple[str, ...]:
        fits = config.projector_config.encoder_hidden_size == config.encoder_config.hidden_size
        return () if fits else ("input_features",)

    monkeypatch.setattr(defaults, "_not_made", not_made)
    changes = changes_for_images(source)
    assert changes == {"projector_config.encoder_hidden_size": 1024}
    assert list(defaults._proposals(changed(known, changes))) == []  # a part is as wide as it says
    monkeypatch.setattr(defaults, "_not_made", lambda *_: ("input_features",))
    assert changes_for_images(source) == {}, "no width helps"


def test_half_of_each_edge_is_kept_where_another_fraction_runs_on_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default("granite4_vision")
    runs = {"2/4"}
    monkeypatch.setattr(defaults, "_not_made", lambda _, config: () if config.downsample_rate in runs else ("pixels",))
    config.downsample_rate = "1/4"
    source = ModelSource("granite4_vision", config)
    assert changes_for_images(source) == {"downsample_rate": "2/4"}, "of the same window"
    runs.add("1/4")
    assert changes_for_images(source) == {}
    config.downsample_rate = "1/3"
    assert list(defaults._proposals(config)) == [], "a window of three has no half"


def test_channels_end_as_wide_as_the_part_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default("deepseek_ocr2")
    vision = config.vision_config
    assert (vision.sam_config.downsample_channels, vision.encoder_config.hidden_size) == ([512, 896], 4096)

    def not_made(_: ModelSource, config: Any) -> tuple[str, ...]:
        vision = config.vision_config
        return () if vision.sam_config.downsample_channels[-1] == vision.encoder_config.hidden_size else ("pixels",)

    monkeypatch.setattr(defaults, "_not_made", not_made)
    source = ModelSource("deepseek_ocr2", config)
    assert changes_for_images(source) == {"vision_config.sam_config.downsample_channels": [512, 4096]}
    vision.sam_config.downsample_channels = [512, 4096]
    assert list(defaults._proposals(config)) == [], "a part is as wide"
