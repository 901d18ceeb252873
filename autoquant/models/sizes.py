"""Smaller sizes for a configuration's fields, by what they are called and by how their values relate."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from autoquant.models.source import (
    HEADS,
    LONGEST_SCAN,
    depths,
    layer_count,
    numbers_layers,
    standard_field,
    sub_configs,
    text_config,
)

_VOCABULARY = 128

# Fields that are counts or sizes by name, and are not to be touched: positions, windows, kernels, layers and the like.
_KEEP = re.compile(
    r"token|idx|layer|position|pos_emb|window|kernel|conv|patch|block|seq|length|scalar|pattern|period|seed|multipl|expand"
    r"|factor|max_|per_head|ngram|bucket|interval|_id$|_tp$"
)
_WINDOW = re.compile(r"compress\w*_(rate|ratio|stride)s?$")
_HEAD_SIZE = re.compile(r"head_?dim$|d_head|d_kv$|head_size|kv_channels|dim_head|rotary_dim")
_INWARD = re.compile(r"^(encoder|vision|image|audio|cross|proj)\w*_(hidden_size|dim|width)$")
_OUTWARD = re.compile(r"out|proj|llm|text|language")
OUTPUTS = ("out_hidden_size", "output_hidden_size")
"""Fields that hold how wide the vectors are which a tower hands over."""
_NUMBER = re.compile(r"layer_(id|idx|index)$")
GIVEN = re.compile(r"target_layers$|layer_map$")
"""Fields beside a language model that number those of its layers that are given something of their own, an image."""
_WIDTH = re.compile(r"size|dim|rank|width|inner|ffn|_ff$|dff|embd|d_model|d_ssm|channels|hidden")
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"vocab"), _VOCABULARY),
    (re.compile(r"per_tok$|moe_k$|topk$|moe_topk|top_k"), 2),
    (re.compile(r"topk_group"), 2),
    (re.compile(r"n_group$|expert_group"), 4),
    (re.compile(r"n_groups$"), 2),
    (re.compile(r"experts?$|num_experts|expert_num"), 8),
    (re.compile(r"state"), 8),
    (re.compile(r"base_channels$"), 32),  # as many as a norm of theirs has groups
    (re.compile(r"filters$"), 8),  # of a convolution's first stage: each further one doubles them
    (re.compile(r"chunk_size"), 16),
)


def reductions(config: Any, *, keep_heads: bool = False, as_wide: bool = False) -> dict[str, Any]:
    """New values of the integer fields of a configuration and of those that it holds, by dotted path.

    Widths that were equal across a model's parts, such as what a vision tower hands to the language model, stay so.
    With ``keep_heads`` the heads are fewer and as large as they were: for sizes that hang on them and are no fields.
    With ``as_wide`` a part that was itself as wide as the language model stays so, and its other widths with it: it may
    hand over its own vectors.
    """
    text = text_config(config)
    hidden = standard_field(text, "hidden_size")
    own = _part(text, keep_heads)
    wide = own.get(type(text).attribute_map.get("hidden_size", "hidden_size"))
    read = _layers_read(config)
    parts = {
        path: _part(part, keep_heads, wide if as_wide and own_width(part) == hidden else None)
        for path, part in sub_configs(config).items()
    }
    changes: dict[str, Any] = {}
    fewer: dict[str, dict[str, Any]] = {}
    for name, value in fewer_positions(config).items():
        fewer.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = value
    for path, part in sub_configs(config).items():
        if part is text:
            smaller = own | _narrower_layers(text, wide) | fewer.get(path, {})
            changes |= {_join(path, name): value for name, value in smaller.items()}
            continue
        smaller = parts[path] | _shallower(part, read) | fewer.get(path, {}) | _read(config, path, parts)
        smaller |= _handed(config, path, parts)
        if hidden is not None and wide is not None:
            smaller |= {name: wide for name in _widths_of(part, hidden, as_wide)}
        changes |= {_join(path, name): value for name, value in smaller.items()}
    return changes | shorter_windows(config)


def _narrower_layers(text: Any, wide: int | None) -> dict[str, list[int]]:
    """New values of the lists that hold a width of each layer of a language model, which is itself ``wide`` now."""
    hidden = own_width(text)
    if hidden is None or wide is None:
        return {}
    width, count = _narrower(hidden, wide, hidden, wide), layer_count(text)
    return {
        name: [width(entry) for entry in value]
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == count and _WIDTH.search(name) and not _KEEP.search(name)
        if all(type(entry) is int and entry > 1 for entry in value)
    }


def _read(config: Any, path: str, smaller: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """New values for fields of a part that hold the width of another one, whose vectors it reads."""
    parts = sub_configs(config)
    mine = own_width(parts[path])
    headless = not any(HEADS.search(name) for name in vars(parts[path]))  # then a size of heads is that of another part
    found: dict[str, int] = {}
    for name, value in vars(parts[path]).items():
        reads = _INWARD.search(name) or (headless and _HEAD_SIZE.search(name))
        for other, part in parts.items() if reads and type(value) is int and value != mine else ():
            wide = smaller[other].get(_width_field(part) or "")
            if part is not parts[path] and wide is not None and own_width(part) == value:
                found.setdefault(name, wide)
    return found


def _handed(config: Any, path: str, smaller: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """New values for fields of a part that hold what becomes of another one's vectors, or what they are to become.

    The last of a list of channels is the width of the part that reads them; patches of a tower that are merged lie side
    by side, as ``merged_width`` says.
    """
    parts = sub_configs(config)
    found: dict[str, Any] = {}
    for name, value in vars(parts[path]).items():
        for other, part in parts.items():
            old, new = own_width(part), smaller[other].get(_width_field(part) or "")
            if old is None or new is None or part is parts[path]:
                continue
            if name.endswith("_channels") and isinstance(value, list | tuple) and value and value[-1] == old:
                found.setdefault(name, type(value)([*value[:-1], new]))
            elif name in OUTPUTS and value == merged_width(part):
                found.setdefault(name, value // old * new)
    return found


def merged_width(part: Any) -> int | None:
    """How wide the vectors of a tower are after as many patches as its configuration says are merged into each."""
    fields, wide = vars(part), own_width(part)
    merge = next((fields[name] for name in ("spatial_merge_size", "merge_size") if type(fields.get(name)) is int), None)
    return None if wide is None or merge is None else wide * merge**2


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def fewer_positions(config: Any) -> dict[str, Any]:
    """Images of four patches by four, or of one window of the projector, and a short sound: no channel depends on it.

    What the configuration says of images of the old size goes with them: the grids that large ones are cut by, and how
    many vectors the patches of one become.
    """
    parts = sub_configs(config)
    fields = [(name, value) for part in parts.values() for name, value in vars(part).items()]
    rates = [value for name, value in fields if name == "downsample_rate" and isinstance(value, str)]  # "4/8"
    sides = [int(rate.partition("/")[2]) for rate in rates]
    side = max([4, *sides])
    changes = {_join(path, name): new for path in parts for name, new in _fewer_positions(parts[path], side).items()}
    for path, part in parts.items():
        edge, patch = changes.get(_join(path, "image_size")), getattr(part, "patch_size", None)
        if type(edge) is not int or type(patch) is not int:
            continue
        for other, around in parts.items():
            for name, value in vars(around).items():
                if name.endswith("pinpoints") and value:
                    changes[_join(other, name)] = [[size // part.image_size * edge for size in pair] for pair in value]
                # Vectors for each number of patches.
                if name.endswith("patch_to_query_dict") and isinstance(value, Mapping):
                    changes[_join(other, name)] = {(edge // patch) ** 2: 4}
    return changes


def shorter_windows(config: Any) -> dict[str, Any]:
    """Windows of tokens that become one each, two tokens long: else a few tokens fill none.

    A number, or one for each kind of layer. A list may say of what kind each layer is, and stays.
    """
    found: dict[str, Any] = {}
    for path, part in sub_configs(config).items():
        for name, value in vars(part).items():
            if not _WINDOW.search(name):
                continue
            if type(value) is int and value > 2:
                found[_join(path, name)] = 2
            elif isinstance(value, Mapping) and any(type(entry) is int and entry > 2 for entry in value.values()):
                found[_join(path, name)] = {k: min(v, 2) if type(v) is int else v for k, v in value.items()}
    return found


def _fewer_positions(part: Any, side: int) -> dict[str, Any]:
    fields = vars(part)
    limits = {"max_source_positions": 16, "mm_tokens_per_image": 4, "latent_query_num": 64}
    size, patch = fields.get("image_size"), fields.get("patch_size")
    if type(size) is int and type(patch) is int:
        limits["image_size"] = side * patch
    fewer: dict[str, Any] = {
        name: limit for name, limit in limits.items() if type(fields.get(name)) is int and fields[name] > limit
    }
    if isinstance(size, list | tuple) and patch:
        patches = [patch] * len(size) if isinstance(patch, int) else patch
        fewer["image_size"] = [side * edge for edge in patches]
        if fields.get("num_position_embeddings") == math.prod(map(operator.floordiv, size, patches)):
            fewer["num_position_embeddings"] = side ** len(size)
    return fewer


def _shallower(part: Any, least: int) -> dict[str, int]:
    """Two layers, or as many as show each value of the lists that say what kind every layer is, the first of those that
    are listed by number, and one behind a layer that has its number in a field of its own; ``least`` at least.
    """
    return {
        name: min(vars(part)[name], max(least, _shown(part, vars(part)[name])))
        for name in depths(part)
        if vars(part)[name] > 2
    }


def _layers_read(config: Any) -> int:
    """How many layers a tower needs for the lists of those whose outputs are read beside its last one's."""
    lists = [
        value
        for part in sub_configs(config).values()
        for name, value in vars(part).items()
        if name.endswith(("feature_layer", "feature_layers")) and isinstance(value, list | tuple)
    ]
    numbers = [number for value in lists for number in value]
    pairs = [_read_and_given(entry) for value in given_layers(config).values() for entry in value]
    numbers += [read for read, _ in pairs if read is not None]
    found: list[int] = [0, *(number + 1 if number >= 0 else -number for number in numbers)]
    return max(found)


def given_layers(config: Any) -> dict[str, Any]:
    """By dotted path, the lists beside a language model that number its layers: those that an image goes into.

    Each entry is such a number, or a pair: the layer of a tower that is read, and the number.
    """
    text = text_config(config)
    return {
        _join(path, name): value
        for path, part in sub_configs(config).items()
        if part is not text
        for name, value in vars(part).items()
        if GIVEN.search(name) and isinstance(value, list | tuple) and value and all(map(_is_given, value))
    }


def _is_given(entry: Any) -> bool:
    pair = entry if isinstance(entry, list | tuple) else [0, entry]
    return len(pair) == 2 and all(type(number) is int for number in pair) and pair[1] >= 0


def _read_and_given(entry: Any) -> tuple[int | None, int]:
    return (entry[0], entry[1]) if isinstance(entry, list | tuple) else (None, entry)


def given_sooner(config: Any) -> tuple[dict[str, Any], int]:
    """New values of :func:`given_layers` for a language model of fewer layers, and how many these are.

    One layer for each that is given something, in the same order, one before them and one behind where there is one.
    """
    given, count = given_layers(config), layer_count(config) or 0
    numbers = sorted(
        {number for value in given.values() for _, number in map(_read_and_given, value) if number < count}
    )
    if not numbers:
        return {}, 0
    new = {old: number for number, old in enumerate(numbers, min(1, numbers[0]))}
    changes: dict[str, Any] = {}
    for name, value in given.items():
        renumbered = [(read, new.get(number, number)) for read, number in map(_read_and_given, value)]
        changes[name] = [number if read is None else [read, number] for read, number in renumbered]
    return changes, new[numbers[-1]] + 2


def _shown(part: Any, count: int) -> int:
    lists = [value for value in vars(part).values() if isinstance(value, list | tuple) and len(value) == count]
    kinds = [value for value in lists if all(isinstance(entry, str | bool) for entry in value)]
    listed: list[int] = [value[0] for key, value in vars(part).items() if numbers_layers(key, value, count)]
    named = [v for key, v in vars(part).items() if _NUMBER.search(key) and type(v) is int and 0 <= v < count]
    listed += [min(number + 1, count - 1) for number in named]
    return max([2, *(value.index(entry) + 1 for value in kinds for entry in value), *(last + 1 for last in listed)])


def _widths_of(part: Any, hidden: int, as_wide: bool) -> list[str]:
    """Fields of a part that hold the width of the language model."""
    mine = own_width(part)
    names = [name for name, value in vars(part).items() if type(value) is int and value == hidden]
    return [name for name in names if _WIDTH.search(name) and (mine != hidden or as_wide or _OUTWARD.search(name))]


def own_width(part: Any) -> int | None:
    """How wide the vectors are that a part of a configuration makes; None where it does not say."""
    name = _width_field(part)
    return None if name is None else vars(part)[name]


def _width_field(part: Any) -> str | None:
    fields, standard = vars(part), type(part).attribute_map.get("hidden_size", "hidden_size")
    return next((name for name in ("embed_dim", "d_model", standard) if type(fields.get(name)) is int), None)


def _part(config: Any, keep_heads: bool, wide: int | None = None) -> dict[str, int]:
    """New values of one configuration's own integer fields, by field name; ``wide``: its own new width."""
    sizes = {name: value for name, value in vars(config).items() if type(value) is int and value > 1}
    changes: dict[str, int] = {}
    for name, value in sizes.items():
        limit = next((limit for pattern, limit in _LIMITS if pattern.search(name)), None)
        if name.endswith("chunk_size") and value > LONGEST_SCAN:
            continue
        if limit is not None and not re.search(r"size$|dim$", name.replace("vocab_size", "").replace("state_size", "")):
            changes[name] = min(value, limit)
    rest = {name: value for name, value in sizes.items() if name not in changes and not _KEEP.search(name)}
    sizes_of_heads = {name: value for name, value in rest.items() if _HEAD_SIZE.search(name)}
    heads = {name: value for name, value in rest.items() if HEADS.search(name) and name not in sizes_of_heads}
    queries = standard_field(config, "num_attention_heads") or max(heads.values(), default=1)
    hidden = own_width(config)
    head = standard_field(config, "head_dim") or (hidden // queries if hidden else 64)

    keys = standard_field(config, "num_key_value_heads") or queries
    shared = 1 < keys <= queries // 16
    new_queries = _fewer_heads(queries, queries, shared)
    new_head = head if keep_heads else _smaller_head(head)
    changes |= {name: _fewer_heads(value, queries, shared) for name, value in heads.items()}
    if not keep_heads:
        changes |= {name: _smaller_head(value) for name, value in sizes_of_heads.items()}
    if hidden and hidden < 64 and not heads:  # a code of a codebook: what its layers' widths relate to is the widest
        hidden = max((value for name, value in rest.items() if _WIDTH.search(name)), default=hidden)
    if not hidden:
        return changes
    inner = queries * head
    new_hidden = wide or (_new_hidden(hidden, inner, new_queries * new_head) if heads else min(hidden, 64))
    width = _narrower(hidden, new_hidden, inner, new_queries * new_head)
    for name, value in rest.items():
        if name not in changes and _WIDTH.search(name) and not (keep_heads and name in sizes_of_heads):
            changes[name] = width(value)
    return changes | _products(sizes, changes, heads, hidden, new_hidden)


def _fewer_heads(count: int, queries: int, shared: bool) -> int:
    """4 for the query heads (6 where their number is no power of two), half for fewer, twice for more.

    ``shared``: many queries share a key. Then they are 8, four for each key: where some layers have twice the keys, as
    no field says, two are left to share one.
    """
    new_queries = min(queries, 8 if shared else 4 if queries & (queries - 1) == 0 else 6)
    if count == queries:
        return new_queries
    return max(1, new_queries // (4 if shared else 2)) if count < queries else 2 * new_queries


def _smaller_head(size: int) -> int:
    """An eighth, in steps of 8, so that a quarter of it still has two rotary halves."""
    return min(size, max(8, -(-size // 64) * 8))


def _new_hidden(hidden: int, inner: int, new_inner: int) -> int:
    """Keeps ``inner == k * hidden`` if it holds, and the two apart if it does not."""
    if inner % hidden == 0 and new_inner % (inner // hidden) == 0 and new_inner * hidden // inner >= 16:
        return new_inner * hidden // inner
    near = max(32, hidden * new_inner // inner // 16 * 16)
    return near + 16 if near == new_inner else near


def _narrower(hidden: int, new_hidden: int, inner: int, new_inner: int) -> Callable[[int], int]:
    def width(value: int) -> int:
        if value % hidden == 0:
            return value // hidden * new_hidden
        if value == inner:
            return new_inner
        near = max(8, value * new_hidden // hidden // 8 * 8)
        return min(value, near + 8 if near in (new_hidden, new_inner) else near)

    return width


def _products(
    sizes: Mapping[str, int], changes: Mapping[str, int], heads: Mapping[str, int], hidden: int, new_hidden: int
) -> dict[str, int]:
    """Head sizes of further head groups (state-space layers), where heads x size is a width or a multiple of it.

    Groups are told by what comes before 'head' in the names: ``mamba_n_heads`` goes with ``mamba_d_head``, and
    ``n_mamba_heads`` with ``mamba_headdim``.
    """
    repaired: dict[str, int] = {}
    for count_name, count in heads.items():
        for size_name, size in sizes.items():
            same_group = _HEAD_SIZE.search(size_name) and _group(size_name) == _group(count_name) != ""
            if not same_group:
                continue
            new_product = changes[count_name] * changes.get(size_name, size)
            if count * size % hidden == 0:
                wanted = count * size // hidden * new_hidden
                if wanted % changes[count_name] == 0:
                    repaired[size_name] = wanted // changes[count_name]
                    continue
            repaired |= {
                name: new_product for name, value in sizes.items() if value == count * size and name in changes
            }
    return repaired


def _group(name: str) -> str:
    return re.sub(r"^(num|n)_|_?(num|n|d)?_?(query_|key_|value_|kv_)?head.*$", "", name)
