"""The same architecture, small, with real weights: what the certificate runs.

Sizes are reduced by what their configuration fields are called (heads, head dimensions, experts, widths) and by how
their values relate: a width that was heads x head size, or a multiple of the hidden size, stays so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoquant.capture.copies import copied
from autoquant.capture.state import kept_state, plain_tensors
from autoquant.errors import AutoQuantError
from autoquant.library_patches import pytree
from autoquant.models.build import build, build_meta, changed, with_inputs
from autoquant.models.sizes import given_sooner, reductions
from autoquant.models.source import (
    LoadedModel,
    ModelSource,
    build_module,
    call_factory,
    layer_count,
    limit_layers,
    one_line,
    quiet,
    sub_configs,
    text_config,
)

_LARGEST = 100_000_000  # parameters of what is still called small: 0.8 GB in float64
_LARGEST_WHOLE = 400_000_000  # with a layer of every kind, or a part that nothing makes smaller: a proof holds three


def small(source: ModelSource, seed: int = 0, *, each: int = 1) -> LoadedModel:
    """``source`` with reduced sizes and random weights on the CPU; two sequences of eight tokens, or one with an image.

    float64, or float32 where a kernel refuses float64. Enough layers are kept for ``each`` of every kind, or for all
    where there are fewer. A factory is called at its own size.

    Raises :class:`AutoQuantError` where no reduction can be built and run.
    """
    if source.config is None:
        return _small_factory(source, seed)
    missing = build_meta(source).missing  # what the full-size model is traced without, its proof goes without too
    config = _reduced(source, missing, each)
    # Grouped matrix products, the default for experts, have no float64 kernel everywhere.
    for dtype, experts in (
        (torch.float64, None),
        (torch.float64, "batched_mm"),
        (torch.float64, "eager"),
        (torch.float32, None),
    ):
        with _seeded(seed):
            model = build_module(source, config, torch.device("cpu"), dtype)
        _set_experts_(model, experts)
        randomise_(model, seed)
        loaded = with_inputs(model, torch.device("cpu"), dtype, (2, 8), seed, without=missing)
        failure = _lost(loaded) or failure_of(loaded)
        if failure is None:
            return loaded
    raise AutoQuantError(f"{source.name}: its small model cannot be run: {one_line(failure)}") from failure


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is drawn is drawn from ``seed``: vectors keep what construction gives them, which may be random."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def grouped_experts(loaded: LoadedModel) -> Iterator[None]:
    """Experts as grouped matrix products, to capture a small model by the same operators as the full-size one.

    Such a graph runs in float64 where the module itself may not. Does nothing where there are no experts.
    """
    if loaded.config is None:
        yield
        return
    before = [(part, part.get_experts_implementation()) for part in _with_experts(loaded.module)]
    _set_experts_(loaded.module, None)
    try:
        yield
    finally:
        for part, implementation in before:
            part.set_experts_implementation(implementation)


def _set_experts_(module: nn.Module, implementation: str | None) -> None:
    """Set how experts are computed (None: the default), the inner models last.

    An outer model that has no choice itself takes eager experts by default, and hands that on to a part that has one.
    """
    for part in _with_experts(module):
        part.set_experts_implementation(implementation)


def _with_experts(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if hasattr(part, "set_experts_implementation")]


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


@contextlib.contextmanager
def forward_in_float64_(module: nn.Module) -> Iterator[None]:
    """The forward of ``module`` under :func:`float64_throughout`, and nothing around it.

    A tracer may not run under that: it makes tensors like those that it is given, in float32 too.
    """
    forward = module.forward

    @functools.wraps(forward)
    def wide(*args: Any, **kwargs: Any) -> Any:
        with float64_throughout():
            return forward(*args, **kwargs)

    before = {name: value for name, value in vars(module).items() if name == "forward"}
    vars(module)["forward"] = wide
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)


def widened(loaded: LoadedModel) -> LoadedModel:
    """In float64 throughout where it runs so under :func:`float64_throughout`, else as it is.

    Some models make tensors of the default dtype on their way, or keep a router in float32, and do not run in any other
    unless that changes too.
    """
    floats = {
        name for name, held in loaded.kwargs.items() if isinstance(held, torch.Tensor) and held.is_floating_point()
    }
    kwargs = {name: held.double() if name in floats else held for name, held in loaded.kwargs.items()}
    wide = replace(loaded, module=copied(loaded.module).double(), kwargs=kwargs)
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
        with _seeded(seed):
            made = call_factory(source, torch.device("cpu"))
        made.module.to(dtype)
        for part in made.module.modules():  # caches in plain attributes: else every call would make them anew
            tensors = {name: tensor for name, tensor in plain_tensors(part).items() if tensor.is_floating_point()}
            vars(part).update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        randomise_(made.module, seed)
        leaves, tree = pytree.tree_flatten((made.args, made.kwargs))
        floats = [isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves]
        leaves = [leaf.to(dtype) if is_float else leaf for leaf, is_float in zip(leaves, floats, strict=True)]
        made = LoadedModel(made.module, *pytree.tree_unflatten(leaves, tree))
        failure = failure_of(made)
        if failure is None:
            return made
    raise AutoQuantError(f"{source.name}: cannot be run: {one_line(failure)}") from failure


def _reduced(source: ModelSource, missing: Collection[str], each: int) -> Any:
    """A small configuration that builds and runs, of as few layers as show every kind ``each`` times.

    Where the reduction as a whole is refused, heads keep their size; else the one field, or the one part of the
    configuration, whose original values make it acceptable is given those back, else one field after the other.
    """
    changes = reductions(source.config)
    most = _allowed(source, changes)
    first = failure = _refusal(source, changes, missing, most)
    if failure is not None:
        for fewer in _fewer(source.config, changes):
            failure = _refusal(source, fewer, missing, most)
            if failure is None:
                changes = fewer
                break
    if failure is not None:
        raise AutoQuantError(f"{source.name}: no small model of it can be built: {one_line(first)}") from first
    config = _changed(source.config, changes)
    if layer_count(config) is None:
        return config
    kinds = layer_kinds(build_module(source, config, torch.device("meta"), torch.float32), config)
    sooner, depth = given_sooner(config)
    config = changed(config, sooner)
    limit_layers(config, max(2, depth, _shown(kinds, each)))
    size = _size(source, config)
    if size > _LARGEST_WHOLE:
        raise AutoQuantError(
            f"{source.name}: its small model has {size:,} parameters in {layer_count(config)} layers, more than "
            f"{_LARGEST_WHOLE:,}"
        )
    return config


def _shown(kinds: Sequence[int], each: int) -> int:
    """How many first layers hold ``each`` of every kind, or all of those that there are fewer of."""
    needed = 0
    for kind in set(kinds):
        layers = [layer for layer, other in enumerate(kinds) if other == kind]
        needed = max(needed, layers[:each][-1] + 1)
    return needed


def _fewer(config: Any, changes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Other reductions to try, those that change most first."""
    if computed := _computed(config, changes):
        yield {**changes, **computed}
    yield reductions(config, keep_heads=True)
    if (wide := reductions(config, as_wide=True)) != changes:
        yield wide
    for name in changes:
        yield {key: value for key, value in changes.items() if key != name}
    parts = dict.fromkeys(name.rpartition(".")[0] for name in changes)
    if len(parts) > 1:
        for part in parts:
            yield {key: value for key, value in changes.items() if key.rpartition(".")[0] != part}
    names = list(changes)
    for count in range(len(names) - 1, -1, -1):
        yield {name: changes[name] for name in names[:count]}


def _computed(config: Any, changes: Mapping[str, Any]) -> dict[str, int]:
    """What the classes of a configuration compute, on construction, of fields that ``changes`` changes: by dotted path,
    the fields that are none of the constructor's arguments and hold what it made of them.
    """
    found: dict[str, int] = {}
    after = sub_configs(changed(config, changes))
    for path, before in sub_configs(config).items():
        old, new = _constructed(before), _constructed(after[path])
        for name, value in vars(before).items():
            now = new.get(name)
            if type(value) is int and type(now) is int and value == old.get(name) != now:
                found[f"{path}.{name}".lstrip(".")] = now
    return {name: value for name, value in found.items() if name not in changes}


def _constructed(part: Any) -> dict[str, Any]:
    """The fields that the class of ``part`` computes of its arguments; none where it does not take them as they are."""
    taken = set(inspect.signature(type(part)).parameters)
    with contextlib.suppress(Exception):  # the class's own checks
        made = type(part)(**{name: value for name, value in copy.deepcopy(vars(part)).items() if name in taken})
        return {name: value for name, value in vars(made).items() if name not in taken}
    return {}


def _allowed(source: ModelSource, changes: Mapping[str, Any]) -> int:
    """Parameters that two layers may have: more by a part that the changes, all of them, leave large as it is."""
    with contextlib.suppress(Exception):  # what this configuration cannot be built of is refused with its reason
        least = _size(source, _two_layers(source.config, changes))
        if least > _LARGEST:
            return min(least + _LARGEST, _LARGEST_WHOLE)
    return _LARGEST


def _two_layers(config: Any, changes: Mapping[str, Any]) -> Any:
    config = _changed(config, changes)
    if layer_count(config) is not None:
        limit_layers(config, 2)
    return config


def _size(source: ModelSource, config: Any) -> int:
    return parameters(build_module(source, config, torch.device("meta"), torch.float32))


def _refusal(source: ModelSource, changes: Mapping[str, Any], missing: Collection[str], most: int) -> Exception | None:
    """Why two layers of the changed configuration cannot be built or run, None if they can.

    ``missing``: inputs that the model is run without. ``most``: parameters that they may have.
    """
    try:
        config = _two_layers(source.config, changes)
        size = _size(source, config)
        if size > most:
            raise AutoQuantError(f"{size:,} parameters in two layers, more than {most:,}")
        loaded = build(source, config, torch.device("cpu"), torch.float32, missing)
        return _lost(loaded) or failure_of(loaded)
    except Exception as error:  # a configuration's own checks, or the architecture's code
        return error


def _lost(loaded: LoadedModel) -> AutoQuantError | None:
    """That an input which the full-size model takes could not be made, None where all of them were."""
    missing = loaded.missing
    return AutoQuantError(f"no {min(missing)}: {missing[min(missing)]}") if missing else None


def failure_of(loaded: LoadedModel) -> Exception | None:
    """Why the model cannot be run on its own inputs, None if it can.

    A factory's module may write into its own tensors, which are put back. Models of transformers are left as their
    first run leaves them: one that rescales its weights notes that in an attribute, and both belong together.
    """
    kept = kept_state(loaded.module) if loaded.config is None else contextlib.nullcontext()
    try:
        with quiet(), kept, torch.random.fork_rng(devices=()), torch.no_grad():
            loaded.module(*loaded.args, **loaded.kwargs)
    except Exception as error:  # the architecture's code
        return error
    return None


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    config = changed(config, changes)
    _lower_token_ids_(sub_configs(config).values(), _vocabulary(config))
    return config


def _lower_token_ids_(parts: Iterable[Any], vocabulary: int) -> None:
    """Special tokens beyond the vocabulary become its last ones, and stay apart from each other where there is room."""
    ids = [
        (part, name, value)
        for part in parts
        for name, value in vars(part).items()
        if _is_token(part, name) and type(value) is int and value >= vocabulary
    ]
    order = sorted({value for _, _, value in ids})
    for part, name, value in ids:
        setattr(part, name, max(0, vocabulary - 1 - order.index(value)))


def _is_token(part: Any, name: str) -> bool:
    """Whether a field holds the id of a special token, under that name or under another one for it."""
    names = {name, *(other for other, field in type(part).attribute_map.items() if field == name)}
    return any(other.endswith(("_token_id", "_token_index")) for other in names)


def parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _vocabulary(config: Any) -> int:
    return int(text_config(config).vocab_size)
