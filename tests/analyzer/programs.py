"""Random programs over ATen operators: drawn from a seed, built into modules, printed as Python, and cut down.

A program is a list of steps over a pool of activations ``[batch, 3, width]``. A step names its kind, the places in the
pool that it reads and a seed; from these alone come its parameters, its constants and its lines of Python. So a step
can be deleted, and its readers given what it read: the rest is built anew around the gap. What nothing else reads is
read by a linear, so that every step matters to some output.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 3
WIDTHS = (4, 6, 8)
VOCABULARY = 5
MAX_WIDTH = 16
NORMS = ("nn.RMSNorm({}, eps=1e-3)", "nn.LayerNorm({})", "nn.LayerNorm({}, bias=False)", "nn.RMSNorm({})")
MAGNITUDE = 1e-4, 1e4
"""What the values of a program are kept between, so that rounding stays below the tolerance."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step; ``shares`` is an earlier one of the same kind whose parameters it uses."""

    kind: str
    inputs: tuple[int, ...]
    seed: int
    shares: int | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """Everything that a module is built from."""

    seed: int
    width: int
    batch: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Plant:
    """What must be found: a group from the source to all the targets, or a space with these writers."""

    what: str
    kind: str
    """The kind of step that it comes from."""
    sources: tuple[str, ...]
    targets: tuple[str, ...] = ()


class InvalidError(Exception):
    """These steps make no program: shapes do not fit, or values leave the range."""


class Network(nn.Module):
    """A program as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.definitions: dict[str, str] = {}
        self.lines: list[str] = []
        self.plants: list[Plant] = []
        self.code: Any = None

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        if self.code is None:
            self.code = compile("\n".join(self.lines), "<program>", "exec")
        local = {**NAMESPACE, "self": self, "tokens": tokens}
        exec(self.code, local)
        return local["outputs"]  # type: ignore[return-value]  # the last line assigns them

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        """The parameters alone are copied: all that a test changes, and ten times faster than copying everything."""
        copied: dict[int, nn.Parameter] = {}

        def shallow(module: nn.Module) -> nn.Module:
            new = type(module).__new__(type(module))
            new.__dict__.update(module.__dict__)
            new._buffers = dict(module._buffers)
            new._parameters = {
                name: copied.setdefault(id(p), nn.Parameter(p.detach().clone(), False))
                for name, p in module._parameters.items()
                if p is not None
            } | {name: None for name, p in module._parameters.items() if p is None}
            new._modules = {name: shallow(part) for name, part in module._modules.items() if part is not None}
            return new

        return shallow(self)  # type: ignore[return-value]  # of its own type

    def text(self) -> str:
        """The program as Python that can be pasted into a test."""
        made = "\n".join(f"        self.{name} = {made}" for name, made in self.definitions.items())
        body = "\n".join(f"        {line}" for line in self.lines)
        return (
            "class Program(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{made}\n\n    def forward(self, tokens):\n{body}\n        return outputs"
        )


NAMESPACE: dict[str, Any] = {"torch": torch, "F": F}


@dataclass(slots=True)
class Scope:
    """What a kind of step draws from: names and widths of its inputs, random numbers, parameters of its own."""

    network: Network
    draw: random.Random
    values: torch.Generator
    prefix: str
    kind: str
    batch: int
    inputs: tuple[str, ...]
    widths: tuple[int, ...]
    made: int = 0
    owned: list[str] = field(default_factory=list)

    def name(self, what: str) -> str:
        """A name for a variable of this step."""
        return f"{what}{self.prefix}"

    def _register(self, made: str, module: Callable[[], nn.Module | nn.Parameter | Tensor]) -> str:
        name = f"{self.prefix}_{self.made}"
        self.made += 1
        if self.network.definitions.get(name, made) != made:
            raise InvalidError(f"{name} is {self.network.definitions[name]}, not {made}")
        if name not in self.network.definitions:
            held = module()
            if isinstance(held, (nn.Module, nn.Parameter)):
                setattr(self.network, name, held)
            else:
                self.network.register_buffer(name, held)
            self.network.definitions[name] = made
            self.owned.append(name)
        return f"self.{name}"

    def module(self, made: str) -> str:
        """A module from its Python text, its parameters random: gains of 1 and biases of 0 hide mistakes."""

        def build() -> nn.Module:
            built = eval(made, {"nn": nn, "torch": torch}).double().eval()
            with torch.no_grad():
                for name, parameter in built.named_parameters():
                    start = 1.0 if isinstance(built, (nn.RMSNorm, nn.LayerNorm)) and name == "weight" else 0.0
                    scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
                    parameter.copy_(start + scale * self.normal(*parameter.shape)).requires_grad_(False)
            return built

        return self._register(made, build)

    def linear(self, inputs: int, outputs: int, bias: bool | None = None) -> str:
        bias = self.draw.random() < 0.5 if bias is None else bias
        return self.module(f"nn.Linear({inputs}, {outputs}{'' if bias else ', bias=False'})")

    def norm(self, width: int) -> str:
        return self.module(self.draw.choice(NORMS).format(width))

    def parameter(self, *shape: int) -> str:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.7
        made = f"nn.Parameter({scale:.3g} * torch.randn({', '.join(map(str, shape))}))"
        return self._register(made, lambda: nn.Parameter(scale * self.normal(*shape), False))

    def constant(self, *shape: int) -> str:
        """A buffer of floating-point numbers."""
        made = f"torch.rand({', '.join(map(str, shape))})  # a buffer"
        return self._register(made, lambda: torch.rand(shape, generator=self.values, dtype=torch.float64))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.values, dtype=torch.float64)

    def plant(self, what: str, sources: tuple[str, ...], targets: tuple[str, ...] = ()) -> None:
        sources, targets = (tuple(n.removeprefix("self.") for n in names) for names in (sources, targets))
        self.network.plants.append(Plant(what, self.kind, sources, targets))


Kind = Callable[[Scope], list[str]]
"""Returns lines of Python; the last one is an expression, the step's result."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A kind of step in the catalogue."""

    lines: Kind
    inputs: int = 1
    alike: bool = False
    """Must its inputs have the same width?"""
    shared: bool = True
    """May its parameters be used by another step too?"""


class Builder:
    """Puts steps together, one by one, and runs each as it comes."""

    def __init__(self, catalogue: dict[str, Entry], seed: int, width: int, batch: int) -> None:
        self.catalogue = catalogue
        self.program = Program(seed, width, batch, ())
        self.network = Network()
        self.tokens = torch.tensor([[1, 4, 2], [3, 0, 4]])[:batch]
        scope = self._scope(Step("table", (), seed), "table")
        name = scope.module(f"nn.Embedding({VOCABULARY}, {width})")
        self.local: dict[str, Any] = {**NAMESPACE, "self": self.network, "tokens": self.tokens}
        self.widths: list[int] = []
        self.read: set[int] = set()
        self._run([f"x0 = {name}(tokens)"], "x0")

    def append(self, step: Step) -> None:
        """Raises InvalidError where it does not fit; nothing is changed then."""
        entry = self.catalogue[step.kind]
        if any(place >= len(self.widths) for place in step.inputs):
            raise InvalidError("it reads what is not there")
        if entry.alike and len({self.widths[place] for place in step.inputs}) > 1:
            raise InvalidError("its inputs differ in width")
        index = len(self.program.steps)
        plants = len(self.network.plants)
        scope = self._scope(step, f"s{index if step.shares is None else step.shares}")
        out = f"x{index + 1}"
        try:
            *lines, result = entry.lines(scope)
            self._run([*lines, f"{out} = {result}"], out)
        except Exception as error:
            for name in scope.owned:
                delattr(self.network, name)
                del self.network.definitions[name]
            del self.network.plants[plants:]
            raise InvalidError(f"{step.kind}: {error}") from error
        said = set(re.findall(r"\bx\d+\b", " ".join([*lines, result])))
        self.read.update(place for place in step.inputs if f"x{place}" in said)
        self.program = replace(self.program, steps=(*self.program.steps, step))

    def _scope(self, step: Step, prefix: str) -> Scope:
        return Scope(
            self.network,
            random.Random(step.seed),
            torch.Generator().manual_seed(step.seed),
            prefix,
            step.kind,
            self.program.batch,
            tuple(f"x{place}" for place in step.inputs),
            tuple(self.widths[place] for place in step.inputs),
        )

    def _run(self, lines: list[str], out: str) -> None:
        with torch.no_grad():
            exec("\n".join(lines), self.local)
        value = self.local[out]
        shape = tuple(value.shape)
        if shape[:-1] != (self.program.batch, TOKENS) or not 1 <= shape[-1] <= MAX_WIDTH:
            raise InvalidError(f"shape {shape}")
        if value.dtype != torch.float64 or not MAGNITUDE[0] < float(value.abs().max()) < MAGNITUDE[1]:
            raise InvalidError("out of range")
        self.network.lines += lines
        self.widths.append(shape[-1])

    def finish(self) -> Network:
        """Read by a linear what nothing else reads; now and then it is an output as it stands."""
        outputs = []
        for place, width in enumerate(self.widths):
            if place in self.read:
                continue
            seed = self.program.steps[place - 1].seed if place else self.program.seed
            scope = self._scope(Step("out", (place,), seed), f"out{place}")
            bare = place and seed % 12 == 0
            outputs.append(f"x{place}" if bare else f"{scope.linear(width, 3)}(x{place})")
        self.network.lines.append(f"outputs = ({', '.join(outputs)},)")
        return self.network.eval()


@dataclass(frozen=True, slots=True)
class Built:
    program: Program
    network: Network
    tokens: Tensor


def draw(catalogue: dict[str, Entry], weights: dict[str, float], seed: int) -> Built:
    """The program of a seed."""
    rng = random.Random(seed)
    builder = Builder(catalogue, rng.randrange(1 << 30), rng.choice(WIDTHS), rng.choice((1, 2)))
    kinds, chances = list(weights), list(weights.values())
    wanted = rng.randint(3, 12)
    for kind in rng.choices(kinds, chances, k=4 * wanted):
        if len(builder.program.steps) == wanted:
            break
        try:
            builder.append(_drawn(rng, builder, kind))
        except InvalidError:
            continue  # another one will fit
    return Built(builder.program, builder.finish(), builder.tokens)


def _drawn(rng: random.Random, builder: Builder, kind: str) -> Step:
    entry = builder.catalogue[kind]
    places = len(builder.widths)
    at = places - 1 if rng.random() < 0.7 else rng.randrange(places)
    inputs = [at]
    for _ in range(entry.inputs - 1):
        fits = [i for i in range(places) if not entry.alike or builder.widths[i] == builder.widths[at]]
        others = [i for i in fits if i != at]
        inputs.append(rng.choice(others if others and rng.random() < 0.9 else fits))
    steps = builder.program.steps
    old = [i for i, step in enumerate(steps) if step.kind == kind and step.shares is None]
    if old and entry.shared and rng.random() < 0.2:
        shares = rng.choice(old)
        return Step(kind, tuple(inputs), steps[shares].seed, shares)
    return Step(kind, tuple(inputs), rng.randrange(1 << 30))


def build(catalogue: dict[str, Entry], program: Program) -> Built:
    """The module of a program. Raises InvalidError where the steps make none."""
    builder = Builder(catalogue, program.seed, program.width, program.batch)
    for step in program.steps:
        builder.append(step)
    return Built(builder.program, builder.finish(), builder.tokens)


# --- cutting down -----------------------------------------------------------------------------------------------------


def shrunk(catalogue: dict[str, Entry], program: Program, fails: Callable[[Built], bool]) -> Built:
    """The program with as few steps as still fail, and as plain ones."""
    best = build(catalogue, program)
    again = True
    while again:
        again = False
        for candidate in _smaller(best.program):
            try:
                built = build(catalogue, candidate)
            except InvalidError:
                continue
            if fails(built):
                best, again = built, True
                break
    return best


def _smaller(program: Program) -> Iterator[Program]:
    count = len(program.steps)
    size = count // 2
    while size:
        for start in range(count - size, -1, -1):
            yield replace(program, steps=_without(program.steps, range(start, start + size)))
        size //= 2
    if program.batch > 1:
        yield replace(program, batch=1)
    for index, step in enumerate(program.steps):
        for at, place in enumerate(step.inputs):
            if place:
                inputs = (*step.inputs[:at], 0, *step.inputs[at + 1 :])
                yield replace(program, steps=_replaced(program.steps, index, replace(step, inputs=inputs)))
        if step.shares is not None:
            yield replace(program, steps=_replaced(program.steps, index, replace(step, shares=None)))


def _replaced(steps: tuple[Step, ...], index: int, step: Step) -> tuple[Step, ...]:
    return (*steps[:index], step, *steps[index + 1 :])


def _without(steps: tuple[Step, ...], gone: range) -> tuple[Step, ...]:
    """Whoever read a deleted step reads what that one read first."""
    place = {0: 0}
    index: dict[int, int] = {}
    kept: list[Step] = []
    for i, step in enumerate(steps):
        if i in gone:
            place[i + 1] = place[step.inputs[0]]
            continue
        shares = None if step.shares is None else index.get(step.shares)
        kept.append(replace(step, inputs=tuple(place[p] for p in step.inputs), shares=shares))
        index[i] = len(kept) - 1
        place[i + 1] = len(kept)
    return tuple(kept)
