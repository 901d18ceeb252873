from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from autoquant.calibration.observers import observe_cache
from autoquant.errors import AutoQuantError
from autoquant.executor.online import install_ as install_rotations_
from autoquant.executor.resolved import ResolvedOnline
from autoquant.quantizer import int8
from autoquant.quantizer.kv_cache import (
    Int8Cache,
    KVScales,
    cache_bytes,
    install_,
    kv_scales,
    new_cache,
    pack,
    quantize_cache_,
    unpack,
)
from autoquant.quantizer.prefix import fix_prefix_, prefixed
from autoquant.quantizer.strategies import Granularity

VOCABULARY, LAYERS, KV_HEADS, HEAD = 64, 3, 2, 16


def model(kind: str = "llama", **changes: Any) -> Any:
    """A small random causal LM; norm weights and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
    config = AutoConfig.for_model(kind, **(sizes | heads | {"pad_token_id": 0, "bos_token_id": 1} | changes))
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if "norm" in name else parameter.mul_(4)
    return made


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def maxima_of(made: Any, tokens: Tensor) -> dict[str, dict[int, Tensor]]:
    with torch.no_grad(), observe_cache(made) as maxima:
        made(tokens)
    return maxima


def quantized(granularity: Granularity, kind: str = "llama", **changes: Any) -> Any:
    made = model(kind, **changes)
    quantize_cache_(made, granularity, maxima_of(made, ids(24)) if granularity.is_static else None)
    return made


@pytest.mark.parametrize("granularity", Granularity)
def test_what_is_unpacked_is_what_was_packed_rounded(granularity: Granularity) -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    x[0, :, 1] *= 50
    static = torch.tensor(0.5) if granularity.is_static else None
    scale = {
        Granularity.TENSOR_STATIC: torch.tensor(0.5),
        Granularity.TENSOR_DYNAMIC: x.abs().max() / 127,
        Granularity.TOKEN_DYNAMIC: x.abs().amax((1, 3), keepdim=True) / 127,
    }[granularity]
    rows = pack(x, granularity, static)
    assert rows.dtype == torch.int8
    assert rows.shape == (2, 1, 5, 3 * 4 + (0 if granularity.is_static else 4))
    kept = int8.dequantize(int8.quantize(x, scale), scale)
    assert torch.equal(unpack(rows, 3, torch.float32, granularity, static), kept)
    assert unpack(rows, 3, torch.bfloat16, granularity, static).dtype == torch.bfloat16


def test_a_static_cache_without_scales_says_so() -> None:
    with pytest.raises(AutoQuantError, match="calibrate first"):
        pack(torch.ones(1, 1, 1, 4), Granularity.TENSOR_STATIC, None)
    with pytest.raises(AutoQuantError, match="key and value maxima of a calibration pass"):
        quantize_cache_(model(), Granularity.TENSOR_STATIC)


def test_maxima_are_those_of_the_cached_tensors() -> None:
    from transformers import DynamicCache

    made, tokens = model(), ids(11, batch=2)
    cache = DynamicCache(config=made.config)
    with torch.no_grad():
        made(tokens, past_key_values=cache)
    maxima = maxima_of(made, tokens)
    for number, layer in enumerate(cache.layers):
        assert torch.equal(maxima["key"][number], layer.keys.abs().amax((0, 2)))
        assert torch.equal(maxima["value"][number], layer.values.abs().amax((0, 2)))
    scales = kv_scales(made, Granularity.TENSOR_STATIC, maxima)
    assert torch.equal(scales.value, torch.stack([layer.values.abs().max() / 127 for layer in cache.layers]))
    assert not made._forward_pre_hooks, "the hook was left behind"


@pytest.mark.parametrize("granularity", Granularity)
@torch.no_grad()
def test_logits_are_close_to_the_float_models_but_not_equal(granularity: Granularity) -> None:
    tokens = ids(24)
    wanted, got = model()(tokens).logits, quantized(granularity)(tokens).logits
    error = ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert 1e-4 < error < 0.1, f"{granularity}: {error}"


# Per-tensor dynamic scales span what one call stores, so they cannot agree between one call and several.
@pytest.mark.parametrize("granularity", [Granularity.TENSOR_STATIC, Granularity.TOKEN_DYNAMIC])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_token_by_token_is_the_same_as_at_once(granularity: Granularity, kind: str) -> None:
    made, tokens = quantized(granularity, kind, **({"sliding_window": 6} if kind == "gemma2" else {})), ids(16)
    whole = made(tokens).logits
    cache, rows = None, []
    for position in range(tokens.shape[1]):
        out = made(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits)
    assert isinstance(cache, Int8Cache)
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())


@pytest.mark.parametrize("granularity", Granularity)
@torch.no_grad()
def test_generate_uses_it_beams_and_batches_included(granularity: Granularity) -> None:
    made, tokens = quantized(granularity), ids(5, batch=2)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    out = made.generate(tokens, **settings, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, Int8Cache)
    assert all(layer.keys.dtype == torch.int8 for layer in out.past_key_values.layers)
    given = made.generate(tokens, **settings, past_key_values=new_cache(made, made.kv_cache_int8))
    assert torch.equal(out.sequences, given)
    assert made.generate(tokens, **settings, num_beams=3).shape == out.sequences.shape


def test_memory_halves_against_bfloat16() -> None:
    from transformers import DynamicCache

    length, sizes = 40, {}
    half = model().bfloat16()
    for granularity in Granularity:
        made = quantized(granularity).bfloat16()
        with torch.no_grad():
            cache = made(ids(length), use_cache=True).past_key_values
        sizes[granularity] = cache_bytes(cache)
    plain = DynamicCache(config=half.config)
    with torch.no_grad():
        half(ids(length), past_key_values=plain)
    values = 2 * LAYERS * length * KV_HEADS * HEAD  # keys and values
    assert cache_bytes(plain) == 2 * values
    assert sizes == {
        Granularity.TENSOR_STATIC: values,
        Granularity.TENSOR_DYNAMIC: values + 2 * LAYERS * length * 4,
        Granularity.TOKEN_DYNAMIC: values + 2 * LAYERS * length * 4,
    }


@torch.no_grad()
def test_cropping_and_reordering_keep_scales_with_their_tokens() -> None:
    made, tokens = quantized(Granularity.TOKEN_DYNAMIC), ids(8, batch=2)
    cache = made(tokens, use_cache=True).past_key_values
    whole = copy.deepcopy(cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    again = made(tokens[:, 5:], past_key_values=cache, use_cache=True).past_key_values
    for ours, theirs in zip(again.layers, whole.layers, strict=True):
        assert torch.equal(ours.keys[..., :5, :], theirs.keys[..., :5, :])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys[0, ..., :5, :], whole.layers[0].keys[1, ..., :5, :])


def test_scales_stay_float32_and_are_in_the_state_dict() -> None:
    made = quantized(Granularity.TENSOR_STATIC)
    key = made.state_dict()["kv_cache_int8.key"].clone()
    made.half()
    assert made.kv_cache_int8.key.dtype == torch.float32 and torch.equal(made.kv_cache_int8.key, key)
    assert "kv_cache_int8_per_tensor_static" in repr(made.kv_cache_int8)


def test_what_cannot_be_done_is_refused() -> None:
    from transformers import DynamicCache

    made = quantized(Granularity.TOKEN_DYNAMIC)
    with pytest.raises(AutoQuantError, match="already has an int8 cache"):
        quantize_cache_(made, Granularity.TOKEN_DYNAMIC)
    filled = DynamicCache(config=made.config)
    with torch.no_grad():
        model()(ids(3), past_key_values=filled)
        with pytest.raises(AutoQuantError, match="it was given a filled DynamicCache"):
            made(ids(1), past_key_values=filled)
    scales = KVScales(Granularity.TOKEN_DYNAMIC, None, None)
    with pytest.raises(AutoQuantError, match="no attention layers with a cache"):
        install_(model("mamba", state_size=4), scales)


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("with_prefix", [False, True])
@torch.no_grad()
def test_keys_are_quantized_behind_their_online_rotation(granularity: Granularity, with_prefix: bool) -> None:
    made, tokens = model(), ids(24)
    made.model.layers[0].self_attn.k_proj.weight[3] *= 30  # one large channel, which the rotation spreads
    wanted, plain = made(tokens).logits, maxima_of(made, tokens)
    unrotated = copy.deepcopy(made)
    install_rotations_(made, [ResolvedOnline("R3", f"model.layers.{i}.self_attn", HEAD, None) for i in range(LAYERS)])
    torch.testing.assert_close(made(tokens).logits, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    with prefixed(made, tokens[0, :1].tolist() if with_prefix else ()):
        maxima = maxima_of(made, tokens)
    assert maxima["key"][0].max() < 0.8 * plain["key"][0].max()
    errors = []
    for one, found in ((made, maxima), (unrotated, plain)):
        prefix = tokens[0, :1].tolist() if with_prefix else []
        fix_prefix_(one, prefix)
        quantize_cache_(one, granularity, found)
        out = one(tokens, use_cache=True)
        errors.append(((out.logits - wanted).square().mean() / wanted.square().mean()).sqrt().item())
        split = one(tokens[:, :9], use_cache=True)
        rest = one(tokens[:, 9:], past_key_values=split.past_key_values)
        if granularity is not Granularity.TENSOR_DYNAMIC:
            torch.testing.assert_close(rest.logits, out.logits[:, 9:], rtol=1e-3, atol=1e-2)
    assert 1e-4 < errors[0] < 0.8 * errors[1], errors


@torch.no_grad()
def test_a_caller_that_wants_no_cache_gets_none() -> None:
    made, tokens = quantized(Granularity.TOKEN_DYNAMIC), ids(6)
    assert made(tokens, use_cache=False).past_key_values is None
    assert isinstance(made(tokens, use_cache=True).past_key_values, Int8Cache)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(made.generate(tokens, **settings, use_cache=False), made.generate(tokens, **settings))
