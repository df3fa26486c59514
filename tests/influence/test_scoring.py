"""Contractions, low rank, norms and token scores: the same numbers on every path."""

import models
import pipeline
import pytest
import reference
import torch

from msif_ray.influence import ekfac, scoring
from msif_ray.influence.ekfac import Basis, CorrectionSums
from msif_ray.influence.queries import truncate
from msif_ray.influence.scoring import DenseDirections, LowRankDirections, Scorer, squared_norms

CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def random_directions(seed, queries=4, out=6, columns=9, rank=6):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(queries, out, rank, generator=generator)
    right = torch.randn(queries, rank, columns, generator=generator)
    return left.double() @ right.double()


@pytest.fixture(scope="module")
def captured():
    rows = models.random_documents(5, 7, words=(2, 14), completions=True)
    stage = reference.StageSpec("s", models.build_model("gpt2", 5), models.build_tokenizer(), rows)
    return pipeline.captures(stage, rows, pipeline.TOGETHER)[0]


def low_rank(captured, rank=3):
    return {
        name: LowRankDirections(torch.randn(4, rank, m.shape[0]).double(), torch.randn(4, rank, m.shape[1]).double())
        for name, m in captured.maps.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_truncation_keeps_the_share_of_the_singular_values(seed):
    directions = random_directions(seed)
    expected = torch.linalg.eigvalsh(directions @ directions.transpose(1, 2)).flip(1)  # squared singular values
    for rank in (1, 2, 3):
        kept, energy = truncate(directions, rank=rank)
        assert isinstance(kept, LowRankDirections) and kept.left.shape[1] == rank
        torch.testing.assert_close(energy, expected[:, :rank].sum(1) / expected.sum(1), **CLOSE)
        lost = (directions - kept.dense).square().sum((1, 2)) / directions.square().sum((1, 2))
        torch.testing.assert_close(energy, 1 - lost, **CLOSE)
    kept, energy = truncate(directions, energy=float(energy.min()) - 1e-9)
    assert kept.left.shape[1] == 3
    same, energy = truncate(directions, rank=6)
    assert isinstance(same, DenseDirections) and torch.equal(same.dense, directions) and (energy == 1).all()


def test_truncation_at_full_rank_is_exact():
    directions = random_directions(0, rank=3)
    directions[2] = 0
    kept, energy = truncate(directions, rank=3)
    torch.testing.assert_close(kept.dense, directions, **CLOSE)
    torch.testing.assert_close(energy, torch.ones(4).double(), **CLOSE)
    kept, energy = truncate(directions, energy=1 - 1e-12)
    assert kept.left.shape[1] == 3


def test_both_contractions_agree(captured):
    torch.manual_seed(0)
    directions = low_rank(captured)
    dense = {name: DenseDirections(d.dense) for name, d in directions.items()}
    scores, norms = Scorer(dense).score(captured)
    for entries in (0, 10**9):
        found = Scorer(directions, dense_entries=entries).score(captured)
        torch.testing.assert_close(found[0], scores, **CLOSE)
        torch.testing.assert_close(found[1], norms, **CLOSE)
    for query in range(4):
        for kind in (directions, dense):
            tokens = Scorer(kind).token_scores(captured, query)
            assert tokens.shape == captured.batch.input_ids.shape
            torch.testing.assert_close(tokens.sum(1), scores[:, query], **CLOSE)
            assert not tokens[~captured.batch.attention_mask].any()


def test_the_chooser_counts_multiplications(captured):
    directions = {"m": LowRankDirections(torch.zeros(50, 2, 64), torch.zeros(50, 2, 32))}
    scorer = Scorer(directions)
    norm = min(8 * 8 * 97, 9 * 64 * 32)
    assert scoring.materialised_cost(8, 64, 32, 50) == 59 * 64 * 32
    assert scoring.token_cost(8, 64, 32, 50, 2) == 8 * 2 * 50 * 97 + norm
    assert not scorer.materialises("m", 8)
    assert scorer.materialises("m", 200)
    assert not Scorer(directions, dense_entries=0).materialises("m", 200)
    for tokens in range(1, 300):
        cheaper = scoring.materialised_cost(tokens, 64, 32, 50) <= scoring.token_cost(tokens, 64, 32, 50, 2)
        assert scorer.materialises("m", tokens) == cheaper


@pytest.mark.parametrize("tokens", (1, 3, 40))
def test_gram_norms_equal_materialised_ones(tokens):
    generator = torch.Generator().manual_seed(tokens)
    a = torch.randn(5, tokens, 9, generator=generator).double()
    g = torch.randn(5, tokens, 6, generator=generator).double()
    by_gram = scoring.gram_cost(tokens, 6, 9) < scoring.materialised_cost(tokens, 6, 9, 0)
    assert by_gram == (tokens < 40)
    torch.testing.assert_close(squared_norms(a, g), (g.transpose(1, 2) @ a).square().sum((1, 2)), **CLOSE)


def test_bounded_memory_changes_nothing(captured, monkeypatch):
    torch.manual_seed(1)
    directions = {name: DenseDirections(d.dense) for name, d in low_rank(captured).items()}
    bases = {
        name: Basis(*(torch.linalg.qr(torch.randn(n, n).double())[0] for n in reversed(m.shape)))
        for name, m in captured.maps.items()
    }

    def results():
        corrections = CorrectionSums(bases)
        corrections.add(captured)
        return [*Scorer(directions).score(captured), *corrections.sums.values()]

    whole = results()
    monkeypatch.setitem(ekfac.GRADIENT_ENTRIES, "cpu", 900)  # one or two rows at once
    for found, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def rotates_vectors(tokens, out, columns):
    return tokens * (out**2 + columns**2) < out * columns * (out + columns)


@pytest.mark.parametrize("words", ((2, 4), (30, 40)))
def test_correction_sums_whichever_is_rotated(words):
    """Vectors are rotated where windows are short, gradients where they are long."""
    rows = models.random_documents(6, 4, words=words)
    stage = reference.StageSpec("s", models.build_model("gpt2", 6), models.build_tokenizer(), rows)
    (seen,) = pipeline.captures(stage, rows, pipeline.TOGETHER)
    torch.manual_seed(0)
    bases = {
        name: Basis(*(torch.linalg.qr(torch.randn(n, n).double())[0] for n in reversed(m.shape)))
        for name, m in seen.maps.items()
    }
    corrections = CorrectionSums(bases)
    corrections.add(seen)
    for name, m in seen.maps.items():
        assert rotates_vectors(seen.batch.input_ids.shape[1], *m.shape) == (words == (2, 4))
        gradients = seen.gradients(name).transpose(1, 2) @ seen.activations(name)
        expected = (bases[name].gradients.T @ gradients @ bases[name].activations).square().sum(0)
        torch.testing.assert_close(corrections.sums[f"E/{name}"], expected, **CLOSE)
