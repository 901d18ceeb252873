"""Steps of programs that take several operators: norms, attention, experts, convolutions, scans, and the plants.

A planted step holds parameters that nothing else reads, so that its groups and spaces are there whatever surrounds it.
"""

from __future__ import annotations

from program_expressions import FAMILIES, expression
from programs import NORMS, TOKENS, VOCABULARY, WIDTHS, Entry, InvalidError, Scope


def _linear(s: Scope) -> list[str]:
    return [f"{s.linear(s.widths[0], s.draw.choice(WIDTHS))}({s.inputs[0]})"]


def _norm(s: Scope) -> list[str]:
    return [f"{s.norm(s.widths[0])}({s.inputs[0]})"]


def _norm_by_hand(s: Scope) -> list[str]:
    """As models write it: casts, weight or 1 + weight before or after, mean subtracted or not, bias or not."""
    x, h, g, width = s.inputs[0], s.name("h"), s.parameter(s.widths[0]), s.widths[0]
    lines = [f"{h} = {x}.to(torch.float64)"]
    if s.draw.random() < 0.4:
        lines.append(f"{h} = {h} - {h}.mean(-1, keepdim=True)")
    square = s.draw.choice((f"{h}.pow(2)", f"{h} * {h}", f"{h}.square()"))
    length = s.draw.choice(
        (
            f"{h} * torch.rsqrt(({square}).mean(-1, keepdim=True) + 1e-3)",
            f"{h} / torch.sqrt(({square}).sum(-1, keepdim=True) / {width} + 1e-3)",
            f"{h} / (({square}).mean(-1, keepdim=True) + 1e-3).sqrt()",
            f"{h} * torch.pow(({square}).mean(-1, keepdim=True) + 1e-3, -0.5)",
            f"{h} / (torch.linalg.vector_norm({h}, dim=-1, keepdim=True) * {width}**-0.5 + 1e-3)",
        )
    )
    lines.append(f"{h} = {length}")
    result = s.draw.choice((f"{g} * {h}", f"{h} * (1 + {g})", f"{h} * (1.0 + {g})", f"{g} * {h}.type_as({x})"))
    return [*lines, f"{result} + {s.parameter(width)}" if s.draw.random() < 0.2 else result]


def _residual(s: Scope) -> list[str]:
    """Pre-norm, post-norm, with a layer scale or a residual multiplier."""
    x, width = s.inputs[0], s.widths[0]
    inner, norm = s.linear(width, width), s.norm(width)
    form = s.draw.choice(
        (
            "{x} + {inner}({norm}({x}))",
            "{x} + {inner}({norm}({x}))",
            "{x} + {norm}({inner}({x}))",
            "{norm}({x} + {inner}({x}))",
            "{x} + 0.5 * {inner}({norm}({x}))",
            "{x} + {scale} * {inner}({norm}({x}))",
            "{x} * {scale} + {inner}({norm}({x})) * {scale}",
        )
    )
    scale = s.parameter(width) if "{scale}" in form else ""
    return [form.format(x=x, inner=inner, norm=norm, scale=scale)]


def _gated(s: Scope) -> list[str]:
    """A gate and an up projection in one linear: halves, alternating, or of three parts."""
    width, y, act = (
        s.draw.choice(WIDTHS),
        s.name("y"),
        s.draw.choice(("F.silu", "torch.relu", "torch.sigmoid", "F.gelu")),
    )
    form = s.draw.choice(("halves", "split", "alternating", "glu"))
    lines = [f"{y} = {s.linear(s.widths[0], 2 * width)}({s.inputs[0]})"]
    if form == "halves":
        return [*lines, f"{act}({y}.chunk(2, -1)[0]) * {y}.chunk(2, -1)[1]"]
    if form == "split":
        return [*lines, f"{act}({y}.split({width}, -1)[1]) * {y}.split({width}, -1)[0]"]
    if form == "glu":
        return [*lines, f"F.glu({y}, -1)"]
    return [*lines, f"{act}({y}[..., ::2]) * ({y}[..., 1::2] + {s.draw.choice((0.0, 1.0))})"]


def _slices(s: Scope) -> list[str]:
    """One parameter holds two linears."""
    width, w = s.draw.choice(WIDTHS), s.parameter(2 * s.draw.choice(WIDTHS), s.widths[0])
    return [f"F.linear({s.inputs[0]}, {w}[:{width}]) + F.linear({s.inputs[0]}, {w}[-{width}:])"]


def _stream_mixing(s: Scope) -> list[str]:
    """Hyper-connections: copies of a residual stream, mixed by a small matrix."""
    x, y = s.inputs
    mix = s.parameter(2, 2)
    read = s.draw.choice(("sum(2)", "mean(2)", "select(2, 0)"))
    return [f"(torch.softmax({mix}, -1) @ torch.stack([{x}, {y}], 2)).{read}"]


def _convolution(s: Scope) -> list[str]:
    x, width = f"{s.inputs[0]}.transpose(1, 2)", s.widths[0]
    bias = "" if s.draw.random() < 0.5 else ", bias=False"
    form = s.draw.random()
    if form < 0.5:
        conv = s.module(f"nn.Conv1d({width}, {width}, 2, padding=1, groups={width}{bias})")
    elif form < 0.75:
        conv = s.module(f"nn.Conv1d({width}, {s.draw.choice(WIDTHS)}, 2, padding=1{bias})")
    else:
        conv = s.module(f"nn.Conv1d({width}, {width}, 2, padding=1, groups={width // 2}{bias})")
    act = s.draw.choice(("{}", "F.silu({})", "torch.relu({})"))
    return [act.format(f"{conv}({x})[..., :{TOKENS}]") + ".transpose(1, 2)"]


def _scan(s: Scope) -> list[str]:
    """A state-space layer, token by token: decay by data, input and output matrices by data, a skip."""
    x, width, h, b = s.inputs[0], s.widths[0], s.name("h"), s.name("b")
    a, skip, dt = s.parameter(width, 2), s.parameter(width), s.name("dt")
    lines = [
        f"{b} = {s.linear(width, 4)}({x})",
        f"{dt} = F.softplus({s.linear(width, width)}({x}))",
        f"{h} = torch.zeros({s.batch}, {width}, 2, dtype=torch.float64)",
    ]
    out = []
    for t in range(TOKENS):
        decay = f"torch.exp({dt}[:, {t}, :, None] * -torch.exp({a}))"
        lines.append(f"{h} = {decay} * {h} + ({dt} * {x})[:, {t}, :, None] * {b}[:, {t}, None, :2]")
        lines.append(f"{s.name('y')}{t} = ({h} * {b}[:, {t}, None, 2:]).sum(-1)")
        out.append(f"{s.name('y')}{t}")
    return [*lines, f"torch.stack([{', '.join(out)}], 1) + {x} * {skip}"]


# --- attention --------------------------------------------------------------------------------------------------------

HEADS = ((1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 4, 2), (3, 1, 2))
"""KV heads, query heads for each, head size."""
WAYS = ("sdpa", "gqa", "matmul", "expand", "capped", "left", "mask", "bmm", "einsum")
"""How attention is written."""
ROTARY = {
    "halves": "{x} * {cos}.repeat(1, 2) + torch.cat([-{x}[..., {half}:], {x}[..., :{half}]], -1) * {sin}.repeat(1, 2)",
    "alternating": "{x} * {cos}.repeat_interleave(2, -1)"
    " + torch.stack([-{x}[..., 1::2], {x}[..., ::2]], -1).flatten(-2) * {sin}.repeat_interleave(2, -1)",
    "none": "{x}",
}


def _mixed(s: Scope, ways: tuple[str, ...], q: str, k: str, v: str, repeat: int, size: int) -> list[str]:
    """Attention over heads ``[{B}, heads, {T}, size]`` in one of the ways in which models write it; the result last."""
    way = s.draw.choice(ways)
    b = s.batch
    scores = f"torch.matmul({q}, {k}.transpose(2, 3)) * {size**-0.5}"
    mask = f"torch.triu(torch.full(({TOKENS}, {TOKENS}), float('-inf'), dtype=torch.float64), 1)"
    if way == "gqa":
        return [f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True, enable_gqa={repeat > 1})"]
    if way == "expand":
        spread = f"[:, :, None].expand(-1, -1, {repeat}, -1, -1).reshape({b}, -1, {TOKENS}, {size})"
        lines = [f"{t} = {t}{spread}" for t in (k, v)]
    else:
        lines = [f"{t} = {t}.repeat_interleave({repeat}, 1)" for t in (k, v)]
    if way == "mask":
        return [*lines, f"F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={mask})"]
    if way in ("sdpa", "expand"):
        return [*lines, f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True)"]
    if way == "matmul":
        return [*lines, f"torch.matmul(torch.softmax({scores} + {mask}, -1), {v})"]
    if way == "capped":
        return [*lines, f"torch.matmul(F.softmax(5.0 * torch.tanh({scores} / 5.0) + {mask}, dim=-1), {v})"]
    if way == "bmm":
        flat = [f"{t}.reshape(-1, {TOKENS}, {size})" for t in (q, k, v)]
        weights = f"torch.softmax(torch.bmm({flat[0]}, {flat[1]}.transpose(1, 2)), -1)"
        return [*lines, f"torch.bmm({weights}, {flat[2]}).view({b}, -1, {TOKENS}, {size})"]
    weights = f"torch.softmax(torch.einsum('bhtd,bhsd->bhts', {q}, {k}), -1)"
    if way == "left":  # as on images, whose channels come before their places
        return [*lines, f"({v}.mT @ {weights}.mT).mT"]
    return [*lines, f"torch.einsum('bhts,bhsd->bhtd', {weights}, {v})"]


def _attention(s: Scope, planted: bool = False) -> list[str]:
    kv_heads, repeat, size = s.draw.choice(HEADS)
    heads, b = kv_heads * repeat, s.batch
    x, source = s.inputs[0], s.inputs[-1]
    q, k, v = (s.name(letter) for letter in "qkv")
    named = {}
    if planted or s.inputs[0] != s.inputs[-1] or s.draw.random() < 0.5:
        lines = []
        for name, number, read in ((q, heads, 0), (k, kv_heads, -1), (v, kv_heads, -1)):
            named[name] = s.linear(s.widths[read], number * size)
            lines.append(f"{name} = {named[name]}({(x, source)[read]}).view({b}, {TOKENS}, -1, {size}).transpose(1, 2)")
    else:
        lines = _fused(s, kv_heads, repeat, size, q, k, v)
    if s.draw.random() < 0.3:
        norms = [s.norm(size), s.norm(size)]
        lines += [f"{name} = {norm}({name})" for name, norm in zip((q, k), norms, strict=True)]
    speeds = f"torch.tensor({[1.0, 0.3][: size // 2]}, dtype=torch.float64)"
    angles = f"torch.outer(torch.arange({TOKENS}, dtype=torch.float64), {speeds})"
    rotated = ROTARY[s.draw.choice(list(ROTARY))]
    cos, sin = s.name("cos"), s.name("sin")
    lines.append(f"{cos}, {sin} = {angles}.cos(), {angles}.sin()")
    lines += [f"{name} = {rotated.format(x=name, cos=cos, sin=sin, half=size // 2)}" for name in (q, k)]
    *more, mixed = _mixed(s, WAYS[:6] if planted else WAYS, q, k, v, repeat, size)
    if planted and repeat == 1 and s.draw.random() < 0.4:  # a gain of the heads, or one for all of them
        gain = s.parameter(size) if s.draw.random() < 0.5 else f"{s.parameter(heads * size)}.view({heads}, 1, {size})"
        mixed = f"({mixed}) * {gain}"
    o = s.linear(heads * size, s.widths[0])
    if planted:
        s.plant("group", (f"{named[v]}.weight",), (f"{o}.weight",))
        s.plant("space", (f"{named[v]}.weight",))
    return [*lines, *more, f"{o}(({mixed}).transpose(1, 2).reshape({b}, {TOKENS}, -1))"]


def _fused(s: Scope, kv_heads: int, repeat: int, size: int, q: str, k: str, v: str) -> list[str]:
    """One linear for queries, keys and values: side by side, or per KV head."""
    heads, b, y = kv_heads * repeat, s.batch, s.name("y")
    made = s.linear(s.widths[0], (heads + 2 * kv_heads) * size)
    if s.draw.random() < 0.5:
        sizes = [heads * size, kv_heads * size, kv_heads * size]
        lines = [f"{q}, {k}, {v} = {made}({s.inputs[0]}).split({sizes}, -1)"]
        return lines + [f"{n} = {n}.view({b}, {TOKENS}, -1, {size}).transpose(1, 2)" for n in (q, k, v)]
    lines = [f"{y} = {made}({s.inputs[0]}).view({b}, {TOKENS}, {kv_heads}, {repeat + 2}, {size})"]
    lines.append(f"{q} = {y}[:, :, :, :{repeat}].reshape({b}, {TOKENS}, {heads}, {size}).transpose(1, 2)")
    return lines + [f"{n} = {y}[:, :, :, {at}].transpose(1, 2)" for n, at in ((k, -2), (v, -1))]


# --- experts ----------------------------------------------------------------------------------------------------------


def _experts(s: Scope) -> list[str]:
    """Every expert runs on every token, each token keeps what its own ones say."""
    x, width, number = s.inputs[0], s.widths[0], s.draw.choice((2, 3))
    weight, chosen, out = s.name("weight"), s.name("chosen"), s.name("out")
    lines = [
        f"{weight}, {chosen} = torch.topk(torch.softmax({s.linear(width, number)}({x}), -1), 1)",
        f"{out} = torch.zeros_like({x})",
    ]
    for e in range(number):
        up, down = s.linear(width, 4), s.linear(4, width)
        lines.append(f"{out} = {out} + {down}(torch.relu({up}({x}))) * {weight} * ({chosen} == {e})")
    return [*lines, out]


def _picked_experts(s: Scope) -> list[str]:
    """Matrices picked per token by data."""
    x, width, chosen = s.name("rows"), s.widths[0], s.name("chosen")
    up, down = s.parameter(2, 4, width), s.parameter(2, width, 4)
    return [
        f"{x} = {s.inputs[0]}.reshape(-1, {width})",
        f"{chosen} = {s.linear(width, 2)}({x}).argmax(-1)",
        f"{x} = torch.bmm({down}[{chosen}], torch.relu(torch.bmm({up}[{chosen}], {x}.unsqueeze(-1))))",
        f"{x}.squeeze(-1).view({s.batch}, {TOKENS}, {width})",
    ]


def _batched_experts(s: Scope) -> list[str]:
    """All experts on all tokens in one product, weighted by the router."""
    x, width, number = s.name("rows"), s.widths[0], s.draw.choice((2, 3))
    gate_up, down = s.parameter(number, width, 8), s.parameter(number, 4, width)
    route = f"torch.softmax({s.linear(width, number)}({x}), -1)"
    y = s.name("y")
    up = s.draw.choice((f"F.silu({y}[..., :4]) * {y}[..., 4:]", f"F.gelu({y}[..., ::2]) * {y}[..., 1::2]"))
    return [
        f"{x} = {s.inputs[0]}.reshape(-1, {width})",
        f"{y} = torch.bmm({x}.repeat({number}, 1).view({number}, -1, {width}), {gate_up})",
        f"{y} = torch.matmul({up}, {down})",
        f"({y} * {route}.transpose(0, 1)[..., None]).sum(0).view({s.batch}, {TOKENS}, {width})",
    ]


def _grouped_experts(s: Scope, planted: bool = False) -> list[str]:
    """Tokens sorted by expert, one product per run, results summed back to their tokens."""
    x, width, number, b = s.name("rows"), s.widths[0], 3, s.batch
    router = s.linear(width, number)
    gate_up, down = s.parameter(number, 8, width), s.parameter(number, width, 4)
    p, e, order, ends, y = (s.name(n) for n in ("p", "e", "order", "ends", "y"))
    counts = s.draw.choice(
        (f"torch.histc({e}[{order}].double(), {number}, 0, {number - 1})", f"torch.bincount({e}, minlength={number})")
    )
    product = "torch.ops.transformers.grouped_mm_fallback"
    hidden = s.draw.choice(
        (f"F.silu({y}[:, :4]) * {y}[:, 4:]", f"torch.relu({y}.chunk(2, -1)[0]) * {y}.chunk(2, -1)[1]")
    )
    if planted:
        s.plant("group", (gate_up,), (down,))
    if s.draw.random() < 0.5:
        back = f"torch.zeros_like({x}).index_add(0, {order} // 2, {y})"
    else:
        back = f"{y}[torch.argsort({order})].view(-1, 2, {width}).sum(1)"
    return [
        f"{x} = {s.inputs[0]}.reshape(-1, {width})",
        f"{p}, {e} = torch.topk(torch.softmax({router}({x}), -1), 2)",
        f"{e} = {e}.reshape(-1)",
        f"{order} = torch.argsort({e})",
        f"{ends} = torch.cumsum({counts}, 0).to(torch.int32)",
        f"{y} = {product}({x}[{order} // 2], {gate_up}.transpose(-2, -1), {ends})",
        f"{y} = {product}({hidden}, {down}.transpose(-2, -1), {ends})",
        f"{y} = {y} * {p}.reshape(-1)[{order}].unsqueeze(-1)",
        f"({back}).view({b}, {TOKENS}, {width})",
    ]


def _tied_head(s: Scope) -> list[str]:
    """A linear that has the embedding's matrix."""
    table = s.network.table_0
    if s.widths[0] != table.embedding_dim:  # type: ignore[union-attr]  # an Embedding
        raise InvalidError("not the table's width")
    head = s.module(f"nn.Linear({s.widths[0]}, {VOCABULARY}, bias=False)  # its weight is table_0.weight")
    s.network.get_submodule(head.removeprefix("self.")).weight = table.weight
    return [f"{head}({s.inputs[0]})"]


# --- plants -----------------------------------------------------------------------------------------------------------


def _planted_mlp(s: Scope) -> list[str]:
    """A gated unit that nothing else reads: norm -> gate and up, up -> down."""
    x, width, h = s.inputs[0], s.widths[0], s.name("h")
    norm, gate, up, down = s.norm(width), s.linear(width, 5), s.linear(width, 5), s.linear(5, width)
    s.plant("group", (f"{up}.weight",), (f"{down}.weight",))
    s.plant("group", (f"{norm}.weight",), (f"{gate}.weight", f"{up}.weight"))
    return [f"{h} = {norm}({x})", f"{down}(F.silu({gate}({h})) * {up}({h}))"]


def _planted_convolution(s: Scope) -> list[str]:
    """A linear, a depthwise convolution that makes one or two channels of each, a linear."""
    each, h = s.draw.choice((1, 2)), s.name("h")
    up, down = s.linear(s.widths[0], 4), s.linear(4 * each, s.widths[0])
    conv = s.module(f"nn.Conv1d(4, {4 * each}, 2, padding=1, groups=4)")
    s.plant("group", (f"{up}.weight",), (f"{conv}.weight",))
    act = s.draw.choice(("{}", "F.silu({})", "{}.relu()"))
    if act != "F.silu({})":
        s.plant("group", (f"{conv}.weight",), (f"{down}.weight",))
    lines = [f"{h} = {conv}({up}({s.inputs[0]}).transpose(1, 2))[..., :{TOKENS}].transpose(1, 2)"]
    return [*lines, f"{down}({act.format(h)})"]


SAFE = (
    *("{x}.relu()", "-{x}", "{x} * 0.5", "{x}.abs()", "{x}.clamp(min=0)", "F.leaky_relu({x}, 0.1)"),
    *("{x}.to(torch.float64)", "{x}.flip(-1)", "{x}[..., [3, 1, 5, 0, 2, 4]]", "{x}.cumsum(1)", "{x}.flip(1)"),
    *("{x}.roll(1, 1)", "{x} * torch.sigmoid({o}[..., :1])"),
)
"""What lets any scale of ``{x}`` through, ``{o}`` being an activation of the program."""


def _planted_chain(s: Scope) -> list[str]:
    """A linear, operators that let any scale through, a linear."""
    h, width = s.name("h"), s.widths[0]
    up, down = s.linear(width, 6), s.linear(6, width)
    lines = [f"{h} = {up}({s.inputs[0]})"]
    for form in s.draw.choices(SAFE, k=s.draw.randint(1, 4)):
        lines.append(f"{h} = {form.format(x=h, o=s.inputs[0])}")
    s.plant("group", (f"{up}.weight",), (f"{down}.weight",))
    return [*lines, f"{down}({h})"]


def _dense(s: Scope, inputs: int, outputs: int) -> str:
    """A convolution of all channels over two tokens."""
    return s.module(f"nn.Conv1d({inputs}, {outputs}, 2, padding=1)")


def _applied(layer: str, x: str, convolved: bool) -> str:
    return f"{layer}(({x}).transpose(1, 2))[..., :{TOKENS}].transpose(1, 2)" if convolved else f"{layer}({x})"


def _planted_stream(s: Scope) -> list[str]:
    """A residual stream of its own, through blocks whose inner operators are any at all."""
    width, h, u = s.draw.choice(WIDTHS), s.name("h"), s.name("u")
    table = s.module(f"nn.Embedding({VOCABULARY}, {width})")
    lines, writers = [f"{h} = {table}(tokens)"], [f"{table}.weight"]
    kind = s.draw.choice(NORMS)
    for _ in range(s.draw.randint(1, 2)):
        norm = s.module(kind.format(width))
        convolved = (
            kind.startswith("nn.RMS") and s.draw.random() < 0.25
        )  # the bias of a LayerNorm is not added to zeros
        up, down = (_dense(s, *sizes) if convolved else s.linear(*sizes) for sizes in ((width, 6), (6, width)))
        lines.append(f"{u} = {_applied(up, f'{norm}({h})', convolved)}")
        form = s.draw.choice([t for f in ("homogeneous", "nonlinear", "movement", "arithmetic") for t in FAMILIES[f]])
        lines.append(f"{u} = {expression(s, form, (u,), 6)}")
        factor = s.draw.choice(("", "0.5 * ", "{} * ", "(1 + {}) * "))
        factor = factor.format(s.parameter(width)) if "{}" in factor else factor  # a LayerScale
        lines.append(f"{h} = {h} + {factor}{_applied(down, u, convolved)}")
        writers.append(f"{down}.weight")
    if kind.startswith("nn.RMS") and s.draw.random() < 0.25:  # the table is the head too, and cannot be centred
        s.plant("space", tuple(writers))
        joined = s.linear(s.widths[0], VOCABULARY)
        return [*lines, f"F.linear(F.rms_norm({h}, ({width},)), {table}.weight) + {joined}({s.inputs[0]})"]
    norm, outputs = s.module(kind.format(width)), s.draw.choice(WIDTHS)
    head, joined = s.linear(width, outputs), s.linear(s.widths[0], outputs)
    s.plant("space", tuple(writers))
    return [*lines, f"{head}({norm}({h})) + {joined}({s.inputs[0]})"]


BLOCKS: dict[str, Entry] = {
    "linear": Entry(_linear),
    "norm": Entry(_norm),
    "norm by hand": Entry(_norm_by_hand),
    "residual": Entry(_residual),
    "gated": Entry(_gated),
    "slices": Entry(_slices),
    "stream mixing": Entry(_stream_mixing, inputs=2, alike=True),
    "convolution": Entry(_convolution),
    "scan": Entry(_scan),
    "attention": Entry(_attention),
    "cross-attention": Entry(_attention, inputs=2),
    "experts": Entry(_experts),
    "picked experts": Entry(_picked_experts),
    "batched experts": Entry(_batched_experts),
    "grouped experts": Entry(_grouped_experts),
    "tied head": Entry(_tied_head),
}
PLANTS: dict[str, Entry] = {
    "planted mlp": Entry(_planted_mlp, shared=False),
    "planted chain": Entry(_planted_chain, shared=False),
    "planted attention": Entry(lambda s: _attention(s, planted=True), shared=False),
    "planted experts": Entry(lambda s: _grouped_experts(s, planted=True), shared=False),
    "planted stream": Entry(_planted_stream, shared=False),
    "planted convolution": Entry(_planted_convolution, shared=False),
}

CATALOGUE: dict[str, Entry] = {**BLOCKS, **PLANTS, **{k: e for family in FAMILIES.values() for k, e in family.items()}}
_CHANCES = {"homogeneous": 20, "movement": 14, "nonlinear": 14, "arithmetic": 14, "products": 8, "in place": 0.6}
_BLOCK_CHANCES = {"linear": 12, "norm": 5, "norm by hand": 4, "residual": 6, "gated": 4, "attention": 3}
WEIGHTS: dict[str, float] = {
    **{name: float(_BLOCK_CHANCES.get(name, 1.3)) for name in BLOCKS},
    **dict.fromkeys(PLANTS, 1.5),
    **{name: chance / len(FAMILIES[f]) for f, chance in _CHANCES.items() for name in FAMILIES[f]},
}
"""How often each kind of step is drawn."""
