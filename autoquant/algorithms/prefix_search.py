"""Which tokens a fixed prefix should hold, by the inputs of a model's widest linears.

PrefixQuant (Chen et al. 2024, "PrefixQuant: Eliminating Outliers by Prefixed Tokens for Large Language Models
Quantization", section 4) calls a token an outlier whose largest input is far above the median token's,
finds them at down projections, and prefixes the most frequent ones, as many as a sequence has of them. Here the widest
linears of the config stand for the down projections, so that no architecture has to be known; and a first token that
is one is told apart from the others, because there it is the position that counts: BOS serves for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoquant.calibration.runner import Runner, whole
from autoquant.errors import AutoQuantError
from autoquant.quantizer.prefix import Through, at_once, prefixed
from autoquant.quantizer.strategies import PlannedLinear

MULTIPLE = 20.0
LONGEST = 4


@torch.no_grad()
def find_prefix(
    model: nn.Module,
    linears: Sequence[PlannedLinear],
    bos: int | None,
    batches: Sequence[Tensor],
    runner: Runner = whole,
    through: Through = at_once,
) -> tuple[int, ...]:
    """Token ids for ``quantization.prefix``, at most ``LONGEST``; () where no token stands out.

    ``batches``: token ids [B, S], each row behind ``bos`` where there is one. BOS is chosen if most first tokens stand
    out; then, with it in place, the most frequent tokens that still do, as many as a row has on average, rounded up.
    Raises AutoQuantError where none of the linears is a module of its own.
    """
    rows = sum(len(batch) for batch in batches)
    starts, tokens = _outliers(model, linears, batches, runner)
    prefix: tuple[int, ...] = ()
    if bos is not None and 2 * starts > rows:
        prefix = (bos,)
        with prefixed(model, prefix, through):
            _, tokens = _outliers(model, linears, batches, runner)
    return prefix + most_frequent(tokens, rows, LONGEST - len(prefix))


def most_frequent(tokens: Sequence[int], rows: int, limit: int) -> tuple[int, ...]:
    """The most frequent of the outlier tokens of ``rows`` rows, as many as a row has; of equals the lower id first."""
    counts = Counter(tokens)
    number = min(limit, math.ceil(len(tokens) / rows))
    return tuple(sorted(counts, key=lambda token: (-counts[token], token))[:number])


def outliers(maxima: Tensor, multiple: float = MULTIPLE) -> Tensor:
    """Which tokens stand out in any linear: bool [N] of the largest input magnitudes [linears, N] of N tokens."""
    median = maxima.median(-1, keepdim=True).values
    return (maxima > multiple * median).any(0)


def _outliers(
    model: nn.Module, linears: Sequence[PlannedLinear], batches: Sequence[Tensor], runner: Runner
) -> tuple[int, list[int]]:
    """How many rows begin with an outlier, and all outlier tokens. What a prefix covers is not looked at."""
    seen: dict[str, list[Tensor]] = {}
    alone = [linear for linear in linears if linear.stack is None]
    widest = max((linear.in_features for linear in alone), default=0)
    with token_maxima(model, [linear for linear in alone if linear.in_features == widest], seen):
        runner(model, batches)
    if not seen:
        raise AutoQuantError("no prefix can be found: none of the widest quantized linears is a module of its own")
    widths = [maximum.shape[1] for maximum in next(iter(seen.values()))]
    found = outliers(torch.stack([torch.cat([m.flatten() for m in maxima]) for maxima in seen.values()]).cpu())
    starts, tokens = 0, []
    for batch, width in zip(batches, widths, strict=True):
        here, found = found[: len(batch) * width].view(len(batch), width), found[len(batch) * width :]
        starts += int(here[:, 0].sum()) if width == batch.shape[1] else 0
        tokens += batch[:, batch.shape[1] - width :].cpu()[here].tolist()
    return starts, tokens


@contextmanager
def token_maxima(model: nn.Module, linears: Sequence[PlannedLinear], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect by path, while the context is open, the largest input magnitude of each token, float32 [B, S]; of linears
    that are modules of their own.
    """
    modules = dict(model.named_modules())
    handles = []
    for linear in linears:
        module = modules.get(linear.path)
        if module is not None:

            def hook(_: nn.Module, args: tuple[Tensor, ...], path: str = linear.path) -> None:
                if args[0].dim() == 3:  # [B, S, channels]; rows of experts have no positions
                    seen.setdefault(path, []).append(args[0].detach().abs().amax(-1).float())

            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
