"""Online rotations: the function is unchanged, and the wrappers behave as modules."""

from __future__ import annotations

import copy

import pytest
import torch
from handmade import LLAMA, build, change, llama_like, logits
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autoquant.config.format import edited
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import apply_
from autoquant.executor.hadamard import hadamard_matrix
from autoquant.executor.online import HadamardRotation, RotatedLinear, _beside, check_installable
from autoquant.executor.resolve import resolve
from autoquant.executor.resolved import ResolvedOnline
from autoquant.executor.scales import random_scales
from autoquant.models.reduce import float64_throughout
from autoquant.models.structure import structure_of

R3, R4 = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp.down_proj"
INPUT = "model.layers.{layer}.self_attn.q_proj"


@pytest.mark.parametrize("only", [[R3], [R4], [INPUT], [R3, R4, INPUT, "residual", "heads"]])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_function_is_kept(only: list[str], attention: str) -> None:
    model = build("llama", **LLAMA)
    model.set_attn_implementation(attention)
    before = logits(model)
    applied = apply_(model, llama_like(model), only=only)
    assert change(before, logits(model)) < 1e-13
    assert set(applied.online) <= {p.replace("{layer}", str(n)) for p in only for n in range(2)}
    if R3 in only:
        assert model.config._attn_implementation == f"autoquant_rotated_{attention}"


def test_r3_rotates_what_the_attention_sees() -> None:
    """Taking the rotation of the keys alone away must show: otherwise R3 would be idle."""
    model = build("llama", **LLAMA)
    before = logits(model)
    apply_(model, llama_like(model), only=[R3])
    rotation = model.get_submodule("model.layers.0.self_attn.query_key_rotation")
    calls = []
    rotation.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    assert change(before, logits(model)) < 1e-13
    assert calls == [(2, 4, 9, 8), (2, 2, 9, 8)]


def test_wrappers_survive_deepcopy_state_dict_and_compile() -> None:
    model = build("llama", dtype=torch.float32, **LLAMA)
    apply_(model, llama_like(model), only=[R3, R4])
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    other = build("llama", seed=5, dtype=torch.float32, **LLAMA)
    apply_(other, llama_like(other), only=[R3, R4])
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(logits(other), expected)
    assert not any("factor" in name for name in model.state_dict())


def test_wrappers_compile_whole() -> None:
    linear = torch.nn.Linear(24, 5)
    wrapped = RotatedLinear(linear, 24)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), wrapped(x), atol=1e-6)


@pytest.mark.parametrize("size", [8, 24, 130])
def test_the_rotation_is_the_hadamard_matrix(size: int) -> None:
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    with float64_throughout():
        assert torch.allclose(HadamardRotation(size)(x), x @ hadamard_matrix(size), atol=1e-13)


def test_half_precision_does_not_overflow_inside() -> None:
    x = torch.full((1, 64), 4e4, dtype=torch.float16)
    x[:, 1::2] *= -1
    rotated = HadamardRotation(64)(x)  # one channel holds sqrt(64) times the entry: too large, the others are 0
    assert rotated.dtype is torch.float16 and int(rotated.isfinite().sum()) == 63


def test_a_second_rotation_is_refused() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    apply_(model, config, only=[R3])
    with pytest.raises(AutoQuantError, match=r"R3 model.layers.0.self_attn: is rotated already"):
        apply_(model, config, only=[R3])


def test_an_attention_without_the_interface_is_refused() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    path = "model.layers.{layer}.mlp"
    online = tuple(edited(o, path=path) if o.kind == "R3" else o for o in config.rotation.online)
    config = edited(config, rotation=edited(config.rotation, online=online))
    with pytest.raises(AutoQuantError, match="LlamaMLP does not call transformers' attention interface"):
        apply_(model, config, only=[path])


def test_an_attention_that_asks_for_the_name_of_its_function_is_refused() -> None:
    """The rotating function has another name: a mask that only "sdpa" gets would be left out."""
    model = build("llama", **LLAMA)
    config = llama_like(model)
    attention = type(model.model.layers[0].self_attn)

    class Asking(attention):  # type: ignore[misc, valid-type]  # a class of transformers
        def forward(self, *args: object, **kwargs: object) -> object:
            if self.config._attn_implementation in ("eager", "sdpa"):
                return super().forward(*args, **kwargs)
            return ALL_ATTENTION_FUNCTIONS

    model.model.layers[1].self_attn.__class__ = Asking
    with pytest.raises(
        AutoQuantError,
        match=r"R3 model\.layers\.0\.self_attn: Asking \(model\.layers\.1\.self_attn\) takes one way or another",
    ):
        apply_(model, config, only=[R3])


def test_an_attention_of_which_a_method_asks_for_that_name_is_refused() -> None:
    """The forward itself does not: it calls what makes the mask."""
    model = build("llama", **LLAMA)
    attention = type(model.model.layers[0].self_attn)

    class Asking(attention):  # type: ignore[misc, valid-type]  # a class of transformers
        def mask(self) -> bool:
            return bool(self.config._attn_implementation == "sdpa")

        def forward(self, *args: object, **kwargs: object) -> object:
            return ALL_ATTENTION_FUNCTIONS if self.mask() else super().forward(*args, **kwargs)

    model.model.layers[1].self_attn.__class__ = Asking
    with pytest.raises(AutoQuantError, match=r"Asking \(model\.layers\.1\.self_attn\) takes one way or another by"):
        apply_(model, llama_like(model), only=[R3])


def test_a_rotated_linear_tells_its_size_as_the_linear_does() -> None:
    """Models cut what they give it to its size."""
    linear = nn.Linear(8, 3)
    rotated = RotatedLinear(linear, 8)
    assert (rotated.in_features, rotated.out_features, rotated.bias) == (8, 3, linear.bias)
    assert rotated.weight is linear.weight
    with pytest.raises(AttributeError):
        _ = rotated.missing


def test_a_table_that_is_a_linear_too_is_refused() -> None:
    class Both(nn.Embedding):
        """Rows by their numbers, or sums of them by their shares."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight if x.is_floating_point() else super().forward(x)

    model = nn.ModuleDict({"both": Both(8, 4), "plain": nn.Linear(8, 4)})
    check_installable(model, [ResolvedOnline("input", "plain", 8, None)])
    with pytest.raises(AutoQuantError, match="input both: Both is a table too, which is given numbers of rows"):
        check_installable(model, [ResolvedOnline("input", "both", 8, None)])


def test_everything_together_with_smoothing() -> None:
    """Smoothing scales columns that the residual rotation has turned; an online rotation turns them after that."""
    model = build("llama", **LLAMA)
    config = llama_like(model)
    names = [*(g.name for g in config.smoothing.groups), "residual", "heads", R3, R4, INPUT]
    scales = random_scales(resolve(config, structure_of(model), only=names), 0)
    before = logits(model)
    apply_(model, config, only=names, scales=scales)
    assert change(before, logits(model)) < 1e-13


def test_a_linear_rotated_twice_is_refused() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    online = tuple(edited(o, path=R4, size=40) for o in config.rotation.online if o.kind != "R3")
    config = edited(config, rotation=edited(config.rotation, online=online))
    with pytest.raises(AutoQuantError, match="is rotated online twice; disable one"):
        apply_(model, config, only=[R4])


def test_a_module_without_data_does_not_take_its_rotation_along() -> None:
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    rotation = HadamardRotation(4)
    assert _beside(empty, rotation) is rotation and not rotation.factor_0.is_meta
    assert _beside(nn.Linear(4, 4), rotation).factor_0.device.type == "cpu"
