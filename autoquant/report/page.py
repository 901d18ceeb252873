"""A config, and what was measured with it, as one page that needs nothing else: no network, no server.

Every word of it is HTML, also without scripts; ECharts draws the figures, each of which has a table beside it. What
users chose (names of models, groups, tokens) is escaped, and the page's own policy lets no script run but its own two.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from autoquant.config.format import Config
from autoquant.io.inert import inert
from autoquant.report.diagram import LayerKind, layer_kinds
from autoquant.report.page_parts import KINDS, Part, parts, tiles
from autoquant.report.residual import residual
from autoquant.version import __version__

ASSETS = Path(__file__).parent / "assets"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="AutoQuant {version}">
<title>{title} · AutoQuant</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="top">
<div class="eyebrow"><span>AutoQuant report</span><button id="theme" type="button">Dark theme</button></div>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{tiles}
</header>
<nav aria-label="Parts of the report"><ul>{links}</ul></nav>
<main id="main">
{body}
</main>
<footer><p>AutoQuant {version}; figures drawn by Apache ECharts. This page is complete: it loads nothing.</p></footer>
<script type="application/json" id="data">{data}</script>
<script>{charts}</script>
<script>{script}</script>
</body>
</html>
"""


def page(config: Config, measured: Mapping[str, Any] | None = None, compared: Mapping[str, Any] | None = None) -> str:
    """The page of a config; ``measured`` as :func:`autoquant.report.measure.measure` has it, ``compared`` as the JSON
    of ``autoquant compare``.
    """
    kinds = layer_kinds(config)
    streams = residual(config, kinds)
    shown = parts(config, kinds, streams, measured, compared)
    charts, script = (_asset(name) for name in ("echarts.min.js", "page.js"))
    data = {"layers": [_layer(kind) for kind in kinds], "residual": streams, "measured": measured, "kinds": KINDS}
    facts = config.model
    return _PAGE.format(
        hashes=" ".join(_hash(text) for text in (charts, script)),
        version=__version__,
        title=escape(inert(config.provenance.model)),
        lead=f"{facts.layers} layers, {facts.parameters:,} parameters: what its graph lets quantization do, proved.",
        style=_asset("page.css"),
        tiles=tiles(config),
        links="".join(f'<li><a href="#{part.key}">{escape(part.short)}</a></li>' for part in shown),
        body="\n".join(_section(part) for part in shown),
        data=_json(data),
        charts=charts,
        script=script,
    )


def _section(part: Part) -> str:
    title = f"{part.key}-title"
    return (
        f'<section id="{part.key}" aria-labelledby="{title}"><h2 id="{title}">{escape(part.title)}</h2>'
        f'<p class="lead">{escape(part.lead)}</p>{part.html}</section>'
    )


def _layer(kind: LayerKind) -> dict[str, Any]:
    """A diagram as JSON; every group and space that has a line, in the order of their lines."""
    return {
        "title": kind.title,
        "boxes": [
            {
                "key": box.key,
                "name": box.name,
                "kind": box.kind,
                "shape": box.shape,
                "count": box.count,
                "row": box.row,
                "about": [*box.about, *(text for text in box.blocked if text not in box.about)],
                "blocked": box.blocked,
            }
            for box in kind.boxes
        ],
        "lines": [{"start": line.start, "end": line.end, "kind": line.kind, "of": line.of} for line in kind.lines],
        "groups": [{"name": name} for name in kind.groups],
    }


def _json(value: Any) -> str:
    """JSON that stands within a script element: no tag can begin in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """What a policy calls a script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
