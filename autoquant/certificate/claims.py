"""What a config claims: every group, space, online rotation and linear, apart from what a person chooses of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from autoquant.config.format import Blocked, Certificate, Config, Coverage, Online, SmoothingGroup, Space, edited
from autoquant.config.layers import layer_bits, layer_numbers, layer_set
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError

_Named = TypeVar("_Named", SmoothingGroup, Space)
_Item = TypeVar("_Item", SmoothingGroup, Space, Online)

Claim = tuple[str, str]
"""(name, kind); an online rotation goes by its path."""

SAID = {
    "smoothing group": ("kind", "layers", "channels", "sources", "targets"),
    "rotation space": ("kind", "layers", "size", "blocks", "centre", "writers", "reads"),
    "online rotation": ("kind", "path", "layers", "size"),
    "linear": ("path", "layers", "weight", "bias", "in_features", "out_features", "stack", "in_dim"),
}
"""Per sort of claim, the fields that say something of the model. All others (enable, alpha, method, seed, overrides,
role) are choices, and a name is a name."""

REFUSED = "claimed by the analysis, refused by the proof"
"""How the reason of a claim begins that the analysis made and the proof took out."""

MAX_SHOWN = 20

Standing = Literal["proved", "edited", "unknown", "unproved"]

IN_WORDS: dict[Standing, str] = {
    "proved": "proved",
    "edited": "edited since it was proved",
    "unknown": "proved by a version that kept no digest of its claims",
    "unproved": "not proved",
}


@dataclass(frozen=True, slots=True)
class ProofNote:
    """How the claims of a config that is applied stand, for the provenance: ``proved`` True if they are proved, by the
    file's certificate or just now; ``how`` says which. ``certificate``: that of a proof made now.
    """

    proved: bool
    how: str
    certificate: Certificate | None = None


def as_proved(config: Config, note: ProofNote | None) -> Config:
    """The config as it is written beside what it was applied to: with the certificate of its own claims, or with none.

    A certificate of claims that were edited since goes; where they were proved anew, the new one takes its place.
    ``note``: how they stand, None where nobody asked.
    """
    if note is not None and note.certificate is not None:
        return edited(config, certificate=note.certificate)
    holds = standing(config) != "edited" and (note is None or note.proved)
    return config if holds or config.certificate is None else edited(config, certificate=Certificate(proved=False))


def ran(coverage: Coverage) -> str:
    """What a proof ran, in one line."""
    parts = [f"{', '.join(map(str, coverage.lengths))} tokens" if coverage.lengths else "the given inputs"]
    parts += ["left padding"] * coverage.padding + ["later positions"] * coverage.offset
    parts += ["decoding with a cache"] * coverage.decode
    if coverage.experts:
        reached = "how many were reached is not known" if coverage.experts_reached is None else coverage.experts_reached
        parts.append(f"weights of experts reached: {reached} of {coverage.experts}")
    return "; ".join(parts)


def claims(config: Config) -> Iterator[Claim]:
    """(name, kind) of every group, space and online rotation; online ones go by their path."""
    for group in config.smoothing.groups:
        yield group.name, group.kind.value
    for space in config.rotation.spaces:
        yield space.name, space.kind
    for online in config.rotation.online:
        yield online.path, online.kind


def keep(config: Config, chosen: Collection[Claim]) -> Config:
    """The config with the claims (name, kind) of ``chosen`` only. A group and a space may share a name."""
    smoothing, rotation = config.smoothing, config.rotation
    groups = tuple(group for group in smoothing.groups if (group.name, group.kind.value) in chosen)
    spaces = tuple(space for space in rotation.spaces if (space.name, space.kind) in chosen)
    online = tuple(online for online in rotation.online if (online.path, online.kind) in chosen)
    return edited(
        config,
        smoothing=edited(smoothing, groups=groups),
        rotation=edited(rotation, spaces=spaces, online=online),
    )


def layers_of(config: Config, claim: Claim) -> tuple[int, ...]:
    """The layers of a claim that says the same of each of them by itself; none where it is about several together."""
    for group in config.smoothing.groups:
        if (group.name, group.kind.value) == claim and group.layers:
            return layer_numbers(group.layers)
    for space in config.rotation.spaces:
        if (space.name, space.kind) == claim and space.layers and space.kind != "R1":
            return layer_numbers(space.layers)
    for online in config.rotation.online:
        if (online.path, online.kind) == claim and online.layers:
            return layer_numbers(online.layers)
    return ()


def with_layers(config: Config, chosen: Mapping[Claim, Collection[int]]) -> Config:
    """The config, each claim of ``chosen`` of these of its layers alone; it goes where there is none."""

    def left(items: Sequence[_Item], name: Callable[[_Item], Claim]) -> tuple[_Item, ...]:
        found = []
        for item in items:
            layers = chosen.get(name(item))
            if layers is None:
                found.append(item)
            elif layers:
                found.append(edited(item, layers=layer_set(layers)))
        return tuple(found)

    smoothing, rotation = config.smoothing, config.rotation
    return edited(
        config,
        smoothing=edited(smoothing, groups=left(smoothing.groups, lambda group: (group.name, group.kind.value))),
        rotation=edited(
            rotation,
            spaces=left(rotation.spaces, lambda space: (space.name, space.kind)),
            online=left(rotation.online, lambda online: (online.path, online.kind)),
        ),
    )


def refused_claims(config: Config) -> tuple[Blocked, ...]:
    """What the analysis claimed and the proof refused."""
    return tuple(blocked for blocked in config.blocked if blocked.reason.startswith(REFUSED))


def plain(name: str) -> str:
    """``name`` without the layers that tell apart claims of one name: those of a small model are others."""
    return name.partition(" @")[0]


def digest_of(config: Config) -> str:
    """``'sha256:…'`` of all that is claimed, in whatever order it stands in the file."""
    lines = sorted(
        json.dumps([what, {key: _value(item) for key, item in said.items()}], sort_keys=True, default=str)
        for what, _, said in said_by(config)
    )
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def standing(config: Config) -> Standing:
    """How a config's claims stand to its certificate: ``edited`` where their digest is not the one that was proved,
    ``unknown`` where the certificate holds none, ``unproved`` where there is no proof at all.
    """
    certificate = config.certificate
    if certificate is None or not certificate.proved:
        return "unproved"
    if certificate.digest is None:
        return "unknown"
    return "proved" if certificate.digest == digest_of(config) else "edited"


def _value(item: object) -> object:
    if isinstance(item, tuple):
        return [_value(one) for one in item]
    return item.model_dump(mode="json") if hasattr(item, "model_dump") else item


def said_by(config: Config) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(sort, name, what it says) of every claim."""
    for what, found in (
        ("smoothing group", [(group.name, group) for group in config.smoothing.groups]),
        ("rotation space", [(space.name, space) for space in config.rotation.spaces]),
        ("online rotation", [(online.path, online) for online in config.rotation.online]),
        ("linear", [(linear.weight, linear) for linear in config.model.linears]),
    ):
        for name, claim in found:
            yield what, name, _said(what, claim)


def _said(what: str, claim: object) -> dict[str, object]:
    said = {key: getattr(claim, key) for key in SAID[what]}
    # Only where it is so: claims of the analysis keep the digests that they have in files.
    return {**said, "by_hand": True} if getattr(claim, "by_hand", False) else said


def differences(config: Config, found: Config) -> list[str]:
    """What ``config`` claims that the analysis ``found`` does not, in words; sizes, indices and linears included.

    A claim may be left out, and one that holds in each layer by itself may name fewer layers. A group by hand need not
    be found: its proof alone decides.
    """
    model = found.provenance.model
    by_name: dict[tuple[str, str], list[dict[str, object]]] = {}
    for what, name, claim in said_by(found):
        by_name.setdefault((what, name), []).append(claim)
    problems = []
    for what, name, claim in said_by(config):
        if "by_hand" in claim or any(_within(what, claim, allowed) for allowed in by_name.get((what, name), ())):
            continue
        same = by_name.get((what, name))
        if same is None:
            names = [n for w, n in by_name if w == what]
            problems.append(f"'{name}' is no {what} of {model}{did_you_mean(name, names)}")
            continue
        apart = [key for key in SAID[what] if _unordered(claim[key]) != _unordered(same[0][key])]
        problems += [f"'{name}': its {key} differ from the analysis of {model}" for key in apart]
    for what, name, claim in said_by(found):
        if what == "linear" and not any(w == what and claim["weight"] == c["weight"] for w, _, c in said_by(config)):
            problems.append(f"'{name}' is a linear of {model} that the config does not list")
    return problems


def _within(what: str, claim: dict[str, object], allowed: dict[str, object]) -> bool:
    """True if ``claim`` says what ``allowed`` does, of the same layers or of some of them."""
    if any(_unordered(claim[key]) != _unordered(allowed[key]) for key in SAID[what] if key != "layers"):
        return False
    mine, theirs = claim["layers"], allowed["layers"]
    if mine == theirs:
        return True
    separate = what in ("smoothing group", "online rotation") or claim.get("kind") == "R2"
    if not (separate and isinstance(mine, str) and isinstance(theirs, str)):
        return False
    return set(layer_numbers(mine)) <= set(layer_numbers(theirs))


def _unordered(value: object) -> object:
    """Members in one order: which comes first says nothing."""
    return sorted(value, key=repr) if isinstance(value, tuple) else value


def as_found(config: Config, found: Config) -> Config:
    """The config with the groups and spaces that the analysis ``found`` in place of those that say the same, under
    whatever name and in whatever order; of the layers that it says it of.
    """
    smoothing, rotation = config.smoothing, config.rotation
    groups = _counterparts("smoothing group", smoothing.groups, found.smoothing.groups)
    spaces = _counterparts("rotation space", rotation.spaces, found.rotation.spaces)
    return edited(config, smoothing=edited(smoothing, groups=groups), rotation=edited(rotation, spaces=spaces))


def unmarked(config: Config, found: Config) -> Config:
    """The config, a group by hand that the analysis ``found`` too no longer by hand."""

    def is_found(group: SmoothingGroup) -> bool:
        said = _said("smoothing group", group)
        return any(
            _within("smoothing group", said, _said("smoothing group", other)) for other in found.smoothing.groups
        )

    groups = tuple(
        edited(group, by_hand=False) if group.by_hand and is_found(group) else group
        for group in config.smoothing.groups
    )
    return edited(config, smoothing=edited(config.smoothing, groups=groups))


def _counterparts(what: str, mine: Sequence[_Named], theirs: Sequence[_Named]) -> tuple[_Named, ...]:
    """For each of ``mine`` one of ``theirs`` that says the same; itself where there is none.

    Raises AutoQuantError where two of ``mine`` say the same of one layer.
    """
    result = []
    said: dict[str, list[_Named]] = {}
    for claim in mine:
        same = [other for other in theirs if _within(what, _said(what, claim), _said(what, other))]
        same.sort(key=lambda other: other.name != claim.name)
        if same:
            for other in said.setdefault(same[0].name, []):
                if _bits(other.layers) & _bits(claim.layers):
                    raise AutoQuantError(f"'{other.name}' and '{claim.name}' claim the same; keep one of them")
            said[same[0].name].append(claim)
        result.append(edited(same[0], layers=claim.layers) if same else claim)
    return tuple(result)


def _bits(layers: str | None) -> int:
    return 1 if layers is None else layer_bits(layers)


def check_claims(config: Config, found: Config) -> Config:
    """The config, each claim as the analysis ``found`` it.

    Raises AutoQuantError where it is for another structure, and where it claims what the analysis does not.
    """
    check_structure(config, found.provenance.model, found.provenance.fingerprint, found.model.parameters)
    config = as_found(config, found)
    problems = differences(config, found)
    if problems:
        more = tuple(problems[:MAX_SHOWN]) if len(problems) > 1 else ()
        raise AutoQuantError(f"the config claims what the model does not: {problems[0]}", more)
    return config


def check_structure(config: Config, model: str, theirs: str, parameters: int) -> None:
    """Raise AutoQuantError where the config's fingerprint is not ``theirs``."""
    mine = config.provenance
    if mine.fingerprint != theirs:
        raise AutoQuantError(
            f"the config is for another structure: {mine.model} with {config.model.layers} layers and "
            f"{config.model.parameters:,} parameters; {model} has {parameters:,} parameters"
            + (", of other names, shapes or ties" if config.model.parameters == parameters else "")
        )
