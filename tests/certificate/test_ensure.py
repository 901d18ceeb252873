from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from autoquant.analyzer.analyze import analyze
from autoquant.certificate.certify import certify
from autoquant.certificate.claims import ProofNote, as_proved, digest_of, standing
from autoquant.certificate.ensure import ensure_proved
from autoquant.config.file import config_text
from autoquant.config.format import Config, RotationMethod, SmoothingKind, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.models.repair import find_source
from autoquant.models.settings import settings_digest, settings_digests
from autoquant.models.source import ModelSource, build_structure
from autoquant.models.structure import structure_of


@cache
def proved() -> tuple[ModelSource, Config]:
    source = find_source("llama", layers=2)
    return source, certify(analyze(source), source)


def first(config: Config, section: str, field: str, **changes: Any) -> Config:
    """The config with the first entry of ``section.field`` changed."""
    held = getattr(config, section)
    entry, *rest = getattr(held, field)
    return edited(config, **{section: edited(held, **{field: (edited(entry, **changes), *rest)})})


def knobs(config: Config) -> dict[str, Config]:
    override = {"path": config.model.linears[0].path, "strategy": Strategy.PER_TENSOR_STATIC}
    return {
        "smoothing.enable": edited(config, smoothing=edited(config.smoothing, enable=False)),
        "smoothing.alpha": edited(config, smoothing=edited(config.smoothing, alpha=0.9)),
        "group.enable": first(config, "smoothing", "groups", enable=False),
        "group.alpha": first(config, "smoothing", "groups", alpha=0.3),
        "group.overrides": first(config, "smoothing", "groups", overrides=({"layers": "1", "enable": False},)),
        "group.name": first(config, "smoothing", "groups", name="another"),
        "rotation.method": edited(config, rotation=edited(config.rotation, method=RotationMethod.ORTHOGONAL)),
        "rotation.seed": edited(config, rotation=edited(config.rotation, seed=7)),
        "space.enable": first(config, "rotation", "spaces", enable=False),
        "space.seed": first(config, "rotation", "spaces", seed=3),
        "online.enable": first(config, "rotation", "online", enable=True),
        "linear.role": first(config, "model", "linears", role="router"),
        "strategy": edited(config, quantization=edited(config.quantization, strategy=Strategy.PER_TENSOR_STATIC)),
        "exclude": edited(config, quantization=edited(config.quantization, exclude=())),
        "quantization.overrides": edited(config, quantization=edited(config.quantization, overrides=(override,))),
    }


def edits(config: Config) -> dict[str, Config]:
    group, space, online = config.smoothing.groups[0], config.rotation.spaces[0], config.rotation.online[0]
    source = group.sources[0]
    return {
        "group.targets": first(config, "smoothing", "groups", targets=group.targets[1:]),
        "group.kind": first(config, "smoothing", "groups", kind=SmoothingKind.LINEAR_LINEAR),
        "source.power": first(config, "smoothing", "groups", sources=(edited(source, power=2),)),
        "source.offset": first(config, "smoothing", "groups", sources=(edited(source, offset=1),)),
        "space.writers": first(config, "rotation", "spaces", writers=space.writers[1:]),
        "space.reads": first(config, "rotation", "spaces", reads=space.reads[1:]),
        "space.centre": first(config, "rotation", "spaces", centre=not space.centre),
        "online.size": first(config, "rotation", "online", size=online.size // 2),
        "linear.in_dim": first(config, "model", "linears", in_dim=0),
        "linear.weight": first(config, "model", "linears", weight="model.layers.{layer}.mlp.up_proj.weight"),
    }


def test_a_knob_is_no_claim() -> None:
    source, config = proved()
    assert standing(config) == "proved"
    for what, other in knobs(config).items():
        assert digest_of(other) == digest_of(config), what
        note = ensure_proved(other, lambda: source, "llama")
        assert (note.proved, note.how) == (True, "by the certificate of the config")


def test_a_wrong_edit_is_refused() -> None:
    source, config = proved()
    for what, other in edits(config).items():
        assert digest_of(other) != digest_of(config), what
        assert standing(other) == "edited"
        with pytest.raises(AutoQuantError, match=r"edited since.*claims what the model does not.*--unproved"):
            ensure_proved(other, lambda: source, "llama")
        note = ensure_proved(other, lambda: source, "llama", unproved=True)
        assert (note.proved, note.how) == (False, "unproved, as asked for: the config is edited since it was proved")


def clipping(bound: float | None) -> ModelSource:
    """A model of one structure, whose queries, keys and values are clamped or not."""
    source = find_source("olmo", layers=2)
    source.config.clip_qkv = bound
    return source


def test_a_model_of_other_settings_is_proved_again() -> None:
    """Its parameters are the same, and its forward is not."""
    source, other = clipping(None), clipping(8.0)
    config = certify(analyze(source), source)
    assert structure_of(build_structure(other)).fingerprint == config.provenance.fingerprint
    assert config.certificate is not None
    assert config.certificate.settings == settings_digest(source.config) != settings_digest(other.config)
    note = ensure_proved(config, lambda: source, "olmo", settings=settings_digests(source.config))
    assert (note.how, as_proved(config, note)) == ("by the certificate of the config", config)
    clamped = settings_digests(other.config)
    with pytest.raises(AutoQuantError, match=r"proved for a model of other settings, and .* is no smoothing group of"):
        ensure_proved(config, lambda: other, "olmo", settings=clamped)
    assert ensure_proved(config, lambda: other, "olmo").how == "by the certificate of the config"  # nothing is known


def test_an_earlier_form_of_the_settings_counts_where_the_types_were_compared() -> None:
    """It has no type: a config of a class by its name is proved again, since nothing else tells another type apart."""
    source, config = proved()
    digests = settings_digests(source.config)
    assert config.certificate is not None
    assert config.certificate.settings == digests[0] != digests[1]
    earlier = edited(config, certificate=edited(config.certificate, settings=digests[1]))
    note = ensure_proved(earlier, lambda: source, "llama", settings=digests)
    assert note.how == "by the certificate of the config"
    by_class = edited(earlier, provenance=edited(config.provenance, model="LlamaForCausalLM"))
    again = ensure_proved(by_class, lambda: source, "llama", settings=digests)
    assert again.how == "proved now: the config is proved for a model of other settings"


def test_a_config_without_settings_is_one_of_the_default_ones() -> None:
    source, config = proved()
    assert config.certificate is not None
    older = edited(config, certificate=edited(config.certificate, settings=None))
    assert '"settings"' not in config_text(older)
    assert '"settings"' in config_text(config)
    by_default = settings_digests(find_source("llama").config)
    assert ensure_proved(older, lambda: source, "llama", settings=by_default).how == "by the certificate of the config"
    note = ensure_proved(older, lambda: source, "llama", settings=settings_digests(source.config))
    assert note.how == "proved now: the config is proved for a model of other settings"
    assert as_proved(older, note).certificate == config.certificate


def test_what_is_written_carries_the_certificate_of_its_own_claims() -> None:
    source, config = proved()
    fewer = edited(config, smoothing=edited(config.smoothing, groups=config.smoothing.groups[1:]))
    written = as_proved(fewer, ensure_proved(fewer, lambda: source, "llama"))
    assert standing(written) == "proved"
    assert written.certificate is not None
    assert config.certificate is not None
    assert sum(row.count for row in written.certificate.rows) == sum(row.count for row in config.certificate.rows) - 1
    unproved = as_proved(fewer, ensure_proved(fewer, lambda: source, "llama", unproved=True))
    assert (standing(unproved), standing(as_proved(fewer, None))) == ("unproved", "unproved")
    assert (as_proved(config, None), as_proved(config, ProofNote(True, ""))) == (config, config)
    bare = edited(config, certificate=None)
    assert as_proved(bare, None) == bare


def test_fewer_claims_and_fewer_layers_are_proved_again() -> None:
    source, config = proved()
    fewer = edited(config, smoothing=edited(config.smoothing, groups=config.smoothing.groups[1:]))
    fewer = first(fewer, "smoothing", "groups", layers="1")
    assert standing(fewer) == "edited"
    note = ensure_proved(fewer, lambda: source, "llama")
    assert (note.proved, note.how) == (True, "proved now: the config is edited since it was proved")


def test_a_proof_of_an_earlier_version_is_not_known_to_hold() -> None:
    _, config = proved()
    assert config.certificate is not None
    assert standing(edited(config, certificate=edited(config.certificate, digest=None))) == "unknown"
    assert standing(edited(config, certificate=edited(config.certificate, proved=False))) == "unproved"
    assert standing(edited(config, certificate=None)) == "unproved"


def test_other_names_and_another_order_are_no_other_claims() -> None:
    source, config = proved()
    group = config.smoothing.groups[0]
    named = first(config, "smoothing", "groups", name="mine", targets=group.targets[::-1])
    named = edited(named, smoothing=edited(named.smoothing, groups=named.smoothing.groups[:1]))
    note = ensure_proved(named, lambda: source, "llama")
    assert (standing(named), note.proved) == ("edited", True)
    twice = edited(named, smoothing=edited(named.smoothing, groups=(*config.smoothing.groups[:1], group)))
    twice = first(twice, "smoothing", "groups", name="mine")
    with pytest.raises(AutoQuantError, match=r"'mine' and 'model.* claim the same; keep one"):
        ensure_proved(twice, lambda: source, "llama")


def test_the_proof_of_another_type_is_none_of_this_one() -> None:
    """Llama and Gemma have the same parameters, and other gains."""
    source, config = proved()
    other = find_source("gemma", layers=2)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        setattr(other.config, name, getattr(source.config, name))
    other.config.vocab_size, other.config.tie_word_embeddings = source.config.vocab_size, False
    assert structure_of(build_structure(other)).fingerprint == config.provenance.fingerprint
    with pytest.raises(AutoQuantError, match=r"proved for a model of type llama, not gemma, and .*differ from"):
        ensure_proved(config, lambda: other, "gemma")
    note = ensure_proved(config, lambda: source, "llama")
    assert note.how == "by the certificate of the config"
