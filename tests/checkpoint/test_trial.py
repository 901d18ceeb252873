"""Configs that are tried layer by layer, against the model in memory: the same int8 weights, the same predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import PACKAGED, STATIC, STATIC_KV, TINY, config_of, encoder_decoder, gpt2, windows
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from autoquant.checkpoint import trial
from autoquant.checkpoint.layerwise import LayerCalledAgain, Stream
from autoquant.checkpoint.quantize import load_float32
from autoquant.checkpoint.trial import Trials, WholeModel, open_trials
from autoquant.config.format import Config, RotationMethod, Rounding, SmoothingMethod, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.models.reading import read
from autoquant.pipeline.quantize import Quantized, quantize_model_
from autoquant.pipeline.select import EVERYTHING
from autoquant.pipeline.transform import prepare_
from autoquant.quantizer.linear import int8_weights
from autoquant.quantizer.strategies import kv_granularity
from autoquant.steps import silent

CPU = torch.device("cpu")


def opened(folder: Path, strategy: str = STATIC, fit: tuple[Tensor, ...] = windows()) -> Trials:
    found = open_trials(folder, Strategy(strategy), fit, CPU)
    assert found is not None
    return found


def outputs_of(trials: Trials, config: Config, batches: tuple[Tensor, ...]) -> tuple[list[Tensor], Quantized]:
    """Logits by batch."""
    found: dict[int, Tensor] = {}

    @contextmanager
    def around(model: nn.Module) -> Iterator[Callable[[int, Any], None]]:
        yield lambda number, output: found.update({number: output.logits})

    quantized = trials.run(config, batches, around, silent, "x")
    return [found[number] for number in range(len(batches))], quantized


@torch.no_grad()
def in_memory(folder: Path, strategy: str, config: Config, fit: tuple[Tensor, ...]) -> tuple[Any, Quantized]:
    model, chosen = load_float32(folder), Strategy(strategy)
    cache = kv_granularity(config, chosen) is not None
    prepared = prepare_(model, config, chosen, EVERYTHING, fit, cache=cache)
    return model, quantize_model_(model, config, chosen, prepared.swept, fit)


def with_weights(config: Config, **update: Any) -> Config:
    section = config.quantization
    return edited(config, quantization=edited(section, weights=edited(section.weights, **update)))


def prefixed(config: Config) -> Config:
    return edited(config, quantization=edited(config.quantization, prefix=(0, 5)))


def with_descent(config: Config) -> Config:
    return edited(config, smoothing=edited(config.smoothing, method=SmoothingMethod.DESCENT))


def with_online(config: Config, kind: str) -> Config:
    online = tuple(edited(one, enable=one.kind == kind) for one in config.rotation.online)
    return edited(config, rotation=edited(config.rotation, online=online))


def unrotated(config: Config) -> Config:
    return edited(config, rotation=edited(config.rotation, enable=False))


@pytest.mark.parametrize(
    ("model", "strategy", "change"),
    [
        ("packaged", STATIC, lambda config: config),
        ("packaged", STATIC_KV, unrotated),
        ("packaged", STATIC_KV, lambda config: with_weights(prefixed(config), rounding=Rounding.QRONOS)),
        ("packaged", STATIC, lambda config: with_online(config, "R4")),
        ("packaged", STATIC_KV, lambda config: with_weights(with_online(config, "R3"), rounding=Rounding.QRONOS)),
        ("packaged", STATIC, lambda config: with_weights(with_online(config, "R4"), bias_correction=True)),
        ("packaged", STATIC, lambda config: with_descent(prefixed(config))),
        ("gpt2", STATIC, lambda config: prefixed(unrotated(config))),
        ("packaged", Strategy.PER_CHANNEL_PER_TOKEN, lambda config: with_weights(config, rounding=Rounding.QRONOS)),
        ("gpt2", STATIC_KV, lambda config: with_weights(unrotated(config), bias_correction=True)),
        ("gpt2", Strategy.PER_TENSOR_STATIC, lambda config: config),
        ("bart", STATIC, lambda config: config),
        ("mixtral", STATIC, lambda config: config),
    ],
)
def test_a_layer_at_a_time_gives_what_the_model_in_memory_gives(
    model: str, strategy: str, change: Callable[[Config], Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fit = PACKAGED, windows()
    if model == "gpt2":
        folder = gpt2(tmp_path / "in")
    elif model == "bart":
        folder = encoder_decoder(tmp_path / "in", "bart")
    elif model == "mixtral":
        folder = tmp_path / "in"
        settings = AutoConfig.for_model("mixtral", **TINY, num_local_experts=3, num_experts_per_tok=2)
        AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(folder)
        fit = tuple(torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0)).split(1))
    config, held_out = change(config_of(folder)), (torch.cat(fit), fit[1])
    whole, expected = in_memory(folder, strategy, config, fit)
    made: dict[str, Tensor] = {}
    give = trial._Made.read

    def noting(self: Any, name: str) -> Tensor:
        return made.setdefault(name, give(self, name))

    monkeypatch.setattr(trial._Made, "read", noting)
    found, quantized = outputs_of(opened(folder, strategy, fit), config, held_out)
    for name, weight in int8_weights(whole).items():
        for kind, tensor in weight.named_buffers():
            plain = name.replace(".linear.", ".")  # that of a wrapper
            assert torch.equal(made[f"{plain}.{kind}"], tensor), f"{name}.{kind}"
    with torch.no_grad():
        for ids, logits in zip(held_out, found, strict=True):
            assert torch.equal(logits, read(whole, ids).logits)
    assert dict(quantized.errors) == dict(expected.errors)


def test_the_float_model_goes_through_as_it_is() -> None:
    fit, found = windows(), dict[int, Tensor]()

    @contextmanager
    def around(model: nn.Module) -> Iterator[Callable[[int, Any], None]]:
        yield lambda number, output: found.update({number: output.logits})

    told: list[tuple[str, int, int]] = []
    opened(PACKAGED).run_float(fit, around, lambda *at: told.append(at), "float")
    with torch.no_grad():
        assert torch.equal(found[1], load_float32(PACKAGED)(fit[1]).logits)
    assert told == [("float", layer, 5) for layer in range(1, 6)]


def test_what_depends_on_the_rotation_alone_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep and the largest weights; of a config with other linears, if the sweep has seen theirs."""
    config, trials, fit = config_of(PACKAGED), opened(PACKAGED), windows()
    sweeps, largest = [], []
    sweep, maxima = Stream.sweep, trial.weight_maxima_once
    monkeypatch.setattr(Stream, "sweep", lambda *at: sweeps.append(1) or sweep(*at))
    monkeypatch.setattr(trial, "weight_maxima_once", lambda *at: largest.append(1) or maxima(*at))
    first, _ = outputs_of(trials, config, fit)
    count = len(largest)
    assert (len(sweeps), count) == (1, 10), "v -> o and up -> down of five layers"
    down = "model.layers.{layer}.mlp.down_proj"
    changes = (
        edited(config, smoothing=edited(config.smoothing, alpha=0.9)),
        edited(config, quantization=edited(config.quantization, exclude=(*config.quantization.exclude, down))),
        with_weights(config, rounding=Rounding.GPTQ),
    )
    for changed in changes:
        assert not torch.equal(outputs_of(trials, changed, fit)[0][0], first[0])
        assert (len(sweeps), len(largest)) == (1, count)
    outputs_of(trials, unrotated(config), fit)
    assert len(sweeps) == 2
    assert torch.equal(outputs_of(trials, config, fit)[0][0], first[0])


def test_descent_is_done_once_for_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config, trials, fit = with_descent(config_of(PACKAGED)), opened(PACKAGED), windows()
    found, descend = [], trial.descend
    monkeypatch.setattr(trial, "descend", lambda *at: found.append(1) or descend(*at))
    for changed in (config, with_weights(config, rounding=Rounding.GPTQ)):
        outputs_of(trials, changed, fit)
        assert len(found) == 1
    down = "model.layers.{layer}.mlp.down_proj"
    for number, changed in enumerate(
        (
            with_weights(config, clip="mse"),
            unrotated(config),
            edited(config, smoothing=edited(config.smoothing, alpha=0.9)),
            edited(config, quantization=edited(config.quantization, exclude=(*config.quantization.exclude, down))),
        )
    ):
        outputs_of(trials, changed, fit)
        assert len(found) == 2 + number


def test_no_more_than_a_layer_is_there() -> None:
    there: list[list[str]] = []
    kept: list[object] = []

    @contextmanager
    def around(model: Any) -> Iterator[Callable[[int, Any], None]]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            weights = int8_weights(model)
            there.append([name for name, weight in weights.items() if not weight.values.is_meta])
            kept.extend(weight.seen for weight in weights.values() if weight.values.is_meta and weight.seen)

        for layer in model.model.layers:
            layer.register_forward_hook(look)
        yield lambda number, output: None

    opened(PACKAGED).run(config_of(PACKAGED), windows(), around, silent, "x")
    assert len(there) == 2 * 5 and kept == [], "views of what went are forgotten"
    assert all(len(names) == 7 and len({name.split(".")[2] for name in names}) == 1 for names in there)


def test_what_needs_the_whole_model_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config, trials = config_of(PACKAGED), opened(PACKAGED)
    first, *others = config.rotation.spaces
    learned = edited(config.rotation, spaces=(edited(first, method=RotationMethod.LEARNED), *others))
    with pytest.raises(WholeModel):
        outputs_of(trials, edited(config, rotation=learned), windows())

    def again(self: Any, name: str) -> Tensor:
        raise LayerCalledAgain(name)

    monkeypatch.setattr(trial._Made, "read", again)
    with pytest.raises(WholeModel):
        outputs_of(trials, config, windows())


def test_a_model_that_a_cpu_holds_with_ease_is_left_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times its size in float32; all results are the same either way."""
    size = opened(PACKAGED).weights.inventory.parameters
    for memory, layered in ((16 * size, False), (16 * size - 1, True)):
        monkeypatch.setattr(trial, "_memory", lambda memory=memory: memory)
        assert (open_trials(PACKAGED, STATIC, windows(), CPU, small_too=False) is not None) == layered


def test_a_token_that_the_model_has_not_is_refused() -> None:
    unknown = tuple(torch.zeros_like(one) + 5000 for one in windows())
    with pytest.raises(AutoQuantError, match="token 5000 is beyond the model's table"):
        outputs_of(opened(PACKAGED, fit=unknown), config_of(PACKAGED), windows())
