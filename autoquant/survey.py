"""Every causal language model type that transformers registers: analysed, proved, and one row each.

torch and transformers are imported once; each type then runs in a forked process of its own, so that a crash, a hang
or a model that eats memory costs one row. Finished rows are kept in a folder and used again, so that an interrupted
survey goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from autoquant.errors import AutoQuantError
from autoquant.files import write_text
from autoquant.paths import LAYER

Row = dict[str, Any]
TIMEOUT = 300.0
"""Seconds that one type may take."""

_BEFORE_FORKING = """transformers.modeling_utils transformers.models.auto.modeling_auto torch._dynamo torch.export
autoquant.analyze autoquant.certify autoquant.generate autoquant.models autoquant.report.summary"""


def registered_types() -> list[str]:
    """Every model type of ``AutoModelForCausalLM``, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(model_type: str, configs: Path | None = None) -> Row:
    """One row: how the type was captured, what it allows, what is proved, or why not. Never raises AutoQuantError.

    A proved config that claims something is written to ``configs``, where that is a folder, and any other removed.
    """
    from autoquant.analyze import analyze
    from autoquant.certify import certify
    from autoquant.generate import offers, save
    from autoquant.models import resolve
    from autoquant.report.summary import because, reached

    row = _row(model_type)
    start = time.perf_counter()
    stale = configs / f"{model_type}.json" if configs is not None else None
    try:
        source = resolve(model_type)
        analyzed = analyze(source)
    except AutoQuantError as error:
        if stale is not None:
            stale.unlink(missing_ok=True)
        return row | {"captured": None, "reason": error.message, "seconds": round(time.perf_counter() - start, 1)}
    if source.repairs:
        row["repaired"] = {name: str(value) for name, value in source.repairs.items()}
    config = analyzed.config
    linears = [whole for linear in config.model.linears for whole in reached(config, linear).values()]
    residual = [space.size for space in config.rotation.spaces if space.kind == "R1"]
    tables = [because(b) for b in config.blocked if b.what == "rotation" and LAYER not in b.path]
    row |= {
        "captured": analyzed.captured.how,
        "layers": config.model.layers,
        "parameters": config.model.parameters,
        "linears": len(linears),
        "smoothable": sum(linears),
        "groups": len(config.smoothing.groups),
        "residual": residual[0] if residual else None,
        "residual_blocked": tables[0] if tables and not residual else None,
        "spaces": len(config.rotation.spaces),
        "online": len(config.rotation.online),
        "blocked": sorted({f"{b.what}: {because(b)}" for b in config.blocked}),
        "unknown_operators": list(analyzed.findings.unknown_operators),
        "steps": {step: round(seconds, 2) for step, seconds in analyzed.seconds.items()},
    }
    proving = time.perf_counter()
    try:
        proved = certify(analyzed, source)
        if proved.certificate is not None:
            row["certificate"] = {line.kind: line.worst for line in proved.certificate.rows}
            row["dtype"] = proved.certificate.dtype
        if stale is not None and offers(proved):
            save(proved, stale)
            stale = None
    except AutoQuantError as error:
        row["unproved"] = error.message
    if stale is not None:
        stale.unlink(missing_ok=True)
    now = time.perf_counter()
    row["steps"]["certificate"] = round(now - proving, 2)
    return row | {"seconds": round(now - start, 1)}


def survey(
    types: Sequence[str],
    folder: Path,
    *,
    jobs: int,
    timeout: float = TIMEOUT,
    done: Callable[[Row], None] = lambda row: None,
    make: Callable[[str], Row] = examine,
) -> list[Row]:
    """Rows of ``types``, made ``jobs`` at a time by ``make``; those that ``folder`` holds are not made again.

    When it returns or raises, by Ctrl-C too, no process stays behind; what ends this process from outside (SIGTERM)
    leaves those that run. Raises AutoQuantError where the platform cannot fork.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {row["type"]: row for row in finished(folder) if row["type"] in types}
    for row in _rows([name for name in types if name not in rows], folder, jobs, timeout, make):
        rows[row["type"]] = row
        write_text(folder / f"{row['type']}.json", json.dumps(row, indent=2) + "\n", force=True)
        done(row)
    return [rows[name] for name in types]


def finished(folder: Path) -> Iterator[Row]:
    """Rows of ``folder`` that were made with the versions at hand."""
    for path in sorted(folder.glob("*.json")):
        row: Row = json.loads(path.read_text(encoding="utf-8"))
        if row | _row(row["type"]) == row:
            yield row


def _row(model_type: str) -> Row:
    return {
        "type": model_type,
        "torch": version("torch").partition("+")[0],  # without the kind of build
        "transformers": version("transformers"),
    }


def _rows(names: Sequence[str], folder: Path, jobs: int, timeout: float, make: Callable[[str], Row]) -> Iterator[Row]:
    """A row for each of ``names``, in the order in which they are finished."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise AutoQuantError("survey: this platform cannot fork; run it on Linux")
    if names:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module in _BEFORE_FORKING.split():
            import_module(module)
    waiting = list(reversed(names))
    running: dict[int, tuple[str, ForkProcess, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                process = multiprocessing.get_context("fork").Process(
                    target=_child, args=(make, name, _unfinished(folder, name))
                )
                process.start()
                running[process.sentinel] = name, process, time.monotonic() + timeout
            first = min(deadline for _, _, deadline in running.values())
            ended = wait(list(running), max(0.0, first - time.monotonic()))
            late = [sentinel for sentinel, (_, _, deadline) in running.items() if deadline <= time.monotonic()]
            for sentinel in [sentinel for sentinel in running if sentinel in ended or sentinel in late]:
                name, process, _ = running.pop(sentinel)
                process.kill()
                process.join()
                yield _outcome(
                    name, _unfinished(folder, name), process.exitcode, None if sentinel in ended else timeout
                )
    finally:
        for name, process, _ in running.values():
            process.kill()
            process.join()
            _unfinished(folder, name).unlink(missing_ok=True)


def _unfinished(folder: Path, name: str) -> Path:
    return folder / f"{name}.part"


def _child(make: Callable[[str], Row], name: str, file: Path) -> None:
    """Make one row and write it to ``file``; the parent decides what an interruption means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # Linux only: short of memory, the kernel then takes this process, no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        row = make(name)
    except Exception as error:  # a mistake of ours: the row says so, and the survey goes on
        row = _row(name) | _crash(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    file.write_text(json.dumps(row), encoding="utf-8")


def _outcome(name: str, file: Path, exitcode: int | None, timeout: float | None) -> Row:
    """The row that a process left, or one that says how it ended."""
    if timeout is not None:
        file.unlink(missing_ok=True)
        return _row(name) | {"captured": None, "reason": f"not finished after {timeout:.0f} s", "seconds": timeout}
    if exitcode == 0 and file.is_file():
        row: Row = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        return row
    file.unlink(missing_ok=True)
    if exitcode == -signal.SIGKILL:
        return _row(name) | _crash("killed, most likely for want of memory")
    how = (
        f"signal {signal.Signals(-exitcode).name}" if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
    )
    return _row(name) | _crash(how)


def _crash(how: str) -> Row:
    return {"captured": None, "reason": f"crashed: {how}", "crashed": True}
