"""The config file format: the only thing that passes from the analyzer to the executor.

Every model is frozen and strict and refuses unknown keys, so that a config that loads means exactly what it says.
The JSON Schema in ``schemas/`` is generated from these classes (``autoquant schema``).

Paths are exact parameter or module names. A path inside a repeated layer holds one named index, ``{layer}``, and the
object that carries the path names the layers it stands for (``"layers": "0-31"``). There are no regular expressions.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from autoquant.config.overview import overview, overview_html

FORMAT_VERSION = 2
SCHEMA_NAME = f"autoquant-config.v{FORMAT_VERSION}.schema.json"
"""Of the file beside a config, which an editor reads through the config's ``$schema``; one for each format version."""


class Strict(BaseModel):
    """Frozen, strict, closed: a key that is not described here is an error."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_by_name=True, serialize_by_alias=True)


Section = TypeVar("Section", bound=BaseModel)


def edited(section: Section, **updates: object) -> Section:
    """A copy of ``section`` with other values for the fields named, validated as a file is.

    pydantic's own ``model_copy`` takes any value, which then gets into a file that ``load_config`` refuses. Raises
    pydantic.ValidationError for a value, and for a field, that the format does not have.
    """
    kept = {name: getattr(section, name) for name in section.model_fields_set}
    return type(section).model_validate({**kept, **updates})


LayerSet = Annotated[
    str,
    Field(
        pattern=r"^\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*$",
        description="Layers as numbers, ranges and strided ranges: '0-31', '0,3-7', '0-30:2' (every second one).",
    ),
]


class Strategy(StrEnum):
    """The eight W8A8 strategies: symmetric int8 weights / activations, four of them with an int8 KV cache."""

    PER_TENSOR_STATIC = "w_int8_per_tensor_a_int8_per_tensor_static"
    PER_CHANNEL_STATIC = "w_int8_per_channel_a_int8_per_tensor_static"
    PER_CHANNEL_DYNAMIC = "w_int8_per_channel_a_int8_per_tensor_dynamic"
    PER_CHANNEL_PER_TOKEN = "w_int8_per_channel_a_int8_per_token_dynamic"
    PER_TENSOR_STATIC_KV = "w_int8_per_tensor_a_int8_per_tensor_static_kv_cache_int8_per_tensor_static"
    PER_CHANNEL_STATIC_KV = "w_int8_per_channel_a_int8_per_tensor_static_kv_cache_int8_per_tensor_static"
    PER_CHANNEL_DYNAMIC_KV = "w_int8_per_channel_a_int8_per_tensor_dynamic_kv_cache_int8_per_tensor_dynamic"
    PER_CHANNEL_PER_TOKEN_KV = "w_int8_per_channel_a_int8_per_token_dynamic_kv_cache_int8_per_token_dynamic"


class IndexMap(Strict):
    """Which positions of an axis carry which channels of the group, as one strided block.

    For every multi-index ``i`` below ``shape``, position ``start + sum(i * stride)`` of the axis carries channel
    ``channel_start + sum(i * channel_stride)``. A channel stride of 0 repeats a channel: the columns of an attention
    output projection under grouped-query attention, for example.
    """

    start: int = Field(0, ge=0, description="First position on the axis.")
    shape: tuple[int, ...] = Field(description="Extents of the block, outermost first.")
    stride: tuple[int, ...] = Field(description="Step on the axis per extent.")
    channel_start: int = Field(0, ge=0, description="Channel of the first position.")
    channel_stride: tuple[int, ...] = Field(description="Step in channels per extent; 0 repeats the channel.")


class Slot(Strict):
    """One axis of one parameter: the rows or columns of a weight, the elements of a bias or of a norm weight."""

    path: str = Field(
        description="Parameter name, '{layer}' for the layer index: 'model.layers.{layer}.mlp.up_proj.weight'."
    )
    dim: int = Field(0, ge=0, description="Dimension of the parameter that the channels lie on.")
    stack: int | None = Field(
        None,
        ge=1,
        description="Number of matrices stacked along dimension 0 (experts). Positions then count through all of them: "
        "expert * size of dim + row.",
    )
    size: int = Field(ge=1, description="Number of positions on the axis, stacked matrices included.")
    index: tuple[IndexMap, ...] | None = Field(
        None, description="Positions and their channels; null: position i carries channel i, over the whole axis."
    )
    power: int = Field(
        1, description="The channel's scale enters to this power: 2 after a squared ReLU, -1 for keys against queries."
    )
    offset: Literal[0, 1] = Field(0, description="1 where the model uses 1 + parameter as the gain.")


class SmoothingKind(StrEnum):
    NORM_LINEAR = "norm_linear"
    LINEAR_LINEAR = "linear_linear"
    QUERY_KEY = "query_key"


class SmoothingMethod(StrEnum):
    SMOOTHQUANT = "smoothquant"
    DESCENT = "descent"


class SmoothingOverride(Strict):
    """Another choice for some layers of a group."""

    layers: LayerSet = Field(description="The layers that it is for, some of the group's.")
    enable: bool | None = Field(None, description="Replaces the group's enable for these layers.")
    alpha: float | None = Field(None, ge=0, le=1, description="Replaces the group's alpha for these layers.")
    method: SmoothingMethod | None = Field(None, description="Replaces the group's method for these layers.")


class SmoothingGroup(Strict):
    """Scales that can be put on the sources and undone in the targets with the function unchanged.

    Channel c of every source is multiplied by ``s[c] ** power`` and channel c of every target is divided by
    ``s[c] ** power``. The group is closed: every reader of the scaled tensor is a target.
    """

    name: str = Field(description="Unique within the file, for overrides and messages.")
    kind: SmoothingKind = Field(
        description="norm_linear: a norm weight into linears; linear_linear (fc-fc): v -> o, up -> down, fc1 -> fc2; "
        "query_key: query rows against key rows, of use for int8 key caches only."
    )
    layers: LayerSet | None = Field(
        None, description="The layers that '{layer}' stands for; null where no path has one."
    )
    enable: bool | None = Field(None, description="Use this group; null: smoothing.enable, and false for query_key.")
    alpha: float | None = Field(None, ge=0, le=1, description="SmoothQuant's alpha; null: smoothing.alpha.")
    method: SmoothingMethod | None = Field(None, description="null: smoothing.method.")
    overrides: tuple[SmoothingOverride, ...] = Field(
        (), description="Other choices for some of the layers; the last match wins."
    )
    channels: int = Field(ge=1, description="Number of independent scales (per layer).")
    sources: tuple[Slot, ...] = Field(
        min_length=1, description="Parameters that produce the channels, biases included."
    )
    targets: tuple[Slot, ...] = Field(min_length=1, description="Every parameter that reads the channels.")
    by_hand: bool = Field(
        False,
        description="A person wrote this group (`autoquant init-group`) and the analysis does not find it: the proof "
        "on a small model alone bears it out.",
    )


class Smoothing(Strict):
    """SmoothQuant (Xiao et al. 2023, eq. 4): s = max|x|**alpha / max|w|**(1 - alpha), divided out of the activation."""

    enable: bool = Field(True, description="Default for every group.")
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the difficulty moved from activations to weights.")
    method: SmoothingMethod = Field(
        SmoothingMethod.SMOOTHQUANT,
        description="smoothquant: eq. 4; descent: from there, coordinate descent on the log-scales against the output "
        "error of the group's linears under the strategy.",
    )
    groups: tuple[SmoothingGroup, ...] = Field((), description="Every legal group.")


class Norm(Strict):
    """A normalisation's parameters."""

    kind: Literal["rms", "layer"] = Field(description="rms: x / rms(x); layer: the mean is subtracted first.")
    weight: str | None = Field(None, description="Parameter name of the gain, null where there is none.")
    bias: str | None = Field(None, description="Parameter name of the bias, null where there is none.")
    offset: Literal[0, 1] = Field(0, description="1 where the gain is 1 + weight.")
    eps: float | None = Field(
        None, description="Epsilon, where the executor needs it (a norm folded into an embedding table)."
    )


class Writer(Slot):
    """A parameter whose axis writes into a space: embedding columns, linear rows, biases."""

    layers: LayerSet | None = Field(None, description="The layers that '{layer}' stands for; null: the space's own.")
    fold_norm: Norm | None = Field(
        None,
        description="A norm that is applied to this embedding table alone and is folded into the table first, exactly.",
    )


class Reader(Slot):
    """A weight whose columns read a space."""

    bias: str | None = Field(None, description="The same linear's bias parameter; null where it has none.")


class Read(Strict):
    """Readers behind one norm. Its gain is folded into all of them, its bias into their biases."""

    layers: LayerSet | None = Field(None, description="The layers that '{layer}' stands for; null: the space's own.")
    norm: Norm | None = Field(None, description="The norm in between; null where the readers see the space itself.")
    readers: tuple[Reader, ...] = Field(min_length=1, description="Every linear behind this norm.")


class RotationMethod(StrEnum):
    HADAMARD = "hadamard"
    ORTHOGONAL = "orthogonal"
    LEARNED = "learned"


class Space(Strict):
    """A vector space that the model treats as one: any orthogonal Q may be written and read instead.

    The channels are ``blocks`` runs of ``size``; Q acts inside each block. Writers become ``W Q`` on their axis,
    readers ``W diag(gain) Q`` on theirs. R1 is one block over the residual stream; R2 is one block per KV head.
    """

    name: str = Field(description="Unique within the file.")
    kind: Literal["R1", "R2", "other"] = Field(
        description="R1: the residual stream; R2: per-head values, v rows to o columns; other: any other vector space."
    )
    layers: LayerSet | None = Field(
        None, description="The layers that '{layer}' stands for, unless a member has its own."
    )
    enable: bool | None = Field(None, description="Rotate this space; null: rotation.enable.")
    method: RotationMethod | None = Field(None, description="null: rotation.method.")
    seed: int | None = Field(None, ge=0, description="null: derived from rotation.seed and the space's name.")
    size: int = Field(ge=1, description="Dimension of each block.")
    blocks: int = Field(1, ge=1, description="Number of blocks, each with a rotation of its own.")
    centre: bool = Field(
        False, description="Writers are centred first (LayerNorm reads the space), after which it is an RMSNorm."
    )
    writers: tuple[Writer, ...] = Field(min_length=1, description="Every parameter that writes into the space.")
    reads: tuple[Read, ...] = Field(min_length=1, description="Every linear that reads the space, by norm.")


class Online(Strict):
    """A Hadamard rotation computed while the model runs."""

    kind: Literal["R3", "R4", "input"] = Field(
        description="R3: on queries and keys after the rotary embedding; R4: before a linear that follows an "
        "elementwise product (down_proj); input: before any other linear, undone in its columns."
    )
    path: str = Field(description="Module: the attention for R3, the linear otherwise.")
    layers: LayerSet | None = Field(None, description="The layers that '{layer}' stands for.")
    enable: bool = Field(False, description="Off by default: it costs time at inference.")
    size: int = Field(ge=1, description="Dimension of the rotation.")


class Rotation(Strict):
    enable: bool = Field(True, description="Default for every space.")
    method: RotationMethod = Field(
        RotationMethod.HADAMARD,
        description="hadamard: random signs times a Hadamard matrix; orthogonal: drawn from the Haar measure; learned: "
        "the residual's Hadamard rotation is turned further by descent on the calibration loss (SpinQuant, Liu et al. "
        "2024); `autoquant apply`, which sees no text, refuses it.",
    )
    seed: int = Field(0, ge=0, description="Seed of all rotations.")
    spaces: tuple[Space, ...] = Field((), description="Every space that can be rotated offline.")
    online: tuple[Online, ...] = Field((), description="Where an online rotation fits.")


class Rounding(StrEnum):
    NEAREST = "nearest"
    GPTQ = "gptq"
    QRONOS = "qronos"


class StaticClip(StrEnum):
    ABSMAX = "absmax"
    MSE = "mse"
    PERCENTILE = "percentile"
    OUTPUT = "output"


class WeightQuantization(Strict):
    """How int8 weights are chosen."""

    clip: Literal["absmax", "mse"] = Field(
        "absmax", description="Largest value that fits: the maximum, or the one of least squared weight error."
    )
    rounding: Rounding = Field(
        Rounding.NEAREST,
        description="nearest; gptq: later columns make up for the error of earlier ones (Frantar et al. 2022); qronos: "
        "the error of quantized inputs is corrected as well (Zhang et al. 2025). The last two need calibration.",
    )
    bias_correction: bool = Field(
        False, description="Take the mean output error over the calibration tokens out of the bias, made where missing."
    )


class ActivationQuantization(Strict):
    """How the scales of static activations are chosen; dynamic ones have none."""

    clip: StaticClip = Field(
        StaticClip.ABSMAX,
        description="Largest value that fits: the calibrated maximum; mse: least squared error of the input; "
        "percentile: of all magnitudes; output: least squared error of the linear's output.",
    )
    percentile: float = Field(99.99, gt=50, le=100, description="Of the magnitudes, for clip percentile.")


class QuantizationOverride(Strict):
    """Another choice for one linear."""

    path: str = Field(description="Module path of the linear, as in model.linears.")
    layers: LayerSet | None = Field(None, description="Only these layers; null: all of the linear's.")
    strategy: Strategy | None = Field(None, description="null: keep this linear in floating point.")
    weights: WeightQuantization | None = Field(None, description="null: quantization.weights.")
    activations: ActivationQuantization | None = Field(None, description="null: quantization.activations.")


class Quantization(Strict):
    strategy: Strategy = Field(
        Strategy.PER_CHANNEL_PER_TOKEN, description="Used for every linear that is not excluded."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Linears kept in floating point: module paths as in model.linears."
    )
    weights: WeightQuantization = Field(WeightQuantization(), description="Clipping and rounding of weights.")
    activations: ActivationQuantization = Field(
        ActivationQuantization(), description="How the scales of static activations are chosen."
    )
    prefix: tuple[int, ...] = Field(
        (),
        description="Token ids in front of every sequence, whose keys and values are computed once in floating point "
        "and stored with the model: attention sinks that would otherwise decide the scales (PrefixQuant).",
    )
    overrides: tuple[QuantizationOverride, ...] = Field(
        (), description="Other choices for single linears; the last match wins."
    )


class Linear(Strict):
    """A matrix product with a parameter."""

    path: str = Field(description="Module path, or the parameter's own path where the module holds several (experts).")
    layers: LayerSet | None = Field(None, description="The layers that '{layer}' stands for.")
    weight: str = Field(description="Weight parameter.")
    bias: str | None = Field(None, description="Bias parameter, null where there is none.")
    in_features: int = Field(ge=1, description="Length of the sum.")
    out_features: int = Field(ge=1, description="Number of outputs, per stacked matrix.")
    stack: int | None = Field(None, ge=1, description="Number of stacked matrices (experts).")
    in_dim: int = Field(
        ge=0, description="Dimension of the weight that is summed over (1 for nn.Linear, 0 for Conv1D)."
    )
    role: Literal["linear", "lm_head", "router"] = Field(
        "linear", description="lm_head: writes the logits; router: chooses experts, or weights one for each token."
    )


class ModelFacts(Strict):
    layers: int = Field(ge=0, description="Number of repeated layers.")
    hidden_size: int | None = Field(None, description="Width of the residual stream.")
    heads: int | None = Field(None, description="Query heads.")
    kv_heads: int | None = Field(None, description="Key/value heads.")
    head_size: int | None = Field(None, description="Size of one head.")
    parameters: int = Field(ge=0, description="Number of parameters, tied ones counted once.")
    tied: tuple[tuple[str, ...], ...] = Field(
        (), description="Parameters that share storage; untied before they come to differ."
    )
    linears: tuple[Linear, ...] = Field((), description="Every matrix product with a parameter.")


class Blocked(Strict):
    """What cannot be done, and why."""

    path: str = Field(description="The linear's input or the space that is blocked.")
    layers: LayerSet | None = Field(None, description="The layers that '{layer}' stands for.")
    what: Literal["smoothing", "rotation"] = Field(description="Which of the two cannot be done.")
    reason: str = Field(description="In words.")
    operator: str = Field(description="The operator that blocks: 'aten.silu'.")
    at: str = Field(description="Module path at which it stands.")


class Provenance(Strict):
    autoquant: str = Field(description="Version of AutoQuant that wrote this file.")
    torch: str = Field(description="Version of torch.")
    transformers: str | None = Field(None, description="Version of transformers; null for models from elsewhere.")
    model: str = Field(description="MODEL as given to analyze.")
    capture: str = Field(description="dynamo, dynamo-pieces or export.")
    fingerprint: str = Field(
        description="Digest of parameter names, shapes and ties: tells whether a model has this structure."
    )


class CertificateRow(Strict):
    kind: str = Field(
        description="norm_linear, linear_linear, query_key, R1, R2, R3, R4, input or all; by_hand: groups that a "
        "person wrote and the analysis does not find."
    )
    count: int = Field(ge=0, description="Groups or spaces of this kind that were tried alone ('all': tried together).")
    worst: float = Field(ge=0, description="Largest relative change of the logits.")
    worst_name: str | None = Field(None, description="The group or space that it belongs to.")


class Coverage(Strict):
    """What the runs of a proof reached."""

    lengths: tuple[int, ...] = Field((), description="Lengths in tokens of the inputs that were compared.")
    padding: bool = Field(False, description="Whether one of them was padded on the left.")
    offset: bool = Field(False, description="Whether one of them began at a later position.")
    decode: bool = Field(False, description="Whether single tokens were decoded with a cache.")
    experts: int = Field(0, ge=0, description="Weights of single experts that the linears name.")
    experts_reached: int | None = Field(
        None, ge=0, description="Those of them that had a part in an output that was compared; null: not measured."
    )


class Certificate(Strict):
    """What was proved before the file was written: the real executor on a small model of the same structure."""

    proved: bool = Field(description="false: --no-verify was given; nothing below was measured.")
    tolerance: float = Field(1e-5, description="Relative change of the logits that counts as equal.")
    dtype: str = Field("float64", description="Floating-point type of the small model.")
    seed: int = Field(0, description="Seed of its parameters, inputs, scales and rotations.")
    rows: tuple[CertificateRow, ...] = Field((), description="What was measured, one row a kind.")
    coverage: Coverage | None = Field(None, description="What was run; null: not recorded.")
    digest: str | None = Field(
        None,
        description="Digest of everything that is claimed (groups, spaces, online rotations, linears), knobs apart: "
        "tells whether the claims were edited since they were proved; null: not recorded.",
    )
    settings: str | None = Field(
        None,
        description="Digest of the fields of the model's configuration that may change what it computes: a model of "
        "the same structure and of other settings is proved again; left out: those of its type by default.",
    )


class Decision(Strict):
    """One knob that `autoquant search` set, with the evidence."""

    where: str = Field(description="The knob: its JSON path in this file.")
    choice: str = Field(description="What it was set to.")
    unit: str = Field(description="What the two errors measure.")
    before: float = Field(description="Error without the choice.")
    after: float = Field(description="Error with it.")
    cost: str = Field(description="What it costs at inference: 'none' where it is folded into the weights.")


class Search(Strict):
    """How `autoquant search` came to this config; nothing here is read when it is applied."""

    strategy: Strategy = Field(description="The strategy that was searched for.")
    seed: int = Field(ge=0, description="Seed of the search.")
    calibration: str = Field(description="Calibration text, by name.")
    digest: str = Field(description="SHA-256 of the calibration tokens.")
    fitted: int = Field(ge=1, description="Windows that scales and weights were fitted on.")
    held_out: int = Field(ge=1, description="Windows of the same text that choices were judged on.")
    before: float = Field(description="Held-out perplexity above float's before the search, in percent.")
    after: float = Field(description="The same with this config.")
    standard_error: float = Field(ge=0, description="Of `after`, paired over windows, in percent.")
    decisions: tuple[Decision, ...] = Field((), description="Every knob that was set, in order.")


class Config(Strict):
    """AutoQuant configuration: what a model allows, what to use of it, and the proof."""

    schema_: str | None = Field(None, alias="$schema", description="Where editors find the schema.")
    format_version: Literal[2] = Field(description="Version of this format.")
    provenance: Provenance = Field(description="Where this file comes from.")
    model: ModelFacts = Field(description="What the analyzer saw of the model.")
    smoothing: Smoothing = Field(description="SmoothQuant: the legal scale symmetries, and which to use.")
    rotation: Rotation = Field(description="The spaces that can be rotated, and which to rotate.")
    quantization: Quantization = Field(description="The int8 strategy, and what is kept in floating point.")
    blocked: tuple[Blocked, ...] = Field((), description="What cannot be smoothed or rotated, and why.")
    certificate: Certificate | None = Field(None, description="The proof; null: nothing was measured.")
    search: Search | None = Field(None, description="Evidence of `autoquant search`; null: no search was made.")

    def __repr__(self) -> str:
        return overview(self)

    def __str__(self) -> str:
        return overview(self)

    def _repr_html_(self) -> str:
        return overview_html(self)
