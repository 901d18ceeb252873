"""A learned rotation: orthogonal, folded without a trace, better on held-out windows, or not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from handmade import LLAMA, build, change, llama_like, logits
from quantized import PACKAGED, config_of, gpt2, windows
from torch import Tensor, nn

from autoquant.algorithms import spinquant
from autoquant.algorithms.spinquant import (
    RoundedProducts,
    Settings,
    cayley,
    learn_rotation,
    learn_rotations_,
    straight_through,
    turn_,
)
from autoquant.calibration.observers import sweep
from autoquant.certificate.claims import keep
from autoquant.certificate.prove import prove
from autoquant.checkpoint.apply import apply_checkpoint
from autoquant.checkpoint.quantize import Recipe, load_float32, quantize_checkpoint
from autoquant.config.format import Config, RotationMethod, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import apply_
from autoquant.executor.resolved import ResolvedSpace
from autoquant.models.source import LoadedModel
from autoquant.models.structure import structure_of
from autoquant.pipeline.quantize import Selected, needs_sweep, rotate_, select
from autoquant.pipeline.select import Transforms
from autoquant.pipeline.transform import prepare_
from autoquant.quantizer import int8
from autoquant.quantizer.linear import quantize_, set_mode_
from autoquant.quantizer.strategies import plan_linears

TOKEN, TENSOR = Strategy.PER_CHANNEL_PER_TOKEN, Strategy.PER_TENSOR_STATIC
QUICK = Settings(steps=6, windows=6, length=24, rate=1e-2)


def learned(config: Config, kind: str = "R1") -> Config:
    """The config with learned rotations of one kind of space."""
    spaces = tuple(
        edited(space, method=RotationMethod.LEARNED) if space.kind == kind else space
        for space in config.rotation.spaces
    )
    return edited(config, rotation=edited(config.rotation, spaces=spaces))


def ready(transforms: str = "rotation") -> tuple[nn.Module, Selected, ResolvedSpace]:
    """The packaged model with its Hadamard rotations, and the space that is to be learned."""
    model = load_float32(PACKAGED)
    selected = select(learned(config_of(PACKAGED)), structure_of(model), Transforms.parse(transforms))
    rotate_(model, selected, learned_later=True)
    return model, selected, next(space for space in selected.resolved.spaces if space.kind == "R1")


def random_q(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return cayley(torch.randn(size, size, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("n", [1, 2, 24, 65])
def test_cayley_is_orthogonal_and_starts_at_the_identity(n: int) -> None:
    q, eye = random_q(n), torch.eye(n, dtype=torch.float64)
    assert (q @ q.mT - eye).abs().max() < 1e-12 and torch.linalg.det(q) == pytest.approx(1)
    assert torch.equal(cayley(torch.zeros(n, n, dtype=torch.float64)), eye)


@pytest.mark.parametrize("online", [False, True])
@torch.no_grad()
def test_a_further_rotation_leaves_the_function_in_float64(online: bool) -> None:
    model = build("llama", **LLAMA)
    config = learned(llama_like(model))
    before = logits(model)
    if online:  # R4 puts a wrapper around a writer of the space
        places = tuple(edited(place, enable=place.kind == "R4") for place in config.rotation.online)
        config = edited(config, rotation=edited(config.rotation, online=places))
    selected = select(config, structure_of(model), Transforms.parse("rotation"))
    rotate_(model, selected, learned_later=True)
    space = next(space for space in selected.resolved.spaces if space.kind == "R1")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    turn_(model, space, random_q(space.size))
    assert change(before, logits(model)) < 1e-12
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])}
    assert len(moved) == 2 + 7 * 2, "the embedding, the head, and every linear of two layers"


def test_straight_through_keeps_what_int8_keeps_and_passes_gradients() -> None:
    x = torch.tensor([3.0, -1.3, 0.7], requires_grad=True)
    kept = straight_through(x, x.abs().amax())
    assert torch.equal(kept, int8.fake_quantize(x.detach(), int8.absmax_scale(x.detach(), None)))
    (gradient,) = torch.autograd.grad(kept[1:].sum(), x)
    steps = x.detach() / (3 / 127)
    of_scale = float((steps.round() - steps)[1:].sum()) / 127
    torch.testing.assert_close(gradient, torch.tensor([of_scale, 1.0, 1.0]))


@torch.no_grad()
def test_the_loss_rounds_as_the_quantizer_does() -> None:
    model, ids = load_float32(PACKAGED), torch.cat(windows())
    exact, planned = model(ids).logits, plan_linears(config_of(PACKAGED), TOKEN)
    by_identity = {id(model.get_parameter(entry.weight)): entry for entry in planned}
    with RoundedProducts(by_identity) as rounding:
        rounded = model(ids).logits
    assert rounding.seen == {entry.weight for entry in planned}
    quantize_(model, planned)
    set_mode_(model, "fake")
    error = (rounded - exact).norm()
    assert error > 1e-2 * exact.norm() and (rounded - model(ids).logits).norm() < 0.05 * error


def test_learning_lowers_the_held_out_loss_and_is_the_same_twice() -> None:
    """By a quarter where a channel of the residual stream is 20 times the others: on the trained model, which the
    Hadamard rotation leaves little to gain on, it falls or not with the last bits of a processor's products.
    """
    model, selected, space = ready()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
        model.get_parameter("model.embed_tokens.weight")[:, 0] *= 20
    planned = plan_linears(config_of(PACKAGED), TOKEN)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found, again = (learn_rotation(model, space, planned, windows(8), QUICK) for _ in range(2))
    assert torch.equal(found.q, again.q) and found.after == again.after < 0.9 * found.before
    eye = torch.eye(128, dtype=torch.float64)
    assert (found.q @ found.q.mT - eye).abs().max() < 1e-12 < 1e-4 < (found.q - eye).abs().max()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) and parameter.grad is None, "the model is as it was"

    with torch.no_grad():
        before = model(windows()[0]).logits
        steps: list[tuple[int, int]] = []
        text = learn_rotations_(
            model, selected.resolved, planned, windows(8), QUICK, lambda *at: steps.append(at)
        )  # under no_grad, as the whole pipeline is
        after = model(windows()[0]).logits
    assert steps == [(step, 6) for step in range(1, 7)]
    assert list(text) == [space.name] and text[space.name].startswith("then learned in 6 steps, loss on held-out")
    assert not torch.equal(before, after) and change(before, after) < 1e-5


@pytest.mark.parametrize("rate", [0.0, 100.0])
def test_a_rotation_that_is_no_better_is_not_used(rate: float) -> None:
    model, _, space = ready()
    found = learn_rotation(model, space, plan_linears(config_of(PACKAGED), TOKEN), windows(4), Settings(2, 2, 16, rate))
    unchanged = torch.equal(found.q, torch.eye(128, dtype=torch.float64))
    assert found.after <= found.before and unchanged == (found.after == found.before)
    assert unchanged or rate > 0


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    config, model = config_of(PACKAGED), load_float32(PACKAGED)
    with pytest.raises(AutoQuantError, match="only R1 can be learned, this is R2"):
        select(learned(config, "R2"), structure_of(model), Transforms.parse("rotation"))
    folder = gpt2(tmp_path / "gpt2")
    with pytest.raises(AutoQuantError, match="a space that a LayerNorm reads cannot be learned"):
        select(learned(config_of(folder)), structure_of(load_float32(folder)), Transforms.parse("rotation"))
    model, _, space = ready()
    planned = plan_linears(config, TOKEN)
    with pytest.raises(AutoQuantError, match="at least two calibration windows"):
        learn_rotation(model, space, planned, windows(1), QUICK)
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    down.forward = lambda x: torch.einsum("...i,oi->...o", x, down.weight)  # type: ignore[assignment, arg-type]
    with pytest.raises(AutoQuantError, match=r"layers\.1\.mlp\.down_proj\.weight: .* no plain product"):
        learn_rotation(model, space, planned, windows(4), QUICK)


def test_rotation_method_learned_is_for_the_residual_only() -> None:
    config = config_of(PACKAGED)
    rotation = edited(config.rotation, method=RotationMethod.LEARNED)
    config = edited(config, rotation=rotation)
    selected = select(config, structure_of(load_float32(PACKAGED)), Transforms.parse("rotation"))
    methods = {space.kind: space.method for space in selected.resolved.spaces}
    assert methods == {"R1": RotationMethod.LEARNED, "R2": RotationMethod.HADAMARD}


def test_whatever_sees_no_text_or_no_whole_model_refuses(tmp_path: Path) -> None:
    config, model = learned(config_of(PACKAGED)), load_float32(PACKAGED)
    message = "its rotation is learned from calibration text with the whole model in memory"
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(AutoQuantError, match=message):
        apply_(model, config, smooth="none")
    with pytest.raises(AutoQuantError, match=message):
        rotate_(model, select(config, structure_of(model), Transforms.parse("rotation")))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(AutoQuantError, match=message):
        apply_checkpoint(PACKAGED, config, tmp_path / "out", smooth="none")
    recipe = Recipe(config, TOKEN, Transforms.parse("rotation"), windows())
    with pytest.raises(AutoQuantError, match=message):
        quantize_checkpoint(PACKAGED, tmp_path / "out", recipe, {}, low_memory=True)
    assert not (tmp_path / "out").exists()


def test_the_pipeline_learns_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinquant, "DEFAULT", QUICK)
    config = learned(config_of(PACKAGED))
    quantization = edited(config.quantization, prefix=(0,))
    config = edited(config, quantization=quantization)
    model, plain = load_float32(PACKAGED), load_float32(PACKAGED)
    ids = windows()[0]
    prepared = prepare_(model, config, TENSOR, Transforms.parse("fc_fc:0.5+rotation"), windows(8), cache=True)
    (text,) = (text for text in prepared.plan.constructions.values() if "learned" in text)
    assert text.startswith("random signs x Sylvester 128, then learned in 6 steps, loss on held-out windows")
    with torch.no_grad():
        assert change(plain(ids).logits, model(ids).logits) < 1e-4
        again = sweep(model, prepared.swept.inputs, windows(8), cache=True)
    for name, maximum in again.inputs.items():
        torch.testing.assert_close(prepared.swept.inputs[name], maximum, rtol=1e-3, atol=1e-5)
    with pytest.raises(AutoQuantError, match="at least two calibration windows"):
        prepare_(load_float32(PACKAGED), config, TENSOR, Transforms.parse("rotation"), (), cache=True)


def test_calibration_is_needed_even_where_everything_is_dynamic() -> None:
    config = config_of(PACKAGED)
    for chosen, needed in ((config, False), (learned(config), True)):
        selected = select(chosen, structure_of(load_float32(PACKAGED)), Transforms.parse("rotation"))
        assert needs_sweep(chosen, TOKEN, selected) is needed


@torch.no_grad()
def test_a_learned_space_is_proved_by_a_random_rotation() -> None:
    model = build("llama", **LLAMA)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    loaded = LoadedModel(model, (ids,), {"use_cache": False})
    trials = prove(loaded, keep(learned(llama_like(model)), [("residual", "R1")])).trials
    assert [trial.name for trial in trials] == ["residual", "all"] and all(trial.change < 1e-12 for trial in trials)
