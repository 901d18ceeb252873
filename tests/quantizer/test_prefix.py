from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from autoquant.calibration.observers import observe_cache, observe_linears
from autoquant.errors import AutoQuantError
from autoquant.quantizer.kv_cache import Int8Cache, quantize_cache_
from autoquant.quantizer.prefix import (
    MODULE,
    compute_prefix,
    fix_prefix_,
    install_prefix_,
    prefixed,
    stored_prefix,
)
from autoquant.quantizer.prefix_cache import PrefixedCache
from autoquant.quantizer.strategies import Granularity

VOCABULARY, LAYERS, KV_HEADS, HEAD, BOS = 64, 3, 2, 16, 1
PREFIX = (BOS, 7, 9)
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}


def model(kind: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A small causal LM with large random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
    special = {"pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": None}
    config = AutoConfig.for_model(kind, **(sizes | heads | special | changes))
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)
    return made.to(dtype)


def ids(length: int, batch: int = 2, start: tuple[int, ...] = (BOS,)) -> Tensor:
    """Random tokens, none of them of the prefix, behind ``start``."""
    tokens = torch.randint(10, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(batch, -1), tokens], 1)


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def generate(made: Any, tokens: Tensor, **settings: Any) -> Any:
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)} | settings
    return made.generate(tokens, **settings)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_bos_as_the_prefix_changes_no_function(kind: str, dtype: torch.dtype) -> None:
    shape = {} if kind == "llama" else {"n_embd": 64, "n_layer": LAYERS, "n_head": 4}
    made, tokens = model(kind, dtype, **shape), ids(12)
    wanted, bound = made(tokens).logits, BOUNDS[dtype]
    scale = largest(wanted)
    fix_prefix_(made, (BOS,))
    hidden = tokens[:, 1:]
    assert largest(made(tokens).logits - wanted) < bound * scale
    assert largest(made(tokens, attention_mask=torch.ones_like(tokens)).logits - wanted) < bound * scale
    assert largest(made(hidden).logits - wanted[:, 1:]) < bound * scale
    assert largest(made(hidden, attention_mask=torch.ones_like(hidden)).logits - wanted[:, 1:]) < bound * scale
    alone = made(tokens[:, :1])
    assert alone.logits.shape == (2, 1, VOCABULARY) and largest(alone.logits - wanted[:, :1]) < bound * scale
    behind = made(tokens[:, 1:], past_key_values=alone.past_key_values).logits
    assert largest(behind - wanted[:, 1:]) < bound * scale


@pytest.mark.parametrize(
    "keep", [1, 5, 12, 13, 100, torch.tensor([0, 12]), torch.tensor([3])], ids=lambda keep: str(keep).replace(" ", "")
)
@torch.no_grad()
def test_logits_to_keep_counts_the_callers_tokens(keep: int | Tensor) -> None:
    made, tokens = model(), ids(12)
    wanted = made(tokens, logits_to_keep=keep).logits
    with prefixed(made, (BOS,)):
        got = made(tokens, logits_to_keep=keep).logits
        alone = made(tokens[:, :1], logits_to_keep=1).logits
    assert got.shape == wanted.shape and largest(got - wanted) < 1e-10 * largest(wanted)
    assert alone.shape == (2, 1, VOCABULARY)


@torch.no_grad()
def test_what_a_longer_prefix_means() -> None:
    """Against the model given the prefix in its input."""
    made, tokens = model(), ids(6, start=())
    whole = made(torch.cat([torch.tensor(PREFIX).expand(2, -1), tokens], 1)).logits
    fix_prefix_(made, PREFIX)
    for start, covered in ((PREFIX, 3), ((BOS,), 1), ((), 0)):
        given = ids(6, start=start)
        out = made(given, attention_mask=torch.ones_like(given))
        assert largest(out.logits - whole[:, 3 - covered :]) < 1e-10, start
        assert out.past_key_values.get_seq_length() == given.shape[1], "what is hidden is not counted"
        first = made(given[:, : covered + 2], position_ids=torch.arange(covered + 2)[None])
        rest = made(given[:, covered + 2 :], past_key_values=first.past_key_values).logits
        assert largest(torch.cat([first.logits, rest], 1) - out.logits) < 1e-10, start


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("start", [PREFIX, (BOS,), ()], ids=str)
@torch.no_grad()
def test_generate_continues_what_the_prefix_began(start: tuple[int, ...], settings: dict[str, Any]) -> None:
    made, tokens = model(), ids(6, start=start)
    whole = torch.cat([torch.tensor(PREFIX).expand(2, -1), tokens[:, len(start) :]], 1)
    wanted = generate(made, whole, **settings)[:, whole.shape[1] :]
    alone = generate(made, whole[:, :3], **settings)[:, 3:]
    fix_prefix_(made, PREFIX)
    assert torch.equal(generate(made, tokens, **settings)[:, tokens.shape[1] :], wanted)
    if start:
        assert torch.equal(generate(made, tokens[:, : len(start)], **settings)[:, len(start) :], alone)


@pytest.mark.parametrize("granularity", [None, Granularity.TENSOR_STATIC, Granularity.TOKEN_DYNAMIC])
@pytest.mark.parametrize("start", [PREFIX, (BOS,), ()], ids=str)
@torch.no_grad()
def test_a_cache_is_taken_up_again(start: tuple[int, ...], granularity: Granularity | None) -> None:
    made, tokens = model(), ids(6, start=start)
    with prefixed(made, PREFIX), observe_cache(made) as maxima:
        made(tokens)
    fix_prefix_(made, PREFIX)
    if granularity is not None:
        quantize_cache_(made, granularity, maxima)
    first = generate(made, tokens, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, Int8Cache if granularity else PrefixedCache)
    longer = torch.cat([first.sequences, tokens[:, -3:]], 1)
    wanted = generate(made, longer)
    assert torch.equal(generate(made, longer, past_key_values=first.past_key_values), wanted)
    assert torch.equal(generate(made, longer, use_cache=False), wanted)
    first.past_key_values.reset()
    assert torch.equal(generate(made, longer, past_key_values=first.past_key_values), wanted), "begun anew"


@pytest.mark.parametrize("granularity", Granularity)
@torch.no_grad()
def test_the_prefix_stays_in_floating_point_in_an_int8_cache(granularity: Granularity) -> None:
    made, tokens = model(dtype=torch.float32), ids(8)
    wanted, prefix = made(tokens).logits, compute_prefix(made, (BOS,))
    with prefixed(made, (BOS,)), observe_cache(made) as maxima:
        made(tokens)
    for kind, states in (("key", prefix.keys), ("value", prefix.values)):
        assert all(maxima[kind][layer].shape == (KV_HEADS, HEAD) for layer in range(LAYERS))
        assert all(not torch.equal(maxima[kind][i], states[i].abs()[0, :, 0]) for i in range(LAYERS))
    exact = copy.deepcopy(made)
    install_prefix_(exact, prefix)
    quantize_cache_(made, granularity, maxima)
    install_prefix_(made, prefix)
    out = made(tokens)
    error = ((out.logits - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert torch.equal(out.logits[:, 0], exact(tokens).logits[:, 0]) and 1e-4 < error < 0.1
    layer = out.past_key_values.layers[0]
    assert layer.keys.dtype == torch.int8 and layer.keys.shape[2] == 8 and layer.get_seq_length() == 9
    keys, _ = layer.update(torch.ones(2, KV_HEADS, 1, HEAD), torch.ones(2, KV_HEADS, 1, HEAD))
    assert torch.equal(keys[:, :, :1], prefix.keys[0].expand(2, -1, -1, -1))


@torch.no_grad()
def test_observers_see_what_is_behind_the_prefix_and_nothing_is_left() -> None:
    made, tokens = model(), ids(5, batch=1)
    made.model.embed_tokens.weight[BOS] *= 1e4
    name = "model.layers.0.self_attn.o_proj.weight"
    inputs: list[Tensor] = []
    handle = made.get_submodule(name.removesuffix(".weight")).register_forward_hook(lambda _, x, y: inputs.append(x[0]))
    with prefixed(made, (BOS,)), observe_linears(made, [name]) as maxima:
        made(tokens)
    made(tokens)
    handle.remove()
    alone, whole = inputs[-2:]
    assert alone.shape[1] == 5 and whole.shape[1] == 6
    torch.testing.assert_close(maxima[name], whole[0, 1:].abs().amax(0).float())
    assert not made._forward_pre_hooks and not made._forward_hooks and not hasattr(made, MODULE)
    before = made.state_dict().keys()
    with prefixed(made, ()):
        assert made.state_dict().keys() == before and not made._forward_pre_hooks


@torch.no_grad()
def test_a_copy_and_a_stored_prefix_compute_the_same() -> None:
    made, tokens = model(dtype=torch.float32), ids(5)
    fix_prefix_(made, PREFIX)
    wanted = made(tokens).logits
    assert torch.equal(copy.deepcopy(made)(tokens).logits, wanted)
    state = made.state_dict()
    other = model(dtype=torch.float32)
    install_prefix_(other, stored_prefix(state, PREFIX))
    assert torch.equal(other(tokens).logits, wanted)
    assert other.half()(tokens).logits.dtype == torch.float16
    assert f"tokens={PREFIX}" in repr(other)
    for gone, message in (("logits", "no prefix is stored"), ("value_1", r"'fixed_prefix.value_1' is missing")):
        with pytest.raises(AutoQuantError, match=message):
            stored_prefix({name: t for name, t in state.items() if name != f"{MODULE}.{gone}"}, PREFIX)
    with pytest.raises(AutoQuantError, match=r"has 3 tokens, quantization\.prefix 1"):
        stored_prefix(state, (BOS,))


@torch.no_grad()
def test_what_a_prefix_cannot_serve_is_refused() -> None:
    from transformers import DynamicCache

    made, tokens = model(), ids(5)
    filled = DynamicCache(config=made.config)
    made(tokens, past_key_values=filled)
    prefix = compute_prefix(made, (BOS,))
    install_prefix_(made, prefix)

    def refused(message: str, *arguments: Any, **named: Any) -> None:
        with pytest.raises(AutoQuantError, match=message):
            made(*arguments, **named)

    mask = torch.ones_like(tokens)
    mask[1, 0] = 0
    refused("some rows of the batch begin with the prefix", torch.cat([tokens[:1, 1:], tokens[:1, :-1]]))
    refused("padded on the left", tokens, attention_mask=mask)
    refused("filled without", tokens[:, 1:], past_key_values=filled)
    refused("takes no labels", tokens, labels=tokens)
    refused("takes token ids", inputs_embeds=made.model.embed_tokens(tokens))
    refused(r"attention masks \[batch, length\] only", tokens, attention_mask=torch.ones(2, 1, 6, 6))
    refused("returns no tuples", tokens, return_dict=False)
    with pytest.raises(AutoQuantError, match="already has a prefix"):
        fix_prefix_(made, (BOS,))
    with pytest.raises(AutoQuantError, match="already has a prefix"):
        install_prefix_(made, prefix)
    right = torch.ones_like(tokens)
    right[1, -1] = 0
    assert made(tokens, attention_mask=right).logits.shape == (2, 6, VOCABULARY), "padding on the right is served"
    for wrong in ((VOCABULARY,), (-1,)):
        with pytest.raises(AutoQuantError, match="expected token ids from 0 to 63"):
            fix_prefix_(model(), wrong)
    int8 = model()
    quantize_cache_(int8, Granularity.TOKEN_DYNAMIC)
    with pytest.raises(AutoQuantError, match="already has an int8 cache"):
        fix_prefix_(int8, (BOS,))


@pytest.mark.parametrize(
    ("kind", "shape", "layer"),
    [
        ("gemma2", {"sliding_window": 6}, "layer 0 keeps its state in a DynamicSlidingWindowLayer"),
        ("mamba", {"state_size": 4}, "layer 0 keeps its state in a LinearAttentionLayer"),
        ("qwen3_next", {"layer_types": ["full_attention", "linear_attention"] * 2, "num_hidden_layers": 4}, "layer 1"),
    ],
)
def test_layers_that_keep_another_state_are_refused_by_their_kind(kind: str, shape: dict[str, Any], layer: str) -> None:
    made = model(kind, torch.float32, **shape)
    for attempt in (compute_prefix, fix_prefix_):
        with pytest.raises(AutoQuantError, match=f"{layer}.*set quantization.prefix to"):
            attempt(made, (BOS,))
    assert not hasattr(made, MODULE)
