"""Contractions, low rank, norms and token scores: the same numbers on every path."""

import models
import pipeline
import pytest
import reference
import torch

from msif_ray.influence import directions as directions_module
from msif_ray.influence import ekfac, scoring
from msif_ray.influence.directions import PRODUCT_ENTRIES, DenseDirections, LowRankDirections, join, laid_out
from msif_ray.influence.ekfac import Basis, CorrectionSums
from msif_ray.influence.products import MANY
from msif_ray.influence.queries import smaller_form, truncate
from msif_ray.influence.scoring import Scorer, squared_norms

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
        name: LowRankDirections.stacked(*(torch.randn(4, rank, size).double() for size in m.shape))
        for name, m in captured.maps.items()
    }


def ragged(directions):
    """The same directions with zero vectors added to one query and each query's number of vectors its own."""
    found = {}
    for name, each in directions.items():
        parts = [each.part(query, query + 1) for query in range(len(each))]
        added = parts[1]
        left, right = (torch.cat([side, torch.zeros_like(side[:2])]) for side in (added.left, added.right))
        parts[1] = LowRankDirections(left, right, added.ranks + 2)
        found[name] = join(parts)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_truncation_keeps_the_share_of_the_singular_values(seed):
    directions = random_directions(seed)
    expected = torch.linalg.eigvalsh(directions @ directions.transpose(1, 2)).flip(1)  # squared singular values
    for rank in (1, 2, 3):
        kept, energy = truncate(directions, rank=rank)
        assert isinstance(kept, LowRankDirections) and kept.ranks.tolist() == [rank] * 4
        torch.testing.assert_close(energy, expected[:, :rank].sum(1) / expected.sum(1), **CLOSE)
        lost = (directions - kept.dense).square().sum((1, 2)) / directions.square().sum((1, 2))
        torch.testing.assert_close(energy, 1 - lost, **CLOSE)
    wanted = float(energy.min()) - 1e-9
    shares = expected.cumsum(1) / expected.sum(1, keepdim=True)
    kept, energy = truncate(directions, energy=wanted)
    assert kept.ranks.tolist() == ((shares < wanted).sum(1) + 1).tolist() and kept.ranks.max() == 3
    same, energy = truncate(directions, rank=6)
    assert isinstance(same, DenseDirections) and torch.equal(same.dense, directions) and (energy == 1).all()


def test_float32_directions_are_cut_as_well_as_float32_allows():
    """By Gram matrices in float64: compared with an SVD in float64, over eight orders of singular values."""
    torch.manual_seed(0)
    for out, columns in ((12, 30), (30, 12)):
        scales = torch.logspace(0, -8, 12, dtype=torch.float64)
        left, right = (torch.linalg.qr(torch.randn(3, size, 12).double())[0] for size in (out, columns))
        directions = ((left * scales) @ right.transpose(1, 2)).float()
        u, values, v = torch.linalg.svd(directions.double(), full_matrices=False)
        for rank in (1, 3, 8):
            kept, energy = truncate(directions, rank=rank)
            best = (u[:, :, :rank] * values[:, None, :rank]) @ v[:, :rank]
            torch.testing.assert_close(kept.dense.double(), best, rtol=0, atol=2e-7)
            expected = values[:, :rank].square().sum(1) / values.square().sum(1)
            torch.testing.assert_close(energy, expected, rtol=0, atol=1e-14)


def test_energy_decides_each_query_by_itself():
    """A query's direction does not depend on which others are cut with it, nor on the form they take together."""
    directions = random_directions(4, queries=9, rank=2)
    directions += 0.3 * random_directions(5, queries=9, rank=6) * torch.linspace(0, 1, 9).double()[:, None, None]
    for energy in (0.5, 0.9, 0.99, 0.9999):
        together, kept = truncate(directions, energy=energy)
        alone = [truncate(directions[query : query + 1], energy=energy) for query in range(9)]
        torch.testing.assert_close(together.dense, torch.cat([each.dense for each, _ in alone]), **CLOSE)
        torch.testing.assert_close(kept, torch.cat([share for _, share in alone]), **CLOSE)
        assert (kept >= energy).all()
        smaller = smaller_form(together)
        assert isinstance(smaller, DenseDirections) == (together.total_rank * (6 + 9) >= 9 * 6 * 9)
        torch.testing.assert_close(smaller.dense, together.dense, **CLOSE)


def test_truncation_at_full_rank_is_exact():
    directions = random_directions(0, rank=3)
    directions[2] = 0
    kept, energy = truncate(directions, rank=3)
    torch.testing.assert_close(kept.dense, directions, **CLOSE)
    torch.testing.assert_close(energy, torch.ones(4).double(), **CLOSE)
    kept, energy = truncate(directions, energy=1 - 1e-12)
    assert kept.ranks.tolist() == [3, 3, 0, 3]


@pytest.mark.parametrize("formed", (True, False))
def test_both_contractions_agree(captured, monkeypatch, formed):
    monkeypatch.setattr(Scorer, "_materialises", lambda self, name, directions, *_: formed)
    torch.manual_seed(0)
    directions = low_rank(captured)
    dense = {name: DenseDirections(d.dense) for name, d in directions.items()}
    scores, norms = Scorer(dense).score(captured)
    for forms in (directions, ragged(directions)):
        for entries, limit in ((10**9, 2**22), (0, 2**22), (0, 100)):
            monkeypatch.setitem(PRODUCT_ENTRIES, "cpu", limit)  # one query or vector at once
            found = Scorer(forms, dense_entries=entries).score(captured)
            torch.testing.assert_close(found[0], scores, **CLOSE)
            torch.testing.assert_close(found[1], norms, **CLOSE)
    for query in range(4):
        for kind in (directions, dense):
            pairs = [(row, query) for row in range(len(captured.batch.keys))]
            tokens, maps = Scorer(kind).pair_shares(captured, pairs)
            assert tokens.shape == captured.batch.input_ids.shape and maps.shape == (len(pairs), len(captured.maps))
            torch.testing.assert_close(maps.sum(1), scores[:, query], **CLOSE)
            torch.testing.assert_close(tokens.sum(1), scores[:, query], **CLOSE)
            assert not tokens[~captured.batch.attention_mask].any()


@pytest.mark.parametrize("entries", (2**22, 1))  # all queries at once, and one by one
def test_details_are_those_of_pairs(captured, monkeypatch, entries):
    monkeypatch.setitem(PRODUCT_ENTRIES, "cpu", entries)
    torch.manual_seed(0)
    directions = ragged(low_rank(captured))
    for kind in (directions, {name: DenseDirections(d.dense) for name, d in directions.items()}):
        scorer = Scorer(kind)
        scores, norms = scorer.score(captured)
        pairs = [(row, query) for row in range(len(scores)) for query in range(4)]
        by_token, by_map = (shares.unflatten(0, scores.shape) for shares in scorer.pair_shares(captured, pairs))
        for tokens in (True, False):
            found = scorer.detailed(captured, tokens)
            assert (found.by_token is not None) == tokens
            torch.testing.assert_close(found.by_map, by_map, **CLOSE)
            torch.testing.assert_close(found.scores, scores, **CLOSE)
            torch.testing.assert_close(found.norms, norms, **CLOSE)
        torch.testing.assert_close(scorer.detailed(captured, True).by_token, by_token, **CLOSE)


def test_without_norms_scores_are_the_same_and_no_gradient_is_formed_for_one(captured, monkeypatch):
    torch.manual_seed(0)
    directions = low_rank(captured)
    kinds = (directions, ragged(directions), {name: DenseDirections(d.dense) for name, d in directions.items()})
    wanted, _ = Scorer(directions).score(captured)
    for kind in kinds:
        without = Scorer(kind, norms=False)
        found = without.detailed(captured, tokens=True)
        for scores, norms in (without.score(captured), (found.scores, found.norms)):
            torch.testing.assert_close(scores, wanted, **CLOSE)
            assert norms.shape == (len(scores),) and norms.isnan().all()
    monkeypatch.setattr(scoring, "window_gradients", None)
    monkeypatch.setattr(scoring, "squared_norms", None)
    one = {name: each.part(0, 1) for name, each in directions.items()}  # few enough to be met token by token
    torch.testing.assert_close(Scorer(one, norms=False).score(captured)[0], wanted[:, :1], **CLOSE)


def test_the_chooser_counts_multiplications(captured):
    directions = {"m": LowRankDirections.stacked(torch.zeros(50, 2, 64), torch.zeros(50, 2, 32))}
    scorer = Scorer(directions)
    norm = min(8 * 8 * 97, 9 * 64 * 32)
    assert scoring.materialised_cost(8, 64, 32, 50) == 59 * 64 * 32
    assert scoring.token_cost(8, 64, 32, 50, 2) == 8 * 2 * 50 * 97 + norm
    assert scoring.materialised_cost(8, 64, 32, 50, norms=False) == 58 * 64 * 32
    assert scoring.token_cost(8, 64, 32, 50, 2, norms=False) == 8 * 2 * 50 * 97
    assert not scorer.materialises("m", 8)
    assert scorer.materialises("m", 200)
    # Expanded anew for each product, which pays when that serves enough windows.
    assert not Scorer(directions, dense_entries=0).materialises("m", 16, rows=1)
    assert Scorer(directions, dense_entries=0).materialises("m", 16, rows=50)
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


@pytest.mark.parametrize("entries", (100, 10_000))  # one row at once, or more
@pytest.mark.parametrize("threads", (1, 2))
def test_squares_of_all_rows_whatever_the_threads(monkeypatch, threads, entries):
    monkeypatch.setitem(ekfac.GRADIENT_ENTRIES, "cpu", entries)
    generator = torch.Generator().manual_seed(0)
    activations, gradients = (torch.randn(7, 5, n, dtype=torch.float64, generator=generator) for n in (9, 8))
    total = torch.ones(9, 8, dtype=torch.float64).mT
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ekfac.add_squares(total, activations, gradients, torch.float64)
    finally:
        torch.set_num_threads(before)
    expected = sum((g.T @ a).square() for a, g in zip(activations, gradients, strict=True))
    torch.testing.assert_close(total, 1 + expected, **CLOSE)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("queries", (3, MANY))
def test_few_and_many_queries_meet_the_gradients_of_all_rows(monkeypatch, queries, transposed):
    monkeypatch.setitem(ekfac.GRADIENT_ENTRIES, "cpu", 200)  # two rows at once, or four for many queries
    generator = torch.Generator().manual_seed(queries)
    inputs, gradients, matrix = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((7, 5, 9), (7, 5, 8), (queries, 8, 10))
    )
    directions = laid_out(DenseDirections(matrix)) if transposed else DenseDirections(matrix)
    assert directions.transposed is transposed and torch.equal(directions.dense, matrix)
    scores, norms = Scorer({"map": directions}).score_map("map", directions, inputs, gradients, bias=True)
    for row in range(7):
        wanted = sum(
            torch.outer(g, torch.cat([a, a.new_ones(1)])) for a, g in zip(inputs[row], gradients[row], strict=True)
        )
        torch.testing.assert_close(norms[row], wanted.square().sum(), rtol=1e-12, atol=0)
        for query in range(queries):
            torch.testing.assert_close(scores[row, query], (wanted * matrix[query]).sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_products_take_no_copy_of_gradients_in_their_order(monkeypatch, bias, transposed):
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = torch.randn(3, 5, 9, generator=generator), torch.randn(3, 5, 8, generator=generator)
    met = []
    monkeypatch.setattr(directions_module, "inner", lambda left, right: met.append((left, right)) or left[:, 0])
    columns = 9 + int(bias)
    for kind in (DenseDirections(torch.ones(4, 8, columns)), low_rank_of(4, 8, columns)):
        kind = laid_out(kind) if transposed else kind
        for formed in ekfac.window_gradients(inputs, gradients, bias, transposed=kind.transposed):
            kind.products(formed)
            left, right = met.pop()
            assert left.is_contiguous() and left.data_ptr() == formed.data_ptr()
            assert right.is_contiguous() and right.shape[1:] == left.shape[1:]


def low_rank_of(queries, out, columns):
    return LowRankDirections.stacked(torch.ones(queries, 2, out), torch.ones(queries, 2, columns))


@pytest.mark.parametrize(
    "rows, shape, multiple, expected",
    [
        (32, (1024, 257), 1, [16, 16]),  # not 15, 15 and 2, which two threads share badly
        (32, (1024, 257), 2, [32]),
        (33, (1024, 257), 2, [33]),
        (34, (1024, 257), 2, [17, 17]),
        (20, (768, 257), 1, [20]),
        (3, (4096, 4097), 1, [1, 1, 1]),
    ],
)
def test_window_gradients_come_in_even_parts(rows, shape, multiple, expected):
    out, columns = shape
    inputs, gradients = torch.ones(rows, 1, columns - 1), torch.ones(rows, 1, out)
    assert [len(part) for part in ekfac.window_gradients(inputs, gradients, True, multiple)] == expected
