"""Layouts of images: how a model's pixels are cut, stacked and described beside the text."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autoquant.models.layouts import Fields, Layout, Values, Wanted, edge, first, part

IMAGES = ("pixel_values", "flattened_patches")
"""Inputs of a forward that hold an image."""


def image_layouts(wanted: Wanted, name: str) -> Iterator[Layout]:
    """Layouts of ``name``, one of ``IMAGES``, the usual ones first."""
    if name == "flattened_patches":
        yield from _patches(wanted, part(wanted.fields, "vision|image"))
    else:
        yield from _pixels(wanted, part(wanted.fields, "vision|image|visual|vit|encoder"))


def _pixels(wanted: Wanted, vision: Fields) -> Iterator[Layout]:
    patch = edge(first(vision, "patch_size", "spatial_patch_size"))
    channels = first(vision, "num_channels", "in_channels", "in_chans", "channels") or 3
    merge = first(vision, "spatial_merge_size", "merge_size") or 2
    frames = first(vision, "temporal_patch_size") or 1
    size = edge(first(vision, "image_size", "input_size", "img_size")) or (patch and 4 * patch)
    if "image_grid_thw" in wanted.names and patch:
        high = 2 * merge
        grid = {"image_grid_thw": torch.tensor([[1, high, high]])}
        yield lambda: {"pixel_values": wanted.floats(high * high, channels * frames * patch * patch), **grid}
        yield lambda: {"pixel_values": wanted.floats(high * high, channels * patch * patch), **grid}
        yield lambda: {"pixel_values": wanted.floats(high * high, channels, patch, patch), **grid}
    if "spatial_shapes" in wanted.names and patch:
        yield lambda: {
            "pixel_values": wanted.floats(1, 16, channels * patch * patch),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }
    if not size:
        return
    sizes = {"image_sizes": torch.tensor([[size, size]])} if "image_sizes" in wanted.names else {}
    for more in ((), (1,), (1, 1)):
        for extra in (sizes, {}) if sizes else ({},):
            yield lambda more=more, extra=extra: {  # type: ignore[misc]
                "pixel_values": wanted.floats(1, *more, channels, size, size),
                **extra,
            }
    if "image_sizes" in wanted.names:  # the whole image and one crop
        yield lambda: {"pixel_values": wanted.floats(1, 2, channels, size, size), **sizes}
    if "aspect_ratio_ids" in wanted.names:
        tiles = first(vision, "max_num_tiles") or 1
        yield lambda: {
            "pixel_values": wanted.floats(1, 1, tiles, channels, size, size),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
        }


def _patches(wanted: Wanted, vision: Fields) -> Iterator[Layout]:
    """Patches in one row each, their row and column in the image before their values."""
    width = first(vision, "patch_embed_hidden_size")
    if not width:
        return

    def patches() -> Values:
        made = wanted.floats(1, 16, 2 + width)
        made[..., :2] = 0
        return {"flattened_patches": made}

    yield patches
