"""Recipes of LLM Compressor: SmoothQuantModifier, AWQModifier, SpinQuantModifier and QuantizationModifier.

Expressions are anchored and match exactly the modules that are meant. LLM Compressor finds the members of one mapping
layer by layer, in the order of the modules (``compressed_tensors.utils.match_modules_set``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from autoquant.config.format import Config
from autoquant.config.layers import layer_numbers
from autoquant.errors import AutoQuantError
from autoquant.quantizer.strategies import Granularity, PlannedLinear, Scheme, kv_granularity, plan_linears
from autoquant.recipes.pairs import Refusal, ScalePair, expressions, scale_pairs
from autoquant.recipes.spaces import Layers, WholeSpace, norms_of, whole_spaces

ALGORITHMS = ("smoothquant", "awq")
RE = "re:"
NOTHING = f"{RE}^(?!)$"
"""Matches no module: SpinQuantModifier centres what it takes for the embedding, which changes a model with RMSNorms."""
LARGEST_KNOWN = 64
"""Largest odd factor of a size for which compressed-tensors has a Hadamard matrix: its file ends at 4 * 64."""


def recipe(config: Config, algorithm: str = "smoothquant") -> tuple[str, list[Refusal]]:
    """The recipe as YAML, and what of the config it cannot say.

    ``algorithm`` gets the smoothing groups: ``smoothquant`` or ``awq``. Raises AutoQuantError for another one, and
    where nothing is left to say.
    """
    if algorithm not in ALGORITHMS:
        raise AutoQuantError(f"algorithm '{algorithm}': LLM Compressor recipes have {' or '.join(ALGORITHMS)}")
    pairs, refused = scale_pairs(config)
    spaces, others = whole_spaces(config)
    rotation, unsized = _spinquant(config, spaces)
    stage: dict[str, Any] = {}
    if rotation:
        stage["rotation_modifiers"] = {"SpinQuantModifier": rotation}
    for alpha, of_alpha in _by_alpha(pairs).items():
        mappings = [_mapping(config, pair) for pair in of_alpha]
        if algorithm == "smoothquant":
            body: dict[str, Any] = {"smoothing_strength": alpha, "mappings": [[b, s] for s, b in mappings]}
            stage[f"smooth_{round(alpha * 1000)}_modifiers"] = {"SmoothQuantModifier": body}
        else:
            entries = [{"smooth_layer": s, "balance_layers": b} for s, b in mappings]
            known = stage.setdefault("smooth_modifiers", {"AWQModifier": {"mappings": []}})
            known["AWQModifier"]["mappings"] += entries
    quantization, unsaid = _quantization(config)
    if quantization:
        stage["quantization_modifiers"] = {"QuantizationModifier": quantization}
    text = yaml.safe_dump({"autoquant_stage": stage}, sort_keys=False, width=120, allow_unicode=True)
    return text, [*refused, *others, *unsized, *unsaid]


def _by_alpha(pairs: Iterable[ScalePair]) -> dict[float, list[ScalePair]]:
    found: dict[float, list[ScalePair]] = defaultdict(list)
    for pair in pairs:
        found[pair.alpha].append(pair)
    return found


def _mapping(config: Config, pair: ScalePair) -> tuple[str, list[str]]:
    """The scaled module and those that undo it, as expressions."""
    return _expression(config, pair.smooth, pair.layers), [_expression(config, p, pair.layers) for p in pair.balance]


def _expression(config: Config, path: str, layers: Layers) -> str:
    return RE + expressions(path, layers, config.model.layers)


def _spinquant(config: Config, spaces: Sequence[WholeSpace]) -> tuple[dict[str, Any], list[Refusal]]:
    """A SpinQuantModifier that turns these spaces, and those whose size has no Hadamard matrix there."""
    kinds, refused, groups = {s: _hadamard(s.size) for s in spaces}, [], {}
    for at, space in enumerate(spaces):
        kind = kinds[space]
        if kind is None:
            refused.append(Refusal(f"{space.kind} {space.name}", f"no Hadamard matrix of size {space.size} there"))
            continue
        writers = [_expression(config, path, layers) for path, layers in space.writers]
        readers = [_expression(config, path, read.layers) for read in space.reads for path in read.linears]
        groups[f"{space.kind}_{at}"] = {
            "type": kind,
            "head_dim": space.size if space.kind == "R2" else None,
            "apply": [
                {"targets": writers, "location": "weight_output"},
                {"targets": readers, "location": "weight_input", "inverse": True},
            ],
        }
    if not groups:
        return {}, refused
    turned = [space for space in spaces if kinds[space] is not None]
    return {
        "transform_config": {"config_groups": groups},
        "mappings": {**dict.fromkeys(_SPINQUANT_FIELDS, NOTHING), "mlp_in": [NOTHING], "mlp_out": [NOTHING]},
        "norm_mappings": [
            {
                "norm": _expression(config, str(read.norm), read.layers),
                "linears": [_expression(config, path, read.layers) for path in read.linears],
            }
            for read in norms_of(turned)
        ],
    }, refused


_SPINQUANT_FIELDS = ("embedding", "attn", "attn_q", "attn_k", "attn_v", "attn_o", "lm_head")


def _hadamard(size: int) -> str | None:
    """The type of transform that is orthogonal for this size: ``random-matrix`` is not."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return "hadamard"
    return "random-hadamard" if size % 4 == 0 and odd <= LARGEST_KNOWN else None


def _quantization(config: Config) -> tuple[dict[str, Any], list[Refusal]]:
    """A QuantizationModifier with the config's strategies, and what it cannot say."""
    refused: list[Refusal] = []
    by_scheme: dict[Scheme, list[PlannedLinear]] = defaultdict(list)
    for linear in plan_linears(config):
        if linear.stack is not None:
            refused.append(Refusal(linear.path, "stacked experts have no module of their own to name"))
        elif not linear.weight.endswith(".weight"):
            refused.append(Refusal(linear.path, "is no module of its own to name"))
        else:
            by_scheme[linear.scheme].append(linear)
    if config.quantization.prefix:
        refused.append(Refusal("quantization.prefix", "LLM Compressor knows no prefix"))
    groups = {
        f"group_{at}": {
            "targets": _targets(config, linears),
            "weights": _arguments("channel" if scheme.weight_per_channel else "tensor"),
            "input_activations": _inputs(scheme.activation),
        }
        for at, (scheme, linears) in enumerate(by_scheme.items())
    }
    if not groups:
        return {}, refused
    body: dict[str, Any] = {"config_groups": groups}
    cache = kv_granularity(config)
    if cache is not None and cache.is_static:
        body["kv_cache_scheme"] = _arguments("tensor")
    elif cache is not None:
        refused.append(Refusal("quantization.strategy", "a key/value cache is static there, per tensor"))
    return body, _merged(refused, config)


def _merged(refused: list[Refusal], config: Config) -> list[Refusal]:
    """One line for all layers of a linear."""
    paths = {linear.path for linear in config.model.linears}
    found: dict[Refusal, None] = {}
    for refusal in refused:
        general = next((p for p in paths if _is_of(refusal.name, p, config.model.layers)), refusal.name)
        found[Refusal(general, refusal.reason)] = None
    return list(found)


def _is_of(name: str, path: str, layers: int) -> bool:
    return any(path.replace("{layer}", str(layer)) == name for layer in range(layers))


def _targets(config: Config, linears: Sequence[PlannedLinear]) -> list[str]:
    """Expressions for these linears, those of all their layers together."""
    named = {linear.path for linear in linears}
    targets = []
    for linear in config.model.linears:
        layers = () if linear.layers is None else layer_numbers(linear.layers)
        of_path = tuple(layer for layer in layers if linear.path.replace("{layer}", str(layer)) in named)
        if of_path or (not layers and linear.path in named):
            targets.append(_expression(config, linear.path, of_path))
    return targets


def _inputs(activation: Granularity) -> dict[str, Any]:
    if activation.is_static:
        return _arguments("tensor")
    return _arguments("token" if activation is Granularity.TOKEN_DYNAMIC else "tensor", dynamic=True)


def _arguments(strategy: str, dynamic: bool = False) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
