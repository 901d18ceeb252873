"""The parts of the page that need a model, in HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from autoquant.report.html import chart, choice, folded, table

Named = tuple[str, str, str, str, str]
"""Anchor, name in the navigation, title, lead, HTML."""

SIDES = {"before": "before", "after": "after the config's transforms"}


def measured_parts(measured: Mapping[str, Any]) -> Iterator[Named]:
    """What was measured, a part at a time."""
    yield _depth(measured)
    yield _tokens(measured)
    yield _noise(measured)
    if measured["cost"]:
        yield _cost(measured)


def _depth(measured: Mapping[str, Any]) -> Named:
    names, layers = measured["linears"], measured["layers"]
    figures = "".join(
        chart(f"depth-{side}", f"Heat map of linears over layers, {said}", f"{said.capitalize()}.")
        for side, said in SIDES.items()
    )
    rows = [
        (name, key, *(_span(measured[side][key][j]) for side in SIDES))
        for j, name in enumerate(names)
        for key in measured["measures"]
    ]
    spans = table("Smallest to largest over the layers", ("linear", "measure", *SIDES.values()), rows)
    html = (
        choice("measure", "Show", measured["measures"])
        + f'<div class="pair">{figures}</div>'
        + folded("The same as a table", spans)
    )
    lead = (
        f"What goes into each linear, on {measured['tokens']:,} tokens of {len(layers)} layers. One channel or "
        "one token that towers above the rest decides the int8 scale of all."
    )
    return "depth", "Outliers", "Outliers over depth", lead, html


def _tokens(measured: Mapping[str, Any]) -> Named:
    figures = "".join(
        chart(f"tokens-{side}", f"Heat map of layers over tokens, {said}", f"{said.capitalize()}.")
        for side, said in SIDES.items()
    )
    choices = {str(j): name for j, name in enumerate(measured["linears"])}
    first = len(measured["linears"]) - 1
    rows = []
    for j, name in enumerate(measured["linears"]):
        for side, said in SIDES.items():
            found = [
                (value, t, layer)
                for layer, row in zip(measured["layers"], measured[side]["tokens"][j], strict=True)
                for t, value in enumerate(row)
                if value is not None
            ]
            if found:
                value, token, layer = max(found)
                rows.append((name, said, f"{value:.4g}", f"{token}: {measured['text'][token]}", layer))
    largest = table("The largest token of the first window", ("linear", "", "largest value", "token", "layer"), rows)
    html = (
        choice("token-linear", "Input of", choices, str(first))
        + f'<div class="pair">{figures}</div>'
        + folded("The same as a table", largest)
    )
    lead = (
        "The largest value of each token, layer by layer. An attention sink is a bright column, often the first token."
    )
    return "tokens", "Tokens", "Tokens: is there a sink?", lead, html


def _noise(measured: Mapping[str, Any]) -> Named:
    names = {name: _in_words(name) for name in measured["snr"]}
    figures = "".join(
        chart(f"snr-{side}", f"Heat map of signal to noise, {said}", f"{said.capitalize()}.")
        for side, said in SIDES.items()
    )
    rows = [
        (linear, names[name], *(_median(measured["snr"][name][side][j]) for side in SIDES))
        for j, linear in enumerate(measured["linears"])
        for name in names
    ]
    shown = table("Median over the layers, in dB", ("linear", "weights / activations", *SIDES.values()), rows)
    own = next(name for name in names if measured["strategy"].startswith(name))
    html = (
        choice("snr-strategy", "Weights / activations", names, own)
        + f'<div class="pair">{figures}</div>'
        + folded("The same as a table", shown)
    )
    lead = (
        "How far each linear's output is from float when its input and weight are int8, in decibels: 20 dB more is ten "
        "times less error."
    )
    return "noise", "Noise", "Signal to noise in int8", lead, html


def _cost(measured: Mapping[str, Any]) -> Named:
    rows = [
        (one["path"], f"{one['percent']:+.3f}", f"{one['decibels']:.1f}")
        for one in measured["cost"]
        if one["percent"] is not None
    ]
    label = f"Bars: {len(rows)} linears by what each costs"
    html = chart("cost", label, "Perplexity above float, in percent, with this linear alone in int8.")
    html += folded("The same as a table", table(label, ("linear", "% above float", "dB"), rows))
    lead = (
        f"The {len(rows)} linears of the worst signal to noise under {_in_words(measured['strategy'])}, each quantized "
        "alone, on text that calibration did not see."
    )
    return "cost-of-each", "Cost", "Which linears cost most", lead, html


def _in_words(strategy: str) -> str:
    weights, _, rest = strategy.removeprefix("w_int8_").partition("_a_int8_")
    return f"{weights} / {rest.partition('_kv_cache')[0]}".replace("_", " ")


def _span(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{min(there):.3g} to {max(there):.3g}" if there else ""


def _median(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{median(there):.1f}" if there else ""
