"""The same architecture, small, with real weights: what the certificate runs.

Sizes are reduced by what their configuration fields are called (heads, head dimensions, experts, widths) and by how
their values relate: a width that was heads x head size, or a multiple of the hidden size, stays so.
"""

from __future__ import annotations

import contextlib
import copy
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autoquant.errors import AutoQuantError
from autoquant.models.source import (
    LoadedModel,
    ModelSource,
    build,
    build_meta,
    call_factory,
    layer_count,
    limit_layers,
    one_line,
    quiet,
    standard_field,
    text_config,
)

_VOCABULARY = 128
_LARGEST = 100_000_000  # parameters of what is still called small: 0.8 GB in float64

# Fields that are counts or sizes by name, and are not to be touched: positions, windows, kernels, layers and the like.
_KEEP = re.compile(
    r"token|idx|layer|position|window|kernel|conv|patch|block|seq|length|scalar|pattern|period|seed|multipl|expand"
    r"|factor|max_|per_head|ngram|bucket|interval|_id$|_tp$"
)
_HEADS = re.compile(r"heads?$|num_query_groups")
_HEAD_SIZE = re.compile(r"head_?dim$|d_head|head_size|kv_channels|dim_head|rotary_dim")
_WIDTH = re.compile(r"size|dim|rank|width|inner|ffn|_ff$|dff|embd|d_model|d_ssm|channels|hidden")
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"vocab"), _VOCABULARY),
    (re.compile(r"per_tok$|moe_k$|moe_topk|top_k"), 2),
    (re.compile(r"topk_group"), 2),
    (re.compile(r"n_group$|expert_group"), 4),
    (re.compile(r"n_groups$"), 2),
    (re.compile(r"experts?$|num_experts|expert_num"), 8),
    (re.compile(r"state"), 8),
    (re.compile(r"chunk_size"), 16),
)


def small(source: ModelSource, seed: int = 0) -> LoadedModel:
    """``source`` with reduced sizes and random weights on the CPU, and two sequences of eight tokens.

    float64, or float32 where a kernel refuses float64. Enough layers are kept for one of every kind. A factory is
    called at its own size.

    Raises :class:`AutoQuantError` where no reduction can be built and run.
    """
    if source.config is None:
        return _small_factory(source, seed)
    config = _reduced(source)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(_vocabulary(config), (2, 8), generator=generator)
    # Grouped matrix products, the default for experts, have no float64 kernel everywhere.
    for dtype, experts in (
        (torch.float64, None),
        (torch.float64, "batched_mm"),
        (torch.float64, "eager"),
        (torch.float32, None),
    ):
        loaded = build(source, config, torch.device("cpu"), dtype)
        model: Any = loaded.module
        model.set_experts_implementation(experts)
        randomise_(loaded.module, seed)
        loaded = LoadedModel(loaded.module, (), dict.fromkeys(loaded.kwargs, tokens), loaded.config)
        failure = failure_of(loaded)
        if failure is None:
            return loaded
    raise AutoQuantError(f"{source.name}: its small model cannot be run: {one_line(failure)}") from failure


@contextlib.contextmanager
def grouped_experts(loaded: LoadedModel) -> Iterator[None]:
    """Experts as grouped matrix products, to capture a small model by the same operators as the full-size one.

    Such a graph runs in float64 where the module itself may not. Does nothing where there are no experts.
    """
    if loaded.config is None:
        yield
        return
    model: Any = loaded.module
    before = model.get_experts_implementation()
    model.set_experts_implementation(None)  # its default
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Make torch functions that are told float32 take float64 instead.

    Models cast norms, softmax and rotary angles to float32 "for precision"; in a float64 model these casts lose it, and
    limit a proof to 1e-7.
    """

    class Widen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            return func(*map(_widened, args), **{key: _widened(value) for key, value in (kwargs or {}).items()})

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widen():
            yield
    finally:
        torch.set_default_dtype(default)


def widened(loaded: LoadedModel) -> LoadedModel:
    """In float64 throughout where it runs so under :func:`float64_throughout`, else as it is.

    Some models make tensors of the default dtype on their way, or keep a router in float32, and do not run in any other
    unless that changes too.
    """
    wide = LoadedModel(copy.deepcopy(loaded.module).double(), loaded.args, loaded.kwargs, loaded.config)
    return wide if runs_in_float64(wide) else loaded


def runs_in_float64(loaded: LoadedModel) -> bool:
    """Whether a model with float64 weights can be run under :func:`float64_throughout`."""
    if any(p.dtype is torch.float32 for p in loaded.module.parameters()):
        return False
    with float64_throughout():
        return failure_of(loaded) is None


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def randomise_(module: nn.Module, seed: int) -> None:
    """Give every parameter random values, so that no gain is 1 and no bias 0: those hide mistakes.

    Matrices ~ N(0, 1/columns), embeddings ~ N(0, 1), biases ~ N(0, 0.3^2); vectors keep their initial values (1 for
    a norm weight, 0 where the gain is 1 + weight, a state-space model's logarithms) plus U(-0.5, 0.5). Each parameter
    has a generator of its own, seeded by ``seed`` and its name.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            shape, double = parameter.shape, torch.float64
            normal = torch.randn(shape, generator=generator, dtype=double)
            if name.endswith("bias"):
                value = 0.3 * normal
            elif id(parameter) in embeddings:
                value = normal
            elif parameter.dim() > 1:
                value = normal / shape[-1] ** 0.5
            else:
                start = torch.nan_to_num(parameter.detach().to("cpu", double), nan=0.0, posinf=0.0, neginf=0.0)
                value = start + torch.rand(shape, generator=generator, dtype=double) - 0.5
            parameter.copy_(value)


def layer_kinds(module: nn.Module, config: Any) -> list[int]:
    """The kind of each repeated layer, as the index of the first layer like it.

    Two layers are alike if their modules, parameter shapes and plain attributes are, and the entries of every
    per-layer list of ``config``. Attributes that number the layers do not count.
    """
    count = layer_count(config) or 0
    stacks = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    lists = [
        value for value in vars(text_config(config)).values() if isinstance(value, list | tuple) and len(value) == count
    ]
    rows: list[dict[str, Any]] = [
        {f"list {i}": repr(value[layer]) for i, value in enumerate(lists)} for layer in range(count)
    ]
    for number, stack in enumerate(stacks):
        for layer, part in enumerate(stack):
            rows[layer].update({f"{number} {key}": value for key, value in _attributes(part)})
    keys = {key for row in rows for key in row}
    held = {key: [(layer, row[key]) for layer, row in enumerate(rows) if key in row] for key in keys}
    numbering = {key for key, values in held.items() if _numbers(values)}
    first: dict[Any, int] = {}
    return [
        first.setdefault(frozenset((key, value) for key, value in row.items() if key not in numbering), layer)
        for layer, row in enumerate(rows)
    ]


def _numbers(values: Sequence[tuple[int, Any]]) -> bool:
    """Whether an attribute is the number of the layer that has it, or differs in all of them and so derives from it."""
    return all(type(value) is int and value == layer for layer, value in values) or (
        len(values) > 2 and len({value for _, value in values}) == len(values)
    )


def _attributes(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in layer.named_modules():
        yield f"{path}:", type(part).__qualname__
        for name, parameter in part.named_parameters(recurse=False):
            yield f"{path}.{name}", tuple(parameter.shape)
        for name, value in vars(part).items():
            if isinstance(value, bool | int | float | str | None) and not name.startswith("_"):
                yield f"{path}.{name}", value


def _small_factory(source: ModelSource, seed: int) -> LoadedModel:
    size = parameters(build_meta(source).module)
    if size > _LARGEST:
        raise AutoQuantError(
            f"{source.name}: expected at most {_LARGEST:,} parameters for a proof on real weights, got {size:,}: "
            "let the factory make a smaller model of the same structure"
        )
    failure = None
    for dtype in (torch.float64, torch.float32):
        made = call_factory(source, torch.device("cpu"))
        made.module.to(dtype)
        randomise_(made.module, seed)
        leaves, tree = pytree.tree_flatten((made.args, made.kwargs))
        floats = [isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves]
        leaves = [leaf.to(dtype) if is_float else leaf for leaf, is_float in zip(leaves, floats, strict=True)]
        made = LoadedModel(made.module, *pytree.tree_unflatten(leaves, tree))
        failure = failure_of(made)
        if failure is None:
            return made
    raise AutoQuantError(f"{source.name}: cannot be run: {one_line(failure)}") from failure


def _reduced(source: ModelSource) -> Any:
    """A small configuration that builds and runs, of as few layers as show every kind.

    Where the reduction as a whole is refused, the one field whose original value makes it acceptable is given that
    back, else one after the other.
    """
    changes = _reductions(source.config)
    first = failure = _refusal(source, changes)
    while failure is not None and changes:
        for name in changes:
            fewer = {key: value for key, value in changes.items() if key != name}
            if _refusal(source, fewer) is None:
                changes, failure = fewer, None
                break
        else:
            changes = dict(list(changes.items())[:-1])
            failure = _refusal(source, changes)
    if failure is not None:
        raise AutoQuantError(f"{source.name}: no small model of it can be built: {one_line(first)}") from first
    config = _changed(source.config, changes)
    if layer_count(config) is None:
        return config
    kinds = layer_kinds(build(source, config, torch.device("meta"), torch.float32).module, config)
    limit_layers(config, max(2, max(kinds, default=0) + 1))
    return config


def _refusal(source: ModelSource, changes: Mapping[str, int]) -> Exception | None:
    """Why two layers of the changed configuration cannot be built or run, None if they can."""
    try:
        config = _changed(source.config, changes)
        if layer_count(config) is not None:
            limit_layers(config, 2)
        size = parameters(build(source, config, torch.device("meta"), torch.float32).module)
        if size > _LARGEST:
            raise AutoQuantError(f"{size:,} parameters in two layers, more than {_LARGEST:,}")
        return failure_of(build(source, config, torch.device("cpu"), torch.float32))
    except Exception as error:  # a configuration's own checks, or the architecture's code
        return error


def failure_of(loaded: LoadedModel) -> Exception | None:
    """Why the model cannot be run on its own inputs, None if it can."""
    try:
        with quiet(), torch.random.fork_rng(devices=()), torch.no_grad():
            loaded.module(*loaded.args, **loaded.kwargs)
    except Exception as error:  # the architecture's code
        return error
    return None


def _changed(config: Any, changes: Mapping[str, int]) -> Any:
    config = copy.deepcopy(config)
    text = text_config(config)
    for name, value in changes.items():
        setattr(text, name, value)
    for name, value in vars(text).items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= _vocabulary(text):
            setattr(text, name, _vocabulary(text) - 1)
    return config


def parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _vocabulary(config: Any) -> int:
    return int(text_config(config).vocab_size)


def _reductions(config: Any) -> dict[str, int]:
    """New values of the text configuration's integer fields, by field name."""
    config = text_config(config)
    sizes = {name: value for name, value in vars(config).items() if type(value) is int and value > 1}
    changes: dict[str, int] = {}
    for name, value in sizes.items():
        limit = next((limit for pattern, limit in _LIMITS if pattern.search(name)), None)
        if limit is not None and not re.search(r"size$|dim$", name.replace("vocab_size", "").replace("state_size", "")):
            changes[name] = min(value, limit)
    rest = {name: value for name, value in sizes.items() if name not in changes and not _KEEP.search(name)}
    sizes_of_heads = {name: value for name, value in rest.items() if _HEAD_SIZE.search(name)}
    heads = {name: value for name, value in rest.items() if _HEADS.search(name) and name not in sizes_of_heads}
    queries = standard_field(config, "num_attention_heads") or max(heads.values(), default=1)
    hidden = standard_field(config, "hidden_size")
    head = standard_field(config, "head_dim") or (hidden // queries if hidden else 64)

    new_queries = _fewer_heads(queries, queries)
    new_head = _smaller_head(head)
    changes |= {name: _fewer_heads(value, queries) for name, value in heads.items()}
    changes |= {name: _smaller_head(value) for name, value in sizes_of_heads.items()}
    if not hidden:
        return changes
    inner = queries * head
    new_hidden = _new_hidden(hidden, inner, new_queries * new_head) if heads else 64
    width = _narrower(hidden, new_hidden, inner, new_queries * new_head)
    for name, value in rest.items():
        if name not in changes and _WIDTH.search(name):
            changes[name] = width(value)
    return changes | _products(sizes, changes, heads, hidden, new_hidden)


def _fewer_heads(count: int, queries: int) -> int:
    """4 for the query heads (6 where their number is no power of two), half for fewer, twice for more."""
    new_queries = min(queries, 4 if queries & (queries - 1) == 0 else 6)
    if count == queries:
        return new_queries
    return max(1, new_queries // 2) if count < queries else 2 * new_queries


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

    Groups are told by what comes before 'head' in the names: ``mamba_n_heads`` goes with ``mamba_d_head``.
    """
    repaired: dict[str, int] = {}
    for count_name, count in heads.items():
        for size_name, size in sizes.items():
            same_group = _HEAD_SIZE.search(size_name) and _group(size_name) == _group(count_name) != ""
            if not same_group:
                continue
            new_product = changes[count_name] * changes[size_name]
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
    return re.sub(r"_?(num|n|d)?_?(query_|key_|value_|kv_)?head.*$", "", name)
