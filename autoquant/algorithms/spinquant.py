"""Rotations of the residual stream that are learned.

SpinQuant's R1 (Liu et al. 2024, "SpinQuant: LLM Quantization with Learned Rotations").

A Hadamard rotation spreads outliers without looking at the model. Among all rotations, which leave the float model
alike as it is, some quantize better. So a model that is rotated already is turned further, by the orthogonal Q that
lowers the calibration loss of the quantized model: the Kullback-Leibler divergence of its logits from the float
model's.

**Orthogonal throughout.** ``Q = (I - A)^-1 (I + A)``, Cayley's transform of a skew-symmetric A (Li et al. 2020,
"Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform"), is orthogonal whatever A is, and
A = 0 is where descent starts. Adam moves A's upper triangle; nothing has to be brought back to the manifold.

**Through the rounding.** Members of the space get ``W Q`` in every step, and the planned linears round their weight and
their input with the strategy's granularity. Rounding passes gradients straight through, scales pass theirs to the
maximum that they come from (Esser et al. 2020), which is what Q can lower. A static scale is taken from the step's
own windows: the maxima of all of them change with Q and would need a sweep in each step.

A part of the calibration windows is held out. Q is used only if it lowers the loss on them. Shapes: N windows of S
tokens, n the space's size, O outputs, I inputs of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from autoquant.aten import FACTORS
from autoquant.config.format import RotationMethod
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import execute_
from autoquant.executor.operations import rotated
from autoquant.executor.plan import make_plan
from autoquant.executor.resolved import Resolved, ResolvedRead, ResolvedSpace, RotatedSlot
from autoquant.executor.rotation import dense_rotation, seed_number
from autoquant.models.locate import locate, present_name
from autoquant.models.reading import read
from autoquant.models.structure import structure_of
from autoquant.quantizer import int8
from autoquant.quantizer.strategies import Granularity, PlannedLinear

# Function -> positions of the input and of the weight, which has [O, I] in the first and [I, O] in the others.
ARGUMENTS: Mapping[Any, tuple[int, int]] = {
    functional.linear: FACTORS["linear"],
    torch.addmm: FACTORS["addmm"],
    torch.matmul: FACTORS["matmul"],
    torch.Tensor.matmul: FACTORS["matmul"],
    torch.Tensor.__matmul__: FACTORS["matmul"],
}


@dataclass(frozen=True, slots=True)
class Settings:
    """``windows`` of ``length`` tokens in each of ``steps`` steps; ``rate``: Adam's, falling to 0 as a cosine."""

    steps: int = 100
    windows: int = 4
    length: int = 256
    rate: float = 2e-3


DEFAULT = Settings()


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """``q`` float64 [n, n], and the loss on the windows held out (nats per token) at I and at Q. Where Q was no better,
    ``q`` is I.
    """

    q: Tensor
    before: float
    after: float


def learn_rotations_(
    model: nn.Module,
    resolved: Resolved,
    planned: Sequence[PlannedLinear],
    batches: Sequence[Tensor],
    settings: Settings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Turn the learned spaces of a model further that is rotated by ``resolved`` already, in place.

    ``planned`` as they will be quantized; ``batches`` calibration token ids [1, S]. Smoothing of other channels may
    come before; maxima of inputs change. Returns by space what to add to its rotation's construction.
    Raises AutoQuantError as :func:`learn_rotation` does, with the model as it was.
    """
    settings = settings or DEFAULT
    added = {}
    for space in resolved.spaces:
        if space.method is RotationMethod.LEARNED:
            learned = learn_rotation(model, space, planned, batches, settings, progress)
            turn_(model, space, learned.q)
            share = f"loss on held-out windows {learned.before:.3g} -> {learned.after:.3g}"
            added[space.name] = f"then learned in {settings.steps} steps, {share}"
    return added


def learn_rotation(
    model: nn.Module,
    space: ResolvedSpace,
    planned: Sequence[PlannedLinear],
    batches: Sequence[Tensor],
    settings: Settings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Learned:
    """The orthogonal Q that a rotated model's ``space`` is turned by; the model stays as it is.

    The same on one machine with one number of threads: the space's seed draws the windows. Raises AutoQuantError for a
    space of several blocks or before a LayerNorm, for fewer than two windows, and for a planned linear that is no plain
    product of one weight, whose rounding would be missing from the loss.
    """
    settings = settings or DEFAULT
    if space.blocks != 1 or space.keep_ones:
        raise AutoQuantError(f"{space.name}: only a rotation of one block before RMSNorms can be learned")
    if len(batches) < 2:
        raise AutoQuantError(f"{space.name}: learning a rotation takes at least two calibration windows")
    device = next(model.parameters()).device
    length = min(settings.length, *(batch.shape[1] for batch in batches))
    windows_NS = torch.cat([batch[:, :length] for batch in batches]).to(device)
    held = max(1, len(windows_NS) // 4)
    fitted_NS, held_NS = windows_NS[:-held], windows_NS[-held:]
    loss_of = _Loss(model, _members(model, space), _schemes(model, planned))
    generator = torch.Generator().manual_seed(seed_number(space.seeds[0]))
    upper = torch.zeros(space.size, space.size, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([upper], settings.rate)
    eye = torch.eye(space.size, device=device)

    def held_out(q: Tensor) -> float:
        with torch.no_grad():
            parts = held_NS.split(settings.windows)
            return sum(float(loss_of(q, ids)) * len(ids) for ids in parts) / len(held_NS)

    before = held_out(eye)
    with torch.enable_grad():
        for step in range(settings.steps):
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
            drawn = torch.randperm(len(fitted_NS), generator=generator)[: settings.windows]
            loss = loss_of(cayley(upper), fitted_NS[drawn.to(device)])
            (upper.grad,) = torch.autograd.grad(loss, [upper])
            optimiser.step()
            progress(step + 1, settings.steps)
    with torch.no_grad():
        after = held_out(cayley(upper))
        if not after < before:
            return Learned(eye.double(), before, before)
        return Learned(cayley(upper.double()), before, after)


def cayley(upper: Tensor) -> Tensor:
    """``(I - A)^-1 (I + A)`` for the skew-symmetric A with the upper triangle of ``upper`` [n, n]; orthogonal."""
    above = upper.triu(1)
    skew, eye = above - above.mT, torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    q: Tensor = torch.linalg.solve(eye - skew, eye + skew)
    return q


@torch.no_grad()
def turn_(model: nn.Module, space: ResolvedSpace, q: Tensor) -> None:
    """Rotate a space that is rotated already, its norms folded, by an orthogonal ``q`` float64 [n, n] in place."""

    def bare(slot: RotatedSlot) -> RotatedSlot:
        return replace(slot, name=present_name(model, slot.name), fold_norm=None)

    further = replace(
        space,
        centre=False,
        writers=tuple(bare(writer) for writer in space.writers),
        reads=tuple(ResolvedRead(None, tuple(bare(reader) for reader in read.readers)) for read in space.reads),
        given=dense_rotation(q.double().cpu(), "learned"),
    )
    plan = make_plan(Resolved((further,), (), ()), structure_of(model), model.get_parameter, None)
    execute_(model, plan)


def _members(model: nn.Module, space: ResolvedSpace) -> dict[str, RotatedSlot]:
    """Writers and readers by their parameter's present name, tied ones once."""
    canonical = structure_of(model).canonical
    slots = (*space.writers, *(reader for read in space.reads for reader in read.readers))
    return {canonical[present_name(model, slot.name)]: slot for slot in slots}


def _schemes(model: nn.Module, planned: Sequence[PlannedLinear]) -> dict[int, PlannedLinear]:
    """The planned linears by the identity of their parameter."""
    for entry in planned:
        if entry.stack is not None:
            raise AutoQuantError(f"{entry.weight}: a rotation cannot be learned with quantized experts")
    return {id(locate(model, entry.weight).parameter): entry for entry in planned}


class _Loss:
    """The divergence of the turned and quantized model's logits from the float model's: (Q [n, n], ids [N, S]) -> []
    nats per token.
    """

    def __init__(
        self, model: nn.Module, members: Mapping[str, RotatedSlot], planned: Mapping[int, PlannedLinear]
    ) -> None:
        self.model, self.members, self.planned = model, members, planned
        self.parameters = {name: model.get_parameter(name).detach() for name in members}

    def __call__(self, q: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            expected = read(self.model, ids).logits.float().log_softmax(-1)
        turned = {}
        for name, slot in self.members.items():
            parameter = self.parameters[name]
            rotation = dense_rotation(q.to(parameter.dtype), "learned")
            turned[name] = rotated(parameter, slot.axis, slot.blocks, (rotation,))
        planned = {
            id(turned[name]): self.planned[id(self.model.get_parameter(name))]
            for name in turned
            if id(self.model.get_parameter(name)) in self.planned
        }
        with RoundedProducts({**self.planned, **planned}) as rounding:
            output = read(self.model, ids, lambda *args, **named: functional_call(self.model, turned, args, named))
            got = output.logits.float().log_softmax(-1)
        for entry in self.planned.values():
            if entry.weight not in rounding.seen:
                raise AutoQuantError(
                    f"{entry.weight}: a rotation cannot be learned, since this linear is no plain product of its input "
                    "and its weight, so its rounding cannot be seen; set the rotation's method to hadamard"
                )
        divergence: Tensor = (expected.exp() * (expected - got)).sum(-1).mean()
        return divergence


class RoundedProducts(TorchFunctionMode):
    """Products with the weights in ``planned`` (by identity) are computed on rounded factors while the context is open.

    Gradients pass the rounding as if it were not there; ``seen`` collects the names of the weights.
    """

    def __init__(self, planned: Mapping[int, PlannedLinear]) -> None:
        super().__init__()
        self.planned = planned
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ARGUMENTS and len(args) > ARGUMENTS[func][1]:
            at_x, at_weight = ARGUMENTS[func]
            entry = self.planned.get(id(args[at_weight]))
            if entry is not None:
                self.seen.add(entry.weight)
                changed = list(args)
                changed[at_x] = rounded_input(args[at_x], entry.scheme.activation)
                changed[at_weight] = rounded_weight(args[at_weight], entry)
                return func(*changed, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def rounded_input(x: Tensor, granularity: Granularity) -> Tensor:
    """An input [..., I] rounded with the scales that it has by itself."""
    maximum = x.abs().amax(-1, keepdim=True) if granularity is Granularity.TOKEN_DYNAMIC else x.abs().amax()
    return straight_through(x, maximum)


def rounded_weight(weight: Tensor, entry: PlannedLinear) -> Tensor:
    """A weight rounded per channel or per tensor, its dimension ``entry.in_dim`` being summed over."""
    magnitudes = weight.abs()
    maximum = magnitudes.amax(entry.in_dim, keepdim=True) if entry.scheme.weight_per_channel else magnitudes.amax()
    return straight_through(weight, maximum)


def straight_through(x: Tensor, maximum: Tensor) -> Tensor:
    """What int8 keeps of x, up to ``maximum``. Rounding's derivative is 1; that of the scale follows from it."""
    scale = (maximum / int8.QMAX).clamp_min(int8.TINY)
    steps = x / scale
    return (steps + (steps.round() - steps).detach()) * scale
