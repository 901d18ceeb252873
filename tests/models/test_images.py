"""Layouts of images, by hand and by the library's own image processors, and the sizes that go with a small image."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from autoquant.errors import AutoQuantError
from autoquant.models.build import changed
from autoquant.models.images import FILM, becomes_tokens, film_layouts, has_part_for_films, image_layouts
from autoquant.models.layouts import Wanted
from autoquant.models.processors import processed_image
from autoquant.models.repair import find_source
from autoquant.models.sizes import fewer_positions


def _wanted(model_type: str, *names: str) -> Wanted:
    config = CONFIG_MAPPING[model_type]()
    config = changed(config, fewer_positions(config))
    module: Any = nn.Module()
    module.config, module.main_input_name = config, "input_ids"
    return Wanted(module, ("pixel_values", *names), vars(config), lambda *shape: torch.full(shape, 0.5))


@pytest.mark.parametrize(
    ("model_type", "shapes", "numbers"),
    [
        # The whole image and what the nearest of the small grids cuts it into.
        ("llava_next", {"pixel_values": (1, 3, 3, 56, 56)}, {"image_sizes": [[56, 56]]}),
        ("mistral3", {"pixel_values": (1, 3, 56, 56)}, {"image_sizes": [[56, 56]]}),
        ("minicpmv4_6", {"pixel_values": (1, 3, 16, 256)}, {"target_sizes": [[4, 4]]}),
        ("video_llama_3", {"pixel_values": (16, 768)}, {"image_grid_thw": [[1, 4, 4]], "image_merge_sizes": [2]}),
        ("deepseek_vl_hybrid", {"pixel_values": (1, 3, 64, 64), "high_res_pixel_values": (1, 3, 64, 64)}, {}),
    ],
)
def test_a_processor_lays_out_one_small_image(model_type: str, shapes: dict[str, Any], numbers: dict[str, Any]) -> None:
    made = processed_image(_wanted(model_type, *shapes, *numbers), "pixel_values")
    assert {name: tuple(value.shape) for name, value in made.items() if value.is_floating_point()} == shapes
    assert {name: value.tolist() for name, value in made.items() if not value.is_floating_point()} == numbers
    assert bool((made["pixel_values"] == 0.5).all()), "its shape alone is the processor's"


def test_what_no_processor_makes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AutoQuantError, match=r"^transformers has no image processor for LlamaConfig$"):
        processed_image(_wanted("llama"), "pixel_values")
    with pytest.raises(
        AutoQuantError, match=r"^its image processor \w+ makes pixel_values, image_sizes, and no pixels$"
    ):
        processed_image(_wanted("mistral3"), "pixels")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(AutoQuantError, match=r"^its image processor \w+ needs pillow: pip install autoquant\[multi"):
        processed_image(_wanted("mistral3"), "pixel_values")


def test_rows_of_patches_say_how_they_lie_in_the_image() -> None:
    layouts = image_layouts(_wanted("molmo2", "image_token_pooling", "image_grids", "image_num_crops"), "pixel_values")
    made = next(tried for layout in layouts if "image_grids" in (tried := layout()))
    assert made["pixel_values"].shape == (1, 16, 3 * 14 * 14)
    pooled = made["image_token_pooling"]
    assert sorted(pooled.flatten().tolist()) == list(range(16)), "each patch goes into one token"
    assert pooled[1].tolist() == [2, 3, 6, 7], "two by two of the four by four"
    assert made["image_grids"].tolist() == [[2, 2, 0, 0]]


def test_a_size_may_be_noted_on_a_part_alone() -> None:
    """As timm does on its models, of which a configuration names no more than what they are called."""
    part = nn.Conv2d(3, 4, 2)
    part.pretrained_cfg = {"input_size": (3, 96, 96)}  # type: ignore[assignment]  # any attribute
    for module, shapes in (
        (nn.Sequential(nn.Linear(2, 2), part), [(1, 3, 96, 96), (1, 1, 3, 96, 96), (1, 1, 1, 3, 96, 96)]),
        (nn.Sequential(nn.Linear(2, 2)), []),
    ):
        module.main_input_name = "input_ids"  # type: ignore[assignment]  # any attribute
        wanted = Wanted(module, ("pixel_values",), {}, lambda *shape: torch.full(shape, 0.5))
        *made, _ = image_layouts(wanted, "pixel_values")  # the last one is the library's processor
        assert [tuple(layout()["pixel_values"].shape) for layout in made][: len(shapes) or None] == shapes


def test_an_image_that_becomes_tokens_is_no_input() -> None:
    wanted = _wanted("chameleon")
    wanted.module.get_image_tokens = lambda pixel_values: pixel_values
    assert becomes_tokens(wanted.module) and not becomes_tokens(_wanted("llava").module)
    *_, last = image_layouts(wanted, "pixel_values")
    with pytest.raises(AutoQuantError, match=r"^an image becomes token ids"):
        last()


def test_what_hangs_on_the_size_of_an_image_goes_with_it() -> None:
    assert fewer_positions(CONFIG_MAPPING["internvl"]()) == {"vision_config.image_size": [56, 56]}
    small = fewer_positions(CONFIG_MAPPING["llava_next"]())
    assert small["vision_config.image_size"] == 56
    assert small["image_grid_pinpoints"] == [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    assert fewer_positions(CONFIG_MAPPING["aria"]())["projector_patch_to_query_dict"] == {16: 4}
    assert fewer_positions(CONFIG_MAPPING["molmo2"]())["vision_config.num_position_embeddings"] == 16
    tower = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16}
    windows = fewer_positions(CONFIG_MAPPING["granite4_vision"](downsample_rate="4/8", vision_config=tower))
    assert windows["vision_config.image_size"] == 8 * 16, "a window of eight patches by eight"


def test_a_film_is_made_where_a_part_is_for_films_alone() -> None:
    wanted = _wanted("video_llava")
    shapes = [tuple(made[FILM].shape) for made in (layout() for layout in film_layouts(wanted))]
    assert shapes == [(1, 2, 3, 56, 56), (2, 3, 56, 56)]
    model = nn.Module()
    model.vision_tower = nn.Linear(2, 2)
    model.video_norm = nn.LayerNorm(2)
    assert not has_part_for_films(model), "a norm is no matrix"
    model.vision_tower.video_embedder = nn.Linear(2, 2)
    assert has_part_for_films(model)


def test_a_tower_is_made_to_fit_its_projector() -> None:
    repaired = find_source("ovis2").repairs
    assert repaired["hidden_size"] == CONFIG_MAPPING["ovis2"]().text_config.hidden_size
    repaired = find_source("llama4", kind="image-text-to-text").repairs
    assert repaired["vision_config.intermediate_size"] == 768 * 4, "four patches side by side"
    assert repaired["vision_config.vision_output_dim"] == 4096
