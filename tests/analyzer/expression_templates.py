"""Expressions of one or two activations, an operator each, by what the operator does to a scale.

``{x}`` and ``{y}`` are activations ``[{B}, {T}, {W}]``, ``{H}`` is half the width; ``{w}`` is a parameter that can be
broadcast to them, ``{v}`` and ``{u}`` have the shape ``[{W}]``, ``{m}`` has ``[{W}, {W}]``; ``{c}`` is a buffer and
``{k}`` a constant ``[{W}]``, ``{s}`` a number, ``{order}`` a permutation of the channels, ``{mask}`` one of tokens.
"""

from __future__ import annotations

# f(s x) = s**p f(x), and what else leaves a scale free
HOMOGENEOUS = """
{x}.to(torch.float64)
{x}.type_as({y})
torch.ops.aten._to_copy({x}, dtype=torch.float64)
F.dropout({x}, 0.5, training=False)
torch.ops.aten.feature_dropout({x}, 0.5, False)
F.alpha_dropout({x}, 0.5, training=False)
torch.neg({x})
torch.relu({x})
F.leaky_relu({x}, 0.2)
torch.abs({x})
torch.positive({x})
torch.ops.aten.real({x})
torch.ops.aten.conj({x})
{x} * {s}
{x} / {s}
torch.true_divide({x}, {s})
{x} + 0.0
0 - {x}
torch.rsub({x}, {y})
torch.square({x})
{x} ** 2
{x} ** 3
torch.sqrt({x}.abs())
torch.sqrt({x}.square() + 0.0)
torch.reciprocal({x}.abs().mean(1, keepdim=True)) * {y}
torch.rsqrt({x}.square().mean(1, keepdim=True)) * {y}
{x} * torch.relu({x})
torch.relu({x}).square()
{x} / {y}.abs().mean(1, keepdim=True)
{x}.clamp(min=0.0)
{x}.clamp_min(0.0)
{x}.clamp_max(0.0)
F.threshold({x}, 0.0, 0.0)
torch.where({mask}, {x}, 0.0)
torch.where({mask}, {x}, {y})
{x}.masked_fill({mask}, 0.0)
torch.masked_fill({x}, {mask}, 0)
{x}.sum(1, keepdim=True).expand_as({y})
{x} - {y}.mean(1, keepdim=True)
{x} + {y}.mean(1, keepdim=True)
{x} + {y}.amax(1, keepdim=True)
{x} - {y}.amin(1, keepdim=True)
{x} + torch.max({x}, 1, keepdim=True)[0]
{x} + torch.min({x}, 1, keepdim=True).values
torch.linalg.vector_norm({x}, dim=1, keepdim=True) + {y}
{x}.cumsum(1)
torch.fft.fft({x}, dim=1).real
torch.fft.irfft(torch.fft.rfft({x}, dim=1), n={T}, dim=1) + {y}
torch.fft.ifft({x}, dim=1).imag + {y}
torch.fft.hfft({x}, n={T}, dim=1)
torch.fft.ihfft({x}, n=2 * {T} - 2, dim=1).real
{x} + torch.topk({x}, 1, 1)[0]
torch.sort({x}, 1)[0]
torch.maximum({x}, {y})
torch.minimum({x}, {y})
torch.max({x}, {y})
torch.min({x}, {y})
{x} + torch.ops.aten.zeros_like({x})
{x} * torch.ops.aten.ones_like({x})
{x} * torch.ops.aten.full_like({x}, 0.5)
{x} + {x}.new_zeros({W})
{x} * {x}.new_ones({W})
{x} * {x}.new_full(({W},), 0.25)
{x} + torch.ops.aten.zeros([{W}], dtype=torch.float64)
{x} * torch.ops.aten.ones([{W}], dtype=torch.float64)
torch.ops.aten.copy(torch.ops.aten.empty_like({x}), {x})
torch.ops.aten.copy({x}.new_empty({B}, {T}, {W}), {x})
torch.ops.aten.copy(torch.ops.aten.empty([{B}, {T}, {W}], dtype=torch.float64), {x})
torch.ops.aten.copy(torch.ops.aten.empty_strided(({B}, {T}, {W}), ({T} * {W}, {W}, 1), dtype=torch.float64), {x})
torch.softmax(torch.eye({T}, dtype=torch.float64), -1) @ {x}
torch.tril(torch.ops.aten.ones([{T}, {T}], dtype=torch.float64)) @ {x}
torch.einsum('ts,bsc->btc', torch.tril(torch.ops.aten.ones([{T}, {T}], dtype=torch.float64)), {x})
torch.einsum('btc,b->btc', {x}, torch.arange(1, {B} + 1, dtype=torch.float64))
torch.slice_scatter({x}, {y}[:, :1], 1, 0, 1)
torch.select_scatter({x}, {y}[:, 2], 1, 0)
torch.slice_scatter({x}, {y}[..., :1], 2, 1, 2)
torch.index_copy({x}, 1, torch.tensor([2, 0]), {y}[:, :2])
{x}.masked_scatter({mask}, {y})
{x}.masked_scatter({mask}, ({x} + {y}).reshape(-1))
{x} + {y}.flatten(1).roll(1, 1).view({B}, {T}, {W}).sum(1, keepdim=True)
{x}.flatten(1).roll(1, 1).view({B}, {T}, {W}).index_add(1, torch.tensor([0, 0, 2]), {x})
torch.index_add({x}, 1, torch.tensor([0, 0, 2]), {y})
torch.ops.aten.zeros_like({x}).index_add(1, tokens[0] % {T}, {x})
torch.scatter_add({x}, 1, torch.tensor([0, 0, 2])[None, :, None].expand({B}, {T}, {W}), {y})
torch.scatter_reduce({x}, 1, torch.tensor([0, 0, 2])[None, :, None].expand({B}, {T}, {W}), {y}, 'sum')
torch.scatter_reduce({x}, 1, torch.tensor([0, 0, 2])[None, :, None].expand({B}, {T}, {W}), {y}, 'amax')
torch.index_fill({x}, 1, torch.tensor([1]), 0.0)
torch.ops.aten.zero({x}) + {y}
torch.cummax({x}, 1)[0]
torch.cummin({x}, 1)[0]
{x}.nansum(1, keepdim=True) + {y}
torch.fmax({x}, {y})
torch.fmin({x}, {y})
F.rrelu({x}, training=False)
F.prelu({x}.reshape(-1, {W}), {v}).view({B}, {T}, {W})
torch.float_power({x}.abs(), 2.0)
F.adaptive_avg_pool1d({x}.mT, 1).mT.expand({B}, {T}, {W})
F.adaptive_avg_pool2d({x}.mT.unsqueeze(-1), 1).squeeze(-1).mT.expand({B}, {T}, {W})
F.adaptive_avg_pool3d({x}.mT[..., None, None], 1)[..., 0, 0].mT.expand({B}, {T}, {W})
F.adaptive_max_pool1d({x}.mT, 1).mT.expand({B}, {T}, {W})
F.adaptive_max_pool2d({x}.mT.unsqueeze(-1), 1).squeeze(-1).mT.expand({B}, {T}, {W})
F.adaptive_max_pool3d({x}.mT[..., None, None], 1)[..., 0, 0].mT.expand({B}, {T}, {W})
F.avg_pool1d({x}.mT, 3, 1, 1).mT
F.avg_pool2d({x}.mT.unsqueeze(-1), (3, 1), 1, (1, 0)).squeeze(-1).mT
F.avg_pool3d({x}.mT[..., None, None], (3, 1, 1), 1, (1, 0, 0))[..., 0, 0].mT
F.max_pool1d({x}.mT, 3, 1, 1).mT
F.max_pool2d({x}.mT.unsqueeze(-1), (3, 1), 1, (1, 0)).squeeze(-1).mT
F.max_pool3d({x}.mT[..., None, None], (3, 1, 1), 1, (1, 0, 0))[..., 0, 0].mT
F.interpolate({x}.mT, size={T}, mode='nearest').mT
F.interpolate({x}.mT[..., :2], size={T}, mode='linear').mT
F.interpolate({x}.mT[..., :2, None], size=({T}, 1), mode='nearest').squeeze(-1).mT
F.interpolate({x}.mT[..., :2, None], size=({T}, 1), mode='bilinear').squeeze(-1).mT
F.interpolate({x}.mT[..., :2, None], size=({T}, 1), mode='bicubic').squeeze(-1).mT
F.interpolate({x}.mT[..., :2, None, None], size=({T}, 1, 1), mode='nearest')[..., 0, 0].mT
F.interpolate({x}.mT[..., :2, None, None], size=({T}, 1, 1), mode='trilinear')[..., 0, 0].mT
F.interpolate({x}.mT[..., None], size=({T}, 1), mode='bilinear', antialias=True).squeeze(-1).mT
F.interpolate({x}.mT[..., :2, None], size=({T}, 1), mode='bicubic', antialias=True).squeeze(-1).mT
F.grid_sample({x}.mT[..., None], torch.sin({m}[:1, :2]).expand({B}, {T}, 1, 2), align_corners=True)[..., 0].mT
torch.view_as_real(torch.view_as_complex(torch.stack([{x}, {y}], -1))).flatten(2)
torch.view_as_real(torch.view_as_complex({x}.view({B}, {T}, {H}, 2)).sum(1, keepdim=True)).flatten(2) + {y}
""".strip().splitlines()

# what moves elements and changes none
MOVEMENT = """
{x}.clone()
{x}.contiguous()
{x}.detach()
torch.ops.aten.detach_copy({x})
torch.ops.aten.lift_fresh_copy({x})
torch.ops.aten.alias({x})
torch.broadcast_to({x}[:, :1], ({B}, {T}, {W}))
{x}[:, 1:2].expand({B}, {T}, {W})
{x}[:1].expand_as({x})
torch.cat({x}.chunk(2, -1)[::-1], -1)
torch.concat({x}.chunk(2, -1), -1)
torch.concatenate([{x}[..., {H}:], {y}[..., :{H}]], -1)
torch.cat([{x}[:, :1], {y}[:, 1:]], 1)
torch.cat([{x}, {y}], -1)
F.pad({x}[..., 1:], (0, 1))
F.pad({x}, (0, 0, 1, 0))[:, :-1]
torch.constant_pad_nd({x}[:, 1:], (0, 0, 1, 0))
F.pad({x}[..., 1:], (0, 1), value=1.0)
torch.diagonal({x}[..., None].expand(-1, -1, -1, {W}), 0, 2, 3)
{x}.flatten(1).view({B}, {T}, {W})
{x}.flatten().unflatten(0, ({B}, {T}, {W}))
torch.ravel({x}).reshape({B}, {T}, {W})
{x}.flip(-1)
{x}.flip(1)
{x}.flip(0)
{x}.roll(1, -1)
{x}.roll(1, 1)
{x}[:, [2, 0, 1]]
{x}[..., {order}]
{x}.index_select(-1, torch.tensor({order}))
{x}.index_select(1, torch.tensor([0, 0, 2]))
torch.gather({x}, 1, torch.tensor([2, 1, 1])[None, :, None].expand({B}, {T}, {W}))
torch.gather({x}, 2, torch.tensor({order}).expand({B}, {T}, {W}))
torch.take_along_dim({x}, torch.tensor({order}).view(1, 1, {W}), 2)
torch.take_along_dim({x}, (tokens % {T}).unsqueeze(-1), 1)
{x}[:, tokens[0] % {T}]
{x}.index_select(1, tokens[0] % {T})
torch.gather({x}, 1, (tokens % {T}).unsqueeze(-1).expand({B}, {T}, {W}))
torch.gather({x}, 2, (tokens % {W}).unsqueeze(-1).expand({B}, {T}, {W}))
{x}[:, {x}[..., 0].argmax(1)[:1].repeat({T})]
torch.movedim(torch.movedim({x}, 2, 0).flip(0), 0, 2)
{x}.narrow(-1, 0, {H})
{x}.narrow(1, 0, 1).repeat(1, {T}, 1)
{x}.permute(0, 2, 1).reshape({B}, {T}, {W})
{x}.permute(2, 0, 1).flip(0).permute(1, 2, 0)
F.pixel_shuffle({x}.reshape(-1, {W}, 1, 1)[:, :4], 2).reshape({B}, {T}, 4)
{x}[..., :{H}].repeat(1, 1, 2)
{x}[..., ::2].repeat_interleave(2, -1)
{x}[..., :{H}].tile((1, 1, 2))
{x}.reshape({B}, {W}, {T}).transpose(1, 2)
{x}.reshape_as({y})
{x}.transpose(1, 2).contiguous().view_as({y})
{x}.view({B}, {T}, 2, {H}).transpose(2, 3).reshape({B}, {T}, {W})
torch.stack([{x}[..., i] for i in {order}], -1)
torch.stack([{x}[..., :{H}], {y}[..., {H}:]], -1).flatten(2)
torch.stack([{x}, {y}], 2).select(2, 1)
torch.cat({x}.split({H}, -1)[::-1], -1)
torch.cat({x}.split([1, {W} - 1], -1)[::-1], -1)
torch.cat(torch.ops.aten.unsafe_split({x}, {H}, -1), -1)
torch.cat(torch.unsafe_chunk({x}, 2, -1)[::-1], -1)
torch.cat(torch.tensor_split({x}, 3, -1)[::-1], -1)
{x}.unsqueeze(1).squeeze(1)
{x}.swapaxes(1, 2).flip(1).swapdims(1, 2)
torch.stack([row.t().flip(0).t() for row in {x}.unbind(0)], 0)
torch.stack([row.T.roll(1, 0).T for row in {x}.unbind(0)], 0)
{x}.mT.flip(1).mT
{x}.tril(1)
{x}.triu(-1)
torch.stack({x}.unbind(-1), -1)
{x}.unfold(-1, 2, 2).flatten(2)
F.unfold({x}.mT[..., None], (2, 1), padding=(1, 0)).reshape({B}, {W}, 2, -1)[:, :, 1, :{T}].mT
F.unfold({x}[..., None], (1, 1)).reshape({B}, {T}, {W})
{x}.contiguous().as_strided(({B}, {T}, {W}), ({T} * {W}, {W}, 1))
{x}.unfold(-1, 2, 1).select(-1, 1)
(F.pad({x}, (0, 0, 1, 0)).unfold(1, 2, 1) * torch.softmax({y}[..., :2], -1)[..., None, :]).sum(-1)
(F.pad({x}, (0, 0, 1, 0)).unfold(1, 2, 1) @ torch.softmax({y}[..., :2], -1)[..., None])[..., 0]
torch.einsum('bts,btds->btd', torch.softmax({y}[..., :2], -1), F.pad({x}, (0, 0, 1, 0)).unfold(1, 2, 1))
({x}.mT @ torch.softmax({y} @ {y}.mT, -1)).mT
torch.atleast_1d({x})
torch.atleast_2d({x})
torch.atleast_3d({x})
torch.column_stack([{x}, {y}])[:, 1 : {T} + 1]
torch.dstack([{x}, {y}])
torch.hstack([{x}, {y}])[:, 2 : {T} + 2]
torch.vstack([{x}, {y}])[{B} :]
torch.diag_embed({x}).sum(-1)
{x}.fliplr()
{x}.flipud()
torch.rot90({x}, 2, (1, 2))
F.pixel_unshuffle({x}[..., :4].reshape(-1, 1, 2, 2), 2).reshape({B}, {T}, 4)
torch.ops.aten._unsafe_view({x}, [{B}, {T}, {H}, 2]).flatten(2)
torch.ops.aten._reshape_alias({x}.contiguous(), [{B}, {T}, {W}], [{T} * {W}, {W}, 1])
""".strip().splitlines()

# what allows no scale, no rotation, or neither
NONLINEAR = """
F.silu({x})
F.gelu({x})
F.gelu({x}, approximate='tanh')
torch.tanh({x})
torch.sigmoid({x})
torch.softmax({x}, -1)
torch.softmax({x}, 1)
torch.ops.aten._softmax({x}, -1, False)
F.log_softmax({x}, -1)
F.softplus({x})
torch.exp({x}.clamp_max(2.0))
torch.exp2(-{x}.square())
torch.expm1(-{x}.abs())
torch.log({x}.abs() + 0.5)
torch.log1p({x}.abs())
torch.log2({x}.abs() + 0.5)
torch.erf({x})
torch.sin({x})
torch.cos({x})
torch.tan(torch.tanh({x}))
torch.atan({x})
torch.atan2({x}, {y}.abs() + 1)
F.elu({x})
F.selu({x})
F.celu({x})
F.mish({x})
F.hardswish({x})
F.hardsigmoid({x})
F.hardtanh({x})
F.logsigmoid({x})
torch.ops.aten.log_sigmoid_forward({x})[0]
F.softsign({x})
F.relu6({x})
F.glu(torch.cat([{x}, {y}], -1))
{x} + torch.logsumexp({x}, -1, keepdim=True)
torch.logaddexp({x}, {y})
{x} + torch.round({x})
{x} + torch.floor({x})
{x} + torch.ceil({x})
{x} * torch.sign({y})
{x} * torch.sgn({y})
{x} + {y}.argmax(-1, keepdim=True)
{x} + {y}.argmin(-1, keepdim=True)
{x} + {y}.argsort(-1)
{x}.cumprod(1)
{x}.prod(1, keepdim=True) + {y}
{x} * ({y} == {y}.amax(-1, keepdim=True))
{x} * ({y} != 0.5)
{x} * ({y} > 0.5)
{x} * ({y} >= 0.5)
{x} * ({y} < 0.5)
{x} * ({y} <= 0.5)
{x} * torch.logical_not({y} > 0.0)
{x} * torch.logical_and({y} > 0.5, {x} > 0.0)
{x} * torch.logical_or({y} > 0.5, {x} > 0.0)
{x} + ({y} > 0.5).any(-1, keepdim=True)
{x} + ({y} > -0.5).all(1, keepdim=True)
{x} * (1.0 + torch.isnan({y}))
{x} * (1.0 + torch.isinf({y}))
torch.nan_to_num({x})
{x} + torch.floor_divide({y}, 0.5)
{x} + torch.div({y}, 0.5, rounding_mode='floor')
torch.remainder({x}, 0.7)
torch.fmod({x}, 0.7)
{x} / {x}.std(-1, keepdim=True)
{x} / ({x}.var(-1, keepdim=True) + 1.0)
{x} + torch.var_mean({x}, 1, keepdim=True)[0]
F.group_norm({x}.transpose(1, 2), 2).transpose(1, 2)
F.batch_norm({x}.transpose(1, 2), {c}, {c} + 0.5).transpose(1, 2)
torch.ops.aten._native_batch_norm_legit_no_training({x}.mT, {c}, {c}, {c}, {c} + 0.5, 0.1, 1e-5)[0].mT
{x} + torch.bucketize({y}, torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64))
{x} * torch.bincount({y}[0].argmax(-1), minlength={W})
{x} * (1 + torch.histc({y}, {W}, -1.0, 1.0))
{x} + F.one_hot({y}.argmax(-1), {W})
torch.softmax({x}, -1) @ torch.softmax({y}, -1).transpose(1, 2)
{x} + 1.0
1.0 - {x}
torch.rsub({x}, 1.0)
{x} + {k}
{x} * {k}
{x} / {k}
{x} + {c}
{x} * {c}
{x} / (1 + {c})
{x} - {k}[:1]
{x}.clamp(-1.0, 1.0)
{x}.clamp(min=0.5)
F.threshold({x}, 0.1, 0.0)
2.0 ** {x}.clamp_max(2.0)
torch.pow({x}.abs(), {y}.abs().clamp_max(2.0))
{x}.abs() ** 1.5
{x}.masked_fill({mask}, 0.5)
{x}.masked_fill({y} > 0, 0.0)
torch.where({mask}, {x}, 0.5)
torch.where({y} > 0, {x}, 0.0)
torch.where({x} > 0, {x}, {y})
{x}.sum(-1, keepdim=True) + {y}
{x} - {x}.mean(-1, keepdim=True)
{x} - {x}.amax(-1, keepdim=True)
{x} / torch.linalg.vector_norm({x}, dim=-1, keepdim=True)
{x}.cumsum(-1)
torch.fft.fft({x}, dim=-1).real
torch.fft.fft({x}, dim=1).abs() - {y}
torch.fft.ifft({x}, dim=-1).imag
torch.sort({x}, -1)[0]
torch.topk({x}, 2, -1)[0]
torch.ops.aten.index_put({x}, [None, None, torch.tensor([1])], {y}[..., :1])
{x}.index_put((torch.tensor([0]), torch.tensor([1])), {y}[0, 0])
torch.scatter({x}, 2, torch.tensor([[[1]]]).expand({B}, {T}, 1), {y}[..., :1])
torch.scatter({x}, 1, torch.tensor([0, 2])[None, :, None].expand({B}, 2, {W}), {y})
F.normalize({x}, dim=-1)
torch.ops.aten.frac({x})
torch.lerp({x}, {y}, 0.3)
torch.addcmul({x}, {y}, {y})
torch.addcdiv({x}, {y}, 1 + {y}.abs())
torch.asinh({x})
torch.cosh(torch.tanh({x}))
torch.sinh(torch.tanh({x}))
torch.erfc({x})
torch.log10({x}.abs() + 0.5)
torch.logcumsumexp({x}, 1)
torch.logit(0.25 + 0.5 * torch.sigmoid({x}))
{x} + torch.trunc({y})
F.hardshrink({x})
F.softshrink({x})
F.tanhshrink({x})
{x} * torch.logical_xor({y} > 0.5, {x} > 0.0)
{x} * torch.isfinite({y})
{x} + torch.count_nonzero({y}, 1).unsqueeze(1)
F.instance_norm({x}.mT).mT
torch._weight_norm({x}[0], torch.arange(1, {T} + 1, dtype=torch.float64)[:, None], 0) + {y}
torch.index_fill({x}, 1, torch.tensor([1]), 0.5)
torch.erfinv(torch.tanh({x}))
torch.cumsum({x}.softmax(-1), -1)
torch.nonzero(torch.ops.aten.ones([{T}])).sum() + {x}
torch.multiply({x}, torch.tensor({order}))
{x} + 0.0 * torch.ops.aten.rand([{W}], dtype=torch.float64)
{x} + 0.0 * torch.ops.aten.randn([{W}], dtype=torch.float64)
{x} + 0.0 * torch.ops.aten.randint(3, [{W}])
{x} + 0.0 * torch.ops.aten.randperm({W})
{x} + 0.0 * torch.ops.aten.rand_like({x})
{x} + 0.0 * torch.ops.aten.randn_like({x})
{x} + 0.0 * torch.ops.aten.randint_like({x}, 3)
{x} + 0.0 * torch.ops.aten.uniform({x})
{x} + 0.0 * torch.ops.aten.normal({x}, 1.0)
{x} + 0.0 * torch.ops.aten.bernoulli(torch.sigmoid({x}))
{x} + 0.0 * torch.ops.aten.multinomial(torch.sigmoid({y}[0]), 1)
torch.outer({x}.flatten(), torch.ops.aten.ones([1], dtype=torch.float64)).view({B}, {T}, {W})
""".strip().splitlines()

# two activations, and an activation with a parameter
ARITHMETIC = """
{x} + {y}
{x} + {y}
{x} - {y}
torch.add({x}, {y}, alpha=2)
torch.sub({x}, {y}, alpha=0.5)
{x} * {y}
F.silu({x}) * {y}
{x} * torch.sigmoid({y})
{x} * (1 + {y})
{x} / (1 + {y}.abs())
{x} * {y}[..., :1]
{x} + {y}[..., :1]
{x} * torch.softmax({y}, -1)[..., :1]
{x} * torch.sigmoid({y}.mean(-1, keepdim=True))
{x} + 0.5 * {y}
{x} + torch.tanh({v}) * {y}
{x} + {v} * {y}
{x} + {w}
{x} - {w}
{x} * {w}
{x} / {w}
{x} * (1 + {w})
{x} * torch.sigmoid({w})
{x} * torch.exp({v})
{x} * {v} + {v}
({x} * {v}).view({B}, {T}, 2, {H}).sum(2)
{x} * {v}.view(2, {H}).flip(0).reshape(-1)
{x} + {v}.roll(1, 0)
{x} * torch.cat([{v}, {v}])[:{W}]
{x} + {m}[:{T}]
{x} + {m}[torch.arange({T})]
{x} + {m}[::2].repeat(2, 1)[:{T}]
torch.cat([{v}.expand({B}, 1, {W}), {x}[:, 1:]], 1)
torch.cat([{x}[:, :1], {v}.view(1, 1, {W}).repeat({B}, 1, 1), {y}[:, 2:]], 1)
{x}.masked_scatter({mask}, torch.cat([{y}[:, 1:], {v}.expand({B}, 1, {W})], 1))
{x} + {m}[tokens]
{x} * {m}[0]
{x} * torch.softmax({m}, -1)[0]
""".strip().splitlines()

# products that are no linear: with parameters, and of two activations
PRODUCTS = """
{x} @ {m}
{x} @ {m}.T
F.linear({x}, {m})
F.linear({x}, {m}, {v})
F.linear({x}, {m}.t())
F.linear({x}, {m}.flip(0))
F.linear({x}, {m}.roll(1, 1), {v})
F.linear({x}, {m}.view(2, {H}, {W}).transpose(0, 1).reshape({W}, {W}))
F.linear({x}, {m}[:{H}])
F.linear({x}, torch.cat(({m}[{H}:], {m}[:{H}])))
F.linear({x}, {m} * {v})
F.linear({x}, {m} + {m}.T)
F.linear({x}[..., :{H}], {m}[:, :{H}])
F.linear({x}, torch.tanh({m}))
F.linear({x}, {m}[:{H}]) + F.linear({x}, {m}[{H}:])
F.linear({x}, {m}.unflatten(0, (2, {H})).sum(0))
torch.addmm({v}, {x}.reshape(-1, {W}), {m}).view({B}, {T}, {W})
torch.addmm({v}, {x}.reshape(-1, {W}), {m}, beta=0.5).view({B}, {T}, {W})
torch.mm({x}.reshape(-1, {W}), {m}).view({B}, {T}, {W})
torch.bmm({x}, {m}.unsqueeze(0).expand({B}, {W}, {W}))
({m} @ {x}.transpose(1, 2)).transpose(1, 2)
torch.einsum('btc,dc->btd', {x}, {m})
torch.einsum('btc,cd->btd', {x}, {m})
torch.tensordot({x}, {m}, dims=([2], [1]))
torch.tensordot({x}, {m}.unflatten(1, (2, {H})), dims=1).flatten(2)
torch.inner({x}, {m})
torch.einsum('btc,bsc->bts', {x}, {y})
torch.einsum('bts,bsc->btc', torch.softmax(torch.einsum('btc,bsc->bts', {x}, {x}), -1), {y})
torch.bmm({x}, {y}.transpose(1, 2))
torch.bmm(torch.softmax(torch.bmm({x}, {y}.transpose(1, 2)), -1), {y})
torch.baddbmm(torch.ops.aten.zeros([{B}, {T}, {T}], dtype=torch.float64), {x}, {y}.transpose(1, 2), beta=0, alpha=0.5)
torch.softmax(torch.baddbmm({y} @ {y}.mT, {x}, {y}.mT), -1) @ {y}
{x} @ ({y}.transpose(1, 2) @ {y})
F.scaled_dot_product_attention({x}[:, None], {y}[:, None], {y}[:, None])[:, 0]
F.scaled_dot_product_attention({x}[:, None], {x}[:, None], {y}[:, None], is_causal=True).squeeze(1)
F.conv1d({x}.transpose(1, 2), {m}.unsqueeze(-1)).transpose(1, 2)
F.conv2d({x}.mT.unsqueeze(-1), {m}[..., None, None], {v}).squeeze(-1).mT
F.conv2d({x}.mT.unsqueeze(-1), {v}[:, None, None, None], groups={W}).squeeze(-1).mT
F.conv3d({x}.mT[..., None, None], {m}[..., None, None, None])[..., 0, 0].mT
F.rms_norm({x}, ({W},), {v})
F.rms_norm({x}, ({W},), 1 + {v}, 1e-5)
F.rms_norm({x}, ({W},))
F.layer_norm({x}, ({W},), {v}, {u})
F.layer_norm({x}, ({W},))
F.embedding(tokens, {m})
F.embedding({x}.argmax(-1), {m})
F.embedding_bag(tokens[0].repeat_interleave(2).view({T}, 2) % {W}, {m}, mode='sum') + {x}
F.embedding_bag(tokens[0].repeat_interleave(2).view({T}, 2) % {W}, {m}, mode='max') + {x}
F.embedding_bag(tokens[0].view({T}, 1) % {T}, {x}[0], mode='sum', per_sample_weights={y}[0, :, :1]) + {y}
torch.einsum('...c,dc->...d', {x}, {m})
torch.einsum('...ts,...sc->...tc', torch.softmax(torch.einsum('...tc,...sc->...ts', {x}, {x}), -1), {y})
""".strip().splitlines()

# what writes into a tensor; export makes it functional
IN_PLACE = """
{x}.clone().mul_(0.5).relu_()
{x}.clone().add_({y})
{x}.clone().mul_({v})
{x}.clone().masked_fill_({mask}, 0.0)
torch.zeros_like({x}).index_add_(1, torch.tensor([1, 0, 2]), {x})
torch.zeros_like({x}).scatter_add_(1, torch.tensor([1, 0, 2])[None, :, None].expand({B}, {T}, {W}), {x})
{x}.clone().index_copy_(1, torch.tensor([1]), {y}[:, :1])
{x}.clone().index_put_((torch.tensor([0]),), {y}[0])
{x}.new_empty({B}, {T}, {W}).copy_({x})
{x}.clone().clamp_(min=0.0)
{x}.clone().div_({s}).neg_()
{x}.clone().fill_(0.5) * {y}
""".strip().splitlines()
