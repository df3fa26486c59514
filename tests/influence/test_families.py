"""Every family of models, in two stages, against the dense float64 reference: scores, norms and token counts."""

import families
import models
import pipeline
import pytest
import reference

SMALL = {"strength": 1e-3, "damping": 1e-3}
QUERIES = models.random_documents(7, 2, words=(2, 7), completions=True, prefix="query")
TEXTS = models.random_documents(1, 12, words=(2, 20))
# Enough that every expert sees more of their targets than its matrices have rows: an eigenbasis of a null space is
# anyone's choice.
ANSWERS = models.random_documents(2, 32, words=(2, 9), completions=True)


def stages_of(first, second, answers=12):
    """Ragged texts in several windows, and prompts whose tokens are masked; labels sampled by both models."""
    tokenizer = models.build_tokenizer()
    return [
        reference.StageSpec("pretrain", first, tokenizer, TEXTS, max_tokens=12, seed=3, **SMALL),
        reference.StageSpec("tune", second, tokenizer, ANSWERS[:answers], max_tokens=16, seed=3, **SMALL),
    ]


def compare(stages, expected_stages=None):
    """Largest relative errors of scores and of norms of the first stage's documents."""
    documents = TEXTS[:6]
    factors = [pipeline.fit(stage, 90).factors for stage in stages]
    found, _ = pipeline.score(pipeline.dense(pipeline.carry(stages, factors, QUERIES)), stages[0], QUERIES, documents)
    dense = expected_stages or stages
    names = [name for name in reference.tracked_names(dense[-1].model) if not name.endswith("router")]
    assert set(names) == set(factors[0])
    expected, _ = reference.scores(dense, QUERIES, documents, 0, names)
    assert found.keys() == expected.keys()
    assert all(found[pair][2] == expected[pair][2] for pair in found)
    return [
        max(abs(found[pair][i] - expected[pair][i]) for pair in found) / max(abs(each[i]) for each in expected.values())
        for i in (0, 1)
    ]


# Each of another kind; the rest are `long`.
QUICK = ("gpt2", "gpt_neox", "bloom", "opt", "qwen2", "gemma2", "phi3", "falcon_new", "mixtral", "llama4")
BY_COST = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in families.FAMILIES]


@pytest.mark.parametrize("family", BY_COST)
def test_scores_of_two_stages(family):
    first = families.build(family, 0)
    models_of = [first, models.perturb(first, 1)]
    with families.Exact():
        if family in families.MIXTURES:
            loose = [families.loosened(model) for model in models_of]
            assert max(compare(stages_of(*models_of, 32), stages_of(*loose, 32))) < 1e-8
        else:
            assert max(compare(stages_of(*models_of))) < 1e-8
