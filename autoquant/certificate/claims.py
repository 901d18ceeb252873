"""What a config claims: every group, space, online rotation and linear, apart from what a person chooses of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator

from autoquant.config.format import Blocked, Config, edited
from autoquant.config.layers import layer_numbers
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError

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
            yield what, name, {key: getattr(claim, key) for key in SAID[what]}


def differences(config: Config, found: Config) -> list[str]:
    """What ``config`` claims that the analysis ``found`` does not, in words; sizes, indices and linears included.

    A claim may be left out, and one that holds in each layer by itself may name fewer layers.
    """
    model = found.provenance.model
    by_name: dict[tuple[str, str], list[dict[str, object]]] = {}
    for what, name, claim in said_by(found):
        by_name.setdefault((what, name), []).append(claim)
    problems = []
    for what, name, claim in said_by(config):
        if any(_within(what, claim, allowed) for allowed in by_name.get((what, name), ())):
            continue
        same = by_name.get((what, name))
        if same is None:
            names = [n for w, n in by_name if w == what]
            problems.append(f"'{name}' is no {what} of {model}{did_you_mean(name, names)}")
            continue
        apart = [key for key in SAID[what] if claim[key] != same[0][key]]
        problems += [f"'{name}': its {key} differ from the analysis of {model}" for key in apart]
    for what, name, claim in said_by(found):
        if what == "linear" and not any(w == what and claim["weight"] == c["weight"] for w, _, c in said_by(config)):
            problems.append(f"'{name}' is a linear of {model} that the config does not list")
    return problems


def _within(what: str, claim: dict[str, object], allowed: dict[str, object]) -> bool:
    """True if ``claim`` says what ``allowed`` does, of the same layers or of some of them."""
    if any(claim[key] != allowed[key] for key in SAID[what] if key != "layers"):
        return False
    mine, theirs = claim["layers"], allowed["layers"]
    if mine == theirs:
        return True
    separate = what in ("smoothing group", "online rotation") or claim.get("kind") == "R2"
    if not (separate and isinstance(mine, str) and isinstance(theirs, str)):
        return False
    return set(layer_numbers(mine)) <= set(layer_numbers(theirs))


def check_claims(config: Config, found: Config) -> None:
    """Raise AutoQuantError where ``config`` is for another structure or claims what the analysis ``found`` does not."""
    check_structure(config, found.provenance.model, found.provenance.fingerprint, found.model.parameters)
    problems = differences(config, found)
    if problems:
        more = tuple(problems[:MAX_SHOWN]) if len(problems) > 1 else ()
        raise AutoQuantError(f"the config claims what the model does not: {problems[0]}", more)


def check_structure(config: Config, model: str, theirs: str, parameters: int) -> None:
    """Raise AutoQuantError where the config's fingerprint is not ``theirs``."""
    mine = config.provenance
    if mine.fingerprint != theirs:
        raise AutoQuantError(
            f"the config is for another structure: {mine.model} with {config.model.layers} layers and "
            f"{config.model.parameters:,} parameters; {model} has {parameters:,} parameters"
            + (", of other names, shapes or ties" if config.model.parameters == parameters else "")
        )
