"""More programs of ``operator_programs``: complex numbers, places to read from, sums of rows, einsum with dots."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from small_graphs import Graph
from torch import Tensor

PLACES = torch.tensor([[0.0, -0.9], [0.0, 0.3], [0.0, 0.7]], dtype=torch.float64)[None, :, None]
PLACES_3D = torch.tensor([[0.0, 0.0, -0.9], [0.0, 0.0, 0.4], [0.0, 0.0, 0.8]], dtype=torch.float64)[None, :, None, None]
TURN = torch.polar(torch.ones(3, 1, dtype=torch.float64), torch.tensor([[0.3], [1.1], [2.0]], dtype=torch.float64))
BAGS = torch.tensor([[1, 0], [3, 3], [2, 1]])


def complex_copies(x: Tensor) -> Tensor:
    """Each number twice, as the real and the imaginary part of one: ``[1, 4, 3]``."""
    return torch.view_as_complex(torch.stack([x.mT, x.mT], -1))


def pairs(x: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers."""
    return torch.view_as_complex(x.reshape(1, 3, 2, 2).contiguous())


def turned(x: Tensor) -> Tensor:
    """Pairs of channels turned by an angle: rotary positions."""
    return torch.view_as_real(pairs(x) * TURN).flatten(2)


def smaller(x: Tensor, mode: str) -> Tensor:
    """Three tokens of four, as an image of one column."""
    four = torch.cat([x, x[:, :1]], 1)
    return F.interpolate(four.mT[..., None], size=(3, 1), mode=mode, antialias=True)[..., 0].mT


HOMOGENEOUS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "_upsample_bilinear2d_aa": (lambda x: smaller(x, "bilinear"), 1),
    "_upsample_bicubic2d_aa": (lambda x: smaller(x, "bicubic"), 1),
    "grid_sampler": (lambda x: F.grid_sample(x.mT[..., None], PLACES, align_corners=False)[..., 0].mT, 1),
    "grid_sampler of a volume": (
        lambda x: F.grid_sample(x.mT[..., None, None], PLACES_3D, align_corners=False)[..., 0, 0].mT,
        1,
    ),
    "view_as_complex": (lambda x: torch.view_as_real(complex_copies(x) * TURN[:, 0]).sum(-1).mT, 1),
    "length of complex numbers": (lambda x: complex_copies(x).abs().mT, 1),
    "sum of complex numbers": (lambda x: torch.view_as_real(complex_copies(x).sum(2))[..., 0], 1),
}

BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of integers": lambda x: (7 * x).sum(1, dtype=torch.int64).double(),
    "cumsum of integers": lambda x: (7 * x).cumsum(1, dtype=torch.int64).double(),
    "_weight_norm": lambda x: torch._weight_norm(x[0], torch.ones(3, 1, dtype=torch.float64), 0),
    "grid_sampler at places of the data's choice": lambda x: (
        F.grid_sample(
            torch.arange(12, dtype=torch.float64).view(1, 4, 3, 1), x[:, :, None, :2].sigmoid(), align_corners=False
        )[..., 0].mT
    ),
    "angle of complex numbers": lambda x: torch.angle(complex_copies(x) * TURN[:, 0]).mT,
}

WITH_MORE: dict[str, Callable[[Graph, Tensor, Tensor], Tensor]] = {
    "einsum with dots": lambda s, x, y: torch.einsum(
        "...hts,...shd->...thd",
        torch.softmax(torch.einsum("...thd,...shd->...hts", y.view(1, 3, 2, 2), y.view(1, 3, 2, 2)), -1),
        x.view(1, 3, 2, 2),
    ).flatten(2),
    "einsum of a weight with dots": lambda s, x, y: torch.einsum("...d,ed->...e", x, s.m),
    "einsum with dots for two and one": lambda s, x, y: torch.einsum("...td,...d->...td", x, y[:, 0]),
    "pairs turned": lambda s, x, y: turned(x) + y,
    "pairs turned by the data": lambda s, x, y: (pairs(x) * pairs(y)).abs().repeat(1, 1, 2),
    "sums of pairs": lambda s, x, y: torch.view_as_real(pairs(x).sum(1, keepdim=True) * TURN).flatten(2),
    "scores of pairs turned": lambda s, x, y: torch.softmax(turned(x) @ turned(y).mT, -1) @ x,
    "embedding_bag": lambda s, x, y: x + F.embedding_bag(BAGS, s.m, mode="sum"),
    "embedding_bag, means": lambda s, x, y: x + F.embedding_bag(BAGS, s.m),
    "embedding_bag with shares": lambda s, x, y: (
        x + F.embedding_bag(BAGS, s.m, mode="sum", per_sample_weights=y[0, :, :2])
    ),
    "embedding_bag with known shares": lambda s, x, y: (
        x + F.embedding_bag(BAGS, s.m, mode="sum", per_sample_weights=PLACES[0, :, 0])
    ),
    "embedding_bag, the largest": lambda s, x, y: x + F.embedding_bag(BAGS, s.m, mode="max"),
    "embedding_bag of a view": lambda s, x, y: x + F.embedding_bag(BAGS, s.stack.flatten(0, 1)),
    "embedding_bag of what is computed": lambda s, x, y: x + F.embedding_bag(BAGS % 3, y[0]),
    "embedding_bag of a table looked up too": lambda s, x, y: (
        x + F.embedding_bag(BAGS, s.m, mode="sum") + F.embedding(BAGS[:, 0], s.m)
    ),
    "grid_sampler of a table": lambda s, x, y: (
        x + F.grid_sample(s.m.view(2, 2, 4).permute(2, 0, 1)[None], PLACES, align_corners=False)[..., 0].mT
    ),
    "grid_sampler by the data": lambda s, x, y: (
        x + F.grid_sample(x.mT[..., None], y[:, :, None, :2], align_corners=False)[..., 0].mT
    ),
    "_weight_norm of a kernel": lambda s, x, y: F.conv1d(
        x.mT, torch._weight_norm(s.kernel, s.k.view(4, 1, 1), 0), padding=1
    ).mT[:, :3],
}
