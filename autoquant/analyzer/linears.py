"""Every product of an activation with a weight, and what it is for."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, fx

from autoquant.analyzer.scale_state import Use
from autoquant.aten import CASTS, CHOICES, PRODUCTS, operator_name
from autoquant.config.format import Linear
from autoquant.config.layers import module_of


def linears(uses: list[Use]) -> tuple[Linear, ...]:
    """One entry per weight, in graph order."""
    by_weight: dict[str, list[Use]] = {}
    for use in uses:
        by_weight.setdefault(use.weight, []).append(use)
    return tuple(
        Linear(
            path=module_of(weight),
            weight=weight,
            bias=same[0].bias,
            in_features=same[0].in_features,
            out_features=same[0].out_features,
            stack=same[0].stack,
            in_dim=same[0].contracted_dim,
            role=_role(same[0]),
        )
        for weight, same in by_weight.items()
    )


def _role(use: Use) -> Literal["linear", "lm_head", "router"]:
    """Lm_head: its output alone becomes the model's; router: before any further product its output is ranked, or is one
    number for each token that weights all channels of something else, as the gate of a shared expert is.
    """
    node = use.site.node
    if _reaches_choice(node) or (use.out_features == 1 and _weights_channels(node)):
        return "router"
    return "lm_head" if _is_output(node) else "linear"


def _is_output(node: fx.Node) -> bool:
    while True:
        if any(user.op == "output" for user in node.users):
            return True
        users = [user for user in node.users if user.op == "call_function"]
        if len(users) != 1 or operator_name(users[0]) in PRODUCTS or len(_activations(users[0])) != 1:
            return False
        node = users[0]


def _activations(node: fx.Node) -> list[fx.Node]:
    """What other operators made of its inputs; a buffer in another dtype or on another device is one still."""
    return [
        argument
        for argument in node.all_input_nodes
        if argument.op == "call_function" and (operator_name(argument) not in CASTS or _activations(argument))
    ]


def _weights_channels(node: fx.Node) -> bool:
    """True if the only channel of ``node``, through operators that keep it the only one, multiplies several."""
    seen, queue = {node}, [node]
    while queue:
        for user in queue.pop(0).users:
            if user in seen or user.op != "call_function" or operator_name(user) in PRODUCTS:
                continue
            seen.add(user)
            value = user.meta["val"]
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.shape[-1] == 1:
                queue.append(user)
            elif operator_name(user) == "mul":
                return True
    return False


def _reaches_choice(node: fx.Node) -> bool:
    seen = {node}
    queue = list(node.users)
    while queue:
        user = queue.pop(0)  # nearest first: the number of nodes looked at is limited
        if user in seen or user.op != "call_function":
            continue
        seen.add(user)
        name = operator_name(user)
        if name in CHOICES:
            return True
        if name not in PRODUCTS and len(seen) < 64:
            queue.extend(user.users)
    return False
