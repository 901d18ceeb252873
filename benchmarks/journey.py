"""The way of a newcomer: ``python benchmarks/journey.py``, from an installation to a served model, then every mistake.

``--install`` makes a virtual environment and times ``pip install`` too; ``--serve PYTHON`` names the interpreter of an
environment with vLLM for the sixth command. Writes ``benchmarks/journey.md``. Exits with 1 where a command fails or a
mistake does not end in one line with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATA = "autoquant/data/wikinano1m", "autoquant/data/sample.evaluation.txt"
INSTALL = "pip install ."
STEPS = (
    f"autoquant analyze {MODEL} -o OUT/model.json",
    "autoquant report OUT/model.json -o OUT/model.html",
    f"autoquant quantize {MODEL} OUT/model.json -o OUT/int8",
    f"autoquant eval {MODEL} OUT/int8 --data {DATA} --length 128",
)
SERVE = "autoquant serve-check OUT/int8 --python PYTHON"


def wrong_path(folder: Path) -> str:
    return str(folder.parent / "wikinano2m")


def hub_id(folder: Path) -> str:
    return "meta-llama/Llama-3.1-8B"


def lora(folder: Path) -> str:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return str(folder)


def gptq(folder: Path) -> str:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def no_tokenizer(folder: Path) -> str:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return str(folder)


def lfs_pointer(folder: Path) -> str:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9\nsize 2381256\n"
    (folder / "model.safetensors").write_text(text)
    return str(folder)


def nan_weight(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def half_a_download(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(folder)


def pickles_alone(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return str(folder)


MISTAKES: dict[str, Callable[[Path], str]] = {
    "a wrong path": wrong_path,
    "a hub id, offline": hub_id,
    "a LoRA folder": lora,
    "a GPTQ folder": gptq,
    "no tokenizer": no_tokenizer,
    "a git-lfs pointer": lfs_pointer,
    "a NaN among the weights": nan_weight,
    "half a download": half_a_download,
    "pytorch_model.bin only": pickles_alone,
}


def mistakes(scratch: Path) -> list[tuple[str, int, list[str]]]:
    """What `autoquant quantize` says of each, with its exit code; nothing may be left behind."""
    from autoquant.cli.main import main

    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    for name, make in MISTAKES.items():
        folder, out = scratch / "wikinano1m", scratch / "refused"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / MODEL, folder)
        model, stderr = make(folder), io.StringIO()
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            code = main(["quantize", model, "-o", str(out), "--quiet"], standalone_mode=False) or 0
        said = [line.replace(f"{scratch}/", "") for line in stderr.getvalue().splitlines()]
        rows.append((name, int(code), [*said, *(["LEFT BEHIND"] if out.exists() else [])]))
        print(name, code, said, flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return rows


def walked(scratch: Path, install: bool, serve: str | None) -> list[tuple[str, float]]:
    """Seconds of each command."""
    program, rows = str(Path(sys.executable).parent / "autoquant"), []
    # What was installed is what runs.
    clean = {name: value for name, value in os.environ.items() if not (install and name == "PYTHONPATH")}
    if install:
        subprocess.run([sys.executable, "-m", "venv", str(scratch / "venv")], check=True)
        started = time.perf_counter()
        pip = [str(scratch / "venv" / "bin" / "python"), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "-c", "constraints.txt", "torch"], cwd=ROOT, check=True)
        subprocess.run([*pip, "-c", "constraints.txt", "."], cwd=ROOT, check=True)
        rows.append((INSTALL, time.perf_counter() - started))
        program = str(scratch / "venv" / "bin" / "autoquant")
    for line in (*STEPS, *([SERVE] if serve else [])):
        words = line.replace("OUT", str(scratch)).replace("PYTHON", serve or "").split()
        started = time.perf_counter()
        subprocess.run([program, *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=clean)
        rows.append((line, time.perf_counter() - started))
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--serve", metavar="PYTHON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        steps = walked(Path(name), arguments.install, arguments.serve)
        found = mistakes(Path(name))
    failed = [name for name, code, said in found if code != 1 or len(said) != 1]
    options = " --install" * arguments.install + " --serve PYTHON" * bool(arguments.serve)
    busy = f"a load of {os.getloadavg()[0]:.0f} in the last minute, this run's own included"
    lines = [
        "# The way of a newcomer",
        "",
        f"`python benchmarks/journey.py{options}`, on {os.cpu_count()} cores ({busy}), Python "
        f"{platform.python_version()}. From an installation, downloads included, to a model that is served, the "
        "packaged one; PYTHON is the interpreter of an environment with vLLM, which `serve-check` starts and compares:",
        "",
        "| command | seconds |",
        "|---|---:|",
        *(f"| `{line}` | {seconds:.0f} |" for line, seconds in steps),
        "",
        "Every mistake below ends `autoquant quantize MODEL -o int8` in one line and exit code 1, nothing left behind:",
        "",
        "| MODEL | what is said |",
        "|---|---|",
        *(f"| {name} | {' / '.join(said) if code else 'no error'} |" for name, code, said in found),
        "",
    ]
    (ROOT / "benchmarks" / "journey.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
