from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantized import PACKAGED, STATIC, config_of, search_task
from torch import nn

from autoquant.checkpoint.targets import readers
from autoquant.checkpoint.trial import open_trials
from autoquant.config.format import Strategy, edited
from autoquant.quantizer.strategies import Granularity, plan_linears
from autoquant.searcher.candidates.knobs import KNOBS
from autoquant.searcher.judge import Distance, Judged, Searcher, Served


@pytest.mark.parametrize(
    ("name", "strategy", "expected"),
    [
        ("clip", STATIC, ["output", "mse", "percentile"]),
        ("clip", Strategy.PER_CHANNEL_PER_TOKEN, []),
        ("rotation", STATIC, ["false", "false", "1", "2", "3"]),
        ("online", STATIC, ["true"]),
        ("descent", STATIC, ["descent"]),
        ("learned", STATIC, ["learned"]),
        ("cache", STATIC, []),
        ("cache", Strategy.PER_CHANNEL_STATIC_KV, ["true", "true"]),
        ("bias", STATIC, ["true"]),
        ("spikes", STATIC, []),
        ("float", STATIC, []),
    ],
)
def test_candidates_of_each_knob(name: str, strategy: Strategy, expected: list[str]) -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(search_task(strategy=strategy), held_out=()), lambda line: None)
    judged = Judged(config, (), (), ())
    found = list(KNOBS[name](searcher, judged))
    assert [candidate.choice for candidate in found] == expected
    assert all(candidate.config != config for candidate in found)


DOWN = "model.layers.{layer}.mlp.down_proj"
SERVED = Served(lambda config: (), readers(config_of(PACKAGED)))


def test_spikes_go_to_the_linears_whose_largest_token_stands_out_most() -> None:
    """BOS is the packaged model's sink: the input of layer 0's down projection reaches 1,600 times its median."""
    config = config_of(PACKAGED)
    searcher = Searcher(replace(search_task(per_token=2), held_out=()), lambda line: None)
    one, two = KNOBS["spikes"](searcher, Judged(config, (), (), ()))
    for candidate, layers in ((one, "0"), (two, "0,4")):
        (override,) = candidate.config.quantization.overrides
        assert (override.path, override.layers) == (DOWN, layers), "as a config file has it"
        assert override.strategy is Strategy.PER_CHANNEL_PER_TOKEN
    assert two.choice == f"{DOWN.format(layer=0)}, {DOWN.format(layer=4)}"
    assert "2 linears" in two.cost


def test_a_layer_at_a_time_the_same_settings_are_thought_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix, spikes and alphas, of a model without and behind a prefix."""
    config, task = config_of(PACKAGED), replace(search_task(per_token=2), held_out=())
    behind = edited(config, quantization=edited(config.quantization, prefix=(0,)))
    trials = open_trials(PACKAGED, STATIC, task.fit, torch.device("cpu"))
    whole, layered = (Searcher(one, lambda line: None) for one in (task, replace(task, trials=trials)))
    monkeypatch.setattr(layered, "task", replace(layered.task, load=lambda: pytest.fail("the model is loaded")))
    for best in (Judged(config, (), (), ()), Judged(behind, (), (), ())):
        for name in ("prefix", "spikes", "alpha"):
            found = list(KNOBS[name](whole, best))
            assert list(KNOBS[name](layered, best)) == found
            assert found or (name, best.config) == ("prefix", behind)


def test_spikes_take_whole_modules_of_the_server_or_none() -> None:
    config = config_of(PACKAGED)
    section = edited(config.quantization, exclude=(*config.quantization.exclude, DOWN))
    searcher = Searcher(replace(search_task(per_token=35), held_out=(), served=SERVED), lambda line: None)
    *_, most = KNOBS["spikes"](searcher, Judged(edited(config, quantization=section), (), (), ()))
    assert {entry.layers for entry in most.config.quantization.overrides} == {None}
    paths = most.choice.split(", ")
    assert len(paths) == 30, "all that is left"
    for weights in SERVED.alike:
        at = [paths.index(weight.removesuffix(".weight")) for weight in weights]
        assert max(at) - min(at) == len(at) - 1, "side by side"
    few = Searcher(replace(search_task(per_token=1), held_out=(), served=SERVED), lambda line: None)
    (only,) = KNOBS["spikes"](few, Judged(edited(config, quantization=section), (), (), ()))
    assert [entry.path.rpartition(".")[2] for entry in only.config.quantization.overrides] == ["o_proj"]


def test_linears_whose_int8_costs_most_stay_in_float() -> None:
    """Layer 0's down projection, with its spikes; then no module of a server that is more than are left."""
    searcher = Searcher(replace(search_task(), in_float=2, served=SERVED), lambda line: None)
    config = config_of(PACKAGED)
    one, *more = KNOBS["float"](searcher, Judged(config, (), (), ()))
    assert one.choice == f"float: {DOWN.format(layer=0)}"
    assert one.cost == "1 linears in floating point, 4.9% of the weights"
    (override,) = one.config.quantization.overrides
    assert (override.path, override.layers, override.strategy) == (DOWN, "0", None)
    assert DOWN.format(layer=0) not in {entry.path for entry in plan_linears(one.config, STATIC)}
    assert searcher.judge(one.config).divergence < searcher.judge(config).divergence
    assert all(len(candidate.choice.split(", ")) == 2 for candidate in more), "q, k and v are three"


def test_a_part_of_the_windows_ranks_and_all_of_them_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    task = search_task()
    searcher = Searcher(replace(task, in_float=1, held_out=task.held_out * 3), lambda line: None)
    seen: list[int] = []
    compared = Searcher.compared

    def counting(self: Searcher, model: nn.Module, batches: int | None = None) -> Distance:
        found = compared(self, model, batches)
        seen.append(len(found.kl))
        return found

    monkeypatch.setattr(Searcher, "compared", counting)
    one, *_ = KNOBS["float"](searcher, Judged(config_of(PACKAGED), (), (), ()))
    assert seen == [3] * 35, "seven linears in each of five layers"
    searcher.judge(one.config)
    assert seen[35:] == [9]


def test_output_scales_leave_out_linears_that_share_one() -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(search_task(), held_out=(), served=SERVED), lambda line: None)
    output, *_ = KNOBS["clip"](searcher, Judged(config, (), (), ()))
    clips = {
        one.path.removeprefix("model.layers.3."): one.activations.clip.value
        for one in plan_linears(output.config, STATIC)
        if ".3." in one.path
    }
    assert clips == {
        **{f"self_attn.{name}_proj": "mse" for name in "qkv"},
        **{f"mlp.{name}_proj": "mse" for name in ("gate", "up")},
        **{name: "output" for name in ("self_attn.o_proj", "mlp.down_proj")},
    }


def test_biases_are_corrected_where_there_are_some() -> None:
    config = config_of(PACKAGED)
    linears = tuple(
        edited(one, bias=f"{one.path}.bias") if "q_proj" in one.path else one for one in config.model.linears
    )
    biased = edited(config, model=edited(config.model, linears=linears))
    searcher = Searcher(replace(search_task(), held_out=(), served=SERVED), lambda line: None)
    _, some = KNOBS["bias"](searcher, Judged(biased, (), (), ()))
    corrected = {one.path for one in plan_linears(some.config, STATIC) if one.weights.bias_correction}
    assert corrected == {f"model.layers.{layer}.self_attn.q_proj" for layer in range(5)}
    assert {one.scheme.activation for one in plan_linears(some.config, STATIC)} == {Granularity.TENSOR_STATIC}


def test_alphas_of_groups_and_layers_are_overrides() -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(search_task(), held_out=()), lambda line: None)
    *uniform, each = KNOBS["alpha"](searcher, Judged(config, (), (), ()))
    assert [candidate.choice for candidate in uniform] == ["0.3", "0.4", "0.6", "0.7", "0.8", "0.9"]
    overrides = {group.name: group.overrides for group in each.config.smoothing.groups if group.overrides}
    assert {name.rpartition(".")[2] for name in overrides} == {"v_proj -> o_proj", "up_proj -> down_proj"}
    assert all([entry.layers for entry in entries] == list("01234") for entries in overrides.values())
    alphas = [entry.alpha for entries in overrides.values() for entry in entries]
    assert all(alpha is not None and 0 <= alpha <= 1 for alpha in alphas)
