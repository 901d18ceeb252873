"""The tables of a model that have a row for each token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def token_embedding(model: Any) -> nn.Embedding | None:
    """The embedding of a model's tokens; None where it has several, or another kind of one."""
    table = _said_by(model, "get_input_embeddings")
    return table if isinstance(table, nn.Embedding) else None


def output_embedding(model: Any) -> nn.Module | None:
    """The module that makes logits; None where the model does not say."""
    head = _said_by(model, "get_output_embeddings")
    return head if isinstance(head, nn.Module) else None


def _said_by(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one that does not say
        return None


def token_tables(model: Any) -> frozenset[str]:
    """The names of the input and the output embedding's weights; none of a model that does not say which they are.

    A row of them serves one token alone, so that what stands in the row of a token that never comes is of no matter.
    """
    weights: list[Tensor] = []
    for table in (_said_by(model, "get_input_embeddings"), _said_by(model, "get_output_embeddings")):
        weight = None if table is None else getattr(table, "_parameters", {}).get("weight")
        weights += [weight] if weight is not None and weight.dim() == 2 else []
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in parameters if any(parameter is weight for weight in weights))
