"""Rotations that are computed while the model runs: before a linear (R4, input) and on queries and keys (R3).

They use the Hadamard matrix H without random signs, in float32 or better, so that any fast Hadamard kernel may take
their place. They hold no parameters and no persistent buffers: a state dict has the same tensors with and without them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from inspect import unwrap
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import AutoQuantError
from autoquant.executor.hadamard import factor_matrices, multiply_kronecker
from autoquant.executor.resolved import ResolvedOnline

ATTENTION_PREFIX = "autoquant_rotated_"
ROTATION_NAME = "query_key_rotation"


def install_(model: nn.Module, online: Iterable[ResolvedOnline]) -> None:
    """Put online rotations into a model whose weights already undo them.

    R4 and input replace the linear by ``RotatedLinear``; R3 puts a ``HadamardRotation`` into the attention module,
    which a wrapper of the model's attention function applies.
    """
    attention = False
    for rotation in online:
        module = model.get_submodule(rotation.path)
        if rotation.kind == "R3":
            module.add_module(ROTATION_NAME, _beside(module, HadamardRotation(rotation.size)))
            attention = True
        else:
            parent, _, name = rotation.path.rpartition(".")
            rotated = RotatedLinear(module, rotation.size)
            _beside(module, rotated.rotation)
            setattr(model.get_submodule(parent), name, rotated)
    if attention:
        _rotate_attention_(model)


def _beside(module: nn.Module, rotation: nn.Module) -> nn.Module:
    """The rotation on the device of the module that it serves; as made where that has no data yet."""
    device = next((parameter.device for parameter in module.parameters() if not parameter.is_meta), None)
    return rotation if device is None else rotation.to(device)


def key_rotations(model: nn.Module) -> dict[int, HadamardRotation]:
    """The R3 rotations of a model by the number that their attention modules have in its cache."""
    rotations = {}
    for module in model.modules():
        rotation = module._modules.get(ROTATION_NAME)
        if isinstance(rotation, HadamardRotation):
            rotations[int(module.layer_idx)] = rotation  # type: ignore[arg-type]  # every cached attention has one
    return rotations


def check_installable(model: nn.Module, online: Iterable[ResolvedOnline]) -> None:
    """Raise AutoQuantError where an online rotation would not be reached, by an attention that calls no exchangeable
    function, where exchanging it would change what some attention of the model computes, and before a table.
    """
    asking = _attention_by_name(model)
    for rotation in online:
        module = model.get_submodule(rotation.path)
        if isinstance(module, RotatedLinear) or ROTATION_NAME in dict(module.named_children()):
            raise AutoQuantError(f"{rotation.kind} {rotation.path}: is rotated already")
        if isinstance(module, nn.Embedding):  # where it is a linear too; what it looks up may reach no output here
            raise AutoQuantError(
                f"{rotation.kind} {rotation.path}: {type(module).__name__} is a table too, which is given numbers of "
                "rows: these cannot be rotated; it has to stay off"
            )
        if rotation.kind != "R3":
            continue
        if not _calls_interface(module):
            raise AutoQuantError(
                f"R3 {rotation.path}: {type(module).__name__} does not call transformers' attention interface, so "
                "queries and keys cannot be reached; R3 has to stay off"
            )
        if asking:
            where = "" if asking == rotation.path else f" ({asking})"
            raise AutoQuantError(
                f"R3 {rotation.path}: {type(model.get_submodule(asking)).__name__}{where} takes one way or another by "
                "the name of its attention function, which is exchanged in the whole model; R3 has to stay off"
            )


def _calls_interface(module: nn.Module) -> bool:
    code = getattr(unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _attention_by_name(model: nn.Module) -> str | None:
    """The first attention whose code compares the name of its function, which the rotating one does not have."""
    for path, module in model.named_modules():
        if _calls_interface(module) and any("sdpa" in _texts(code.co_consts) for code in _methods(type(module))):
            return str(path)
    return None


def _methods(kind: type[nn.Module]) -> Iterator[CodeType]:
    """The code of a class's own methods: a mask may be made by one that the forward calls."""
    from autoquant.models.caches import PreTrainedModel

    for cls in kind.__mro__:
        for method in vars(cls).values() if not issubclass(PreTrainedModel, cls) else ():
            code = getattr(unwrap(method), "__code__", None)
            if code is not None:
                yield code


def _texts(constants: tuple[Any, ...]) -> set[str]:
    """The strings among a function's constants, those in its tuples and sets included."""
    flat = [part for value in constants for part in (value if isinstance(value, tuple | frozenset) else (value,))]
    return {part for part in flat if isinstance(part, str)}


def _rotate_attention_(model: nn.Module) -> None:
    """Switch every transformers model inside ``model`` to the rotating version of its attention function."""
    from autoquant.models.caches import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    for current in {m.config._attn_implementation for m in models}:
        if current.startswith(ATTENTION_PREFIX):
            continue
        name = ATTENTION_PREFIX + current
        AttentionInterface.register(name, _rotating(_eager if current == "eager" else AttentionInterface()[current]))
        AttentionMaskInterface.register(name, AttentionMaskInterface()[current])
        for m in models:
            if m.config._attn_implementation == current:
                m.config._attn_implementation = name


def _rotating(attention: Callable[..., Any]) -> Callable[..., Any]:
    def rotated_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if ROTATION_NAME in module._modules:  # q H (k H)^T = q k^T
            rotation = module.get_submodule(ROTATION_NAME)
            query = rotation(query)
            key = key if rotation.keys_are_rotated else rotation(key)
        return attention(module, query, key, value, attention_mask, **kwargs)

    return rotated_attention


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the module's own source file."""
    function = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    return function(module, *args, **kwargs)


class HadamardRotation(nn.Module):
    """``x H`` over the last axis of ``x [..., size]``, in the dtype of x.

    ``keys_are_rotated``: for R3, whether the attention is given rotated keys, by a cache that quantizes them.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.keys_are_rotated = False
        for i, factor in enumerate(factor_matrices(size)):
            self.register_buffer(f"factor_{i}", torch.from_numpy(factor), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The transform is computed in float32 at least: sums of up to ``size`` activations overflow float16."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        factors = [factor.to(dtype) for factor in self._buffers.values() if factor is not None]
        return multiply_kronecker(x.to(dtype), factors).to(x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class RotatedLinear(nn.Module):
    """A linear behind ``x H``, whose columns were multiplied by H: ``(x H)(W H)^T = x W^T``."""

    def __init__(self, linear: nn.Module, size: int) -> None:
        super().__init__()
        self.rotation = HadamardRotation(size)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.rotation(x))
        return result

    @property
    def in_features(self) -> int:
        """The linear's own: models cut what they give it to this size."""
        return self.linear.in_features  # type: ignore[return-value]  # of any module that stands for a linear

    @property
    def out_features(self) -> int:
        """The linear's own."""
        return self.linear.out_features  # type: ignore[return-value]  # as above

    @property
    def weight(self) -> Tensor:
        """The linear's own: models look at its dtype."""
        return self.linear.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The linear's own."""
        return self.linear._parameters.get("bias")
