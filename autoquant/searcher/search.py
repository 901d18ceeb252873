"""The knobs of a config, set one after the other by what they do on held-out calibration text.

The text of the evaluation is never seen: a part of the calibration windows fits scales and weights, another part
judges. A knob is turned if the quantized model comes closer to the float model, in KL divergence per token, by more
than the standard error of the paired difference; of several settings of one knob the best is taken. Every knob that is
turned goes into the config with its evidence.

The order is that of the model's own pipeline, so that each knob is judged with those before it in place.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from autoquant.config.format import Config, Decision, Search, edited
from autoquant.errors import AutoQuantError
from autoquant.searcher.candidates.candidate import Candidate
from autoquant.searcher.candidates.knobs import KNOBS
from autoquant.searcher.judge import Judged, Searcher, Task
from autoquant.steps import Progress, silent

SHOWN = 70
"""Characters of a candidate that a step is called by."""
TOO_LARGE = "needs the whole model in float32, which the device does not hold: left out"
UNIT = "KL divergence from float on held-out windows, nats per token"


def search(
    task: Task,
    config: Config,
    budget: float = math.inf,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Config:
    """The config with every knob that helps turned, and the evidence. ``budget``: minutes, after which nothing new is
    begun; as long as it is not reached the result depends on ``task`` and ``config`` alone. ``tell`` is told of each
    candidate that was judged, ``progress`` of what is done for the present one.

    Raises AutoQuantError, before the work, where ``task.served`` does not take the config as it is.
    """
    end = time.monotonic() + budget * 60
    if reasons := task.served.refused(config):
        raise AutoQuantError("what is searched for cannot be served", tuple(reasons)[:20])
    searcher = Searcher(task, tell, progress)
    start = best = searcher.judge(config)
    tell(f"as it is: {_shown(start)}")
    digest = _digest((*task.fit, *task.held_out))
    earlier = _gone_on_from(config.search, task, digest)
    decisions = [] if earlier is None else list(earlier.decisions)
    if decisions:
        tell(f"goes on from {len(decisions)} decisions of an earlier search with the same windows")
    for name in KNOBS:
        if name not in task.knobs:
            continue
        tried: list[tuple[Judged, Candidate]] = []
        for candidate in _offered(name, searcher, best):
            if task.offline and candidate.online:
                continue
            said = f"{candidate.where} = {candidate.choice}"
            if refused := task.served.refused(candidate.config):
                tell(f"{said}: not served: {refused[0]}")
                continue
            if time.monotonic() > end:
                tell("the budget is used up")
                break
            try:
                judged = searcher.judge(candidate.config, said if len(said) <= SHOWN else f"{said[: SHOWN - 1]}…")
            except AutoQuantError as error:  # a knob that this model cannot have
                tell(f"{said}: {error.message}")
                continue
            except torch.OutOfMemoryError:
                tell(f"{said}: {TOO_LARGE}")
                continue
            tell(f"{said}: {_shown(judged)}")
            tried.append((judged, candidate))
        if not tried:
            continue
        found, chosen = min(tried, key=lambda pair: pair[0].divergence)
        if found.better_than(best):
            decisions.append(_decision(chosen, best, found))
            best = found
    ratio = best.perplexity_ratio
    record = Search(
        strategy=task.strategy,
        seed=task.seed,
        calibration=task.calibration,
        digest=digest,
        fitted=len(task.fit),
        held_out=sum(len(ids) for ids in task.held_out),
        before=_percent(start.perplexity_ratio.mean) if earlier is None else earlier.before,
        after=_percent(ratio.mean),
        standard_error=round(100 * ratio.standard_error, 3) if math.isfinite(ratio.standard_error) else 0.0,
        decisions=tuple(decisions),
    )
    section = edited(best.config.quantization, strategy=task.strategy)
    return edited(best.config, search=record, quantization=section)


def _offered(name: str, searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """The settings of a knob, as far as the device holds what it takes to think of them."""
    try:
        yield from KNOBS[name](searcher, best)
    except torch.OutOfMemoryError:
        searcher.tell(f"{name}: {TOO_LARGE}")


def _gone_on_from(earlier: Search | None, task: Task, digest: str) -> Search | None:
    """The search that this one goes on from, whose evidence is kept: of the same strategy, judged on the same windows.

    What was changed by hand in between shows as a step from one decision's ``after`` to the next one's ``before``.
    """
    alike = earlier is not None and earlier.strategy is task.strategy and earlier.digest == digest
    return earlier if alike else None


def _shown(judged: Judged) -> str:
    ratio = judged.perplexity_ratio
    return (
        f"perplexity {_percent(ratio.mean):+.2f} ± {100 * ratio.standard_error:.2f} %, KL {judged.divergence:.5f} nats"
    )


def _percent(ratio: float) -> float:
    return round(100 * (ratio - 1), 3) if math.isfinite(ratio) else 1e9


def _digest(windows: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(ids.cpu().numpy().tobytes())
    return digest.hexdigest()


def _decision(chosen: Candidate, before: Judged, after: Judged) -> Decision:
    return Decision(
        where=chosen.where,
        choice=chosen.choice,
        unit=UNIT,
        before=float(f"{before.divergence:.4g}"),
        after=float(f"{after.divergence:.4g}"),
        cost=chosen.cost,
    )
