"""Every family of models, in two stages, against the dense float64 reference: scores, norms and token counts."""

import families
import models
import pipeline
import pytest
import reference
import torch
from transformers.pytorch_utils import Conv1D

from msif_ray.influence.modules import find_linear_maps

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


def compare(stages, expected_stages=None, blocks=None):
    """Largest relative errors of scores, of norms and of norms in the inverse curvature of the first stage's
    documents."""
    documents = TEXTS[:6]
    factors = [pipeline.fit(stage, 90, blocks).factors for stage in stages]
    carried = pipeline.dense(pipeline.carry(stages, factors, QUERIES, 0, blocks))
    found, _ = pipeline.score(carried, stages[0], QUERIES, documents, 150, blocks)
    dense = expected_stages or stages
    names = [name for name in reference.tracked_names(dense[-1].model) if not name.endswith("router")]
    assert set(names) == set(factors[0])
    fits = [reference.fit(stage, names) for stage in dense]
    expected, _ = reference.scores(dense, QUERIES, documents, 0, names, fits)
    assert found.keys() == expected.keys()
    assert all(found[pair][2] == expected[pair][2] for pair in found)
    norms = pipeline.curvature_norms(stages[0], factors[0], documents, 150, blocks)
    expected_norms = reference.curvature_norms(dense[0], fits[0], documents)
    assert norms.keys() == expected_norms.keys()
    return [
        max(abs(found[pair][i] - expected[pair][i]) for pair in found) / max(abs(each[i]) for each in expected.values())
        for i in (0, 1)
    ] + [max(abs(norms[name] - norm) for name, norm in expected_norms.items()) / max(expected_norms.values())]


# Each of another kind; the rest are `long`.
QUICK = (
    "gpt2",
    "gpt_neox",
    "bloom",
    "opt",
    "qwen2",
    "gemma2",
    "phi3",
    "phi3_longrope",
    "falcon_new",
    "mixtral",
    "llama4",
)
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


def rows_of(*spans):
    return [row for start, stop in spans for row in range(start, stop)]


# What a map's outputs are, written down by hand: of each family by module, and of each module the rows of every block.
# Heads have four rows, two of queries share one of keys and values in `SHARED`; `IN_GROUPS` has four heads of two.
HEAD_BY_HEAD = {"q.0": (0, 4), "k.0": (4, 8), "v.0": (8, 12), "q.1": (12, 16), "k.1": (16, 20), "v.1": (20, 24)}
IN_THREE = {"q.0": (0, 4), "q.1": (4, 8), "k.0": (8, 12), "k.1": (12, 16), "v.0": (16, 20), "v.1": (20, 24)}
IN_GROUPS = {
    "q.0": (0, 2), "q.1": (2, 4), "k.0": (4, 6), "v.0": (6, 8),
    "q.2": (8, 10), "q.3": (10, 12), "k.1": (12, 14), "v.1": (14, 16),
}  # fmt: skip
SHARED = {"q.0": (0, 4), "q.1": (4, 8), "k.0": (8, 12), "v.0": (12, 16)}
PLACES = {
    "gpt2": {"c_attn": IN_THREE},
    "gpt_neox": {"query_key_value": HEAD_BY_HEAD},
    "bloom": {"query_key_value": HEAD_BY_HEAD},
    "falcon": {"query_key_value": SHARED},
    "falcon_alibi": {"query_key_value": HEAD_BY_HEAD},
    "falcon_new": {"query_key_value": IN_GROUPS},
    "phi3": {"qkv_proj": SHARED},
    "qwen2": {"q_proj": {"q.0": (0, 4), "q.1": (4, 8)}, "k_proj": {"k.0": (0, 4)}, "v_proj": {"v.0": (0, 4)}},
}


def blocks_of(family, blocks):
    """The rows of every block of the family's modules, by module."""
    if blocks == "heads":
        return {
            module: {name: rows_of(span) for name, span in places.items()} for module, places in PLACES[family].items()
        }
    fused = {module: places for module, places in PLACES[family].items() if len({name[0] for name in places}) > 1}
    return {
        module: {kind: rows_of(*(span for name, span in places.items() if name[0] == kind)) for kind in "qkv"}
        for module, places in fused.items()
    }


@pytest.mark.parametrize("blocks", ("qkv", "heads"))
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "gpt_neox" else [pytest.mark.long]) for f in PLACES]
)
def test_blocks_are_as_if_they_were_maps_of_their_own(family, blocks):
    first = families.build(family, 0)
    models_of = [first, models.perturb(first, 1)]
    with families.Exact():
        cut = [families.cut(model, blocks_of(family, blocks)) for model in models_of]
        assert max(compare(stages_of(*models_of, 32), stages_of(*cut, 32), blocks)) < 1e-8


@pytest.mark.parametrize("family", PLACES)
def test_a_head_feeds_its_own_part_of_the_attention_output(family):
    """A block is a head's: without its value rows, the attention's output map sees zeros where that head writes."""
    model = families.build(family, 0)
    maps = find_linear_maps(model, None, "heads")
    value = next(described for name, described in maps.items() if ".1." in name and name.endswith(".v.0"))
    module = model.get_submodule(value.source)
    ((start, stop),) = value.rows.spans
    with torch.no_grad():
        (module.weight.T if isinstance(module, Conv1D) else module.weight)[start:stop] = 0
        if module.bias is not None:
            module.bias[start:stop] = 0
    attention, seen = value.source.rpartition(".")[0], []
    output = next(name for name in maps if name.startswith(attention) and maps[name].rows is None)
    handle = model.get_submodule(output).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 9, 7, 30, 11]]))
    handle.remove()
    heads = 2 if family in ("falcon", "phi3", "qwen2") else 1  # so many query heads share this value
    assert not seen[0][..., : 4 * heads].any()
    assert heads == 2 or seen[0][..., 4:].all()
