"""Adapters of the small models, by peft."""

import copy
from pathlib import Path
from typing import Any

import models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

MAPS = {
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "down_proj"],
}


def adapted(base: PreTrainedModel, named: str, seed: int = 0, **options: Any) -> PeftModel:
    """The model with an adapter of random matrices (and random whole tensors, where it has them)."""
    base = copy.deepcopy(base)
    base.name_or_path = named
    model = get_peft_model(base, LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((0.3 * torch.randn(parameter.shape, generator=generator)).float())
    return model


def save_adapter(folder: Path, base: Path, name: str = "adapter", **options: Any) -> Path:
    """An adapter of the model in `base`, without a tokenizer."""
    model, _ = models.load(base)
    options = {"target_modules": MAPS["gpt_neox"]} | options
    adapted(model, str(base), **options).save_pretrained(folder / name)
    return folder / name
