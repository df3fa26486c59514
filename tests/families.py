"""Tiny random models of the families that people have, each from transformers' own configuration class.

`exact` computes in float64 what models write down as float32 (norms, softmax, routers), so that they compare with
the reference to float64's precision.
"""

from __future__ import annotations

import copy
from typing import Any

import models
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
LONGROPE = {
    "original_max_position_embeddings": 8,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [4.0, 2.0],
        "original_max_position_embeddings": 8,
        "factor": models.CONTEXT / 8,
    },
}
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
    # Other rotary frequencies for sequences of more than 8 tokens than for others.
    "phi3_longrope": ("phi3", GROUPED | {"pad_token_id": models.VOCABULARY.index(models.PAD)} | LONGROPE),
    "olmo2": ("olmo2", GROUPED),
    "falcon": ("falcon", SIZES | {"multi_query": True, "ffn_hidden_size": INNER}),
    "falcon_alibi": ("falcon", SIZES | {"multi_query": False, "alibi": True, "bias": True, "ffn_hidden_size": INNER}),
    "falcon_new": (
        "falcon",
        SIZES
        | {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": INNER},
    ),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", MIXTURE | {"shared_expert_intermediate_size": 6}),
    "qwen3_moe": ("qwen3_moe", MIXTURE | {"head_dim": HEAD, "norm_topk_prob": True}),
    "olmoe": ("olmoe", MIXTURE),
    # Latent attention: keys and values of one head before they are spread to all.
    "deepseek_v3": (
        "deepseek_v3",
        GROUPED
        | {"num_key_value_heads": HEADS, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": HEAD}
        | {"qk_nope_head_dim": HEAD, "v_head_dim": HEAD, "first_k_dense_replace": 2, "n_routed_experts": 4},
    ),
    "llama4": (
        "llama4_text",
        GROUPED
        | {"head_dim": HEAD, "intermediate_size_mlp": INNER, "num_local_experts": 3, "num_experts_per_tok": 1}
        | {"moe_layers": [1], "attention_chunk_size": 8, "pad_token_id": 3},
    ),
    "gpt_oss": ("gpt_oss", GROUPED | {"head_dim": HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "llama4", "gpt_oss")


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


class Loose(nn.ModuleList):
    """A module's fused experts as linear maps, each of which sees every token; what a token is not sent to counts
    zero times. `routed` [T] of every map says which tokens were sent to it. Shares no code with the package."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.__dict__["fused"] = fused  # not a submodule: for its activation alone
        flip = type(fused).__name__ in ("GptOssExperts", "Llama4TextExperts")
        for expert in range(len(fused.down_proj)):
            maps = {}
            for name in ("gate_up_proj", "down_proj"):
                weight, bias = getattr(fused, name)[expert], getattr(fused, f"{name}_bias", None)
                weight = weight.T if flip else weight
                maps[name] = nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=weight.dtype)
                with torch.no_grad():
                    maps[name].weight.copy_(weight)
                    if bias is not None:
                        maps[name].bias.copy_(bias[expert])
            self.append(nn.ModuleDict(maps))

    def run(self, expert: int, tokens: Tensor, routed: Tensor) -> Tensor:
        first, second = self[expert]["gate_up_proj"], self[expert]["down_proj"]
        first.routed = second.routed = routed
        middle = first(tokens)
        if type(self.fused).__name__ == "GptOssExperts":
            gate, up = middle[:, ::2].clamp(max=self.fused.limit), middle[:, 1::2]
            up = up.clamp(-self.fused.limit, self.fused.limit)
            return second((up + 1) * gate * torch.sigmoid(self.fused.alpha * gate))
        half = middle.shape[1] // 2
        return second(self.fused.act_fn(middle[:, :half]) * middle[:, half:])

    def forward(self, tokens: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if index is None:  # Llama 4: an expert's own copy of all tokens, zero where they are not sent to it
            own = tokens.reshape(len(self), -1, tokens.shape[-1])
            return torch.cat([self.run(e, own[e], (own[e] != 0).any(1)) for e in range(len(self))])
        total = torch.zeros_like(tokens)
        for expert in range(len(self)):
            weight = (weights * (index == expert)).sum(1)
            total = total + weight[:, None] * self.run(expert, tokens, (index == expert).any(1))
        return total


def loosened(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose fused experts are linear maps of their own, named as the package names them."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Parameter):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], Loose(module))
    return model


class Cut(nn.ModuleDict):
    """A linear map as several, each of which makes some rows of its outputs: `rows` by name, together all rows."""

    def __init__(self, whole: nn.Module, rows: dict[str, list[int]]) -> None:
        super().__init__()
        flip = isinstance(whole, Conv1D)
        weight = whole.weight.T if flip else whole.weight
        for name, own in rows.items():
            part = nn.Linear(weight.shape[1], len(own), bias=whole.bias is not None, dtype=weight.dtype)
            with torch.no_grad():
                part.weight.copy_(weight[own])
                if whole.bias is not None:
                    part.bias.copy_(whole.bias[own])
            kind, _, head = name.partition(".")
            if head:
                self[kind] = self[kind] if kind in self else nn.ModuleDict()
                self[kind][head] = part
            else:
                self[kind] = part
        by_kind = [own for kind in self for name, own in rows.items() if name.startswith(kind)]
        self.back = torch.tensor([row for own in by_kind for row in own]).argsort()

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([part(inputs) for part in self.modules() if isinstance(part, nn.Linear)], dim=-1)[
            ..., self.back
        ]


def cut(model: PreTrainedModel, rows: dict[str, dict[str, list[int]]]) -> PreTrainedModel:
    """A copy in which modules whose names end as `rows` says are cut, into linear maps named `<module>.<name>`."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        own = name.rpartition(".")[2]
        if own in rows:
            setattr(model.get_submodule(name.rpartition(".")[0]), own, Cut(module, rows[own]))
    return model
