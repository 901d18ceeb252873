"""Key/value caches in int8, as transformers' ``Cache`` objects.

A layer keeps its tokens as int8 rows ``[B, 1, S, H * D]``. With dynamic scales, the 4 bytes of a token's float32 scale
follow its values in the same row, so that cropping, reordering and sliding windows, which transformers does by slicing
the rows, keep values and scales together and need no code here. Bytes per token and layer, keys or values: H * D (+ 4)
against 2 * H * D in bfloat16.

Keys are quantized after the rotary embedding, where the cache receives them, and behind an online rotation (R3) where
the model has one: it is carried out here instead of in the attention. What a forward pass attends to is always what was
stored, its own tokens included: prefill, decoding and evaluation see the same keys and values.

The keys and values of a fixed prefix stay in floating point: P * H * D numbers, once for all sequences of a batch.

Shapes: B sequences, H key/value heads, S tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import AutoQuantError
from autoquant.executor.online import key_rotations
from autoquant.models.caches import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from autoquant.models.reading import reads_in_halves
from autoquant.quantizer import int8
from autoquant.quantizer.prefix_cache import PatientLayer, PrefixedCache
from autoquant.quantizer.strategies import Granularity

CacheMaxima = Mapping[str, Mapping[int, Tensor]]
"""``key`` and ``value``: layer -> largest magnitude per channel, float32 [H, D]."""

SCALE_BYTES = 4
MODULE = "kv_cache_int8"


class KVScales(nn.Module):
    """How a model's cache is quantized: the granularity, and static scales [layers] as buffers (None when dynamic)."""

    key: Tensor | None
    value: Tensor | None

    def __init__(self, granularity: Granularity, key: Tensor | None, value: Tensor | None) -> None:
        super().__init__()
        self.granularity = granularity
        self.register_buffer("key", key)
        self.register_buffer("value", value)

    def _apply(self, fn: Any, recurse: bool = True) -> KVScales:
        """Follow the model to another device, never to another dtype."""
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self

    def extra_repr(self) -> str:
        return f"kv_cache_int8_{self.granularity.value}"


def pack(x_BHSD: Tensor, granularity: Granularity, scale: Tensor | None) -> Tensor:
    """Int8 rows [B, 1, S, H * D (+ 4)] of keys or values; ``scale`` is the static one.

    "Per token" is one scale per token over all heads; "per tensor dynamic" one per call, kept with each of its tokens.
    """
    rows = x_BHSD.transpose(1, 2).flatten(2).unsqueeze(1)
    if granularity.is_static:
        if scale is None:
            raise AutoQuantError("a static int8 cache has no scale: calibrate first")
        return int8.quantize(rows, scale)
    dynamic = int8.absmax_scale(rows, (-1,) if granularity is Granularity.TOKEN_DYNAMIC else None)
    trailer = dynamic.expand(*rows.shape[:-1], 1).contiguous().view(torch.int8)
    return torch.cat([int8.quantize(rows, dynamic), trailer], -1)


def unpack(rows: Tensor, heads: int, dtype: torch.dtype, granularity: Granularity, scale: Tensor | None) -> Tensor:
    """The keys or values [B, H, S, D] that :func:`pack` stored."""
    if not granularity.is_static:
        scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
        rows = rows[..., :-SCALE_BYTES]
    assert scale is not None  # pack refused a static cache without a scale
    return (
        int8.dequantize(rows, scale).to(dtype).squeeze(1).view(rows.shape[0], rows.shape[2], heads, -1).transpose(1, 2)
    )


class Int8Layer(PatientLayer):
    """One layer's cache, all tokens. Subclasses transformers' layer because ``Cache`` recognises nothing else.

    ``prefix``: keys and values [1, H, P, D] in front of all others, in floating point. ``rotation``: that of the keys.
    """

    def __init__(
        self,
        granularity: Granularity,
        key_scale: Tensor | None,
        value_scale: Tensor | None,
        prefix: tuple[Tensor, Tensor] | None = None,
        rotation: nn.Module | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self.granularity, self.key_scale, self.value_scale = granularity, key_scale, value_scale
        self.prefix, self.rotation = prefix, rotation

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = _update(self, DynamicLayer, key_states, value_states)
        if self.prefix is None:
            return keys, values
        front = rotated(self.prefix[0].to(keys), self.rotation), self.prefix[1].to(values)
        batch = len(keys)
        return (
            torch.cat([front[0].expand(batch, -1, -1, -1), keys], 2),
            torch.cat([front[1].expand(batch, -1, -1, -1), values], 2),
        )

    def get_seq_length(self) -> int:
        length: int = super().get_seq_length()
        return length if self.prefix is None else length + self.prefix[0].shape[-2]


class Int8SlidingLayer(DynamicSlidingWindowLayer):
    """One layer's cache, the tokens of a sliding window."""

    def __init__(
        self,
        sliding_window: int,
        granularity: Granularity,
        key_scale: Tensor | None,
        value_scale: Tensor | None,
        rotation: nn.Module | None = None,
    ) -> None:
        super().__init__(sliding_window)
        self.granularity, self.key_scale, self.value_scale = granularity, key_scale, value_scale
        self.rotation = rotation

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _update(self, DynamicSlidingWindowLayer, key_states, value_states)


def _update(
    layer: Int8Layer | Int8SlidingLayer, plain: type[Any], keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Let transformers' own layer append and trim the rows; return what it kept, in floating point."""
    granularity = layer.granularity
    keys = rotated(keys, layer.rotation)
    rows = plain.update(layer, pack(keys, granularity, layer.key_scale), pack(values, granularity, layer.value_scale))
    return (
        unpack(rows[0], keys.shape[1], keys.dtype, granularity, layer.key_scale),
        unpack(rows[1], values.shape[1], values.dtype, granularity, layer.value_scale),
    )


def rotated(keys: Tensor, rotation: nn.Module | None) -> Tensor:
    """Keys behind the online rotation of their layer, if it has one."""
    result: Tensor = keys if rotation is None else rotation(keys)
    return result


class Int8Cache(PrefixedCache):
    """An int8 cache for ``model.generate(past_key_values=...)`` and for forward passes.

    ``layers`` come from the model's config: full and sliding attention in int8; layers without attention (Mamba states,
    convolutions) as transformers has them. ``prefix``: for each layer the keys and values that it begins with, or
    nothing. ``rotations``: those of the keys, by layer. Raises AutoQuantError for hybrid layers that hold both in one
    object.
    """

    def __init__(
        self,
        config: Any,
        granularity: Granularity,
        key: Tensor | None = None,
        value: Tensor | None = None,
        prefix: Sequence[tuple[Tensor, Tensor]] = (),
        rotations: Mapping[int, nn.Module] | None = None,
    ) -> None:
        layers = []
        for i, layer in enumerate(DynamicCache(config=config).layers):
            scales = (None if key is None else key[i], None if value is None else value[i])
            rotation = (rotations or {}).get(i)
            layers.append(_int8_layer(layer, granularity, *scales, prefix[i] if prefix else None, rotation))
        super().__init__(layers=layers)


def _int8_layer(
    layer: Any,
    granularity: Granularity,
    key: Tensor | None,
    value: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    rotation: nn.Module | None,
) -> Any:
    if type(layer) is DynamicLayer:
        return Int8Layer(granularity, key, value, prefix, rotation)
    if type(layer) is DynamicSlidingWindowLayer:
        return Int8SlidingLayer(layer.sliding_window, granularity, key, value, rotation)
    if isinstance(layer, DynamicLayer):
        raise AutoQuantError(
            f"no int8 cache for layers of kind {type(layer).__name__}: choose a strategy without kv_cache"
        )
    return layer


def quantize_cache_(model: nn.Module, granularity: Granularity, maxima: CacheMaxima | None = None) -> None:
    """Make ``model`` use an int8 cache from now on, in ``generate`` and in every forward pass.

    ``maxima`` are those of :func:`observe_cache`, needed by static scales. Raises AutoQuantError without them.
    """
    install_(model, kv_scales(model, granularity, maxima))


def check_one_stack(model: nn.Module) -> None:
    """Raise AutoQuantError for an encoder-decoder: its cache holds what the encoder made, beside the decoder's own."""
    if reads_in_halves(model):
        raise AutoQuantError(
            "the keys and values of an encoder-decoder are neither observed nor cached in int8: choose a strategy "
            "without kv_cache, and disable query_key groups"
        )


def kv_scales(model: nn.Module, granularity: Granularity, maxima: CacheMaxima | None = None) -> KVScales:
    """The scales that :func:`quantize_cache_` installs; one for each layer of the model's cache."""
    key = value = None
    if granularity.is_static:
        if not maxima:
            raise AutoQuantError("a static int8 cache needs the key and value maxima of a calibration pass")
        key, value = (_static_scales(model, maxima[name]) for name in ("key", "value"))
    return KVScales(granularity, key, value)


def empty_kv_scales(model: nn.Module, granularity: Granularity) -> KVScales:
    """What :func:`kv_scales` gives, in shape alone: its static scales are zeros."""
    if not granularity.is_static:
        return KVScales(granularity, None, None)
    layers = len(DynamicCache(config=model.config).layers)  # type: ignore[arg-type]  # a PreTrainedConfig
    return KVScales(granularity, torch.zeros(layers), torch.zeros(layers))


def _static_scales(model: nn.Module, maxima: Mapping[int, Tensor]) -> Tensor:
    """Float32 [layers]."""
    layers = DynamicCache(config=model.config).layers  # type: ignore[arg-type]  # a PreTrainedConfig
    largest = torch.zeros(len(layers), dtype=torch.float32)
    for layer, maximum in maxima.items():
        largest[layer] = maximum.max()
    scales = int8.scale_of(largest)
    if not scales.isfinite().all():
        raise AutoQuantError("keys or values were NaN or infinite during calibration")
    return scales.to(next(iter(maxima.values())).device)


def install_(model: nn.Module, scales: KVScales) -> None:
    """Register the scales with the model (hence in its checkpoint) and the hook that hands out the cache."""
    if hasattr(model, MODULE):
        raise AutoQuantError("the model already has an int8 cache")
    check_one_stack(model)
    cache = new_cache(model, scales)  # a layer that cannot be quantized shows now
    if not any(isinstance(layer, Int8Layer | Int8SlidingLayer) for layer in cache.layers):
        raise AutoQuantError("the model has no attention layers with a cache: choose a strategy without kv_cache")
    model.add_module(MODULE, scales)
    for rotation in key_rotations(model).values():
        rotation.keys_are_rotated = True  # by the cache, from now on
    model.register_forward_pre_hook(_use_int8_cache, with_kwargs=True)
    model.register_forward_hook(_withhold_cache, with_kwargs=True)


def new_cache(model: nn.Module, scales: KVScales, prefix: Sequence[tuple[Tensor, Tensor]] = ()) -> Int8Cache:
    """An int8 cache for ``model``, empty but for the keys and values of a prefix, one pair [1, H, P, D] for a layer."""
    return Int8Cache(model.config, scales.granularity, scales.key, scales.value, prefix, rotations=key_rotations(model))


def _use_int8_cache(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace no cache, or the empty one that ``generate`` makes, by an int8 one."""
    given = kwargs.get("past_key_values")
    if isinstance(given, PrefixedCache) and given.call is not None:  # a prefix's hook chose it
        return args, kwargs
    if given is None or (not isinstance(given, Int8Cache) and given.get_seq_length() == 0):
        cache = new_cache(model, model.get_submodule(MODULE))  # type: ignore[arg-type]  # ours
        cache.wanted = given is not None or wants_cache(model, kwargs)
        kwargs = {**kwargs, "past_key_values": cache}
    elif not isinstance(given, Int8Cache):
        raise AutoQuantError(f"this model's cache is int8; it was given a filled {type(given).__name__}")
    return args, kwargs


def wants_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """True if a forward pass with these arguments returns its cache."""
    asked = kwargs.get("use_cache")
    return bool(getattr(model.config, "use_cache", True) if asked is None else asked)


def _withhold_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return no cache to a caller that wanted none: ``generate(use_cache=False)`` would go on with it."""
    used = kwargs.get("past_key_values")
    return replace_fields(output, past_key_values=None) if isinstance(used, Int8Cache) and not used.wanted else None


def replace_fields(output: Any, **fields: Any) -> Any:
    """A transformers output with other values; its own assignment keeps what is replaced by None under its key."""
    return type(output)(**{**dict(output.items()), **fields})


def cache_bytes(cache: Cache) -> int:
    """Bytes that the cached tokens of all attention layers take, scales included."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
