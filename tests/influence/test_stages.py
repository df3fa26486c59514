"""Four stages as people have them: continued pre-training, chat tokens added to the vocabulary, another tokenizer."""

from collections.abc import Iterator

import models
import pipeline
import pytest
import reference
import torch
from test_dense_reference import QUERIES, SMALL, package_scores, score_error
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


@pytest.fixture(scope="module")
def case() -> Iterator[tuple[list[reference.StageSpec], list[dict[str, reference.Fit]], list[pipeline.Factors]]]:
    stages = four_stages()
    names = reference.tracked_names(stages[-1].model)
    yield stages, [reference.fit(stage, names) for stage in stages], [pipeline.fit(stage).factors for stage in stages]


def test_the_stages_differ_as_they_should(case) -> None:
    stages = case[0]
    sizes = [stage.model.config.vocab_size for stage in stages]
    assert sizes == [len(models.VOCABULARY)] * 2 + [len(models.VOCABULARY) + 2] * 2
    ids = [reference.tokenise(stage.tokenizer, QUERIES[0])[0] for stage in stages]
    assert ids[0] == ids[2] != ids[3] and len(ids[3]) == len(ids[2]) + 1
    used = {token for row in stages[2].documents for token in reference.tokenise(stages[2].tokenizer, row)[0]}
    assert used >= {sizes[0], sizes[0] + 1}


@pytest.mark.parametrize("scored", range(4), ids=NAMES)
def test_scores_of_every_stage_equal_the_dense_reference(case, scored: int) -> None:
    stages, fits, factors = case
    documents = stages[scored].documents[:8]
    dense = reference.scores(stages, QUERIES, documents, scored, fits=fits, names=list(fits[0]))
    found = package_scores(stages, factors, documents, scored)
    assert max(score_error(found, dense)) < 1e-9
