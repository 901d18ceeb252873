"""The text that ``autoquant analyze --explain`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoquant.analyzer.explain import Answer, Explanation, rename
from autoquant.config.layers import LAYER

MAX_OPERATOR = 36


def explanation_text(explanation: Explanation, asked: str) -> str:
    """Lines for a person who knows neither the model's code nor this one. ``asked``: the path as it was given."""
    linear = explanation.linear
    experts = f", for each of {linear.stack} experts" if linear.stack else ""
    role = {"linear": "", "router": "; it chooses or weights experts", "lm_head": "; it writes the logits"}[linear.role]
    shown = rename(linear.path, explanation.rename)
    lines = [f"{shown}: a linear from {linear.in_features} to {linear.out_features} channels{experts}{role}"]
    if explanation.layers is not None:
        lines.append(f"The same holds in layers {explanation.layers}.")
    if LAYER not in asked and asked not in (shown, rename(linear.weight, explanation.rename)):
        lines.append(f"{asked} is one of them and was not traced by itself.")
    lines += ["", *_answer("Smoothable", explanation.smoothing, explanation.rename)]
    lines += ["", *_answer("Rotatable", explanation.rotation, explanation.rename)]
    return "\n".join(lines)


def _answer(title: str, answer: Answer, renamed: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield rename(f"{title}: {answer.verdict}", renamed)
    for chain in answer.chains:
        yield f"  {chain.title}:"
        operators = [_short(step.operator) for step in chain.steps]
        places = [rename(step.at, renamed) for step in chain.steps]
        width, wide = max(map(len, operators)), max(map(len, places))
        for number, (operator, at, step) in enumerate(zip(operators, places, chain.steps, strict=True), start=1):
            yield f"  {number:3}. {operator:{width}}  {at:{wide}}  {rename(step.effect, renamed)}".rstrip()
    yield from (f"  - {rename(note, renamed)}" for note in answer.notes)


def _short(operators: str) -> str:
    """``'aten.view, transpose, +3'``: the name space once, the first few of a long run."""
    first, *rest = operators.split(", ")
    names = [first, *(name.removeprefix("aten.") for name in rest)]
    for kept in range(len(names), 0, -1):
        text = ", ".join(names[:kept]) + (f", +{len(names) - kept}" if kept < len(names) else "")
        if len(text) <= MAX_OPERATOR:
            return text
    return first
