"""Layouts of images: how a model's pixels are cut, stacked and described beside the text.

A few layouts are usual, and are made from what the forward and the configuration name. Where the model runs on none of
them, the library's own image processor for its configuration lays out a small image: see ``processors.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from autoquant.errors import AutoQuantError
from autoquant.models.layouts import Fields, Layout, Values, Wanted, edge, first, part
from autoquant.models.processors import processed_image

IMAGES = ("pixel_values", "flattened_patches")
"""Inputs of a forward that hold an image."""
FILM = "pixel_values_videos"
"""The input of a forward that holds a film."""


class AddsNothing(AutoQuantError):
    """Why an input cannot be made that puts nothing into the model's stream of its own."""


def image_layouts(wanted: Wanted, name: str) -> Iterator[Layout]:
    """Layouts of ``name``, one of ``IMAGES``, the usual ones first."""
    if name == "flattened_patches":
        yield from _patches(wanted, part(wanted.fields, "vision|image"))
    else:
        vision = part(wanted.fields, "vision|image|visual|vit|encoder")
        yield from _pixels(wanted, vision)
        yield from _patch_rows(wanted, vision)
        yield partial(_tokens if becomes_tokens(wanted.module) else processed_image, wanted, name)


def film_layouts(wanted: Wanted) -> Iterator[Layout]:
    """Layouts of a film of two frames."""
    vision = part(wanted.fields, "vision|image|visual|vit|encoder")
    size, channels = _edge_of(vision), _patch(vision)[1]
    for more in ((1,), ()) if size else ():
        yield lambda more=more: {FILM: wanted.floats(*more, 2, channels, size, size)}  # type: ignore[misc]


def has_part_for_films(module: nn.Module) -> bool:
    """Whether a part of a model, by its name, is for films alone: an image goes another way."""
    parts = (part for path, part in module.named_modules() if "video" in path.rpartition(".")[2])
    return any(parameter.dim() > 1 for part in parts for parameter in part.parameters())


def becomes_tokens(module: Any) -> bool:
    """Whether a model makes token ids of an image: of all values that it computes of it, none reaches the logits."""
    return any(hasattr(owner, "get_image_tokens") for owner in (module, getattr(module, "model", None)))


def _pixels(wanted: Wanted, vision: Fields) -> Iterator[Layout]:
    patch, channels, frames = _patch(vision)
    merge = first(vision, "spatial_merge_size", "merge_size") or 2
    size = _edge_of(vision) or _noted_edge(wanted.module)
    if "image_grid_thw" in wanted.names and patch:
        high = 2 * merge
        grid = {"image_grid_thw": torch.tensor([[1, high, high]])}
        yield lambda: {"pixel_values": wanted.floats(high * high, channels * frames * patch * patch), **grid}
        yield lambda: {"pixel_values": wanted.floats(high * high, channels * patch * patch), **grid}
        yield lambda: {"pixel_values": wanted.floats(high * high, channels, patch, patch), **grid}
        token = merge * patch  # patches of one token as one, the channels last
        yield lambda: {
            "pixel_values": wanted.floats(4, token, token, channels),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
        }
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


def _edge_of(vision: Fields) -> int:
    """The edge of an image, in pixels: four patches where the configuration names none, 0 where not even a patch."""
    return edge(first(vision, "image_size", "input_size", "img_size")) or 4 * _patch(vision)[0]


def _noted_edge(module: nn.Module) -> int:
    """The edge that timm notes on a part of its own, whose configuration names none; 0 where there is no such part."""
    notes = (getattr(part, "pretrained_cfg", None) for part in module.modules())
    sizes = (note.get("input_size") for note in notes if isinstance(note, Mapping))
    return next((int(size[-1]) for size in sizes if size), 0)


def _patch(vision: Fields) -> tuple[int, int, int]:
    """Edge, channels and frames of a patch; an edge of 0 where the configuration names none."""
    channels = first(vision, "num_channels", "in_channels", "in_chans", "channels") or 3
    frames = first(vision, "temporal_patch_size", "patch_temporal") or 1
    return edge(first(vision, "patch_size", "spatial_patch_size")), channels, frames


def _patch_rows(wanted: Wanted, vision: Fields) -> Iterator[Layout]:
    """Four by four patches in a row, with what else the forward names to say how they lie in the image."""
    patch, channels, frames = _patch(vision)
    if not patch:
        return
    row, grid = channels * patch * patch, torch.tensor([[4, 4]])
    if "target_sizes" in wanted.names:
        yield lambda: {"pixel_values": wanted.floats(1, channels, patch, 16 * patch), "target_sizes": grid}
    if "image_grid_hw" in wanted.names:
        yield lambda: {"pixel_values": wanted.floats(16, row), "image_grid_hw": grid}
    if "image_token_pooling" in wanted.names:  # the patches of each token, two by two
        corners = torch.tensor([[0], [2], [8], [10]])
        yield lambda: {
            "pixel_values": wanted.floats(1, 16, row),
            "image_token_pooling": corners + torch.tensor([[0, 1, 4, 5]]),
            "image_grids": torch.tensor([[2, 2, 0, 0]]),
            "image_num_crops": torch.tensor([1]),
        }
    if frames > 1 and "image_grid_thw" not in wanted.names:  # each patch for itself, the channels last
        yield lambda: {"pixel_values": wanted.floats(4, frames, patch, patch, channels)}
    if wanted.module.main_input_name == "input_ids":
        yield lambda: {"pixel_values": wanted.floats(1, 16, row)}


def _tokens(wanted: Wanted, name: str) -> Values:
    raise AddsNothing("an image becomes token ids, and nothing else of what its tower computes reaches the logits")


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
