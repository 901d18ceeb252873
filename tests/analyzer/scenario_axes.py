"""The axes of the scenarios: how a model of each is drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scenario_parts import BUFFERS, DIFFERENT, LENGTHS, ONE_LAYER, ROLES, SAFE, STARTS
from scenario_rules import rules
from scenarios import (
    FORMS,
    HEADS,
    WIDTH,
    WORDS,
    Call,
    Claimed,
    Model,
    Part,
    Plan,
    Scenario,
    at_lengths,
    model_of,
    normed_group,
    own_group,
    residual,
    tokens_of,
)
from torch import Tensor, nn

NEAR = (1, 2, 7, 40, 67)
FAR = 170
"""Tokens of the longest run, beyond every trap."""


def _plan(rng: random.Random, blocks: int, length: int) -> Plan:
    plan = Plan(rng, rng.choice(("rms", "rms", "layer")), rng.random() < 0.5, length, [])
    for _ in range(blocks):
        name = rng.choice(list(SAFE))
        plan.blocks.append((rng.choice(list(FORMS)), name, SAFE[name]))
    return plan


def _claims(plan: Plan, steady: bool = True) -> tuple[list[Claimed], list[Claimed]]:
    """Plants and traps: the own group of each block, of its norm too where its part leaves the input alone.

    ``steady``: whether the residual stream is rotated by any Q.
    """
    plants, traps = [], []
    for i, (form, _, part) in enumerate(plan.blocks):
        path = f"layers.{i}"
        (plants if part.legal else traps).append(own_group(path, form))
        if part.side is None and part.legal:
            plants.append(normed_group(path, form))
    if steady and all(part.side is None for _, _, part in plan.blocks):
        plants.append(residual(plan))
    return plants, traps


def _scenario(
    axis: str,
    seed: int,
    plan: Plan,
    runs: tuple[tuple[str, Call], ...],
    inputs: tuple[Any, ...] = (),
    make: Callable[[], nn.Module] | None = None,
    steady: bool = True,
) -> Scenario:
    plants, traps = _claims(plan, steady)
    given = inputs or (tokens_of(seed, 2, plan.length),)
    made = make or (lambda: model_of(plan))
    return Scenario(axis, seed, plan.words(), made, given, runs, tuple(plants), tuple(traps))


def lengths(seed: int) -> Scenario:
    """Two or three blocks, of which one shows what it does beyond a number of tokens, or at another offset."""
    rng = random.Random(seed)
    plan = _plan(rng, rng.randint(2, 3), rng.randint(3, 6))
    at = rng.randrange(len(plan.blocks))
    form = plan.blocks[at][0]
    if rng.random() < 0.25:
        name = rng.choice(list(STARTS))
        plan.blocks[at] = (form, name, STARTS[name])
        given = (tokens_of(seed, 2, plan.length), 0)
        return _scenario("lengths", seed, plan, at_lengths(seed, NEAR, (1, 5, 30)), given)
    few = rng.choice((plan.length, plan.length + 1, 8, 16, 31, 64, 100, 150))
    name = rng.choice(list(LENGTHS))
    plan.blocks[at] = (form, f"{name} ({few})", LENGTHS[name](few))
    return _scenario("lengths", seed, plan, at_lengths(seed, (*NEAR, FAR)))


def layers(seed: int) -> Scenario:
    """Six to nine blocks of one class, of which one or two in the middle do something else."""
    rng = random.Random(seed)
    depth, form = rng.randint(6, 9), rng.choice(list(FORMS))
    plan = _plan(rng, 0, 4)
    runs = at_lengths(seed, (1, 4, 9))
    chosen = tuple(sorted(rng.sample(range(1, depth - 1), rng.choice((1, 1, 2)))))
    if rng.random() < 0.2:
        name = rng.choice(list(SAFE))
        plan.blocks += [(form, name, SAFE[name])] * depth
        after = lambda model, i, x: x.tanh() if i in chosen else x  # noqa: E731  # a method of the model
        made = _scenario("layers", seed, plan, runs, make=lambda: model_of(plan, after), steady=False)
        words = (*made.words, f"tanh after {chosen}")
        return _with(made, words, (*made.traps, residual(plan)))
    name = rng.choice(list(DIFFERENT))
    chosen = chosen[:1] if name in ONE_LAYER else chosen
    part, each = DIFFERENT[name]
    special = part(chosen)
    usual = Part(mid=special.mid, legal=True)
    kind = _one_class(form, special)
    for i in range(depth):
        plan.blocks.append((form, f"{name} {i in chosen}", special if i in chosen else usual))

    def make() -> nn.Module:
        blocks = [kind(i, plan.norm, plan.bias) for i in range(depth)]
        if each is not None:
            for i, block in enumerate(blocks):
                each(block, i in chosen)
        return Model(blocks)

    return _scenario("layers", seed, plan, runs, make=make)


def _one_class(form: str, part: Part) -> type[nn.Module]:
    held: dict[str, Any] = {"part": part, "mid": part.mid}
    return type(f"{form.title()}Of", (FORMS[form],), held)


def _with(made: Scenario, words: tuple[str, ...], traps: tuple[Claimed, ...]) -> Scenario:
    return Scenario(made.axis, made.seed, words, made.make, made.inputs, made.runs, made.plants, traps)


def buffers(seed: int) -> Scenario:
    """Blocks of which some hold what a checkpoint fills."""
    rng = random.Random(seed)
    plan = _plan(rng, rng.randint(2, 3), rng.randint(3, 5))
    for at in rng.sample(range(len(plan.blocks)), rng.randint(1, len(plan.blocks))):
        name = rng.choice(list(BUFFERS))
        plan.blocks[at] = (plan.blocks[at][0], name, BUFFERS[name])
    return _scenario("buffers", seed, plan, at_lengths(seed, (1, 4, 9)))


def roles(seed: int) -> Scenario:
    """Blocks of which some use the source or the target of their group a second time."""
    rng = random.Random(seed)
    plan = _plan(rng, rng.randint(2, 3), rng.randint(3, 5))
    for at in rng.sample(range(len(plan.blocks)), rng.randint(1, 2)):
        form = plan.blocks[at][0]
        fits = [name for name, part in ROLES.items() if form in part.forms and (plan.bias or "bias" not in name)]
        name = rng.choice(fits)
        plan.blocks[at] = (form, name, ROLES[name])
    return _scenario("roles", seed, plan, at_lengths(seed, (1, 4, 9)))


# --- prefill and decode -----------------------------------------------------------------------------------------------


class Cached(nn.Module):
    """Attention with a cache of keys and values; ``way``: where it is and what is done with it."""

    def __init__(self, way: str, trap: bool) -> None:
        super().__init__()
        self.way, self.trap = way, trap
        self.norm = nn.RMSNorm(WIDTH, eps=1e-3)
        for name in "qkvo":
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        if way == "buffer":
            for name in ("keys", "values"):
                self.register_buffer(name, torch.zeros(1, 24, WIDTH), persistent=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, at: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        n = self.norm(x)
        k, v = self.k(n), self.v(n)
        if self.way == "buffer":
            self.keys = self.keys.index_copy(1, at, k.to(self.keys.dtype))
            self.values = self.values.index_copy(1, at, v.to(self.values.dtype))
            k, v = self.keys, self.values
        elif past is not None:
            old = past[1].tanh() if self.trap else past[1]
            k, v = torch.cat([past[0], k], 1), torch.cat([old, v], 1)
        span = k.shape[1]
        first = at if self.way == "buffer" else torch.arange(x.shape[1]) + span - x.shape[1]
        mask = torch.arange(span)[None, :] <= first[:, None]
        q, keys, values = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(n), k, v))
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return x + self.o(mixed.transpose(1, 2).flatten(2)), (k, v)


class Recurrent(nn.Module):
    """A running state, through which what comes later depends on what came before."""

    def __init__(self, trap: bool) -> None:
        super().__init__()
        self.trap = trap
        self.norm = nn.RMSNorm(WIDTH, eps=1e-3)
        self.up, self.down, self.decay = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, state: Tensor | None, at: Tensor) -> tuple[Tensor, Tensor]:
        n = self.norm(x)
        h, keep = self.up(n), self.decay(n).sigmoid()
        if state is None:
            state = torch.zeros(x.shape[0], 5, dtype=h.dtype, device=h.device)
        out = []
        for t in range(x.shape[1]):
            state = keep[:, t] * (state.tanh() if self.trap and t == 0 else state) + h[:, t]
            out.append(state)
        return x + self.down(torch.stack(out, 1)), state


class Decoder(nn.Module):
    """``returns``: whether the states are handed back, or kept by the model."""

    def __init__(self, parts: list[nn.Module], ways: list[str], plain: list[nn.Module]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.parts, self.plain = nn.ModuleList(parts), nn.ModuleList(plain)
        self.ways = ways

    def forward(self, tokens: Tensor, at: Tensor, states: Any = None) -> Any:
        x, new = self.table(tokens), []
        for i, part in enumerate(self.parts):
            x, state = part(x, None if states is None else states[i], at)
            new.append(state)
        for block in self.plain:
            x = block(x)
        return (self.head(x), [s for s, way in zip(new, self.ways, strict=True) if way != "buffer"] or None)


def decode(seed: int) -> Scenario:
    """Prefill of some tokens, then one after the other, with caches as buffers, as arguments, and running states."""
    rng = random.Random(seed)
    ways = [rng.choice(("buffer", "argument", "state"))] * rng.randint(1, 2)
    given = rng.random() < 0.5 and ways[0] != "buffer"
    trap = ways[0] != "buffer" and rng.random() < 0.5
    plan = _plan(rng, rng.randint(1, 2), 4)
    plants = [own_group(f"plain.{i}", form) for i, (form, _, _) in enumerate(plan.blocks)]

    def make() -> nn.Module:
        parts: list[nn.Module] = [Recurrent(trap) if way == "state" else Cached(way, trap) for way in ways]
        return Decoder(parts, ways, list(model_of(plan).layers))

    tokens, at = tokens_of(seed, 1, 4), torch.arange(4)
    states = None
    if given:
        empty = torch.zeros(1, 5) if ways[0] == "state" else (torch.zeros(1, 0, WIDTH), torch.zeros(1, 0, WIDTH))
        states = [empty] * len(ways)
    traps = [
        Claimed("group", (f"parts.{i}.{a}.weight",), (f"parts.{i}.{b}.weight",))
        for i, way in enumerate(ways)
        for a, b in ([("up", "down")] if way == "state" else [("v", "o")])
        if trap
    ]
    runs = tuple((f"{n} tokens and 5 more", _decoding(seed + n, n, states)) for n in (1, 4, 12))
    words = (f"{ways[0]} x {len(ways)}, {'given' if given else 'none given'}, trap {trap}", *plan.words())
    inputs = (tokens, at, states) if given else (tokens, at)
    return Scenario("decode", seed, words, make, inputs, runs, tuple(plants), tuple(traps))


def _decoding(seed: int, prefill: int, states: Any) -> Call:
    tokens = tokens_of(seed, 1, prefill + 5)

    def call(module: nn.Module) -> Any:
        dtype = next(module.parameters()).dtype
        for name, buffer in module.named_buffers():
            if name.endswith(("keys", "values")):
                buffer.zero_()
        first = None if states is None else torch.utils._pytree.tree_map(lambda t: t.to(dtype), states)
        logits, held = module(tokens[:, :prefill], torch.arange(prefill), first)
        found = [logits]
        for t in range(prefill, prefill + 5):
            logits, held = module(tokens[:, t : t + 1], torch.tensor([t]), held)
            found.append(logits)
        return found

    return call


# --- experts ----------------------------------------------------------------------------------------------------------

EXPERTS = 6
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "the same": lambda e: e,
    "clamped to all": lambda e: e.clamp(0, EXPERTS - 1),
    "reshaped": lambda e: e.view(-1, 1).squeeze(-1),
    "cast": lambda e: e.to(torch.int32).long(),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "clamped": lambda e: e.clamp(max=EXPERTS - 2),
    "raised": lambda e: e.clamp(min=1),
    "next": lambda e: (e + 1) % EXPERTS,
    "running": lambda e: e.cumsum(0).clamp(max=EXPERTS - 1),
    "the other way": lambda e: e.flip(0),
    "halved": lambda e: e // 2,
    "where": lambda e: torch.where(e > 3, e - 1, e),
    "sorted": lambda e: e.sort().values,
}
"""What is done to the index before the second product."""


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": lambda h, w: torch.bmm(h, w.transpose(1, 2)),
    "bmm, weight on the left": lambda h, w: torch.bmm(w, h.transpose(1, 2)).transpose(1, 2),
    "einsum": lambda h, w: torch.einsum("tod,thd->toh", h, w),
}
"""``h [tokens, 1, in]`` with a matrix ``w [tokens, out, in]`` for each token."""


class Experts(nn.Module):
    """A matrix for each expert, chosen by the token's number or by a router."""

    def __init__(self, routed: bool, again: Callable[[Tensor], Tensor], act: str, product: str = "bmm") -> None:
        super().__init__()
        self.product = PRODUCTS[product]
        self.norm = nn.RMSNorm(WIDTH, eps=1e-3)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.first = nn.Parameter(torch.randn(EXPERTS, 5, WIDTH))
        self.second = nn.Parameter(torch.randn(EXPERTS, WIDTH, 5))
        self.routed, self.again, self.act = routed, again, act

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        n = self.norm(x).flatten(0, 1)
        scores = self.router(n).softmax(-1)
        e = scores.argmax(-1) if self.routed else tokens.flatten() % EXPERTS
        h = self.product(n.unsqueeze(1), self.first[e])
        if self.act == "tanh of the last":
            h = torch.where((e == EXPERTS - 1)[:, None, None], h.tanh(), h.relu())
        else:
            h = h.relu()
        y = self.product(h, self.second[self.again(e)]).squeeze(1)
        return x + (y * scores.gather(-1, e[:, None])).view(x.shape)


class ListedExperts(nn.Module):
    """Modules for experts; each runs on all tokens, or on its own ones."""

    def __init__(self, special: int | None, number: bool) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(WIDTH, eps=1e-3), nn.Linear(WIDTH, EXPERTS)
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(EXPERTS))
        self.downs = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(EXPERTS))
        self.special, self.number = special, number

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        n = self.norm(x)
        scores = self.router(n).softmax(-1)
        chosen = tokens % EXPERTS if self.number else scores.argmax(-1)
        for i in range(EXPERTS):
            h = self.ups[i](n)
            y = self.downs[i](h.tanh() if i == self.special else h.relu())
            x = x + y * ((chosen == i) * scores[..., i])[..., None]
        return x


class Mixture(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(parts)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x, tokens)
        return self.head(x)


def experts(seed: int) -> Scenario:
    """Experts of which the traced tokens reach one or two."""
    rng = random.Random(seed)
    drawn: list[tuple[str, Callable[[], nn.Module]]] = []
    plants, traps = [], []
    for i in range(rng.randint(1, 2)):
        path = f"layers.{i}"
        if rng.random() < 0.4:
            special, number = rng.choice((None, 2, EXPERTS - 1)), rng.random() < 0.5
            drawn.append(
                (f"listed, special {special}", lambda special=special, number=number: ListedExperts(special, number))
            )
            for e in range(EXPERTS):
                group = Claimed("group", (f"{path}.ups.{e}.weight",), (f"{path}.downs.{e}.weight",))
                (traps if e == special else plants).append(group)
            continue
        routed, act = rng.random() < 0.5, rng.choice(("relu", "relu", "tanh of the last"))
        table = rng.choice((SAME, OTHER))
        name = rng.choice(list(table))
        again = table[name]
        product = rng.choice(list(PRODUCTS))
        drawn.append(
            (
                f"stacked, {name}, {act}, routed {routed}, {product}",
                lambda r=routed, a=again, c=act, p=product: Experts(r, a, c, p),
            )
        )
        group = Claimed("group", (f"{path}.first",), (f"{path}.second",), 5 if act == "relu" else None)
        (plants if table is SAME and act == "relu" else traps).append(group)
    few = rng.choice(((0, 0, 0), (1, 0, 1), (2, 1, 2)))
    tokens = torch.tensor([few])
    every = torch.arange(WORDS)[None]
    runs = (
        *at_lengths(seed, (1, 5, 40)),
        ("every token", lambda m: m(every)),
        ("backwards", lambda m: m(every.flip(1))),
        *((f"expert {e} preferred", lambda m, e=e: _preferring(m, e, every)) for e in range(EXPERTS)),
    )
    words = tuple(name for name, _ in drawn)
    return Scenario(
        "experts",
        seed,
        words,
        lambda: Mixture([made() for _, made in drawn]),
        (tokens,),
        runs,
        tuple(plants),
        tuple(traps),
    )


def _preferring(module: Any, expert: int, tokens: Tensor) -> Any:
    """With routers that choose one expert."""
    for layer in module.layers:
        layer.router.bias[expert] += 100
    found = module(tokens)
    for layer in module.layers:
        layer.router.bias[expert] -= 100
    return found


AXES: dict[str, Callable[[int], Scenario]] = {
    "lengths": lengths,
    "layers": layers,
    "buffers": buffers,
    "roles": roles,
    "decode": decode,
    "experts": experts,
    "rules": rules,
}
