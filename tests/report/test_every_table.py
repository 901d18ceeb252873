"""What every command prints, in a terminal of 80 and of 40 columns: all words, no broken name, no line too long."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoquant.certificate.prove import Trial
from autoquant.cli.output import remark, show, width
from autoquant.config.assign import assign
from autoquant.config.compare import differences
from autoquant.config.file import load_config
from autoquant.config.format import Config, Decision, Search, Strategy, edited
from autoquant.evaluation.perplexity import Estimate, Evaluation
from autoquant.evaluation.serving import Agreement
from autoquant.recipes.audit import Audit, Judged, Verdict
from autoquant.recipes.auditing import Entry
from autoquant.recipes.matching import WrittenMapping
from autoquant.recipes.pairs import Refusal
from autoquant.report.recipes import Audited, Imported, Recipe
from autoquant.report.results import Analysis, Checked, Compared, Evaluated, Found, Verification
from autoquant.report.served import HEADER, ServeCheck
from autoquant.report.tree import linear_lines, tree_lines

ROOT = Path(__file__).parents[2]
FOLDER = "/data/models/a-folder-with-a-long-name/int8"
GROUP = "model.layers.{layer}.input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
WHY = "'model.layers.{layer}.self_attn.o_proj.weight' has an index map: channels that are repeated, or in another order"
MARKDOWN = """# wikinano1m

Perplexity of the first 500 tokens of `sample.evaluation.txt` in windows of 64, each behind BOS.

| strategy | size | none | fc_fc:0.5+rotation |
| --- | --- | --- | --- |
| `w_int8_per_channel_a_int8_per_token_dynamic` | 2.00 MB | 22.484 ± 1.690 | 22.462 ± 1.770 |
"""


def config(name: str = "deepseek_v3") -> Config:
    return load_config(ROOT / "generated_configs" / f"{name}.json")


def verified() -> Verification:
    trials = (
        Trial(GROUP, "norm_linear", 1.9e-15),
        Trial("residual", "R1", 0.5, "model.experts.3.up_proj.weight"),
        Trial("down", "R4", float("inf"), stops="TypeError: down is no linear"),
    )
    return Verification(FOLDER, True, trials, {"model.layers.0.mlp.down_proj": WHY}, 1e-5)


def evaluated() -> Evaluated:
    estimate = Estimate(0.97, 0.002)
    return Evaluated({FOLDER: Evaluation(1000, 4, Estimate(3.0, 0.01), estimate, estimate, estimate)}, {})


def served() -> ServeCheck:
    one = Agreement(Path(FOLDER), "vllm", {"vllm": "0.32.0"}, True, 599, 21.5, 21.4, 1e-6, 0.98, bits=0.9998)
    return ServeCheck((one, Agreement(Path("b"), "vllm", {}, True, 599, 21.5, error="ImportError: it is required")))


def audited() -> Audited:
    mapping = WrittenMapping("re:.*post_attention_layernorm", ("re:.*gate_proj", "re:.*up_proj"))
    judged = (Judged(mapping, Verdict.WRONG, 26, 0.074, "model.layers.0: the norm feeds the residual"),)
    audit = Audit("gemma2", "llm-compressor", judged, ("model.norm -> lm_head",))
    missing = Entry("AfmoeForCausalLM", "SmoothQuant", "afmoe", None, "no type of transformers has it")
    return Audited("llm-compressor", "0.14.0.1", (Entry("Gemma2ForCausalLM", "AWQ", "gemma2", audit), missing))


def found() -> Found:
    decision = Decision(where="smoothing.alpha", choice="0.85", unit="nats", before=0.5, after=0.25, cost="none")
    search = Search(
        strategy=Strategy.PER_CHANNEL_PER_TOKEN,
        seed=0,
        calibration="text",
        digest="0",
        fitted=1,
        held_out=2,
        before=2.5,
        after=0.3,
        standard_error=0.01,
        decisions=(decision,),
    )
    return Found(edited(config("llama"), search=search))


def changed() -> list[str]:
    return [one.line for one in differences(config("llama"), assign(config("gemma2"), ["smoothing.alpha=0.7"]))]


PRINTED: dict[str, tuple[Callable[[int], list[str]], tuple[str, ...]]] = {
    # What a command prints at a width, and of it what must be found: names of columns and cells.
    "analyze": (
        Analysis(config("gemma2"), "dynamo", {}).lines,
        ("linear", "self_attn.v_proj", "2304 -> 1024", "norm input_layernorm", "online in, R2 out", "Proof"),
    ),
    "analyze moe": (
        Analysis(config("qwen3_moe"), "dynamo", {}).lines,
        ("mlp.gate (router)", "up -> down from 768 rows of"),
    ),
    "show": (
        lambda w: tree_lines(config(), w),
        ("mlp.gate_proj", "7,168 -> 18,432", "reads R1 residual: 7,168 channels; on, hadamard"),
    ),
    "show --linear": (
        lambda w: linear_lines(config(), "mlp.down_proj", w),
        ("quantized: w_int8_per_channel_a_int8_per_token_dynamic", "online R4 of 18,432: possible, off"),
    ),
    "check": (Checked(config(), "generated_configs/deepseek_v3.json", FOLDER).lines, (f"and fits {FOLDER};", "proved")),
    "verify": (
        verified().lines,
        (
            GROUP,
            "norm_linear",
            "1.9e-15",
            "change of the logits",
            "ok",
            "5.0e-01",
            WHY,
            "1 of 3 hold",
            "FAILED: no run reached model.experts.3.up_proj.weight",
            "FAILED: TypeError: down is no linear",
        ),
    ),
    "eval": (evaluated().lines, (FOLDER, "1,000", "20.086 ± 0.201", "0.97000 ± 0.00200", "top1 agreement", "kl")),
    "compare": (
        Compared(MARKDOWN, {}).lines,
        (
            "w_int8_per_channel_a_int8_per_token_dynamic",
            "2.00 MB",
            "22.484 ± 1.690",
            "22.462 ± 1.770",
            "size",
            "none",
            "fc_fc:0.5+rotation",
            "each behind BOS.",
        ),
    ),
    "serve-check": (
        served().lines,
        (FOLDER, *HEADER[1:7], "21.500", "21.400", "-0.47%", "1.0e-06", "98%", "99.98%", "equal", "refused"),
    ),
    "audit": (
        audited().lines,
        (
            "Gemma2ForCausalLM AWQ",
            "re:.*post_attention_layernorm",
            "re:.*up_proj",
            "wrong",
            "7.4e-02",
            "not judged",
            "model.layers.0: the norm feeds the residual",
            "no type of transformers has it",
            "1 wrong",
        ),
    ),
    "export": (Recipe("quark", "", (Refusal(GROUP, WHY),)).lines, (f"left out: {GROUP}: {WHY}", "1 left out")),
    "import": (Imported(config(), (GROUP,), (WrittenMapping(GROUP, ("a", "b")),)).lines, (f"used: {GROUP}", GROUP)),
    "search": (found().lines, ("smoothing.alpha = 0.85 (0.5 -> 0.25; none)", "+0.30 ± 0.01 %", "1 decisions")),
    "diff": (lambda w: changed(), ("smoothing.alpha: 0.5 -> 0.7", "+ group", "model.heads: 32 -> 8")),
}


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("command", PRINTED)
def test_everything_is_readable(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines, cells = PRINTED[command]
    show(lines(width()))
    printed = capsys.readouterr().out
    text = " ".join(printed.replace("│", " ").split())
    assert [cell for cell in cells if cell not in text] == []
    assert words(cells_only(lines(100_000))) - words([printed]) == set()
    long = [line for line in printed.splitlines() if len(line) > columns and len(line.split()) > 1]
    assert long == []


def cells_only(lines: list[str]) -> list[str]:
    """Lines without headers, of which paragraphs repeat those alone that have a cell."""
    rules = {number for number, line in enumerate(lines) if line.startswith(("─", "| ---"))}
    return [line for number, line in enumerate(lines) if not {number, number + 1} & rules]


def words(lines: list[str]) -> set[str]:
    return {word for line in lines for word in line.replace("`", "").split() if word.strip("─│├└|")}


def test_every_table_is_tried() -> None:
    """The modules that make columns are those whose results are printed above."""
    makers = {
        str(path.relative_to(ROOT / "autoquant"))
        for path in (ROOT / "autoquant").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "autoquant.io.columns"
    }
    mine = {"report/table.py", "report/tree.py", "report/results.py", "report/recipes.py", "report/served.py"}
    assert makers == mine | {"cli/output.py", "config/overview.py"}  # the overview is a repr, of one width


@pytest.mark.parametrize(("columns", "expected"), [(None, 140), ("60", 60), ("wide", 140)])
def test_in_a_pipe_columns_says_how_wide_tables_are_and_long_lines_are_whole(
    columns: str | None, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert width() == expected
    show(["a " * 200])
    remark(["b " * 200])
    assert capsys.readouterr() == ("a " * 200 + "\n", "b " * 200 + "\n")
