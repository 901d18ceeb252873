"""Every group and space of nine kinds of model leaves the logits alone; what must not be done is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from handmade import LLAMA, build, change, llama_like, logits
from handmade_more import (
    BLOOM,
    GPT2,
    MIXTRAL,
    NEOX,
    OPT,
    bloom_config,
    gpt2_config,
    mixtral_config,
    neox_config,
    opt_config,
)
from torch import nn

from autoquant.config.check import problems
from autoquant.config.format import Config, Norm, RotationMethod, edited
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import Applied, apply_, check_finite
from autoquant.executor.plan import Scales
from autoquant.executor.resolve import resolve
from autoquant.executor.scales import random_scales
from autoquant.models.fit import structure_problems
from autoquant.models.structure import structure_of


@dataclass(frozen=True, slots=True)
class Case:
    model_type: str
    sizes: dict[str, Any]
    config: Callable[[nn.Module], Config]


CASES = {
    "llama": Case("llama", LLAMA, llama_like),
    "qwen2": Case("qwen2", LLAMA, lambda model: llama_like(model, bias=True)),
    "gemma": Case("gemma", LLAMA, lambda model: llama_like(model, offset=1)),
    "opt": Case("opt", OPT, opt_config),
    "opt, not centred": Case("opt", OPT, lambda model: opt_config(model, centre=False)),
    "gpt2": Case("gpt2", GPT2, gpt2_config),
    "gpt_neox": Case("gpt_neox", NEOX, neox_config),
    "bloom": Case("bloom", BLOOM, bloom_config),
    "mixtral": Case("mixtral", MIXTRAL, mixtral_config),
}
EVERY = ["attention_in", "v_o", "mlp_in", "up_down", "fc1_fc2", "residual", "heads"]


def scales_for(model: nn.Module, config: Config, **options: Any) -> Scales:
    return random_scales(resolve(config, structure_of(model), **options), seed=3)


def apply_random(model: nn.Module, config: Config, **options: Any) -> Applied:
    return apply_(model, config, scales=scales_for(model, config, **options), **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", [RotationMethod.HADAMARD, RotationMethod.ORTHOGONAL])
def test_each_alone_and_all_together_keep_the_function(name: str, method: RotationMethod) -> None:
    case = CASES[name]
    model = build(case.model_type, **case.sizes)
    config = case.config(model)
    config = edited(config, rotation=edited(config.rotation, method=method))
    before = logits(model)
    present = {g.name for g in config.smoothing.groups} | {s.name for s in config.rotation.spaces}
    for only in [[n] for n in EVERY if n in present] + [[n for n in EVERY if n in present], None]:
        changed = copy.deepcopy(model)
        weights = {n: p.clone() for n, p in changed.named_parameters()}
        applied = apply_random(changed, config, only=only)
        assert change(before, logits(changed)) < 1e-13, only
        assert any(not torch.equal(p, weights[n]) for n, p in changed.named_parameters() if n in weights), only
        assert only is None or {*applied.spaces, *applied.groups} == set(only)


def test_a_residual_of_two_blocks_is_accepted_and_carried_out() -> None:
    """Rotations of the first half of the channels and of the second leave a norm over all of them alone."""
    model = build("llama", **LLAMA)
    config = llama_like(model)
    halves = tuple(
        edited(space, size=space.size // 2, blocks=2) if space.kind == "R1" else space
        for space in config.rotation.spaces
    )
    config = edited(config, rotation=edited(config.rotation, spaces=halves))
    assert problems(config) == [] == structure_problems(config, structure_of(model))
    before, weight = logits(model), model.get_input_embeddings().weight.detach().clone()  # type: ignore[operator,union-attr]
    applied = apply_random(model, config, only=["residual"])
    assert applied.spaces == ("residual",)
    assert change(before, logits(model)) < 1e-13
    after, half = model.get_input_embeddings().weight.detach(), weight.shape[1] // 2  # type: ignore[operator,union-attr]
    for block in (slice(None, half), slice(half, None)):
        assert not torch.allclose(after[:, block], weight[:, block])
        lengths = (after[:, block].norm(dim=1), weight[:, block].norm(dim=1))
        torch.testing.assert_close(*lengths)  # no channel left its block


def test_a_tied_head_is_untied_and_said_so() -> None:
    model = build("gemma", **LLAMA)
    config = llama_like(model, offset=1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]
    applied = apply_random(model, config, only=["residual"])
    assert applied.untied == ("lm_head.weight",)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight  # type: ignore[operator]
    assert model.config.tie_word_embeddings is False


def test_a_tie_stays_where_both_change_alike() -> None:
    model = build("gemma", **LLAMA)
    applied = apply_random(model, llama_like(model, offset=1), only=["heads", "v_o"])
    assert applied.untied == ()
    assert model.config.tie_word_embeddings is True


def test_a_zero_gain_moves_the_bias_into_a_new_one() -> None:
    model = build("gpt_neox", **NEOX)
    config = neox_config(model)
    with torch.no_grad():
        model.get_parameter("gpt_neox.final_layer_norm.weight")[3] = 0
    before = logits(model)
    applied = apply_random(model, config, only=["residual"])
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert applied.created and head.bias is not None
    assert change(before, logits(model)) < 1e-13


def test_a_kept_bias_needs_no_new_parameter() -> None:
    model = build("gpt_neox", **NEOX)
    names = set(model.state_dict())
    applied = apply_random(model, neox_config(model), only=["residual"])
    assert applied.created == ()
    assert set(model.state_dict()) == names


def test_parameters_keep_identity_dtype_and_gradients() -> None:
    model = build("llama", dtype=torch.bfloat16, **LLAMA)
    kept = dict(model.named_parameters())
    apply_random(model, llama_like(model))
    assert all(p is kept[n] and p.dtype is torch.bfloat16 and p.requires_grad for n, p in model.named_parameters())


def test_the_seed_replaces_the_configs() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    first, second, again = (copy.deepcopy(model) for _ in range(3))
    for changed, seed in ((first, 1), (second, 2), (again, 1)):
        apply_(changed, config, smooth="none", seed=seed)
    name = "model.embed_tokens.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), second.get_parameter(name))


# What is refused, and that nothing has changed by then.


def refused(model: nn.Module, config: Config, message: str, **options: Any) -> AutoQuantError:
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AutoQuantError, match=message) as caught:
        apply_(model, config, **options)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(
        torch.equal(
            p,
            after[n],
        )
        or p.isnan().any()
        for n, p in before.items()
    )
    return caught.value


def test_a_nan_is_refused() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = torch.nan
    refused(model, config, r"model.layers.1.mlp.down_proj.weight holds a NaN", smooth="none")


def test_a_nan_in_a_norm_is_refused() -> None:
    model = build("llama", **LLAMA)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = torch.inf
    refused(model, llama_like(model), r"model.norm.weight holds a NaN or an infinity", smooth="none")


def test_overflow_is_refused() -> None:
    model = build("llama", dtype=torch.float16, **LLAMA)
    config = llama_like(model)
    scales = {key: torch.full_like(s, 1e7) for key, s in scales_for(model, config, only=["v_o"]).items()}
    with pytest.raises(AutoQuantError, match=r"v_proj.weight overflows torch.float16 when transformed"):
        apply_(model, config, only=["v_o"], scales=scales)


def test_smoothing_needs_good_scales() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    error = refused(model, config, "4 smoothing groups cannot be applied; nothing was changed")
    assert error.details[0] == "v_o (layer 0): no scales; calibrate first, or do not smooth"
    scales = dict(scales_for(model, config, only=["v_o"]))
    scales["v_o", 0] = torch.ones(3)
    scales["v_o", 1] = torch.zeros(16)
    error = refused(model, config, "2 smoothing groups", only=["v_o"], scales=scales)
    assert error.details == (
        "v_o (layer 0): scales of shape (3,), expected (16,)",
        "v_o (layer 1): scales must be positive and finite",
    )


def test_a_meta_model_is_refused() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    with pytest.raises(AutoQuantError, match="meta device"):
        apply_(model.to("meta"), config, smooth="none")


def test_a_module_used_twice_is_refused() -> None:
    model = build("llama", **LLAMA)
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj  # type: ignore[union-attr, index]
    config = llama_like(model)
    refused(
        model, config, "one module used twice", only=["up_down"], scales=scales_for(model, config, only=["up_down"])
    )


# Mutations: each is a mistake that a config can hold or that other tools make. The figure is printed (pytest -s).


def mutated(config: Config, name: str, **changes: Any) -> Config:
    spaces = tuple(edited(s, **changes) if s.name == name else s for s in config.rotation.spaces)
    groups = tuple(edited(g, **changes) if g.name == name else g for g in config.smoothing.groups)
    return edited(
        config, rotation=edited(config.rotation, spaces=spaces), smoothing=edited(config.smoothing, groups=groups)
    )


def figure(model: nn.Module, config: Config, name: str) -> float:
    before = logits(model)
    apply_random(model, config, only=[name])
    return change(before, logits(model))


def find(config: Config, name: str) -> Any:
    return next(x for x in (*config.rotation.spaces, *config.smoothing.groups) if x.name == name)


def drop_v_bias(config: Config) -> Config:
    return mutated(config, "heads", writers=find(config, "heads").writers[:1])


def drop_router(config: Config) -> Config:
    return mutated(config, "mlp_in", targets=find(config, "mlp_in").targets[1:])


def drop_norm_bias(config: Config) -> Config:
    return mutated(config, "attention_in", sources=find(config, "attention_in").sources[:1])


def shift_v_rows(config: Config) -> Config:
    def shifted(slot: Any) -> Any:
        return edited(slot, index=tuple(edited(i, start=i.start - 1) for i in slot.index))

    return mutated(config, "v_o", sources=tuple(shifted(s) for s in find(config, "v_o").sources))


def forget_gqa(config: Config) -> Config:
    (target,) = find(config, "v_o").targets
    index = edited(target.index[0], shape=(2, 1, 8))
    return mutated(config, "v_o", targets=(edited(target, index=(index,)),))


def forget_norm_in_rotation(config: Config) -> Config:
    reads = tuple(edited(r, norm=Norm(kind="rms", weight=None, bias=None)) for r in find(config, "residual").reads)
    return mutated(config, "residual", reads=reads)


@pytest.mark.parametrize(
    ("case", "mutate", "name"),
    [
        ("qwen2", drop_v_bias, "heads"),
        ("mixtral", drop_router, "mlp_in"),
        ("opt", drop_norm_bias, "attention_in"),
        ("gpt2", shift_v_rows, "v_o"),
        ("llama", forget_gqa, "v_o"),
        ("llama", forget_norm_in_rotation, "residual"),
    ],
)
def test_mistakes_show(case: str, mutate: Callable[[Config], Config], name: str) -> None:
    made = CASES[case]
    model = build(made.model_type, **made.sizes)
    found = figure(model, mutate(made.config(model)), name)
    print(f"{mutate.__name__} on {case}: {found:.2e}")
    assert found > 1e-3


def test_default_parameters_hide_a_forgotten_bias() -> None:
    """Why the models here are randomised: with biases at 0, as they are initialised, the same mistake is invisible."""
    model = build("qwen2", **LLAMA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert figure(model, drop_v_bias(llama_like(model, bias=True)), "heads") < 1e-13


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_found(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    check_finite("w", tensor)
    check_finite("empty", tensor[:0])
    tensor[1, 2] = value
    with pytest.raises(AutoQuantError, match="w holds a NaN or an infinity"):
        check_finite("w", tensor)
