"""Seeded random rotations that are applied without being built where they are Hadamard.

**A rotation that LayerNorm cannot see.** LayerNorm subtracts the mean before it normalises, so an arbitrary orthogonal
Q in front of it changes the function (or forces the module to become an RMSNorm, which a plain checkpoint cannot hold).
Let ``u = (1, ..., 1) / sqrt(n)``. If ``Q u = u`` then, Q being orthogonal, ``Q^T u = u`` too, and Q commutes with the
centring ``P = I - u u^T``; as ``|x P Q| = |x P|``, ``LayerNorm(x Q) = LayerNorm(x) Q`` exactly, even where x is not
centred. Such a Q is made from any orthogonal Q0 by one reflection: with ``F`` the Householder matrix that swaps ``u``
and ``Q0^T u``, ``Q = Q0 F`` gives ``Q u = Q0 Q0^T u = u``. F is ``I - 2 v v^T`` with ``v ~ u - Q0^T u``, which is as
flat as a row of a random Hadamard matrix, so every row of Q has entries of order 1 / sqrt(n): outliers are spread as
before, at the price of one rank-one update.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.config.format import RotationMethod
from autoquant.executor.hadamard import apply_hadamard, describe


def make_rotation(size: int, method: RotationMethod, seed: str, keep_ones: bool = False) -> Rotation:
    """A random rotation of ``size``, the same for the same ``seed`` text on every machine.

    ``keep_ones`` makes it fix the all-ones vector (see the module's docstring). A learned rotation begins as a Hadamard
    one; what was learned is a dense rotation behind it (:func:`dense_rotation`).
    """
    generator = torch.Generator().manual_seed(seed_number(seed))
    if method is not RotationMethod.ORTHOGONAL:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        rotation = Rotation(size, f"random signs x {describe(size)}", signs, None, None)
    else:
        rotation = Rotation(size, "random orthogonal", None, random_orthogonal(size, generator), None)
    return _fix_ones(rotation) if keep_ones else rotation


def dense_rotation(q: Tensor, construction: str) -> Rotation:
    """The rotation by an orthogonal matrix ``[size, size]``, float64."""
    return Rotation(len(q), construction, None, q, None)


def hadamard_rotation(size: int) -> Rotation:
    """The Hadamard rotation without random signs, which online rotations compute."""
    return Rotation(size, describe(size), torch.ones(size, dtype=torch.float64), None, None)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix ``[n, n]`` (float64) from the Haar measure: QR of a Gaussian matrix with the signs of R's
    diagonal moved into Q (Mezzadri 2007, "How to generate random matrices from the classical compact groups", section
    5).
    """
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed


def seed_number(text: str) -> int:
    """A 63-bit seed from any text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _fix_ones(rotation: Rotation) -> Rotation:
    u = torch.full((rotation.size,), rotation.size**-0.5, dtype=torch.float64)
    v = u - rotation.apply(u)  # as a row vector, u Q0 is (Q0^T u)^T
    length = v.norm()
    if length < 1e-12:  # Q0 keeps u already
        return rotation
    name = f"{rotation.construction}, all-ones kept"
    return Rotation(rotation.size, name, rotation.signs, rotation.dense, v / length)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """``Q = diag(signs) H F`` or ``Q = dense F``, with the reflection ``F = I - 2 v v^T`` where there is a ``v``."""

    size: int
    construction: str
    signs: Tensor | None
    dense: Tensor | None
    v: Tensor | None

    def apply(self, x: Tensor, dim: int = -1) -> Tensor:
        """``x Q`` along an axis of ``x`` with ``size`` positions, float64."""
        if self.signs is not None:
            signs = self.signs.to(x.device).reshape([-1] + [1] * (x.dim() - 1 - dim % x.dim()))
            x = apply_hadamard(x * signs, dim)
        if self.dense is None and self.v is None:
            return x
        x = x.movedim(dim, -1)
        if self.dense is not None:
            x = x @ self.dense.to(x.device)
        return self._reflect(x).movedim(-1, dim)

    def apply_transposed(self, x: Tensor) -> Tensor:
        """``x Q^T`` over the last axis of ``x [..., size]``, float64."""
        x = self._reflect(x)
        if self.dense is not None:
            return x @ self.dense.to(x.device).mT
        assert self.signs is not None
        return apply_hadamard(x, transpose=True) * self.signs.to(x.device)

    def _reflect(self, x: Tensor) -> Tensor:
        if self.v is None:
            return x
        v = self.v.to(x.device)
        return x - 2 * (x @ v).unsqueeze(-1) * v
