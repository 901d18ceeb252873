"""For every operator of the table a program of one or two activations, which stands between two linears.

Activations are ``[1, 3, 4]`` float64: one sequence of three tokens with four channels.
"""

from __future__ import annotations

from collections.abc import Callable

import complex_programs
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 - registers the grouped product
from small_graphs import Graph, lin, par
from torch import Tensor, nn

A = torch.ops.aten
X = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([True, False, True])[:, None]
ONES = torch.ones(4, dtype=torch.float64)
ORDER = torch.tensor([2, 0, 1])
ROWS = torch.tensor([0, 2])

Program = Callable[[Tensor], Tensor]


def seeded(function: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(7)
    return function()


def filled(empty: Tensor, x: Tensor) -> Tensor:
    return empty.copy_(x)


def comparing(function: Callable[[Tensor, float], Tensor]) -> Program:
    return lambda x: x * function(x, 0.0)


def times(function: Program) -> Program:
    return lambda x: x * function(x)


def interpolating(mode: str) -> Callable[[Tensor, int], Tensor]:
    return lambda x, factor: F.interpolate(x, scale_factor=2 * factor, mode=mode)


def over_tokens(function: Callable[[Tensor, int], Tensor], dims: int) -> Program:
    """A function of ``[batch, channels, ...]`` with ``dims`` axes, the tokens along the last of them."""
    return lambda x: function(x.mT.reshape(1, 4, *(1,) * (dims - 1), 3), 1).flatten(2).mT[:, :3]


# f(s x) = s**power f(x) for every s > 0, channel by channel
HOMOGENEOUS: dict[str, tuple[Program, int]] = complex_programs.HOMOGENEOUS | {
    "to": (lambda x: x.to(torch.float64), 1),
    "_to_copy": (lambda x: A._to_copy(x, dtype=torch.float64), 1),
    "type_as": (lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)), 1),
    "dropout": (lambda x: F.dropout(x, 0.3, training=False), 1),
    "feature_dropout": (lambda x: F.dropout1d(x, 0.3, training=False), 1),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.3, training=False), 1),
    "neg": (torch.neg, 1),
    "negative": (torch.negative, 1),
    "positive": (torch.positive, 1),
    "real": (A.real, 1),
    "conj": (A.conj, 1),
    "relu": (torch.relu, 1),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.3), 1),
    "rrelu": (lambda x: F.rrelu(x, 0.1, 0.3, training=False), 1),
    "abs": (torch.abs, 1),
    "absolute": (torch.absolute, 1),
    "mul by a number": (lambda x: x * -0.3, 1),
    "multiply": (lambda x: torch.multiply(x, 0.3), 1),
    "div by a number": (lambda x: x / 7, 1),
    "true_divide": (lambda x: torch.true_divide(x, 7), 1),
    "divide": (lambda x: torch.divide(x, 7), 1),
    "add of zero": (lambda x: x + 0.0, 1),
    "square": (torch.square, 2),
    "pow 2": (lambda x: x**2, 2),
    "pow 3": (lambda x: x.pow(3), 3),
    "float_power": (lambda x: torch.float_power(x, 2.0), 2),
    "product with itself": (lambda x: x * x, 2),
    "product with its relu": (lambda x: x * torch.relu(x), 2),
    "square over itself": (lambda x: x * x * x.abs().clamp(min=0).reciprocal(), 1),
    "two roots": (lambda x: x.abs().sqrt() * x.abs().rsqrt() * x, 1),
    "clamp from zero": (lambda x: x.clamp(min=0), 1),
    "clamp_min": (lambda x: A.clamp_min(x, 0.0), 1),
    "clamp_max": (lambda x: A.clamp_max(x, 0.0), 1),
    "clip": (lambda x: x.clip(max=0.0), 1),
    "threshold at zero": (lambda x: F.threshold(x, 0.0, 0.0), 1),
    "amax": (lambda x: x.amax(1, keepdim=True).expand(1, 3, 4), 1),
    "amin": (lambda x: x - x.amin(1, keepdim=True), 1),
    "max": (lambda x: x.max(1, keepdim=True).values, 1),
    "min": (lambda x: x.min(1, keepdim=True).values, 1),
    "sum over tokens": (lambda x: x.sum(1), 1),
    "nansum": (lambda x: x.nansum(1), 1),
    "mean over tokens": (lambda x: x.mean(1, keepdim=True), 1),
    "var": (lambda x: x.var(1), 2),
    "std": (lambda x: x.std(1, unbiased=False), 1),
    "var_mean": (lambda x: torch.var_mean(x, 1, keepdim=True)[1] - x, 1),
    "cumsum over tokens": (lambda x: x.cumsum(1), 1),
    "fft_fft": (lambda x: torch.fft.fft(x, dim=1).real, 1),
    "fft_ifft": (lambda x: torch.fft.ifft(x, n=3, dim=1).imag, 1),
    "fft_rfft": (lambda x: torch.fft.rfft(x, n=4, dim=1).abs(), 1),
    "fft_irfft": (lambda x: torch.fft.irfft(x, n=3, dim=1), 1),
    "fft_hfft": (lambda x: torch.fft.hfft(x, n=3, dim=1), 1),
    "fft_ihfft": (lambda x: torch.fft.ihfft(x, n=4, dim=1).real, 1),
    "cummax": (lambda x: x.cummax(1)[0], 1),
    "cummin": (lambda x: x.cummin(1)[0], 1),
    "length over tokens": (lambda x: torch.linalg.vector_norm(x, dim=1), 1),
    "topk": (lambda x: x.topk(1, 1).values, 1),
    "sort": (lambda x: x.sort(1).values, 1),
    "argmax": (lambda x: x * (1 + x.argmax(1, keepdim=True)), 1),
    "argmin": (lambda x: x * (1 + x.argmin(1, keepdim=True)), 1),
    "argsort": (lambda x: x * (1 + x.argsort(1)), 1),
    **{name: (comparing(getattr(torch, name)), 1) for name in ("eq", "ne", "gt", "ge", "lt", "le")},
    "compared with infinity": (lambda x: torch.where(x > -torch.inf, x, 0.0), 1),
    "compared with itself": (lambda x: torch.where(x > x.roll(1, 1), x, 0.0), 1),
    **{
        name: (times(getattr(torch, name)), 1)
        for name in ("sign", "sgn", "isnan", "isinf", "isfinite", "all", "any", "logical_not", "count_nonzero")
    },
    "logical_and": (lambda x: x * torch.logical_and(x, MASK), 1),
    "logical_or": (lambda x: x * torch.logical_or(x, MASK), 1),
    "logical_xor": (lambda x: x * torch.logical_xor(x, MASK), 1),
    "where": (lambda x: torch.where(MASK, x, 0.0), 1),
    "masked_fill": (lambda x: x.masked_fill(MASK, 0.0), 1),
    "fill": (lambda x: x * torch.zeros_like(x).fill_(2.0), 1),
    "zero": (lambda x: x - (2 * x).zero_(), 1),
    "lerp": (lambda x: torch.lerp(x, 2 * x, 0.3), 1),
    "addcmul": (lambda x: torch.addcmul(x, x, ONES, value=0.3), 1),
    "addcdiv": (lambda x: torch.addcdiv(x, x, 1 + ONES, value=0.3), 1),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.2], dtype=torch.float64)), 1),
    "maximum": (lambda x: torch.maximum(x, 2 * x), 1),
    "minimum": (lambda x: torch.minimum(x, 2 * x), 1),
    "fmax": (lambda x: torch.fmax(x, 2 * x), 1),
    "fmin": (lambda x: torch.fmin(x, torch.zeros(4, dtype=torch.float64)), 1),
    "sub": (lambda x: torch.subtract(x, 2 * x), 1),
    "rsub": (lambda x: torch.rsub(x, 2 * x), 1),
    **{
        f"{kind}{dims}d": (over_tokens(getattr(F, f"{kind}{dims}d"), dims), 1)
        for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for dims in (1, 2, 3)
    },
    **{
        f"upsample_{mode}{dims}d": (over_tokens(interpolating(mode), dims), 1)
        for mode, dims in [("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3)]
    },
    **{f"upsample_nearest{dims}d": (over_tokens(interpolating("nearest"), dims), 1) for dims in (1, 2, 3)},
    # --- data movement ---
    "alias": (A.alias, 1),
    "atleast": (lambda x: torch.atleast_3d(torch.atleast_2d(torch.atleast_1d(x))), 1),
    "broadcast_to": (lambda x: x[:, :1].broadcast_to(1, 3, 4), 1),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 1),
    "clone": (torch.clone, 1),
    "column_stack": (lambda x: torch.column_stack([x[0, :, :2], x[0, :, 2:]]), 1),
    "constant_pad_nd": (lambda x: A.constant_pad_nd(x[:, 1:], [0, 0, 1, 0]), 1),
    "contiguous": (lambda x: x.mT.contiguous().mT, 1),
    "copy": (lambda x: torch.zeros_like(x).copy_(x), 1),
    "detach": (lambda x: A.detach_copy(x.detach()), 1),
    "diag_embed": (lambda x: torch.diag_embed(x.mT).sum(-1).mT, 1),
    "diagonal": (lambda x: torch.diagonal(x[:, :, None].expand(1, 3, 3, 4), 0, 1, 2).mT, 1),
    "dstack": (lambda x: torch.dstack([x[:, :, :2], x[:, :, 2:]]), 1),
    "expand_as": (lambda x: x[:, :1].expand_as(x), 1),
    "flatten": (lambda x: x.view(1, 3, 2, 2).flatten(2), 1),
    "flip of tokens": (lambda x: x.flip(1), 1),
    "fliplr": (torch.fliplr, 1),
    "flipud": (torch.flipud, 1),
    "gather": (lambda x: torch.gather(x, 1, ORDER[None, :, None].expand(1, 3, 4)), 1),
    "hstack": (lambda x: torch.hstack([x[:, 1:], x[:, :1]]), 1),
    "index": (lambda x: x[:, ORDER], 1),
    "index with a list": (lambda x: x[:, [2, 0, 1]], 1),
    "index_select": (lambda x: x.index_select(1, ORDER), 1),
    "movedim": (lambda x: x.movedim(1, 2).moveaxis(1, 2), 1),
    "mT": (lambda x: x.mT.mT, 1),
    "narrow": (lambda x: x.narrow(1, 1, 1), 1),
    "numpy_T": (lambda x: x[0].T.T, 1),
    "pad of tokens": (lambda x: F.pad(x[:, 1:], (0, 0, 1, 0)), 1),
    "permute": (lambda x: x.permute(0, 2, 1).permute(0, 2, 1), 1),
    "pixel_shuffle": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.mT[..., None], 2), 2)[..., 0].mT, 1),
    "ravel": (lambda x: x.ravel().view(1, 3, 4), 1),
    "repeat": (lambda x: x[:, :1].repeat(1, 3, 1), 1),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1)[:, :3], 1),
    "reshape": (lambda x: x.reshape(3, 4), 1),
    "reshape_as": (lambda x: x.view(3, 4).reshape_as(x), 1),
    "roll of tokens": (lambda x: x.roll(1, 1), 1),
    "rot90": (lambda x: x.rot90(2, (0, 1)), 1),
    "select": (lambda x: x.select(1, 0), 1),
    "split": (lambda x: torch.cat(x.split(2, 1), 1), 1),
    "split_with_sizes": (lambda x: torch.cat(x.split([1, 2], 1), 1), 1),
    "squeeze": (lambda x: x.unsqueeze(0).squeeze(0), 1),
    "stack": (lambda x: torch.stack(x.unbind(1), 1), 1),
    "swapaxes": (lambda x: x.swapaxes(1, 2).swapdims(1, 2), 1),
    "t": (lambda x: x[0].t().t(), 1),
    "take_along_dim": (lambda x: x.take_along_dim(ORDER[None, :, None], 1), 1),
    "tensor_split": (lambda x: torch.concat(x.tensor_split(2, 1), 1), 1),
    "tile": (lambda x: x[:, :1].tile(1, 3, 1), 1),
    "transpose": (lambda x: x.transpose(0, 1), 1),
    "tril": (lambda x: torch.tril(x, 1), 1),
    "triu": (lambda x: torch.triu(x, -1), 1),
    "unflatten": (lambda x: x.unflatten(-1, (2, 2)).flatten(2), 1),
    "unfold": (lambda x: x.unfold(1, 2, 1)[:, :1, :, 0], 1),
    "im2col": (lambda x: F.unfold(x.mT[..., None], (2, 1), padding=(1, 0)).view(1, 4, 2, 4)[:, :, 1, :3].mT, 1),
    "as_strided": (lambda x: x.as_strided((1, 2, 2, 4), (12, 4, 4, 1))[:, [0, 0, 1], [0, 1, 1]], 1),
    "unsafe_chunk": (lambda x: torch.concatenate(torch.unsafe_chunk(x, 3, 1), 1), 1),
    "unsafe_split": (lambda x: torch.cat(torch.unsafe_split(x, 1, 1), 1), 1),
    "view_as": (lambda x: x.view(3, 4).view_as(x), 1),
    "vstack": (lambda x: torch.vstack([x, 2 * x]), 1),
    "_unsafe_view": (lambda x: A._unsafe_view(x, [3, 4]), 1),
    "_reshape_alias": (lambda x: A._reshape_alias(x, [1, 3, 4], [12, 4, 1]), 1),
    # --- constants ---
    "zeros": (lambda x: x + torch.zeros(4), 1),
    "new_zeros": (lambda x: x + x.new_zeros(4), 1),
    "zeros_like": (lambda x: x + torch.zeros_like(x), 1),
    "ones": (lambda x: x * torch.ones(4), 1),
    "new_ones": (lambda x: x * x.new_ones(4), 1),
    "ones_like": (lambda x: x * torch.ones_like(x), 1),
    "full_like": (lambda x: x * torch.full_like(x, 0.5), 1),
    "new_full": (lambda x: x * x.new_full((4,), 0.5), 1),
    "empty": (lambda x: filled(torch.empty(1, 3, 4, dtype=torch.float64), x), 1),
    "new_empty": (lambda x: filled(x.new_empty((1, 3, 4)), x), 1),
    "empty_like": (lambda x: filled(torch.empty_like(x), x), 1),
    "empty_strided": (lambda x: filled(torch.empty_strided((1, 3, 4), (12, 4, 1), dtype=torch.float64), x), 1),
    "rand": (lambda x: x * seeded(lambda: torch.rand(4)), 1),
    "randn": (lambda x: x * seeded(lambda: torch.randn(4)), 1),
    "randint": (lambda x: x * seeded(lambda: torch.randint(1, 5, (4,))), 1),
    "rand_like": (lambda x: x * seeded(lambda: torch.rand_like(x)), 1),
    "randn_like": (lambda x: x * seeded(lambda: torch.randn_like(x)), 1),
    "randint_like": (lambda x: x * seeded(lambda: torch.randint_like(x, 1, 5)), 1),
    "bernoulli": (lambda x: x * (0.5 + seeded(lambda: torch.bernoulli(ONES / 2))), 1),
    "multinomial": (lambda x: x[:, seeded(lambda: torch.multinomial(torch.ones(3), 3))], 1),
    "randperm": (lambda x: x[:, seeded(lambda: torch.randperm(3))], 1),
    "uniform": (lambda x: x * seeded(lambda: torch.zeros(4).uniform_()), 1),
    "normal": (lambda x: x * seeded(lambda: torch.normal(torch.zeros(4), 1.0)), 1),
    # --- writes ---
    "in place": (lambda x: x.mul_(2.0).relu_(), 1),
    "slice_scatter": (lambda x: torch.slice_scatter(2 * x, x[:, :2], 1, 1, 3), 1),
    "select_scatter": (lambda x: torch.select_scatter(2 * x, x[:, 0], 1, 1), 1),
    "index_add": (lambda x: torch.index_add(torch.zeros_like(x), 1, ROWS, x[:, :2]), 1),
    "index_copy": (lambda x: torch.index_copy(2 * x, 1, ROWS, x[:, :2]), 1),
    "index_fill": (lambda x: torch.index_fill(x, 1, ROWS, 0.0), 1),
    "index_put": (lambda x: torch.index_put(2 * x, (torch.tensor([0, 0]), ROWS), x[0, :2]), 1),
    "index_put of the data's choice": (lambda x: torch.index_put(2 * x, (0 * x[0, :, 0].argsort(),), x), 1),
    "scatter": (lambda x: torch.scatter(2 * x, 1, ROWS[None, :, None].expand(1, 2, 4), x), 1),
    "scatter of the data's choice": (lambda x: torch.scatter(2 * x, 1, x.argsort(1), x), 1),
    "scatter_add": (lambda x: torch.scatter_add(x, 1, ROWS[None, :, None].expand(1, 2, 4), x), 1),
    "scatter_reduce": (lambda x: torch.scatter_reduce(x, 1, ROWS[None, :, None].expand(1, 2, 4), x, "amax"), 1),
    "masked_scatter": (lambda x: x.masked_scatter(MASK, 2 * x), 1),
    "masked_scatter of the data's choice": (
        lambda x: x.masked_scatter(x.argmax(1, keepdim=True)[..., :1] > 0, 2 * x),
        1,
    ),
    "mixing tokens": (lambda x: torch.softmax(torch.eye(3, dtype=torch.float64), -1) @ x, 1),
}

_UNARY = """silu gelu tanh sigmoid softplus exp exp2 expm1 erf erfc sin cos sinh cosh asinh atan tan
elu selu celu mish hardswish hardsigmoid log_sigmoid logit round floor ceil trunc frac relu6 nan_to_num hardshrink
softshrink""".split()  # noqa: SIM905 - shorter

BLOCKS: dict[str, Program] = complex_programs.BLOCKS | {
    **{name: getattr(A, name) for name in _UNARY},
    "log": lambda x: x.abs().log(),
    "log2": lambda x: x.abs().log2(),
    "log10": lambda x: x.abs().log10(),
    "log1p": lambda x: x.abs().log1p(),
    "relu6": lambda x: F.relu6(20 * x),
    "logit": lambda x: A.logit(x, 1e-3),
    "nan_to_num": lambda x: torch.where(MASK, x, -torch.inf).nan_to_num(neginf=-3.0),
    "softmax": lambda x: torch.softmax(x, -1),
    "softmax over tokens": lambda x: torch.softmax(x, 1),
    "special_softmax": lambda x: torch.special.softmax(x, -1),
    "special_expit": torch.special.expit,
    "_softmax": lambda x: A._softmax(x, -1, False),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
    "logaddexp": lambda x: torch.logaddexp(x, x.roll(1, 1)),
    "atan2": lambda x: torch.atan2(x, ONES),
    "cumprod": lambda x: x.cumprod(1),
    "prod": lambda x: x.prod(1),
    "floor_divide": lambda x: torch.floor_divide(x, 0.3),
    "remainder": lambda x: torch.remainder(x, 0.5),
    "fmod": lambda x: torch.fmod(x, 0.5),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([-0.5, 0.1, 0.6], dtype=torch.float64)).double(),
    "histc": lambda x: torch.histc(x, 4, -1.0, 1.0),
    "softsign": F.softsign,
    "hardtanh": F.hardtanh,
    "tanhshrink": F.tanhshrink,
    "add of a constant": lambda x: x + 1.0,
    "sub from a constant": lambda x: 1.0 - x,
    "add of a constant tensor": lambda x: x + ONES,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp from a half": lambda x: x.clamp(min=0.5),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "compared with a number": lambda x: x * (x > 0.1),
    "masked_fill with a number": lambda x: x.masked_fill(MASK, 2.0),
    "where with a number": lambda x: torch.where(MASK, x, 2.0),
    "index_fill with a number": lambda x: torch.index_fill(x, 1, ROWS, 2.0),
    "index_put of a number": lambda x: torch.index_put(x, (torch.tensor([0]), ROWS), ONES),
    "scatter of a number": lambda x: torch.scatter(x, 1, x.argsort(1), 2.0),
    "division with rounding": lambda x: torch.div(x, 2.0, rounding_mode="floor"),
    "to integers": lambda x: (100 * x).to(torch.int64).to(torch.float64),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "instance_norm": lambda x: F.instance_norm(x.mT).mT,
    "mean and variance": lambda x: (x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True).add(1e-3).sqrt(),
    "glu": lambda x: F.glu(torch.cat([x, x], -1)),
    "pow of a number": lambda x: 2.0**x,
    "maximum with a constant": lambda x: torch.maximum(x, ONES),
    "lerp to a constant": lambda x: torch.lerp(x, ONES, 0.3),
    "addcmul to a constant": lambda x: torch.addcmul(ONES, x, ONES),
    "erfinv": lambda x: torch.erfinv(torch.tanh(x)),
    "einsum": lambda x: x + torch.einsum("bti,btj->bij", x, x).sum(1, keepdim=True),
    "bilinear": lambda x: F.bilinear(x, x, torch.ones(4, 4, 4, dtype=torch.float64)),
}

More = Callable[[Graph, Tensor, Tensor], Tensor]


def heads(x: Tensor) -> Tensor:
    return x.view(1, 3, 2, 2).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(1, 3, 4)


def experts(s: Graph, x: Tensor, counted: Callable[[Tensor], Tensor]) -> Tensor:
    """Each token goes to the expert that the data choose; rows of one expert lie together."""
    rows = x.reshape(3, 4)
    chosen = (s.router(rows)[:, 0] > 0).long()
    order = chosen.argsort(stable=True)
    offsets = counted(chosen).cumsum(0).to(torch.int32)
    hidden = torch.ops.transformers.grouped_mm_fallback(rows[order], s.up, offsets)
    out = torch.ops.transformers.grouped_mm_fallback(torch.relu(hidden), s.down, offsets)
    return out[order.argsort()].view(1, 3, 4)


# functions of two activations and of parameters: whatever is claimed must hold
WITH_MORE: dict[str, More] = complex_programs.WITH_MORE | {
    "add": lambda s, x, y: x + y,
    "add with a factor": lambda s, x, y: torch.add(x, y, alpha=2),
    "mul": lambda s, x, y: x * y,
    "div": lambda s, x, y: x / y,
    "maximum of two": lambda s, x, y: torch.maximum(x, y) + torch.fmin(x, y),
    "max of two": lambda s, x, y: torch.max(x, y) - torch.min(x, y),
    "compared": lambda s, x, y: torch.where(x > y, x, y),
    "condition": lambda s, x, y: torch.where(y > 0, x, 0.0),
    "lerp of two": lambda s, x, y: torch.lerp(x, y, 0.3),
    "lerp by a parameter": lambda s, x, y: torch.lerp(x, y, s.k),
    "lerp by an activation": lambda s, x, y: torch.lerp(x, x, y),
    "addcmul of two": lambda s, x, y: torch.addcmul(x, y, s.k),
    "addcdiv of two": lambda s, x, y: torch.addcdiv(x, y, s.k),
    "glu of one": lambda s, x, y: F.glu(torch.cat([x, y], -1)),
    "prelu of a parameter": lambda s, x, y: F.prelu(x.mT, s.k).mT,
    "a parameter": lambda s, x, y: x * s.k + y * (1 + s.k2),
    "a number in a parameter": lambda s, x, y: x + s.k[:1] * y,
    "copy of the other": lambda s, x, y: y + x.clone().copy_(y),
    "index_add of the other": lambda s, x, y: torch.index_add(x, 1, ROWS, y[:, :2]),
    "index_put of the other": lambda s, x, y: torch.index_put(
        x, (torch.tensor([0, 0]), ROWS), y[0, 1:], accumulate=True
    ),
    "index_put with a mask": lambda s, x, y: torch.index_put(
        x, (torch.zeros(1, dtype=torch.long), (y[0, :, 0] > 0).long()), y[0]
    ),
    "index_put of rows under a mask": lambda s, x, y: torch.index_put(x[0], (y[0, :, 0].argsort() > 0,), y[0, :2])[
        None
    ],
    "index_put over channels": lambda s, x, y: torch.index_put(
        x, (torch.zeros(1, dtype=torch.long), ORDER, y[0, :, 0].argsort()), y[0, :, 0]
    ),
    "scatter of the other": lambda s, x, y: torch.scatter(x, -1, y.argsort(-1), y),
    "scatter_add of the other": lambda s, x, y: torch.scatter_add(x, 1, y.argsort(1), y),
    "select_scatter of the other": lambda s, x, y: torch.select_scatter(x, y[..., 0], -1, 1),
    "masked_scatter of the other": lambda s, x, y: x.masked_scatter((y > 0)[..., :1], y),
    "masked_scatter by element": lambda s, x, y: x.masked_scatter(y > 0, y),
    "linear": lambda s, x, y: F.linear(x, s.m, s.k),
    "matmul": lambda s, x, y: x @ s.m + (s.m2 @ y.mT).mT,
    "mm": lambda s, x, y: torch.mm(x[0], s.m),
    "bmm": lambda s, x, y: torch.bmm(torch.cat([x, y]), s.stack).sum(0, keepdim=True),
    "addmm": lambda s, x, y: torch.addmm(s.k, x[0], s.m),
    "baddbmm": lambda s, x, y: torch.baddbmm(torch.zeros(1, 3, 3, dtype=torch.float64), x, y.mT, alpha=0.5) @ x,
    "einsum of a weight": lambda s, x, y: torch.einsum("btd,ed->bte", x, s.m),
    "tensordot": lambda s, x, y: torch.tensordot(x, s.stack, dims=([2], [2])).sum(2),
    "inner": lambda s, x, y: torch.inner(x, s.m),
    "einsum of a stack": lambda s, x, y: torch.einsum("btd,gde->bgte", x, s.stack).sum(1),
    "einsum of groups": lambda s, x, y: torch.einsum(
        "btgd,grd->btgr", x.view(1, 3, 2, 2), s.m.view(2, 2, 4)[..., :2]
    ).flatten(2),
    "einsum attention": lambda s, x, y: joined(
        torch.einsum(
            "bhts,bhsd->bhtd",
            torch.softmax(torch.einsum("bhtd,bhsd->bhts", heads(y), heads(y)), -1),
            heads(x),
        )
    ),
    "einsum of a mixture": lambda s, x, y: torch.einsum(
        "btn,btnd->btd", torch.sigmoid(y[..., :2]), torch.stack([x, 2 * x], 2)
    ),
    "scaled_dot_product_attention": lambda s, x, y: joined(
        F.scaled_dot_product_attention(heads(y), heads(y), heads(x), is_causal=True)
    ),
    "experts": lambda s, x, y: experts(s, x, lambda chosen: torch.histc(chosen.float(), 2, 0, 1)),
    "conv1d": lambda s, x, y: F.conv1d(x.mT, s.kernel, s.k, padding=1).mT[:, :3],
    "conv2d": lambda s, x, y: F.conv2d(x.mT[:, :, None], s.kernel[:, :, None], s.k, padding=(0, 1))[:, :, 0, :3].mT,
    "conv3d": lambda s, x, y: (
        F.conv3d(x.mT[:, :, None, None], s.kernel[:, :, None, None], padding=(0, 0, 1))[:, :, 0, 0, :3].mT
    ),
    "conv1d per channel": lambda s, x, y: F.conv1d(x.mT, s.thin, s.k, padding=1, groups=4).mT[:, :3],
    "conv1d in groups": lambda s, x, y: F.conv1d(x.mT, s.kernel[:, :2], padding=1, groups=2).mT[:, :3],
    "embedding": lambda s, x, y: x + F.embedding(torch.tensor([[1, 0, 3]]), s.m),
    "layer_norm": lambda s, x, y: F.layer_norm(x, (4,), s.k, s.k2) + y,
    "rms_norm": lambda s, x, y: F.rms_norm(x, (4,), s.k),
    "batch_norm": lambda s, x, y: F.batch_norm(x.mT, s.mean, s.spread, s.k, s.k2).mT,
    "_native_batch_norm_legit_no_training": lambda s, x, y: (
        A._native_batch_norm_legit_no_training(x.mT, s.k, s.k2, s.mean, s.spread, 0.1, 1e-5)[0].mT
    ),
    "group_norm": lambda s, x, y: F.group_norm(x.mT, 2, s.k, s.k2).mT,
    "instance_norm": lambda s, x, y: F.instance_norm(x.mT, weight=s.k, bias=s.k2).mT,
    "norm by hand with var": lambda s, x, y: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-3) * s.k + s.k2
    ),
    "norm by hand with std": lambda s, x, y: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3) * s.k,
}


def between(function: Program) -> Graph:
    return Graph(lambda s, x: s.b(function(s.a(x))), a=lin(), b=lin())


def parts() -> dict[str, nn.Module | Tensor]:
    """Parameters and buffers that programs of ``WITH_MORE`` use."""
    shapes = {"k": (4,), "k2": (4,), "m": (4, 4), "m2": (4, 4), "stack": (2, 4, 4), "up": (2, 4, 4), "down": (2, 4, 4)}
    shapes |= {"kernel": (4, 4, 2), "thin": (4, 1, 2)}
    return {
        **{name: par(*shape) for name, shape in shapes.items()},
        "router": lin(4, 1),
        "mean": ONES / 3,
        "spread": ONES / 2,
        "a": lin(),
        "a2": lin(),
        "b": lin(),
    }


def with_more(function: More) -> Graph:
    return Graph(lambda s, x: s.b(function(s, s.a(x), s.a2(x))), **parts())


def in_a_space(function: More) -> Graph:
    """The same function on what is added to a residual stream."""

    def forward(s: Graph, tokens: Tensor) -> Tensor:
        stream = s.table(tokens)
        h = s.norm(stream)
        return s.b(s.norm_2(stream + function(s, s.a(h), s.a2(h)))) + s.b2(s.norm_3(stream))

    norms = {name: nn.RMSNorm(4, eps=1e-3) for name in ("norm", "norm_2", "norm_3")}
    return Graph(forward, table=nn.Embedding(7, 4), b2=lin(), **norms, **parts())


def on_the_stream(function: More) -> Graph:
    """The same function on the residual stream itself."""

    def forward(s: Graph, tokens: Tensor) -> Tensor:
        stream = s.table(tokens)
        changed = function(s, stream, s.a2(s.norm(stream)))
        return s.b(s.norm_2(changed)) + s.b2(s.norm_3(stream))

    norms = {name: nn.RMSNorm(4, eps=1e-3) for name in ("norm", "norm_2", "norm_3")}
    return Graph(forward, table=nn.Embedding(7, 4), b2=lin(), **norms, **parts())
