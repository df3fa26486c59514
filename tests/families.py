"""Tiny random models of the families that people have, each from transformers' own configuration class.

`exact` computes in float64 what models write down as float32 (norms, softmax, routers), so that they compare with
the reference to float64's precision.
"""

from __future__ import annotations

import copy
from typing import Any

import models
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HIDDEN, INNER, HEADS, HEAD = 8, 12, 2, 4
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": models.CONTEXT,
}
GROUPED = SIZES | {"num_key_value_heads": 1}
GEMMA = GROUPED | {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 6}
MIXTURE = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}

# By name: transformers' model type and its configuration. Every family of issue 7, and variants that matter here.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": HEADS, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", SIZES),
    "bloom": ("bloom", {"hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS}),
    "opt": ("opt", SIZES | {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}),
    "llama": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": False}),  # biases on some maps only
    "mistral": ("mistral", GROUPED | {"sliding_window": 6}),
    "qwen2": ("qwen2", GROUPED),  # biases on q, k and v alone
    "qwen3": ("qwen3", GROUPED | {"head_dim": HEAD}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("phi", SIZES),
    "phi3": ("phi3", GROUPED | {"pad_token_id": models.VOCABULARY.index(models.PAD)}),
    "olmo2": ("olmo2", GROUPED),
    "falcon": ("falcon", SIZES | {"multi_query": True, "ffn_hidden_size": INNER}),
    "falcon_alibi": ("falcon", SIZES | {"multi_query": False, "alibi": True, "bias": True, "ffn_hidden_size": INNER}),
    "falcon_new": (
        "falcon",
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 1, "ffn_hidden_size": INNER},
    ),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", MIXTURE | {"shared_expert_intermediate_size": 6}),
    "qwen3_moe": ("qwen3_moe", MIXTURE | {"head_dim": HEAD, "norm_topk_prob": True}),
    "olmoe": ("olmoe", MIXTURE),
    "gpt_oss": ("gpt_oss", GROUPED | {"head_dim": HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")


def build(family: str, seed: int, std: float = 0.3, **changes: Any) -> PreTrainedModel:
    """A random model of the family with weights as large as those of `models.build_model`, in float64."""
    kind, options = FAMILIES[family]
    special = {"vocab_size": len(models.VOCABULARY), "bos_token_id": 2, "eos_token_id": 1}
    config = AutoConfig.for_model(kind, **(special | options | changes))
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return models.randomise(model, seed, std)


class Exact(TorchFunctionMode):
    """Meanwhile nothing float64 becomes float32: `.float()`, `.to(float32)`, `softmax(dtype=float32)` and the like."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if "dtype" in kwargs and kwargs["dtype"] == torch.float32 and func not in _MAKERS:
                kwargs["dtype"] = torch.float64
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **kwargs)


_MAKERS = (torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like)


