from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from autoquant.analyzer.analyze import Analyzed, analyze
from autoquant.capture.routes import Captured
from autoquant.certificate.certify import _analysed, certify, small_config
from autoquant.certificate.claims import claims, digest_of, keep, refused_claims
from autoquant.certificate.match import match
from autoquant.certificate.prove import TOLERANCE, changed, logits, placeable, prove
from autoquant.certificate.runs import departure, refer
from autoquant.cli.main import main
from autoquant.config.file import load_config
from autoquant.config.format import Config, Slot, Smoothing, edited
from autoquant.errors import AutoQuantError
from autoquant.models.reduce import float64_throughout, small
from autoquant.models.repair import find_source
from autoquant.models.source import LoadedModel, ModelSource

KINDS = ["norm_linear", "query_key", "linear_linear", "R1", "R2", "R3", "R4", "all"]


def mutations() -> Any:
    """The script benchmarks/mistakes.py as a module."""
    if "mistakes" not in sys.modules:
        path = Path(__file__).parents[2] / "benchmarks" / "mistakes.py"
        spec = importlib.util.spec_from_file_location("mistakes", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["mistakes"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules["mistakes"]


@cache
def analyzed(model: str) -> tuple[ModelSource, Analyzed]:
    source = find_source(model, layers=2)
    return source, analyze(source)


@cache
def proved(model: str) -> tuple[LoadedModel, Config]:
    source = find_source(model, layers=2)
    loaded = small(source)
    return loaded, small_config(source, loaded)


def with_groups(config: Config, **changes: Any) -> Config:
    """The config with fields of its first smoothing group replaced."""
    first, *rest = config.smoothing.groups
    groups = (edited(first, **changes), *rest)
    return edited(config, smoothing=edited(config.smoothing, groups=groups))


def forgetful(config: Config) -> Config:
    """One reader of the first norm is left out."""
    return with_groups(config, targets=config.smoothing.groups[0].targets[1:])


def test_a_right_config_gets_its_certificate() -> None:
    source, found = analyzed("llama")
    config = certify(found, source)
    assert config.certificate is not None
    assert (config.certificate.proved, config.certificate.dtype, config.certificate.seed) == (True, "float64", 0)
    assert [row.kind for row in config.certificate.rows] == KINDS
    assert [row.count for row in config.certificate.rows] == [3, 1, 2, 1, 1, 1, 1, 1]
    assert all(0 < row.worst < 1e-13 for row in config.certificate.rows)
    coverage = config.certificate.coverage
    assert coverage is not None
    assert coverage.lengths == (1, 8, 12, 14, 64)
    assert (coverage.padding, coverage.offset, coverage.decode, coverage.experts) == (True, True, True, 0)
    assert config.certificate.digest == digest_of(found.config)
    assert edited(config, certificate=None) == found.config
    assert certify(found, source) == config


@pytest.mark.parametrize("mutation", mutations().MUTATIONS, ids=lambda mutation: mutation.title)
def test_a_mistake_is_caught(mutation: Any) -> None:
    right, wrong, default = mutations().figures(mutation)
    print(f"{mutation.title} ({mutation.model}): right {right:.1e}, wrong {wrong:.1e}, wrong by default {default:.1e}")
    assert right < 1e-13
    assert wrong > 1e-2


def test_a_default_initialised_model_is_blind() -> None:
    """Why the small model is randomised: gains of 1 and biases of 0 hide these."""
    hidden = [m.title for m in mutations().MUTATIONS if mutations().figures(m)[2] <= TOLERANCE]
    assert hidden == [
        "forget the v bias in R2",
        "forget the LayerNorm biases in R1",
        "forget a LayerNorm bias in smoothing",
        "leave the embeddings tied",
    ]


def analysed_wrongly(source: ModelSource, loaded: LoadedModel) -> tuple[Config, Captured]:
    """An analyzer that forgets a target in the small model too: only the figure can tell."""
    config, captured = _analysed(source, loaded)
    return forgetful(config), captured


def test_a_wrong_claim_is_left_out_by_name_and_the_rest_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = analyzed("llama")
    monkeypatch.setattr("autoquant.certificate.certify._analysed", analysed_wrongly)
    name = found.config.smoothing.groups[0].name
    config = certify(replace(found, config=forgetful(found.config)), source)
    assert list(claims(config)) == [claim for claim in claims(found.config) if claim[0] != name]
    (blocked,) = refused_claims(config)
    assert blocked.reason.startswith(
        f"claimed by the analysis, refused by the proof ('{name}' changes the logits of the small model by "
    )
    assert blocked.reason.endswith("): please report")
    assert (blocked.path, blocked.what) == ("model.layers.{layer}.self_attn.k_proj", "smoothing")
    assert config.certificate is not None and config.certificate.proved
    assert config.certificate.digest == digest_of(config)
    assert all(row.worst < 1e-13 for row in config.certificate.rows)


def test_a_model_none_of_whose_claims_hold_gets_no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = analyzed("llama")
    only = forgetful(keep(found.config, list(claims(found.config))[:1]))
    monkeypatch.setattr("autoquant.certificate.certify._analysed", analysed_wrongly)
    with pytest.raises(AutoQuantError, match="no claim holds, nothing is written"):
        certify(replace(found, config=only), source)


def test_a_deeper_small_model_is_tried_where_one_layer_of_a_kind_is_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = analyzed("llama")
    tried: list[int] = []

    def counted(source: ModelSource, seed: int, *, each: int = 1) -> LoadedModel:
        tried.append(each)
        return small(source, seed, each=each)

    def wrong_at_first(source: ModelSource, loaded: LoadedModel) -> tuple[Config, Captured]:
        config, captured = _analysed(source, loaded)
        return forgetful(config) if tried[-1] < enough else config, captured

    monkeypatch.setattr("autoquant.certificate.certify.small", counted)
    monkeypatch.setattr("autoquant.certificate.certify._analysed", wrong_at_first)
    enough = 2
    assert certify(found, source).certificate is not None
    assert tried == [1, 2]
    enough = 3
    (blocked,) = refused_claims(certify(found, source))
    assert "with other members than in the small one: it cannot be proved" in blocked.reason
    assert tried == [1, 2, 1, 2]


def test_the_command_leaves_out_what_is_not_proved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, found = analyzed("llama")
    wrong = forgetful(found.config)
    monkeypatch.setattr("autoquant.analyzer.analyze.analyze", lambda *_, **__: replace(found, config=wrong))
    monkeypatch.setattr("autoquant.certificate.certify._analysed", analysed_wrongly)
    target = tmp_path / "c.json"
    result = CliRunner().invoke(main, ["analyze", "llama", "--layers", "2", "-o", str(target)])
    assert result.exit_code == 3
    name = found.config.smoothing.groups[0].name
    assert f"refused by the proof ('{name}' changes the logits" in result.stderr
    written = load_config(target)
    assert name not in [claim for claim, _ in claims(written)]
    assert len(refused_claims(written)) == 1
    unproved = CliRunner().invoke(
        main, ["analyze", "llama", "--layers", "2", "-o", str(target), "--no-verify", "--force"]
    )
    assert unproved.exit_code == 0
    assert json.loads(target.read_text(encoding="utf-8"))["certificate"]["proved"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "'other' is found in the full-size model but not in the small one"),
        ({"sources": None}, "is found in the full-size model with other members than in the small one"),
    ],
)
def test_a_claim_that_the_small_model_does_not_make_is_left_out(changes: dict[str, Any], message: str) -> None:
    source, found = analyzed("llama")
    if "sources" in changes:
        changes = {"sources": found.config.smoothing.groups[1].sources}
    (blocked,) = refused_claims(certify(replace(found, config=with_groups(found.config, **changes)), source))
    name = changes.get("name", found.config.smoothing.groups[0].name)
    assert f"('{name}' " in blocked.reason
    assert message.partition("' ")[2] in blocked.reason


def test_a_claim_that_only_the_small_model_makes_is_not_written() -> None:
    source, found = analyzed("llama")
    rest = keep(found.config, list(claims(found.config))[1:])
    config = certify(replace(found, config=rest), source)
    assert list(claims(config)) == list(claims(rest))
    assert refused_claims(config) == ()


def refusals(large: Config, small: Config, held: tuple[str, ...] | list[str] = ()) -> list[str]:
    return list(match(large, small, held, aligned=False).refused.values())


def two_claims(one: Config, other: Config) -> Smoothing:
    groups = (*one.smoothing.groups, *other.smoothing.groups)
    return edited(one.smoothing, groups=groups)


def test_the_number_of_a_last_layer_does_not_count() -> None:
    """The last norm of a deep model is another layer's than that of a shallow one."""
    _, found = analyzed("llama")
    first = found.config.smoothing.groups[0]

    def last(number: int, *others: int) -> Config:
        sources = tuple(Slot(path=f"norms.{n}.weight", dim=0, size=8) for n in (number, *others))
        name = f"norms.{number} -> proj"
        return keep(with_groups(found.config, name=name, layers=None, sources=sources), [(name, first.kind.value)])

    assert refusals(last(11), last(1)) == []
    assert refusals(last(11, 12, 13), last(1, 2)) == []
    heads = edited(last(1), smoothing=two_claims(last(1), last(2)))
    assert refusals(heads, heads) == []
    assert re.search(
        r"'norms\.{layer} -> proj' is found in the full-size model but not in", refusals(heads, last(1))[0]
    )  # a number that both have is no other layer's
    assert re.search(
        r"'norms\.{layer} -> proj \(across layers\)' is found in the full-size", refusals(last(11, 12), last(1))[0]
    )  # what several layers share is not proved by one


def test_a_further_part_of_a_layer_is_like_those_that_the_small_model_has() -> None:
    """Of adapters or experts that are modules of their own the small model has the first ones only."""
    _, found = analyzed("llama")
    first = found.config.smoothing.groups[0]

    def adapters(*numbers: int, **changes: Any) -> Config:
        made = []
        for number in numbers:
            source = Slot(path=f"layers.{{layer}}.adapters.{number}.a.weight", dim=0, size=8)
            name = f"layers.{{layer}}.adapters.{number}.a -> b"
            made.append(edited(first, **{"name": name, "layers": None, "sources": (source,), **changes}))
        smoothing = edited(found.config.smoothing, groups=tuple(made))
        return edited(keep(found.config, []), smoothing=smoothing)

    assert (
        refusals(
            adapters(0, 1, 2, 3), adapters(0, 1), [f"layers.{i}.adapters.{j}.a.weight" for i in (0, 1) for j in (0, 1)]
        )
        == []
    )
    missing = r"'layers\.{layer}\.adapters\.{layer}\.a -> b' is found in the full-size model but not in"
    assert re.search(
        missing, refusals(adapters(0, 1, 2), adapters(0, 1), [f"layers.0.adapters.{j}.a.weight" for j in (0, 1, 2)])[0]
    )  # a part that the small model has, and says nothing of
    assert re.search(missing, refusals(adapters(0, 1, 2), adapters(0, 1))[0])  # nothing is known of what it has
    other = adapters(2, targets=(Slot(path="layers.{layer}.adapters.2.c.weight", dim=1, size=8),))
    both = edited(other, smoothing=two_claims(adapters(0, 1), other))
    assert re.search(
        missing, refusals(both, adapters(0, 1), ["layers.0.adapters.0.a.weight", "layers.0.adapters.1.a.weight"])[0]
    )  # one that is not like those


def test_a_graph_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = analyzed("llama")
    monkeypatch.setattr("autoquant.certificate.certify.check_against_eager", lambda *_: 0.5)
    with pytest.raises(AutoQuantError, match=r"the captured graph differs from the model by 0\.5"):
        certify(found, source)


def test_a_nan_is_not_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = analyzed("llama")
    monkeypatch.setattr("autoquant.certificate.prove.changed", lambda *_, **__: float("nan"))
    with pytest.raises(AutoQuantError, match="changes the logits of the small model by nan"):
        certify(found, source)


def test_a_group_and_a_space_of_one_name_are_tried_apart() -> None:
    loaded, config = proved("llama")
    (space,) = [space for space in config.rotation.spaces if space.kind == "R2"]
    (group,) = [group for group in config.smoothing.groups if group.name == space.name]
    for name, kind, kept in ((group.name, group.kind.value, (1, 0)), (space.name, space.kind, (0, 1))):
        alone = keep(config, [(name, kind)])
        assert (len(alone.smoothing.groups), len(alone.rotation.spaces)) == kept
        assert alone.rotation.online == ()
    trials = {(trial.name, trial.kind): trial.change for trial in prove(loaded, config).trials}
    assert list(trials) == [*claims(config), ("all", "all")]
    assert trials[group.name, group.kind.value] != trials[space.name, space.kind]


def test_the_model_is_left_as_it_was() -> None:
    loaded, config = proved("mistral")
    before = {name: parameter.clone() for name, parameter in loaded.module.named_parameters()}
    modules = [name for name, _ in loaded.module.named_modules()]
    prove(loaded, config)
    after = dict(loaded.module.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in loaded.module.named_modules()] == modules


def test_copies_share_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, config = proved("llama")
    (space,) = [space for space in config.rotation.spaces if space.kind == "R2"]
    copies: list[nn.Module] = []

    def kept(module: nn.Module, *given: Any) -> float:
        copies.append(module)
        return departure(module, *given)

    monkeypatch.setattr("autoquant.certificate.prove.departure", kept)
    with float64_throughout():
        changed(loaded, refer(loaded), keep(config, [(space.name, "R2")]), 0)
    originals = dict(loaded.module.named_parameters())
    own = {n.rpartition("layers.")[2][2:] for n, p in copies[0].named_parameters() if p is not originals[n]}
    assert own == {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}


def test_a_weight_that_is_not_finite_is_named() -> None:
    loaded = small(find_source("llama", layers=2))
    config = proved("llama")[1]
    with torch.no_grad():
        loaded.module.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = float("nan")
    with pytest.raises(AutoQuantError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds a NaN or an infinity"):
        prove(loaded, config)


def test_online_rotations_that_cannot_be_placed_are_left_out() -> None:
    loaded, config = proved("falcon")
    paths = [online.path for online in config.rotation.online if online.kind == "R3"]
    kept, refused = placeable(loaded.module, config)
    assert list(refused) == paths
    assert "attention interface" in refused[paths[0]]
    assert [online.kind for online in kept.rotation.online] == ["R4"]


def test_refused_online_rotations_are_listed_as_blocked() -> None:
    source, found = analyzed("falcon")
    config = certify(found, source)
    (path,) = [online.path for online in found.config.rotation.online if online.kind == "R3"]
    assert [online.path for online in config.rotation.online if online.kind == "R3"] == []
    assert [(b.what, b.operator) for b in config.blocked if b.path == path and b not in found.config.blocked] == [
        ("rotation", "R3")
    ]


def test_a_model_without_tensors_to_compare_is_refused() -> None:
    class Silent(nn.Module):
        def forward(self) -> None:
            return None

    with pytest.raises(AutoQuantError, match="Silent returns no tensor to compare"):
        logits(Silent(), LoadedModel(Silent(), ()))


class CutOtherwise(nn.Module):
    """Rounds otherwise where it is traced: in float32, by some hundredths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).to(torch.float32)
        if torch.compiler.is_compiling():
            y = (y + 1e6) - 1e6
        return self.b(y.to(self.b.weight.dtype))


def test_a_graph_that_rounds_otherwise_is_compared_in_float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    module = CutOtherwise().double().eval()
    loaded = LoadedModel(module, (torch.randn(2, 3, 8, dtype=torch.float64),))
    source = ModelSource("cut", factory=lambda: None)
    config = small_config(source, loaded)
    assert [linear.path for linear in config.model.linears] == ["a", "b"]
    monkeypatch.setattr("autoquant.certificate.certify.runs_in_float64", lambda loaded: False)
    with pytest.raises(AutoQuantError, match=r"the captured graph differs from the model by 0\.\d"):
        small_config(source, loaded)


class CutOtherwiseByKnownNumbers(CutOtherwise):
    """And multiplies by what it computes, in float32, of an input whose values are known: to a trace a constant."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        assert ids is not None
        return super().forward(x) * ((1e6 + ids.to(torch.float32) / 3) - 1e6)[:, None]


def test_a_constant_that_was_computed_in_float32_is_made_again_in_float64() -> None:
    module = CutOtherwiseByKnownNumbers().double().eval()
    kwargs = {"x": torch.randn(2, 3, 8, dtype=torch.float64), "ids": torch.arange(3)}
    config = small_config(ModelSource("cut", factory=lambda: None), LoadedModel(module, (), kwargs, known=("ids",)))
    assert [linear.path for linear in config.model.linears] == ["a", "b"]
    assert "forward" not in vars(module)
