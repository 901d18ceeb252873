"""Runs that are killed at random moments: ``python benchmarks/kills.py``.

Each command writes over the output of an earlier run and gets SIGKILL after a random time, 30 times (``--kills``).
After each kill the output must be the old or the new one, whole, by its bytes; of `compare`, which is filled cell by
cell, every file must be whole and no finished cell lost. Then a run that nobody kills must leave nothing but the
output, the same as one that never was killed. At last two runs go into one output at once: the second must be refused,
the first finish; `export` and `import` hold theirs for one short write, and are not tried so. With ``--llmc PYTHON``,
an interpreter that has llmcompressor, its own checkpoints are converted too. Exits with 1 where any of that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "autoquant" / "data"
MODEL, TEXT = DATA / "wikinano1m", DATA / "sample.calibration.txt"
SMALL = ["--calibration", str(TEXT), "--sequences", "2", "--length", "32"]
STATIC = "w_int8_per_channel_a_int8_per_tensor_static"
COMPARE = ["--data", str(TEXT), "--strategies", STATIC, "--transforms", "none,fc_fc,rotation,fc_fc+rotation"]


SHORT = ("export", "import")
"""Commands that write one small file at their end."""


def commands(config: Path, theirs: bool) -> dict[str, Callable[[Path, int], list[str]]]:
    """The command lines for an output and a seed. ``theirs``: there are folders of LLM Compressor."""
    model, given = str(MODEL), str(config)
    convert = {
        "convert, of LLM Compressor": lambda out, seed: [
            *["convert", str(config.with_name(f"theirs-{seed}")), "-o", str(out), "--force", "--to", "native"],
        ],
    }
    return {
        "apply": lambda out, seed: ["apply", model, given, "-o", str(out), "--force", "--seed", str(seed), *SMALL],
        "quantize": lambda out, seed: [
            *["quantize", model, given, "-o", str(out), "--force", "--seed", str(seed), "--strategy", STATIC, *SMALL],
            *["--format", "native"],
        ],
        "quantize, served": lambda out, seed: [
            *["quantize", model, given, "-o", str(out), "--force", "--seed", str(seed), "--strategy", STATIC, *SMALL],
            *["--target", "vllm"],
        ],
        "convert": lambda out, seed: [
            *["convert", str(config.with_name(f"native-{seed}")), "-o", str(out), "--force"],
            *["--to", "compressed-tensors", "--target", "vllm"],
        ],
        "search": lambda out, seed: [
            *["search", model, given, "-o", str(out), "--force", "--seed", str(seed), "--strategy", STATIC, *SMALL],
            *["--held-out", "2", "--knobs", "alpha"],
        ],
        "compare": lambda out, seed: [
            *["compare", model, "--config", given, "-o", str(out), "--tokens", "256", *SMALL, *COMPARE],
        ],
        "export": lambda out, seed: [
            *["export", str(config.with_name(f"config-{seed}.json")), "--to", "quark", "-o", str(out), "--force"],
        ],
        "import": lambda out, seed: [
            *["import", str(config.with_name(f"recipe-{seed}.yaml")), model, "--from", "llm-compressor"],
            *["-o", str(out), "--force"],
        ],
        **(convert if theirs else {}),
    }


def prepare(config: Path, log: Path, llmc: Path | None) -> None:
    """What the commands are given, for each seed: a config, a recipe, a native folder, one of LLM Compressor."""
    # By a child as well: a pool of threads of this process would not live in the others.
    assert finish(start(["analyze", str(MODEL), "-o", str(config)], log)) == 0, log.read_text()
    for seed in (0, 1):
        content = json.loads(config.read_text())
        content["smoothing"]["alpha"] = 0.5 + 0.1 * seed
        given, recipe = config.with_name(f"config-{seed}.json"), config.with_name(f"recipe-{seed}.yaml")
        given.write_text(json.dumps(content))
        export = ["export", str(given), "--to", "llm-compressor", "-o", str(recipe)]
        for arguments in (export, commands(config, False)["quantize"](config.with_name(f"native-{seed}"), seed)):
            assert finish(start(arguments, log)) == 0, log.read_text()
        if llmc is not None:
            windows = config.with_name("windows.json")
            windows.write_text(json.dumps([[*range(1, 65)], [*range(65, 129)]]))
            folder, kind = config.with_name(f"theirs-{seed}"), ("static", "token")[seed]
            script = Path(__file__).with_name("smoothquant_llmc.py")
            subprocess.run([llmc, script, MODEL, windows, folder, "cpu", kind], check=True)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(MODEL / name, folder / name)


def start(arguments: list[str], log: Path) -> int:
    """The command in a child of this process, which has imported what takes long; its process number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            import torch

            from autoquant.cli.main import main

            torch.set_num_threads(1)
            main([*arguments, "--quiet"])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """The exit code; negative: the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for_writing(out: Path, child: int, limit: float) -> None:
    """Until something is in the hidden file or folder beside the output, or the child is through."""
    begun = time.monotonic()
    while time.monotonic() - begun < limit and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for path in out.parent.glob(f".{out.name}.*"):
            try:
                if any(path.iterdir()) if path.is_dir() else path.stat().st_size:
                    return
            except OSError:  # gone meanwhile
                continue
        time.sleep(0.002)


def digest(path: Path) -> str:
    """A file or a folder by its content; of a search's config what was decided, not how long it took."""
    found = hashlib.sha256()
    if path.is_file():
        content = json.loads(path.read_text())
        return hashlib.sha256(json.dumps(_timeless(content)).encode()).hexdigest()
    for file in sorted(path.rglob("*")):
        found.update(str(file.relative_to(path)).encode())
        found.update(file.read_bytes() if file.is_file() else b"")
    return found.hexdigest()


def _timeless(content: object) -> object:
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in ("seconds", "minutes", "time")}
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def cells(folder: Path) -> dict[str, list[float]]:
    """The finished cells of a comparison. Raises where one is not whole."""
    files = (path for path in sorted((folder / "cells").glob("*")) if not path.name.startswith("."))
    return {path.name: json.loads(path.read_text())["nll"] for path in files}


def killed(
    command: Callable[[Path, int], list[str]], out: Path, kills: int, chance: random.Random
) -> tuple[int, int, int, int]:
    """How often the output was the old and the new one after a kill, how often the command was through before, and the
    most leftovers.
    """
    log = out.parent.parent / "log"
    wanted, longest = {}, 0.0
    for seed in (0, 1, 0):
        begun = time.monotonic()
        assert finish(start(command(out, seed), log)) == 0, log.read_text()
        longest, wanted[seed] = time.monotonic() - begun, digest(out)
    old, new, through, most, before = 0, 0, 0, 0, 0
    for number in range(kills):
        seed = 1 - before
        child = start(command(out, seed), log)
        if number % 2:
            time.sleep(longest * chance.uniform(0, 1.3))
        else:  # the first part is reading and computing: half of the kills come while files are written
            wait_for_writing(out, child, longest * 5)
            time.sleep(chance.uniform(0, 0.6))
        os.kill(child, signal.SIGKILL)
        code = finish(child)
        assert code in (0, -signal.SIGKILL), log.read_text()
        now = digest(out)
        assert now in (wanted[before], wanted[seed]), f"kill {number}: neither the old nor the new output"
        through += code == 0
        old, new = old + (now == wanted[before]), new + (now != wanted[before])
        before = seed if now == wanted[seed] else before
        most = max(most, len([*out.parent.glob(".*")]))
    assert finish(start(command(out, 1), log)) == 0, log.read_text()
    assert digest(out) == wanted[1], "another output than without kills"
    left = [path.name for path in out.parent.iterdir() if path != out and not path.name.endswith(".schema.json")]
    assert left == [], f"leftovers: {left}"
    return old, new, through, most


def killed_compare(
    command: Callable[[Path, int], list[str]], out: Path, kills: int, chance: random.Random
) -> tuple[int, int, int, int]:
    """The same for a comparison: unfinished and finished reports after a kill."""
    log = out.parent.parent / "log"
    begun = time.monotonic()
    assert finish(start(command(out, 0), log)) == 0, log.read_text()
    longest, wanted = time.monotonic() - begun, cells(out)
    shutil.rmtree(out)
    unfinished, finished, through, most = 0, 0, 0, 0
    for _ in range(kills):
        before = cells(out)
        child = start(command(out, 0), log)
        time.sleep(longest * chance.uniform(0.1, 0.8))
        os.kill(child, signal.SIGKILL)
        code = finish(child)
        assert code in (0, -signal.SIGKILL), log.read_text()
        after = cells(out)
        assert before.items() <= after.items() <= wanted.items(), "a cell was lost or is another"
        through += code == 0
        most = max(most, len([*out.rglob(".*")]))
        whole = (out / "report.md").is_file()
        unfinished, finished = unfinished + (not whole), finished + whole
        if whole:
            shutil.rmtree(out)
    assert finish(start(command(out, 0), log)) == 0, log.read_text()
    assert cells(out) == wanted, "another table than without kills"
    left = [path.name for path in out.parent.iterdir() if path != out] + [path.name for path in out.rglob(".*")]
    assert left == [], f"leftovers: {left}"
    return unfinished, finished, through, most


def second_refused(command: Callable[[Path, int], list[str]], out: Path) -> str:
    """What the second of two runs into one output said."""
    first_log, second_log = out.parent.parent / "first", out.parent.parent / "second"
    if out.is_dir() and (out / "cells").is_dir():
        shutil.rmtree(out)
    from autoquant.io.locks import lock_file

    first, lock = start(command(out, 1), first_log), lock_file(out)
    while not lock.is_file() or lock.read_text() != str(first):
        assert os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, first_log.read_text()
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)  # it may be through sooner than the second has begun
    code = finish(start(command(out, 0), second_log))
    os.kill(first, signal.SIGCONT)
    said = (second_log.read_text().strip().splitlines() or [""])[-1]
    assert code == 1 and "is being written by another run" in said, (code, second_log.read_text())
    assert finish(first) == 0, first_log.read_text()
    return said.replace(str(out), out.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a command")
    parser.add_argument("--llmc", type=Path, help="interpreter that has llmcompressor")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    import torch
    import transformers

    chance, failures = random.Random(options.seed), []
    lines = [
        "# Kills at random moments",
        "",
        f"`python benchmarks/kills.py --kills {options.kills} --seed {options.seed}`, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. wikinano1m; each run writes over the output of the one before and "
        "gets SIGKILL at a random moment. After each kill the output was the old or the new one, byte for byte (of "
        "compare: each cell whole, none lost); a last run that nobody killed left no hidden folder and the same bytes "
        "as one without kills before it.",
        "",
        "| command | kills | old output | new output | was through before | leftovers at most | a second run at once |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="autoquant-kills-") as temporary:
        config = Path(temporary, "config.json")
        prepare(config, Path(temporary, "log"), options.llmc)
        for name, command in commands(config, options.llmc is not None).items():
            if options.only and name not in options.only:
                continue
            folder = Path(temporary, name)
            folder.mkdir()
            out = folder / ("out.json" if name in ("search", *SHORT) else "out")
            try:
                many = killed_compare if name == "compare" else killed
                old, new, through, most = many(command, out, options.kills, chance)
                said = "" if name in SHORT else second_refused(command, out)
            except AssertionError as error:
                failures.append(f"{name}: {error}")
                print(failures[-1], flush=True)
                continue
            lines.append(f"| {name} | {options.kills} | {old} | {new} | {through} | {most} | {said} |")
            print(lines[-1], flush=True)
    lines += ["", f"Failures: {len(failures)}.", *failures]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
