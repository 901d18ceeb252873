"""The calls that a claim must leave unchanged: several lengths, batches and offsets, padding, decoding with a cache."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from types import CellType
from typing import Any, cast

import torch
from torch import Tensor, nn

from autoquant.capture.graph import main_result
from autoquant.capture.state import is_own, kept_state
from autoquant.certificate.branches import sizes_that_matter
from autoquant.certificate.experts import force_choices
from autoquant.errors import AutoQuantError
from autoquant.library_patches import pytree
from autoquant.models.build import META, build_meta, changed
from autoquant.models.inputs import make_inputs, reads_text, takes_media
from autoquant.models.source import LoadedModel, ModelSource, build_module, one_line, quiet, sub_configs

LENGTHS = (1, 64)
"""Tokens of the runs beside the given one: the shortest, and more than any window of a small model."""
FACTORY_LENGTHS = (1, 12, 64, 160)
FACTORY_BATCHES = (1, 9)
WINDOW = 12
"""Tokens of a small model's windows: fewer than its longest run, and than a prefill with its decoded tokens."""
PREFILL, DECODED = 10, 4
CALLS, _MOST_CALLS = 3, 64
"""One after the other, of a module that keeps something of each: beyond a number in its code, up to the second."""
OFFSET, PADDING = 29, 3
_WINDOWS = re.compile(
    r"(^|_)window(_size)?$|^attention_chunk_size$|^original_max_position_embeddings$|local_attention$"
)
_SPAN = re.compile(r"window|chunk|local|context|position|len|span|block|period|stride")
_LONGEST = 1024

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One way to call a model; ``call`` returns what is compared. ``length``: tokens, 0 where they are not counted.

    Every run starts from the state that the model is in, and leaves it so.
    """

    name: str
    length: int
    call: Callable[[nn.Module], Outputs]
    within: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, module: nn.Module) -> Outputs:
        with quiet(), torch.random.fork_rng(devices=()), self.within(), kept_state(module):
            return self.call(module)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model returns in each run: the given inputs first."""

    runs: tuple[Run, ...]
    outputs: tuple[Outputs, ...] = field(repr=False)


@torch.no_grad()
def refer(loaded: LoadedModel, further: Collection[Run] = ()) -> Reference:
    """The outputs of a model on its own inputs and on those ``further`` runs that it can be run on."""
    first = given(loaded)
    runs, outputs = [first], [first(loaded.module)]
    for run in further:
        try:
            made = run(loaded.module)
        except Exception:  # the architecture's code: it may have no more positions, or take no such input
            continue
        if made and all(bool(tensor.isfinite().all()) for tensor in made):
            runs.append(run)
            outputs.append(made)
    return Reference(tuple(runs), tuple(outputs))


@torch.no_grad()
def departure(module: nn.Module, reference: Reference, count: int | None = None) -> float:
    """The largest relative change of an output in the first ``count`` runs: ``|new - old| / |old|``, Euclidean.

    Infinite where the module cannot be run any more or returns other shapes.
    """
    worst = 0.0
    for run, before in zip(reference.runs[:count], reference.outputs, strict=False):
        after = _again(run, module, before)
        if isinstance(after, str):
            return float("inf")
        for new, old in zip(after, before, strict=True):
            change = _relative(new, old)
            if not change <= worst:  # a NaN too
                worst = change
            if worst != worst:
                return worst
    return worst


@torch.no_grad()
def stopped(module: nn.Module, reference: Reference) -> str:
    """What stops the first run that the module cannot be run in any more; empty where it goes through all of them."""
    made = (_again(run, module, before) for run, before in zip(reference.runs, reference.outputs, strict=True))
    return next((says for says in made if isinstance(says, str)), "")


def _again(run: Run, module: nn.Module, before: Outputs) -> Outputs | str:
    """What a run returns, or why it returns nothing like what it did before."""
    try:
        after = run(module)
    except AutoQuantError:
        raise
    except Exception as error:  # the architecture's code, which ran before
        return one_line(error)
    shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (before, after)]
    return after if shapes[0] == shapes[1] else f"the outputs are {shapes[1]}, and were {shapes[0]}"


def _relative(new: Tensor, old: Tensor) -> float:
    if old.numel() == 0:
        return 0.0
    difference, size = float((new - old).norm()), float(old.norm())
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def given(loaded: LoadedModel) -> Run:
    """The run on the model's own inputs."""
    tokens = [
        t for t in pytree.tree_leaves((loaded.args, dict(loaded.kwargs))) if isinstance(t, Tensor) and t.dim() > 1
    ]
    return Run("given", tokens[0].shape[1] if tokens else 0, partial(_call, loaded, loaded.args, loaded.kwargs))


def _call(loaded: LoadedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module) -> Outputs:
    if loaded.config is None:  # a user's module may write into its inputs
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    return compared(module, module(*args, **kwargs), loaded.config is not None)


def compared(module: nn.Module, output: object, first: bool) -> Outputs:
    """The floating-point tensors that a model returns; none behind the logits, which are states, of a library's model.
    Raises AutoQuantError where there is none.
    """
    if first and (named := main_result(output)):
        return tuple(named)
    if is_dataclass(output) and not isinstance(output, Mapping):  # of a person's own: nothing says what it holds
        output = list(vars(output).values()) if hasattr(output, "__dict__") else output
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise AutoQuantError(f"{type(module).__name__} returns no tensor to compare")
    return tuple(tensors[:1] if first else tensors)


def further_runs(loaded: LoadedModel, experts: Collection[int], seed: int) -> tuple[Run, ...]:
    """Every run beside the given one; ``experts``: how many a router chooses among, for each router."""
    made = _factory_runs if loaded.config is None else _text_runs
    runs = list(made(loaded, seed))
    if experts:
        runs.append(_forced(loaded, experts, seed))
    return tuple(runs)


def _forced(loaded: LoadedModel, experts: Collection[int], seed: int) -> Run:
    """All experts are chosen in turn, by whatever input the model is given; enough tokens for each of them."""
    run = given(loaded)
    if loaded.config is not None and not loaded.known:
        tokens = max(8, -(-max(experts) // 2))
        made = _text(loaded, 2, tokens, seed)
        if made is not None:
            run = Run("forced", tokens, partial(_call, loaded, (), made))
    return replace(run, name="forced", within=partial(force_choices, frozenset(experts)))


def _text(loaded: LoadedModel, sequences: int, tokens: int, seed: int) -> dict[str, Tensor] | None:
    dtype = next(p.dtype for p in loaded.module.parameters() if p.is_floating_point())
    try:
        with torch.no_grad():
            made = make_inputs(loaded.module, torch.device("cpu"), (sequences, tokens), dtype, seed, media=False)
    except Exception:  # the architecture's code: it cannot be called with text alone
        return None
    return dict(made.kwargs)


def _text_runs(loaded: LoadedModel, seed: int) -> Iterator[Run]:
    module: Any = loaded.module
    if takes_media(module) and not reads_text(module):
        return
    for tokens in (*LENGTHS, *_named_spans(module)):
        made = _text(loaded, 1, tokens, seed + tokens)
        if made is not None:
            yield Run(f"{tokens} tokens", tokens, partial(_call, loaded, (), made))
    if any(is_own(type(part).__module__) for part in module.modules()):  # code that no survey has seen
        given_text = lambda count, tokens: ((), _text(loaded, count, tokens, seed) or {})  # noqa: E731
        for count, tokens in sizes_that_matter(module, given_text, (2, WINDOW)):
            kwargs = _text(loaded, count, tokens, seed + tokens)
            if kwargs is not None:
                yield Run(f"{count} sequences of {tokens} tokens", tokens, partial(_call, loaded, (), kwargs))
    names = inspect.signature(module.forward).parameters
    made = _text(loaded, 2, WINDOW, seed)
    ids = None if made is None else made.get("input_ids")
    if made is None or ids is None or ids.dim() != 2:
        return
    if "attention_mask" in names:
        mask = torch.ones_like(ids)
        mask[0, :PADDING] = 0
        yield Run("left padding", ids.shape[1], partial(_padded, loaded, {**made, "attention_mask": mask}))
    if "position_ids" in names and ids.shape[0] == 2:
        positions = torch.arange(ids.shape[1])[None].expand(ids.shape) + OFFSET
        yield Run("offset", ids.shape[1], partial(_call, loaded, (), {**made, "position_ids": positions}))
    if list(made) == ["input_ids"]:
        longer = _text(loaded, 1, PREFILL + DECODED, seed)
        if longer is not None:
            yield Run("decode", PREFILL + DECODED, partial(_decoded, longer["input_ids"]))


def _padded(loaded: LoadedModel, kwargs: Mapping[str, Tensor], module: nn.Module) -> Outputs:
    """The outputs at the tokens that count."""
    found, mask = _call(loaded, (), kwargs, module), kwargs["attention_mask"].bool()
    return tuple(tensor[mask] if tensor.shape[:2] == mask.shape else tensor for tensor in found)


def _decoded(ids: Tensor, module: nn.Module) -> Outputs:
    """The logits of a prefill, and of single tokens after it with the cache that the model made.

    Raises AutoQuantError where it makes none.
    """
    output: Any = module(input_ids=ids[:, :PREFILL], use_cache=True)
    found = list(compared(module, output, True))
    name = next((n for n in ("past_key_values", "cache_params") if getattr(output, n, None) is not None), None)
    if name is None:
        raise AutoQuantError(f"{type(module).__name__} makes no cache")
    for token in range(PREFILL, ids.shape[1]):
        output = module(input_ids=ids[:, token : token + 1], use_cache=True, **{name: getattr(output, name)})
        found += compared(module, output, True)
    return tuple(found)


def _factory_runs(loaded: LoadedModel, seed: int) -> Iterator[Run]:
    """The given inputs at other lengths, where one extent of theirs is that of tokens, of other numbers of sequences,
    and with other values.
    """
    leaves, tree = pytree.tree_flatten((loaded.args, dict(loaded.kwargs)))
    sequences = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 1]
    if not sequences:
        return
    batch, length = sequences[0].shape[:2]
    words, state = _words(loaded, sequences), _written(loaded, leaves)
    generator = torch.Generator().manual_seed(seed)

    def fresh(leaf: object, sizes: tuple[int, ...]) -> object:
        if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.is_complex() or id(leaf) in state:
            return leaf
        if leaf.dtype is torch.bool:
            return torch.ones(sizes, dtype=torch.bool)
        if leaf.is_floating_point():
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(leaf.dtype)
        high = max(words, int(leaf.max()) + 1)
        return torch.randint(min(0, int(leaf.min())), high, sizes, generator=generator, dtype=leaf.dtype)

    def other(tokens: int, count: int = batch) -> tuple[Any, Any]:
        made = []
        for leaf in leaves:
            sizes = tuple(leaf.shape) if isinstance(leaf, Tensor) else ()
            if len(sizes) > 1 and sizes[1] == length:
                sizes = (sizes[0], tokens, *sizes[2:])
            if len(sizes) > 1 and sizes[0] == batch:
                sizes = (count, *sizes[1:])
            made.append(fresh(leaf, sizes))
        args, kwargs = pytree.tree_unflatten(made, tree)
        return args, kwargs

    for tokens in dict.fromkeys((length, *FACTORY_LENGTHS, *_spans(loaded.module))):
        args, kwargs = other(tokens)
        yield Run(f"{tokens} tokens", tokens, partial(_call, loaded, args, kwargs))
    first = (2, length if length > 2 else 5)
    for count, tokens in sizes_that_matter(loaded.module, lambda count, tokens: other(tokens, count), first):
        args, kwargs = other(tokens, count)
        yield Run(f"{count} sequences of {tokens} tokens", tokens, partial(_call, loaded, args, kwargs))
    again = [other(length) for _ in range(_calls(loaded))]
    if again:
        yield Run(f"{len(again)} calls", length, partial(_one_after_the_other, again))
    for count in (count for count in FACTORY_BATCHES if count != batch):
        args, kwargs = other(length, count)
        yield Run(f"{count} sequences", length, partial(_call, loaded, args, kwargs))


def _one_after_the_other(calls: Sequence[tuple[Any, Any]], module: nn.Module) -> Outputs:
    """What a module returns call by call, in the state that the calls before leave it in."""
    made = [module(*args, **kwargs) for args, kwargs in pytree.tree_map_only(Tensor, torch.clone, calls)]
    return tuple(tensor for output in made for tensor in compared(module, output, False))


def _calls(loaded: LoadedModel) -> int:
    """How many calls show what a module does by the state that earlier ones leave: more than any number that its code
    names, as far as they can be afforded; none where a call changes nothing that it holds.
    """
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (loaded.args, dict(loaded.kwargs)))
    with quiet(), torch.no_grad(), torch.random.fork_rng(devices=()), kept_state(loaded.module) as kept:
        loaded.module(*args, **kwargs)
    if not kept.changed:
        return 0
    seen: set[int] = set()
    named = [0]
    for part in loaded.module.modules():
        named += _named_in(type(part).forward, seen)
        for value in vars(part).values():
            named += [value] if type(value) is int else _named_in(value, seen)
    return CALLS + max(value for value in named if value <= _MOST_CALLS)


def _written(loaded: LoadedModel, leaves: Collection[Any]) -> frozenset[int]:
    """The inputs that a run writes into, by identity: caches, which start as they were given."""
    copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    tree = pytree.tree_flatten((loaded.args, dict(loaded.kwargs)))[1]
    args, kwargs = pytree.tree_unflatten(copies, tree)
    with torch.no_grad(), kept_state(loaded.module):
        loaded.module(*args, **kwargs)
    pairs = zip(leaves, copies, strict=True)
    return frozenset(id(leaf) for leaf, copied in pairs if isinstance(copied, Tensor) and copied._version > 0)


def _spans(module: nn.Module) -> list[int]:
    """A little more than the largest number that may be an extent, as far as it can be afforded: what attributes of
    such a name hold, and what the code of forwards and of functions that are held names.
    """
    found: list[int] = []
    seen: set[int] = set()
    for part in module.modules():
        found += [value for name, value in vars(part).items() if type(value) is int and _SPAN.search(name)]
        found += _named_in(type(part).forward, seen)
        for value in vars(part).values():
            found += _named_in(value, seen)
    return _beyond(found, max(FACTORY_LENGTHS))


def _named_spans(module: nn.Module) -> list[int]:
    """The same of a library's model, whose configuration names its windows: what the code of its own files says."""
    seen: set[int] = set()
    files = frozenset(type(part).__module__ for part in module.modules())
    found = [value for part in module.modules() for value in _named_in(type(part).forward, seen, files)]
    return _beyond(found, max(LENGTHS))


def _beyond(found: Collection[int], longest: int) -> list[int]:
    spans = [abs(value) for value in found if longest <= abs(value) < _LONGEST]
    return [max(spans) + 9] if spans else []


def _named_in(function: Any, seen: set[int], files: Collection[str] | None = None) -> list[int]:
    """The whole numbers in a function's code, its closure and the globals that it reads, and in functions there, those
    of ``files`` alone.
    """
    if isinstance(function, partial):
        own = [value for value in (*function.args, *function.keywords.values()) if type(value) is int]
        return own + _named_in(function.func, seen, files)
    code, file = getattr(function, "__code__", None), getattr(function, "__module__", None) or ""
    if code is None or id(code) in seen or file.startswith("torch") or (files is not None and file not in files):
        return []
    seen.add(id(code))
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    values = [*cells, *(function.__globals__[name] for name in code.co_names if name in function.__globals__)]
    values += function.__defaults__ or ()
    found = [value for value in values if type(value) is int]
    codes = [code]
    while codes:
        constants = codes.pop().co_consts
        found += [value for value in constants if type(value) is int]
        codes += [value for value in constants if inspect.iscode(value)]
    return found + [number for value in values for number in _named_in(value, seen, files)]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not given a value yet
        return False


def _words(loaded: LoadedModel, sequences: Collection[Tensor]) -> int:
    """How many token ids there are: rows of the smallest table that is read by an input itself, 0 where none is."""
    rows: list[int] = []

    def look(part: nn.Module, args: tuple[Any, ...]) -> None:
        read = args and isinstance(args[0], Tensor) and isinstance(part, nn.Embedding)
        if read and any(args[0].shape == ids.shape and torch.equal(args[0], ids) for ids in sequences):
            rows.append(len(cast(Tensor, part.weight)))

    hooks = [part.register_forward_pre_hook(look) for part in loaded.module.modules() if isinstance(part, nn.Embedding)]
    try:
        with torch.no_grad():  # which some kernels run without alone
            given(loaded)(loaded.module)
    except AutoQuantError:
        return 0
    finally:
        for hook in hooks:
            hook.remove()
    return min(rows, default=0)


def with_short_windows(source: ModelSource) -> ModelSource:
    """``source`` with windows that its small model's longest run exceeds; the same where its configuration has none.

    The part of a configuration that measures its windows in something else than tokens (a tower in pixels) keeps them
    where the model would not take its images or sound any more.
    """
    if source.config is None:
        return source
    found: dict[str, dict[str, Any]] = {}
    for path, part in sub_configs(source.config).items():
        for name, value in vars(part).items():
            where = f"{path}.{name}" if path else name
            if _WINDOWS.search(name) and type(value) is int and value > WINDOW:
                found.setdefault(path, {})[where] = WINDOW
            elif name.startswith("rope") and isinstance(value, Mapping):
                reduced = _short_in(value)
                if reduced != value:
                    found.setdefault(path, {})[where] = reduced
    if not found:
        return source
    shorter = _with(source, found.values())
    if not _loses_inputs(source, shorter):
        return shorter
    fitting = [part for part in found.values() if not _loses_inputs(source, _with(source, [part]))]
    return _with(source, fitting) if fitting else source


def _with(source: ModelSource, changes: Iterable[Mapping[str, Any]]) -> ModelSource:
    together = {name: value for part in changes for name, value in part.items()}
    return replace(source, config=changed(source.config, together))


def _loses_inputs(source: ModelSource, other: ModelSource) -> bool:
    """True if a model of ``other`` does not take all the images and sounds that one of ``source`` does."""
    try:
        if not takes_media(build_module(other, other.config, META, torch.float32)):
            return False
        return not set(build_meta(other).missing) <= set(build_meta(source).missing)
    except AutoQuantError:  # what says so may want its windows as long as they were
        return True


def _short_in(value: Mapping[str, Any]) -> dict[str, Any]:
    short: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            short[key] = _short_in(entry)
        else:
            long = _WINDOWS.search(str(key)) and type(entry) is int and entry > WINDOW
            short[key] = WINDOW if long else entry
    return short
