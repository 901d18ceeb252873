"""Every model type that transformers registers for a kind of language model: analysed, proved, and one row each.

torch and transformers are imported once; each type then runs in a forked process of its own, so that a crash, a hang
or a model that eats memory costs one row. A type of several kinds has a row for each. Finished rows are kept in a
folder and used again, so that an interrupted survey goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from typing import TYPE_CHECKING, Any

from autoquant.config.layers import LAYER
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError
from autoquant.io.files import write_text
from autoquant.models.tasks import KINDS, Kind, full_name, split_name

if TYPE_CHECKING:
    from autoquant.config.format import Config

Row = dict[str, Any]
TIMEOUT = 600.0
"""Seconds that one type may take."""

_PR_SET_PDEATHSIG = 1  # prctl(2): a signal to this process when the one that started it ends

_BEFORE_FORKING = """transformers.modeling_utils transformers.models.auto.modeling_auto torch._dynamo torch.export
autoquant.analyzer.analyze autoquant.certificate.certify autoquant.survey.generate autoquant.models.load
autoquant.report.summary"""


def registered(kinds: Sequence[Kind] = KINDS) -> list[str]:
    """Every model type of ``kinds`` by its full name, sorted within each kind."""
    from autoquant.models.auto_classes import registered_types

    return [full_name(model_type, kind) for kind in kinds for model_type in registered_types(kind)]


def chosen_names(names: Sequence[str], kinds: Sequence[str] | None, types: Sequence[str] | None) -> list[str]:
    """Those of full ``names`` that are of ``kinds`` and of ``types``, where these are given.

    A type is a full name, or a model type of whatever kind. Raises AutoQuantError where one is none of ``names``.
    """
    for kind in kinds or ():
        if kind not in KINDS:
            raise AutoQuantError(f"--kinds: there is no kind '{kind}'{did_you_mean(kind, KINDS)}")
    chosen = [name for name in names if kinds is None or split_name(name)[1] in kinds]
    if types is None:
        return chosen
    wanted: set[str] = set()
    for given in types:
        same = {name for name in chosen if given in (name, split_name(name)[0], "/".join(reversed(split_name(name))))}
        if not same:
            near = did_you_mean(given, [*chosen, *(split_name(name)[0] for name in chosen)])
            of = f" of {', '.join(kinds)}" if kinds else ""
            raise AutoQuantError(f"--types: there is no model type '{given}'{of}{near}")
        wanted |= same
    return [name for name in chosen if name in wanted]


def examine(name: str, configs: Path | None = None) -> Row:
    """One row: how the type was captured, what it allows, what is proved, or why not. Never raises AutoQuantError.

    A proved config that claims something is written to ``configs``, where that is a folder.
    """
    from autoquant.analyzer.analyze import analyze
    from autoquant.certificate.certify import certify
    from autoquant.models.repair import find_source
    from autoquant.survey.generate import offers, save

    row = _row(name)
    model_type, kind = split_name(name)
    start = time.perf_counter()
    try:
        source = find_source(model_type, kind=kind)
        analyzed = analyze(source)
    except AutoQuantError as error:
        return row | {"captured": None, "reason": error.message, "seconds": round(time.perf_counter() - start, 1)}
    if source.repairs:
        row["repaired"] = {name: str(value) for name, value in source.repairs.items()}
    row |= {"captured": analyzed.captured.how, **claimed(analyzed.config)}
    row |= {
        "unknown_operators": list(analyzed.findings.unknown_operators),
        "steps": {step: round(seconds, 2) for step, seconds in analyzed.seconds.items()},
    }
    proving = time.perf_counter()
    try:
        proved = certify(analyzed, source)
        if proved.certificate is not None:
            row["certificate"] = {line.kind: line.worst for line in proved.certificate.rows}
            row["dtype"] = proved.certificate.dtype
        if refused := refused_claims(proved):
            row |= {**claimed(proved), "refused": refused}  # what is written, and what was claimed besides
        if configs is not None and offers(proved):
            save(proved, configs, name)
    except AutoQuantError as error:
        row["unproved"] = error.message
    now = time.perf_counter()
    row["steps"]["certificate"] = round(now - proving, 2)
    return row | {"seconds": round(now - start, 1)}


def claimed(config: Config) -> Row:
    """What a config says of a type."""
    from autoquant.report.summary import because

    stacks = stacks_of(config)
    residual = [space.size for space in config.rotation.spaces if space.kind == "R1"]
    tables = [because(b) for b in config.blocked if b.what == "rotation" and LAYER not in b.path]
    return {
        "layers": config.model.layers,
        "parameters": config.model.parameters,
        "linears": sum(stack["linears"] for stack in stacks.values()),
        "smoothable": sum(stack["smoothable"] for stack in stacks.values()),
        "stacks": stacks,
        "untraced": {b.path: b.reason for b in config.blocked if b.operator == "forward"},
        "groups": len(config.smoothing.groups),
        "residual": residual,
        "residual_blocked": tables[0] if tables and not residual else None,
        "spaces": len(config.rotation.spaces),
        "online": len(config.rotation.online),
        "blocked": sorted({f"{b.what}: {because(b)}" for b in config.blocked}),
    }


def refused_claims(config: Config) -> list[str]:
    """What the analysis claimed and the proof took out, in words."""
    from autoquant.certificate.claims import REFUSED

    return [
        f"{b.what} of {b.path}{'' if b.layers is None else f' in layers {b.layers}'}: {b.reason}"
        for b in config.blocked
        if b.reason.startswith(REFUSED)
    ]


def stacks_of(config: Config) -> dict[str, Row]:
    """What each stack of layers holds: linears, those that smoothing reaches, sizes of rotated residual streams.

    A stack goes by the path before ``{layer}``, so that the towers of a model are apart; ``''``: what is in none.
    """
    from autoquant.report.summary import reached, stack_of

    found: dict[str, Row] = {}
    for linear in config.model.linears:
        flags = reached(config, linear).values()
        stack = found.setdefault(stack_of(linear.path), {"linears": 0, "smoothable": 0, "residual": []})
        stack["linears"] += len(flags)
        stack["smoothable"] += sum(flags)
    for space in config.rotation.spaces:
        for path in {stack_of(writer.path) for writer in space.writers} & set(found) - {""}:
            if space.name.startswith("residual"):  # a tower's too, which no table starts
                found[path]["residual"].append(space.size)
    return found


def survey(
    names: Sequence[str],
    folder: Path,
    *,
    jobs: int,
    timeout: float = TIMEOUT,
    done: Callable[[Row], None] = lambda row: None,
    make: Callable[[str], Row] = examine,
) -> list[Row]:
    """Rows of ``names``, made ``jobs`` at a time by ``make``; those that ``folder`` holds are not made again.

    However it ends, no process stays behind; where this one is killed (Linux), the kernel kills those that it started.
    Raises AutoQuantError where the platform cannot fork.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind in {split_name(name)[1] for name in names}:
        (folder / full_name("x", kind)).parent.mkdir(exist_ok=True)
    rows = {name_of(row): row for row in finished(folder)}
    for row in _rows([name for name in names if name not in rows], folder, jobs, timeout, make):
        rows[name_of(row)] = row
        write_text(folder / f"{name_of(row)}.json", json.dumps(row, indent=2) + "\n", force=True)
        done(row)
    return [rows[name] for name in names]


def finished(folder: Path) -> Iterator[Row]:
    """Rows of ``folder`` that were made with the versions at hand."""
    for path in sorted(folder.rglob("*.json")):
        row: Row = json.loads(path.read_text(encoding="utf-8"))
        if "kind" in row and row | _row(name_of(row)) == row:
            yield row


def name_of(row: Row) -> str:
    """The full name of a row's type."""
    return full_name(row["type"], row["kind"])


def _row(name: str) -> Row:
    model_type, kind = split_name(name)
    return {
        "kind": kind,
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
                    target=_child, args=(make, name, _unfinished(folder, name), os.getpid())
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


def _child(make: Callable[[str], Row], name: str, file: Path, parent: int) -> None:
    """Make one row and write it to ``file``; the parent decides what an interruption means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before
            os._exit(1)
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
