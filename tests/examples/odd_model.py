"""A language model outside transformers, with names that nobody uses: ``odd_model:build`` for ``autoquant analyze``.

One matrix holds values, keys and queries; the query heads come in another order than the output reads them; the unit's
two halves are interleaved; the output matrix is stored transposed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIZE, UNIT, WORDS, STAGES = 24, 4, 6, 40, 32, 2
ORDER = [2, 0, 3, 1]


class Stage(nn.Module):
    """``vkq``: values, keys and queries in one; ``glue``: back into the stream, ``[in, out]``; two of the unit."""

    def __init__(self) -> None:
        super().__init__()
        self.tame_a = nn.RMSNorm(WIDTH, eps=1e-6)
        self.vkq = nn.Linear(WIDTH, 3 * WIDTH)
        self.glue = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.tame_b = nn.RMSNorm(WIDTH, eps=1e-6)
        self.puff = nn.Linear(WIDTH, 2 * UNIT, bias=False)
        self.squeeze = nn.Linear(UNIT, WIDTH, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        batch, length, _ = stream.shape
        v, k, q = self.vkq(self.tame_a(stream)).view(batch, length, 3, HEADS, SIZE).unbind(2)
        q, k, v = (t[:, :, ORDER].transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        stream = stream + mixed.transpose(1, 2).reshape(batch, length, WIDTH) @ self.glue
        both = self.puff(self.tame_b(stream))
        return stream + self.squeeze(F.silu(both[..., ::2]) * both[..., 1::2])


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.stages = nn.ModuleList(Stage() for _ in range(STAGES))
        self.last = nn.RMSNorm(WIDTH, eps=1e-6)
        self.voice = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.words(tokens)
        for stage in self.stages:
            stream = stage(stream)
        return self.voice(self.last(stream))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Odd(), (torch.tensor([[3, 1, 4]]),)
