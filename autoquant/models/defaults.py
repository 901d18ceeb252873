"""Default configurations whose parts do not fit: a tower hands over vectors that its language model cannot take.

A model type's default configuration is the defaults of its parts side by side, and nobody may ever have put an image
into it. Text runs all the same. What the fields themselves say is mended at once; what may be meant otherwise is tried
with an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from autoquant.models.build import META, changed, two_layers
from autoquant.models.inputs import make_inputs
from autoquant.models.sizes import OUTPUTS, fewer_positions, merged_width, own_width
from autoquant.models.source import PLACEHOLDER, ModelSource, build_module, standard_field, sub_configs, text_config

_TOWER = re.compile(r"vision|visual|audio")
_READS = re.compile(r"^(encoder|vision|image|audio)_(hidden_size|width)$")
"""Fields that say how wide the vectors are that a part is given by another one."""
_FRACTION = re.compile(r"\d+/(\d+)")


def fit_parts_(config: Any) -> dict[str, Any]:
    """Make the parts of a default configuration fit, where their fields say how, and choose the tokens that stand for
    an image where none is set. The changed fields by dotted path, with their new values.
    """
    parts = sub_configs(config)
    if len(parts) < 2:
        return {}
    text = text_config(config)
    hidden, words = standard_field(text, "hidden_size"), standard_field(text, "vocab_size")
    changes: dict[str, Any] = {}
    places = {name: match for name in vars(config) if (match := PLACEHOLDER.search(name))}
    for name, match in places.items():
        if match["video"] and any(other["image"] for other in places.values()):
            continue  # images alone are made
        if vars(config)[name] is None and words is not None:
            changes[name] = words - 1 - len(changes)
    merged = {width for part in parts.values() if (width := merged_width(part)) is not None}
    for path, part in parts.items():
        fields = vars(part)
        # Beside a width of its own (embed_dim), a tower's hidden_size is what it hands over.
        tower = _TOWER.search(path) is not None
        names = [*OUTPUTS, *["output_dim"] * tower, *["hidden_size"] * (tower and type(fields.get("embed_dim")) is int)]
        names += ["hidden_size"] * (path == "" and part is not text)
        names += ["text_hidden_size"] * (part is not text)
        for name in names:
            # What a projector takes is as wide as merged patches are, and not as the language model.
            taken = name in OUTPUTS and fields.get(name) in merged
            if hidden is not None and type(fields.get(name)) is int and fields[name] != hidden and not taken:
                changes[f"{path}.{name}".lstrip(".")] = hidden
        ratio, handed = fields.get("pixel_shuffle_ratio"), fields.get("projector_output_dim")
        shuffled: dict[str, Any] = {}
        if ratio and handed:
            shuffled = {"intermediate_size": round(part.hidden_size / ratio**2), "vision_output_dim": handed}
        for name, value in shuffled.items():
            if fields.get(name) not in (None, value):
                changes[f"{path}.{name}"] = value
    for name, value in changes.items():
        path, _, leaf = name.rpartition(".")
        setattr(parts[path], leaf, value)
    return changes


def changes_for_images(source: ModelSource) -> dict[str, Any]:
    """Fields of a default configuration, by dotted path, with values that let a model run on an image or a sound that
    it does not run on; none where it does, and where no other value helps.
    """
    found: dict[str, Any] = {}
    proposals = list(_proposals(source.config))
    failed = _not_made(source, source.config) if proposals else ()
    for name, value in proposals:
        if not failed:
            break
        left = _not_made(source, changed(source.config, {**found, name: value}))
        if len(left) < len(failed):
            found, failed = {**found, name: value}, left
    return found


def _not_made(source: ModelSource, config: Any) -> tuple[str, ...]:
    """Inputs that two layers of a configuration cannot be called with."""
    module = build_module(source, two_layers(changed(config, fewer_positions(config))), META, torch.float32)
    return tuple(make_inputs(module, META, (1, 3), torch.float32).missing)


def _proposals(config: Any) -> Iterator[tuple[str, Any]]:
    """Other values of fields that may be about something else: of a tower that is the architecture's own, what it
    projects to; of the fraction of each edge that is kept, half of it, where every second patch is taken; of what a
    part reads that is as wide as no part is, the width of each, first of one that is named so; of a list of channels
    that ends as wide as no part is, the width of each at its end.
    """
    widths = {own_width(part): path for path, part in sub_configs(config).items()}
    hidden = standard_field(text_config(config), "hidden_size")
    for path, part in sub_configs(config).items():
        own = _TOWER.search(path) is not None and type(part).__module__ == type(config).__module__
        for name, value in vars(part).items():
            if own and name == "projection_dim" and hidden is not None and value != hidden:
                yield f"{path}.{name}", hidden
            elif isinstance(value, str) and (kept := _FRACTION.fullmatch(value)) and int(kept[1]) % 2 == 0:
                yield f"{path}.{name}".lstrip("."), f"{int(kept[1]) // 2}/{kept[1]}"
            elif (
                path
                and name.endswith("_channels")
                and isinstance(value, list | tuple)
                and set(value[-1:]) - set(widths)
            ):
                for width in filter(None, widths):
                    yield f"{path}.{name}", type(value)([*value[:-1], width])
            elif path and type(value) is int and value not in widths and (read := _READS.search(name)):
                for width in sorted(filter(None, widths), key=lambda width: read[1] not in widths[width]):
                    yield f"{path}.{name}", width
