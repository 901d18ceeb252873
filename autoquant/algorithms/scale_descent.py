"""Smoothing scales by descent on what they are for: the output error of the group's linears under a scheme.

The linears ``Y = X W^T`` of a group read the same X, and any positive s per channel leaves ``(X s)(W / s)^T`` as it
is. What it changes is the error of rounding,

    E(s) = |X W^T - Q(X s) Q(W / s)^T|^2,

in which SmoothQuant's formula (Xiao et al. 2023, eq. 4) has one degree of freedom, alpha, and s has one per channel.
Here E is computed with the quantizer's own arithmetic and descended in log2(s), one coordinate after another with steps
of a fixed ratio; a step is kept only if E falls. Coordinate descent suits E because it is piecewise constant, without
useful derivatives, while one channel's step is cheap: as long as no maximum moves it changes ``Q(X s)`` and
``Q(W / s)`` in one column each, so E's residual by a product of rank two. Rows (output channels) and tokens whose own
maximum moves are computed anew, and everything is where a maximum of a whole tensor moves.

Single steps cannot lower a maximum that several channels share. So before the single channels, ceilings are tried:
every channel whose scaled maximum is above one is brought down to it (for a per-tensor weight, likewise from below).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.errors import AutoQuantError
from autoquant.quantizer import int8
from autoquant.quantizer.strategies import Granularity, Scheme

GAIN = 1e-5
"""Relative decrease of the error below which a step is not kept: float32 sums are not more precise."""

LONGEST = 4
"""Steps in a row of one channel in one round."""

CEILINGS = tuple(2.0 ** -(step / 4) for step in range(1, 9))
"""Ceilings that are tried, relative to the present maximum: quarters of an octave, down to two octaves."""


@torch.no_grad()
def optimise_scales(
    inputs_TC: Tensor,
    weights: Sequence[Tensor],
    start: Tensor,
    columns_C: Tensor,
    scheme: Scheme,
    *,
    maximum_C: Tensor | None = None,
    rounds: int = 3,
) -> Optimised:
    """Scales ``[channels]`` from ``start`` that make the output error of ``weights`` ``[O, C]`` smaller, or as it was.

    ``columns_C`` int64 ``[C]``: the channel that each column carries, -1 for none; columns of one channel share its
    scale. ``start`` ``[channels]`` multiplies the inputs, as :func:`smoothquant.smoothing_scales` gives
    it. ``maximum_C``: the calibrated maxima that static scales come from, where ``inputs_TC`` are other tokens: what
    exceeds them is clipped, as it will be at inference. A dynamic tensor is taken to be all of ``inputs_TC``. Each
    round's steps are half as long as those of the round before, on the log scale; the first are of one octave.

    Returns float64 scales. Raises AutoQuantError where inputs or weights hold a NaN or an infinity.
    """
    problem = _problem(inputs_TC, weights, columns_C, scheme, maximum_C)
    log_s = start.double().log2().to(inputs_TC.device)
    state = _state(problem, _columns(problem, log_s))
    before = state.error
    members = [torch.nonzero(problem.columns_C == channel).flatten() for channel in range(len(start))]
    for round_ in range(rounds):
        step = 2.0**-round_
        log_s, state = _lower_ceilings(problem, log_s, state)
        for channel in _by_maximum(problem, log_s):
            for delta in (step, -step):
                moved = _walk_(problem, state, members[channel], delta)
                log_s[channel] += delta * moved
                if moved:
                    break
        state = _state(problem, _columns(problem, log_s))  # what the updates of rank two rounded away
    if not state.error < before:
        return Optimised(start.double(), before, before)
    return Optimised(log_s.exp2().to(start.device), before, state.error)


@torch.no_grad()
def best_alpha(
    inputs_TC: Tensor,
    weights: Sequence[Tensor],
    scales_at: Callable[[float], Tensor],
    columns_C: Tensor,
    scheme: Scheme,
    *,
    maximum_C: Tensor | None = None,
    coarse: int = 10,
    halvings: int = 2,
) -> tuple[float, Optimised]:
    """The alpha in [0, 1] of the least output error: a grid of ``coarse`` steps, then steps half as long around it.

    ``scales_at(alpha)`` gives the scales ``[channels]``; the other arguments and errors are those of
    :func:`optimise_scales`. ``before`` of the result is the error of scales 1.
    """
    problem = _problem(inputs_TC, weights, columns_C, scheme, maximum_C)

    def error_of(scales: Tensor) -> float:
        return _state(problem, _columns(problem, scales.double().log2().to(inputs_TC.device))).error

    errors: dict[float, float] = {}

    def probe(alpha: float) -> None:
        if 0 <= alpha <= 1 and alpha not in errors:
            errors[alpha] = error_of(scales_at(alpha))

    for i in range(coarse + 1):
        probe(i / coarse)
    for halving in range(1, halvings + 1):
        centre = min(errors, key=lambda alpha: (errors[alpha], alpha))
        for sign in (-1, 1):
            probe(round(centre + sign / (coarse * 2**halving), 12))
    alpha = min(errors, key=lambda alpha: (errors[alpha], alpha))
    scales = scales_at(alpha).double()
    return alpha, Optimised(scales, error_of(torch.ones_like(scales)), errors[alpha])


def _problem(
    inputs_TC: Tensor, weights: Sequence[Tensor], columns_C: Tensor, scheme: Scheme, maximum_C: Tensor | None
) -> _Problem:
    x_TC, w_OC = inputs_TC.float(), torch.cat([weight.float() for weight in weights]).to(inputs_TC.device)
    if not (bool(x_TC.isfinite().all()) and bool(w_OC.isfinite().all())):
        raise AutoQuantError("scales cannot be optimised: the inputs or the weights hold a NaN or an infinity")
    x_TC = x_TC.T.contiguous().T  # columns are read one by one
    abs_TC = x_TC.abs()
    maximum_C = abs_TC.amax(0) if maximum_C is None else maximum_C.float().to(x_TC.device)
    lengths = [1] * len(w_OC) if scheme.weight_per_channel else [len(weight) for weight in weights]
    tensors_O = torch.arange(len(lengths), device=x_TC.device).repeat_interleave(
        torch.tensor(lengths, device=x_TC.device)
    )
    return _Problem(
        x_TC, abs_TC, w_OC, w_OC.abs(), x_TC @ w_OC.T, columns_C.to(x_TC.device), maximum_C, tensors_O, scheme
    )


def _columns(problem: _Problem, log_s: Tensor) -> Tensor:
    """Factors of the columns, float32 ``[C]``; 1 where a column carries no channel."""
    factors = log_s.exp2()[problem.columns_C.clamp(min=0)]
    return torch.where(problem.columns_C >= 0, factors, 1.0).float()


def _state(problem: _Problem, s_C: Tensor) -> _State:
    """Everything for the scales ``s_C``, from the beginning."""
    maximum_T = _token_maxima(problem, s_C)
    maximum_O = _row_maxima(problem, (problem.abs_w_OC / s_C).amax(1))
    x_TC = _rounded(problem.x_TC, s_C, maximum_T)
    w_OC = _rounded(problem.w_OC, 1 / s_C, maximum_O)
    residual_TO = problem.y_TO - x_TC @ w_OC.T
    return _State(s_C, maximum_T, maximum_O, x_TC, w_OC, residual_TO, _energy(residual_TO))


def _rounded(t_NC: Tensor, s_C: Tensor, maximum_N: Tensor) -> Tensor:
    """``Q(t s) / s``: what rounding leaves of t. Unscaled, so that a step changes it by rounding errors only."""
    return int8.fake_quantize(t_NC * s_C, int8.scale_of(maximum_N)[:, None]) / s_C


def _token_maxima(problem: _Problem, s_C: Tensor) -> Tensor:
    """What each token's scale comes from, ``[T]``; ``[1]`` where all share one."""
    if problem.per_token:
        return (problem.abs_x_TC * s_C).amax(1)
    return (problem.maximum_C * s_C).amax(0, keepdim=True)


def _row_maxima(problem: _Problem, each_O: Tensor) -> Tensor:
    """What each row's scale comes from, ``[O]``, given the rows' own maxima."""
    if problem.scheme.weight_per_channel:
        return each_O
    tensors = int(problem.tensors_O[-1]) + 1
    shared = each_O.new_zeros(tensors).scatter_reduce(0, problem.tensors_O, each_O, "amax")
    return shared[problem.tensors_O]


def _walk_(problem: _Problem, state: _State, members: Tensor, delta: float) -> int:
    """Steps of one channel as long as they help; the state moves along. Returns their number."""
    for taken in range(LONGEST):
        if not _step_(problem, state, members, delta):
            return taken
    return LONGEST


def _step_(problem: _Problem, state: _State, members: Tensor, delta: float) -> bool:
    """Multiply the columns ``members`` by ``2 ** delta`` if the error falls."""
    if len(members) == 0:
        return False
    s_C = state.s_C.clone()
    s_C[members] *= 2.0**delta
    maximum_T = _token_maxima(problem, s_C)
    maximum_O = _row_maxima(problem, (problem.abs_w_OC / s_C).amax(1))
    tokens = torch.nonzero(maximum_T != state.maximum_T).flatten()
    rows = torch.nonzero(maximum_O != state.maximum_O).flatten()
    if 2 * len(tokens) > len(maximum_T) or 2 * len(rows) > len(maximum_O):
        moved = _state(problem, s_C)
        if moved.error >= state.error * (1 - GAIN):
            return False
        state.become_(moved)
        return True

    s_J = s_C[members]
    x_TJ = _rounded(problem.x_TC[:, members], s_J, maximum_T)
    w_OJ = _rounded(problem.w_OC[:, members], 1 / s_J, maximum_O)
    x_change_TJ, w_change_OJ = x_TJ - state.x_TC[:, members], w_OJ - state.w_OC[:, members]
    # The residual less N M^T, and its energy without computing it.
    n_TK, m_OK = torch.cat([x_change_TJ, state.x_TC[:, members]], 1), torch.cat([w_OJ, w_change_OJ], 1)
    change = ((n_TK.T @ n_TK) * (m_OK.T @ m_OK)).sum() - 2 * (n_TK * (state.residual_TO @ m_OK)).sum()
    if len(rows):
        w_RC = _rounded(problem.w_OC[rows], 1 / s_C, maximum_O[rows])
        product = state.x_TC @ w_RC.T + x_change_TJ @ w_RC[:, members].T
        new_TR = problem.y_TO[:, rows] - product
        old_TR = state.residual_TO[:, rows] - n_TK @ m_OK[rows].T
        new_TR[tokens] = old_TR[tokens] = 0  # below
        change += new_TR.square().sum() - old_TR.square().sum()
    if len(tokens):
        x_NC = _rounded(problem.x_TC[tokens], s_C, maximum_T[tokens])
        product = x_NC @ state.w_OC.T + x_NC[:, members] @ w_change_OJ.T
        if len(rows):
            product[:, rows] = x_NC @ w_RC.T
        new_NO = problem.y_TO[tokens] - product
        old_NO = state.residual_TO[tokens] - n_TK[tokens] @ m_OK.T
        change += new_NO.square().sum() - old_NO.square().sum()
    if float(change) >= -GAIN * state.error:
        return False

    state.s_C, state.maximum_T, state.maximum_O = s_C, maximum_T, maximum_O
    state.error += float(change)
    state.residual_TO.addmm_(n_TK, m_OK.T, alpha=-1)
    state.x_TC[:, members], state.w_OC[:, members] = x_TJ, w_OJ
    if len(rows):
        state.residual_TO[:, rows], state.w_OC[rows] = new_TR, w_RC
    if len(tokens):
        state.residual_TO[tokens], state.x_TC[tokens] = new_NO, x_NC
    return True


def _lower_ceilings(problem: _Problem, log_s: Tensor, state: _State) -> tuple[Tensor, _State]:
    """The best of the ceilings on the inputs' maxima, then on the weights', where a whole tensor shares a scale."""
    for candidates in (_input_ceilings, _weight_ceilings):
        for tried in list(candidates(problem, log_s)):
            moved = _state(problem, _columns(problem, tried))
            if moved.error < state.error * (1 - GAIN):
                log_s, state = tried, moved
    return log_s, state


def _input_ceilings(problem: _Problem, log_s: Tensor) -> Iterator[Tensor]:
    if not problem.per_token:
        room = _of_channels(problem, problem.maximum_C, len(log_s)).double().log2()
        highest = (log_s + room).amax()
        for ceiling in CEILINGS:
            yield torch.minimum(log_s, highest + torch.tensor(ceiling, dtype=torch.float64).log2() - room)


def _weight_ceilings(problem: _Problem, log_s: Tensor) -> Iterator[Tensor]:
    if not problem.scheme.weight_per_channel:
        room = _of_channels(problem, problem.abs_w_OC.amax(0), len(log_s)).double().log2()
        highest = (room - log_s).amax()
        for ceiling in CEILINGS:
            yield torch.maximum(log_s, room - highest - torch.tensor(ceiling, dtype=torch.float64).log2())


def _by_maximum(problem: _Problem, log_s: Tensor) -> list[int]:
    """The channels, those with the largest scaled inputs first: they decide what the others can have."""
    scaled = _of_channels(problem, problem.maximum_C, len(log_s)) * log_s.exp2()
    return [int(channel) for channel in scaled.argsort(descending=True, stable=True)]


def _of_channels(problem: _Problem, values_C: Tensor, channels: int) -> Tensor:
    """The largest value ``[channels]`` of each channel's columns; the smallest normal float where there is none."""
    carried = problem.columns_C >= 0
    result = torch.full((channels,), int8.TINY, device=values_C.device)
    return result.scatter_reduce(0, problem.columns_C[carried], values_C[carried], "amax")


def _energy(residual_TO: Tensor) -> float:
    return float(residual_TO.square().sum())


@dataclass(frozen=True, slots=True, eq=False)
class Optimised:
    """Scales float64 ``[channels]``, and the output error, summed over tokens and outputs, before and after."""

    scales: Tensor
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """What stays the same: T tokens, C columns, O rows of all weights; ``tensors_O`` numbers the rows' scales."""

    x_TC: Tensor
    abs_x_TC: Tensor
    w_OC: Tensor
    abs_w_OC: Tensor
    y_TO: Tensor
    columns_C: Tensor
    maximum_C: Tensor
    tensors_O: Tensor
    scheme: Scheme

    @property
    def per_token(self) -> bool:
        return self.scheme.activation is Granularity.TOKEN_DYNAMIC


@dataclass(slots=True, eq=False)
class _State:
    """What the scales ``s_C`` make of it: inputs and weights, rounded and unscaled, and their product's residual."""

    s_C: Tensor
    maximum_T: Tensor
    maximum_O: Tensor
    x_TC: Tensor
    w_OC: Tensor
    residual_TO: Tensor
    error: float

    def become_(self, other: _State) -> None:
        for name in _State.__slots__:
            setattr(self, name, getattr(other, name))
