"""What commands import: nothing that they do not need, and Dynamo where it is needed after all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).parents[2] / "autoquant" / "data" / "wikinano1m"
AFTER = """
from autoquant.cli.main import main

def loaded():
    return [name for name in LOOKED_FOR if name in sys.modules]

def run(*arguments):
    main([*map(str, arguments), "--quiet"], standalone_mode=False)
    return loaded()
"""


def printed(code: str, *looked_for: str) -> list[str]:
    code = f"import sys\nLOOKED_FOR = {looked_for}{AFTER}{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_apply_and_quantize_go_without_dynamo_which_is_there_for_the_next(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    code = f"""
from autoquant import api
given, config, out = {str(MODEL)!r}, {str(config)!r}, {str(tmp_path)!r} + "/"
small = ("--unproved", "--sequences", "2", "--length", "16")
print(run("apply", given, config, "-o", out + "a", *small))
static = "w_int8_per_channel_a_int8_per_tensor_static"
print(run("quantize", given, config, "-o", out + "q", *small, "--strategy", static))
import torch, transformers.masking_utils as masks
stand_in = masks.TransformGetItemToIndex
print("transformers.modeling_utils" in sys.modules, stand_in.__module__)
found = api.analyze(given, verify=False)
print(found.config.model == api.load_config(config).model, "torch._dynamo" in sys.modules)
print(masks.TransformGetItemToIndex.__module__)
print(torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.zeros(1)).item())
"""
    subprocess.run(
        [sys.executable, "-m", "autoquant", "analyze", MODEL, "-o", config, "--no-verify", "--quiet"], check=True
    )
    assert printed(code, "torch._dynamo", "torch._dynamo.eval_frame", "torch._inductor") == [
        "[]",
        "[]",
        "True autoquant.library_patches",
        "True True",
        "torch._dynamo._trace_wrapped_higher_order_op",
        "1.0",
    ]


def test_a_library_that_imports_a_part_of_dynamo_gets_the_real_one() -> None:
    code = """
from autoquant.library_patches import without_dynamo
with without_dynamo():
    from torch._dynamo.utils import is_compile_supported
    import torch._dynamo.utils as utils
    print(loaded(), is_compile_supported is utils.is_compile_supported, utils.__spec__.origin == utils.__file__)
import torch
print(torch._dynamo.utils is utils, torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item())
import sys
print([finder for finder in sys.meta_path if type(finder).__module__.startswith("autoquant")])
"""
    assert printed(code, "torch._dynamo.eval_frame") == ["['torch._dynamo.eval_frame'] True True", "True 1.0", "[]"]


def test_that_dynamo_would_be_seen() -> None:
    assert printed("import torch._dynamo\nprint(loaded())", "torch._dynamo")[-1] == "['torch._dynamo']"


def test_check_imports_neither_torch_nor_what_draws_tables(tmp_path: Path) -> None:
    config = next((Path(__file__).parents[2] / "generated_configs").glob("*.json"))
    code = f"main(['check', {str(config)!r}], standalone_mode=False)\nprint(loaded())"
    said = printed(code, "torch", "transformers", "rich", "pydantic")
    assert said[-1] == "['pydantic']" and said[0].endswith("proved"), said
