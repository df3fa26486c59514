"""Four stages as people have them: continued pre-training, chat tokens added to the vocabulary, another tokenizer."""

import models
import reference
import torch
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SMALL = {"strength": 1e-3, "damping": 1e-3}
ADDED = ["<|user|>", "<|assistant|>"]
NAMES = ("pretrain", "continued", "chat", "other")


def grown(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With two tokens more, which documents use."""
    tokenizer.add_tokens(ADDED, special_tokens=True)
    return tokenizer


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same words with other numbers, and a BOS token in front."""
    tokenizer = models.build_tokenizer(bos=True)
    known = [*models.VOCABULARY[:4], *reversed(models.VOCABULARY[4:])]
    tokenizer.backend_tokenizer.model = WordLevel({token: i for i, token in enumerate(known)}, unk_token=models.UNKNOWN)
    return tokenizer


def resized(model: PreTrainedModel, seed: int, size: int) -> PreTrainedModel:
    """A perturbed copy with so many tokens, the new ones' embeddings random."""
    model = models.perturb(model, seed)
    model.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for embedding in {model.get_input_embeddings(), model.get_output_embeddings()}:
            new = embedding.weight[len(models.VOCABULARY) :]
            new.copy_((0.3 * torch.randn(new.shape, generator=generator)).float())
    return model


def four_stages(seed: int = 0, count: int = 20) -> list[reference.StageSpec]:
    first = models.build_model("gpt_neox", seed)
    second = models.perturb(first, seed + 1)
    third = resized(second, seed + 2, len(models.VOCABULARY) + len(ADDED))
    fourth = models.perturb(third, seed + 3)
    texts = models.random_documents(seed, count, words=(2, 16))
    more = models.random_documents(seed + 1, count, words=(2, 16))
    answers = models.random_documents(seed + 2, count, words=(2, 8), completions=True)
    answers = [row | {"prompt": f"{ADDED[0]}{row['prompt']}{ADDED[1]}"} for row in answers]
    others = models.random_documents(seed + 3, count, words=(2, 8), completions=True)
    tokenizer, chat = models.build_tokenizer(), grown(models.build_tokenizer())
    return [
        reference.StageSpec(NAMES[0], first, tokenizer, texts, max_tokens=12, seed=seed, **SMALL),
        reference.StageSpec(NAMES[1], second, tokenizer, more, max_tokens=10, seed=seed, **SMALL),
        reference.StageSpec(NAMES[2], third, chat, answers, max_tokens=16, seed=seed, **SMALL),
        reference.StageSpec(NAMES[3], fourth, other_tokenizer(), others, seed=seed, **SMALL),
    ]
