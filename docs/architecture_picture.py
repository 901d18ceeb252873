"""Draws docs/architecture.svg from the imports of autoquant/: `make picture`.

One box for each layer, an arrow from each to what it imports. Arrows that follow from others are left out: where
cli imports api and api imports config, none is drawn from cli to config. Boxes stand in rows, importers above; an
arrow over several rows has a place of its own in each (Sugiyama's layout), so that no arrow crosses a box.
"""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, GAP, LANE, ROW = 128, 34, 26, 16, 74

STYLE = """
  .box { fill: #eef2f8; stroke: #44597a; } .name { fill: #14202f; font: 600 14px system-ui, sans-serif; }
  .arrow { fill: none; stroke: #7b8ba3; stroke-width: 1.3; } .head { fill: #7b8ba3; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #1d2838; stroke: #8ba3c7; } .name { fill: #e8eef7; }
    .arrow { stroke: #6d7f99; } .head { fill: #6d7f99; }
  }
"""

Node = tuple[str, int]
"""A layer with its row, or where an arrow passes a row ('cli>io')."""


def layer_imports(package: Path) -> dict[str, set[str]]:
    """The layers that each layer imports, those inside of functions included."""
    imports: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        layer = path.relative_to(package).parts[0].removesuffix(".py")
        if layer.startswith("__"):
            continue
        targets = imports.setdefault(layer, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "autoquant":
                parts = (node.module or "").split(".")[1:]
                targets.update([parts[0]] if parts else [name.name for name in node.names])
    return {layer: {t for t in targets if t in imports and t != layer} for layer, targets in imports.items()}


def rows_of(imports: dict[str, set[str]]) -> dict[str, int]:
    """The row of each layer, from the bottom: one above the highest that it imports."""
    rows: dict[str, int] = {}

    def row(layer: str, above: tuple[str, ...] = ()) -> int:
        if layer in above:
            raise SystemExit(f"imports in a circle: {' -> '.join([*above, layer])}")
        if layer not in rows:
            rows[layer] = 1 + max((row(other, (*above, layer)) for other in sorted(imports[layer])), default=-1)
        return rows[layer]

    for layer in imports:
        row(layer)
    return rows


def without_the_implied(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others."""

    def reached(layer: str) -> set[str]:
        return imports[layer].union(*(reached(other) for other in imports[layer]))

    return {a: {b for b in bs if not any(b in reached(c) for c in bs - {b})} for a, bs in imports.items()}


def arranged(imports: dict[str, set[str]], rows: dict[str, int]) -> tuple[list[list[Node]], list[list[Node]]]:
    """Each row's nodes from left to right, and each arrow as the nodes that it passes."""
    table: list[list[Node]] = [[] for _ in range(max(rows.values()) + 1)]
    for layer, row in rows.items():
        table[row].append((layer, row))
    arrows = []
    for a, bs in imports.items():
        for b in sorted(bs):
            lanes = [(f"{a}>{b}", row) for row in range(rows[a] - 1, rows[b], -1)]
            for lane in lanes:
                table[lane[1]].append(lane)
            arrows.append([(a, rows[a]), *lanes, (b, rows[b])])
    steps = [step for arrow in arrows for step in pairwise(arrow)]
    for sweep in range(24):  # each row in the order of the mean place of its neighbours above, then below
        side = 1 if sweep % 2 else -1
        for nodes in table[::side]:
            places = {node: i / max(len(row), 1) for row in table for i, node in enumerate(row)}
            near: dict[Node, list[float]] = {node: [] for node in nodes}
            for upper, lower in steps:
                if side > 0 and upper in near:
                    near[upper].append(places[lower])
                if side < 0 and lower in near:
                    near[lower].append(places[upper])
            nodes.sort(key=lambda n: (sum(near[n]) / len(near[n]) if near[n] else places[n], n[0]))
    return table, arrows


def picture(package: Path = ROOT / "autoquant") -> str:
    """The SVG's text, the same for the same imports."""
    imports = layer_imports(package)
    rows = rows_of(imports)
    table, arrows = arranged(without_the_implied(imports), rows)
    widths = [sum(LANE if ">" in name else WIDTH + GAP for name, _ in nodes) for nodes in table]
    width, height = max(widths) + 2 * GAP, len(table) * ROW
    middle: dict[Node, float] = {}
    for nodes, wide in zip(table, widths, strict=True):
        x = (width - wide) / 2
        for node in nodes:
            step = LANE if ">" in node[0] else WIDTH + GAP
            middle[node] = x + step / 2
            x += step

    def top(node: Node) -> float:
        return height - (node[1] + 1) * ROW + (ROW - HEIGHT) / 2

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="The layers of autoquant and what each imports">',
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 8 4 0 8z"/></marker>',
    ]
    for arrow in arrows:
        path = f"M{middle[arrow[0]]:.0f} {top(arrow[0]) + HEIGHT:.0f}"
        for upper, lower in pairwise(arrow):
            start, end = top(upper) + HEIGHT, top(lower)
            bend = (start + end) / 2
            path += f" C{middle[upper]:.0f} {bend:.0f} {middle[lower]:.0f} {bend:.0f} {middle[lower]:.0f} {end:.0f}"
            path += "" if lower is arrow[-1] else f" v{HEIGHT}"
        lines.append(f'<path class="arrow" marker-end="url(#head)" d="{path}"/>')
    for layer, row in rows.items():
        x, y = middle[layer, row], top((layer, row))
        lines += [
            f'<rect class="box" x="{x - WIDTH / 2:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>',
            f'<text class="name" x="{x:.0f}" y="{y + HEIGHT / 2 + 5:.0f}" text-anchor="middle">{escape(layer)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(picture(), encoding="utf-8")
