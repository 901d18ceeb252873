"""The tables of a model that have a row for each token."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def token_tables(model: Any) -> frozenset[str]:
    """The names of the input and the output embedding's weights; none of a model that does not say which they are.

    A row of them serves one token alone, so that what stands in the row of a token that never comes is of no matter.
    """
    weights: list[Tensor] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            table = getattr(model, getter)()
        except (AttributeError, NotImplementedError):  # no model of transformers, or one that does not say
            continue
        weight = None if table is None else getattr(table, "_parameters", {}).get("weight")
        weights += [weight] if weight is not None and weight.dim() == 2 else []
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in parameters if any(parameter is weight for weight in weights))
