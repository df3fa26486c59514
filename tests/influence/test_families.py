"""Every family of models, in two stages, against the dense float64 reference: scores, norms and token counts."""

import families
import models
import pipeline
import pytest
import reference
import torch

SMALL = {"strength": 1e-3, "damping": 1e-3}
QUERIES = models.random_documents(7, 2, words=(2, 7), completions=True, prefix="query")
TEXTS = models.random_documents(1, 12, words=(2, 20))
ANSWERS = models.random_documents(2, 12, words=(2, 9), completions=True)


def stages_of(first, second):
    """Ragged texts in several windows, and prompts whose tokens are masked; labels sampled by both models."""
    tokenizer = models.build_tokenizer()
    return [
        reference.StageSpec("pretrain", first, tokenizer, TEXTS, max_tokens=12, seed=3, **SMALL),
        reference.StageSpec("tune", second, tokenizer, ANSWERS, max_tokens=16, seed=3, **SMALL),
    ]


def compare(stages, expected_stages=None):
    """Largest relative errors of scores and of norms of the first stage's documents."""
    documents = TEXTS[:6]
    factors = [pipeline.fit(stage, 90).factors for stage in stages]
    found, _ = pipeline.score(pipeline.dense(pipeline.carry(stages, factors, QUERIES)), stages[0], QUERIES, documents)
    expected, _ = reference.scores(expected_stages or stages, QUERIES, documents)
    assert found.keys() == expected.keys()
    assert all(found[pair][2] == expected[pair][2] for pair in found)
    return [
        max(abs(found[pair][i] - expected[pair][i]) for pair in found) / max(abs(each[i]) for each in expected.values())
        for i in (0, 1)
    ]


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in families.MIXTURES])
def test_scores_of_two_stages(family):
    model = families.build(family, 0)
    with families.Exact():
        assert max(compare(stages_of(model, models.perturb(model, 1)))) < 1e-8
    assert not any(isinstance(weight.grad, torch.Tensor) for weight in model.parameters())
