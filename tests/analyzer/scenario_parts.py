"""What the blocks of a scenario may do: what holds at any length, with any buffer, in any role, and what does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scenarios import WIDTH, Part
from torch import Tensor, nn

Size = int
"""Tokens that a trap takes for few: at most so many, and it shows nothing."""


def positions(h: Tensor, start: Any = 0) -> Tensor:
    return torch.arange(h.shape[1], device=h.device) + start


def _part(mid: Callable[[Any, Tensor, Any], Tensor], **more: Any) -> Part:
    return Part(mid=mid, **more)


SAFE: dict[str, Part] = {
    "relu": _part(lambda b, h, s: h.relu(), legal=True),
    "leaky": _part(lambda b, h, s: F.leaky_relu(h, 0.2), legal=True),
    "half": _part(lambda b, h, s: 0.5 * h.relu(), legal=True),
    "mean over tokens": _part(lambda b, h, s: h - h.mean(1, keepdim=True), legal=True),
    "running sum": _part(lambda b, h, s: h.cumsum(1).relu(), legal=True),
    "tokens moved": _part(lambda b, h, s: h + h.roll(1, 1), legal=True),
    "mixed by a triangle": _part(
        lambda b, h, s: torch.ones(h.shape[1], h.shape[1], dtype=h.dtype, device=h.device).triu(2) @ h + h, legal=True
    ),
    "half of later tokens": _part(
        lambda b, h, s: torch.where((positions(h, s) >= 4)[:, None], 0.5 * h, h).relu(), legal=True
    ),
    "another branch that passes": _part(lambda b, h, s: h.relu() if h.shape[1] <= 16 else F.leaky_relu(h), legal=True),
}

# --- other lengths and offsets: a part for the number of tokens up to which it shows nothing --------------------------

LENGTHS: dict[str, Callable[[Size], Part]] = {
    "branch": lambda n: _part(lambda b, h, s: h.relu() if h.shape[1] <= n else h.tanh()),
    "tail": lambda n: _part(lambda b, h, s: torch.cat([h[:, :n].relu(), h[:, n:].tanh()], 1)),
    "tail of one": lambda n: _part(lambda b, h, s: torch.cat([h[:, :n], h[:, n:].exp()], 1)),
    "all but the last": lambda n: _part(lambda b, h, s: torch.cat([h[:, :-n].sigmoid(), h[:, -n:]], 1)),
    "ramp": lambda n: _part(lambda b, h, s: h + 0.1 * (positions(h, s) - n + 1).clamp(min=0)[:, None]),
    "relu of a ramp": lambda n: _part(lambda b, h, s: h + F.relu(positions(h, s) - (n - 1.0))[:, None]),
    "where": lambda n: _part(lambda b, h, s: torch.where((positions(h, s) >= n)[:, None], h.tanh(), h.relu())),
    "filled": lambda n: _part(lambda b, h, s: h.masked_fill((positions(h, s) >= n)[:, None], 1.0)),
    "compared": lambda n: _part(lambda b, h, s: h + (positions(h, s) >= n)[:, None] * 0.3),
    "quotient": lambda n: _part(lambda b, h, s: h + (positions(h, s) // n)[:, None] * 0.3),
    "chunks": lambda n: _part(
        lambda b, h, s: torch.cat([c.relu() if i == 0 else c.tanh() for i, c in enumerate(h.split(n, 1))], 1)
    ),
    "number of chunks": lambda n: _part(lambda b, h, s: h.relu() + 0.5 * (len(h.split(n, 1)) - 1)),
    "a number of the length": lambda n: _part(lambda b, h, s: h.relu() + 0.1 * max(h.shape[1] - n, 0)),
    "far tokens": lambda n: _part(
        lambda b, h, s: h + torch.ones(h.shape[1], h.shape[1], dtype=h.dtype, device=h.device).triu(n).sum(-1)[:, None]
    ),
    "padded": lambda n: _part(
        lambda b, h, s: (
            F.pad(h, (0, 0, 0, -h.shape[1] % n if h.shape[1] > n else 0), value=1.0)
            .mean(1, keepdim=True)
            .expand(h.shape)
        )
    ),
    "one hot": lambda n: _part(lambda b, h, s: h + F.one_hot(positions(h, s).clamp(max=n), n + 1)[:, n:].to(h.dtype)),
    "written": lambda n: _part(lambda b, h, s: _written(h, n)),
}


def _written(h: Tensor, n: int) -> Tensor:
    y = h.relu()
    y[:, n:] = 1.0
    return y


STARTS: dict[str, Part] = {
    "start added": _part(lambda b, h, s: h + 0.1 * s),
    "start in a branch": _part(lambda b, h, s: h.relu() if s == 0 else h.tanh()),
    "start in positions": _part(lambda b, h, s: h + 0.1 * (positions(h, s) - positions(h)).to(h.dtype)[:, None]),
    "start as a power": _part(lambda b, h, s: h.relu() + h.relu() ** 2 * s),
    "start in a ramp": _part(lambda b, h, s: h + 0.1 * (positions(h, s) - 8).clamp(min=0)[:, None]),
}
"""A Python number that is 0 where the model is traced."""

# --- buffers: values that a checkpoint would fill ---------------------------------------------------------------------


def _buffer(name: str, value: Callable[[int], Tensor], persistent: bool = True) -> Callable[[Any], None]:
    def setup(block: Any) -> None:
        width = getattr(block, block.left).weight.shape[0]
        block.register_buffer(name, value(width), persistent=persistent)

    return setup


def _integers(name: str, low: int, high: int) -> Callable[[Any, torch.Generator], None]:
    def fill(block: Any, generator: torch.Generator) -> None:
        held = getattr(block, name)
        new = torch.randint(low, high, held.shape, generator=generator)
        if held.dim():
            new.view(-1)[0], new.view(-1)[-1] = low, high - 1  # never all as they were
        held.copy_(new)

    return fill


def _zeros(dtype: torch.dtype) -> Callable[[int], Tensor]:
    return lambda width: torch.zeros(width, dtype=dtype)


def _held(
    name: str,
    value: Callable[[int], Tensor],
    low: int,
    high: int,
    mid: Callable[[Any, Tensor, Any], Tensor],
    **more: Any,
) -> Part:
    return Part(mid=mid, setup=_buffer(name, value), fill=_integers(name, low, high), **more)


BUFFERS: dict[str, Part] = {
    "zero point": _held("zero", _zeros(torch.int8), 2, 9, lambda b, h, s: h - 0.1 * b.zero.to(h.dtype)),
    "stored bias": _held("stored", _zeros(torch.int32), -9, -2, lambda b, h, s: (h + b.stored * 0.1).relu()),
    "steps": _held("steps", lambda w: torch.zeros((), dtype=torch.long), 5, 9, lambda b, h, s: h + b.steps * 0.01),
    "kept": _held(
        "keep",
        lambda w: torch.ones(w, dtype=torch.bool),
        0,
        2,
        lambda b, h, s: torch.where(b.keep, h, torch.ones_like(h)),
    ),
    "dropped": _held("drop", _zeros(torch.bool), 0, 2, lambda b, h, s: h.masked_fill(b.drop, 1.0)),
    "added mask": _held("mask", _zeros(torch.bool), 0, 2, lambda b, h, s: h + b.mask.to(h.dtype)),
    "any": _held("flag", _zeros(torch.bool), 0, 2, lambda b, h, s: h + b.flag.any()),
    "total": _held("counts", _zeros(torch.long), 1, 9, lambda b, h, s: h + b.counts.sum() * 0.1),
    "condition": _held(
        "count",
        lambda w: torch.zeros((), dtype=torch.long),
        2,
        5,
        lambda b, h, s: torch.where(b.count > 0, h.tanh(), h),
    ),
    "level": _held("level", _zeros(torch.uint8), 1, 7, lambda b, h, s: h + (b.level > 3).to(h.dtype)),
    "exponent": _held(
        "power", lambda w: torch.ones((), dtype=torch.long), 2, 4, lambda b, h, s: h.relu() ** b.power.to(h.dtype)
    ),
    "stored weight": _held("stored", _zeros(torch.int8), -9, 9, lambda b, h, s: h + h.tanh() * b.stored.to(h.dtype)),
    "largest": _held("most", _zeros(torch.int16), 1, 9, lambda b, h, s: h + 0.1 * b.most.amax()),
    "one hot of a buffer": _held(
        "hot", _zeros(torch.long), 0, 4, lambda b, h, s: h + F.one_hot(b.hot, 4)[:, 1:].sum(-1).to(h.dtype)
    ),
    "shift": Part(
        mid=lambda b, h, s: h + b.shift,
        setup=_buffer("shift", lambda w: torch.zeros(w)),
        fill=lambda b, g: b.shift.copy_(torch.randn(b.shift.shape, generator=g)),
    ),
    "factor": _held(
        "factor", lambda w: torch.ones(w, dtype=torch.int8), 1, 9, lambda b, h, s: h.relu() * b.factor, legal=True
    ),
    "order": Part(
        mid=lambda b, h, s: h[..., b.order].relu(),
        setup=_buffer("order", lambda w: torch.arange(w).flip(0), persistent=False),
        legal=True,
    ),
    "scale": Part(
        mid=lambda b, h, s: h * b.scale,
        setup=_buffer("scale", lambda w: torch.ones(w)),
        fill=lambda b, g: b.scale.copy_(torch.rand(b.scale.shape, generator=g) + 0.5),
        legal=True,
    ),
}

# --- roles shared by one parameter ------------------------------------------------------------------------------------


def _param(name: str, *shape: int) -> Callable[[Any], None]:
    return lambda block: setattr(block, name, nn.Parameter(torch.randn(*shape)))


def _both(*steps: Callable[[Any], None]) -> Callable[[Any], None]:
    def setup(block: Any) -> None:
        for step in steps:
            step(block)

    return setup


def _left(b: Any) -> Any:
    return getattr(b, b.left)


def _right(b: Any) -> Any:
    return getattr(b, b.right)


def _width(b: Any) -> int:
    return int(_left(b).weight.shape[0])


def _out(block: Any) -> None:
    block.out = nn.Parameter(torch.randn(WIDTH, _width(block)))


def _alias(block: Any) -> None:
    block.alias = _left(block).weight


def _held_by_reference(block: Any) -> None:
    block.reference = [_left(block)]


def _shared_bias(block: Any) -> None:
    made = nn.Linear(WIDTH, _width(block))
    _left(block).bias = made.bias
    block.beside = made


def _shared_weight(block: Any) -> None:
    made = nn.Linear(WIDTH, _width(block), bias=False)
    made.weight = _left(block).weight
    block.beside = made


ROLES: dict[str, Part] = {
    "left used by a function": Part(
        side=lambda b, x, h, s: x + F.linear(F.linear(x, _left(b).weight).tanh(), b.out), setup=_out
    ),
    "left used again": Part(side=lambda b, x, h, s: x + F.linear(_left(b)(x.tanh()).tanh(), b.out), setup=_out),
    "right used by a function": Part(side=lambda b, x, h, s: x + F.linear(h.tanh(), _right(b).weight)),
    "right used again": Part(side=lambda b, x, h, s: x + _right(b)(h.sigmoid())),
    "an alias is used": Part(
        side=lambda b, x, h, s: x + F.linear(F.linear(x, b.alias).tanh(), b.out), setup=_both(_out, _alias)
    ),
    "a reference is used": Part(
        side=lambda b, x, h, s: x + F.linear(F.linear(x, b.reference[0].weight).tanh(), b.out),
        setup=_both(_out, _held_by_reference),
    ),
    "a shared bias": Part(
        side=lambda b, x, h, s: x + F.linear(b.beside(x).tanh(), b.out), setup=_both(_out, _shared_bias)
    ),
    "a shared weight": Part(
        side=lambda b, x, h, s: x + F.linear(b.beside(x).tanh(), b.out), setup=_both(_out, _shared_weight)
    ),
    "left as a tensor": Part(side=lambda b, x, h, s: x + _left(b).weight.sum(0).tanh()),
    "norm of the left": Part(side=lambda b, x, h, s: x * (1 + _left(b).weight.square().sum())),
    "right is transposed": Part(
        side=lambda b, x, h, s: x + F.linear(F.linear(x, _right(b).weight.t()).tanh(), b.out), setup=_out
    ),
    "h is read too": Part(side=lambda b, x, h, s: x + F.linear(h.tanh(), b.out), setup=_out),
    "left rounds": Part(
        side=lambda b, x, h, s: x + F.linear(F.linear(x, _left(b).weight.round(decimals=1)), b.out), setup=_out
    ),
    "an unused alias": Part(setup=_alias, legal=True),
    "a 0-d gain": Part(
        mid=lambda b, h, s: b.gain * h.relu(),
        setup=lambda b: setattr(b, "gain", nn.Parameter(torch.tensor(0.3))),
        legal=True,
    ),
    "h is read by another": Part(side=lambda b, x, h, s: x + F.linear(h.relu(), b.out), setup=_out, legal=True),
}
"""The source or the target of the block's own group has a second use."""

# --- layers that differ -----------------------------------------------------------------------------------------------


class Power:
    """An object that is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, h: Tensor) -> Tensor:
        return getattr(torch, self.name)(h)  # type: ignore[no-any-return]  # of a tensor


def _function(value: Callable[[bool], Any]) -> Callable[[Any, bool], None]:
    return lambda block, special: setattr(block, "function", value(special))


def _closure(special: bool) -> Callable[[Tensor], Tensor]:
    return lambda h: h.tanh() if special else h.relu()


def _hook(block: Any, special: bool) -> None:
    if special:
        _left(block).register_forward_hook(lambda module, args, output: output.tanh())


def _pre_hook(block: Any, special: bool) -> None:
    if special:
        _right(block).register_forward_pre_hook(lambda module, args: (args[0].tanh(),))


def _patched(block: Any, special: bool) -> None:
    if special:
        left = _left(block)
        left.forward = lambda x: F.linear(x, left.weight, left.bias).tanh()


def _held_function(b: Any, h: Tensor, s: Any) -> Tensor:
    return b.function(h)  # type: ignore[no-any-return]  # of a tensor


DIFFERENT: dict[str, tuple[Callable[[tuple[int, ...]], Part], Callable[[Any, bool], None] | None]] = {
    "number in a set": (lambda chosen: _part(lambda b, h, s: h.tanh() if b.layer_idx in chosen else h.relu()), None),
    "number compared": (
        lambda chosen: _part(lambda b, h, s: h.tanh() if any(b.layer_idx == c for c in chosen) else h.relu()),
        None,
    ),
    "number between": (
        lambda chosen: _part(lambda b, h, s: h.tanh() if min(chosen) <= b.layer_idx <= min(chosen) else h.relu()),
        None,
    ),
    "rate compared": (
        lambda chosen: _part(lambda b, h, s: h.tanh() if abs(b.rate - 0.1 * min(chosen)) < 0.05 else h.relu()),
        lambda b, special: setattr(b, "rate", 0.1 * b.layer_idx),
    ),
    "closure": (lambda chosen: _part(_held_function), _function(_closure)),
    "partial": (
        lambda chosen: _part(_held_function),
        _function(
            lambda special: (
                functools.partial(F.gelu, approximate="tanh")
                if special
                else functools.partial(F.leaky_relu, negative_slope=0.1)
            )
        ),
    ),
    "object": (lambda chosen: _part(_held_function), _function(lambda special: Power("tanh" if special else "relu"))),
    "module": (lambda chosen: _part(_held_function), _function(lambda special: nn.Tanh() if special else nn.ReLU())),
    "built in": (
        lambda chosen: _part(_held_function),
        _function(lambda special: torch.tanh if special else torch.relu),
    ),
    "flag": (
        lambda chosen: _part(lambda b, h, s: h.tanh() if b.smooth else h.relu()),
        lambda b, special: setattr(b, "smooth", special),
    ),
    "word": (
        lambda chosen: _part(lambda b, h, s: getattr(torch, b.word)(h)),
        lambda b, special: setattr(b, "word", "tanh" if special else "relu"),
    ),
    "dictionary": (
        lambda chosen: _part(lambda b, h, s: b.held["act"](h)),
        lambda b, special: setattr(b, "held", {"act": torch.tanh if special else torch.relu}),
    ),
    "hook": (lambda chosen: _part(lambda b, h, s: h.relu()), _hook),
    "hook before": (lambda chosen: _part(lambda b, h, s: h.relu()), _pre_hook),
    "patched": (lambda chosen: _part(lambda b, h, s: h.relu()), _patched),
    "integer buffer": (
        lambda chosen: _part(lambda b, h, s: h[..., b.order].relu(), legal=True),
        lambda b, special: b.register_buffer("order", _order(_width(b), special), persistent=False),
    ),
}
"""The part for the numbers of the special layers, and what is set up in each layer."""

ONE_LAYER = ("number between", "rate compared")
"""Parts that know one special layer."""


def _order(width: int, special: bool) -> Tensor:
    return torch.arange(width).flip(0) if special else torch.arange(width)
