"""Hadamard matrices of any size, built at run time, and the fast transform by them.

A Hadamard matrix has entries +-1 and orthogonal rows. Orders multiply (Kronecker product), so an order ``n`` is built
as Sylvester's ``2**k`` times Paley's first and second constructions (Paley 1933, "On orthogonal matrices"):

- Paley I:  order q + 1 for a prime power q = 3 (mod 4): ``H = I + [[0, 1], [-1, J]]``,
- Paley II: order 2 (q + 1) for a prime power q = 1 (mod 4): ``H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]``
  with ``C = [[0, 1], [1, J]]``,

where ``J[i, j] = chi(i - j)`` is the Jacobsthal matrix and chi the quadratic character of the field with q elements.
A size that no such product reaches gets the largest constructible divisor, repeated block-diagonally.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RADIX_BITS = 6
"""Sylvester factors are applied as dense matrices of up to order 2**6: fewer passes over memory than radix 2."""


def describe(n: int) -> str:
    """The construction of ``hadamard_matrix(n)`` in words: ``'Sylvester 16 x Paley I 284 (q = 283)'``."""
    construction = find_construction(n)
    names = [f"Sylvester {construction.sylvester}"] if construction.sylvester > 1 or not construction.paley else []
    names += [f"Paley {'I' if f.kind == 1 else 'II'} {f.order} (q = {f.q})" for f in construction.paley]
    name = " x ".join(names)
    return name if construction.copies == 1 else f"{construction.copies} blocks of {name}"


def hadamard_matrix(n: int) -> Tensor:
    """The orthogonal matrix ``[n, n]`` (float64) that ``apply_hadamard`` multiplies by: Hadamard / sqrt(order)."""
    return apply_hadamard(torch.eye(n, dtype=torch.float64))


def apply_hadamard(x: Tensor, dim: int = -1, transpose: bool = False) -> Tensor:
    """``x H`` (or ``x H^T``) along ``dim`` for the orthogonal Hadamard matrix of that size, in the dtype of ``x``.

    Costs ``n * sum(factor orders)`` per vector; the ``[n, n]`` matrix is never built.
    """
    factors = [torch.from_numpy(f).to(device=x.device, dtype=x.dtype) for f in factor_matrices(x.shape[dim])]
    return multiply_kronecker(x, factors, dim, transpose)


def multiply_kronecker(x: Tensor, factors: list[Tensor], dim: int = -1, transpose: bool = False) -> Tensor:
    """``x (F1 (x) F2 (x) ...) / sqrt(product of orders)`` along ``dim``, in blocks where the product is smaller than
    it.

    Nothing is transposed: the axis is cut into one axis a factor, and each is multiplied where it lies.
    """
    dim %= x.dim()
    order = math.prod([f.shape[0] for f in factors])  # a list: Dynamo cannot trace a generator here
    inner = math.prod(x.shape[dim + 1 :])  # elements from one position along the axis to the next
    y = x
    for factor in reversed(factors):
        f = factor.shape[0]
        if inner == 1:
            y = y.reshape(-1, f) @ (factor.mT if transpose else factor)
        else:  # bmm: matmul would transpose y to make one product of it
            y = y.reshape(-1, f, inner)
            y = torch.bmm((factor if transpose else factor.mT).contiguous().expand(y.shape[0], f, f), y)
        inner *= f
    result: Tensor = (y * order**-0.5).reshape(x.shape)
    return result


@lru_cache(maxsize=64)
def factor_matrices(n: int, most_bits: int = RADIX_BITS, innermost: int = 0) -> tuple[NDArray[np.int8], ...]:
    """The +-1 factors of the construction, int8, outermost first; Sylvester's have up to ``2 ** most_bits`` rows.

    ``innermost``: the bits of the last one instead, where there are no others than Sylvester's; with one more it is
    the only one.
    """
    construction = find_construction(n)
    bits = construction.sylvester.bit_length() - 1
    last = 0 if construction.paley else bits if bits <= innermost + 1 else innermost
    rest = bits - last
    passes = math.ceil(rest / most_bits)
    factors = [_sylvester(1 << (rest + i) // passes) for i in reversed(range(passes))]  # of sizes as equal as can be
    factors += [_sylvester(1 << last)] if last else []
    factors += [_paley_one(f.q) if f.kind == 1 else _paley_two(f.q) for f in construction.paley]
    return tuple(factors) or (np.ones((1, 1), dtype=np.int8),)


@lru_cache(maxsize=256)
def find_construction(n: int) -> Construction:
    """The cheapest product of factors of order n, else of its largest divisor that has one."""
    if n < 1:
        raise ValueError(f"a rotation needs a positive size, not {n}")
    for order in sorted((d for d in range(1, n + 1) if n % d == 0), reverse=True):
        paley = _cheapest(order)
        if paley is not None:
            return Construction(n // order, order // math.prod(f.order for f in paley), paley)
    raise AssertionError("order 1 is always constructible")


@lru_cache(maxsize=4096)
def _cheapest(n: int) -> tuple[Paley, ...] | None:
    """Paley factors whose product divides n and leaves a power of two, with the least sum of orders."""
    if n & (n - 1) == 0:
        return ()
    best: tuple[Paley, ...] | None = None
    for order in range(12, n + 1, 4):
        if n % order or order & (order - 1) == 0 or (factor := _paley(order)) is None:
            continue
        rest = _cheapest(n // order)
        if rest is not None and (
            best is None or factor.order + sum(f.order for f in rest) < sum(f.order for f in best)
        ):
            best = (factor, *rest)
    return best


def _paley(order: int) -> Paley | None:
    """A Paley construction of this order (a multiple of 4)."""
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return Paley(1, order - 1)
    if (order // 2 - 1) % 4 == 1 and _prime_power(order // 2 - 1):
        return Paley(2, order // 2 - 1)
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with p prime and p**k == q."""
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0 and q > 1:
        q, k = q // p, k + 1
    return (p, k) if q == 1 and k else None


def _jacobsthal(q: int) -> NDArray[np.int8]:
    """``chi(a - b)`` for all a, b in GF(q); element number = its digits in base p.

    x is a primitive element for some monic f of degree k over GF(p): when its powers in GF(p)[x]/f reach q - 1 values,
    the quotient is the field and the even powers are its squares. No irreducibility test or multiplication is needed.
    """
    prime_power = _prime_power(q)
    assert prime_power is not None
    p, k = prime_power
    weights = p ** np.arange(k)
    for low in itertools.product(range(p), repeat=k):
        powers = _powers_of_x(low, p, q)
        if powers is not None:
            break
    character = np.zeros(q, dtype=np.int8)
    numbers = np.asarray(powers) @ weights
    character[numbers[0::2]] = 1
    character[numbers[1::2]] = -1
    digits = np.arange(q)[:, None] // weights % p
    difference = sum(((digits[:, None, i] - digits[None, :, i]) % p) * int(weights[i]) for i in range(k))
    jacobsthal: NDArray[np.int8] = character[difference]
    return jacobsthal


def _powers_of_x(low: tuple[int, ...], p: int, q: int) -> list[tuple[int, ...]] | None:
    """1, x, ..., x**(q-2) modulo ``x**k + low``, or None when x has a smaller order."""
    one = (1,) + (0,) * (len(low) - 1)
    powers, current = [one], one
    for _ in range(q - 1):
        top = current[-1]
        current = tuple((c - top * f) % p for c, f in zip((0, *current[:-1]), low, strict=True))
        if current == one:
            return powers if len(powers) == q - 1 else None
        powers.append(current)
    return None


def _sylvester(order: int) -> NDArray[np.int8]:
    h = np.ones((1, 1), dtype=np.int8)
    while h.shape[0] < order:
        h = np.block([[h, h], [h, -h]])
    return h


def _paley_one(q: int) -> NDArray[np.int8]:
    h = np.ones((q + 1, q + 1), dtype=np.int8)
    h[1:, 0] = -1
    h[1:, 1:] = _jacobsthal(q) + np.eye(q, dtype=np.int8)
    return h


def _paley_two(q: int) -> NDArray[np.int8]:
    conference = np.ones((q + 1, q + 1), dtype=np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    plus = np.array([[1, 1], [1, -1]], dtype=np.int8)
    minus = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(conference, plus) + np.kron(np.eye(q + 1, dtype=np.int8), minus)


@dataclass(frozen=True, slots=True)
class Paley:
    """Paley's construction 1 or 2 over the field with q elements."""

    kind: int
    q: int

    @property
    def order(self) -> int:
        return self.q + 1 if self.kind == 1 else 2 * (self.q + 1)


@dataclass(frozen=True, slots=True)
class Construction:
    """``copies`` diagonal blocks of ``Sylvester(sylvester) (x) Paley (x) ...``."""

    copies: int
    sylvester: int
    paley: tuple[Paley, ...]
