"""Facts are keyed by operator, never by architecture: no model type stands in the code of autoquant/."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "autoquant"

# Found anywhere in a name or string: families whose name means nothing else. 'LlamaForCausalLM' and 'is_llama' alike.
FAMILIES = (
    "apertus bailing bamba bigbird biogpt bitnet blenderbot camembert codegen cohere cpmant dbrx deepseek diffllama "
    "ernie exaone falcon gemma gpt2 gpt_2 gpt_bigcode gpt_neo gpt_oss gptj gptneo granite hunyuan hyperclova "
    "internlm jamba jetmoe kimi lfm2 llama longcat mamba mellum mimo minicpm minimax ministral mistral mixtral "
    "mllama modernbert moshi musicgen nanochat nemotron olmo pegasus persimmon phimoe plbart prophetnet qwen "
    "rembert roberta rwkv seed_oss smollm stablelm starcoder trocr vaultgemma xglm xlnet xlstm zamba "
)

# Found as a whole word between underscores, digits belonging to the word: too short to look for inside other words.
WORDS = (
    "afmoe arcee axk1 bart bert bloom blt cwm doge dots1 electra emu3 glm glm4 helium jais2 marian mbart mpt mvp "
    "opt phi phi3 phi4 reformer roformer xlm xmod youtu zaya "
)

# Of the types in transformers' causal-LM mapping these are left out, as they are English words or terms of our field:
# aria_text, beam, ctrl, data2vec, flint, fuyu, git, inkling, laguna, solar_open, whisper.

PATTERN = re.compile("|".join(FAMILIES.split()) + rf"|(?<![a-z0-9])(?:{'|'.join(WORDS.split())})(?![a-z0-9])")


def code_words(source: str) -> Iterator[tuple[int, str]]:
    """Names and string literals with their lines; not comments and docstrings, whose prose may give examples."""
    statement_start = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            statement_start = True
        elif token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
            continue
        else:
            # Python 3.12 and later cut f-strings into pieces, of which FSTRING_MIDDLE is text.
            text = token.type == tokenize.STRING and not statement_start
            if text or tokenize.tok_name[token.type] in ("NAME", "FSTRING_MIDDLE"):
                yield token.start[0], token.string
            statement_start = False


def architecture_names(source: str) -> list[str]:
    return [f"{line}: {word}" for line, word in code_words(source) if PATTERN.search(word.lower())]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_code_names_no_architecture(path: Path) -> None:
    assert architecture_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "if model_type == 'llama': pass",
        "TABLE = {\n    'Qwen3MoeForCausalLM': 1}",
        "is_gemma2 = True",
        "from transformers import GPT2LMHeadModel",
        "x = f'model is opt {y}'",
        "phi3_rule(x)",
        "kind = 'gpt_neox'",
    ],
)
def test_that_a_name_would_be_seen(source: str) -> None:
    assert len(architecture_names(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""As in Llama."""\n',
        "def f():\n    '''Mixtral's router.'''\n    return 1\n",
        "x = 1  # Gemma's 1 + weight\n",
        "option = dolphin = morphism = adoption\n",
        "optimizer = philosophy\n",
    ],
)
def test_that_prose_and_other_words_are_not(source: str) -> None:
    assert architecture_names(source) == []
