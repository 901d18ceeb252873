"""Small models of public code bases with random weights, for :mod:`public_code`: factories of ``(module, inputs)``.

Each is built by the repository's own classes, out of a checkout that ``AUTOQUANT_PUBLIC/NAME`` holds; nothing of it is
copied. Packages that need a GPU or are not the point are stood in for: fairscale's parallel layers by ordinary ones,
xformers' attention by torch's. A module's ``judged`` runs it for the judge, on 200 tokens of three sequences: first 190
at once, then one at a time where the code has a cache.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, BATCH, LENGTH, DECODED = 64, 3, 200, 10
Made = tuple[nn.Module, Any]


def checkout(*parts: str) -> None:
    """Put a folder of a repository first on the import path; what other repositories imported under its names goes."""
    root = Path(os.environ["AUTOQUANT_PUBLIC"])
    for folder in (root / "packages", root.joinpath(*parts)):
        while str(folder) in sys.path:
            sys.path.remove(str(folder))
    sys.path[:0] = [str(root.joinpath(*parts)), str(root / "packages")]


class _Any(type):
    """The type of classes that have every name, again such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _anything(name)

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __add__(cls, other: Any) -> Any:
        return other


def _anything(name: str) -> Any:
    """A class that can be called, subclassed and used as a decorator, and does nothing."""
    return _Any(name, (), {"__init__": lambda self, *_, **__: None, "__call__": lambda self, *args, **_: args[0]})


class _Anything(types.ModuleType):
    """A module that has every name."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, made := _anything(name))
        return made


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that are stood in for."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _Anything(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def stand_in(*names: str) -> None:
    """Packages that are imported and not needed."""
    sys.meta_path.append(_StandIns(names))


def tokens(seed: int, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(1, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed), device="cpu")


def in_steps(step: Callable[[Tensor, int], Tensor], seed: int, batch: int = BATCH) -> Tensor:
    """``step(tokens, first position)`` for all but the last tokens at once, then for each of these."""
    whole, first = tokens(seed, batch), LENGTH - DECODED
    parts = [step(whole[:, :first], 0)] + [step(whole[:, i : i + 1], i) for i in range(first, LENGTH)]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@contextmanager
def doubled() -> Iterator[None]:
    """What a model makes anew for the judge is made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def judged(module: nn.Module, run: Callable[[nn.Module, int], Tensor]) -> nn.Module:
    """The module, with its way to be run by the judge."""
    module.judged = run  # type: ignore[assignment]  # a function kept beside the parameters
    return module


def whole(module: nn.Module, seed: int) -> Tensor:
    out = module(tokens(seed))
    return out if isinstance(out, Tensor) else out[0]


# ---- GPT-2 and Llama as people write them ----


def nanogpt() -> Made:
    checkout("nanoGPT")
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=256, vocab_size=WORDS, n_layer=2, n_head=4, n_embd=32))
    return judged(model, lambda m, seed: m(tokens(seed), tokens(seed))[0]), (tokens(0, 2, 5),)


def mingpt() -> Made:
    checkout("minGPT")
    from mingpt.model import GPT

    config = GPT.get_default_config()
    config.merge_from_dict(dict(model_type=None, n_layer=2, n_head=4, n_embd=32, vocab_size=WORDS, block_size=256))
    return judged(GPT(config), whole), (tokens(0, 2, 5),)


def llama2c() -> Made:
    checkout("llama2.c")
    from model import ModelArgs, Transformer

    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=WORDS, hidden_dim=48, max_seq_len=256)
    return judged(Transformer(args), lambda m, seed: m(tokens(seed), tokens(seed))), (tokens(0, 2, 5),)


def _parallel() -> None:
    """fairscale's layers for one process are torch's own."""
    if "fairscale" in sys.modules:
        return
    layers, initialize = types.ModuleType("layers"), types.ModuleType("initialize")

    def linear(size: int, out: int, bias: bool = True, **_: Any) -> nn.Linear:
        return nn.Linear(size, out, bias)

    def embedding(size: int, out: int, **_: Any) -> nn.Embedding:
        return nn.Embedding(size, out)

    layers.ColumnParallelLinear = layers.RowParallelLinear = linear  # type: ignore[attr-defined]  # a made module
    layers.ParallelEmbedding = layers.VocabParallelEmbedding = embedding  # type: ignore[attr-defined]  # a made module
    initialize.get_model_parallel_world_size = lambda: 1  # type: ignore[attr-defined]  # a made module
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fairscale.nn.model_parallel"].initialize = initialize  # type: ignore[attr-defined]  # a made module
    sys.modules["fairscale.nn.model_parallel.initialize"] = initialize
    sys.modules["fairscale.nn.model_parallel.layers"] = layers
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]  # its caches ask for it


def _meta_llama(package: str) -> Made:
    checkout(package)
    _parallel()
    source = Path(os.environ["AUTOQUANT_PUBLIC"]) / package / "llama" / "model.py"
    spec = importlib.util.spec_from_file_location(f"{package}_model", source)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    size: dict[str, int] = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=WORDS, multiple_of=16)
    model = module.Transformer(module.ModelArgs(**size, max_batch_size=4, max_seq_len=256))
    return judged(model, lambda m, seed: in_steps(lambda t, at: m(t, at), seed)), (tokens(0, 2, 5), 0)


def llama() -> Made:
    return _meta_llama("llama")


def llama3() -> Made:
    return _meta_llama("llama3")


def pytorch_llama() -> Made:
    checkout("pytorch-llama")
    from model import ModelArgs, Transformer

    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=WORDS, multiple_of=16, max_batch_size=4)
    args.max_seq_len, args.device = 256, "cpu"

    def run(model: nn.Module, seed: int) -> Tensor:
        given = tokens(seed)
        for layer in model.layers:  # type: ignore[union-attr]  # a ModuleList
            layer.attention.cache_k, layer.attention.cache_v = torch.zeros(2, 4, 256, 2, 8, dtype=torch.float64)
        return torch.cat([model(given[:, i : i + 1], i) for i in range(60)], dim=1)

    return judged(Transformer(args), run), (tokens(0, 2, 1), 3)


def _gpt_fast(folder: tuple[str, ...], **more: Any) -> Made:
    checkout(*folder)
    import model as source

    args = source.ModelArgs(
        block_size=256, vocab_size=WORDS, n_layer=2, n_head=4, n_local_heads=2, dim=32, intermediate_size=48, **more
    )
    model = source.Transformer(args)
    model.setup_caches(BATCH, 256)
    for layer in model.layers:  # its caches take the weights' type where they are made
        cache = layer.attention.kv_cache
        cache.k_cache, cache.v_cache = cache.k_cache.float(), cache.v_cache.float()
    given = (tokens(0, BATCH, 5), torch.arange(5))
    return judged(model, lambda m, seed: in_steps(lambda t, at: m(t, torch.arange(at, at + t.shape[1])), seed)), given


def gpt_fast() -> Made:
    return _gpt_fast(("gpt-fast",))


def gpt_fast_moe() -> Made:
    made, _ = _gpt_fast(("gpt-fast", "mixtral-moe"), num_experts=4, num_activated_experts=2)

    def run(model: nn.Module, seed: int) -> Tensor:  # its blocks lose the batch: one sequence at a time
        rows = []
        for row in range(BATCH):
            for layer in model.layers:  # type: ignore[union-attr]  # a ModuleList
                layer.attention.kv_cache.k_cache.zero_(), layer.attention.kv_cache.v_cache.zero_()
            rows.append(in_steps(lambda t, at: model(t, torch.arange(at, at + t.shape[1])), seed + 100 * row, batch=1))
        return torch.cat(rows)

    made.setup_caches = None  # type: ignore[assignment]  # done
    for layer in made.layers:  # type: ignore[union-attr]  # a ModuleList
        cache = layer.attention.kv_cache
        cache.k_cache, cache.v_cache = cache.k_cache[:1].clone(), cache.v_cache[:1].clone()
    return judged(made, run), (tokens(0, 1, 5), torch.arange(5))


# ---- laboratories' own inference code ----


def _gemma(third: bool) -> Made:
    checkout("gemma_pytorch")
    stand_in("sentencepiece", "absl", "PIL")
    from gemma import config as gemma_config
    from gemma import model as source

    source.tokenizer.Tokenizer = lambda path: None
    kinds = gemma_config.AttentionType
    settings: dict[str, Any] = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    if third:
        settings = dict(use_qk_norm=True, rope_wave_length={kinds.LOCAL_SLIDING: 10_000, kinds.GLOBAL: 1_000_000})
    config = gemma_config.GemmaConfig(
        architecture=gemma_config.Architecture.GEMMA_3 if third else gemma_config.Architecture.GEMMA_2,
        dtype="float32", vocab_size=WORDS, max_position_embeddings=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_size=32, intermediate_size=48, head_dim=8, use_pre_ffw_norm=True,
        use_post_ffw_norm=True, attn_types=[kinds.LOCAL_SLIDING, kinds.GLOBAL], sliding_window_size=64, **settings,
    )  # fmt: skip
    model = source.GemmaForCausalLM(config)

    def given(ids: Tensor, at: int, caches: Any, window: int = 256) -> dict[str, Any]:
        places = torch.arange(at, at + ids.shape[1])
        mask = torch.full((1, 1, window, window), -2.3819763e38).triu(1)
        local = mask + torch.full((1, 1, window, window), -2.3819763e38).tril(-64)
        return dict(
            input_token_ids=ids, input_positions=places, kv_write_indices=None, kv_caches=caches,
            mask=mask[:, :, places], local_mask=local[:, :, places], output_positions=torch.tensor([ids.shape[1] - 1]),
            temperatures=None, top_ps=torch.ones(len(ids)), top_ks=torch.ones(len(ids), dtype=torch.long),
        )  # fmt: skip

    def caches(batch: int, window: int = 256) -> list[tuple[Tensor, Tensor]]:
        return [(torch.zeros(batch, window, 2, 8), torch.zeros(batch, window, 2, 8)) for _ in range(2)]

    def run(m: nn.Module, seed: int) -> Tensor:
        with doubled():
            held = caches(BATCH)
            return in_steps(lambda t, at: m(**given(t, at, held))[1], seed)

    return judged(model, run), given(tokens(0, 2, 5), 0, caches(2, 16), 16)


def gemma2() -> Made:
    return _gemma(False)


def gemma3() -> Made:
    return _gemma(True)


def _deepseek(attention: str) -> Made:
    checkout("DeepSeek-V3", "inference")
    sys.modules["kernel"] = _Anything("kernel")  # Triton's, for fp8 alone
    sys.modules.pop("model", None)
    import model as source

    source.attn_impl = attention
    args = source.ModelArgs(
        max_batch_size=4, max_seq_len=256, vocab_size=WORDS, dim=32, inter_dim=48, moe_inter_dim=16, n_layers=2,
        n_heads=4, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2, n_expert_groups=2,
        n_limited_groups=1, score_func="sigmoid", q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    model = source.Transformer(args).float()
    return judged(model, lambda m, seed: in_steps(lambda t, at: m(t, at), seed)), (tokens(0, 2, 5), 0)


def deepseek_v3() -> Made:
    return _deepseek("absorb")


def gpt_oss() -> Made:
    checkout("gpt-oss")
    from gpt_oss.torch.model import ModelConfig, Transformer

    config = ModelConfig(
        num_hidden_layers=2, num_experts=4, experts_per_token=2, vocab_size=WORDS, hidden_size=32,
        intermediate_size=24, head_dim=8, num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
        rope_scaling_factor=1.0,
    )  # fmt: skip
    model = Transformer(config).float()
    for block in model.block:
        nn.init.zeros_(block.attn.sinks)  # made empty, to be loaded

    def run(m: nn.Module, seed: int) -> Tensor:  # no batch, no cache
        return torch.cat([m(row) for row in tokens(seed)])

    return judged(model, run), (tokens(0, 1, 5)[0],)


def mistral() -> Made:
    return _mistral(None)


def mistral_moe() -> Made:
    return _mistral(4)


def _mistral(experts: int | None) -> Made:
    checkout("mistral-inference", "src")
    stand_in("xformers", "mistral_common")
    importlib.import_module("mistral_inference.transformer_layers")
    from mistral_inference import transformer_layers as layers
    from mistral_inference.args import TransformerArgs
    from mistral_inference.moe import MoeArgs
    from mistral_inference.transformer import Transformer

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    layers.memory_efficient_attention = attention
    model = Transformer(
        TransformerArgs(
            dim=32,
            n_layers=2,
            head_dim=8,
            hidden_dim=48,
            n_heads=4,
            n_kv_heads=2,
            norm_eps=1e-5,
            vocab_size=WORDS,
            max_batch_size=4,
            rope_theta=10000.0,
            moe=experts and MoeArgs(experts, 2),
        )
    )
    model._precomputed_freqs_cis = (
        layers.precompute_freqs_cis(8, 256, 10000.0) if hasattr(layers, "precompute_freqs_cis") else None
    )

    def run(m: nn.Module, seed: int) -> Tensor:  # sequences one after the other, and no mask between them here
        return torch.cat([m(row, [LENGTH]) for row in tokens(seed)])

    return judged(model, run), (tokens(0, 1, 5)[0], [5])


def whisper() -> Made:
    checkout("whisper")
    stand_in("numba", "tiktoken")
    from whisper.model import ModelDimensions, Whisper

    model = Whisper(ModelDimensions(8, 20, 32, 4, 2, WORDS, 256, 32, 4, 2))
    generator = torch.Generator().manual_seed(0)

    def run(m: Any, seed: int) -> Tensor:
        sound = torch.randn(BATCH, 8, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        cache, hooks = m.install_kv_cache_hooks()
        heard = m.encoder(sound)
        try:
            return in_steps(lambda t, at: m.decoder(t, heard, kv_cache=cache), seed)
        finally:
            for hook in hooks:
                hook.remove()

    return judged(model, run), (torch.randn(2, 8, 40, generator=generator), tokens(0, 2, 5))


# ---- training frameworks ----


def litgpt() -> Made:
    return _litgpt(
        name="small", block_size=256, padded_vocab_size=WORDS, vocab_size=WORDS, n_layer=2, n_head=4, n_embd=32,
        n_query_groups=2, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=48,
        rotary_percentage=1.0, parallel_residual=False, bias=False,
    )  # fmt: skip


def litgpt_moe() -> Made:
    return _litgpt(
        name="small", block_size=256, padded_vocab_size=WORDS, vocab_size=WORDS, n_layer=2, n_head=4, n_embd=32,
        n_query_groups=2, norm_class_name="RMSNorm", mlp_class_name="LLaMAMoE", intermediate_size=48,
        moe_intermediate_size=48, rotary_percentage=1.0, parallel_residual=False, bias=False, n_expert=4,
        n_expert_per_token=2,
    )  # fmt: skip


def _litgpt(**settings: Any) -> Made:
    checkout("litgpt")
    root = Path(os.environ["AUTOQUANT_PUBLIC"]) / "litgpt" / "litgpt"
    stand_in("lightning", "lightning_utilities", "torchmetrics", "jsonargparse", "litdata", "psutil", "bitsandbytes")
    for name in ("litgpt", "litgpt.scripts"):  # their __init__ imports trainers
        package = types.ModuleType(name)
        package.__path__ = [str(root / name.partition(".")[2])]
        sys.modules[name] = package
    sys.modules["litgpt"].model = importlib.import_module("litgpt.model")  # type: ignore[attr-defined]  # a made module
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(Config(**settings))

    def run(m: Any, seed: int) -> Tensor:
        m.set_kv_cache(BATCH, dtype=torch.float64)
        out = in_steps(lambda t, at: m(t, torch.arange(at, at + t.shape[1])), seed)
        m.clear_kv_cache()
        return out

    return judged(model, run), (tokens(0, 2, 5),)


def torchtune() -> Made:
    checkout("torchtune")
    stand_in(
        "torchao", "torchdata", "datasets", "blobfile", "tiktoken", "sentencepiece", "kagglehub", "PIL", "torchvision"
    )
    from torchtune.models.llama3._component_builders import llama3 as build

    model = build(WORDS, 2, 4, 2, 32, 256, intermediate_dim=48)

    def run(m: Any, seed: int) -> Tensor:
        m.setup_caches(BATCH, dtype=torch.float64, decoder_max_seq_len=256)
        mask = torch.ones(256, 256, dtype=torch.bool).tril()

        def step(t: Tensor, at: int) -> Tensor:
            places = torch.arange(at, at + t.shape[1])
            out: Tensor = m(t, input_pos=places[None].expand(BATCH, -1), mask=mask[places][None].expand(BATCH, -1, -1))
            return out

        return in_steps(step, seed)

    return judged(model, run), (tokens(0, 2, 5),)


def olmo() -> Made:
    checkout("OLMo")
    stand_in("olmo_data", "boto3", "botocore", "cached_path", "google", "datasets", "requests", "torchmetrics", "wandb")
    from olmo.config import ModelConfig
    from olmo.model import OLMo

    model = OLMo(
        ModelConfig(
            d_model=32,
            n_heads=4,
            n_kv_heads=2,
            n_layers=2,
            mlp_hidden_size=96,
            vocab_size=WORDS,
            max_sequence_length=256,
            embedding_size=WORDS,
            activation_type="swiglu",
            rope=True,
            include_bias=False,
            layer_norm_type="rms",
            weight_tying=False,
            init_device="cpu",
            attention_dropout=0.0,
            residual_dropout=0.0,
            embedding_dropout=0.0,
        )
    )

    def run(m: nn.Module, seed: int) -> Tensor:
        held: dict[str, Any] = {"past": None}

        def step(t: Tensor, at: int) -> Tensor:
            out = m(t, past_key_values=held["past"], use_cache=True)
            held["past"] = out.attn_key_values
            return out.logits

        return in_steps(step, seed)

    return judged(model, run), (tokens(0, 2, 5),)


def lingua() -> Made:
    checkout("lingua")
    stand_in("xformers")
    from apps.main.transformer import LMTransformer, LMTransformerArgs

    args = LMTransformerArgs(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=WORDS, multiple_of=16, max_seqlen=256
    )
    model = LMTransformer(args)
    return judged(model, whole), (tokens(0, 2, 5),)


def nanochat() -> Made:
    checkout("nanochat")
    stand_in("datasets", "wandb", "rustbpe", "tiktoken")
    from nanochat import gpt
    from nanochat.engine import KVCache

    model = gpt.GPT(gpt.GPTConfig(sequence_len=256, vocab_size=WORDS, n_layer=4, n_head=4, n_kv_head=2, n_embd=32))
    model.cos, model.sin = (table.float() for table in model._precompute_rotary_embeddings(2560, 8))

    def run(m: nn.Module, seed: int) -> Tensor:
        gpt.COMPUTE_DTYPE = torch.float64
        cache = KVCache(BATCH, 2, 256, 8, 4, "cpu", torch.float64)
        return in_steps(lambda t, at: m(t, kv_cache=cache), seed)

    return judged(model, run), (tokens(0, 2, 5),)


def x_transformers() -> Made:
    checkout("x-transformers")
    from x_transformers import Decoder, TransformerWrapper

    model = TransformerWrapper(
        num_tokens=WORDS, max_seq_len=256,
        attn_layers=Decoder(
            dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True
        ),
    )  # fmt: skip
    return judged(model, whole), (tokens(0, 2, 5),)


# ---- from a book ----


def _raschka() -> None:
    checkout("LLMs-from-scratch", "pkg")
    stand_in("tiktoken", "matplotlib", "pandas", "tensorflow", "blobfile", "requests")


def raschka_gpt() -> Made:
    _raschka()
    from llms_from_scratch.kv_cache.gpt2 import GPTModel

    model = GPTModel(
        dict(vocab_size=WORDS, context_length=256, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=True)
    )
    return judged(model, whole), (tokens(0, 2, 5),)


def raschka_llama3() -> Made:
    _raschka()
    from llms_from_scratch.kv_cache.llama3 import Llama3Model
    from llms_from_scratch.kv_cache.utils import KVCache

    model = Llama3Model(
        dict(
            vocab_size=WORDS,
            context_length=256,
            emb_dim=32,
            n_heads=4,
            n_layers=2,
            hidden_dim=48,
            n_kv_groups=2,
            rope_base=1e4,
            dtype=torch.float32,
            rope_freq=None,
        )
    )

    def run(m: Any, seed: int) -> Tensor:
        cache, m.cfg["dtype"], m.current_pos = KVCache(2), torch.float64, 0
        return in_steps(lambda t, at: m(t, cache=cache), seed)

    return judged(model, run), (tokens(0, 2, 5),)


def raschka_qwen3() -> Made:
    return _qwen3({})


def raschka_qwen3_moe() -> Made:
    return _qwen3(dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24))


def _qwen3(more: dict[str, Any]) -> Made:
    _raschka()
    from llms_from_scratch.kv_cache.qwen3 import Qwen3Model
    from llms_from_scratch.kv_cache.utils import KVCache

    model = Qwen3Model(
        dict(
            vocab_size=WORDS,
            context_length=256,
            emb_dim=32,
            n_heads=4,
            n_layers=2,
            hidden_dim=48,
            head_dim=8,
            qk_norm=True,
            n_kv_groups=2,
            rope_base=1e4,
            dtype=torch.float32,
            **({"num_experts": 0} | more),
        )
    )

    def run(m: Any, seed: int) -> Tensor:
        cache, m.cfg["dtype"], m.current_pos = KVCache(2), torch.float64, 0
        return in_steps(lambda t, at: m(t, cache=cache), seed)

    return judged(model, run), (tokens(0, 2, 5),)


# ---- state spaces ----


def mamba_minimal() -> Made:
    checkout("mamba-minimal")
    from model import Mamba, ModelArgs

    return judged(Mamba(ModelArgs(d_model=32, n_layer=2, vocab_size=WORDS)), whole), (tokens(0, 2, 5),)


def mamba_py() -> Made:
    checkout("mamba.py")
    from mambapy.lm import LM
    from mambapy.mamba import MambaConfig

    return judged(LM(MambaConfig(d_model=32, n_layers=2), WORDS), whole), (tokens(0, 2, 5),)


def jamba_py() -> Made:
    checkout("mamba.py")
    from mambapy.jamba import JambaLM, JambaLMConfig

    config = JambaLMConfig(
        d_model=32, n_layers=4, mlp_size=48, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, vocab_size=WORDS, attn_layer_offset=1, attn_layer_period=4, expert_layer_offset=1,
        expert_layer_period=2,
    )  # fmt: skip
    return judged(JambaLM(config), whole), (tokens(0, 2, 5),)
