"""A fixed prefix, whose keys and values are computed once in floating point and stored with the model.

The first token of a sequence takes the attention that no other token wants (an attention sink, Xiao et al. 2024) and
carries activations hundreds of times larger than all others', which then decide static scales. PrefixQuant (Chen et al.
2024, "PrefixQuant: Eliminating Outliers by Prefixed Tokens for Large Language Models Quantization") and CushionCache
(Son et al. 2024, "Prefixing Attention Sinks can Mitigate Activation Outliers for Large Language Model Quantization")
put such tokens in front of every sequence and keep their keys and values: the massive activations are never computed
again, no later token becomes a sink, and what is left is quantized without them.

What a caller sees is the model without a prefix. Input that begins with the prefix's tokens is *covered* by it: these
tokens are not computed again, their stored logits are put in front of the others. So is a leading BOS token where the
prefix holds BOS somewhere, since a sequence has one beginning; its logits are those behind the whole prefix. In front
of any other input the prefix is put unseen: masks and positions are moved along, lengths that the caller asks for do
not count it. With BOS as the prefix a floating-point model's function is unchanged.

Memory: P tokens take 2 * H * D numbers per layer and V logits each; a cache holds them once for each sequence in
floating point, or once for all in an int8 cache.

Shapes: B sequences, H key/value heads, S tokens, P prefix tokens, D channels of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoquant.errors import AutoQuantError
from autoquant.models.caches import Cache, DynamicCache, DynamicLayer
from autoquant.models.reading import reads_in_halves
from autoquant.quantizer.kv_cache import MODULE as INT8_CACHE
from autoquant.quantizer.kv_cache import new_cache, replace_fields, wants_cache
from autoquant.quantizer.prefix_cache import Call, PrefixedCache, PrefixLayer

MODULE = "fixed_prefix"
PER_TOKEN = ("position_ids", "cache_position", "token_type_ids")
"""Arguments of transformers' models with one entry per input token on the last axis."""
Through = Callable[[nn.Module, Tensor, Cache], Tensor]
"""Runs token ids [1, P] through a model, which fills the cache; returns the logits [1, P, V]."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Token ids, keys and values of every layer [1, H, P, D], and the logits [P, V] behind each token."""

    tokens: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor


class FixedPrefix(nn.Module):
    """A prefix as a part of a model, its tensors being buffers: ``logits``, and ``key_0``, ``value_0`` for layer 0."""

    logits: Tensor

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.tokens = prefix.tokens
        self.layers = len(prefix.keys)
        self.register_buffer("logits", prefix.logits)
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self.register_buffer(f"key_{layer}", keys)
            self.register_buffer(f"value_{layer}", values)

    def states(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values of each layer, [1, H, P, D]."""
        return tuple((self.get_buffer(f"key_{i}"), self.get_buffer(f"value_{i}")) for i in range(self.layers))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}"


def at_once(model: nn.Module, ids: Tensor, cache: Cache) -> Tensor:
    """Through a model that is in memory, on its device."""
    logits: Tensor = model(ids.to(next(model.parameters()).device), past_key_values=cache, use_cache=True).logits
    return logits


@torch.no_grad()
def compute_prefix(model: nn.Module, tokens: Sequence[int], through: Through = at_once) -> Prefix:
    """Keys, values and logits of ``tokens`` from the model as it is, in its own dtype.

    To be called when the model is rotated and smoothed and not yet quantized. Raises AutoQuantError for tokens outside
    of the vocabulary, for a model whose cache is not plain attention over all tokens in every layer, and for one that
    has a prefix or an int8 cache already.
    """
    _check_cache(model)
    for name, what in ((MODULE, "a prefix"), (INT8_CACHE, "an int8 cache")):
        if hasattr(model, name):
            raise AutoQuantError(f"the model already has {what}: the prefix is computed before")
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # of transformers
    if not tokens or not all(0 <= token < vocabulary for token in tokens):
        raise AutoQuantError(f"quantization.prefix: {list(tokens)}: expected token ids from 0 to {vocabulary - 1}")
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]  # a PreTrainedConfig
    logits = through(model, torch.tensor([list(tokens)]), cache)[0]
    states = []
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)  # checked above
        if layer.keys is None or layer.values is None or layer.keys.shape[-2] != len(tokens):
            raise AutoQuantError(f"no prefix for this model: layer {number} did not cache the prefix's tokens")
        states.append((layer.keys, layer.values))
    if not logits.isfinite().all():
        raise AutoQuantError(f"quantization.prefix: {list(tokens)}: the model's logits are NaN or infinite")
    return Prefix(tuple(tokens), tuple(keys for keys, _ in states), tuple(values for _, values in states), logits)


def install_prefix_(model: nn.Module, prefix: Prefix) -> None:
    """Make ``model`` begin every sequence with the prefix, and register its tensors (hence in its checkpoint).

    Serves ``generate`` and forward passes of token ids, at the same shapes as before; hidden states and attentions, if
    asked for, are those of the tokens behind the covered ones. Raises AutoQuantError as :func:`compute_prefix` does.
    Forward passes raise it for what a prefix cannot serve: rows of which some begin with it and some do not, padding on
    the left, embeddings instead of ids, labels, a cache that was filled without the prefix.
    """
    _install(model, prefix)


def fix_prefix_(model: nn.Module, tokens: Sequence[int]) -> None:
    """Compute the prefix of the model as it is and install it; nothing without tokens. Errors as of both."""
    if tokens:
        install_prefix_(model, compute_prefix(model, tokens))


@contextmanager
def prefixed(model: nn.Module, tokens: Sequence[int], through: Through = at_once) -> Iterator[None]:
    """While the context is open the model begins every sequence with ``tokens``, computed from it now.

    Observers inside see the tokens behind the prefix only. Does nothing without tokens.
    """
    if not tokens:
        yield
        return
    handles = _install(model, compute_prefix(model, tokens, through))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        delattr(model, MODULE)


def stored_prefix(tensors: Mapping[str, Tensor], tokens: Sequence[int]) -> Prefix:
    """The prefix that a checkpoint's tensors hold. Raises AutoQuantError where it is not there or not of ``tokens``."""
    logits = tensors.get(f"{MODULE}.logits")
    layers = sum(name.startswith(f"{MODULE}.key_") for name in tensors)
    try:
        keys, values = (
            tuple(tensors[f"{MODULE}.{kind}_{layer}"] for layer in range(layers)) for kind in ("key", "value")
        )
    except KeyError as error:
        raise AutoQuantError(f"the prefix's tensor {error} is missing") from error
    if logits is None or not keys:
        raise AutoQuantError("quantization.prefix is not empty, and no prefix is stored")
    if any(length != len(tokens) for length in (len(logits), *(t.shape[-2] for t in (*keys, *values)))):
        raise AutoQuantError(f"the stored prefix has {len(logits)} tokens, quantization.prefix {len(tokens)}")
    return Prefix(tuple(tokens), keys, values, logits)


def _install(model: nn.Module, prefix: Prefix) -> tuple[RemovableHandle, ...]:
    _check_cache(model)
    if hasattr(model, MODULE):
        raise AutoQuantError("the model already has a prefix")
    model.add_module(MODULE, FixedPrefix(prefix))
    # Before all other hooks, so that they find the cache as the model will use it; called also behind an error, so that
    # a cache is never left in the model's view.
    return (
        model.register_forward_pre_hook(_before, prepend=True, with_kwargs=True),
        model.register_forward_hook(_behind, with_kwargs=True, always_call=True),
    )


def _check_cache(model: nn.Module) -> None:
    """Raise AutoQuantError for layers of which a prefix's keys and values would not be the whole state."""
    if reads_in_halves(model):
        raise AutoQuantError("no prefix for this model: it has an encoder and a decoder; set quantization.prefix to []")
    layers = DynamicCache(config=model.config).layers  # type: ignore[arg-type]  # a PreTrainedConfig
    for number, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            raise AutoQuantError(
                f"no prefix for this model: layer {number} keeps its state in a {type(layer).__name__}, and a prefix "
                "needs attention over all tokens in every layer; set quantization.prefix to []"
            )
    if not layers:
        raise AutoQuantError("no prefix for this model: it has no attention layers with a cache")


def _empty_cache(model: nn.Module, hidden: int) -> PrefixedCache:
    """A cache that holds the prefix alone, int8 behind it where the model's cache is."""
    module = _module(model)
    if hasattr(model, INT8_CACHE):
        cache: PrefixedCache = new_cache(model, model.get_submodule(INT8_CACHE), module.states())  # type: ignore[arg-type]  # ours
    else:
        cache = PrefixedCache(layers=[PrefixLayer(*states) for states in module.states()])
    cache.prefix_length, cache.hidden = len(module.tokens), hidden
    return cache


def _module(model: nn.Module) -> FixedPrefix:
    module = model.get_submodule(MODULE)
    assert isinstance(module, FixedPrefix)
    return module


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the prefix into the cache, take what it covers out of the input, and move masks and positions along."""
    kwargs = {**kwargs}
    ids = args[0] if args else kwargs.pop("input_ids", None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(args) > 1 or kwargs.get("inputs_embeds") is not None:
        raise AutoQuantError("a model with a prefix takes token ids [batch, length]; name all other arguments")
    if kwargs.get("labels") is not None:
        raise AutoQuantError("a model with a prefix takes no labels: compute the loss from its logits")
    given, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise AutoQuantError("a model with a prefix takes attention masks [batch, length] only")
    keep = kwargs.get("logits_to_keep", 0)
    length = len(_module(model).tokens)
    if given is None or given.get_seq_length() == 0:
        if mask is not None and not mask[:, 0].all():
            raise AutoQuantError("a model with a prefix takes no rows padded on the left: pad on the right")
        covered = _covered(model, ids)
        cache = _empty_cache(model, length - covered)
    elif isinstance(given, PrefixedCache) and given.prefix_length == length:
        cache, covered = given, 0
    else:
        raise AutoQuantError(
            f"this model's sequences begin with a prefix; it was given a {type(given).__name__} filled without"
        )
    returned = cache if given is not None or wants_cache(model, kwargs) else None
    if covered == ids.shape[1]:  # nothing is left to compute: any pass will do, its results are replaced
        through = PrefixedCache(layers=DynamicCache(config=model.config).layers)  # type: ignore[arg-type]  # as above
        through.call = Call(covered, True, keep, returned)
        return (ids,), {**kwargs, "past_key_values": through}
    if isinstance(keep, Tensor):
        kwargs["logits_to_keep"] = 0
    for name in PER_TOKEN:
        if kwargs.get(name) is not None:
            shift = 0 if name == "token_type_ids" else cache.hidden
            kwargs[name] = kwargs[name][..., covered:] + shift
    if mask is not None and cache.hidden:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), cache.hidden), mask], 1)
    cache.call = Call(covered, False, keep, returned)
    cache.inside = True
    return (ids[:, covered:],), {**kwargs, "past_key_values": cache}


def _covered(model: nn.Module, ids: Tensor) -> int:
    """How many leading tokens of every row the prefix stands for."""
    prefix = torch.tensor(_module(model).tokens, device=ids.device)
    bos = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)  # type: ignore[union-attr, operator]
    counts = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    if isinstance(bos, int) and bos in prefix.tolist() and ids.shape[1]:
        counts[ids[:, 0] == bos] = 1
    if ids.shape[1] >= len(prefix):
        counts[(ids[:, : len(prefix)] == prefix).all(1)] = len(prefix)
    if (counts != counts[0]).any():
        raise AutoQuantError("some rows of the batch begin with the prefix and some do not: run them apart")
    return int(counts[0])


def _behind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Put the covered tokens' logits in front of the others, and hand out the cache if it was asked for."""
    used = kwargs.get("past_key_values")
    if not isinstance(used, PrefixedCache) or used.call is None:
        return None
    call, used.call, used.inside = used.call, None, False
    if output is None:  # the pass failed
        return None
    if not hasattr(output, "logits"):
        raise AutoQuantError("a model with a prefix returns no tuples: leave return_dict alone")
    logits: Tensor = output.logits
    front = _module(model).logits[len(_module(model).tokens) - call.covered :].to(logits)
    front = front.expand(len(logits), -1, -1)
    logits = front if call.all_covered else torch.cat([front, logits], 1)
    if isinstance(call.keep, Tensor):
        logits = logits[:, call.keep]
    elif call.keep:
        logits = logits[:, -call.keep :]
    return replace_fields(output, logits=logits, past_key_values=call.cache)
