"""Steps of programs that are one expression: the templates, filled from what a program has so far."""

from __future__ import annotations

import random
import string

from expression_templates import ARITHMETIC, HOMOGENEOUS, IN_PLACE, MOVEMENT, NONLINEAR, PRODUCTS
from programs import TOKENS, Entry, Scope


def _filled(template: str) -> Entry:
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}

    def lines(scope: Scope) -> list[str]:
        return [expression(scope, template, scope.inputs, scope.widths[0])]

    return Entry(lines, inputs=2 if "y" in fields else 1, alike=True)


def expression(scope: Scope, template: str, inputs: tuple[str, ...], width: int) -> str:
    """The template over activations of one width, with parameters and constants drawn from the scope."""
    draw: random.Random = scope.draw
    order = list(range(width))
    draw.shuffle(order)
    shapes = [(width,), (width,), (1,), (TOKENS, width), (1, 1, width), (TOKENS, 1)]
    values: dict[str, object] = {
        "x": inputs[0],
        "y": inputs[-1],
        "B": scope.batch,
        "T": TOKENS,
        "W": width,
        "H": width // 2,
        "s": draw.choice((0.5, -0.5, 2.0, 3.0)),
        "order": order,
        "mask": f"torch.tensor({[bool(draw.getrandbits(1)) for _ in range(TOKENS - 1)] + [True]})[:, None]",
        "k": f"torch.tensor({[round(draw.uniform(0.5, 2.0), 2) for _ in range(width)]}, dtype=torch.float64)",
    }
    for name, make in (
        ("w", lambda: scope.parameter(*draw.choice(shapes))),
        ("v", lambda: scope.parameter(width)),
        ("u", lambda: scope.parameter(width)),
        ("m", lambda: scope.parameter(width, width)),
        ("c", lambda: scope.constant(width)),
    ):
        if f"{{{name}}}" in template:
            values[name] = make()
    return template.format_map(values)


FAMILIES: dict[str, dict[str, Entry]] = {
    family: {template: _filled(template) for template in templates}
    for family, templates in (
        ("homogeneous", HOMOGENEOUS),
        ("movement", MOVEMENT),
        ("nonlinear", NONLINEAR),
        ("arithmetic", ARITHMETIC),
        ("products", PRODUCTS),
        ("in place", IN_PLACE),
    )
}
