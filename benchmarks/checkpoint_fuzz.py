"""Mutated checkpoints, and what loading them ended in: ``python benchmarks/checkpoint_fuzz.py``.

Tiny models and their int8 folders are damaged at random (headers, indexes, configs, tokenizers, facts, bytes), then
loaded by ``autoquant.load`` with their tokenizer, in one process; every tenth checkpoint goes through ``apply``. A case
passes where the model holds just what an independent reader finds in the files, or one AutoQuantError of one line is
raised; within 10 s and 1 GB; with no file touched outside of the output, and no code of the folder run. Exits with 1
where one fails; the seed of each failure is printed and ``--only SEED`` runs it alone.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 10, 1000
CODE = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\npathlib.Path({canary!r}).touch()\n"
DEEP = "[" * 200_000
VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 7, 1.5, float("nan"), 10**6, 10**12, 10**30, "", "x", "../../etc/passwd", "\x1b[31mred\n",
    "[bold]rich[/]", [], {}, [1, "a"], {"a": {"b": 1}}, "float8_e4m3fn", "torch", [[]] * 3, "\u202eevil",
]  # fmt: skip


def tiny(kind: str) -> Any:
    """A model of two layers, random in every parameter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, dict[str, Any]] = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "tie_word_embeddings": True},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "qwen3_moe": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                      "moe_intermediate_size": 24},
    }  # fmt: skip
    more = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes[kind], **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1").save_pretrained(folder)


def originals(work: Path) -> tuple[list[Path], list[Path], dict[str, Any]]:
    """Folders of checkpoints and of quantized models, and the configs of the former by their names."""
    import torch

    import autoquant

    plain, quantized, configs = [], [], {}
    text = (torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0)),)
    strategies = {
        "llama": "w_int8_per_channel_a_int8_per_tensor_static_kv_cache_int8_per_tensor_static",
        "gpt2": "w_int8_per_tensor_a_int8_per_tensor_static",
        "qwen3_moe": "w_int8_per_channel_a_int8_per_token_dynamic",
    }
    for kind, strategy in strategies.items():
        for shard in ("1GB", "20KB"):
            folder = work / f"{kind}-{shard}"
            tiny(kind).save_pretrained(folder, max_shard_size=shard)
            save_tokenizer(folder)
            plain.append(folder)
            if shard == "1GB":
                configs[kind] = autoquant.analyze(folder).config
        folder = work / f"{kind}-int8"
        given = {"calibration": text, "strategy": strategy, "transforms": "fc_fc+rotation"}
        autoquant.quantize(plain[-2], configs[kind], folder, **given)
        quantized.append(folder)
    return plain, quantized, configs


# Mutations. Each changes one file of a copy and says what it did.


def flip(path: Path, r: random.Random) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(r.choice([1, 1, 4, 64])):
        content[r.randrange(len(content))] = r.randrange(256)
    path.write_bytes(content)
    return "bytes"


def cut(path: Path, r: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: r.choice([0, 1, 7, 8, 9, r.randrange(len(content))])])
    return "cut short"


def grow(path: Path, r: random.Random) -> str:
    with path.open("ab") as stream:
        stream.write(r.randbytes(r.choice([1, 8, 5000])))
    return "longer"


def lose(path: Path, r: random.Random) -> str:
    path.unlink()
    if r.random() < 0.3:
        path.mkdir()
    elif r.random() < 0.3:
        os.mkfifo(path)
    elif r.random() < 0.3:
        path.symlink_to(r.choice(["/dev/zero", path.name, "/nowhere"]))
    return "no file"


def nest(path: Path, r: random.Random) -> str:
    text = r.choice([DEEP, '{"a":' * 100_000, "null", "3", "[]", "{}", '"x"', "", "\x00", "\ufeff{}", "NaN"])
    path.write_bytes(text.encode())
    return "other JSON"


def edit(path: Path, r: random.Random) -> str:
    """Change a value somewhere in a JSON file."""
    content = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(content)
    node, key = r.choice([place for place in places if place[0] is content] if r.random() < 0.5 else places)
    how = r.randrange(4)
    if how == 0 and isinstance(node, dict):
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[r.choice(["x", "\x1b[2J", "a\nb", "../up", "", str(key) + "x"])] = node.pop(key)
    elif how == 2 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = r.choice([node[key] + 1, node[key] * 2, -node[key], node[key] * 10**6, str(node[key])])
    else:
        node[key] = r.choice(VALUES)
    path.write_text(json.dumps(content))
    return "a value"


def trust(path: Path, r: random.Random) -> str:
    """Have the file name code of its own."""
    content = json.loads(path.read_text())
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    content |= {"auto_map": names, "tokenizer_class": "T"} if isinstance(content, dict) else {}
    if r.random() < 0.5 and "model_type" in content:
        content["model_type"] = "own"
    path.write_text(json.dumps(content))
    return "code"


def header(path: Path, r: random.Random) -> str:
    """Lies in the header of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    content, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in content if name != "__metadata__"]
    name = r.choice(names)
    entry = content[name]
    how = r.randrange(10)
    if how == 0:
        entry["shape"] = r.choice([[], [-1], [2**62, 2**62], [1.5], "x", None, [*entry["shape"], 1], [10**12], [[1]]])
    elif how == 1:
        entry["dtype"] = r.choice(["F64", "F16", "I8", "BOOL", "F8_E4M3", "X", 3, None, [], "I64"])
    elif how == 2:
        entry["data_offsets"] = r.choice([[0, 4], [-4, 0], [0], [2**63, 2**64], ["0", "4"], None, [10**15, 10**16]])
    elif how == 3:
        other = content[r.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif how == 4:
        del content[name]
    elif how == 5:
        content[r.choice(["x", name + "x", name.removesuffix(".weight"), "\x1b[2Jx", "a\nb", ""])] = content.pop(name)
    elif how == 6:
        content["__metadata__"] = r.choice([None, [], "x", {"format": "tf"}, {"format": 3}, {"format": "mlx"}, 5])
    elif how == 7:
        content[name] = r.choice(VALUES)
    elif how == 8:
        entry["shape"] = entry["shape"][::-1]
    text = json.dumps(content).encode() if how < 9 else r.choice([DEEP.encode(), b"[]", b"{", b"null", b"\xff" * 9])
    size = len(text) if r.random() < 0.9 else r.choice([0, 2**63, 2**64 - 1, len(raw), 10**8 + 1, len(text) - 1])
    path.write_bytes(struct.pack("<Q", size) + text + body)
    return "header"


def values(path: Path, r: random.Random) -> str:
    """Other numbers in a tensor, of the same kind and size."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = r.choice(sorted(tensors))
    tensor = tensors[name]
    if tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[r.randrange(tensor.numel())] = r.choice([torch.nan, torch.inf, -1.0, 0.0, 3e38])
    elif r.random() < 0.5:
        tensors[name] = tensor.float()
    else:
        tensors[name] = tensor.reshape(-1)
    save_file(tensors, path, {"format": "pt"})
    return "values"


JSON_MUTATIONS = (edit, edit, edit, edit, nest, trust, flip, cut, grow, lose)
TENSOR_MUTATIONS = (header, header, header, values, values, flip, cut, grow, lose)


def mutated(source: Path, target: Path, r: random.Random, canary: Path) -> tuple[str, str]:
    """A damaged copy; the file and what was done to it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    (target / "evil.py").write_text(CODE.format(canary=str(canary)))
    files = sorted(path for path in target.iterdir() if path.suffix in (".json", ".safetensors"))
    weights = [0.3 if "tokenizer" in path.name or "generation" in path.name else 1.0 for path in files]
    path = r.choices(files, weights)[0]
    mutate: Callable[[Path, random.Random], str] = r.choice(
        JSON_MUTATIONS if path.suffix == ".json" else TENSOR_MUTATIONS
    )
    kind = "shard" if path.suffix == ".safetensors" and path.name.startswith("model-") else path.name
    return kind, mutate(path, r)


# What a case must not do.


class TooLong(BaseException):
    """Raised by the alarm, and by nothing that the project catches."""


def ring(*_: object) -> None:
    raise TooLong


def peak() -> float:
    """The most memory that the process held since the last reset, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def picture(folder: Path) -> dict[str, str]:
    """Every file below a folder by its content."""
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and not path.is_symlink()
        else "special"
        for path in files
    }


def is_right(model: Any, folder: Path) -> str | None:
    """What of a loaded model is not in its files, read by safetensors alone; None where all is."""
    import torch
    from safetensors.torch import load_file

    own = folder / "autoquant.safetensors"
    single = folder / "model.safetensors"
    files = [own] if own.is_file() else [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    first = {id(tensor): name for name, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names = [name, first[id(tensor)], f"transformer.{name}", name.removeprefix("transformer.")]
        names += [name.replace(".weight.values", ".weight"), name.replace(".weight.scale", ".weight_scale")]
        names += [name.replace(".weight.input_scale", ".input_scale")]
        names += [other for other, same in model.state_dict(keep_vars=True).items() if same is tensor]
        held = next((stored[one] for one in names if one in stored), None)
        if held is None and ".mlp.experts." in name:
            continue  # joined by transformers of several tensors
        if held is None:
            return f"{name} is not stored"
        if held.shape != tensor.shape and not name.endswith("scale"):
            return f"{name} has another shape than what is stored"
        if not torch.equal(held.to(tensor.dtype).nan_to_num(5).flatten(), tensor.detach().nan_to_num(5).flatten()):
            return f"{name} differs from what is stored"
    return None


def load_both(folder: Path) -> str | None:
    import autoquant
    from autoquant.models.tokenizer import load_tokenizer

    model = autoquant.load(folder)
    load_tokenizer(folder)
    return is_right(model, folder)


def run(folder: Path, out: Path, config: Any) -> tuple[str, str]:
    """What a case ended in, and the details: 'loaded', 'refused', or what is wrong."""
    import autoquant
    from autoquant.checkpoint.apply import apply_checkpoint
    from autoquant.errors import AutoQuantError

    before, start = reset_peak(), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where no Python runs, a signal is not heard
    ended, said = "loaded", ""
    try:
        wrong = load_both(folder)
        ended, said = ("WRONG", wrong) if wrong else (ended, said)
        if config is not None and not wrong:
            apply_checkpoint(folder, config, out)
            autoquant.load(out)
    except AutoQuantError as error:
        ended, said = "refused", error.message
        if not error.message.isprintable() or not error.message:
            ended = "NOT ONE LINE"
    except TooLong:
        ended = "TOO LONG"
    except BaseException:
        ended, said = "TRACEBACK", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    if time.monotonic() - start > SECONDS:
        ended = "TOO LONG"
    if peak() - before > MEGABYTES:
        ended = "TOO LARGE"
    return ended, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the one case to run")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, ring)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="autoquant-fuzz-") as temporary:
        work = Path(temporary)
        (work / "given").mkdir()
        plain, quantized, configs = originals(work / "given")
        (work / "cases").mkdir()
        (work / "outputs").mkdir()
        canary = work / "cases" / "canary"
        untouched = picture(work / "given")
        counts: dict[str, Counter[tuple[str, str, str]]] = {"checkpoints": Counter(), "quantized folders": Counter()}
        failures, slowest, start = [], 0.0, time.monotonic()
        for number in [options.only] if options.only is not None else range(options.seed, options.seed + options.cases):
            for kind, folders in (("checkpoints", plain), ("quantized folders", quantized)):
                r = random.Random(f"{kind} {number}")
                source, case, out = r.choice(folders), work / "cases" / "model", work / "outputs" / "out"
                file, change = mutated(source, case, r, canary)
                before, began = picture(work / "cases"), time.monotonic()
                config = configs[source.name.rpartition("-")[0]] if kind == "checkpoints" and number % 10 == 0 else None
                ended, said = run(case, out, config)
                slowest = max(slowest, time.monotonic() - began)
                if picture(work / "cases") != before or [path.name for path in (work / "outputs").iterdir()] not in (
                    [],
                    ["out"],
                ):
                    ended = "TOUCHED OTHERS"
                shutil.rmtree(out, ignore_errors=True)
                canary.unlink(missing_ok=True)
                counts[kind][file, change, ended] += 1
                if ended not in ("loaded", "refused"):
                    failures.append(f"{kind} {number} ({source.name}: {file}, {change}): {ended}: {said}")
                    print(failures[-1], flush=True)
                elif options.only is not None:
                    print(kind, source.name, file, change, ended, said)
            if number % 100 == 99:
                print(f"{number + 1} of {options.cases}, {time.monotonic() - start:.0f} s", flush=True)
                done = number + 1 - options.seed  # a run that is stopped leaves what it counted
                options.output.write_text(table(counts, failures, slowest, done, options.seed), encoding="utf-8")
        if picture(work / "given") != untouched:
            failures.append("an original was touched")
    if options.only is None:
        text = table(counts, failures, slowest, options.cases, options.seed)
        options.output.write_text(text, encoding="utf-8")
        print(text)
    return 1 if failures else 0


def table(
    counts: dict[str, Counter[tuple[str, str, str]]], failures: list[str], slowest: float, cases: int, seed: int
) -> str:
    import torch
    import transformers

    lines = [
        "# Mutated checkpoints",
        "",
        f"`python benchmarks/checkpoint_fuzz.py --cases {cases} --seed {seed}`, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, CPU. Each case is a tiny model (llama, gpt2, qwen3_moe; one file "
        "and shards) or its int8 folder with one file damaged at random. It loads and holds what the files hold, read "
        f"by safetensors alone, or ends in one AutoQuantError of one line; within {SECONDS} s and {MEGABYTES} MB, "
        f"nothing outside of the output touched, no code run. **{len(failures)} failures**; the slowest case took "
        f"{slowest:.1f} s.",
    ]
    for kind, counted in counts.items():
        total = Counter[str]()
        rows: dict[str, Counter[str]] = {}
        for (file, _, ended), number in counted.items():
            total[ended] += number
            rows.setdefault(file, Counter())[ended] += number
        others = sorted(set(total) - {"loaded", "refused"})
        lines += [
            "",
            f"## {sum(total.values()):,} {kind}",
            "",
            "| damaged file | loaded rightly | refused |",
            "|---|---|---|",
        ]
        if others:
            lines[-2:] = [
                f"| damaged file | loaded rightly | refused | {' | '.join(others)} |",
                "|---" * (3 + len(others)) + "|",
            ]
        for file, row in [*sorted(rows.items()), ("all", total)]:
            cells = [str(row[name]) for name in ("loaded", "refused", *others)]
            lines.append(f"| {file} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
