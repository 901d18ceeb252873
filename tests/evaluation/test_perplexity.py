from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from autoquant.calibration.windows import cut_windows, tokenize
from autoquant.checkpoint.load import load
from autoquant.errors import AutoQuantError
from autoquant.evaluation.perplexity import evaluate, logits_of, perplexity_of

PACKAGED = Path(__file__).parents[2] / "autoquant" / "data" / "wikinano1m"
DATA = Path(__file__).parents[3] / "shared" / "data"
VOCABULARY = 16

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent: it holds WikiText-2 and wikinano30m")


def table_model(seed: int) -> Any:
    """A model whose logits depend on the last token only: float64 figures can be worked out from its table."""
    table = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return table, lambda ids: table[ids].float()


def sequence(length: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(7)).tolist()


def test_perplexity_and_its_error_are_those_of_the_formulas() -> None:
    ids, (table, model) = sequence(23), table_model(0)
    result = evaluate(model, cut_windows(ids, window=5, bos=0))
    log_probabilities = table.log_softmax(-1)
    sums, counts = [], []
    for start in range(0, 23, 5):
        window = ids[start : start + 5]
        sums.append(-sum(log_probabilities[a, b].item() for a, b in zip([0, *window], window, strict=False)))
        counts.append(len(window))
    mean = sum(sums) / sum(counts)
    residuals = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    assert (result.tokens, result.windows) == (23, 5)
    assert result.nll.mean == pytest.approx(mean, rel=1e-6)
    assert result.nll.standard_error == pytest.approx(math.sqrt(5 / 4 * residuals) / 23, rel=1e-5)
    assert result.perplexity.mean == pytest.approx(math.exp(mean), rel=1e-6)
    assert result.perplexity.standard_error == pytest.approx(math.exp(mean) * result.nll.standard_error, rel=1e-6)
    assert result.kl is result.top1 is result.log_ratio is result.perplexity_ratio is None


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    result = evaluate(lambda ids: torch.zeros(*ids.shape, VOCABULARY), cut_windows(sequence(20), 5, 0))
    assert result.perplexity.mean == pytest.approx(VOCABULARY)
    assert result.perplexity.standard_error == pytest.approx(0, abs=1e-5)


def test_batching_changes_no_figure() -> None:
    _, model = table_model(0)
    _, reference = table_model(1)
    one, many = (evaluate(model, cut_windows(sequence(23), 5, 0, batch=batch), reference) for batch in (1, 3))
    assert one.nll.mean == pytest.approx(many.nll.mean, rel=1e-12)
    assert one.kl is not None and many.kl is not None
    assert one.kl.standard_error == pytest.approx(many.kl.standard_error, rel=1e-9)


def test_divergence_from_a_reference() -> None:
    ids, (table, model), (other, reference) = sequence(40), table_model(0), table_model(1)
    result = evaluate(model, cut_windows(ids, 8, 0), reference)
    contexts = [0 if i % 8 == 0 else ids[i - 1] for i in range(40)]
    p, q = other.log_softmax(-1)[contexts], table.log_softmax(-1)[contexts]
    assert result.kl is not None and result.top1 is not None and result.perplexity_ratio is not None
    assert result.kl.mean == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert result.top1.mean == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    alone = evaluate(reference, cut_windows(ids, 8, 0))
    assert result.perplexity_ratio.mean == pytest.approx(result.perplexity.mean / alone.perplexity.mean, rel=1e-6)


def test_a_model_does_not_diverge_from_itself_and_pairing_removes_the_spread_of_the_text() -> None:
    table, model = table_model(0)
    windows = cut_windows(sequence(200), 8, 0)
    same = evaluate(model, windows, model)
    assert same.kl is not None and same.top1 is not None and same.perplexity_ratio is not None
    assert (same.kl.mean, same.top1.mean) == (0, 1)
    assert (same.perplexity_ratio.mean, same.perplexity_ratio.standard_error) == (1, 0)
    near = evaluate(lambda ids: (1.01 * table[ids]).float(), windows, model)
    assert near.log_ratio is not None
    assert near.log_ratio.standard_error < 0.1 * near.nll.standard_error


def test_impossible_tokens_do_not_spoil_the_divergence_but_nan_does() -> None:
    masked = torch.zeros(VOCABULARY)
    masked[0] = -torch.inf

    def never_zero(ids: Tensor) -> Tensor:
        return masked.expand(*ids.shape, -1)

    windows = cut_windows(sequence(8), 4, 0)
    both = evaluate(never_zero, windows, never_zero)
    assert both.kl is not None and both.kl.mean == 0
    broken = evaluate(lambda ids: never_zero(ids) * torch.nan, windows, never_zero)
    assert broken.kl is not None and math.isnan(broken.kl.mean) and math.isnan(broken.perplexity.mean)


def test_one_window_has_no_standard_error() -> None:
    assert math.isnan(evaluate(table_model(0)[1], cut_windows(sequence(4), 4, 0)).nll.standard_error)


def test_a_window_beyond_the_position_table_is_one_clear_error() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
    special = {"bos_token_id": 0, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **special)).eval()
    assert perplexity_of(model, cut_windows(sequence(10), 5, 0)) > 1
    with pytest.raises(
        AutoQuantError,
        match="windows of 7 tokens, BOS included, are longer than the model's 6 positions",
    ):
        perplexity_of(model, cut_windows(sequence(12), 6, 0))


def run(*arguments: str) -> Any:
    from autoquant.cli.eval import command

    return CliRunner().invoke(command, list(arguments))


TEXT = "The river rises in the hills to the north of the town and flows south for twelve miles to the sea . " * 3


def test_a_token_beyond_the_table_is_said() -> None:
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(AutoQuantError, match="token 11 is beyond the model's table of 11 tokens"):
        evaluate(logits_of(LlamaForCausalLM(config)), cut_windows([1, 11, 2], 3, None))


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKAGED, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AutoQuantError, match=r"model\.norm\.weight holds a NaN"):
        load(folder)


def test_the_command_prints_json_and_a_table(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(TEXT, encoding="utf-8")
    shared = (str(PACKAGED), "--data", str(data), "--length", "16", "--reference", str(PACKAGED))
    result = run(*shared, "--format", "json", "--tokens", "40")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["settings"]["length"] == 16
    (row,) = report["results"]
    assert (row["tokens"], row["windows"]) == (40, 3)
    assert row["perplexity"]["mean"] == pytest.approx(math.exp(row["nll"]["mean"]))
    assert row["perplexity_ratio"] == {"mean": 1, "standard_error": 0}
    assert row["kl"]["mean"] == 0 and row["top1_agreement"]["mean"] == 1
    table = run(*shared, "--tokens", "40").stdout
    assert f"{row['perplexity']['mean']:.3f} ± {row['perplexity']['standard_error']:.3f}" in table


def test_the_command_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    absent = run(str(PACKAGED), "--data", str(data))
    assert isinstance(absent.exception, AutoQuantError) and "text.txt: no such file" in str(absent.exception)
    data.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in str(run(str(PACKAGED), "--data", str(data)).exception)
    data.write_text(TEXT, encoding="utf-8")
    nowhere = run(str(tmp_path), "--data", str(data)).exception
    assert isinstance(nowhere, AutoQuantError) and str(tmp_path) in str(nowhere)


@needs_data
@pytest.mark.parametrize(
    ("name", "tokens", "wanted"),
    [("wikinano1m", 16_384, 22.341), pytest.param("wikinano30m", 8_192, 43.850, marks=pytest.mark.slow)],
)
def test_the_float_figures_of_the_trained_models(name: str, tokens: int, wanted: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent")
    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    text = (DATA / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")[:80_000]
    ids = tokenize(tokenizer, text)
    assert len(ids) > tokens
    model = AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.float32).eval()
    windows = cut_windows(ids, 512, tokenizer.bos_token_id, tokens)
    assert round(evaluate(logits_of(model), windows).perplexity.mean, 3) == wanted
