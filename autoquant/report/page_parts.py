"""The parts of the page in HTML: titles, words and tables. Whatever a user named goes through :func:`text`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.certificate.claims import IN_WORDS, ran, standing
from autoquant.config.format import Config, SmoothingGroup, Space
from autoquant.report.diagram import LayerKind, used_group
from autoquant.report.html import chart, folded, table, text
from autoquant.report.measured_parts import measured_parts
from autoquant.report.summary import because, reached

KINDS = {
    "norm_linear": "smoothing: a norm's weight into the linears that read it",
    "linear_linear": "smoothing: rows of one linear into the columns of the next",
    "query_key": "queries against keys, of use for int8 key caches",
    "R1": "the residual stream, rotated once and for all in the weights",
    "R2": "the values of each head, rotated in the weights",
    "other": "a vector from one linear to another, rotated in the weights",
    "norm": "behind a norm",
}


_LAYERS = re.compile(r"\S*\{layer\}\.")


@dataclass(frozen=True, slots=True)
class Part:
    """A section: its anchor, its names in the navigation and above it, a sentence, and its HTML."""

    key: str
    short: str
    title: str
    lead: str
    html: str


def parts(
    config: Config,
    kinds: Sequence[LayerKind],
    streams: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any] | None,
    compared: Mapping[str, Any] | None,
) -> list[Part]:
    """All sections that there is something to say in, in the order of the page."""
    found = [_layers(config, kinds), _residual(config, streams)]
    if measured is not None:
        found += [Part(*part) for part in measured_parts(measured)]
    if compared is not None:
        found.append(_compared(compared))
    if config.search is not None:
        found.append(_search(config))
    return [*found, _proof(config), _claims(config)]


def tiles(config: Config) -> str:
    """The facts at a glance."""
    facts = config.model
    flags = [whole for linear in facts.linears for whole in reached(config, linear).values()]
    stream = [space for space in config.rotation.spaces if space.kind == "R1"]
    proved = standing(config) == "proved"
    worst = max((row.worst for row in config.certificate.rows), default=0.0) if config.certificate else 0.0
    heads = f"{facts.heads} heads" if facts.heads else ""
    over = f" over {facts.kv_heads} key/value" if facts.kv_heads and facts.kv_heads != facts.heads else ""
    rows = [
        ("", "Hidden size", f"{facts.hidden_size or 'unknown'}", f"{heads}{over}"),
        ("good" if all(flags) else "", "Smoothable", f"{sum(flags)} of {len(flags)}", "linears, layer by layer"),
        ("good" if stream else "bad", "Residual", "rotatable" if stream else "blocked", _residual_tile(config)),
        (
            "good" if proved else "bad",
            "Claims",
            IN_WORDS[standing(config)],
            f"off by {worst:.0e} at most" if proved else "",
        ),
        ("", "Strategy", *_strategy(config.quantization.strategy.value)),
    ]
    return (
        '<dl class="tiles">'
        + "".join(
            f'<div class="tile {kind}"><dt>{name}</dt><dd>{text(value)}<small>{text(more)}</small></dd></div>'
            for kind, name, value, more in rows
        )
        + "</dl>"
    )


def _residual_tile(config: Config) -> str:
    blocked = [b for b in config.blocked if b.what == "rotation"]
    if any(space.kind == "R1" for space in config.rotation.spaces):
        return "by any orthogonal matrix"
    return f"by {blocked[0].operator}" if blocked else "no such stream"


def _strategy(name: str) -> tuple[str, str]:
    """``'W per channel'`` and ``'A per token dynamic'``."""
    weights, _, rest = name.removeprefix("w_int8_").partition("_a_int8_")
    activations, _, cache = rest.partition("_kv_cache_int8_")
    said = f"activations {activations.replace('_', ' ')}" + (f", int8 cache {cache.replace('_', ' ')}" if cache else "")
    return f"int8 {weights.replace('_', ' ')}", said


def _layers(config: Config, kinds: Sequence[LayerKind]) -> Part:
    lead = (
        "Boxes are norms and linears, lines say who feeds whom: each colour is a group whose scales can be moved, or a "
        "space that can be rotated, with the function unchanged. What is dashed in red is blocked. Choose a group to "
        "see it alone."
    )
    html = "".join(_layer(config, index, kind) for index, kind in enumerate(kinds))
    return Part("layers", "Layers", "One layer of each kind", lead, html)


def _layer(config: Config, index: int, kind: LayerKind) -> str:
    used = used_group(config)
    chips = "".join(
        f'<li><button type="button" aria-pressed="false" data-layer="{index}" data-group="{number}">'
        f'<span class="swatch"></span>'
        f"<span>{text(_short(name))}<small>{text(used.get(name, ''))}</small></span></button></li>"
        for number, name in enumerate(kind.groups)
    )
    blocked = "".join(
        f'<p class="note"><strong>{text(box.name)}</strong>: {text(reason)}</p>'
        for box in kind.boxes
        for reason in box.blocked
    )
    rows = [
        (
            box.name,
            box.kind,
            box.shape + (f" x {box.count}" if box.count > 1 else ""),
            "; ".join(_short(t) for t in box.about),
        )
        for box in kind.boxes
    ]
    figure = chart(
        f"layer-{index}",
        f"Diagram: {kind.title}. The table below says the same.",
        "Hover or tap for channels and slots.",
    )
    shown = folded(
        "The same as a table", table(kind.title, ("box", "kind", "in → out", "groups, spaces and remarks"), rows)
    )
    return (
        f'<h3>{text(kind.title)}</h3><div class="diagram"><div>{figure}</div><div><ul class="groups" '
        f'aria-label="Groups and spaces">{chips}</ul>{blocked}</div></div>{shown}'
    )


def _short(name: str) -> str:
    """A name without the lists of layers, which the title says."""
    return _LAYERS.sub("", name)


def _residual(config: Config, streams: Sequence[Mapping[str, Any]]) -> Part:
    html = ""
    for index, stream in enumerate(streams):
        label = f"{stream['name']}: {len(stream['writes'])} writers and {len(stream['reads'])} readers over depth"
        html += chart(
            f"residual-{index}", label, f"{stream['name']}: {stream['size']:,} channels. Ctrl and the wheel zoom."
        )
        rows = [("writes", w["name"], w["layer"]) for w in stream["writes"]] + [
            ("reads", r["name"], r["layer"]) for r in stream["reads"]
        ]
        html += folded("The same as a table", table(label, ("", "module", "layer"), rows))
    for blocked in config.blocked:
        if blocked.what == "rotation" and not streams:
            html += f'<p class="note"><strong>{text(blocked.path)}</strong>: {text(because(blocked))}</p>'
    lead = (
        "Every vector that passes along the line can be rotated if all who write it and all who read it take part."
        if streams
        else "No rotation of the residual leaves this model's function unchanged; rotations while it runs still can."
    )
    return Part("residual", "Residual", "The residual stream", lead, html)


def _proof(config: Config) -> Part:
    certificate = config.certificate
    if certificate is None or not certificate.proved:
        why = "no certificate is in the file" if certificate is None else "the analysis was told to prove nothing"
        return Part("proof", "Proof", "The proof in words", f"Nothing was proved: {why}.", "")
    tried = sum(row.count for row in certificate.rows if row.kind != "all")
    worst = max((row.worst for row in certificate.rows), default=0.0)
    lead = (
        f"Each of {tried} claims was carried out alone, and all of them together, by the code that will do it to the "
        f"weights, on a small random model of this structure in {certificate.dtype}. No output changed by more than "
        f"{worst:.1e}; {certificate.tolerance:.0e} would have been an error, and wrong claims land above 1e-2. Claims: "
        f"{IN_WORDS[standing(config)]}."
    )
    rows = [(row.kind, row.count, f"{row.worst:.1e}", row.worst_name or "") for row in certificate.rows]
    html = table("What was tried", ("kind", "tried", "largest change", "where"), rows)
    if certificate.coverage is not None:
        html += f"<p>Run: {text(ran(certificate.coverage))}.</p>"
    return Part("proof", "Proof", "The proof in words", lead, html)


def _claims(config: Config) -> Part:
    groups = [
        (g.name, g.kind.value, g.layers or "", g.channels, _group_used(config, g)) for g in config.smoothing.groups
    ]
    spaces = [
        (s.name, s.kind, s.layers or "", s.size * s.blocks, _space_used(config, s)) for s in config.rotation.spaces
    ]
    online = [
        (o.path, f"online {o.kind}", o.layers or "", o.size, "on" if o.enable else "off")
        for o in config.rotation.online
    ]
    blocked = [(b.path, b.what, b.layers or "", because(b)) for b in config.blocked]
    html = table(
        "Groups, spaces and online rotations",
        ("name", "kind", "layers", "channels", "used"),
        [*groups, *spaces, *online],
    )
    if blocked:
        html += table("What is blocked", ("path", "what", "layers", "why"), blocked)
    return Part("claims", "All claims", "All that the config claims", "And what of it is switched on.", html)


def _group_used(config: Config, group: SmoothingGroup) -> str:
    return used_group(config)[group.name]


def _space_used(config: Config, space: Space) -> str:
    return used_group(config)[f"{space.kind} {space.name}"]


def _search(config: Config) -> Part:
    found = config.search
    assert found is not None
    rows = [(d.where, d.choice, f"{d.before:g}", f"{d.after:g}", d.unit, d.cost) for d in found.decisions]
    lead = (
        f"Perplexity on {found.held_out} held-out windows went from {found.before:+.2f} % to {found.after:+.2f} ± "
        f"{found.standard_error:.2f} % above float, in {len(rows)} decisions."
    )
    html = table("Decisions and their evidence", ("knob", "choice", "before", "after", "in", "cost at inference"), rows)
    return Part("search", "Search", "What the search decided", lead, html)


def _compared(report: Mapping[str, Any]) -> Part:
    cells = report["cells"]
    names = list(dict.fromkeys(cell["transforms"] or "" for cell in cells[1:]))
    by_key = {(cell["transforms"] or "", cell["strategy"]): cell for cell in cells[1:]}
    strategies = list(dict.fromkeys(cell["strategy"] for cell in cells[1:]))
    rows = [
        (s.removeprefix("w_int8_").replace("_", " "), *(_above(by_key.get((n, s))) for n in names)) for s in strategies
    ]
    lead = f"Perplexity above float ({cells[0]['perplexity']['mean']:.3f}) in percent, on {report['tokens']:,} tokens."
    return Part(
        "perplexity",
        "Perplexity",
        "Perplexity of every strategy",
        lead,
        table("Percent above float", ("weights, activations", *names), rows),
    )


def _above(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    ratio = cell["ratio_to_float"]
    if ratio["mean"] is None or not math.isfinite(ratio["mean"]):
        return "not finite"
    error = ratio["standard_error"]
    return f"{100 * (ratio['mean'] - 1):+.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")
