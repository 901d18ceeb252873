"""Random small programs: every claim of the analyzer is carried out and must change nothing; planted groups are found.

A program is a chain of steps over a pool of activations. Each step draws an operator, its operands and its parameters
from the seed alone, so that a failing seed reproduces the program, and the program is printed with it.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import analysed, outcomes, randomised
from readable import text
from torch import Tensor, nn

PROGRAMS = int(os.environ.get("AUTOQUANT_FUZZ", "240"))
FIRST_SEED = int(os.environ.get("AUTOQUANT_FUZZ_SEED", "0"))
CHUNK = 40
TOKENS = 3
WIDTHS = (4, 6, 8)

Step = Callable[["Program", list[Tensor]], Tensor]


class Program(nn.Module):
    """Steps over a pool of activations ``[1, tokens, width]``; the last and all planted ones are read by linears."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.steps: list[tuple[str, Step]] = []
        self.widths: list[int] = []
        self.parts = nn.ModuleList()
        self.tables = nn.ParameterList()
        self.planted: list[str] = []
        self.ends: dict[int, int] = {}
        self.norms: list[int] = []
        width = self.draw.choice(WIDTHS)
        self.start = nn.Embedding(5, width)
        self.widths.append(width)
        for _ in range(self.draw.randint(3, 12)):
            name = self.draw.choice(list(OPERATORS))
            made = OPERATORS[name](self)
            if made is not None:
                step, width = made
                self.steps.append((name, step))
                self.widths.append(width)
        self.out = nn.Linear(self.widths[-1], 3, bias=self.draw.random() < 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        pool = [self.start(tokens)]
        for _, step in self.steps:
            pool.append(step(self, pool))
        return torch.cat([self.out(pool[-1]), *(self.parts[k](pool[place]) for place, k in self.ends.items())], -1)

    # --- drawing ----------------------------------------------------------------------------------------------------

    def some(self) -> int:
        """A place in the pool, most often the last one."""
        return len(self.widths) - 1 if self.draw.random() < 0.7 else self.draw.randrange(len(self.widths))

    def like(self, place: int) -> int:
        """Another place of the same width, the same where there is no other."""
        same = [i for i, width in enumerate(self.widths) if width == self.widths[place] and i != place]
        return self.draw.choice(same) if same else place

    def part(self, module: nn.Module) -> int:
        self.parts.append(module)
        return len(self.parts) - 1

    def parameter(self, *shape: int) -> int:
        self.tables.append(nn.Parameter(torch.randn(shape)))
        return len(self.tables) - 1

    def linear(self, inputs: int, outputs: int) -> int:
        """A new linear, or now and then one that is used already."""
        old = [
            i
            for i, m in enumerate(self.parts)
            if isinstance(m, nn.Linear) and (m.in_features, m.out_features) == (inputs, outputs)
        ]
        if old and self.draw.random() < 0.1:
            return self.draw.choice(old)
        return self.part(nn.Linear(inputs, outputs, bias=self.draw.random() < 0.5))


Made = tuple[Step, int] | None


def _linear(p: Program) -> Made:
    at, width = p.some(), p.draw.choice(WIDTHS)
    k = p.linear(p.widths[at], width)
    return lambda m, pool: m.parts[k](pool[at]), width


def _matmul(p: Program) -> Made:
    at, width = p.some(), p.draw.choice(WIDTHS)
    transposed = p.draw.random() < 0.5
    k = p.parameter(*((width, p.widths[at]) if transposed else (p.widths[at], width)))
    return lambda m, pool: pool[at] @ (m.tables[k].T if transposed else m.tables[k]), width


def _slices(p: Program) -> Made:
    """One parameter holds two linears."""
    at, width = p.some(), p.draw.choice(WIDTHS)
    k = p.parameter(2 * width, p.widths[at])

    def step(m: Program, pool: list[Tensor]) -> Tensor:
        return F.linear(pool[at], m.tables[k][:width]) + F.linear(pool[at], m.tables[k][width:])

    return step, width


def _norm(p: Program) -> Made:
    at = p.some()
    width = p.widths[at]
    kinds = [nn.RMSNorm(width, eps=1e-3), nn.LayerNorm(width), nn.LayerNorm(width, bias=False), nn.RMSNorm(width)]
    old = [i for i in p.norms if p.parts[i].normalized_shape == (width,)]
    k = p.draw.choice(old) if old and p.draw.random() < 0.1 else p.part(p.draw.choice(kinds))
    p.norms.append(k)
    return lambda m, pool: m.parts[k](pool[at]), width


def _norm_by_hand(p: Program) -> Made:
    at = p.some()
    k = p.parameter(p.widths[at])
    centred, offset = p.draw.random() < 0.3, float(p.draw.random() < 0.5)

    def step(m: Program, pool: list[Tensor]) -> Tensor:
        x = pool[at]
        if centred:
            x = x - x.mean(-1, keepdim=True)
        return (offset + m.tables[k]) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))

    def plain(m: Program, pool: list[Tensor]) -> Tensor:
        x = pool[at]
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * m.tables[k]

    return (step if offset or centred else plain), p.widths[at]


def _residual(p: Program) -> Made:
    at = p.some()
    k, n = p.linear(p.widths[at], p.widths[at]), p.part(nn.RMSNorm(p.widths[at], eps=1e-3))
    return lambda m, pool: pool[at] + m.parts[k](m.parts[n](pool[at])), p.widths[at]


def _elementwise(p: Program) -> Made:
    at = p.some()
    functions: list[Callable[[Tensor], Tensor]] = [
        torch.relu,
        F.silu,
        F.gelu,
        torch.tanh,
        torch.neg,
        torch.abs,
        lambda x: F.leaky_relu(x, 0.2),
        lambda x: torch.relu(x).square(),
        lambda x: x * 0.5,
        lambda x: x / 3.0,
        lambda x: x + 1.0,
        lambda x: 1.0 - x,
        lambda x: x.clamp(min=0.0),
        lambda x: x.clamp(-1.0, 1.0),
        lambda x: x.clone(),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: torch.softmax(x, -1),
        lambda x: x**3,
        lambda x: torch.where(torch.tensor([True, False, True])[:, None], x, 0.0),
        lambda x: x.masked_fill(torch.tensor([True, False, True])[:, None], 0.0),
    ]
    function = p.draw.choice(functions)
    return lambda m, pool: function(pool[at]), p.widths[at]


def _binary(p: Program) -> Made:
    at = p.some()
    other = p.like(at)
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.add,
        torch.add,
        torch.sub,
        torch.mul,
        torch.maximum,
        torch.max,
        lambda x, y: F.silu(x) * y,
        lambda x, y: x * torch.sigmoid(y),
        lambda x, y: x * (1 + y),
        lambda x, y: x / (1 + y.abs()),
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: x + y.mean(1, keepdim=True),
        lambda x, y: x * y[..., :1],
        lambda x, y: x + y[..., :1],
    ]
    function = p.draw.choice(functions)
    return lambda m, pool: function(pool[at], pool[other]), p.widths[at]


def _with_parameter(p: Program) -> Made:
    at = p.some()
    shape = p.draw.choice([(p.widths[at],), (1,), (TOKENS, p.widths[at]), (1, 1, p.widths[at]), (TOKENS, 1)])
    k = p.parameter(*shape)
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.add,
        torch.mul,
        torch.div,
        lambda x, w: x * (1 + w),
        lambda x, w: x - w,
        lambda x, w: x * torch.sigmoid(w),
    ]
    function = p.draw.choice(functions)
    return lambda m, pool: function(pool[at], m.tables[k]), p.widths[at]


def _constant(p: Program) -> Made:
    at = p.some()
    generator = torch.Generator().manual_seed(p.draw.randrange(1 << 30))
    values = torch.rand(p.draw.choice([1, p.widths[at]]), generator=generator, dtype=torch.float64)
    function = p.draw.choice([torch.mul, torch.add, torch.div])
    return lambda m, pool: function(pool[at], values), p.widths[at]


def _move(p: Program) -> Made:
    """Data movement over the channels, the tokens, or both."""
    at = p.some()
    width = p.widths[at]
    order = list(range(width))
    p.draw.shuffle(order)
    half = width // 2
    functions: list[tuple[Callable[[Tensor], Tensor], int]] = [
        (lambda x: x[..., order], width),
        (lambda x: x.index_select(-1, torch.tensor(order)), width),
        (lambda x: x.flip(-1), width),
        (lambda x: x.roll(1, -1), width),
        (lambda x: x.roll(1, 1), width),
        (lambda x: x[:, [2, 0, 1]], width),
        (lambda x: x.view(1, TOKENS, 2, half).transpose(2, 3).reshape(1, TOKENS, width), width),
        (lambda x: x.reshape(1, width, TOKENS).transpose(1, 2), width),
        (lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), width),
        (lambda x: x[..., ::2].repeat_interleave(2, -1), width),
        (lambda x: F.pad(x[..., 1:], (0, 1)), width),
        (lambda x: x[..., :half].repeat(1, 1, 2), width),
        (lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1], width),
        (lambda x: x.sum(1, keepdim=True).expand(1, TOKENS, width), width),
        (lambda x: x.cumsum(1), width),
        (lambda x: torch.stack(x.unbind(-1), -1), width),
    ]
    function, out = p.draw.choice(functions)
    return lambda m, pool: function(pool[at]), out


def _split(p: Program) -> Made:
    """A fused gate and up."""
    at, width = p.some(), p.draw.choice(WIDTHS)
    k = p.linear(p.widths[at], 2 * width)
    act = p.draw.choice([F.silu, torch.relu, torch.sigmoid])
    interleaved = p.draw.random() < 0.3

    def step(m: Program, pool: list[Tensor]) -> Tensor:
        y = m.parts[k](pool[at])
        gate, up = (y[..., ::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
        return act(gate) * up

    return step, width


def _cat(p: Program) -> Made:
    at, other = p.some(), p.some()
    if p.widths[at] + p.widths[other] > 16:
        return None
    return lambda m, pool: torch.cat([pool[at], pool[other]], -1), p.widths[at] + p.widths[other]


def _convolution(p: Program) -> Made:
    at = p.some()
    width = p.widths[at]
    k = p.part(nn.Conv1d(width, width, 2, padding=1, groups=width, bias=p.draw.random() < 0.5))
    return lambda m, pool: m.parts[k](pool[at].transpose(1, 2))[..., :TOKENS].transpose(1, 2), width


def _attention(p: Program) -> Made:
    at = p.some()
    kv_heads, repeat, size = p.draw.choice([(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 4, 2)])
    heads = kv_heads * repeat
    q, k, v = (p.linear(p.widths[at], n * size) for n in (heads, kv_heads, kv_heads))
    o = p.linear(heads * size, p.widths[at])
    norms = p.draw.random() < 0.3
    qn, kn = p.part(nn.RMSNorm(size, eps=1e-3)), p.part(nn.RMSNorm(size, eps=1e-3))
    way = p.draw.choice(["sdpa", "gqa", "matmul", "expand"])
    rotary = p.draw.random() < 0.5

    def step(m: Program, pool: list[Tensor]) -> Tensor:
        x = pool[at]
        qs, ks, vs = (m.parts[i](x).view(1, TOKENS, -1, size).transpose(1, 2) for i in (q, k, v))
        if norms:
            qs, ks = m.parts[qn](qs), m.parts[kn](ks)
        if rotary:
            qs, ks = _rotated(qs), _rotated(ks)
        if way == "gqa":
            mixed = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)
        else:
            if way == "expand":
                ks, vs = (
                    t[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(1, heads, TOKENS, size) for t in (ks, vs)
                )
            else:
                ks, vs = ks.repeat_interleave(repeat, 1), vs.repeat_interleave(repeat, 1)
            if way == "sdpa":
                mixed = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True)
            else:
                mixed = torch.softmax(qs @ ks.transpose(-1, -2) * size**-0.5, -1) @ vs
        return m.parts[o](mixed.transpose(1, 2).reshape(1, TOKENS, -1))

    return step, p.widths[at]


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(TOKENS, dtype=torch.float64)[:, None] * torch.arange(1, half + 1, dtype=torch.float64)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _experts(p: Program) -> Made:
    """Two experts, the token picks one; every expert runs on every token."""
    at = p.some()
    width = p.widths[at]
    router = p.linear(width, 2)
    ups = [p.linear(width, 4) for _ in range(2)]
    downs = [p.linear(4, width) for _ in range(2)]

    def step(m: Program, pool: list[Tensor]) -> Tensor:
        weight, chosen = torch.topk(torch.softmax(m.parts[router](pool[at]), -1), 1)
        out = torch.zeros_like(pool[at])
        for e in range(2):
            out = out + m.parts[downs[e]](torch.relu(m.parts[ups[e]](pool[at]))) * weight * (chosen == e)
        return out

    return step, width


def _picked_experts(p: Program) -> Made:
    """Expert matrices in one parameter, picked per token by data."""
    at = p.some()
    width = p.widths[at]
    router = p.linear(width, 2)
    up, down = p.parameter(2, 4, width), p.parameter(2, width, 4)

    def step(m: Program, pool: list[Tensor]) -> Tensor:
        x = pool[at].reshape(TOKENS, width)
        chosen = m.parts[router](x).argmax(-1)
        hidden = torch.relu(torch.bmm(m.tables[up][chosen], x.unsqueeze(-1)))
        return torch.bmm(m.tables[down][chosen], hidden).squeeze(-1).unsqueeze(0)

    return step, width


def _planted(p: Program) -> Made:
    """A gated unit that nothing else reads: its up rows must be found with its down columns."""
    at = p.some()
    up, gate = p.part(nn.Linear(p.widths[at], 5)), p.part(nn.Linear(p.widths[at], 5))
    down, norm = p.part(nn.Linear(5, p.widths[at])), p.part(nn.RMSNorm(p.widths[at], eps=1e-3))
    p.planted += [f"parts.{up}.weight", f"parts.{norm}.weight"]
    p.ends[len(p.widths)] = p.part(nn.Linear(p.widths[at], 2))

    def step(m: Program, pool: list[Tensor]) -> Tensor:
        h = m.parts[norm](pool[at])
        return m.parts[down](F.silu(m.parts[gate](h)) * m.parts[up](h))

    return step, p.widths[at]


OPERATORS: dict[str, Callable[[Program], Made]] = {
    "linear": _linear,
    "matmul": _matmul,
    "slices": _slices,
    "norm": _norm,
    "norm_by_hand": _norm_by_hand,
    "residual": _residual,
    "elementwise": _elementwise,
    "binary": _binary,
    "with_parameter": _with_parameter,
    "constant": _constant,
    "move": _move,
    "split": _split,
    "cat": _cat,
    "convolution": _convolution,
    "attention": _attention,
    "experts": _experts,
    "picked_experts": _picked_experts,
    "planted": _planted,
}


def check(seed: int) -> Counter[str]:
    """Run one program; AssertionError with everything that it takes to see what went wrong."""
    program = Program(seed)
    randomised(program, seed)
    tokens = torch.tensor([[1, 4, 2]])
    findings = analysed(program, tokens)
    described = f"seed {seed}: {' '.join(name for name, _ in program.steps)}\n{text(findings)}"
    sources = {slot.path for group in findings.groups for slot in group.sources}
    missed = [path for path in program.planted if path not in sources]
    assert not missed, f"planted, not found: {missed}\n{described}"
    value = program(tokens)
    assert bool(torch.isfinite(value).all())
    for outcome in outcomes(program, lambda m: m(tokens), findings, seed):
        assert outcome.change < 1e-6, f"{outcome}\n{described}"
    return Counter(
        programs=1, groups=len(findings.groups), spaces=len(findings.spaces), planted=len(program.planted)
    ) + Counter(name for name, _ in program.steps)


@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + PROGRAMS, CHUNK))
def test_every_claim_holds(first: int) -> None:
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        total += check(seed)
    print(dict(total))
    assert total["groups"] + total["spaces"] > CHUNK  # the programs are worth analysing


def test_programs_use_every_operator() -> None:
    used = {name for seed in range(100) for name, _ in Program(seed).steps}
    assert used == set(OPERATORS)
