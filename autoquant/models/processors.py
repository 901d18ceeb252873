"""What the library's own image processor makes of a small image, for any configuration that it has one for.

Its shapes, and what it counts and numbers (grids, sizes, masks), say how the model wants its image; the pixels
themselves are random, or have no values.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from autoquant.errors import AutoQuantError
from autoquant.models.layouts import Fields, Values, Wanted, edge, feature_methods, first, part
from autoquant.models.source import sub_configs

_TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
_OFF = ("do_image_splitting", "split_image", "slice_mode", "crop_to_patches", "apply_ocr")
"""What cuts an image into several, and one would do; what reads it."""
_PACKAGES = ((r"(?i)torchvision", "torchvision"), (r"\bPIL\b", "pillow"))
_EDGE = 1 << 14
"""The longest edge of an image: a size beyond it counts pixels."""


def processed_image(wanted: Wanted, name: str) -> Values:
    """Inputs that the image processor of ``wanted``'s configuration makes of one small image, ``name`` among them.

    Raises AutoQuantError where there is no such processor, or where it needs a package that is not installed.
    """
    kind = _processor(wanted.module.config)
    try:
        from PIL import Image

        sizes, size = _sizes(kind().to_dict(), wanted.fields)
        output = kind(**sizes)(Image.effect_noise((size, size), 64).convert("RGB"), return_tensors="pt")
    except ImportError as error:
        package = next((known for name, known in _PACKAGES if re.search(name, str(error))), "a package")
        raise AutoQuantError(
            f"its image processor {kind.__name__} needs {package}: pip install autoquant[multimodal]"
        ) from error
    tensors = {key: value for key, value in output.items() if isinstance(value, Tensor)}
    taken = {
        key: value
        for key, value in tensors.items()
        if key in inputs_taken(wanted.module, wanted.names, "image") and key not in _TEXT
    }
    if name not in taken:
        raise AutoQuantError(f"its image processor {kind.__name__} makes {', '.join(output)}, and no {name}")
    return {k: wanted.floats(*value.shape) if value.is_floating_point() else value for k, value in taken.items()}


def _processor(config: Any) -> Any:
    """The class of the image processor for a configuration, or for a part of it; the one that needs pillow alone."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    for described in sub_configs(config).values():
        try:
            kinds: Any = IMAGE_PROCESSOR_MAPPING[type(described)]
        except KeyError:
            continue
        for backend in ("pil", "torchvision"):
            if kinds.get(backend) is not None:
                return kinds[backend]
    raise AutoQuantError(f"transformers has no image processor for {type(config).__name__}")


def inputs_taken(module: Any, named: Iterable[str], what: str) -> Collection[str]:
    """What a forward has ``named`` and what the methods that make features of an ``image`` or an ``audio`` name."""
    methods = feature_methods(module, what)
    return {*named, *(name for method in methods for name in inspect.signature(method).parameters)}


def _sizes(settings: Fields, fields: Fields) -> tuple[dict[str, Any], int]:
    """Settings of a processor for the sizes of a model, and the edge, in pixels, of an image that becomes few tokens.

    ``settings``: those of the processor. ``fields``: those of the model's configuration.
    """
    vision = part(fields, "vision|image|visual|vit|encoder")
    patch = edge(first(vision, "patch_size", "spatial_patch_size") or first(settings, "patch_size")) or 16
    merge = first({**fields, **vision}, "spatial_merge_size", "merge_size", "downsample_factor") or 2
    size = edge(first(vision, "image_size", "input_size", "img_size")) or max(4, 2 * merge) * patch
    known = {
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": first(vision, "temporal_patch_size", "patch_temporal"),
        "image_grid_pinpoints": fields.get("image_grid_pinpoints"),
        "high_res_size": edge(first(part(fields, "high_res"), "image_size")) or size,
        **dict.fromkeys(("size", "crop_size", "tile_size", "scale_resolution"), size),
        **dict.fromkeys(("min_image_size", "max_image_size"), size),
        **dict.fromkeys(("min_pixels", "max_pixels"), size * size),
        **dict.fromkeys(_OFF, False),
    }
    changes = {name: _like(old, known[name]) for name, old in settings.items() if known.get(name) is not None}
    return changes, size


def _like(old: Any, value: Any) -> Any:
    """``value`` in the form of ``old``: itself, or for each of its keys, squared where these count pixels."""
    if not isinstance(old, Mapping):
        return value
    pixels = any(type(entry) is int and entry > _EDGE for entry in old.values())
    return dict.fromkeys(old, value * value if pixels else value)
