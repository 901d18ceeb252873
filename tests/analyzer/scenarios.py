"""Random small models, each of which tempts to a claim that the traced run alone bears out.

A scenario is drawn from an axis and a seed. Its model is an embedding, a stack of blocks and a head; the blocks that
hold a *trap* do at another length, in another layer, with another buffer, in another role, with a cache or for another
expert what no scale passes; the others hold *plants*, whose groups must be found. A trap says which claim it is that
one could be led to, and is carried out itself: it must change an output in some run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, INNER, WORDS = 6, 5, 12
HEADS = 2

Mid = Callable[..., Tensor]
"""``mid(block, h, start)``: what happens between two products; ``start``: position of the first token."""


@dataclass(frozen=True, slots=True)
class Part:
    """Something that may happen in a block.

    ``mid``: between its products; ``side``: what is added to its result, of its input and of what lies between;
    ``setup``: makes parameters, buffers and hooks; ``fill``: puts other values into its buffers. ``legal``: the block's
    own group holds. ``forms``: the blocks that it fits.
    """

    mid: Mid | None = None
    side: Mid | None = None
    setup: Callable[[Any], None] | None = None
    fill: Callable[[Any, torch.Generator], None] | None = None
    legal: bool = False
    forms: tuple[str, ...] = ("mlp", "gated", "attention")
    residual: bool = True
    """False where it lets no rotation of the residual stream pass."""


def relu(block: Any, h: Tensor, start: Any) -> Tensor:
    return h.relu()


class Block(nn.Module):
    """What is written into the residual stream by ``right(mid(left(norm(x))))``."""

    left, right = "up", "down"
    part = Part(legal=True)
    other = Part(legal=True)
    """Of the layers that the part is not for, where a layer's own number says which it is."""

    def __init__(self, number: int, norm: str, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm == "layer" else nn.RMSNorm(WIDTH, eps=1e-3)
        self.make(bias)
        self.layer_idx = number
        if self.part.setup is not None:
            self.part.setup(self)

    def make(self, bias: bool) -> None:
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(INNER, WIDTH, bias=bias)

    def inner(self, n: Tensor, start: Any) -> tuple[Tensor, Tensor]:
        h = self.up(n)
        return h, self.mid(h, start)

    def mid(self, h: Tensor, start: Any) -> Tensor:
        return h.relu()

    def side(self, x: Tensor, h: Tensor, start: Any) -> Tensor:
        return x

    def forward(self, x: Tensor, start: Any = 0) -> Tensor:
        h, y = self.inner(self.norm(x), start)
        return self.side(x, h, start) + getattr(self, self.right)(y)


class Gated(Block):
    def make(self, bias: bool) -> None:
        super().make(bias)
        self.gate = nn.Linear(WIDTH, INNER, bias=bias)

    def inner(self, n: Tensor, start: Any) -> tuple[Tensor, Tensor]:
        h = self.up(n)
        return h, self.mid(h, start) * nn.functional.silu(self.gate(n))


class Attention(Block):
    left, right = "v", "o"

    def make(self, bias: bool) -> None:
        for name in "qkv":
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=bias))
        self.o = nn.Linear(WIDTH, WIDTH, bias=bias)

    def inner(self, n: Tensor, start: Any) -> tuple[Tensor, Tensor]:
        h = self.v(n)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(n), self.k(n), self.mid(h, start)))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return h, mixed.transpose(1, 2).flatten(2)


FORMS: dict[str, type[Block]] = {"mlp": Block, "gated": Gated, "attention": Attention}


def block_class(form: str, part: Part) -> type[Block]:
    """The class of blocks that do what ``part`` says."""
    held: dict[str, Any] = {"part": part}
    if part.mid is not None:
        held["mid"] = part.mid
    if part.side is not None:
        held["side"] = part.side
    return type(f"{form.title()}With", (FORMS[form],), held)


class Model(nn.Module):
    """``after``: what the loop does after each block."""

    after: Mid | None = None

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(blocks)
        centred = blocks and isinstance(blocks[0].norm, nn.LayerNorm)
        self.last = nn.LayerNorm(WIDTH) if centred else nn.RMSNorm(WIDTH, eps=1e-3)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor, start: Any = 0) -> Tensor:
        x = self.table(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, start)
            if self.after is not None:
                x = self.after(number, x)
        return self.head(self.last(x))


@dataclass(frozen=True, slots=True)
class Claimed:
    """A claim by the paths of its parameters: a group from the source into the target, or a space of these writers."""

    what: str
    sources: tuple[str, ...]
    targets: tuple[str, ...] = ()
    rows: int | None = None
    """Of a trap: as many channels hold, one scale for all experts, and more do not."""


Call = Callable[[nn.Module], Any]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A model, what it is traced with, how it is judged, and what is planted in it."""

    axis: str
    seed: int
    words: tuple[str, ...]
    """What it was made of, for messages."""
    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    runs: tuple[tuple[str, Call], ...]
    plants: tuple[Claimed, ...]
    traps: tuple[Claimed, ...]


# --- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Plan:
    """Blocks as they are drawn: form and name of the part of each."""

    rng: random.Random
    norm: str
    bias: bool
    length: int
    blocks: list[tuple[str, str, Part]]

    def words(self) -> tuple[str, ...]:
        return tuple(f"{i}: {form} {name}" for i, (form, name, _) in enumerate(self.blocks))


def tokens_of(seed: int, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (batch, length), generator=generator)


def at_lengths(seed: int, lengths: Sequence[int], starts: Sequence[int] = ()) -> tuple[tuple[str, Call], ...]:
    """Runs at other lengths, batches and offsets."""
    runs: list[tuple[str, Call]] = []
    for length in lengths:
        tokens = tokens_of(seed + length, 1 + length % 2, length)
        runs.append((f"{length} tokens", lambda m, tokens=tokens: m(tokens)))
    for start in starts:
        tokens = tokens_of(seed + start, 1, 7)
        runs.append((f"from {start}", lambda m, tokens=tokens, start=start: m(tokens, start)))
    return tuple(runs)


def own_group(path: str, form: str) -> Claimed:
    """The group within a block."""
    kind = FORMS[form]
    return Claimed("group", (f"{path}.{kind.left}.weight",), (f"{path}.{kind.right}.weight",))


def normed_group(path: str, form: str) -> Claimed:
    """From the norm of a block into what reads it."""
    readers = {"mlp": ("up",), "gated": ("up", "gate"), "attention": ("q", "k", "v")}[form]
    return Claimed("group", (f"{path}.norm.weight",), tuple(f"{path}.{name}.weight" for name in readers))


def residual(plan: Plan) -> Claimed:
    writers = ["table.weight"] + [
        f"layers.{i}.{FORMS[form].right}.weight" for i, (form, _, _) in enumerate(plan.blocks)
    ]
    return Claimed("space", tuple(writers))


def model_of(plan: Plan, after: Mid | None = None) -> Model:
    blocks = [block_class(form, part)(i, plan.norm, plan.bias) for i, (form, _, part) in enumerate(plan.blocks)]
    kind = type("Looped", (Model,), {"after": after}) if after is not None else Model
    return kind(blocks)


def without(plan: Plan, index: int) -> Plan:
    """The plan with one block fewer."""
    return replace(plan, blocks=[*plan.blocks[:index], *plan.blocks[index + 1 :]])
