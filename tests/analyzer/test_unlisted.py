"""Every matrix of a model is a linear, in a claim, or listed with what it is used for."""

from __future__ import annotations

import torch
from small_graphs import Graph, lin, par
from torch import nn
from torch.nn import functional

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.rules.sentences import qualified
from autoquant.analyzer.unlisted import AS_A_TENSOR, NO_MATRIX, UNUSED
from autoquant.config.check import problems
from autoquant.models.source import ModelSource

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])


def listed(function: object, **parts: nn.Module | nn.Parameter) -> dict[str, tuple[str, str]]:
    model = Graph(function, emb=nn.Embedding(8, 4), head=lin(), **parts)
    config = analyze(ModelSource("made", factory=lambda: (model, (TOKENS,)))).config
    return {b.path: (b.reason, b.operator) for b in config.blocked if b.what == "smoothing"}


def test_a_weight_that_is_normalised_first_is_listed_with_the_operator() -> None:
    found = listed(lambda s, t: s.head(functional.linear(s.emb(t), functional.normalize(s.w))), w=par(4, 4))
    assert found["w"] == (f"{AS_A_TENSOR}a tensor", qualified("linalg_vector_norm"))


def test_a_matrix_that_nothing_reads_is_listed() -> None:
    found = listed(lambda s, t: s.head(s.emb(t)), spare=par(4, 4), vector=par(4))
    assert found["spare"] == (UNUSED, "forward")
    assert "vector" not in found


def test_a_linear_and_a_table_in_a_claim_are_not_listed_again() -> None:
    found = listed(lambda s, t: s.head(functional.rms_norm(s.emb(t), (4,), s.g)), g=nn.Parameter(torch.ones(4)))
    assert found == {}


def test_an_encoder_layer_is_not_one_operator() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, "relu", batch_first=True, norm_first=True).eval()
    model = Graph(lambda s, t: s.head(s.layer(s.emb(t))), emb=nn.Embedding(8, 4), head=lin(), layer=layer)
    config = analyze(ModelSource("made", factory=lambda: (model, (TOKENS,)))).config
    assert {linear.weight for linear in config.model.linears} >= {"layer.linear1.weight", "layer.linear2.weight"}
    assert "layer.linear1 -> linear2" in {group.name for group in config.smoothing.groups}
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_masked_encoder_is_traced_layer_by_layer() -> None:
    """Its look whether the mask is causal is for a faster kernel: the mask goes in as it is."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, "relu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS.shape[1])
    model = Graph(lambda s, t: s.head(s.encoder(s.emb(t), mask)), emb=nn.Embedding(8, 4), head=lin(), encoder=encoder)
    groups = analyze(ModelSource("made", factory=lambda: (model, (TOKENS,)))).config.smoothing.groups
    assert "encoder.layers.0.linear1 -> linear2" in {group.name.replace("{layer}", "0") for group in groups}


def test_a_convolution_that_reads_a_space_is_listed_and_the_config_fits_together() -> None:
    """It is no linear: quantization leaves it, and its path is known to the checker from here."""

    def run(s: Graph, t: torch.Tensor) -> torch.Tensor:
        mixed = s.cv(functional.rms_norm(s.emb(t), (4,), s.g).mT).mT
        return s.head(functional.silu(mixed))

    model = Graph(run, emb=nn.Embedding(8, 4), head=lin(), cv=nn.Conv1d(4, 4, 1), g=nn.Parameter(torch.ones(4)))
    config = analyze(ModelSource("made", factory=lambda: (model, (TOKENS,)))).config
    (space,) = config.rotation.spaces
    assert [reader.path for read in space.reads for reader in read.readers] == ["cv.weight"]
    assert "cv.weight" not in {linear.weight for linear in config.model.linears}
    assert problems(config) == []


def test_a_weight_that_is_no_matrix_is_listed_beside_its_claims_and_the_config_fits_together() -> None:
    """Nothing quantizes it. Its path is known to the checker from here: no group names what reads without a norm."""

    def run(s: Graph, t: torch.Tensor) -> torch.Tensor:
        x = s.emb(t)
        return s.head(functional.rms_norm(x + s.o(torch.tensordot(x, s.w, 1).flatten(2).relu()), (4,)))

    model = Graph(run, emb=nn.Embedding(8, 4), head=lin(), w=par(4, 3, 2), o=lin(6, 4))
    config = analyze(ModelSource("made", factory=lambda: (model, (TOKENS,)))).config
    assert config.rotation.spaces[0].reads[0].readers[0].path == "w"
    assert [(b.reason, b.operator) for b in config.blocked if b.path == "w"] == [(NO_MATRIX, qualified("tensordot"))]
    assert problems(config) == []


def test_a_weight_is_listed_though_the_values_of_its_module_are_lost() -> None:
    """What is said of a module's rotation tells nothing of the weights in it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.o = par(4, 2, 2), lin()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            v = torch.einsum("btc,chd->bhtd", x, self.v)
            return self.o(functional.scaled_dot_product_attention(v, v, v).transpose(1, 2).flatten(2))

    model = Graph(lambda s, t: s.head(s.att(s.emb(t))), emb=nn.Embedding(8, 4), head=lin(), att=Attention())
    config = analyze(ModelSource("made", factory=lambda: (model, (TOKENS,)))).config
    assert {b.path: b.reason for b in config.blocked if b.what == "rotation"}["att"].endswith(
        "several of its dimensions"
    )
    assert {b.path: b.reason for b in config.blocked if b.what == "smoothing"}["att.v"] == NO_MATRIX
